#!/usr/bin/env bash
# clang-tidy, with clang's thread-safety analysis, over every C++ source of csrc/.
set -euo pipefail
cd "$(dirname "$0")/.."
cmake --preset dev --log-level=WARNING >/dev/null
run-clang-tidy.py -p build/dev -j "${JOBS:-2}" -quiet "$PWD/csrc/.*\.cpp$"
