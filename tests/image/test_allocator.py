"""Which host clusters are handed out, and what reaches the file of it."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nbdbm.errors import CorruptError, ImageError
from nbdbm.image.allocator import Allocator
from nbdbm.qcow2.header import Header
from tests.support.memfile import MemoryFile, Operation
from tests.support.qcow2build import Image as Built
from tests.support.qcow2build import get_field

SIZE = 512
"""Of a cluster."""


def small(order: int = 4, **more: object) -> Built:
    return Built(size=1 << 16, cluster_bits=9, refcount_order=order, **more)  # type: ignore[arg-type]


async def load(built: Built | None = None, data: bytes | None = None) -> tuple[MemoryFile, Allocator]:
    file = MemoryFile((built or small()).build() if data is None else data)
    return file, await Allocator.load(file, Header.parse(bytes(file.data[:SIZE])))


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


async def store(allocator: Allocator) -> None:
    """What a commit does."""
    await allocator.write_new_blocks()
    await allocator.write_dirty()
    await allocator.file.sync()


async def counts(allocator: Allocator, clusters: int) -> list[int]:
    return [await allocator.count(cluster) for cluster in range(clusters)]


def fail(kind: str, number: int, code: int = errno.EIO) -> Callable[[Operation], None]:
    """Refuses the number-th operation of a kind."""
    seen = iter(range(1 << 30))

    def before(operation: Operation) -> None:
        if operation.kind == kind and next(seen) == number:
            raise OSError(code, "refused")

    return before


def test_what_is_new_is_fresh_and_what_was_used_is_not() -> None:
    async def work() -> None:
        file, allocator = await load()
        end = len(file.data)
        offset, count, fresh = await allocator.allocate(2)
        assert (offset, count, fresh) == (end, 2, True)
        await allocator.release(offset, 2)
        assert await allocator.allocate(1) == (end, 1, False)
        assert await allocator.count(end // SIZE) == 1

    run(work)


def test_a_hole_is_filled_first_and_bounds_the_piece() -> None:
    async def work() -> None:
        _, allocator = await load()
        first, _, _ = await allocator.allocate(6)
        await allocator.release(first + SIZE, 2)
        assert await allocator.allocate(4) == (first + SIZE, 2, False)
        assert await allocator.allocate(4) == (first + 6 * SIZE, 4, True)

    run(work)


def test_exactly_so_many_are_found_and_gaps_given_back() -> None:
    async def work() -> None:
        _, allocator = await load()
        first, _, _ = await allocator.allocate(8)
        await allocator.release(first + SIZE, 2)
        await allocator.release(first + 4 * SIZE, 1)
        offset, _ = await allocator.allocate_exact(3)
        assert offset == first + 8 * SIZE
        base = first // SIZE
        assert [await allocator.count(base + n) for n in range(11)] == [1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1]
        assert await allocator.allocate(1) == (first + SIZE, 1, False)

    run(work)


@pytest.mark.parametrize("count", [63, 64, 128, 1000, 5000])
def test_more_than_a_region_has(count: int) -> None:
    """64 clusters a region, the first of which is a refcount block; 64 regions in the table."""

    async def work() -> None:
        file, allocator = await load(small(6))
        end = len(file.data) // SIZE
        offset, fresh = await allocator.allocate_exact(count)
        assert fresh and offset >= end * SIZE
        await store(allocator)
        _, again = await load(data=bytes(file.data).ljust(offset + count * SIZE, b"\0"))
        first = offset // SIZE
        assert [await again.count(first + n) for n in range(-1, count)] == [1] * (count + 1)
        # No more is used than that takes: blocks, and perhaps a larger table.
        used = sum([await again.count(n) for n in range(first + count + 200)])
        assert used <= end + count + 2 * (count // 63 + 2) + 200 * (count == 5000)
        # What was skipped is there for others.
        assert (await again.allocate(1))[0] < offset
        other, _ = await again.allocate_exact(count)
        assert other >= offset + count * SIZE

    run(work)


def test_a_region_behind_the_end_that_has_a_block_already() -> None:
    async def work() -> None:
        built = small(6)
        data = bytearray(built.build())
        table = get_field(data, "refcount_table_offset")
        block = len(data)
        data += bytes(SIZE)  # the block of region 3, in region 0
        data[table + 24 : table + 32] = block.to_bytes(8, "big")
        _, allocator = await load(data=bytes(data))
        await allocator.allocate_exact(200)
        assert allocator.table[3] == block
        assert allocator.table[4] == 4 * 64 * SIZE

    run(work)


def test_exactly_so_many_fails_without_a_trace() -> None:
    async def work() -> None:
        file, allocator = await load()
        first, _, _ = await allocator.allocate(4)
        await allocator.release(first + SIZE, 1)
        before = await counts(allocator, 256)
        real = allocator.allocate
        calls = iter(range(10))

        async def allocate(count: int) -> tuple[int, int, bool]:
            if next(calls) == 2:
                raise OSError(errno.EIO, "refused")
            return await real(min(count, 2))

        allocator.allocate = allocate  # type: ignore[method-assign]
        with pytest.raises(OSError, match="refused"):
            await allocator.allocate_exact(5)
        assert await counts(allocator, 256) == before
        assert file.count("pwrite") == 0

    run(work)


def test_a_count_falls_by_one_each_time_and_never_below_zero() -> None:
    async def work() -> None:
        _, allocator = await load()
        offset, _, _ = await allocator.allocate(1)
        cluster = offset // SIZE
        number, index = divmod(cluster, allocator.per_block)
        block = await allocator._block(number)
        assert block is not None
        block.counts[index] = 3  # as snapshots leave it
        assert await allocator.decrement([cluster, cluster]) == []
        assert await allocator.decrement([cluster, cluster]) == [cluster]
        assert await allocator.count(cluster) == 0
        assert await allocator.decrement([cluster, 1 << 40]) == []

    run(work)


@pytest.mark.parametrize("order", range(7))
def test_every_width_reaches_the_file(order: int) -> None:
    async def work() -> None:
        file, allocator = await load(small(order))
        taken = [await allocator.allocate(3) for _ in range(70)]
        await allocator.release(taken[1][0], 1)
        await store(allocator)
        assert not allocator.dirty
        _, again = await load(data=bytes(file.data))
        total = len(file.data) // SIZE + 10
        assert await counts(again, total) == await counts(allocator, total)
        assert await again.count(taken[1][0] // SIZE) == 0
        assert await again.count(taken[2][0] // SIZE) == 1

    run(work)


def test_nothing_changed_writes_nothing() -> None:
    async def work() -> None:
        file, allocator = await load()
        file.log.clear()
        assert not allocator.dirty
        await store(allocator)
        assert file.count("pwrite") == 0
        await allocator.allocate(1)
        assert allocator.dirty
        await store(allocator)
        assert file.count("pwrite") == 1

    run(work)


def test_a_new_block_is_whole_before_the_table_knows_it() -> None:
    async def work() -> None:
        file, allocator = await load(small(6))
        while not allocator._new:
            await allocator.allocate(1)
        number = allocator._new[0]
        file.log.clear()
        assert await allocator.write_new_blocks()
        kinds = [(operation.kind, operation.offset) for operation in file.log]
        block = allocator.table[number]
        assert kinds == [("pwrite", block), ("sync", 0), ("pwrite", allocator.table_offset + 8 * number)]
        assert not await allocator.write_new_blocks()

    run(work)


@pytest.mark.parametrize("step", range(3))
def test_a_new_block_that_cannot_be_written_is_written_later(step: int) -> None:
    async def work() -> None:
        file, allocator = await load(small(6))
        while not allocator._new:
            await allocator.allocate(1)
        file.before = fail("sync", 0) if step == 2 else fail("pwrite", step)
        with pytest.raises(OSError, match="refused"):
            await allocator.write_new_blocks()
        await store(allocator)
        total = len(file.data) // SIZE + 10
        _, again = await load(data=bytes(file.data))
        assert await counts(again, total) == await counts(allocator, total)

    run(work)


def test_a_disk_that_is_full_has_no_new_block() -> None:
    """It is who writes that hears of it; the flush could not place the counts of what was written before."""

    async def work() -> None:
        file, allocator = await load(small(6))
        room = allocator.per_block - len(file.data) // SIZE
        await allocator.allocate(room)
        before = list(allocator.table)
        for _ in range(2):
            file.before = fail("pwrite", 0, errno.ENOSPC)
            with pytest.raises(OSError, match="refused"):
                await allocator.allocate(1)
            assert list(allocator.table) == before and not allocator._new
        file.before = None
        await store(allocator)
        offset, count, _ = await allocator.allocate(5)
        assert (offset, count) == ((allocator.per_block + 1) * SIZE, 5)
        # Its block lies before it, and in the file.
        assert len(file.data) >= offset

    run(work)


def test_a_page_that_cannot_be_written_is_written_later() -> None:
    async def work() -> None:
        file, allocator = await load()
        offset, _, _ = await allocator.allocate(1)
        file.before = fail("pwrite", 0, errno.ENOSPC)
        with pytest.raises(OSError, match="refused"):
            await allocator.write_dirty()
        assert allocator.dirty
        await allocator.write_dirty()
        _, again = await load(data=bytes(file.data))
        assert await again.count(offset // SIZE) == 1

    run(work)


def test_the_table_moves_when_it_is_full() -> None:
    async def work() -> None:
        file, allocator = await load(small(6))
        table, entries = allocator.table_offset, len(allocator.table)
        file.log.clear()
        offset = 0
        while allocator.table_offset == table:
            offset, _, _ = await allocator.allocate(64)
        assert offset == table  # which is free again at once
        steps = [operation for operation in file.log if operation.kind in ("sync", "pwrite")]
        header = next(n for n, step in enumerate(steps) if step.kind == "pwrite" and step.offset == 48)
        assert steps[header - 1].kind == "sync" and steps[header + 1].kind == "sync"
        assert all(step.offset > table for step in steps[:header] if step.kind == "pwrite")
        assert len(allocator.table) > entries
        assert await allocator.count(allocator.table_offset // SIZE) == 1
        assert get_field(file.data, "refcount_table_offset") == allocator.table_offset
        assert get_field(file.data, "refcount_table_clusters") == allocator.table_clusters
        await store(allocator)
        total = len(file.data) // SIZE + 10
        _, again = await load(data=bytes(file.data))
        assert await counts(again, total) == await counts(allocator, total)

    run(work)


def test_a_table_that_cannot_be_moved_stays() -> None:
    async def work() -> None:
        failures = 0
        for number in range(8):
            file, allocator = await load(small(6))
            table = allocator.table_offset
            file.before = fail("pwrite", number, errno.ENOSPC)
            failed = 0
            while allocator.table_offset == table:
                try:
                    await allocator.allocate(64)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    failed += 1
                except ImageError as error:  # the header itself: see below
                    assert error.errno == errno.ENOSPC and "moving the refcount table" in str(error)
                    failed += 1
            assert failed <= 1
            failures += failed
            await store(allocator)
            total = len(file.data) // SIZE + 10
            _, again = await load(data=bytes(file.data))
            assert await counts(again, total) == await counts(allocator, total)
        assert failures > 4

    run(work)


def test_failures_that_leave_the_file_unknown_are_told() -> None:
    async def work() -> None:
        file, allocator = await load(small(6))
        told: list[str] = []

        def give_up(what: str, error: OSError) -> ImageError:
            told.append(what)
            return ImageError("x", what, errno=error.errno)

        def before(operation: Operation) -> None:
            if operation.kind == "pwrite" and operation.offset == 48:
                raise OSError(errno.EIO, "refused")

        allocator.give_up = give_up
        file.before = before
        with pytest.raises(ImageError, match="moving the refcount table"):
            while True:
                await allocator.allocate(64)
        assert told == ["moving the refcount table"]

    run(work)


def test_the_format_has_an_end() -> None:
    async def work() -> None:
        _, allocator = await load()
        allocator._hint = (8 * 1024 * 1024 // 8) * allocator.per_block
        with pytest.raises(ImageError, match="cannot grow further") as caught:
            await allocator.allocate(1)
        assert caught.value.errno == errno.ENOSPC

    run(work)


@pytest.mark.parametrize("what", ("header", "table", "block", "protected"))
def test_metadata_is_not_handed_out_whatever_the_refcounts_say(what: str) -> None:
    async def work() -> None:
        _, allocator = await load()
        place = {
            "header": 0,
            "table": allocator.table_offset,
            "block": allocator.table[0],
            "protected": 5 * SIZE,
        }[what]
        await allocator.allocate(1)
        await allocator.release(place, 1)
        allocator.protect(5 * SIZE, 1)
        with pytest.raises(CorruptError, match=f"call the cluster at {place:#x} free"):
            while True:
                await allocator.allocate(1)
        if what == "protected":
            allocator.unprotect(5 * SIZE)
            assert (await allocator.allocate(1))[:2] == (5 * SIZE, 1)

    run(work)


@pytest.mark.parametrize("entry", (512 + 1, 1 << 40, "twice"))
def test_a_broken_table_is_refused(entry: int | str) -> None:
    async def work() -> None:
        data = bytearray(small().build())
        at = get_field(data, "refcount_table_offset")
        new = data[at : at + 8] if entry == "twice" else int(entry).to_bytes(8, "big")
        data[at + 8 : at + 16] = new
        with pytest.raises(CorruptError, match="refcount table entry 1 is"):
            await load(data=bytes(data))

    run(work)


def test_reserved_clusters_are_passed_over() -> None:
    async def work() -> None:
        _, allocator = await load()
        offset, _, _ = await allocator.allocate(4)
        await allocator.release(offset, 4)
        assert allocator.reserve(offset // SIZE + 1, 2)
        assert await allocator.allocate(4) == (offset, 1, False)
        assert not allocator.reserve(offset // SIZE, 2)
        assert not allocator.reserve(1 << 40, 1)
        allocator.unreserve(offset // SIZE + 1, 2)
        assert await allocator.allocate(3) == (offset + SIZE, 3, False)

    run(work)


@settings(max_examples=30)
@example(208, 6)
@given(st.integers(0, 1 << 30), st.sampled_from((0, 3, 6)))
def test_many_at_once_never_share_a_cluster(seed: int, order: int) -> None:
    async def work() -> None:
        file, allocator = await load(small(order))
        allocator._cache_blocks = 2  # so that blocks come and go
        rng = random.Random(seed)
        initial = len(file.data) // SIZE
        held: dict[int, int] = {}

        def take(offset: int, count: int) -> None:
            for cluster in range(offset // SIZE, offset // SIZE + count):
                assert cluster >= initial and cluster not in held
                held[cluster] = 1

        async def client() -> None:
            mine: list[tuple[int, int]] = []
            for _ in range(12):
                await asyncio.sleep(0)
                what = rng.random()
                if what < 0.6 or not mine:
                    wanted = rng.randrange(1, 40)
                    if what < 0.1:
                        wanted = rng.choice((wanted, 100))
                        offset, _ = await allocator.allocate_exact(wanted)
                        count = wanted
                    else:
                        offset, count, _ = await allocator.allocate(wanted)
                    take(offset, count)
                    mine.append((offset, count))
                elif what < 0.9:
                    offset, count = mine.pop(rng.randrange(len(mine)))
                    for cluster in range(offset // SIZE, offset // SIZE + count):
                        del held[cluster]
                    await allocator.release(offset, count)
                else:
                    await asyncio.sleep(0)

        async def commits() -> None:
            for _ in range(5):
                await store(allocator)

        await asyncio.gather(*(client() for _ in range(4)), commits())
        await store(allocator)
        _, again = await load(data=bytes(file.data))
        for cluster in held:
            assert await again.count(cluster) == 1
        total = max(held, default=0) + 2
        assert await counts(again, total) == await counts(allocator, total)

    run(work)
