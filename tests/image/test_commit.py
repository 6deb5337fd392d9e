"""Commits: in which order metadata reaches the file, and what a failure leaves to be done."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from nbdbm.errors import CorruptError, ImageError
from nbdbm.image.cache import Table
from tests.support.memfile import Operation
from tests.support.metadata import Parts, opened
from tests.support.qcow2build import COPIED, get_field
from tests.support.qcow2build import Image as Built

SIZE = 4096
DATA = b"d" * SIZE
REACH = SIZE * SIZE // 8
"""Bytes of the disk that one L2 table maps."""


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def disk(**more: Any) -> Built:
    """Data in clusters 0 to 3, and nothing in the second table's reach."""
    more.setdefault("clusters", dict.fromkeys(range(4), DATA))
    return Built(size=2 * REACH, cluster_bits=12, **more)


def fail(kind: str, number: int = 0, code: int = errno.EIO) -> Callable[[Operation], None]:
    """Refuses the number-th operation of a kind."""
    seen: Iterator[int] = iter(range(1 << 30))

    def before(operation: Operation) -> None:
        if operation.kind == kind and next(seen) == number:
            raise OSError(code, "refused")

    return before


async def link(parts: Parts, guest: int, host: int) -> int:
    """Map a guest cluster elsewhere; return where it was."""
    table = await parts.metadata.table(guest)
    at = guest // SIZE % (SIZE // 8)
    old = table.words[at] & ~COPIED
    table.words[at] = host | COPIED
    parts.metadata.changed(guest, table, [old // SIZE] if old else [])
    return old


async def new(parts: Parts) -> int:
    host, _, _ = await parts.allocator.allocate(1)
    await parts.file.pwrite(host, DATA)
    return host


def kinds(parts: Parts) -> list[str]:
    return [operation.kind for operation in parts.file.log if operation.kind in ("pwrite", "sync", "discard")]


def test_without_changes_a_commit_is_one_sync() -> None:
    async def work() -> None:
        parts = await opened(disk())
        await parts.metadata.flush()
        assert kinds(parts) == ["sync"]

    run(work)


def test_counts_before_the_mapping_that_needs_them() -> None:
    async def work() -> None:
        parts = await opened(disk())
        host = await new(parts)
        old = await link(parts, 0, host)
        assert parts.stored_entry(0) == old | COPIED
        parts.file.log.clear()
        await parts.metadata.flush()
        counts, first, entry, second = parts.file.log[:4]
        assert (counts.kind, first.kind, entry.kind, second.kind) == ("pwrite", "sync", "pwrite", "sync")
        assert parts.stored_entry(0) == host | COPIED
        assert parts.stored_count(host) == 1
        # What was unlinked is free in memory only, and loses its place on the host.
        assert parts.stored_count(old) == 1 and await parts.count(old) == 0
        assert [o.offset for o in parts.file.log[4:]] == [old]
        await parts.metadata.flush()
        assert parts.stored_count(old) == 0
        assert not parts.metadata.dirty

    run(work)


def test_a_new_table_is_blank_in_the_file_before_the_l1_entry_leads_there() -> None:
    async def work() -> None:
        parts = await opened(disk())
        guest = REACH
        host = await new(parts)
        parts.file.log.clear()
        await link(parts, guest, host)
        (blank,) = [o for o in parts.file.log if o.kind == "pwrite"]
        assert blank.data == bytes(SIZE)
        assert parts.stored_entry(guest) == 0
        parts.file.log.clear()
        await parts.metadata.flush()
        writes = [o.offset for o in parts.file.log if o.kind == "pwrite"]
        assert kinds(parts) == ["pwrite", "sync", "pwrite", "pwrite", "sync"]
        assert writes[1] == parts.header.l1_table_offset + 8
        assert parts.stored_entry(guest) == host | COPIED

    run(work)


def test_a_shared_table_is_copied_and_the_old_one_loses_one_reference() -> None:
    async def work() -> None:
        parts = await opened(disk())
        metadata = parts.metadata
        old = parts.clusters.table_offset(0)
        parts.clusters.l1[0] &= ~COPIED
        number, index = divmod(old // SIZE, parts.allocator.per_block)
        block = await parts.allocator._block(number)
        assert block is not None
        block.counts[index] = 2
        before = bytes(parts.file.data[old : old + SIZE])
        await link(parts, 0, await new(parts))
        assert parts.clusters.table_offset(0) != old and parts.clusters.l1[0] & COPIED
        await metadata.flush()
        assert bytes(parts.file.data[old : old + SIZE]) == before
        assert await parts.count(old) == 1
        assert await parts.read(SIZE, SIZE) == DATA

    run(work)


@pytest.mark.parametrize("copied", (COPIED, 0))
@pytest.mark.parametrize("other", ("an L2 table", "the L1 table", "the refcount table"))
def test_a_table_that_is_something_else_as_well_is_not_changed(other: str, copied: int) -> None:
    """The changes of one would be lost, or destroy the other."""

    def edit(data: bytearray) -> None:
        l1 = get_field(data, "l1_table_offset")
        place = {
            "an L2 table": int.from_bytes(data[l1 : l1 + 8], "big") & ~COPIED,
            "the L1 table": l1,
            "the refcount table": get_field(data, "refcount_table_offset"),
        }[other]
        data[l1 + 8 : l1 + 16] = (place | copied).to_bytes(8, "big")

    async def work() -> None:
        parts = await opened(
            Built(size=3 * REACH, cluster_bits=12, clusters={0: DATA, 1024: DATA}), edit=edit
        )
        before = bytes(parts.file.data)
        wrong = (SIZE, REACH) if other == "an L2 table" else (REACH,)
        for offset in wrong:
            with pytest.raises(CorruptError, match="is other metadata as well"):
                await parts.metadata.table(offset)
        await parts.metadata.flush()
        assert bytes(parts.file.data) == before
        await link(parts, 2 * REACH, await new(parts))

    run(work)


def test_tables_are_not_handed_out_whatever_the_refcounts_say() -> None:
    async def work() -> None:
        parts = await opened(disk())
        (old,) = (entry & ~COPIED for entry in parts.clusters.l1 if entry)
        made = (await parts.metadata.table(REACH), parts.clusters.l1[1] & ~COPIED)[1]
        for place in (old, made):
            await parts.allocator.release(place, 1)
            with pytest.raises(CorruptError, match=f"call the cluster at {place:#x} free"):
                while True:
                    await parts.allocator.allocate(1)
            parts.allocator.occupied.discard([place // SIZE])
            assert (await parts.allocator.allocate(1))[0] == place

    run(work)


def test_a_table_that_was_copied_may_be_reused() -> None:
    async def work() -> None:
        parts = await opened(disk())
        old = parts.clusters.l1[0] & ~COPIED
        parts.clusters.l1[0] = old  # as if a snapshot had it too, which is gone
        await link(parts, 4 * SIZE, await new(parts))
        await parts.metadata.drain()
        assert await parts.count(old) == 0
        assert (await parts.allocator.allocate(1))[0] == old

    run(work)


def test_a_table_that_cannot_be_written_leaves_nothing_behind() -> None:
    async def work() -> None:
        parts = await opened(disk())
        used = parts.allocator._blocks[0].used.count() if parts.allocator._blocks else None
        parts.file.before = fail("pwrite", 0, errno.ENOSPC)
        with pytest.raises(OSError, match="refused"):
            await parts.metadata.table(REACH)
        assert parts.clusters.l1[1] == 0
        assert used is None or parts.allocator._blocks[0].used.count() == used
        await parts.metadata.table(REACH)
        assert parts.clusters.l1[1]

    run(work)


def test_one_table_for_many_who_ask_at_once() -> None:
    async def work() -> None:
        parts = await opened(disk())
        tables = await asyncio.gather(*(parts.metadata.table(REACH + n * SIZE) for n in range(8)))
        assert all(table is tables[0] for table in tables)
        assert sum(o.kind == "pwrite" for o in parts.file.log) == 1

    run(work)


def test_only_the_pages_that_changed_are_written() -> None:
    async def work() -> None:
        size = 1 << 16
        parts = await opened(Built(size=1 << 29, cluster_bits=16, clusters={0: b"x" * size}))
        for entry in (0, 511, 512, 4000, 8191):
            host, _, _ = await parts.allocator.allocate(1)
            table = await parts.metadata.table(entry * size)
            table.words[entry] = host | COPIED
            parts.metadata.changed(entry * size, table)
        await parts.metadata.flush()
        base = parts.clusters.table_offset(0)
        l2 = [(o.offset - base, o.length) for o in parts.file.log if o.kind == "pwrite" and o.offset >= base]
        inside = [(at, length) for at, length in l2 if at < size]
        assert inside == [(0, 8192), (7 * 4096, 4096), (15 * 4096, 4096)]
        for entry in (0, 511, 512, 4000, 8191):
            assert parts.stored_entry(entry * size) & COPIED

    run(work)


def test_flushes_that_wait_share_a_commit() -> None:
    async def work() -> None:
        parts = await opened(disk())
        await asyncio.gather(*(parts.metadata.flush() for _ in range(9)))
        # The first one runs at once; all that came meanwhile share the second.
        assert parts.file.count("sync") == 2

    run(work)


def test_what_changes_during_a_commit_belongs_to_the_next() -> None:
    async def work() -> None:
        parts = await opened(disk())
        one, two = await new(parts), await new(parts)
        await link(parts, 0, one)

        reached = asyncio.Event()

        def before(operation: Operation) -> None:
            if operation.kind == "sync":
                reached.set()

        parts.file.before = before
        commit = asyncio.create_task(parts.metadata.flush())
        await reached.wait()
        await link(parts, 0, two)
        await link(parts, SIZE, one)
        await commit
        assert parts.stored_entry(0) == one | COPIED
        assert parts.metadata.dirty
        await parts.metadata.flush()
        assert parts.stored_entry(0) == two | COPIED
        assert parts.stored_entry(SIZE) == one | COPIED

    run(work)


@pytest.mark.parametrize("write", range(4))
@pytest.mark.parametrize("code", (errno.EIO, errno.ENOSPC, errno.EDQUOT))
def test_a_failed_write_is_made_up_for_by_the_next_flush(write: int, code: int) -> None:
    async def work() -> None:
        parts = await opened(disk())
        host, other = await new(parts), await new(parts)
        old = await link(parts, 0, host)
        await link(parts, REACH, other)
        parts.file.before = fail("pwrite", write, code)
        with pytest.raises(OSError, match="refused") as caught:
            await parts.metadata.flush()
        assert caught.value.errno == code
        assert parts.metadata.broken is None and parts.metadata.dirty
        assert await parts.count(old) == 1
        await parts.metadata.flush()
        assert parts.stored_entry(0) == host | COPIED
        assert parts.stored_entry(REACH) == other | COPIED
        assert await parts.count(old) == 0

    run(work)


@pytest.mark.parametrize("sync", (0, 1))
def test_a_failed_sync_ends_writing_with_one_message(sync: int, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        parts = await opened(disk())
        old = await link(parts, 0, await new(parts))
        parts.file.before = fail("sync", sync, errno.ENOSPC)
        with pytest.raises(ImageError, match=r"a sync failed .*accepts no more writes") as caught:
            await parts.metadata.flush()
        assert caught.value.errno == errno.ENOSPC
        parts.file.log.clear()
        for _ in range(2):
            with pytest.raises(ImageError, match="accepts no more writes") as caught:
                await parts.metadata.flush()
            assert caught.value.errno == errno.EIO
        assert parts.file.log == []
        assert await parts.count(old) == 1

    with caplog.at_level(logging.ERROR):
        run(work)
    assert len(caplog.records) == 1


def test_a_failed_sync_for_a_new_refcount_block_ends_writing() -> None:
    async def work() -> None:
        parts = await opened(disk(refcount_order=6))
        while not parts.allocator._new:
            await parts.allocator.allocate(64)
        parts.file.before = fail("sync", 0)
        with pytest.raises(ImageError, match="accepts no more writes"):
            await parts.metadata.flush()
        assert parts.metadata.broken is not None

    run(work)


def test_a_failed_sync_while_the_refcount_table_moves_ends_writing() -> None:
    async def work() -> None:
        parts = await opened(Built(size=1 << 16, cluster_bits=9, refcount_order=6))
        parts.file.before = fail("sync", 0)
        with pytest.raises(ImageError, match="accepts no more writes"):
            while True:
                await parts.allocator.allocate(64)
        assert parts.metadata.broken is not None

    run(work)


def test_freed_clusters_wait_for_requests_that_may_use_them() -> None:
    async def work() -> None:
        parts = await opened(disk())
        metadata = parts.metadata
        reader = metadata.epochs.enter()
        old = await link(parts, 0, await new(parts))
        await metadata.flush()
        assert await parts.count(old) == 1
        late = metadata.epochs.enter()
        metadata.epochs.leave(reader)
        await metadata.flush()
        assert await parts.count(old) == 0
        metadata.epochs.leave(late)
        await metadata.drain()

    run(work)


def test_without_discard_nothing_is_punched() -> None:
    async def work() -> None:
        parts = await opened(disk(), punch=False)
        await link(parts, 0, await new(parts))
        await parts.metadata.drain()
        assert parts.file.count("discard") == 0

    run(work)


def test_a_hole_that_cannot_be_punched_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        parts = await opened(disk())
        old = await link(parts, 0, await new(parts))
        parts.file.before = fail("discard")
        await parts.metadata.drain()
        assert (await parts.allocator.allocate(1))[0] == old

    with caplog.at_level(logging.WARNING):
        run(work)
    assert "punching a hole failed" in caplog.text


def test_a_cluster_that_is_being_punched_gets_no_new_user() -> None:
    async def work() -> None:
        parts = await opened(disk())
        old = await link(parts, 0, await new(parts))
        taken: list[int] = []

        async def take() -> None:
            taken.append((await parts.allocator.allocate(1))[0])

        tasks: list[asyncio.Task[None]] = []

        def before(operation: Operation) -> None:
            if operation.kind == "discard":
                tasks.append(asyncio.get_running_loop().create_task(take()))

        parts.file.before = before
        real = parts.file.discard

        async def discard(offset: int, length: int) -> None:
            await real(offset, length)
            await asyncio.sleep(0.01)

        parts.file.discard = discard  # type: ignore[method-assign]
        await parts.metadata.drain()
        await asyncio.gather(*tasks)
        assert taken and taken[0] != old
        assert (await parts.allocator.allocate(1))[0] == old

    run(work)


def test_freeing_that_fails_leaks_and_does_not_fail_the_flush(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        parts = await opened(disk())
        await link(parts, 0, await new(parts))
        real = parts.allocator.decrement

        async def decrement(clusters: list[int]) -> list[int]:
            raise OSError(errno.EIO, "refused")

        parts.allocator.decrement = decrement  # type: ignore[method-assign,assignment]
        await parts.metadata.flush()
        parts.allocator.decrement = real  # type: ignore[method-assign]
        await parts.metadata.drain()

    with caplog.at_level(logging.WARNING):
        run(work)
    assert "freeing clusters failed" in caplog.text


def test_changed_tables_stay_in_the_cache_until_they_are_written() -> None:
    async def work() -> None:
        reach = 512 * 64
        built = Built(size=40 * reach, cluster_bits=9, clusters={64 * n: b"x" * 512 for n in range(40)})
        parts = await opened(built, limit=4 * 64 * 9)
        table: Table | None = None
        for number in range(8):
            table = await parts.metadata.table(number * reach)
            table.words[1] = (await parts.allocator.allocate(1))[0] | COPIED
            parts.metadata.changed(number * reach + 512, table)
        assert parts.metadata.pressing
        for number in range(8, 40):
            await parts.clusters.slice(number)
        assert all(number in parts.cache.values for number in range(8))
        await parts.metadata.flush()
        assert not parts.metadata.pressing
        for number in range(8, 40):
            await parts.clusters.slice(number)
        assert not any(number in parts.cache.values for number in range(8))
        for number in range(8):
            assert (await parts.clusters.slice(number)).words[1] & COPIED

    run(work)


@pytest.mark.parametrize(("first", "count"), [(0, 1), (510, 2), (511, 2), (100, 1500), (0, 8192)])
def test_a_run_of_changes_marks_every_page_of_it(first: int, count: int) -> None:
    async def work() -> None:
        size = 1 << 16
        at_once, singly = [
            await opened(Built(size=1 << 29, cluster_bits=16, clusters={0: b"x" * size})) for _ in range(2)
        ]
        table, other = await at_once.metadata.table(0), await singly.metadata.table(0)
        at_once.metadata.changed(first * size, table, count=count)
        for entry in range(first, first + count):
            singly.metadata.changed(entry * size, other)
        assert table.dirty == other.dirty != 0
        assert table.pinned

    run(work)


def test_a_table_dropped_before_its_user_woke_is_not_changed() -> None:
    async def work() -> None:
        parts = await opened(disk())
        real = parts.clusters.slice
        stale: list[Table] = []

        async def slice_(number: int) -> Table:
            table = await real(number)
            if not stale:  # dropped and loaded for somebody else, before the caller goes on
                stale.append(table)
                parts.cache.drop(number)
                await real(number)
            return table

        parts.clusters.slice = slice_  # type: ignore[method-assign]
        table = await parts.metadata.table(0)
        assert table is not stale[0]
        assert table is parts.cache.get(0)

    run(work)


def test_a_table_that_moved_while_it_was_read_is_read_again() -> None:
    async def work() -> None:
        parts = await opened(disk())
        old = parts.clusters.table_offset(0)
        parts.clusters.l1[0] &= ~COPIED

        moved = False

        def before(operation: Operation) -> None:
            nonlocal moved
            if operation.kind == "pread" and operation.offset == old and not moved:
                # Copied, freed, and given to somebody else in the meantime.
                moved = True
                place = len(parts.file.data)
                parts.file.data += parts.file.data[old : old + SIZE]
                parts.file.size = len(parts.file.data)
                parts.file.data[old : old + SIZE] = b"\x5a" * SIZE
                parts.clusters.l1[0] = place | COPIED

        parts.file.before = before
        assert await parts.read(SIZE, SIZE) == DATA
        assert moved

    run(work)


def test_a_cancelled_flush_goes_on() -> None:
    async def work() -> None:
        parts = await opened(disk())
        host = await new(parts)
        await link(parts, 0, host)
        task = asyncio.create_task(parts.metadata.flush())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await parts.metadata.flush()
        assert parts.stored_entry(0) == host | COPIED

    run(work)
