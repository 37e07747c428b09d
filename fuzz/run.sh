#!/usr/bin/env bash
# Runs every fuzz target, or those given as arguments (CRATE/TARGET), for FUZZ_SECONDS each (60 by default), on the stable toolchain.
# An input that violates a property fails its target. It is printed as a line for fuzz/seeds/, which the tests replay.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${FUZZ_SECONDS:-60}
out=../target/fuzz
target=$(rustc -vV | sed -n 's/^host: //p')

# The flags of cargo-fuzz without a sanitizer: the crate has no unsafe code, and sanitizers need a nightly toolchain.
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares"
# With --target the flags do not apply to build scripts, which are not linked with libFuzzer.
cargo build --release --locked --target "$target" --target-dir "$out/build"
parsers=$out/build/$target/release/parsers

[ $# -gt 0 ] || set -- $(cd seeds && ls -- */*.txt | sed 's/\.txt$//')
passed=0 failed=0
for seeds in "$@"; do
  name=${seeds#*/}
  corpus=$out/corpus/$name found=$out/findings/$name
  rm -rf "$found"; mkdir -p "$corpus" "$found"
  python3 seeds.py expand "seeds/$seeds.txt" "$corpus"
  log=$out/$name.log
  if FUZZ_TARGET=$name "$parsers" -max_total_time="$seconds" -max_len=8192 -timeout=5 -rss_limit_mb=1024 \
      -artifact_prefix="$found/" "$corpus" >"$log" 2>&1; then
    runs=$(sed -n 's/^Done \([0-9]*\) runs.*/\1/p' "$log")
    covered=$(grep -o 'cov: [0-9]*' "$log" | tail -n 1)
    printf '%-20s %12s inputs, %s, no finding\n' "$name" "${runs:-?}" "$covered"
    passed=$((passed + 1))
  else
    tail -n 25 "$log"
    for input in "$found"/*; do
      printf '%s: add this line to fuzz/seeds/%s.txt:\n%s\n' "$input" "$seeds" "$(python3 seeds.py line "$input")"
    done
    failed=$((failed + 1))
  fi
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
