"""The write path, case by case; random work on every kind of image is in tests/property."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nbdbm.errors import CorruptError, ImageError
from nbdbm.image.blockfile import HostFile, ThreadedFile
from nbdbm.image.image import Image, OpenOptions
from nbdbm.qcow2.constants import ZERO
from tests.support.engine import read, use
from tests.support.jitter import JitterFile
from tests.support.memfile import Operation
from tests.support.metadata import Parts, opened
from tests.support.qcow2build import COPIED
from tests.support.qcow2build import Image as Built
from tests.support.qemu import SYSTEM

SIZE = 4096
REACH = SIZE * SIZE // 8
EXTENDED = 0x10
BIG = 16 * 1024
"""Of a cluster with subclusters, which have 512 bytes then."""


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def disk(**more: Any) -> Built:
    """Text in clusters 0 to 7."""
    more.setdefault("clusters", {n: bytes((65 + n,)) * SIZE for n in range(8)})
    return Built(size=2 * REACH, cluster_bits=12, **more)


def extended(*clusters: int) -> Built:
    return Built(
        size=64 * BIG,
        cluster_bits=14,
        incompatible=EXTENDED,
        clusters={n: bytes((65 + n,)) * BIG for n in clusters},
    )


def writes(parts: Parts) -> list[tuple[int, int]]:
    return [(o.offset, o.length) for o in parts.file.log if o.kind == "pwrite"]


async def where(parts: Parts, guest: int) -> int:
    """The L2 entry, in memory."""
    table = await parts.clusters.slice(guest >> parts.clusters.geometry.slice_shift)
    word: int = table.words[parts.writer._editor.slot(guest)]
    return word


def refuse(kind: str, code: int = errno.ENOSPC) -> Callable[[Operation], None]:
    def before(operation: Operation) -> None:
        if operation.kind == kind:
            raise OSError(code, os.strerror(code))

    return before


# -- write ---------------------------------------------------------------------------------------


def test_data_of_our_own_is_overwritten_where_it_lies() -> None:
    async def work() -> None:
        parts = await opened(disk())
        host = (await where(parts, SIZE)) & ~COPIED
        parts.file.log.clear()
        await parts.writer.write(SIZE + 100, memoryview(b"w" * 50))
        assert writes(parts) == [(host + 100, 50)]
        assert not parts.metadata.dirty

    run(work)


def test_adjacent_clusters_are_one_write() -> None:
    async def work() -> None:
        parts = await opened(disk())
        await parts.writer.write(10, memoryview(b"w" * (5 * SIZE)))
        assert len(writes(parts)) == 1

    run(work)


def test_whoever_changes_a_later_cluster_is_waited_for() -> None:
    """The first cluster is free: a writer that only asked about that one would turn for ever, and alone."""

    async def work() -> None:
        parts = await opened(disk())
        locks = parts.writer._locks
        lock = await locks.acquire(2, 3)
        writing = asyncio.ensure_future(parts.writer.write(0, memoryview(b"w" * (4 * SIZE))))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not writing.done() and not writes(parts)
        locks.release(lock)
        await writing
        assert len(writes(parts)) == 1

    run(work)


def test_a_hole_gets_adjacent_clusters_and_what_surrounds_is_zeroes() -> None:
    async def work() -> None:
        parts = await opened(disk())
        end = len(parts.file.data)
        await parts.writer.write(10 * SIZE + 7, memoryview(b"w" * (3 * SIZE)))
        # Fresh clusters: what surrounds the data need not be written.
        assert writes(parts) == [(end + 7, 3 * SIZE)]
        expected = (bytes(7) + b"w" * 3 * SIZE).ljust(4 * SIZE, b"\0")
        assert await parts.read(10 * SIZE, 4 * SIZE) == expected
        await parts.metadata.flush()
        assert parts.stored_entry(13 * SIZE) == end + 3 * SIZE | COPIED

    run(work)


def test_a_used_cluster_is_filled_whole() -> None:
    async def work() -> None:
        parts = await opened(disk())
        await parts.writer.trim(0, SIZE)
        await parts.metadata.drain()  # its place is free, and holds who knows what
        await parts.writer.write(9 * SIZE + 100, memoryview(b"w"))
        assert await parts.read(9 * SIZE, SIZE) == (bytes(100) + b"w").ljust(SIZE, b"\0")
        assert writes(parts)[-1][1] == SIZE

    run(work)


def test_a_shared_cluster_is_copied() -> None:
    async def work() -> None:
        parts = await opened(disk(clusters={0: b"A" * SIZE, 1: b"B" * SIZE}))
        old = (await where(parts, 0)) & ~COPIED
        table = await parts.metadata.table(0)
        table.words[0] = old
        await parts.writer.write(1, memoryview(b"w"))
        assert await parts.read(0, SIZE) == b"Aw".ljust(SIZE, b"A")
        assert (await where(parts, 0)) & ~COPIED != old
        assert bytes(parts.file.data[old : old + SIZE]) == b"A" * SIZE
        await parts.metadata.drain()
        assert await parts.count(old) == 0

    run(work)


def test_a_place_set_aside_is_used_and_filled() -> None:
    async def work() -> None:
        parts = await opened(disk())
        await parts.writer.write_zeroes(0, SIZE, punch=False, fast=False)
        place = await where(parts, 0)
        assert place & ZERO and place & COPIED
        await parts.writer.write(5, memoryview(b"w"))
        assert (await where(parts, 0)) == place & ~ZERO
        assert await parts.read(0, SIZE) == (bytes(5) + b"w").ljust(SIZE, b"\0")

    run(work)


def test_a_write_in_flight_survives_one_that_allocates_beside_it() -> None:
    """Subclusters: an allocating write ends in one that has data, while that is written in place."""

    async def work() -> None:
        parts = await opened(extended(0))
        table = await parts.metadata.table(0)
        table.words[1] = 0b100  # of the first cluster's subclusters only the third is data
        gate = asyncio.Event()
        real = parts.file.pwrite

        async def pwrite(offset: int, data: bytes | bytearray | memoryview) -> None:
            if bytes(data) == b"late":
                await gate.wait()
            elif len(data) > 4:
                gate.set()
                await asyncio.sleep(0.01)
            await real(offset, data)

        parts.file.pwrite = pwrite  # type: ignore[method-assign]
        late = asyncio.create_task(parts.writer.write(3 * 512 - 4, memoryview(b"late")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await parts.writer.write(512, memoryview(b"w" * 600))
        await late
        assert await parts.read(512, 1024) == b"w" * 600 + b"A" * 420 + b"late"

    run(work)


def test_subclusters_that_are_not_touched_stay_as_they_are() -> None:
    async def work() -> None:
        parts = await opened(extended(0))
        await parts.writer.write(2 * BIG + 600, memoryview(b"w" * 1000))
        assert (await where(parts, 2 * BIG)) & COPIED
        table = await parts.clusters.slice(0)
        assert table.words[5] == 0b1110
        await parts.writer.write(2 * BIG + 2048, memoryview(b"w"))
        assert table.words[5] == 0b11110
        assert await parts.read(2 * BIG, 2100) == (bytes(600) + b"w" * 1000).ljust(2048, b"\0") + b"w".ljust(
            52, b"\0"
        )

    run(work)


@pytest.mark.parametrize("code", (errno.ENOSPC, errno.EIO, errno.EDQUOT))
def test_a_write_that_fails_leaves_no_trace_in_the_mapping(code: int) -> None:
    async def work() -> None:
        parts = await opened(disk())
        await parts.writer.write(9 * SIZE, memoryview(b"x" * SIZE))
        before = await where(parts, 10 * SIZE)
        block = parts.allocator._blocks[0]
        used = block.used.count()
        parts.file.before = refuse("pwrite", code)
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            await parts.writer.write(10 * SIZE + 5, memoryview(b"w" * 3 * SIZE))
        assert caught.value.errno == code
        assert await where(parts, 10 * SIZE) == before
        assert block.used.count() == used
        assert await parts.read(9 * SIZE, 3 * SIZE) == (b"x" * SIZE).ljust(3 * SIZE, b"\0")
        parts.file.before = None
        await parts.writer.write(10 * SIZE + 5, memoryview(b"w" * 3 * SIZE))

    run(work)


def test_a_cancelled_caller_leaves_when_its_buffer_is_no_longer_used() -> None:
    async def work() -> None:
        parts = await opened(disk())
        gate = asyncio.Event()
        real = parts.file.pwrite

        async def pwrite(offset: int, data: bytes | bytearray | memoryview) -> None:
            await gate.wait()
            await real(offset, data)

        parts.file.pwrite = pwrite  # type: ignore[method-assign]
        buffer = bytearray(b"w" * SIZE)
        task = asyncio.create_task(parts.writer.write(9 * SIZE, memoryview(buffer)))
        await asyncio.sleep(0.01)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await parts.read(9 * SIZE, SIZE) == b"w" * SIZE

    run(work)


def test_data_past_the_end_of_the_file_is_not_built_upon() -> None:
    async def work() -> None:
        parts = await opened(disk(clusters={0: b"A" * SIZE, 1: 1 << 30 | COPIED, 2: 1 << 31 | COPIED}))
        for length in (1, SIZE, 3 * SIZE):
            with pytest.raises(CorruptError, match="past the file's end"):
                await parts.writer.write(SIZE, memoryview(b"w" * length))
        assert len(parts.file.data) < 1 << 20

    run(work)


def test_a_run_that_leaves_the_file_is_not_written_in_place() -> None:
    async def work() -> None:
        built = disk(clusters={0: b"A" * SIZE})
        parts = await opened(built)
        table = await parts.metadata.table(0)
        last = (len(parts.file.data) // SIZE - 1) * SIZE
        table.words[0], table.words[1] = last | COPIED, (last + SIZE) | COPIED
        before = len(parts.file.data)
        assert not parts.writer.try_write(0, memoryview(b"w" * 2 * SIZE))
        with pytest.raises(CorruptError, match="past the file's end"):
            await parts.writer.write(0, memoryview(b"w" * 2 * SIZE))
        assert len(parts.file.data) == before

    run(work)


def test_full_tables_are_committed_before_they_fill_the_cache() -> None:
    async def work() -> None:
        parts = await opened(Built(size=1 << 24, cluster_bits=9), limit=8 * 512)
        for number in range(40):
            await parts.writer.write(number * 512 * 64, memoryview(b"w"))
            assert len(parts.metadata._tables) <= 5
        assert parts.file.count("sync") > 0
        for number in range(40):
            assert await parts.read(number * 512 * 64, 1) == b"w"

    run(work)


# -- zeroes and trim -----------------------------------------------------------------------------


def test_whole_clusters_become_zeroes_by_mapping_and_edges_are_written() -> None:
    async def work() -> None:
        parts = await opened(disk())
        host = (await where(parts, 0)) & ~COPIED
        parts.file.log.clear()
        await parts.writer.write_zeroes(SIZE - 10, SIZE + 20, punch=True, fast=False)
        assert writes(parts) == [(host + SIZE - 10, 10), (host + 2 * SIZE, 10)]
        assert await where(parts, SIZE) == ZERO
        expected = b"A" * (SIZE - 10) + bytes(SIZE + 20) + b"C" * (SIZE - 10)
        assert await parts.read(0, 3 * SIZE) == expected

    run(work)


def test_what_reads_as_zeroes_is_left_alone() -> None:
    async def work() -> None:
        parts = await opened(disk())
        await parts.writer.write_zeroes(20 * SIZE - 10, 20, punch=True, fast=False)
        await parts.writer.write_zeroes(REACH + 5, SIZE, punch=False, fast=True)
        await parts.writer.trim(20 * SIZE, 2 * SIZE)
        assert writes(parts) == [] and not parts.metadata.dirty

    run(work)


def test_without_holes_what_is_shared_gets_a_place_of_its_own() -> None:
    async def work() -> None:
        parts = await opened(disk())
        table = await parts.metadata.table(0)
        old = table.words[0] & ~COPIED
        table.words[0] = old
        await parts.writer.write_zeroes(0, SIZE, punch=False, fast=False)
        place = table.words[0]
        assert place & COPIED and place & ZERO and place & ~(COPIED | ZERO) != old
        assert await parts.read(0, SIZE) == bytes(SIZE)
        await parts.metadata.drain()
        assert await parts.count(old) == 0
        assert await parts.count(place & ~(COPIED | ZERO)) == 1

    run(work)


def test_a_place_that_cannot_be_set_aside_is_given_back() -> None:
    async def work() -> None:
        parts = await opened(disk())
        table = await parts.metadata.table(0)
        table.words[0] &= ~COPIED
        before = table.words[0]
        parts.file.before = refuse("zero")
        with pytest.raises(OSError, match="No space"):
            await parts.writer.write_zeroes(0, SIZE, punch=False, fast=False)
        assert table.words[0] == before
        assert await parts.count(len(parts.file.data)) == 0

    run(work)


@pytest.mark.parametrize(
    ("offset", "length", "fast"),
    [
        (0, SIZE, True),
        (SIZE // 2, SIZE, False),  # two halves, both as data
        (SIZE // 2, 2 * SIZE, True),  # more by mapping than as data
        (5, 10, False),
        (20 * SIZE + 5, 10, True),  # reads as zeroes already
    ],
)
def test_fast_zeroes_are_refused_where_all_would_be_data(offset: int, length: int, fast: bool) -> None:
    async def work() -> None:
        parts = await opened(disk())
        before = await parts.read(0, 9 * SIZE)
        if fast:
            await parts.writer.write_zeroes(offset, length, punch=True, fast=True)
            assert await parts.read(offset, length) == bytes(length)
            return
        with pytest.raises(ImageError) as caught:
            await parts.writer.write_zeroes(offset, length, punch=True, fast=True)
        assert caught.value.errno == errno.ENOTSUP
        assert writes(parts) == [] and await parts.read(0, 9 * SIZE) == before

    run(work)


def test_version_2_has_no_zero_clusters() -> None:
    async def work() -> None:
        parts = await opened(disk(version=2))
        with pytest.raises(ImageError) as caught:
            await parts.writer.write_zeroes(0, SIZE, punch=False, fast=True)
        assert caught.value.errno == errno.ENOTSUP
        await parts.writer.write_zeroes(0, SIZE, punch=False, fast=False)
        assert (await where(parts, 0)) & COPIED
        await parts.writer.write_zeroes(SIZE, SIZE, punch=True, fast=True)
        assert await where(parts, SIZE) == 0
        assert await parts.read(0, 2 * SIZE) == bytes(2 * SIZE)

    run(work)


def test_trim_takes_whole_clusters_and_the_disks_cut_end() -> None:
    async def work() -> None:
        size = 5 * SIZE + 512
        built = Built(size=size, cluster_bits=12, clusters={n: bytes((65 + n,)) * SIZE for n in range(6)})
        parts = await opened(built)
        await parts.writer.trim(1, SIZE)
        assert not parts.metadata.dirty
        await parts.writer.trim(1, 2 * SIZE)
        assert await parts.read(0, 3 * SIZE) == b"A" * SIZE + bytes(SIZE) + b"C" * SIZE
        await parts.writer.trim(5 * SIZE, 512)
        assert await parts.read(4 * SIZE, SIZE + 512) == b"E" * SIZE + bytes(512)

    run(work)


def test_trim_hides_a_backing_file_where_the_format_can() -> None:
    async def work() -> None:
        parts = await opened(disk(), has_backing=True)
        await parts.writer.trim(REACH, SIZE)
        assert await where(parts, REACH) == ZERO
        parts = await opened(disk(version=2), has_backing=True)
        await parts.writer.trim(0, 4 * SIZE)
        assert not parts.metadata.dirty and await parts.read(0, 1) == b"A"

    run(work)


def test_many_zeroes_let_others_have_their_turn() -> None:
    async def work() -> None:
        parts = await opened(Built(size=1 << 24, cluster_bits=9), has_backing=True)
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        real = parts.file.pwrite

        async def pwrite(offset: int, data: bytes | bytearray | memoryview) -> None:
            parts.file._put(offset, bytes(data))  # as the page cache does: at once

        parts.file.pwrite = pwrite  # type: ignore[method-assign]
        await parts.writer.write_zeroes(0, 1 << 22, punch=True, fast=False)
        parts.file.pwrite = real  # type: ignore[method-assign]
        task.cancel()
        assert turns >= 1 << 22 >> 15

    run(work)


# -- compressed clusters and data files, which QEMU makes ----------------------------------------


@pytest.mark.requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("options", ("cluster_size=64k", "cluster_size=64k,extended_l2=on"))
def test_compressed_clusters_that_share_a_host_cluster(tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk.qcow2"
    SYSTEM.img("create", "-q", "-f", "qcow2", "-o", options, path, "1M")
    SYSTEM.io(path, *(f"write -c -P {n + 1} {n * 65536} 65536" for n in range(8)))
    packed = path.stat().st_size

    async def work(image: Image) -> None:
        await image.write(65536 + 10, memoryview(b"w"))
        await image.write_zeroes(2 * 65536, 2 * 65536)
        await image.write_zeroes(4 * 65536 + 2048, 2048, no_hole=True)
        await image.trim(5 * 65536, 65536)
        await image.write_zeroes(6 * 65536, 65536, no_hole=True)
        await image.flush()
        assert await read(image, 65536, 65536) == (b"\2" * 10 + b"w").ljust(65536, b"\2")
        assert await read(image, 4 * 65536, 65536) == (b"\5" * 2048 + bytes(2048)).ljust(65536, b"\5")
        assert await read(image, 0, 65536) == b"\1" * 65536
        assert await read(image, 7 * 65536, 65536) == b"\x08" * 65536

    use(path, work, read_only=False)
    SYSTEM.img("check", "-q", path)
    assert packed < 8 * 65536


@pytest.mark.requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("raw", ("off", "on"))
def test_an_external_data_file(tmp_path: Path, raw: str) -> None:
    path, data_file = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    SYSTEM.img("create", "-q", "-f", "qcow2", "-o", f"data_file={data_file},data_file_raw={raw}", path, "1M")
    SYSTEM.io(path, "write -P 65 0 512k")

    async def work(image: Image) -> None:
        await image.write_zeroes(65536, 65536, no_hole=True)
        await image.write_zeroes(2 * 65536, 65536, fast=raw == "off")
        await image.trim(3 * 65536, 65536)
        await image.write(65536 + 5, memoryview(b"w"))
        await image.write(10 * 65536 + 5, memoryview(b"w"))

    use(path, work, read_only=False)
    disk = bytearray(b"A" * (1 << 19) + bytes(1 << 19))
    disk[65536 : 4 * 65536] = bytes(3 * 65536)
    disk[65536 + 5] = disk[10 * 65536 + 5] = ord("w")
    SYSTEM.img("check", "-q", path)
    SYSTEM.img("convert", "-O", "raw", path, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == disk
    if raw == "on":
        assert data_file.read_bytes() == disk


class _NoZeroes(JitterFile):
    """A host that can neither punch nor zero by itself."""

    async def zero(self, offset: int, length: int, *, punch: bool, fallback: bool = True) -> None:
        if not fallback:
            raise OSError(errno.ENOTSUP, "cannot")
        await self.inner.pwrite(offset, bytes(length))


@pytest.mark.requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("raw", ("off", "on"))
def test_fast_zeroes_where_the_data_files_host_cannot(tmp_path: Path, raw: str) -> None:
    path, data_file = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    SYSTEM.img("create", "-q", "-f", "qcow2", "-o", f"data_file={data_file},data_file_raw={raw}", path, "1M")
    SYSTEM.io(path, "write -P 65 0 512k")

    def open_file(name: str, writable: bool) -> HostFile:
        file = ThreadedFile.open(name, writable=writable)
        return _NoZeroes(file, random.Random(0)) if name.endswith(".data") else file

    async def run() -> None:
        image = await Image.open(str(path), OpenOptions(read_only=False), open_file)
        if raw == "on":
            with pytest.raises(OSError, match="cannot"):
                await image.write_zeroes(5, 3 * 65536, fast=True)
            assert await read(image, 0, 1 << 19) == b"A" * (1 << 19)  # its ends are as they were, too
        else:
            await image.write_zeroes(0, 65536, fast=True)
            assert await read(image, 0, 65536) == bytes(65536)
        await image.close()

    asyncio.run(run())
    SYSTEM.img("check", "-q", path)
