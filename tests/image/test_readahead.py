"""ReadAhead: every read ends with its bytes or its error, with few threads where the kernel fetches ahead."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from pathlib import Path

import pytest

from nbdbm.image import readahead, threads
from nbdbm.image.blockfile import ThreadedFile
from nbdbm.image.readahead import AT_ONCE, LARGEST, WATCHERS, ReadAhead

BLOCK = 4096


def content(offset: int) -> bytes:
    return bytes([offset // BLOCK % 256]) * BLOCK


class Disk:
    """Answers after ``delay`` seconds: who waits in a thread, and (``fetches``) into the page cache."""

    def __init__(self, delay: float = 0.01, *, fetches: bool = True) -> None:
        self.delay = delay
        self.fetches = fetches
        self.bad: set[int] = set()
        self.stuck: dict[int, threading.Event] = {}
        self.threaded: list[int] = []
        self.ready: dict[int, float] = {}
        self.looks = 0

    def fetch(self, offset: int, length: int) -> None:
        assert length <= LARGEST
        if self.fetches:
            self.ready[offset] = time.monotonic() + self.delay

    def read_now(self, view: memoryview, offset: int) -> int:
        self.looks += 1
        slow = offset in self.bad or offset in self.stuck
        if slow or time.monotonic() < self.ready.get(offset, float("inf")):
            return 0
        view[:] = content(offset)
        return len(view)

    def read_waiting(self, view: memoryview, offset: int) -> None:
        self.threaded.append(offset)
        if offset in self.stuck:
            self.stuck[offset].wait(10)
        else:
            time.sleep(max(0.0, self.ready.get(offset, time.monotonic() + self.delay) - time.monotonic()))
        if offset in self.bad:
            raise OSError(errno.EIO, "bad sector")
        view[:] = content(offset)


async def read(ahead: ReadAhead, offset: int) -> None:
    buffer = bytearray(BLOCK)
    await ahead.read(memoryview(buffer), offset)
    assert buffer == content(offset)


def test_few_threads_for_many_reads() -> None:
    disk = Disk(0.002)

    async def run() -> None:
        ahead = ReadAhead(disk)
        await asyncio.wait_for(asyncio.gather(*(read(ahead, n * BLOCK) for n in range(32))), 10)

    asyncio.run(run())
    assert WATCHERS <= len(disk.threaded) < 32


def test_where_nothing_is_fetched_each_gets_a_thread() -> None:
    """And they wait for the disk together."""
    disk = Disk(0.1, fetches=False)

    async def run() -> float:
        ahead = ReadAhead(disk)
        began = time.monotonic()
        await asyncio.gather(*(read(ahead, n * BLOCK) for n in range(32)))
        return time.monotonic() - began

    assert asyncio.run(run()) < 1.6  # one after the other by two threads: 1.6
    assert sorted(disk.threaded) == [n * BLOCK for n in range(32)]


def test_one_stuck_sector_holds_up_nobody_else() -> None:
    disk = Disk(0.001)
    for number in range(WATCHERS):
        disk.stuck[number * BLOCK] = threading.Event()

    async def run() -> None:
        ahead = ReadAhead(disk)
        stuck = [asyncio.ensure_future(read(ahead, offset)) for offset in disk.stuck]
        await asyncio.sleep(0)
        others = [read(ahead, n * BLOCK) for n in range(WATCHERS, 40)]
        await asyncio.wait_for(asyncio.gather(*others), 5)
        assert not any(task.done() for task in stuck)
        for event in disk.stuck.values():
            event.set()
        await asyncio.gather(*stuck)

    asyncio.run(run())


def test_errors_reach_the_read_that_has_them() -> None:
    disk = Disk()
    disk.bad = {3 * BLOCK, 20 * BLOCK}

    async def run() -> None:
        ahead = ReadAhead(disk)
        results = await asyncio.gather(*(read(ahead, n * BLOCK) for n in range(32)), return_exceptions=True)
        for number, result in enumerate(results):
            if number * BLOCK in disk.bad:
                assert isinstance(result, OSError) and result.errno == errno.EIO
            else:
                assert result is None

    asyncio.run(run())


def test_not_all_in_one_turn() -> None:
    """What is there ends a few at a time: others have their turns between."""
    disk = Disk(0.01)
    turns: list[int] = []

    async def run() -> None:
        ahead = ReadAhead(disk)
        done = 0

        async def counted(offset: int) -> None:
            nonlocal done
            await read(ahead, offset)
            done += 1

        tasks = [asyncio.ensure_future(counted(n * BLOCK)) for n in range(32)]
        while done < 32:
            before = done
            await asyncio.sleep(0)
            turns.append(done - before)
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert max(turns) <= AT_ONCE + threads.AT_ONCE


@pytest.mark.parametrize("threaded", [False, True], ids=["waiting", "with a thread"])
def test_a_cancelled_read_is_not_filled_any_more(threaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "PATIENCE", 10)  # or a slow machine may give all of them threads at once
    disk = Disk(0.05, fetches=False)

    async def run() -> None:
        ahead = ReadAhead(disk)
        buffers = [bytearray(BLOCK) for _ in range(8)]
        tasks = [
            asyncio.ensure_future(ahead.read(memoryview(buffer), (n + 1) * BLOCK))
            for n, buffer in enumerate(buffers)
        ]
        await asyncio.sleep(0)
        chosen = 0 if threaded else 7
        await asyncio.sleep(0)
        tasks[chosen].cancel()
        tasks[chosen].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[chosen]
        # With a thread it has waited for its end; without, nobody ever touches the buffer.
        assert bool(buffers[chosen][0]) is threaded
        await asyncio.gather(*(task for task in tasks if not task.cancelled()))
        assert bool(buffers[chosen][0]) is threaded
        for number, buffer in enumerate(buffers):
            if number != chosen:
                assert buffer == content((number + 1) * BLOCK)

    asyncio.run(run())


def test_on_a_real_file(tmp_path: Path) -> None:
    """Out of the page cache as far as the file system allows, and past the end of the file."""
    path = tmp_path / "disk"
    data = b"".join(content(n * BLOCK) for n in range(2048)) + b"end"
    path.write_bytes(data)
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file = ThreadedFile.open(str(path))

    async def one(offset: int, length: int) -> None:
        buffer = bytearray(b"?" * length)
        await file.pread_into(memoryview(buffer), offset, hot=False)
        assert buffer == data[offset : offset + length].ljust(length, b"\0")

    async def run() -> None:
        ranges = [(n * 7919 % 2040 * BLOCK + n, 1 + n * 257 % (3 * BLOCK)) for n in range(200)]
        ranges += [(len(data) - 2, 10), (len(data) + 5, 10), (0, LARGEST), (5, LARGEST + 1)]
        await asyncio.gather(*(one(*each) for each in ranges))

    asyncio.run(run())
    file.close()


def test_the_bounds_fit_together() -> None:
    assert readahead.PATIENCE < 0.01
