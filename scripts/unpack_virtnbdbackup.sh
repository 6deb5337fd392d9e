#!/usr/bin/env bash
# Unpack virtnbdbackup, of which the tests use the part that needs libnbd only: installed, it brings libvirt.
#
# Usage: unpack_virtnbdbackup.sh [--where]
#
# The system's apt fetches the one package, into a directory beside those of unpack_peers.sh. Nothing is
# installed, and nothing happens when it is there. --where only prints the directory.
set -euo pipefail

place=$(dirname "$("$(dirname "$0")/unpack_peers.sh" --where bookworm)")/virtnbdbackup
if [ "${1:-}" = --where ]; then
    echo "$place"
    exit 0
fi
[ -e "$place" ] && exit 0

for tool in apt-get dpkg-deb; do
    if ! command -v $tool >/dev/null; then
        echo "peers: $tool is missing; have Debian 12's package virtnbdbackup unpacked at $place" >&2
        exit 1
    fi
done

mkdir -p "$(dirname "$place")"
work=$(mktemp -d "$place.XXXXXX")
trap 'rm -rf "$work"' EXIT

fetch() {
    (cd "$work" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download virtnbdbackup)
}

echo "peers: unpacking virtnbdbackup into $place"
# A system that has never asked for its lists of packages, or long ago, asks now.
if ! fetch 2>/dev/null; then
    if [ "$(id -u)" = 0 ]; then
        apt-get -qq update
    fi
    fetch
fi
mkdir "$work/root"
dpkg-deb -x "$work"/virtnbdbackup_*.deb "$work/root"
chmod 755 "$work/root"
mv "$work/root" "$place"
