#!/usr/bin/env bash
# scripts/fuzz.sh: the fuzzers of what stands on a drive and of config files, all at once, for KVTIER_FUZZ_SECONDS
# (default 600). KVTIER_FUZZ_SEED says where their inputs begin.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
seconds=${KVTIER_FUZZ_SECONDS:-600}

KVTIER_FUZZ_SECONDS=0 scripts/ctest.sh dev -R Fuzz  # builds them

export KVTIER_FUZZ_SECONDS=$seconds
running=()
for suite in SlotFuzz StoreFuzz; do
  build/dev/tests/cpp/kvtier_storage_test --gtest_filter="$suite.*" --gtest_brief=1 &
  running+=($!)
done
pytest -q -s --timeout $((seconds + 300)) tests/py/unit/test_config_fuzz.py &
running+=($!)
for pid in "${running[@]}"; do wait "$pid"; done
