#!/bin/sh
# Installs what the browser tests call, once: Chromium from Debian, and the packages of package-lock.json into the
# cache directory, whose name it prints.
set -eu
cd "$(dirname "$0")"
# RUNLEVEL: nothing is to be started as a service.
command -v chromium >/dev/null ||
  { apt-get update -q && RUNLEVEL=1 apt-get install -yq --no-install-recommends chromium; } >&2

version=$(cksum < package-lock.json | cut -d ' ' -f 1)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/gateway-tests/browser-$version
if [ ! -e "$cache/complete" ]; then
  mkdir -p "$cache"
  cp package.json package-lock.json "$cache/"
  npm ci --prefix "$cache" --ignore-scripts --no-audit --no-fund >&2
  touch "$cache/complete"
fi
echo "$cache"
