#!/usr/bin/env bash
# Builds what is given to people who build nothing: a tarball (program, README, LICENSE) and, where maturin is installed
# (pip install maturin), a wheel; both carry the runtime.
#
#   build/release.sh [DIR]        (default: target/dist)
#
# MBQ_PORTABLE=1 is set if it is not: code for every processor of the architecture, chosen when it starts. MBQ_PORTABLE=0
# builds for this machine's alone, for trying: quicker, and it needs libgomp (Debian: libgomp1) where it runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export MBQ_PORTABLE=${MBQ_PORTABLE:-1}
[ "$MBQ_PORTABLE" = 1 ] || unset MBQ_PORTABLE
mkdir -p "${1:-target/dist}"
out=$(realpath "${1:-target/dist}")
cargo build --release --locked
program=${CARGO_TARGET_DIR:-target}/release/mbq-convert
version=$("$program" --version | cut -d' ' -f2)
host=$(rustc -vV | sed -n 's/^host: //p')
name=mbq-convert-$version-$host
part=$(mktemp -d)
trap 'rm -rf "$part"' EXIT
mkdir "$part/$name"
cp "$program" README.md LICENSE "$part/$name"
# The same bytes for the same files.
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -C "$part" -cf - "$name" | gzip -9n >"$part/$name.tar.gz"
mv "$part/$name.tar.gz" "$out"
if command -v maturin >/dev/null; then
    tag=()
    if [[ $host == *linux-gnu* ]]; then
        "$program" runtime install "$part/runtime"
        tag=(--compatibility "$(build/wheel/tag.sh "$program" "$part"/runtime/*)")
    fi
    (cd build/wheel && maturin build --release --quiet "${tag[@]}" --out "$out")
else
    echo "no wheel: maturin is not installed (pip install maturin)"
fi
(cd "$out" && sha256sum mbq[-_]convert-"$version"* >SHA256SUMS)
ls -l "$out"
