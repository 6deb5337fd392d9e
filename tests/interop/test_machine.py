"""nbdbm in a Debian of its own (tests/support/machine.py): under systemd, and on vsock.

Each test is one boot of a virtual machine. What the script in it prints is compared here; QEMU and libnbd, in
the machine too, judge what is served and what lies in the images.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.support import machine
from tests.support.marks import requires

pytestmark = [requires("machine"), pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return machine.disk(tmp_path_factory.mktemp("machine"))


UNITS = """
systemd-sysusers 2>/dev/null
mkdir -p /var/lib/nbdbm
cd /var/lib/nbdbm
qemu-img create -q -f qcow2 vda.qcow2 64M
qemu-img bitmap --add vda.qcow2 b
mkdir other
qemu-img create -q -f qcow2 other/vdb.qcow2 64M
chown -R nbdbm:nbdbm .
socket=/run/nbdbm/nbdbm.sock
exports() { nbdinfo --list "nbd+unix:///?socket=$socket" | grep -o 'export="[^"]*"' | tr '\\n' ' '; }
of() { systemctl show --value -p "$2" "$1"; }
state() { echo "$1: $(of $1 ActiveState), $(of $1 Result)"; }
bitmaps() { qemu-img info --output json vda.qcow2 | grep -c '"in-use"' || true; }

echo
echo "-- started by its first client"
cp /etc/nbdbm/nbdbm.toml /shipped
printf '[directory]\\npath = "/var/lib/nbdbm"\\n' >/etc/nbdbm/nbdbm.toml
systemctl start nbdbm.socket
state nbdbm.service
echo "socket: $(stat -c '%a %U:%G' $socket)"
qemu-io -f raw -c 'write -q -P 7 1M 64k' "nbd+unix:///vda.qcow2?socket=$socket"
state nbdbm.service
echo "exports: $(exports)"
grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/$(of nbdbm.service MainPID)/status | tr '\\t' ' '
systemctl stop nbdbm.socket nbdbm.service
state nbdbm.service
echo "in use: $(bitmaps)"
qemu-img check -q vda.qcow2
nbdbm map -c b --totals vda.qcow2
qemu-io -r -f qcow2 -c 'read -q -P 7 1M 64k' vda.qcow2

echo "-- reload"
cp /shipped /etc/nbdbm/nbdbm.toml
systemctl start nbdbm.service
main=$(of nbdbm.service MainPID)
cat >>/etc/nbdbm/nbdbm.toml <<.
[[export]]
name = "second"
image = "/var/lib/nbdbm/other/vdb.qcow2"
read-only = true
.
systemctl reload nbdbm.service
said() { until journalctl -u nbdbm.service | grep -o "$1"; do sleep 0.2; done; }
said 'reloaded, 1 exports, 1 of them new'
echo "exports: $(exports)"
echo '[mistake' >>/etc/nbdbm/nbdbm.toml
systemctl reload nbdbm.service
said 'not reloaded: /etc/nbdbm/nbdbm.toml: .* a table'
nbdinfo --size "nbd+unix:///second?socket=$socket"
[ "$main" = "$(of nbdbm.service MainPID)" ] && echo "the same process"

echo "-- restart"
cp /shipped /etc/nbdbm/nbdbm.toml
kill -KILL "$main"
for attempt in $(seq 100); do
    [ "$(of nbdbm.service NRestarts)" = 1 ] && [ "$(of nbdbm.service ActiveState)" = active ] && break
    sleep 0.5
done
nbdinfo --size "nbd+unix:///vda.qcow2?socket=$socket"
systemctl stop nbdbm.service
state nbdbm.service

echo "-- template"
cp -p other/vdb.qcow2 vdb.qcow2
# The server that was killed may have had it open.
nbdbm bitmap remove vda.qcow2 b
qemu-img bitmap --add vda.qcow2 b
echo 'NBDBM_OPTIONS=--read-only --max-connections 4' >/etc/nbdbm/vdb.env
systemctl start nbdbm@vda.service nbdbm@vdb.service
for name in vda vdb; do
    nbdinfo --json --no-content "nbd+unix:///?socket=/run/nbdbm/$name.sock" | grep -o '"is_read_only.*'
