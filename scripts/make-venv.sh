#!/usr/bin/env bash
# Creates .venv and installs requirements-dev.txt into it; quick when nothing is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
# torch first and by itself: resolved together with other packages, pip may choose another build of it.
"${install[@]}" "$(grep '^torch==' requirements-dev.txt)"
"${install[@]}" -r requirements-dev.txt
