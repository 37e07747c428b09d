#!/bin/sh
# Installs Chromium from Debian and the packages of package-lock.json, once, for the browser tests. Prints the cache
# directory with the packages.
set -eu
cd "$(dirname "$0")"
# RUNLEVEL=1 keeps apt from starting services.
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
