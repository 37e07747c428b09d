# What the machine that is built for is called: by Debian, by Rust, and as a folder of headers. Sourced by the Dockerfile.
case "${TARGETPLATFORM:-linux/$(dpkg --print-architecture)}" in
  linux/amd64) debian=amd64 triple=x86_64-unknown-linux-musl headers=x86_64-linux-musl ;;
  linux/arm64*) debian=arm64 triple=aarch64-unknown-linux-musl headers=aarch64-linux-musl ;;
  linux/arm/v7 | linux/armhf) debian=armhf triple=armv7-unknown-linux-musleabihf headers=arm-linux-musleabihf ;;
  *) echo "no build for ${TARGETPLATFORM}" >&2; exit 1 ;;
esac

# Cargo's configuration for it: everything that is built is built for it, with one compiler and one linker.
# mimalloc notes the date and time at which it was compiled: they are made empty, so that two builds of the same sources
# are the same. The flags are split at spaces, and keep the quotes that TOML leaves them.
cargo_config() {
  local name=${triple//-/_}
  local timeless='-Wno-builtin-macro-redefined -D__DATE__=\"\" -D__TIME__=\"\"'
  cat <<TOML
[build]
target = "$triple"
[target.$triple]
linker = "rust-lld"
[env]
CC_$name = "clang"
AR_$name = "llvm-ar"
CFLAGS_$name = "--target=$triple -nostdinc -isystem $(clang -print-resource-dir)/include -isystem /usr/include/$headers $timeless"
[profile.release]
debug = "none"
strip = "symbols"
TOML
}
