# A thin layer over cargo. `make up` runs functions on this machine, `make test` runs all tests.

.PHONY: up build test needs fmt lint unit docs manifests browser yaml chaos fuzz soak

# Profile `quick` of Cargo.toml: a build in half of the time of `make build`, for a first look and for
# development.
up:
	@echo "Building target/quick/gateway. The first build takes about three minutes on two cores, later ones seconds."
	@echo "Then the functions of examples/stack.yaml start, and you see what to try."
	cargo build --profile quick --locked
	target/quick/gateway up examples/stack.yaml

# The program as in the image, fully optimized: target/release/gateway.
build:
	cargo build --release --locked

# Every test. The parts run in this order; a table of their results comes last.
test: needs
	@MAKE="$(MAKE)" python3 -B tests/summary.py fmt lint unit docs manifests browser kubernetes

# Programs that the tests need besides cargo: Python runs the conformance suites, unshare gives them a separate network
# namespace, nats-server is the queue of some tests, promtool and amtool check the rules and configurations of the chart.
# Debian has no package of nats-streaming-server, so Go builds it.
# RUNLEVEL=1 keeps apt from starting services.
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
	cargo fmt --all --check

lint:
	cargo clippy --locked --workspace --all-targets -- -D warnings

# Unit, integration and conformance tests, with real sockets, processes and the real binary. Some tests send SIGHUP,
# which `nohup` would have set to be ignored.
unit:
	env --default-signal=HUP cargo test --locked --workspace

docs:
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items

# Checks the Dockerfile, the chart, plain manifests, rules and dashboards, and runs them on this machine:
# tests/manifests/check.py lists the checks.
manifests:
	cargo build --locked
	tests/manifests/tools.sh
	target/manifests/venv/bin/python -B tests/manifests/check.py

# Tests the page under /ui/ in Chromium, in a phone and a desktop viewport.
browser:
	cargo build --locked
	BROWSER_MODULES=$$(tests/browser/tools.sh) node tests/browser/run.mjs

# Tests the chart, plain manifests and a changed Secret on a real Kubernetes control plane. The first run builds it from
# Go modules, in about ten minutes. Needs Go 1.26, or Go 1.21 and later to fetch it, and root for a network namespace.
.PHONY: kubernetes
kubernetes:
	cargo build --locked
	@if command -v go >/dev/null; then \
	  tools=$$(tests/kubernetes/tools.sh) && python3 -B tests/kubernetes/check.py "$$tools"; \
	else \
	  echo "SKIPPED: kubernetes: Go, which builds the control plane, is not installed"; \
	fi

# Renders yaml/, yaml_arm/ and namespaces.yml from the chart.
yaml:
	tests/manifests/tools.sh
	target/manifests/venv/bin/python -B tests/manifests/plain.py --write

# docs/SETTINGS.md, from the table of settings.
.PHONY: settings screenshot chart
settings:
	UPDATE_DOCS=1 cargo test --locked --test it the_settings_page_is_current

# The pictures of README.md: the page under /ui/ in Chromium, and the chart of docs/images/cpu-per-call.json.
screenshot:
	cargo build --locked
	BROWSER_MODULES=$$(tests/browser/tools.sh) node tests/browser/screenshot.mjs

chart:
	docs/images/chart.py docs/images/cpu-per-call.json > docs/images/cpu-per-call.svg

# Kills gateways, workers and NATS repeatedly under a load of queued calls, and counts lost and duplicate calls.
chaos: needs
	CHAOS_CALLS=$${CHAOS_CALLS:-50000} cargo test --release --locked --test it queue_chaos -- --nocapture --test-threads 1

# Runs every parser of external input under libFuzzer, for FUZZ_SECONDS (60) each. `make test` replays the seeds.
fuzz: needs
	fuzz/run.sh

# Mixed load for SOAK_MINUTES (30) with one kill -9 each minute: tests/soak/soak.py describes the counts.
soak: needs
	cargo build --release --locked
	python3 -B tests/soak/soak.py target/release/gateway
