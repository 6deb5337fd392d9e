"""oVirt imageio: its NBD client on our exports, and its daemon in front of them.

In oVirt, whoever makes a backup asks imageio's daemon over HTTP, which reads extents and data over NBD.
"""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.interop.serving import digest
from tests.interop.writing import Guest, blank, dirty_by_qemu, judge, writable_copy
from tests.support import imageio, images, qemu, servers
from tests.support.marks import requires

pytestmark = [requires("imageio", "qemu-img", "qemu-io", "qemu-nbd", "libnbd", "newer")]

MIB = 1 << 20


def zero_extents(server: servers.Server) -> list[Any]:
    with imageio.backend(server) as backend:
        return list(backend.extents("zero"))


def dirty_extents(server: servers.Server) -> list[Any]:
    with imageio.backend(server, dirty=True) as backend:
        return list(backend.extents("dirty"))


KINDS = ["bitmaps", "chain-mixed-clusters", "extl2-packed", "v3-packed", "zstd", "data-file", "raw"]


@pytest.mark.parametrize("name", KINDS)
def test_reading(name: str, gallery: images.Gallery, tools: qemu.Tools) -> None:
    """Content by digest; zeroes and holes as it gets them from qemu-nbd."""
    case = gallery.get(name)
    with servers.nbdbm(case.path, *case.options, export="disk") as server:
        found = zero_extents(server)
        total = hashlib.sha256()
        with imageio.backend(server) as backend:
            assert backend.size() == case.size
            buffer = bytearray(3 * MIB + 512)
            while count := backend.readinto(buffer):
                total.update(memoryview(buffer)[:count])
        assert total.hexdigest() == gallery.expected(case)
    with servers.qemu_nbd(case.path, *case.qemu_options, image_format=case.format, tools=tools) as server:
        assert found == zero_extents(server)


@pytest.mark.parametrize(
    "name", ["bitmaps", "bitmaps-small-clusters", "bitmaps-all-ones", "bitmaps-odd-size"]
)
def test_dirty_extents(name: str, gallery: images.Gallery) -> None:
    """Of every bitmap, as it gets them from qemu-nbd."""
    case = gallery.get(name)
    seen = set()
    for bitmap in case.bitmaps:
        with servers.nbdbm(case.path, "--bitmap", bitmap) as server:
            found = dirty_extents(server)
        with servers.qemu_nbd(case.path, bitmaps=[bitmap]) as server:
            expected = dirty_extents(server)
        assert found == expected, bitmap
        assert sum(extent.length for extent in found) == case.size
        seen |= {(extent.dirty, extent.zero) for extent in found}
    assert len(seen) > 1


def test_one_bitmap_at_a_time(gallery: images.Gallery) -> None:
    """It asks for all bitmaps and uses one if that is the only one: ``--bitmap`` chooses it."""
    case = gallery.get("bitmaps")
    assert len(case.bitmaps) > 1
    unsupported = imageio.module("_internal.errors").UnsupportedOperation
    with servers.nbdbm(case.path) as server, imageio.backend(server, dirty=True) as backend:
        with pytest.raises(unsupported):
            list(backend.extents("dirty"))
        assert list(backend.extents("zero"))


