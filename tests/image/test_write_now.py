"""``Writer.try_write``: writes that wait for nothing, in place or to a new cluster."""

from __future__ import annotations

import errno
import os

import pytest

from nbdbm.image.write import Writer
from tests.image.test_write import BIG, REACH, SIZE, disk, extended, run, where
from tests.support.metadata import Parts, opened
from tests.support.qcow2build import COPIED


def test_it_does_all_or_nothing() -> None:
    async def work() -> None:
        parts = await opened(disk())
        done: list[tuple[int, bytes]] = []

        def try_pwrite(offset: int, data: memoryview) -> bool:
            done.append((offset, bytes(data)))
            return True

        parts.file.try_pwrite = try_pwrite  # type: ignore[method-assign]
        writer = parts.writer
        view = memoryview(b"w" * SIZE)
        assert not writer.try_write(0, view)  # the table is not there yet
        host = (await where(parts, 0)) & ~COPIED
        assert writer.try_write(SIZE // 2, view)
        assert done == [(host + SIZE // 2, bytes(view))]
        assert not writer.try_write(8 * SIZE - 1, view)  # leads into a hole
        assert not writer.try_write(REACH - 1, view)
        lock = await writer._locks.acquire(0, 1)
        assert not writer.try_write(10, view[:10])
        writer._locks.release(lock)
        assert writer.try_write(10, view[:10])

    run(work)


def inline(parts: Parts) -> list[tuple[int, int]]:
    """Have the file take writes that must not wait; returns where they go."""
    file, done = parts.file, list[tuple[int, int]]()

    def try_pwrite(offset: int, data: memoryview) -> bool:
        done.append((offset, len(data)))
        file.data.extend(bytes(max(0, offset + len(data) - len(file.data))))
        file.data[offset : offset + len(data)] = data
        file.size = len(file.data)
        return True

    file.try_pwrite = try_pwrite  # type: ignore[method-assign]
    return done


def test_it_takes_a_new_cluster_behind_all_others() -> None:
    async def work() -> None:
        parts = await opened(disk())
        done = inline(parts)
        await parts.read(0, 1)  # the table is there
        await parts.allocator.count(0)  # and the refcounts
        end = -(-len(parts.file.data) // SIZE) * SIZE
        assert parts.writer.try_write(20 * SIZE + 100, memoryview(b"w" * 50))
        assert done == [(end + 100, 50)]
        assert await where(parts, 20 * SIZE) == end | COPIED
        assert await parts.count(end) == 1 and parts.metadata.dirty
        assert await parts.read(20 * SIZE, SIZE) == (bytes(100) + b"w" * 50).ljust(SIZE, b"\0")
        assert parts.writer.try_write(21 * SIZE, memoryview(b"v" * SIZE))
        assert done[1:] == [(end + SIZE, SIZE)]
        await parts.writer.flush()
        assert parts.stored_count(end) == parts.stored_count(end + SIZE) == 1
        assert parts.stored_entry(20 * SIZE) == end | COPIED
        assert parts.stored_entry(21 * SIZE) == (end + SIZE) | COPIED

    run(work)


def test_it_leaves_every_other_allocation_to_the_general_way() -> None:
    async def work() -> None:
        parts = await opened(disk())
        done = inline(parts)
        await parts.read(0, 1)
        view = memoryview(b"w" * 100)
        writer, allocator = parts.writer, parts.allocator

        def refused(offset: int, view: memoryview = view) -> bool:
            before = allocator._hint, allocator._end, parts.metadata.dirty
            return not writer.try_write(offset, view) and before == (
                allocator._hint, allocator._end, parts.metadata.dirty,
            )  # fmt: skip

        assert refused(20 * SIZE)  # no refcount block in memory
        await allocator.count(0)
        assert refused(20 * SIZE - 1)  # two clusters
        assert refused(8 * SIZE - 1)  # one of them is there
        lock = await writer._locks.acquire(20, 21)
        assert refused(20 * SIZE)
        writer._locks.release(lock)
        parts.metadata._wrong_tables = {999}
        assert refused(20 * SIZE)
        parts.metadata._wrong_tables = set()
        offset, count, _ = await allocator.allocate(1)
        await allocator.release(offset, count)
        assert refused(20 * SIZE)  # a place that was used before
        await allocator.allocate(1)
        allocator.occupied.add({allocator._hint})
        assert refused(20 * SIZE)
        allocator.occupied.discard((allocator._hint,))
        assert not done
        assert writer.try_write(20 * SIZE, view)

    run(work)


@pytest.mark.parametrize("more", [{"backing": True}, {"shared": True}])
def test_it_allocates_nothing_where_more_must_be_done(more: dict[str, bool]) -> None:
    async def work() -> None:
        parts = await opened(disk())
        done = inline(parts)
        await parts.read(0, 1)
        await parts.allocator.count(0)
        if "backing" in more:
            writer = Writer(parts.metadata, parts.reader, parts.header.size, has_backing=True, raw_data=False)
        else:
            writer = parts.writer
            parts.clusters.l1[0] &= ~COPIED  # a snapshot has the table, too
        assert not writer.try_write(20 * SIZE, memoryview(b"w"))
        assert not done and not parts.metadata.dirty

    run(work)


def test_it_allocates_nothing_between_subclusters() -> None:
    async def work() -> None:
        parts = await opened(extended(0))
        done = inline(parts)
        await parts.read(0, 1)
        await parts.allocator.count(0)
        assert not parts.writer.try_write(BIG, memoryview(b"w" * BIG))
        assert not done and not parts.metadata.dirty

    run(work)


def test_it_gives_back_what_it_could_not_use() -> None:
    """If nothing was written there, the place is as good as new; else it is filled the next time."""

    async def work() -> None:
        parts = await opened(disk())
        await parts.read(0, 1)
        await parts.allocator.count(0)
        allocator = parts.allocator
        end = allocator._end
        used = allocator._blocks[0].used.count()
        assert not parts.writer.try_write(20 * SIZE, memoryview(b"w"))  # this file always wants to wait
        assert allocator._end == end and allocator._blocks[0].used.count() == used
        assert await where(parts, 20 * SIZE) == 0

        def torn(offset: int, data: memoryview) -> bool:
            parts.file.data.extend(b"t" * (offset + len(data) - len(parts.file.data)))
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        parts.file.try_pwrite = torn  # type: ignore[method-assign]
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            parts.writer.try_write(20 * SIZE, memoryview(b"w" * 600))
        assert allocator._blocks[0].used.count() == used
        assert await where(parts, 20 * SIZE) == 0
        inline(parts)
        assert not parts.writer.try_write(20 * SIZE, memoryview(b"w" * 5))
        await parts.writer.write(20 * SIZE, memoryview(b"w" * 5))
        assert await where(parts, 20 * SIZE) == end * SIZE | COPIED
        assert await parts.read(20 * SIZE, SIZE) == b"wwwww".ljust(SIZE, b"\0")

    run(work)


def test_it_commits_no_full_tables() -> None:
    async def work() -> None:
        parts = await opened(disk())
        done = inline(parts)
        await parts.read(0, 1)
        await parts.allocator.count(0)
        parts.cache.limit = SIZE // 2
        assert parts.writer.try_write(20 * SIZE, memoryview(b"w"))
        assert parts.metadata.pressing
        assert not parts.writer.try_write(21 * SIZE, memoryview(b"w"))
        assert len(done) == 1
        await parts.writer.write(21 * SIZE, memoryview(b"w"))
        assert not parts.metadata.dirty

    run(work)
