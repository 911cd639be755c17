#!/usr/bin/env bash
# scripts/ctest.sh PRESET [ctest arguments]: configures, builds and runs the C++ tests of one CMake preset.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
preset=$1
shift

# One build at a time per tree: two ninjas in one folder spoil each other's work.
mkdir -p build
exec 9>"build/$preset.lock"
flock 9
cmake --preset "$preset" --log-level=WARNING >/dev/null
cmake --build --preset "$preset"
flock --unlock 9

run=()
# ThreadSanitizer's fixed address ranges collide with what some kernels' randomisation hands out.
if [ "$preset" = tsan ] && setarch -R true 2>/dev/null; then run=(setarch -R); fi
# Passing tests are only counted, in ctest's summary.
"${run[@]}" ctest --preset "$preset" "$@" | grep --line-buffered -vE '^ +Start +[0-9]+: | Passed +[0-9.]+ sec$'
