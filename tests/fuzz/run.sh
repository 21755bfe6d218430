#!/bin/bash
# Runs every fuzz target for so many seconds: run.sh SECONDS. Finds are in tests/fuzz/artifacts, new inputs in
# tests/fuzz/corpus; the seeds that are kept are in tests/fuzz/seeds.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/../.."
seconds=${1:?how many seconds for each target}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/fuzz

for target in codec session split_tx split_rx packed_tx packed_rx header; do
    echo "fuzz: $target for $seconds s" >&2
    mkdir -p "tests/fuzz/corpus/$target"
    log=$(mktemp)
    if ! cargo +nightly fuzz run --fuzz-dir tests/fuzz "$target" "tests/fuzz/corpus/$target" "tests/fuzz/seeds/$target" \
        -- "-max_total_time=$seconds" -max_len=2048 >"$log" 2>&1; then
        cat "$log" >&2
        rm "$log"
        exit 1
    fi
    tail -n 2 "$log" >&2
    rm "$log"
done
