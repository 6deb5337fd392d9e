#!/usr/bin/env bash
# Unpack the newest peers (QEMU 10, libnbd 1.22 with 64-bit headers) beside the system's own.
#
# Usage: newer_peers.sh [--where]
#
# They come from Debian 13, with every library they need and its Python, into a directory that is not
# part of the system: nothing is installed, no root is needed, and the programs run through their own
# dynamic loader (tests/support/qemu.py), so paths mean the same for them as for everything else.
# --where only prints the directory. NBDBM_NEWER_PEERS names another one.
set -euo pipefail

suite=trixie
mirror=${NBDBM_DEBIAN_MIRROR:-http://deb.debian.org/debian}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
packages=(qemu-utils libnbd-bin python3-libnbd)

if [ -n "${NBDBM_NEWER_PEERS:-}" ]; then
    place=$NBDBM_NEWER_PEERS
elif [ "$(id -u)" = 0 ]; then
    place=/var/cache/nbdbm/$suite
else
    place=${XDG_CACHE_HOME:-$HOME/.cache}/nbdbm/$suite
fi
if [ "${1:-}" = --where ]; then
    echo "$place"
    exit 0
fi
[ -x "$place/usr/bin/nbdinfo" ] && exit 0

for tool in apt-get dpkg-deb; do
    if ! command -v $tool >/dev/null; then
        echo "newer peers: $tool is missing; give a directory with Debian 13's ${packages[*]} unpacked" \
             "as NBDBM_NEWER_PEERS" >&2
        exit 1
    fi
done

mkdir -p "$(dirname "$place")"
work=$(mktemp -d "$place.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/apt/{lists,archives}/partial "$work/root"
# An empty status file: every dependency is fetched, whatever this machine has installed.
: >"$work/apt/status"
echo "deb [signed-by=$keyring] $mirror $suite main" >"$work/apt/sources.list"

fetch() {
    apt-get -qq -y \
        -o Dir::Etc::SourceList="$work/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists="$work/apt/lists" -o Dir::State::Status="$work/apt/status" \
        -o Dir::Cache="$work/apt" -o Dir::Cache::Archives="$work/apt/archives" \
        -o APT::Install-Recommends=false -o APT::Sandbox::User="$(id -un)" \
        -o Acquire::Languages=none -o Debug::NoLocking=1 "$@"
}

echo "newer peers: unpacking Debian $suite's ${packages[*]} into $place"
fetch update
fetch --download-only install "${packages[@]}" >/dev/null
for archive in "$work"/apt/archives/*.deb; do
    dpkg-deb -x "$archive" "$work/root"
done
chmod 755 "$work/root"
rm -rf "$place"
mv "$work/root" "$place"
