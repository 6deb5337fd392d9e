#!/usr/bin/env bash
# Make a virtual environment: venv.sh PYTHON DIRECTORY
#
# Debian ships python3 without what venv needs (ensurepip): as root with apt-get the package is
# installed, anywhere else it is named.
set -euo pipefail
python=$1
directory=$2

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "venv: $python is $("$python" -V 2>&1); Python 3.11 or newer is needed (make PYTHON=...)" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "venv: $python has no ensurepip; on Debian, install the package python3-venv" >&2
        exit 1
    fi
    echo "venv: installing python3-venv"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-install-recommends python3-venv >/dev/null
fi
"$python" -m venv "$directory"
