#!/usr/bin/env bash
# Unpacks the libraries that the build needs (scripts/system-packages.sh --libraries) into a folder that git
# ignores, for machines without network: scripts/gpu-check.sh builds against them. Needs apt and network, not root.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-build/offline-deps}
mapfile -t wanted < <(scripts/system-packages.sh --libraries)
# Shared libraries behind the -dev packages. Not those that every machine has, and that must be its own: a
# second C library or OpenSSL in the loader's path breaks Python (OpenSSL is linked statically here).
mapfile -t behind < <(apt-cache depends --no-recommends --no-suggests --no-conflicts --no-breaks \
  --no-replaces --no-enhances "${wanted[@]}" | awk '$1 == "Depends:" { print $2 }' |
  grep -E '^lib' | grep -vE '^lib(c6|ssl|gcc|stdc)' | sort -u)

rm -rf "$folder"
mkdir -p "$folder/debs"
(cd "$folder/debs" && apt-get download -q "${wanted[@]}" "${behind[@]}")
for deb in "$folder"/debs/*.deb; do dpkg -x "$deb" "$folder"; done
rm -rf "$folder/debs" "$folder/usr/share/doc" "$folder/usr/share/man" "$folder/usr/src"
echo "$(du -sh "$folder" | cut -f1) in $folder: ${wanted[*]}"
