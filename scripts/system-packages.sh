#!/usr/bin/env bash
# Installs the system packages that the build and the C++ tests need, if any is missing. Each line of `needs`
# is a Debian package and the header or command that shows it is there (so other distributions pass as well).
# With --libraries it only prints the packages that are libraries, one a line (scripts/offline-deps.sh).
set -euo pipefail

needs="
g++               command:c++
make              command:make
libssl-dev        header:openssl/evp.h
libgtest-dev      header:gtest/gtest.h
liburing-dev      header:liburing.h
liblmdb-dev       header:lmdb.h
libxxhash-dev     header:xxhash.h
"

if [ "${1:-}" = --libraries ]; then
  awk '$2 ~ /^header:/ { print $1 }' <<<"$needs"
  exit 0
fi

has() {
  case "$1" in
    command:*) command -v "${1#command:}" ;;
    header:*) echo "#include <${1#header:}>" | c++ -std=c++20 -fsyntax-only -x c++ - ;;
  esac >/dev/null 2>&1
}

missing=()
while read -r package probe; do
  [ -z "$package" ] || has "$probe" || missing+=("$package")
done <<<"$needs"

python=${PYTHON:-python3}
command -v "$python" >/dev/null || missing+=(python3)
"$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || missing+=(python3-venv)
"$python" -c 'import os, sysconfig as s; assert os.path.exists(s.get_path("include") + "/Python.h")' \
  >/dev/null 2>&1 || missing+=(python3-dev)

[ ${#missing[@]} -gt 0 ] || exit 0

install="apt-get install -y --no-install-recommends ${missing[*]}"
if ! command -v apt-get >/dev/null; then
  echo "kvtier needs these packages (Debian names); install them and run make again: ${missing[*]}" >&2
  exit 1
fi
if [ "$(id -u)" = 0 ]; then
  as_root=()
elif sudo -n true 2>/dev/null; then
  as_root=(sudo -n)
else
  printf 'kvtier needs system packages. Run this as root, then make again:\n\n  %s\n\n' "$install" >&2
  exit 1
fi
echo "+ $install"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086
"${as_root[@]}" $install >/dev/null 2>&1 || { "${as_root[@]}" apt-get update -q && "${as_root[@]}" $install; }
