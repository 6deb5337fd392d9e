"""Tables that lead a guest's writes to metadata: none of it is destroyed, and the rest of the disk is served.

QEMU refuses such writes too (its overlap checks), and then the whole image; what it refuses is asked of it.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.interop.writing import check
from tests.support import libnbd, qemu, servers
from tests.support.marks import requires
from tests.support.qcow2edit import BITMAPS_EXTENSION, extensions, patch, peek

pytestmark = [requires("qemu-img", "qemu-io", "libnbd")]

CLUSTER = 64 * 1024
MIB = 1024 * 1024
OFFSET = (1 << 56) - 512
COPIED = 1 << 63
MINE = b"\xee" * CLUSTER


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that metadata can be, in a cluster each."""
    path = tmp_path_factory.mktemp("overlaps") / "base.qcow2"
    qemu.SYSTEM.img("create", "-q", "-f", "qcow2", path, 16 * MIB)
    qemu.SYSTEM.io(path, "write -q -P 1 0 1M")
    qemu.SYSTEM.img("snapshot", "-c", "s", path)
    qemu.SYSTEM.img("bitmap", "--add", path, "b")
    qemu.SYSTEM.io(path, "write -q -P 2 0 1M")
    return path


def directory(path: Path) -> int:
    return peek(path, extensions(path)[BITMAPS_EXTENSION][0] + 16, "Q")


def l2_table(path: Path) -> int:
    return peek(path, peek(path, 40, "Q"), "Q") & OFFSET


TARGETS: dict[str, Callable[[Path], int]] = {
    "l1-table": lambda path: peek(path, 40, "Q"),
    "l2-table": l2_table,
    "refcount-table": lambda path: peek(path, 48, "Q"),
    "refcount-block": lambda path: peek(path, peek(path, 48, "Q"), "Q"),
    "snapshot-table": lambda path: peek(path, 64, "Q"),
    "snapshot-l1-table": lambda path: peek(path, peek(path, 64, "Q"), "Q"),
    "bitmap-directory": directory,
    "bitmap-table": lambda path: peek(path, directory(path), "Q"),
    "bitmap-bits": lambda path: peek(path, peek(path, directory(path), "Q"), "Q"),
}
NOT_BY_QEMU = {"bitmap-table", "bitmap-bits"}
"""QEMU writes there: it has read all bits before."""


