# Thin over cargo: `make up` runs functions on this machine, `make test` runs every test there is.

.PHONY: up build test needs fmt lint unit docs chaos

up: build
	target/release/gateway up examples/stack.yaml

build:
	cargo build --release --locked

test: needs fmt lint unit docs

# What the tests call beside cargo: Python plays the conformance suites, unshare gives them a network of their own,
# nats-server keeps the queue of some.
needs:
	@for tool in python3:python3 unshare:util-linux ip:iproute2 perl:perl-base cc:gcc nats-server:nats-server; do \
	  command -v $${tool%%:*} >/dev/null || missing="$$missing $${tool##*:}"; \
	done; \
	if [ -n "$$missing" ]; then apt-get update -q && apt-get install -yq --no-install-recommends $$missing; fi
	@if [ -d ../shared/conformance ]; then \
	  diff -rq tests/conformance ../shared/conformance || echo "NOTE: tests/conformance differs from ../shared/conformance"; \
	fi

fmt:
	cargo fmt --check

lint:
	cargo clippy --locked --all-targets -- -D warnings

# Unit, integration and conformance tests: real sockets, real processes, the real binary.
unit:
	cargo test --locked

docs:
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items

# What becomes of queued calls while everything that handles them is killed again and again, with counts.
chaos: needs
	CHAOS_CALLS=$${CHAOS_CALLS:-50000} cargo test --release --locked --test it queue_chaos -- --nocapture --test-threads 1
