# Thin over cargo: `make up` runs functions on this machine, `make test` runs every test there is.

.PHONY: up build test needs fmt lint unit docs manifests browser yaml chaos fuzz soak

up: build
	target/release/gateway up examples/stack.yaml

build:
	cargo build --release --locked

test: needs fmt lint unit docs manifests browser

# What the tests call beside cargo: Python plays the conformance suites, unshare gives them a network of their own,
# nats-server keeps the queue of some, promtool and amtool read the rules and configurations of the chart.
# nats-streaming-server, which Debian has not, is built by Go.
# RUNLEVEL: none of it is to be started as a service.
needs:
	@for tool in python3:python3 unshare:util-linux ip:iproute2 perl:perl-base cc:gcc nats-server:nats-server \
	    promtool:prometheus amtool:prometheus-alertmanager curl:curl go:golang-go openssl:openssl node:nodejs npm:npm; do \
	  command -v $${tool%%:*} >/dev/null || missing="$$missing $${tool##*:}"; \
	done; \
	python3 -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	if [ -n "$$missing" ]; then apt-get update -q && RUNLEVEL=1 apt-get install -yq --no-install-recommends $$missing; fi
	tests/tools/nats-streaming.sh
	@if [ -d ../shared/conformance ]; then \
	  diff -rq tests/conformance ../shared/conformance || echo "NOTE: tests/conformance differs from ../shared/conformance"; \
	fi

fmt:
	cargo fmt --check

lint:
	cargo clippy --locked --all-targets -- -D warnings

# Unit, integration and conformance tests: real sockets, real processes, the real binary. Some send SIGHUP, which `nohup`
# has ignored.
unit:
	env --default-signal=HUP cargo test --locked

docs:
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items

# The image's recipe, the chart, plain manifests, rules and dashboards, and all of it at work on this machine:
# tests/manifests/check.py says what is checked.
manifests:
	cargo build --locked
	tests/manifests/tools.sh
	target/manifests/venv/bin/python -B tests/manifests/check.py

# The page under /ui/ in a real Chromium, on a phone and on a desktop.
browser:
	cargo build --locked
	BROWSER_MODULES=$$(tests/browser/tools.sh) node tests/browser/run.mjs

# Chart, plain manifests and a changed Secret on a real control plane, which is built from Go modules the first time:
# some ten minutes. Needs Go 1.26 or what can fetch it (1.21 and later), and root for a network of its own.
.PHONY: kubernetes
test: kubernetes
kubernetes:
	cargo build --locked
	@if command -v go >/dev/null; then \
	  tools=$$(tests/kubernetes/tools.sh) && python3 -B tests/kubernetes/check.py "$$tools"; \
	else \
	  echo "SKIPPED: the checks on a real control plane (tests/kubernetes/), since there is no Go to build it with"; \
	fi

# yaml/, yaml_arm/ and namespaces.yml, from the chart.
yaml:
	tests/manifests/tools.sh
	target/manifests/venv/bin/python -B tests/manifests/plain.py --write

# What becomes of queued calls while everything that handles them is killed again and again, with counts.
chaos: needs
	CHAOS_CALLS=$${CHAOS_CALLS:-50000} cargo test --release --locked --test it queue_chaos -- --nocapture --test-threads 1

# Every parser of bytes from outside under libFuzzer, FUZZ_SECONDS each (60). `make test` replays what it has found.
fuzz: needs
	fuzz/run.sh

# Half an hour (SOAK_MINUTES) of mixed load with a kill -9 each minute: tests/soak/soak.py says what is counted.
soak: needs
	cargo build --release --locked
	python3 -B tests/soak/soak.py target/release/gateway
