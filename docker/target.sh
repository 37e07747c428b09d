# Names of the target platform: Debian architecture, Rust target triple, directory of C headers. Sourced by the Dockerfile.
case "${TARGETPLATFORM:-linux/$(dpkg --print-architecture)}" in
  linux/amd64) debian=amd64 triple=x86_64-unknown-linux-musl headers=x86_64-linux-musl ;;
  linux/arm64*) debian=arm64 triple=aarch64-unknown-linux-musl headers=aarch64-linux-musl ;;
  linux/arm/v7 | linux/armhf) debian=armhf triple=armv7-unknown-linux-musleabihf headers=arm-linux-musleabihf ;;
  *) echo "no build for ${TARGETPLATFORM}" >&2; exit 1 ;;
esac

# Prints cargo's configuration for the target platform: one compiler and one linker for everything.
# mimalloc embeds the date and time of its compilation; both are empty here, so that builds are reproducible.
# The flags are split at spaces, and keep the quotes that remain after TOML parsing.
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
