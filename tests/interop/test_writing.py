"""Writing to every kind of image: content, soundness and bitmaps, as QEMU finds them afterwards."""

from __future__ import annotations

import asyncio
import os
import zlib
from pathlib import Path

import pytest

from nbdbm.client import NbdClient
from tests.interop.writing import (
    Guest,
    bitmaps,
    blank,
    check,
    connect,
    dirty_as_served,
    dirty_by_qemu,
    granules,
    judge,
    read_all,
    writable_copy,
)
from tests.support import images, qemu, servers
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "qemu-nbd", "nbdcopy", "fio", "libnbd", "newer")]

SESSIONS = int(os.environ.get("NBDBM_CROSSED_SESSIONS", "6"))
"""Of QEMU and nbdbm in turn on each image; long runs set more."""

READ_ONLY = {"load-first", "load-second-extl2", "corrupt-bit"}
"""Images that nobody may write to."""
ELSEWHERE = {"data-file-relative"}
"""QEMU looks for this data file in another place, so it cannot be the judge."""
WRITABLE = [name for name in images.RECIPES if name not in READ_ONLY | ELSEWHERE | images.LARGE]


@pytest.mark.parametrize("name", WRITABLE)
def test_every_kind(name: str, gallery: images.Gallery, tmp_path: Path) -> None:
    """All kinds of requests on two connections, simple or structured replies; then many at once."""
    case = writable_copy(name, gallery, tmp_path)
    seed = zlib.crc32(name.encode())
    guest = Guest(gallery.content(gallery.get(name)), seed)
    before = dirty_by_qemu(case)
    with servers.nbdbm(case.path, *case.options, writable=True) as server:
        handles = [connect(server.uri, structured=bool(seed & 1)) for _ in range(3)]
        assert handles[0].can_multi_conn() and handles[0].can_fast_zero() and handles[0].can_trim()
        if guest.size:
            guest.play(handles, 40, 300_000)
            guest.storm(handles, 60, 7777 if guest.size > 1 << 20 else 100)
        for h in handles:
            assert read_all(h, guest.size) == guest.content
            h.shutdown()
        # Who asks while it is being written to gets the truth too.
        assert dirty_as_served(server, case) == guest.dirty(before, case.path)
    judge(case, guest, before, [qemu.newer() if seed & 2 else qemu.SYSTEM])


KINDS = ["v3-packed", "extl2-packed", "cluster-512", "chain-mixed-clusters", "bitmaps", "data-file", "raw"]
"""Images that between them have every way to write."""


@pytest.mark.parametrize("name", KINDS)
def test_extended_headers(name: str, gallery: images.Gallery, tmp_path: Path) -> None:
    """Our own client, 64-bit headers: requests of all kinds from four connections, overlapping in time."""
    case = writable_copy(name, gallery, tmp_path)
    guest = Guest(gallery.content(gallery.get(name)), 7)
    before = dirty_by_qemu(case)

    async def main(uri: str) -> None:
        clients = [await NbdClient.connect(uri) for _ in range(4)]
        assert all(client.extended for client in clients)
        for _ in range(8):
            # Each round's requests are in flight together, in lanes of their own.
            lanes = 16
            width = guest.size // lanes
            await asyncio.gather(*(one(clients[lane % 4], lane * width, width) for lane in range(lanes)))
        # What one connection flushes was written by all.
        await clients[0].flush()
        for client in clients:
            assert await client.read(0, guest.size) == guest.content
            await client.close()

    async def one(client: NbdClient, start: int, width: int) -> None:
        offset = start + guest.rng.randrange(width)
        length = guest.rng.randrange(1, start + width - offset + 1)
        fua = guest.rng.random() < 0.2
        kind = guest.rng.choice(["write", "write", "zeroes", "hole", "trim"])
        if kind == "write":
            data = images.text(offset, length)
            await client.write(offset, data, fua=fua)
            guest.wrote(offset, data)
        elif kind == "trim":
            await client.trim(offset, length, fua=fua)
            guest.trimmed(offset, bytes(await client.read(offset, length)))
        else:
            await client.write_zeroes(offset, length, fua=fua, no_hole=kind == "zeroes")
            guest.wrote(offset, bytes(length))

    with servers.nbdbm(case.path, *case.options, writable=True) as server:
        asyncio.run(main(server.uri))
    judge(case, guest, before)


# -- other people's clients, of both generations (the newer ones speak extended headers)


BITMAPS = (("fine", 512), ("coarse", 1 << 20))


