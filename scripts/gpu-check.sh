#!/usr/bin/env bash
# Everything that needs a GPU, in at most 9 minutes: builds for this GPU, runs the GPU tests and benchmarks, writes
# benchmarks/results/gpu-<name>-<date>.json and, if there is time left, ttft-gpu-<name>-<date>.json. Needs no network, but Python with torch, pytest, NumPy, hypothesis,
# pybind11 and scikit-build-core, cmake, ninja, nvcc, and the libraries of scripts/system-packages.sh, installed
# or in build/offline-deps (make offline-deps). Writes nothing outside of build/ but the results and
# src/kvtier/_core*.so and kvtier-catalog, which git ignores.
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

command -v nvcc >/dev/null || PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
# Calibrations are measured here, not found from another day's driver or build.
export REQUIRE_GPU=1 PYTHONUNBUFFERED=1 PATH XDG_CACHE_HOME=$work/cache
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
  rm -f src/kvtier/_core*.so src/kvtier/kvtier-catalog
  mv "$work"/site/kvtier/_core*.so src/kvtier/ || return
  # The catalog's helper is looked for beside the module; a build without lmdb has none.
  [ ! -e "$work/site/kvtier/kvtier-catalog" ] || mv "$work/site/kvtier/kvtier-catalog" src/kvtier/ || return
  rm -r "$work/site/kvtier"
}

cpp_build() {
  cmake -S . -B "$work/tests" -G Ninja -DCMAKE_BUILD_TYPE=Release -DKVTIER_TESTS=ON -DKVTIER_BINDINGS=OFF \
    "${options[@]}" --log-level=WARNING &&
    cmake --build "$work/tests" --parallel "$(nproc)" --target kvtier_platform_test
}

# Each path has a process of its own: after an illegal access every call of a process fails.
cpp_tests() {
  local tests status=0
  for tests in Cuda/*/{plain,merged,batched,kernel,staged,bulk} 'Cuda*-Cuda/*'; do
    "$binary" --gtest_brief=1 --gtest_filter="$tests" || status=1
  done
  return $status
}

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

# What was measured before the step's time was over is in the file all the same: timeout sends SIGINT.
measure() {  # FILE'S PREFIX, SUBJECT and options
  local prefix=$1 name status=0
  shift
  name=$prefix$("$python" -c 'from kvtier.cli.bench_device import default_result_file as f; print(f())') || return
  mkdir -p "$results"
  "${kvtier[@]}" bench "$@" --json "$results/$name" || status=$?
  "$python" - "$results/$name" <<'END'
import json, os, pathlib, sys

path = pathlib.Path(sys.argv[1])
if not path.exists():
    raise SystemExit("no results were written")
document = json.loads(path.read_text())
if document["commit"] == "unknown" and os.environ.get("COMMIT"):
    document["commit"] = os.environ["COMMIT"]
    path.write_text(json.dumps(document, indent=1) + "\n")
print(f"wrote {path}, commit {document['commit']}")
END
  return $status
}

bench() { measure "" device --rounds 5; }

ttft() {
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "no torch that sees the GPU"
    return 1
  }
  measure ttft- ttft --device cuda --shape llama-3.1-8b --tokens 2048 16384 --rounds 3 --minutes 0.5 --dir "$work"
}

if [ "${1:-}" = --step ]; then
  "$2"
  exit
fi

# --- all steps; one that fails does not keep the others from running ---

# Each step has its share of the time, and what the steps before it have left of theirs. The shares add up to
# 530 s; what does not end at SIGINT is killed 8 s later.
readonly out_of_time=124
due=0 failed=0
summary=()
step() {  # NAME SECONDS [optional]
  local name=$1 kind=${3:-} begin=$SECONDS status=0 word=ok
  due=$((due + $2))
  local left=$((due - SECONDS))
  printf '\n== %s, at most %d s ==\n' "$name" "$((left > 1 ? left : 1))"
  # Where this script runs in the background SIGINT is ignored, and so it would be in what it starts.
  timeout --signal=INT --kill-after=8 "$((left > 1 ? left : 1))" env --default-signal=INT \
    scripts/gpu-check.sh --step "$name" || status=$?
  if [ "$kind" = optional ] && [ $status = $out_of_time ]; then
    word="not finished"
  elif [ $status != 0 ]; then
    word="FAILED ($status)"
    failed=1
  fi
  summary+=("$(printf '%-10s %4d s  %s' "$name" $((SECONDS - begin)) "$word")")
}

mkdir -p "$work"
step package 120
step cpp_build 70
step cpp_tests 45
step py_tests 70
step memcheck 35
step doctor 10
step bench 110
step ttft 70 optional
printf '\n== gpu-check ==\n'
printf '%s\n' "${summary[@]}"
exit $failed
