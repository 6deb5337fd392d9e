#!/usr/bin/env bash
# Unpack peers that are not to be installed: newer ones than the system's, and what a guest is made of.
#
# Usage: unpack_peers.sh [--where] bookworm|trixie|machine
#
#   bookworm  a guest: Debian 12's kernel, nbd-client and file system tools, and the QEMU that runs it
#   trixie    QEMU 10, libnbd 1.22 with 64-bit headers; the same kind of guest, with Debian 13's kernel
#   machine   what a whole Debian 13 with systemd needs that serves images, for such a guest
#
# They come with every library they need, and their own Python, into a directory that is not part of the
# system: nothing is installed, no root is needed, and the programs run through their own dynamic loader
# (tests/support/qemu.py), so paths mean the same for them as for everything else.
# --where only prints the directory. NBDBM_PEERS names another place for it.
set -euo pipefail

where=
if [ "${1:-}" = --where ]; then
    where=yes
    shift
fi
name=${1:-}
suite=$name
guest=(qemu-system-x86 linux-image-cloud-amd64 busybox-static nbd-client e2fsprogs)
case $name in
    bookworm) packages=("${guest[@]}") ;;
    trixie) packages=(qemu-utils libnbd-bin python3-libnbd "${guest[@]}") ;;
    machine) suite=trixie packages=(systemd procps busybox-static python3-libnbd libnbd-bin qemu-utils) ;;
    *) sed -n 's/^# Usage: /usage: /p' "$0" >&2; exit 2 ;;
esac

mirror=${NBDBM_DEBIAN_MIRROR:-http://deb.debian.org/debian}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
if [ -n "${NBDBM_PEERS:-}" ]; then
    place=$NBDBM_PEERS/$name
elif [ "$(id -u)" = 0 ]; then
    place=/var/cache/nbdbm/$name
else
    place=${XDG_CACHE_HOME:-$HOME/.cache}/nbdbm/$name
fi
if [ -n "$where" ]; then
    echo "$place"
    exit 0
fi
unpacked=$place/.packages
[ "$(cat "$unpacked" 2>/dev/null)" = "${packages[*]}" ] && exit 0

for tool in apt-get dpkg-deb; do
    if ! command -v $tool >/dev/null; then
        echo "peers: $tool is missing; have Debian's ${packages[*]} (from $suite) unpacked at $place, and" \
             "these names in $unpacked" >&2
        exit 1
    fi
done

mkdir -p "$(dirname "$place")"
work=$(mktemp -d "$place.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/apt/{lists,archives}/partial
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

echo "peers: unpacking Debian $suite's ${packages[*]} into $place"
fetch update
fetch --download-only install "${packages[@]}" >/dev/null
# As on an installed system, /bin, /lib and the like are links into /usr.
mkdir -p "$work"/root/usr/{bin,sbin,lib,lib64}
for directory in bin sbin lib lib64; do
    ln -s "usr/$directory" "$work/root/$directory"
done
for archive in "$work"/apt/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$archive" | tar -x --keep-directory-symlink --no-same-owner -C "$work/root"
done
chmod 755 "$work/root"
echo "${packages[*]}" >"$work/root/.packages"
# Whoever runs one of the older ones now keeps it.
[ -e "$place" ] && mv "$place" "$work/old"
mv "$work/root" "$place"