def test_qemu_io(tools: qemu.Tools, tmp_path: Path) -> None:
    case = blank(tmp_path, 8 << 20, *BITMAPS)
    guest = Guest(bytes(case.size), 1)
    before = dirty_by_qemu(case)
    script = [
        ("write -q -P 1 0 200k", 1),
        ("write -q -f -P 2 1000k 3000", 2),
        ("write -q -z 64k 64k", 0),
        ("write -q -z -u 5M 100k", 0),
        ("write -q -P 3 7M 1M", 3),
        ("discard -q 7M 512k", 0),
        ("flush", None),
        ("aio_write -q -P 4 3M 300k", 4),
        ("aio_write -q -P 5 3500k 10k", 5),
        ("aio_flush", None),
    ]
    units = {"k": 1 << 10, "M": 1 << 20}
    with servers.nbdbm(case.path, writable=True) as server:
        words = [word for command, _ in script for word in ("-c", command)]
        said = tools.run("qemu-io", "-f", "raw", *words, server.uri)
        assert "failed" not in said, said
        for command, byte in script:
            if byte is None:
                continue
            offset, length = (
                int(word[:-1]) * units[word[-1]] if word[-1] in units else int(word)
                for word in command.split()[-2:]
            )
            guest.wrote(offset, bytes([byte]) * length)
        assert read_all(connect(server.uri), guest.size) == guest.content
    judge(case, guest, before, [tools])


def test_nbdcopy(tools: qemu.Tools, gallery: images.Gallery, tmp_path: Path) -> None:
    """Several connections; holes come as zeroes or as trims."""
    case = blank(tmp_path, 16 << 20, *BITMAPS)
    before = dirty_by_qemu(case)
    source = tmp_path / "source"
    content = gallery.content(gallery.get("bitmaps"))
    assert len(content) == case.size
    with source.open("wb") as file:
        file.write(content)
        file.seek(2 << 20)
        file.write(bytes(3 << 20))
    guest = Guest(source.read_bytes(), 1)
    guest.touched.append((0, guest.size))
    with servers.nbdbm(case.path, writable=True) as server:
        tools.run("nbdcopy", "--flush", source, server.uri)
        assert read_all(connect(server.uri), guest.size) == guest.content
    judge(case, guest, before, [tools])


def test_qemu_convert(tools: qemu.Tools, gallery: images.Gallery, tmp_path: Path) -> None:
    """Onto a disk full of other data."""
    case = writable_copy("bitmaps", gallery, tmp_path)
    source = gallery.get("v3-packed")
    guest = Guest(gallery.content(gallery.get("bitmaps")), 1)
    before = dirty_by_qemu(case)
    content = gallery.content(source)
    guest.wrote(0, content)
    with servers.nbdbm(case.path, writable=True) as server:
        tools.img("convert", "-n", "-f", "qcow2", "-O", "raw", source.path, server.uri)
        assert read_all(connect(server.uri), guest.size) == guest.content
    judge(case, guest, before, [tools])


def test_fio_verify(tmp_path: Path) -> None:
    """Random writes of many sizes, deep queues, four connections, each reading back what it wrote."""
    case = blank(tmp_path, 64 << 20, ("b", 65536))
    with servers.nbdbm(case.path, writable=True) as server:
        said = qemu.SYSTEM.run(
            *("fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randwrite"),
            *(
                "--bsrange=512-64k",
                "--bs_unaligned=0",
                "--size=16m",
                "--offset_increment=16m",
                "--io_size=4m",
            ),
            *("--iodepth=16", "--numjobs=4", "--fsync=64", "--verify=crc32c", "--verify_fatal=1"),
            *("--do_verify=1", "--verify_state_save=0", "--randseed=1", "--output-format=terse"),
        )
        results = [line.split(";") for line in said.splitlines() if line.startswith("3;")]
        assert len(results) == 4 and all(fields[4] == "0" for fields in results), said
        guest = Guest(read_all(connect(server.uri), case.size), 1)
    assert any(guest.content)
    judge(case, guest, {})
    # fio does not tell where it wrote; what is not zero was written.
    (dirty,) = dirty_by_qemu(case).values()
    data = {at >> 16 for at in range(0, case.size, 65536) if any(guest.content[at : at + 65536])}
    assert dirty >= data