@pytest.mark.parametrize("name", TARGETS)
def test_metadata_is_not_written_to_as_data(base: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.qcow2"
    shutil.copyfile(base, path)
    target = TARGETS[name](path)
    patch(path, l2_table(path), struct.pack(">Q", target | COPIED))
    other = shutil.copyfile(path, tmp_path / "by-qemu.qcow2")
    _, found_before = check(path)
    with servers.nbdbm(path, writable=True) as server:
        nbd = libnbd.module()
        h = nbd.NBD()
        h.connect_uri(server.uri)
        requests: list[Callable[[], Any]] = [
            lambda: h.pwrite(MINE, 0),
            lambda: h.pwrite(MINE[:512], 1024),
            lambda: h.pwrite(MINE * 2, 0),
            lambda: h.zero(CLUSTER, 0),
            lambda: h.zero(CLUSTER, 0, nbd.CMD_FLAG_NO_HOLE),
            lambda: h.trim(CLUSTER, 0),
        ]
        for request in requests:
            with pytest.raises(nbd.Error) as failed:
                request()
            assert failed.value.errno == "EIO"
        # In place, and to new clusters, of which none is the one in dispute.
        h.pwrite(b"\xdd" * MIB, 2 * CLUSTER)
        h.pwrite(b"\xdd" * (4 * MIB), 8 * MIB)
        h.flush()
        h.shutdown()
        assert "holds metadata" in server.output()
    assert server.process.returncode == 0
    with path.open("rb") as file:
        file.seek(target)
        found = file.read(CLUSTER)
    assert b"\xee" * 16 not in found and b"\xdd" * 16 not in found
    if not name.startswith(
        "bitmap-"
    ):  # storing the bitmap frees its old place, which the guest's entry keeps
        _, found_after = check(path)
        assert errors(found_after) <= errors(found_before)
    assert images_of(path)[CLUSTER:] == expected(base)[CLUSTER:]
    assert qemu.SYSTEM.img("bitmap", "--remove", path, "b") == ""

    done = qemu.run(
        qemu.SYSTEM.argv("qemu-io", "-f", "qcow2", "-c", f"write 0 {CLUSTER}", other), check=False
    )
    assert ("failed: Input/output error" in done.stdout + done.stderr) is (name not in NOT_BY_QEMU)


def test_bits_that_are_not_counted_are_not_overwritten(base: Path, tmp_path: Path) -> None:
    """What a bitmap consists of, with refcounts of zero: it is read when the guest has written already."""
    path = tmp_path / "disk.qcow2"
    shutil.copyfile(base, path)
    qemu.SYSTEM.img("bitmap", "--disable", path, "b")
    block = TARGETS["refcount-block"](path)
    for name in ("bitmap-directory", "bitmap-table", "bitmap-bits"):
        patch(path, block + 2 * (TARGETS[name](path) // CLUSTER), bytes(2))
    context = "qemu:dirty-bitmap:b"
    with servers.qemu_nbd(path, bitmaps=["b"]) as server:
        before = libnbd.probe(server.uri, contexts=[context], digest=False)["maps"]
    with servers.nbdbm(path, writable=True) as server:
        h = libnbd.module().NBD()
        h.connect_uri(server.uri)
        h.pwrite(b"\xdd" * (4 * MIB), 8 * MIB)
        h.shutdown()
    with servers.qemu_nbd(path, bitmaps=["b"]) as server:
        assert libnbd.probe(server.uri, contexts=[context], digest=False)["maps"] == before
    assert images_of(path)[8 * MIB : 12 * MIB] == b"\xdd" * (4 * MIB)


def test_what_cannot_be_read_cannot_be_written(tmp_path: Path) -> None:
    """A subcluster that is both allocated and zero: QEMU refuses either, too."""
    path = tmp_path / "disk.qcow2"
    qemu.SYSTEM.img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", path, 4 * MIB)
    qemu.SYSTEM.io(path, "write -q -P 1 0 128k")
    patch(path, l2_table(path) + 8, struct.pack(">II", 1 << 4, 0xFFFF_FFFF))
    before = path.read_bytes()
    with servers.nbdbm(path, writable=True) as server:
        nbd = libnbd.module()
        h = nbd.NBD()
        h.connect_uri(server.uri)
        for request in (lambda: h.pread(512, 0), lambda: h.pwrite(MINE[:512], 0), lambda: h.pwrite(MINE, 0)):
            with pytest.raises(nbd.Error) as failed:
                request()
            assert failed.value.errno == "EIO"
        assert h.pread(512, CLUSTER) == b"\1" * 512
        h.shutdown()
    assert path.read_bytes() == before
    done = qemu.run(qemu.SYSTEM.argv("qemu-io", "-f", "qcow2", "-c", "write 0 512", path), check=False)
    assert "failed: Input/output error" in done.stdout + done.stderr


def errors(said: str) -> int:
    """How many errors ``qemu-img check`` has found, leaks left out."""
    return sum(line.startswith("ERROR") for line in said.splitlines())


def images_of(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    qemu.SYSTEM.img("convert", "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()


def expected(base: Path) -> bytes:
    content = bytearray(b"\2" * MIB + bytes(15 * MIB))
    content[2 * CLUSTER : 2 * CLUSTER + MIB] = b"\xdd" * MIB
    content[8 * MIB : 12 * MIB] = b"\xdd" * (4 * MIB)
    return bytes(content)


FIELDS = {
    "l1-on-refcount-table": (40, lambda path: peek(path, 48, "Q")),
    "refcount-table-on-l1": (48, lambda path: peek(path, 40, "Q")),
    "snapshots-on-refcount-table": (48, lambda path: peek(path, 64, "Q")),
}


@pytest.mark.parametrize("name", FIELDS)
def test_an_image_whose_tables_overlap_is_not_opened_for_writing(
    base: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "disk.qcow2"
    shutil.copyfile(base, path)
    at, place = FIELDS[name]
    patch(path, at, struct.pack(">Q", place(path)))
    before = path.read_bytes()
    done = servers.limited_run(
        [*servers.NBDBM, "serve", "-k", str(tmp_path / "s"), str(path)], address_space=2 << 30, timeout=20
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert path.read_bytes() == before


def test_a_refcount_block_on_other_metadata(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    shutil.copyfile(base, path)
    patch(path, peek(path, 48, "Q"), struct.pack(">Q", peek(path, 40, "Q")))
    before = path.read_bytes()
    refused = pytest.raises(servers.ServerFailed, match="a refcount block and other metadata lie in the same")
    with refused, servers.nbdbm(path, writable=True):
        pass
    assert path.read_bytes() == before
