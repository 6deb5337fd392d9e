"""A soak test: every kind of client at the same time, reloads, restarts and kills, for as long as one likes.

``make soak`` runs it for ten minutes (SOAK_SECONDS), the suite for some seconds. The seed is printed; it
decides what happens, if not exactly when.

First half: servers come and go, by SIGTERM and by SIGKILL. After each end QEMU judges every image: sound, no
flushed byte lost (after SIGTERM: none at all), and every bitmap that says it is consistent has each granule
that was written since it began, and none that was not. After a kill, those that were in use must say so.
Second half: one server, with reloads all the time. In the end it holds the descriptors that it had in the
beginning, and its memory has settled.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdbm.client import NbdClient
from nbdbm.image.threads import IO_THREADS
from tests.soak import clients, watchers
from tests.soak.world import PATIENCE, STATIC, TARGET, World
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "qemu-nbd", "libnbd", "nbdcopy", "nbdinfo", "fio", "openssl")]

SECONDS = float(os.environ.get("NBDBM_SOAK_SECONDS", "12"))
"""Of load; judging comes on top."""
SEED = int(os.environ.get("NBDBM_SOAK_SEED", str(random.randrange(1 << 32))))

THREADS = IO_THREADS + (os.cpu_count() or 1) + 8
"""All threads that a server may have: the pools', and its own few."""

MARGIN = 24 * 1024 if SECONDS > 120 else 64 * 1024
"""kB by which the memory of the last third of the second half may pass what it was before: buffers that are
kept for reuse grow to what the worst moment took. (It goes up and down by more than that, with the number of
clients that happen to ask for much and take nothing.)"""


RING = Counter({"anon_inode:[io_uring]": 3, "anon_inode:[eventfd]": 1})
"""What a server holds from when something has missed the page cache, at any time, to when that is closed."""


@pytest.fixture
def place() -> Iterator[Path]:
    """Short enough for a Unix socket."""
    path = Path(tempfile.mkdtemp(prefix="nbdbm-soak-"))
    yield path
    shutil.rmtree(path)


@pytest.mark.timeout(SECONDS * 4 + 240)
def test_soak(place: Path) -> None:
    print(f"NBDBM_SOAK_SEED={SEED}")
    # Not in debug mode: dozens of clients live in this one loop.
    asyncio.run(main(World(place, random.Random(SEED)), SECONDS), debug=False)


async def main(world: World, seconds: float) -> None:
    try:
        await servers_come_and_go(world, seconds / 2)
        await one_server_stays(world, seconds / 2)
    finally:
        world.end()
        total = sum(disk.requests for disk in world.disks)
        flushes = sum(disk.flushes for disk in world.disks)
        sessions = sum(disk.sessions for disk in world.disks)
        print(f"{total} requests that changed something, {flushes} flushes, {sessions} sessions")
        print(", ".join(f"{count} {what}" for what, count in sorted(world.counts.items())))


@asynccontextmanager
async def load(world: World) -> AsyncIterator[list[asyncio.Task[None]]]:
    """All clients, while the block runs; what one of them raises is raised."""
    world.over = False
    tasks = clients.start(world)
    body = asyncio.current_task()
    assert body is not None

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            body.cancel()

    for task in tasks:
        task.add_done_callback(ended)
    try:
        yield tasks
        world.over = True
        for disk in world.disks:
            disk.resting = True
        world.up.set()
        await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
    except asyncio.CancelledError:
        for task in tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error from None
        raise
    finally:
        world.over = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def servers_come_and_go(world: World, seconds: float) -> None:
    """Clients come and go, and so do servers, each living for some seconds."""
    rng = world.rng
    kill = True
    while seconds > 0 or kill:
        life = rng.uniform(0.5, 2.5 if seconds < 60 else 12)
        seconds -= life
        await world.start()
        async with load(world):
            end = time.monotonic() + life
            while time.monotonic() < end:
                await asyncio.sleep(rng.random() * 0.5)
                await change(world)
            wrote = await world.stop(kill=kill)
            world.over = True
        await world.judge(wrote, killed=kill)
        kill = not kill


async def change(world: World) -> None:
    """Some reload."""
    kind = world.rng.randrange(8)
    if kind == 0:
        moving = world.disk("moving")

        def rename() -> None:
            moving.name = f"moving-{world.rng.randrange(1000)}-{world.generation}"

        await world.reload(moving, change=rename)
    elif kind == 1:
        extra = world.disk("extra")

        def come_or_go() -> None:
            extra.offered = not extra.offered

        await world.reload(extra, change=come_or_go)
    elif kind == 2:

        def other_option() -> None:
            world.discard = "ignore" if world.discard == "unmap" else "unmap"

        await world.reload(world.disk("changing"), change=other_option)
    elif kind == 3:
        await world.mistake()
    elif kind == 4:
        await watchers.renew(world)
    elif kind == 5:
        await watchers.spoil(world)
    else:
        await world.reload()


async def one_server_stays(world: World, seconds: float, *, patience: float = 30) -> None:
    """The same clients, and one server that shall hold in the end what it held in the beginning.

    ``patience``: seconds in which what it holds must settle.
    """
    world.disk("extra").offered = True
    await world.start()
    await everybody_once(world)
    before = await settled(world)
    rss: list[list[int]] = [[], [], []]
    async with load(world):
        start = time.monotonic()
        while (passed := time.monotonic() - start) < seconds:
            await asyncio.sleep(0.3)
            if world.rng.random() < 0.3:
                await change(world)
            rss[min(2, int(passed / seconds * 3))].append(world.status("VmRSS"))
        # At least this reload takes place in any run, however short or slow.
        extra = world.disk("extra")

        def come() -> None:
            extra.offered = True

        await world.reload(*[extra] * (not extra.offered), change=come)
    await everybody_once(world)

    def same() -> bool:
        return world.descriptors() in (before, before + RING, before - RING)

    try:
        await world.until(same, "descriptors as in the beginning", patience)
    except AssertionError as error:
        raise AssertionError(f"before {before}, after {world.descriptors()}") from error
    threads = world.status("Threads")
    assert threads <= THREADS, f"{threads} threads"
    middles = [int(statistics.median(third)) for third in rss if third]
    print(f"memory by thirds {middles} kB, threads {threads}, descriptors {before.total()}")
    wrote = await world.stop(kill=False)
    await world.judge(wrote, killed=False)
    assert middles[-1] <= max(middles[:-1]) + MARGIN, f"memory grows: {middles} kB"


async def everybody_once(world: World) -> None:
    """A client of each export, so that everything is open that will be; then what idles may close."""
    for name in (STATIC, TARGET, *(disk.name for disk in world.disks)):
        async with await NbdClient.connect(world.uri(name)) as client:
            await client.read(0, 512)


async def settled(world: World) -> Counter[str]:
    """The descriptors, once they are the same for a second."""
    last, since = world.descriptors(), time.monotonic()
    deadline = since + PATIENCE
    while time.monotonic() - since < 1:
        assert time.monotonic() < deadline, "descriptors do not settle"
        await asyncio.sleep(0.05)
        if (now := world.descriptors()) != last:
            last, since = now, time.monotonic()
    return last
