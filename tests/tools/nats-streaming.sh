#!/bin/sh
# Builds the NATS Streaming server once, in the directory where the tests look for it. Debian has no package of it.
set -eu
version=0.25.6
bin=${XDG_CACHE_HOME:-$HOME/.cache}/gateway-tests/nats-streaming-server-$version
[ ! -x "$bin/nats-streaming-server" ] || exit 0
mkdir -p "$bin"
# Moves the binary into place in one step: an aborted build must not leave an incomplete one.
work=$(mktemp -d)
trap 'chmod -R u+w "$work" && rm -rf "$work"' EXIT
GOBIN=$work/bin GOPATH=$work/go GOFLAGS=-modcacherw CGO_ENABLED=0 go install "github.com/nats-io/nats-streaming-server@v$version"
mv "$work/bin/nats-streaming-server" "$bin/"
