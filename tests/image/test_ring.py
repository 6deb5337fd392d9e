"""Ring: everybody is told once, and told the truth as far as that can be known; nothing of it is left behind.

A pipe stands in for a slow disk: what is read from it comes when the test writes.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdbm.image import ring as module
from nbdbm.image.ring import CACHED, CAME, ENTER, ENTRIES, FAILED, LARGEST, SETUP, Ring
from tests.server.running import until

PAGE = 4096


def _supported() -> bool:
    async def ask() -> bool:
        ring = Ring.of(asyncio.get_running_loop())
        if ring is not None:
            ring.leave()
        return ring is not None

    return asyncio.run(ask())


needs_ring = pytest.mark.skipif(not _supported(), reason="the kernel lets us have no io_uring (Linux 6.1)")


class Listener:
    """What has been told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, int]] = []

    def __call__(self, about: object, what: int) -> None:
        self.told.append((about, what))

    async def wait(self, count: int) -> list[tuple[Any, int]]:
        await until(lambda: len(self.told) >= count)
        await asyncio.sleep(0.005)
        assert len(self.told) == count, "somebody was told twice"
        told, self.told = self.told, []
        return told


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def with_ring(work: Callable[[Ring, Listener], Awaitable[None]], *, leave: bool = True) -> None:
    """Run ``work``, and see that no descriptor is left."""

    async def main() -> None:
        before = os.listdir("/proc/self/fd")
        ring = Ring.of(asyncio.get_running_loop())
        assert ring is not None
        try:
            await work(ring, Listener())
        finally:
            if leave:
                ring.leave()
        assert len(os.listdir("/proc/self/fd")) == len(before)
        assert not Ring._rings

    asyncio.run(main())


@needs_ring
def test_more_at_once_than_the_queues_have_places(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(1024 * PAGE))

    async def work(ring: Ring, told: Listener) -> None:
        with path.open("rb") as file:
            fd = file.fileno()
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for _ in range(3):
                begun: list[int] = []
                while len(begun) < 3 * ENTRIES:
                    place = len(begun) * 7 % 1000 * PAGE
                    if ring.fetch(fd, place, PAGE, told, place):
                        begun.append(place)
                    else:
                        # Full: nobody is told of this one, and it fits when others are done.
                        assert ring._queued == ENTRIES or len(ring._waiting) == 2 * ENTRIES
                        await asyncio.sleep(0)
                found = await told.wait(len(begun))
                assert sorted(place for place, _ in found) == sorted(begun)
                assert FAILED not in {what for _, what in found}

    with_ring(work)


@needs_ring
@pytest.mark.parametrize(
    ("offset", "length"), [(0, PAGE), (100, 200), (PAGE - 1, 2), (3 * PAGE + 5, LARGEST), (0, LARGEST)]
)
def test_a_range_is_cached_once_it_is_told(tmp_path: Path, offset: int, length: int) -> None:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(64 * PAGE))

    async def work(ring: Ring, told: Listener) -> None:
        with path.open("rb") as file:
            fd = file.fileno()
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert ring.fetch(fd, offset, length, told, "it")
            assert not told.told  # never at once
            ((about, what),) = await told.wait(1)
            assert about == "it" and what != FAILED
            assert os.preadv(fd, [bytearray(length)], offset, os.RWF_NOWAIT) == length
            assert ring.fetch(fd, offset, length, told, "again")
            assert await told.wait(1) == [("again", CACHED)]

    with_ring(work)


@needs_ring
def test_what_comes_late_and_all_together() -> None:
    """More than the kernel completes in one call (20), while nothing else wakes the loop."""

    async def work(ring: Ring, told: Listener) -> None:
        with pipe() as (reads, writes):
            for number in range(100):
                assert ring.fetch(reads, 0, 1, told, number)
            await asyncio.sleep(0.01)
            assert not told.told
            os.write(writes, b"x" * 100)
            found = await told.wait(100)
            assert sorted(about for about, _ in found) == list(range(100))
            assert {what for _, what in found} == {CAME}

    with_ring(work)


@needs_ring
def test_errors_and_ends_of_files(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * (PAGE + 100))

    async def work(ring: Ring, told: Listener) -> None:
        with path.open("rb") as file:
            fd = file.fileno()
            assert ring.fetch(fd, 8 * PAGE, PAGE, told, "behind the end")
            assert ring.fetch(fd, 0, 2 * PAGE, told, "across the end")
            assert ring.fetch(fd, PAGE, 100, told, "up to the end")
            assert ring.fetch(12345, 0, PAGE, told, "no file")
            found = dict(await told.wait(4))
            assert found.pop("up to the end") != FAILED
            assert set(found.values()) == {FAILED} and len(found) == 3

    with_ring(work)


