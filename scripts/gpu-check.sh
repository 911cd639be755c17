#!/usr/bin/env bash
# Everything that needs a GPU, in at most 9 minutes: builds for this GPU, runs the GPU tests and benchmarks, writes
# benchmarks/results/gpu-<name>-<date>.json. Needs no network, but Python with torch, pytest, NumPy, hypothesis,
# pybind11 and scikit-build-core, cmake, ninja, nvcc, and the libraries of scripts/system-packages.sh, installed
# or in build/offline-deps (make offline-deps). Writes nothing outside of build/ but the results and
# src/kvtier/_core*.so, which git ignores.
#
# Environment: COMMIT names the commit where this is no git checkout, RESULTS the folder of the results, PYTHON
# the interpreter, CUDA_ARCHITECTURES what to compile for (default: the GPU that is here).
set -uo pipefail
cd "$(dirname "$0")/.." || exit

python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results}
deps=$PWD/build/offline-deps/usr
work=$PWD/build/gpu
binary=$work/tests/tests/cpp/kvtier_platform_test
kvtier=("$python" -m kvtier.cli)

export REQUIRE_GPU=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD/src:$work/site"
options=(-DKVTIER_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="${CUDA_ARCHITECTURES:-native}")
if [ -d "$deps" ]; then
  machine=$(uname -m)-linux-gnu
  export CPATH="$deps/include:$deps/include/$machine${CPATH:+:$CPATH}"
  export LIBRARY_PATH="$deps/lib/$machine${LIBRARY_PATH:+:$LIBRARY_PATH}"
  export LD_LIBRARY_PATH="$deps/lib/$machine${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  options+=(-DCMAKE_PREFIX_PATH="$deps" -DOPENSSL_ROOT_DIR="$deps" -DOPENSSL_USE_STATIC_LIBS=ON)
fi

# The tree itself is what runs, so that results name its commit: only the metadata stay where pip put them.
package() {
  local settings=(--config-settings=build-dir="$work/wheel")
  for option in "${options[@]}"; do settings+=("--config-settings=cmake.define.${option#-D}"); done
  rm -rf "$work/site"
  "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$work/site" \
    "${settings[@]}" . || return
  rm -f src/kvtier/_core*.so
  mv "$work"/site/kvtier/_core*.so src/kvtier/ && rm -r "$work/site/kvtier"
}

cpp_build() {
  cmake -S . -B "$work/tests" -G Ninja -DCMAKE_BUILD_TYPE=Release -DKVTIER_TESTS=ON -DKVTIER_BINDINGS=OFF \
    "${options[@]}" --log-level=WARNING &&
    cmake --build "$work/tests" --parallel "$(nproc)" --target kvtier_platform_test
}

cpp_tests() { "$binary" --gtest_brief=1 --gtest_filter='Cuda*'; }

py_tests() { "$python" -m pytest -c tests/py/gpu/pytest.ini --rootdir . -q tests/py/gpu; }

memcheck() {
  if ! command -v compute-sanitizer; then
    echo "compute-sanitizer is not installed"
    return 1
  fi
  compute-sanitizer --tool memcheck --error-exitcode 9 "$binary" --gtest_brief=1 \
    --gtest_filter='Cuda/*.copies_every_run*:Cuda/*.copies_both_ways*'
}

doctor() { "${kvtier[@]}" doctor; }

bench() {
  local name
  name=$("$python" -c 'from kvtier.cli.bench_device import default_result_file as f; print(f())') || return
  mkdir -p "$results"
  "${kvtier[@]}" bench device --rounds 5 --json "$results/$name"
  local status=$?
  "$python" - "$results/$name" <<'END'
import json, os, pathlib, sys

path = pathlib.Path(sys.argv[1])
document = json.loads(path.read_text())
if document["commit"] == "unknown" and os.environ.get("COMMIT"):
    document["commit"] = os.environ["COMMIT"]
    path.write_text(json.dumps(document, indent=1) + "\n")
print(f"wrote {path}, commit {document['commit']}")
END
  return $status
}

if [ "${1:-}" = --step ]; then
  "$2"
  exit
fi

# --- all steps; one that fails does not keep the others from running ---

readonly budget=530
failed=0
summary=()
step() {
  local name=$1 limit=$2 begin=$SECONDS status=0 left=$((budget - SECONDS))
  printf '\n== %s ==\n' "$name"
  timeout --kill-after=5 "$((left < limit ? (left > 1 ? left : 1) : limit))" scripts/gpu-check.sh --step "$name" || status=$?
  summary+=("$(printf '%-10s %4d s  %s' "$name" $((SECONDS - begin)) \
    "$([ $status = 0 ] && echo ok || echo "FAILED ($status)")")")
  [ $status = 0 ] || failed=1
}

mkdir -p "$work"
step package 200
step cpp_build 200
step cpp_tests 90
step py_tests 150
step memcheck 60
step doctor 30
step bench 150
printf '\n== gpu-check ==\n'
printf '%s\n' "${summary[@]}"
exit $failed
