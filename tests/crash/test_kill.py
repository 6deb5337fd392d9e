"""``kill -9`` while clients write: nothing that was flushed is lost, and no bitmap lies."""

from __future__ import annotations

import asyncio
import random
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdbm.client import NbdClient
from tests.crash.killing import Load, Op, Server, environment_rounds
from tests.interop.writing import Dirty, bitmaps, check, content_by_qemu, dirty_by_qemu
from tests.support import images, qemu
from tests.support.images import KIB, MIB, Case, Maker
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "qemu-nbd", "libnbd")]

ROUNDS = environment_rounds()
LEAKS_ONLY = (0, 3)
"""Statuses of ``qemu-img check``: nothing, or leaked clusters and nothing worse."""
BITMAPS = {"fine": 4 * KIB, "coarse": 256 * KIB}
SIZE = 8 * MIB


def _plain(maker: Maker, **options: object) -> Case:
    path = maker.create(SIZE, **options)
    maker.fill(path, SIZE, count=12)
    return maker.case(path)


def _snapshot(maker: Maker) -> Case:
    case = _plain(maker)
    qemu.SYSTEM.img("snapshot", "-c", "before", case.path)
    return case


def _overlay(maker: Maker) -> Case:
    maker.fill(maker.create(SIZE, maker.path("base.qcow2")), SIZE)
    path = maker.path()
    qemu.SYSTEM.img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path)
    return maker.case(path)


KINDS: dict[str, Callable[[Maker], Case]] = {
    "plain": _plain,
    "small-clusters": lambda maker: _plain(maker, cluster_size=512),
    "subclusters": lambda maker: _plain(maker, extended_l2="on"),
    "snapshot": _snapshot,
    "overlay": _overlay,
    "data-file": lambda maker: _plain(maker, data_file=maker.path("disk.data")),
}


@pytest.fixture
def socket() -> Iterator[Path]:
    """A path short enough for a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="nbdbm-kill-") as place:
        yield Path(place) / "s"


@pytest.mark.timeout(60 + 20 * ROUNDS)
@pytest.mark.parametrize("kind", KINDS)
def test_kill(kind: str, tmp_path: Path, socket: Path) -> None:
    rng = random.Random(zlib.crc32(kind.encode()))
    case = KINDS[kind](Maker(kind, tmp_path))
    content = content_by_qemu(case)
    for number in range(ROUNDS):
        for name, granularity in BITMAPS.items():
            if name not in case.bitmaps:
                qemu.SYSTEM.img("bitmap", "--add", "-g", granularity, case.path, name)
                case.bitmaps.append(name)
        before = dirty_by_qemu(case)
        load = Load(content, 24, rng)
        # Every third time the server is already ending by itself.
        asyncio.run(_round(case, socket, load, rng, content, politely=number % 3 == 2))
        content = judge(case, load, before)
        if number % 4 == 3:
            qemu.run(qemu.SYSTEM.argv("qemu-img", "check", "-q", "-r", "leaks", case.path))
            assert check(case.path)[0] == 0


async def _round(
    case: Case, socket: Path, load: Load, rng: random.Random, content: bytes, *, politely: bool
) -> None:
    """Serve, let the clients work, kill; the socket of the dead server lies there from the round before."""
    server = Server(case.path, socket)
    try:
        await server.ready()
        async with await NbdClient.connect(server.uri) as client:
            assert await client.read(0, client.size) == content
        clients = asyncio.ensure_future(load.run(server.uri, connections=4))
        deadline = asyncio.get_running_loop().time() + 20
        while not load.flushes and not clients.done():
            assert asyncio.get_running_loop().time() < deadline, server.said()
            await asyncio.sleep(0.005)
        await asyncio.sleep(rng.random() * 0.5)
        if politely:
            server.process.terminate()
            await asyncio.sleep(rng.random() * 0.15)
        server.kill()
        await clients
        assert "Traceback" not in server.said(), server.said()
        assert socket.exists() or politely
    finally:
        server.kill()
    assert load.requests > 10 and load.flushes


def judge(case: Case, load: Load, before: Dirty) -> bytes:
    """Look at the image with QEMU's eyes, take away what cannot be trusted; returns the disk's content."""
    status, said = check(case.path)
    assert status in LEAKS_ONLY, said
    content = content_by_qemu(case)
    lost = load.lost(content)
    assert not lost, f"{len(lost)} sectors lost, from {lost[0]:#x}"
    known = bitmaps(case.path)
    assert set(known) == set(case.bitmaps)
    broken = [name for name, (_, flags) in known.items() if "in-use" in flags]
    case.bitmaps = [name for name in case.bitmaps if name not in broken]
    found = dirty_by_qemu(case)
    for name, bits in found.items():
        missed = (before[name] | load.written(content, known[name][0])) - bits
        assert not missed, f"{name} claims to be consistent and misses {sorted(missed)[:9]}"
    for name in broken:
        qemu.SYSTEM.img("bitmap", "--remove", case.path, name)
    return content


def test_the_judge_notices(tmp_path: Path) -> None:
    """What the tests above look for would be found."""
    content = images.text(1, SIZE)
    load = Load(content, 5, random.Random(1))
    assert load.lost(content) == []
    lane = load.lanes[2]
    new = b"x" * 1024
    lane.ops.append(Op(512, new, answered=True))
    written = bytearray(content)
    written[lane.start + 512 : lane.start + 1536] = new
    # Not flushed: the old and the new are both right, sector by sector.
    assert load.lost(content) == load.lost(bytes(written)) == []
    torn = content[: lane.start + 512] + new[:512] + content[lane.start + 1024 :]
    assert load.lost(torn) == []
    torn = content[: lane.start + 512] + new[:100] + content[lane.start + 612 :]
    assert load.lost(torn) == [lane.start + 512]
    # Written through: the old is wrong.
    lane.ops[0].fua = True
    assert load.lost(content) == [lane.start + 512, lane.start + 1024]
    # Flushed, and then half of it written again.
    lane.ops[0].fua = False
    assert lane.done == 1
    lane.flushed(1)
    assert load.lost(bytes(written)) == [] and load.lost(content) == [lane.start + 512, lane.start + 1024]
    lane.ops.append(Op(512, content[lane.start + 512 : lane.start + 1024]))
    assert lane.done == 0
    assert load.lost(content) == [lane.start + 1024]