def test_a_huge_disk(gallery: images.Gallery, tmp_path: Path) -> None:
    """64 TiB: one request may cover all of it; untouched parts cost nothing."""
    case = writable_copy("huge", gallery, tmp_path)
    tib = 1 << 40

    async def main(uri: str) -> None:
        async with await NbdClient.connect(uri) as client:
            await client.write(10 * tib - 5, b"0123456789", fua=True)
            await client.trim(11 * tib, 2 * tib)
            await client.write_zeroes(20 * tib, tib)
            assert await client.read(10 * tib - 6, 12) == b"\0" + b"0123456789" + b"\0"
            assert await client.read(32 * tib, 100) == images.text(32 * tib & 0xFFFF, 5000)[:100]

    with servers.nbdbm(case.path, writable=True) as server:
        asyncio.run(main(server.uri))
    assert check(case.path)[0] == 0
    said = qemu.SYSTEM.io(case.path, f"read -v {10 * tib - 5} 10", options=("-r", "-f", "qcow2"))
    assert "0123456789" in said
    granularity = 64 << 20
    (bits,) = dirty_by_qemu(case).values()
    for offset, length in [(10 * tib - 5, 10), (11 * tib, 2 * tib), (20 * tib, tib)]:
        assert granules(offset, length, granularity) <= bits
    assert granules(11 * tib, 2 * tib, granularity) | {0} < bits
    assert 14 * tib // granularity not in bits


# -- QEMU and nbdbm on one file, one after the other


@pytest.mark.timeout(60 + 2 * SESSIONS)
@pytest.mark.parametrize("name", ["bitmaps", "extl2-packed", "v3-packed", "bitmaps-small-clusters", "lazy"])
def test_sessions_that_cross(name: str, gallery: images.Gallery, tmp_path: Path) -> None:
    """Sessions of qemu-nbd and nbdbm in turn: each takes over the other's bitmaps, and adds to them."""
    case = writable_copy(name, gallery, tmp_path)
    if not case.bitmaps:
        for bitmap, granularity in BITMAPS:
            qemu.SYSTEM.img("bitmap", "--add", "-g", granularity, case.path, bitmap)
            case.bitmaps.append(bitmap)
    guest = Guest(gallery.content(gallery.get(name)), 3)
    before = dirty_by_qemu(case)
    for session in range(SESSIONS):
        tools = qemu.newer() if session % 4 == 1 else qemu.SYSTEM
        if session % 2:
            start = servers.qemu_nbd(case.path, "--discard=unmap", tools=tools, writable=True)
        else:
            start = servers.nbdbm(case.path, writable=True)
        with start as server:
            h = connect(server.uri)
            guest.play([h], 12, 200_000, fast=not session % 2)
            if session == SESSIONS // 2:
                h.flush()
            h.shutdown()
        if session % 3 == 0:
            qemu.SYSTEM.img("bitmap", "--add", "-g", "4096", case.path, f"added-{session}")
            known = bitmaps(case.path)
            assert not any("in-use" in flags for _, flags in known.values()), known
            before = dirty_by_qemu(case) | {f"added-{session}": set()}
            guest.touched.clear()
            case.bitmaps.append(f"added-{session}")
    judge(case, guest, before, [qemu.SYSTEM, qemu.newer()])


# -- locks


def test_an_image_that_qemu_holds(tmp_path: Path) -> None:
    """Refused in one line that names the holder; nothing was changed, and QEMU goes on."""
    case = blank(tmp_path, 8 << 20, *BITMAPS)
    with servers.qemu_nbd(case.path, writable=True) as server:
        h = connect(server.uri)
        h.pwrite(b"x" * 512, 0)
        done = servers.nbdbm_run("serve", "-k", tmp_path / "s", case.path)
        assert done.returncode == 1
        who = f"process {server.process.pid} (qemu-nbd)"
        assert done.stderr == f"nbdbm: {case.path}: in use for writing by {who}\n"
        h.pwrite(b"y" * 512, 0)
        h.shutdown()
    assert not any("in-use" in flags for _, flags in bitmaps(case.path).values())
    # A reader of QEMU's keeps writers out too.
    with servers.qemu_nbd(case.path) as server:
        done = servers.nbdbm_run("serve", "-k", tmp_path / "s", case.path)
        assert done.returncode == 1
        assert f"process {server.process.pid} (qemu-nbd)" in done.stderr
        assert done.stderr.count("\n") == 1


def test_an_image_that_we_hold(tools: qemu.Tools, tmp_path: Path) -> None:
    """QEMU's tools get the error that they get from one another."""
    case = blank(tmp_path, 8 << 20, *BITMAPS)
    with servers.nbdbm(case.path, writable=True) as server:
        h = connect(server.uri)
        h.pwrite(b"x" * 512, 0)
        for words in (
            ("qemu-img", "check", case.path),
            ("qemu-img", "bitmap", "--add", case.path, "new"),
            ("qemu-img", "snapshot", "-c", "new", case.path),
            ("qemu-io", "-f", "qcow2", "-c", "write 0 512", case.path),
        ):
            done = qemu.run(tools.argv(*words), check=False)
            assert done.returncode != 0
            assert "lock" in done.stderr and "Is another process using the image" in done.stderr
        h.shutdown()
    (fine, coarse) = dirty_by_qemu(case, tools).values()
    assert fine == coarse == {0}
    assert check(case.path, tools)[0] == 0