done
systemctl start nbdbm@none.service 2>/dev/null || echo "there is no such image"
# Stopped while a client has written, not flushed, and is still there.
cat >/client <<.
import nbd, time
h = nbd.NBD()
h.connect_uri("nbd+unix:///?socket=/run/nbdbm/vda.sock")
h.pwrite(b"x" * 512, 5 << 20)
open("/written", "w").close()
time.sleep(1000)
.
python3 /client &
until [ -e /written ]; do sleep 0.2; done
systemctl stop nbdbm@vda.service
state nbdbm@vda.service
echo "in use: $(bitmaps)"
nbdbm map -c b --totals vda.qcow2
qemu-img check -q vda.qcow2
systemctl stop nbdbm@vdb.service
state nbdbm@vdb.service
ls /run/nbdbm
echo "-- warnings"
journalctl --no-pager -o cat -u 'nbdbm*' | grep -E 'Traceback|Referenced|denied|not permitted' || true
echo "-- end"
"""


@pytest.mark.skipif("NBDBM_LONG" not in os.environ, reason="takes a minute: make interop runs it")
def test_units(disk: Path, tmp_path: Path) -> None:
    """Socket activation, reload, restart, template: with all the restrictions, under systemd itself."""
    said = machine.run(disk, tmp_path, UNITS)
    parts = dict(re.findall(r"^-- (.*)\n((?:(?!-- ).*\n)*)", said, re.MULTILINE))
    assert parts["started by its first client"].splitlines() == [
        "nbdbm.service: inactive, success",
        "socket: 660 nbdbm:nbdbm",
        "nbdbm.service: active, success",
        'exports: export="vda.qcow2" ',
        "Uid: 998 998 998 998",
        "CapEff: 0000000000000000",
        "CapBnd: 0000000000000000",
        "NoNewPrivs: 1",
        "Seccomp: 2",
        "nbdbm.service: inactive, success",
        "in use: 0",
        "  67043328  99.9%   0 clean",
        "     65536   0.1%   1 dirty",
    ]
    assert parts["reload"].splitlines() == [
        "reloaded, 1 exports, 1 of them new",
        'exports: export="second" export="vda.qcow2" ',
        "not reloaded: /etc/nbdbm/nbdbm.toml: Expected ']' at the end of a table",
        "67108864",
        "the same process",
    ]
    assert parts["restart"].splitlines() == ["67108864", "nbdbm.service: inactive, success"]
    assert parts["template"].splitlines() == [
        '"is_read_only": false,',
        '"is_read_only": true,',
        "there is no such image",
        "nbdbm@vda.service: inactive, success",
        "in use: 0",
        "  67043328  99.9%   0 clean",
        "     65536   0.1%   1 dirty",
        "nbdbm@vdb.service: inactive, success",
    ]
    assert parts["warnings"] == ""


VSOCK = """
qemu-img create -q -f qcow2 disk.qcow2 64M
qemu-img bitmap --add disk.qcow2 b
nbdbm serve --vsock 0 disk.qcow2 >/said 2>&1 &
until grep -q context: /said; do sleep 0.2; done
uri=$(head -n 1 /said)
echo "uri $uri"
head -c 2097152 /usr/bin/qemu-img >part
nbdcopy part "$uri"
nbdcopy "$uri" back
cmp -n 2097152 part back && echo "the same"
nbdinfo --map=qemu:dirty-bitmap:b "$uri"
# The end of each is told well, whoever is faster.
for attempt in $(seq 10); do nbdinfo --size "$uri"; done
kill %1
wait %1
echo "status $?"
cat /said
qemu-img check -q disk.qcow2
qemu-img info --output json disk.qcow2 | grep -c '"in-use"' || true
"""


def test_vsock(disk: Path, tmp_path: Path) -> None:
    """Over the kernel's loopback of vsock, by libnbd: written, read back, and the bitmap knows."""
    said = machine.run(disk, tmp_path, VSOCK, systemd=False)
    (port,) = re.findall(r"^uri nbd\+vsock://2:(\d+)$", said, re.MULTILINE)
    lines = re.sub(r"\x1b\[[\d;]*m", "", said).splitlines()
    begin, end = lines.index("the same"), lines.index("status 0")
    assert [line.split() for line in lines[begin + 1 : end]] == [
        ["0", str(2 << 20), "1", "dirty"],
        [str(2 << 20), str(62 << 20), "0", "clean"],
        *[[str(64 << 20)]] * 10,
    ]
    assert f"nbd+vsock://2:{port}" in lines[end + 1]
    assert len(re.findall(r"^nbdbm: vsock:1:\d+: .* goodbye$", said, re.MULTILINE)) == 13
    assert lines[lines.index("guest: status 0") - 1] == "0", "no bitmap is in use"
