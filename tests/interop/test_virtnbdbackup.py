"""virtnbdbackup, which backs up libvirt's guests: its own view of our extents, and copies made by it.

The part of it that speaks NBD needs no libvirt. What it takes for data is compared with what ``nbdinfo``
says of qemu-nbd's export of the same image.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.interop.serving import serving
from tests.interop.writing import Guest, blank, dirty_by_qemu
from tests.support import images, qemu, servers, virtnbdbackup
from tests.support.marks import requires
from tests.support.virtnbdbackup import Extent

pytestmark = [requires("virtnbdbackup", "qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "libnbd")]

MIB = 1 << 20

ALLOCATED_TYPES = {0: True, 1: False, 2: True, 3: False}
"""``base:allocation``: virtnbdbackup copies what is allocated, be it zero or not, and no hole."""
DIRTY_TYPES = {0: False, 1: True}


def by_nbdinfo(server: servers.Server, bitmap: str = "") -> list[Extent]:
    """``nbdinfo --map``, in virtnbdbackup's terms."""
    context = f"qemu:dirty-bitmap:{bitmap}" if bitmap else "base:allocation"
    types = DIRTY_TYPES if bitmap else ALLOCATED_TYPES
    shown = json.loads(qemu.SYSTEM.run("nbdinfo", "--json", f"--map={context}", server.uri))
    return [Extent(types[extent["type"]], extent["offset"], extent["length"]) for extent in shown]


@pytest.mark.parametrize("name", ["bitmaps", "bitmaps-odd-size", "v3-packed"])
def test_full(name: str, gallery: images.Gallery, tmp_path: Path) -> None:
    """Its extents of ``base:allocation`` are qemu-nbd's, and what it leaves out is zero."""
    case = gallery.get(name)
    with serving(case, export="vda") as server:
        found = virtnbdbackup.copy(server, tmp_path)
    with servers.qemu_nbd(case.path) as server:
        assert found.extents == by_nbdinfo(server)
    assert {extent.data for extent in found.extents} == {False, True}
    restored = bytearray(case.size)
    found.restore(restored)
    assert hashlib.sha256(restored).hexdigest() == gallery.expected(case)


@pytest.mark.parametrize("name", ["bitmaps", "bitmaps-small-clusters", "bitmaps-odd-size"])
def test_bitmaps(name: str, gallery: images.Gallery, tmp_path: Path) -> None:
    """Its extents of every dirty bitmap are qemu-nbd's, and so are the bytes in them."""
    case = gallery.get(name)
    content = gallery.content(case)
    seen = set()
    with serving(case, export="vda") as ours, servers.qemu_nbd(case.path, bitmaps=case.bitmaps) as theirs:
        for bitmap in case.bitmaps:
            found = virtnbdbackup.copy(ours, tmp_path, bitmap)
            assert found.extents == by_nbdinfo(theirs, bitmap), bitmap
            dirty = [extent for extent in found.extents if extent.data]
            wanted = b"".join(content[extent.offset : extent.offset + extent.length] for extent in dirty)
            assert found.stored == wanted, bitmap
            seen |= {extent.data for extent in found.extents}
    assert seen == {False, True}


def test_full_and_incremental(tmp_path: Path) -> None:
    """A full copy, changes, and a copy of what changed: put together, the disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    case = blank(disk, 16 * MIB, ("monday", 65536))
    guest = Guest(bytes(case.size), 3)

    def write(offset: int, data: bytes) -> None:
        guest.wrote(offset, data)
        pattern = tmp_path / "pattern"
        pattern.write_bytes(data)
        with servers.nbdbm(case.path, writable=True) as server:
            qemu.SYSTEM.run(
                "qemu-io", "-f", "raw", "-c", f"write -s {pattern} {offset} {len(data)}", server.uri
            )

    write(MIB + 512, images.text(1, 3 * MIB))
    write(9 * MIB, images.noise(2, MIB))
    with servers.nbdbm(case.path) as server:
        full = virtnbdbackup.copy(server, tmp_path)
    backup = bytearray(case.size)
    full.restore(backup)
    assert backup == guest.content
    assert len(full.stored) < 5 * MIB

    done = servers.nbdbm_run("checkpoint", case.path, "--name", "tuesday", "--disable", "monday")
    assert done.returncode == 0, done.stderr
    case.bitmaps.append("tuesday")
    write(2 * MIB + 17, images.text(3, 200_000))
    write(9 * MIB + 65536, bytes(3 * 65536))
    write(case.size - 70_000, images.noise(4, 70_000))
    with servers.nbdbm(case.path) as server:
        increment = virtnbdbackup.copy(server, tmp_path, "tuesday")
    assert len(increment.stored) == len(dirty_by_qemu(case)["tuesday"]) * 65536 < MIB
    assert backup != guest.content
    increment.restore(backup)

    raw = tmp_path / "converted.raw"
    qemu.SYSTEM.img("convert", "-O", "raw", case.path, raw)
    restored = hashlib.sha256(backup).hexdigest()
    assert restored == hashlib.sha256(raw.read_bytes()).hexdigest()
    assert restored == hashlib.sha256(guest.content).hexdigest()
