"""Linux' own NBD client, in a virtual machine: a file system on a disk that we serve.

The machine's side of each test is a shell script; what it prints is compared with what lies in the image
after its end, in the eyes of QEMU and e2fsprogs. Each test runs with the kernels and the nbd-clients of
two Debian releases.
"""

from __future__ import annotations

import hashlib
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.interop.serving import digest
from tests.interop.writing import bitmaps, blank, check, content_by_qemu, dirty_by_qemu, granules
from tests.support import guest, images, qemu, servers
from tests.support.marks import requires

pytestmark = [
    requires("qemu-img", "qemu-io", "qemu-nbd", "libnbd", "newer", *guest.KERNELS),
    pytest.mark.slow,
    pytest.mark.timeout(400),
]

SIZE = 64 << 20
GRANULARITY = CLUSTER = 64 << 10


@pytest.fixture(params=guest.KERNELS)
def kernel(request: pytest.FixtureRequest) -> Any:
    return request.param


NBD_CLIENT = "/sbin/nbd-client"
"""BusyBox has one of its own, of fewer abilities."""


def attach(device: str, port: int, *options: str) -> str:
    return " ".join([NBD_CLIENT, guest.HOST, str(port), device, "-N", "disk", *options])


FIRST = """
{attach}
echo "size $(blockdev --getsize64 /dev/nbd0), read-only $(blockdev --getro /dev/nbd0)"
cd /sys/block/nbd0/queue
echo "cache $(cat write_cache), fua $(cat fua), trims $(( $(cat discard_max_bytes) > 0 ))"
cd /
mkfs.ext4 -q -b 4096 -E nodiscard /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
dd if=/dev/urandom of=/tmp/noise bs=64k count=24 2>/dev/null
for number in 1 2 3 4 5 6 7 8; do cp /tmp/noise /mnt/noise$number & done
mkdir /mnt/directory
seq 1 300000 >/mnt/directory/numbers
for number in $(seq 1 200); do echo "file $number" >/mnt/directory/$number; done
wait
sync
echo 3 >/proc/sys/vm/drop_caches
cd /mnt
sha256sum noise* directory/numbers
cd /
umount /mnt
e2fsck -fn /dev/nbd0
echo "disk $(sha256sum </dev/nbd0)"
/sbin/nbd-client -d /dev/nbd0
"""

SECOND = """
{attach}
{attach_backup}
echo "backup read-only $(blockdev --getro /dev/nbd1)"
mount -t ext4 -o ro /dev/nbd1 /tmp
mount -t ext4 /dev/nbd0 /mnt
cd /tmp
sha256sum noise* directory/numbers | sed 's/^/backup /'
cd /
rm /mnt/noise1 /mnt/noise4
rm -r /mnt/directory
sync
fstrim -v /mnt
dd if=/dev/urandom of=/mnt/noise2 bs=4k seek=7 count=40 conv=notrunc,fsync 2>/dev/null
echo "another file" >/mnt/new
sync
echo 3 >/proc/sys/vm/drop_caches
cd /mnt
sha256sum n*
cd /
umount /mnt
umount /tmp
e2fsck -fn /dev/nbd0
echo "disk $(sha256sum </dev/nbd0)"
/sbin/nbd-client -d /dev/nbd0
/sbin/nbd-client -d /dev/nbd1
"""


def test_a_file_system_and_its_backup(kernel: str, tmp_path: Path) -> None:
    """Made over four connections, filled, backed up, changed, and what changed is in the bitmaps."""
    case = blank(tmp_path, SIZE, ("first", GRANULARITY), ("fine", 512))
    before = bytes(SIZE)
    with servers.nbdbm_on_tcp(case.path, tmp_path, "--export-name", "disk") as (_, port):
        said = guest.run(kernel, tmp_path, FIRST.format(attach=attach("/dev/nbd0", port, "-C", "4")))
    assert f"\nsize {SIZE}, read-only 0\n" in said
    assert "\ncache write back, fua 1, trims 1\n" in said
    content = judge(case, said, kernel)
    made = {total: name for name, total in files(said).items()}
    first = changed_and_dirty(case, before, content)
    assert len(first["first"]) < SIZE // GRANULARITY

    backup = tmp_path / "backup.qcow2"
    qemu.SYSTEM.img("convert", "-f", "qcow2", "-O", "qcow2", case.path, backup)
    allocated = data_clusters(case.path)
    done = servers.nbdbm_run("checkpoint", case.path, "--name", "second", "--disable", "first")
    assert done.returncode == 0, done.stderr
    case.bitmaps.append("second")

    (tmp_path / "backup").mkdir()
    with (
        servers.nbdbm_on_tcp(case.path, tmp_path, "--export-name", "disk") as (_, port),
        servers.nbdbm_on_tcp(backup, tmp_path / "backup", "-r", "--export-name", "disk") as (_, backup_port),
    ):
        script = SECOND.format(
            attach=attach("/dev/nbd0", port, "-C", "4"),
            attach_backup=attach("/dev/nbd1", backup_port, "-C", "2"),
        )
        said = guest.run(kernel, tmp_path, script)
    assert "\nbackup read-only 1\n" in said
    assert dict(re.findall(r"^backup (\w{64})  (\S+)$", said, re.MULTILINE)) == made
    now = judge(case, said, kernel)
    assert set(files(said)) == {"noise2", "noise3", "noise5", "noise6", "noise7", "noise8", "new"}
    second = changed_and_dirty(case, content, now)
    assert second["first"] == first["first"], "a disabled bitmap has changed"
    assert second["fine"] >= first["fine"]
    assert len(second["second"]) < SIZE // GRANULARITY
    # Of the files that were removed, 5 MB in all, the space was given back.
    given_back = allocated - data_clusters(case.path)
    assert len(given_back) * CLUSTER > 3 << 20
    assert given_back <= second["second"]