def test_writing(gallery: images.Gallery, tmp_path: Path) -> None:
    """Four connections at once: writes, zeroes, holes, flushes."""
    case = writable_copy("bitmaps", gallery, tmp_path)
    guest = Guest(gallery.content(gallery.get("bitmaps")), 11)
    before = dirty_by_qemu(case)
    lanes = 4
    width = guest.size // lanes
    plans: list[list[tuple[str, int, bytes]]] = []
    for lane in range(lanes):
        plan = []
        for number in range(40):
            at, length = guest.piece(min(width // 2, 300_000))
            at = lane * width + at % (width - length + 1)
            kind = guest.rng.choice(["write", "write", "zero", "zero", "flush"])
            data = images.text(number, length) if kind == "write" else bytes(length)
            plan.append((kind, at, data))
            if kind != "flush":
                guest.wrote(at, data)
        plans.append(plan)
    failures: list[BaseException] = []

    def play(backend: Any, plan: list[tuple[str, int, bytes]]) -> None:
        try:
            for kind, at, data in plan:
                backend.seek(at)
                if kind == "flush":
                    backend.flush()
                elif kind == "write":
                    backend.write(data)
                else:
                    backend.zero(len(data))
                found = bytearray(len(data))
                backend.seek(at)
                if kind != "flush":
                    assert backend.readinto(found) == len(data)
                    assert found == data
            backend.flush()
        except BaseException as failure:
            failures.append(failure)

    with servers.nbdbm(case.path, writable=True) as server:
        # A sparse one makes holes where a dense one writes zeroes.
        backends = [imageio.backend(server, mode="r+", sparse=lane % 2 == 1) for lane in range(lanes)]
        threads = [threading.Thread(target=play, args=pair) for pair in zip(backends, plans, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for backend in backends:
            backend.close()
    assert not failures, failures
    judge(case, guest, before, [qemu.SYSTEM])


def test_copying(gallery: images.Gallery, tmp_path: Path) -> None:
    """Its own copy loop, reading ahead while it writes, from one of our exports to another."""
    source = gallery.get("v3-packed")
    content = gallery.content(source)
    case = blank(tmp_path, len(content), ("b", 65536))
    nbd = imageio.module("_internal.nbd")
    with (
        servers.nbdbm(source.path) as ours,
        servers.nbdbm(case.path, writable=True) as target,
        nbd.Client(nbd.UnixAddress(ours.socket)) as reader,
        nbd.Client(nbd.UnixAddress(target.socket)) as writer,
    ):
        imageio.module("_internal.nbdutil").copy(reader, writer, block_size=256 << 10)
    guest = Guest(content, 1)
    guest.touched.append((0, guest.size))
    judge(case, guest, {"b": set()}, [qemu.newer()])


def test_refusals(gallery: images.Gallery) -> None:
    """Errors arrive as errors, and the connection goes on."""
    case = gallery.get("v3-packed")
    nbd = imageio.module("_internal.nbd")
    with servers.nbdbm(case.path) as server, nbd.Client(nbd.UnixAddress(server.socket)) as client:
        with pytest.raises(nbd.RequestError, match="not permitted"):
            client.write(0, b"x" * 512)
        with pytest.raises(nbd.RequestError, match="Invalid argument"):
            client.read(case.size - 1, 2)
        assert len(client.read(0, 512)) == 512
    with servers.nbdbm(case.path, export="disk") as server, pytest.raises(nbd.OptionError):
        nbd.Client(nbd.UnixAddress(server.socket), "other")


# -- the daemon


def get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        data: bytes = answer.read()
        return data


def test_the_daemon_serves_a_bitmap(gallery: images.Gallery, tmp_path: Path) -> None:
    """Extents as JSON, and ranges of data, through a ticket for our export."""
    case = gallery.get("bitmaps")
    content = gallery.content(case)
    bitmap = case.bitmaps[0]
    with servers.qemu_nbd(case.path, bitmaps=[bitmap]) as server:
        zero, dirty = zero_extents(server), dirty_extents(server)
    with (
        servers.nbdbm(case.path, "--bitmap", bitmap) as server,
        imageio.daemon(tmp_path / "daemon", server, case.size, dirty=True) as url,
    ):
        assert json.loads(get(f"{url}/extents?context=zero")) == [extent.to_dict() for extent in zero]
        assert json.loads(get(f"{url}/extents?context=dirty")) == [extent.to_dict() for extent in dirty]
        assert get(url) == content
        for extent in dirty[:20]:
            first, last = extent.start, extent.start + extent.length - 1
            assert get(url, Range=f"bytes={first}-{last}") == content[first : last + 1]
    with (
        servers.nbdbm(case.path, "--bitmap", bitmap) as server,
        imageio.daemon(tmp_path / "plain", server, case.size, dirty=False) as url,
        pytest.raises(urllib.error.HTTPError, match="404"),
    ):
        get(f"{url}/extents?context=dirty")


def test_backups_through_the_daemon(gallery: images.Gallery, tmp_path: Path) -> None:
    """Upload, full download, changes, incremental download on top of it: the disk again."""
    source = gallery.get("v3-packed")
    disk = tmp_path / "disk"
    disk.mkdir()
    case = blank(disk, source.size, ("monday", 65536))
    content = gallery.content(source)
    guest = Guest(content, 5)

    def ticket(name: str, server: servers.Server, *, dirty: bool) -> Any:
        return imageio.daemon(tmp_path / name, server, case.size, dirty=dirty)

    with servers.nbdbm(case.path, writable=True) as server, ticket("upload", server, dirty=False) as url:
        imageio.transfer("upload", str(copy_of(source, tmp_path)), url)
    # The disk was empty, so it writes no zeroes.
    (bits,) = dirty_by_qemu(case).values()
    assert bits >= {at >> 16 for at in range(0, guest.size, 65536) if any(content[at : at + 65536])}

    full = tmp_path / "full.qcow2"
    with servers.nbdbm(case.path) as server, ticket("full", server, dirty=False) as url:
        imageio.transfer("download", url, str(full))
    assert raw_digest(full, tmp_path) == hashlib.sha256(content).hexdigest()

    done = servers.nbdbm_run("checkpoint", case.path, "--name", "tuesday", "--disable", "monday")
    assert done.returncode == 0, done.stderr
    case.bitmaps.append("tuesday")
    before = dirty_by_qemu(case)
    assert before == {"monday": bits, "tuesday": set()}
    for tools, (offset, data) in [
        (qemu.SYSTEM, (5 * 65536 + 17, images.text(1, 200_000))),
        (qemu.newer(), (guest.size - 70_000, images.noise(2, 70_000))),
        (qemu.SYSTEM, (65536, bytes(3 * 65536))),
    ]:
        guest.wrote(offset, data)
        with servers.nbdbm(case.path, writable=True) as server:
            pattern = tmp_path / "pattern"
            pattern.write_bytes(data)
            tools.run("qemu-io", "-f", "raw", "-c", f"write -s {pattern} {offset} {len(data)}", server.uri)
    judge(case, guest, before, [qemu.SYSTEM])

    increment = tmp_path / "increment.qcow2"
    with (
        servers.nbdbm(case.path, "--bitmap", "tuesday") as server,
        ticket("increment", server, dirty=True) as url,
    ):
        imageio.transfer(
            "download", url, str(increment), incremental=True, backing_file=str(full), backing_format="qcow2"
        )
    assert raw_digest(increment, tmp_path) == hashlib.sha256(guest.content).hexdigest()
    # And it is an increment: nothing was copied that was not dirty.
    layers = qemu.SYSTEM.img_json("map", increment)
    copied = sum(extent["length"] for extent in layers if extent["depth"] == 0)
    assert 0 < copied <= len(dirty_by_qemu(case)["tuesday"]) * 65536 < guest.size // 2


def copy_of(case: images.Case, place: Path) -> Path:
    """A copy that qemu-nbd may open for writing, as imageio does for reading."""
    path = place / "source.qcow2"
    path.write_bytes(case.path.read_bytes())
    return path


def raw_digest(path: Path, place: Path) -> str:
    """SHA-256 of a disk, by ``qemu-img convert``."""
    raw = place / "converted.raw"
    qemu.SYSTEM.img("convert", "-O", "raw", path, raw)
    found = digest(raw)
    raw.unlink()
    return found
