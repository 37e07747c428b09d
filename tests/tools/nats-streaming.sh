#!/bin/sh
# Builds NATS Streaming's server, once, where the tests look for it. Debian has no package of it.
set -eu
version=0.25.6
bin=${XDG_CACHE_HOME:-$HOME/.cache}/gateway-tests/nats-streaming-server-$version
[ ! -x "$bin/nats-streaming-server" ] || exit 0
mkdir -p "$bin"
# Into place in one step: a build that is cut short must not be taken for the server.
work=$(mktemp -d)
trap 'chmod -R u+w "$work" && rm -rf "$work"' EXIT
GOBIN=$work/bin GOPATH=$work/go GOFLAGS=-modcacherw CGO_ENABLED=0 go install "github.com/nats-io/nats-streaming-server@v$version"
mv "$work/bin/nats-streaming-server" "$bin/"