@needs_ring
@pytest.mark.parametrize("taken", [-1, 0, 3])
def test_what_the_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, taken: int) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 100 * PAGE)
    real = module._syscall()
    limits = [taken]

    def limited(number: int, *words: Any) -> int:
        if number != ENTER or not limits:
            return real(number, *words)
        limit = limits.pop()
        return -1 if limit < 0 else real(number, words[0], min(words[1], limit), *words[2:])

    async def work(ring: Ring, told: Listener) -> None:
        with path.open("rb") as file:
            monkeypatch.setattr(module, "_syscall", lambda: limited)
            for number in range(5):
                assert ring.fetch(file.fileno(), number * PAGE, PAGE, told, number)
            found = dict(await told.wait(5))
            assert [number for number in range(5) if found[number] == FAILED] == list(range(max(0, taken), 5))
            for number in range(50):
                assert ring.fetch(file.fileno(), number * PAGE, PAGE, told, number)
            found = dict(await told.wait(50))
            assert len(found) == 50 and FAILED not in found.values()

    with_ring(work)


@needs_ring
def test_users_share_it_and_the_last_one_ends_it() -> None:
    async def work(ring: Ring, told: Listener) -> None:
        other = Ring.of(asyncio.get_running_loop())
        assert other is ring
        with pipe() as (reads, writes):
            assert ring.fetch(reads, 0, 1, told, "kept")
            other.leave()
            os.write(writes, b"x")
            assert await told.wait(1) != []

    with_ring(work)


@needs_ring
def test_nobody_is_told_after_the_end() -> None:
    async def work(ring: Ring, told: Listener) -> None:
        with pipe() as (reads, writes):
            assert ring.fetch(reads, 0, 1, told, "waits")
            await asyncio.sleep(0.005)
            assert ring.fetch(reads, 0, 1, told, "the kernel does not know of it")
            ring.leave()
            os.write(writes, b"xx")
            await asyncio.sleep(0.01)
            assert not told.told
            # The next one begins anew.
            again = Ring.of(asyncio.get_running_loop())
            assert again is not None and again is not ring
            assert again.fetch(reads, 0, 1, told, "new")
            os.write(writes, b"x")
            assert [about for about, _ in await told.wait(1)] == ["new"]
            again.leave()

    with_ring(work, leave=False)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EMFILE])
def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A kernel that has it not, a sandbox that forbids it, a moment without descriptors."""
    asked: list[int] = []

    def refuse(call: int, *words: Any) -> int:
        import ctypes

        asked.append(call)
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(module, "_syscall", lambda: refuse)
    monkeypatch.setattr(Ring, "_refused", False)

    async def main() -> None:
        for _ in range(3):
            assert Ring.of(asyncio.get_running_loop()) is None

    asyncio.run(main())
    assert asked == [SETUP] * (3 if number == errno.EMFILE else 1)
    assert not Ring._rings


@needs_ring
def test_a_half_made_ring_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._syscall()

    def refuse(call: int, *words: Any) -> int:
        return real(call, *words) if call == SETUP else real(-1)

    monkeypatch.setattr(module, "_syscall", lambda: refuse)
    monkeypatch.setattr(Ring, "_refused", False)

    async def main() -> None:
        before = os.listdir("/proc/self/fd")
        assert Ring.of(asyncio.get_running_loop()) is None
        assert len(os.listdir("/proc/self/fd")) == len(before)

    asyncio.run(main())


@needs_ring
def test_whoever_is_told_may_leave(tmp_path: Path) -> None:
    """The last user leaves while several are told together; and a bug of one takes nobody else along."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(4 * PAGE))

    async def work(ring: Ring, told: Listener) -> None:
        def fail(about: object, what: int) -> None:
            raise RuntimeError("a bug")

        def leave(about: object, what: int) -> None:
            ring.leave()
            told(about, what)

        failures: list[object] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: failures.append(context.get("exception"))
        )
        with path.open("rb") as file:
            assert ring.fetch(file.fileno(), 0, PAGE, fail, "first")
            await until(lambda: bool(failures))
            assert isinstance(failures.pop(), RuntimeError)
            assert ring.fetch(file.fileno(), 0, PAGE, leave, "leaves")
            assert ring.fetch(file.fileno(), PAGE, PAGE, told, "second")
            assert [about for about, _ in await told.wait(2)] == ["leaves", "second"]
        assert not failures

    with_ring(work, leave=False)
