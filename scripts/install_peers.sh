#!/usr/bin/env bash
# Install the programs that the interoperability tests run against, where they are missing and we may.
#
# Debian packages are installed when this is root on a machine with apt-get; anywhere else the missing
# ones are named and the script fails. Nothing happens when all are present, so it is cheap to repeat.
set -euo pipefail

packages=(
    qemu-utils              # qemu-img, qemu-nbd, qemu-io: images, and the server to agree with
    libnbd-bin              # nbdinfo, nbdcopy
    python3-libnbd          # libnbd's Python binding
    nbdkit                  # a second server for our client, and a proxying client for our server
    nbdkit-plugin-python    # a server that answers exactly as a test wants
    nbd-client              # the oldest client there is
    nbd-server              # and its server, which speaks simple replies only
    openssl                 # who makes certificates for tests
    fio                     # the benchmark's load generator
    gcc                     # the compiled part of the package, which is tested beside the Python that does
    libc6-dev               # the same where it is missing
    python3-dev
    man-db                  # who shows the manual pages, and who judges them
    groff-base
    mandoc
    zsh                     # the shells whose completion is tested
    fish
    bash-completion         # what bash's needs where it is used
    iproute2                # ip, which lays and pulls the cables of networks that tests make
    systemd                 # systemd-analyze, which judges the units; nothing is started
)

missing=()
for package in "${packages[@]}"; do
    if ! dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed; then
        missing+=("$package")
    fi
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "peers: missing Debian packages: ${missing[*]}" >&2
    echo "peers: install them (apt-get install ${missing[*]}), or run this as root on Debian 12" >&2
    exit 1
fi

echo "peers: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# nbd-server is only ever started by a test: keep the package from starting a system-wide one.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get -qq update
apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-install-recommends "${missing[@]}" >/dev/null
