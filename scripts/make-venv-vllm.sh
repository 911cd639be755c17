#!/usr/bin/env bash
# Creates .venv-vllm and installs requirements-vllm-py311.txt into it; about two minutes and 2.5 GB.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv-vllm/bin/python ] || "${PYTHON_VLLM:-python3.11}" -m venv .venv-vllm
# The file is a complete lock, without the packages that vLLM names and the CPU build does not need
# (torchvision, torchaudio, torchcodec, triton: their builds for other devices keep vLLM from being imported).
.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
  -r requirements-vllm-py311.txt
