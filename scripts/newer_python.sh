#!/usr/bin/env bash
# What nbdbm needs from PyPI, for Debian 13's Python 3.13 (which scripts/unpack_peers.sh unpacks): tests of what
# older Pythons do not have, which is TLS with pre-shared keys.
#
# Usage: newer_python.sh PYTHON
#
# It goes into the directory python3.13 of the virtual environment that PYTHON belongs to.
set -euo pipefail

python=$1
cd "$(dirname "$0")/.."
place=$("$python" -c 'import sys; print(sys.prefix)')/python3.13
needed=$(mktemp)
trap 'rm -f "$needed"' EXIT
"$python" - >"$needed" <<'END'
import tomllib

with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["dependencies"], sep="\n")
END
rm -rf "$place"
"$python" -m pip install --quiet --disable-pip-version-check --target "$place" --python-version 3.13 \
    --only-binary :all: --requirement "$needed"