def judge(case: images.Case, said: str, kernel: str) -> bytes:
    """The disk after a session: sound, and with the content that the guest saw. Returns the content."""
    for tools in (qemu.SYSTEM, qemu.newer()):
        status, report = check(case.path, tools)
        assert status == 0, report
    content = content_by_qemu(case)
    expected = re.findall(r"^disk (\w{64}) ", said, re.MULTILINE)
    assert expected == [hashlib.sha256(content).hexdigest()], said
    raw = case.path.with_name("judged.raw")
    raw.write_bytes(content)
    tools = qemu.Tools(kernel, qemu.unpacked(guest.KERNELS[kernel]))
    tools.run("e2fsck", "-fn", raw)
    found = files(said)
    assert found, said
    for name, total in found.items():
        assert file_digest(raw, name, tools) == total, name
    raw.unlink()
    return content


def files(said: str) -> dict[str, str]:
    """Name to SHA-256 of the files that the guest listed."""
    return {
        name: total for total, name in re.findall(r"^(\w{64})  (\S+)$", said, re.MULTILINE) if name != "-"
    }


def file_digest(raw: Path, name: str, tools: qemu.Tools) -> str:
    """SHA-256 of a file in an ext4 file system, read by debugfs."""
    found = raw.with_name("dumped")
    tools.run("debugfs", "-R", f"dump /{name} {found}", raw)
    total = digest(found)
    found.unlink()
    return total


def changed_and_dirty(case: images.Case, before: bytes, after: bytes) -> dict[str, set[int]]:
    """All bitmaps by both QEMUs, which must agree; those that record have every changed granule."""
    found = dirty_by_qemu(case)
    assert dirty_by_qemu(case, qemu.newer()) == found
    for name, (granularity, flags) in bitmaps(case.path).items():
        assert "in-use" not in flags
        if "auto" not in flags:
            continue
        changed = {
            at // granularity
            for at in range(0, len(after), granularity)
            if before[at : at + granularity] != after[at : at + granularity]
        }
        assert changed and not changed - found[name], f"{name} misses {sorted(changed - found[name])[:9]}"
    return found


def data_clusters(path: Path) -> set[int]:
    """The numbers of the clusters that are allocated, by ``qemu-img map``."""
    found = set()
    for extent in qemu.SYSTEM.img_json("map", path):
        if extent["data"]:
            found |= granules(extent["start"], extent["length"], CLUSTER)
    return found


ENDLESS = """
{attach}
mkfs.ext4 -q -b 4096 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
number=1
while dd if=/dev/urandom of=/tmp/noise bs=4k count=37 2>/dev/null &&
      dd if=/tmp/noise of=/mnt/noise$number bs=64k conv=fsync 2>/dev/null; do
    sum=$(sha256sum </tmp/noise)
    echo "durable ${{sum%% *}}  noise$number"
    number=$((number + 1))
done
echo "the disk is gone"
"""


def test_a_server_that_is_killed(kernel: str, tmp_path: Path) -> None:
    """Amid writes: every file that was synced is there, and the bitmap does not call itself consistent."""
    case = blank(tmp_path, SIZE, ("first", GRANULARITY))
    with servers.nbdbm_on_tcp(case.path, tmp_path, "--export-name", "disk") as (server, port):
        script = ENDLESS.format(attach=attach("/dev/nbd0", port, "-C", "2", "-t", "10"))
        with guest.started(kernel, tmp_path, script) as machine:
            machine.wait_for("durable .*  noise5")
            server.send_signal(signal.SIGKILL)
            server.wait()
            machine.wait_for("the disk is gone")
            said = machine.finish()
    durable = re.findall(r"^durable (\w{64})  (noise\d+)$", said, re.MULTILINE)
    assert len(durable) >= 5, said
    status, report = check(case.path)
    # Leaked clusters are all that may be wrong.
    assert status in (0, 3), report
    ((_, flags),) = bitmaps(case.path).values()
    assert "in-use" in flags
    raw = tmp_path / "disk.raw"
    raw.write_bytes(content_by_qemu(case))
    tools = qemu.Tools(kernel, qemu.unpacked(guest.KERNELS[kernel]))
    # The journal is played back; the file system needs no other repair.
    done = qemu.run(tools.argv("e2fsck", "-p", raw), check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    tools.run("e2fsck", "-fn", raw)
    for total, name in durable:
        assert file_digest(raw, name, tools) == total, name
    # And it can be served and written to again.
    with servers.nbdbm(case.path, writable=True) as again:
        listed = qemu.SYSTEM.run("nbdinfo", again.uri)
    assert "qemu:dirty-bitmap" not in listed
