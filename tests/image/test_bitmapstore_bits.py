"""The bits of bitmaps: loaded on first need, once for all who ask; a failure costs one bitmap one answer."""

from __future__ import annotations

import asyncio
import errno
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from nbdbm.bitmaps.dirty import DirtyBitmap
from nbdbm.bitmaps.tracker import REMEDY
from nbdbm.errors import BitmapError
from nbdbm.image import bitmapstore
from nbdbm.image.bitmapstore import READ_SIZE
from tests.image.bitmapload import DISK, EIO, GOOD, MIB, dirty, load, names, run
from tests.support import qcow2build
from tests.support.memfile import MemoryFile, Operation
from tests.support.qcow2build import Bitmap, Image


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
@pytest.mark.parametrize("tail", [0, 1, 512, 100_000])
def test_bits_of_every_cluster_size(cluster_bits: int, tail: int) -> None:
    """Clusters smaller and larger than a segment, of zeroes, ones and mixed, against the bytes themselves."""
    size = (8 << 21) * 512 + tail if cluster_bits == 21 else 300 * MIB + tail
    count = -(-size // 512)
    rng = random.Random(cluster_bits)
    cluster = 1 << cluster_bits
    raw = bytearray(-(-count // 8))
    for at in range(0, len(raw), cluster):
        kind = rng.choice(["zero", "ones", "random", "sparse"])
        length = min(cluster, len(raw) - at)
        if kind == "ones":
            raw[at : at + length] = b"\xff" * length
        elif kind == "random":
            raw[at : at + length] = rng.randbytes(length)
        elif kind == "sparse":
            raw[at + rng.randrange(length)] = 1
    image = Image(
        size=size, cluster_bits=cluster_bits, bitmaps=[Bitmap(b"b0", bytes(raw), granularity_bits=9)]
    )

    async def main() -> None:
        store = await load(image)
        bits = await store.bits("b0")
        wanted = DirtyBitmap(size, 512)
        wanted.load(0, raw)
        assert dirty(bits) == dirty(wanted)
        assert bits.count() == (int.from_bytes(raw, "little") & ((1 << count) - 1)).bit_count()

    run(main())


def test_adjacent_clusters_are_read_together() -> None:
    async def main() -> None:
        size = 3 * READ_SIZE * 8 * 512 - 512
        image = Image(size=size, bitmaps=[Bitmap(b"b0", b"\xaa" * (3 * READ_SIZE), granularity_bits=9)])
        file = MemoryFile(image.build())
        store = await load(file)
        judged = len(file.log)
        await store.bits("b0")
        lengths = [operation.length for operation in file.log[judged:]]
        assert lengths == [8 * 48, READ_SIZE, READ_SIZE, READ_SIZE]
        await store.bits("b0")
        assert len(file.log) == judged + 4

    run(main())


def test_bits_are_not_read_at_load() -> None:
    async def main() -> None:
        file = MemoryFile(Image(size=DISK, bitmaps=[GOOD, Bitmap(b"b1", b"\1")]).build())
        store = await load(file)
        # The directory and two tables of one entry.
        assert [operation.length for operation in file.log] == [64, 8, 8]
        assert all(b.bits is None for b in store.tracker)

    run(main())


def test_concurrent_callers_share_one_load() -> None:
    async def main() -> None:
        file = MemoryFile(Image(size=DISK, bitmaps=[GOOD]).build())
        store = await load(file)
        before = file.count("pread")
        found = await asyncio.gather(*(store.bits("good") for _ in range(10)))
        assert all(bits is found[0] for bits in found)
        assert file.count("pread") == before + 2

    run(main())


def test_one_caller_giving_up_leaves_the_others() -> None:
    async def main() -> None:
        store = await load(Image(size=DISK, bitmaps=[GOOD]))
        first = asyncio.create_task(store.bits("good"))
        second = asyncio.create_task(store.bits("good"))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).count() == 2
        with pytest.raises(asyncio.CancelledError):
            await first

    run(main())


def failing_reads(data: bytes, name: bytes, what: str) -> Callable[[Operation], None]:
    """An EIO for each read of a bitmap's table, or of its first cluster of bits."""
    table = struct.unpack_from(">Q", data, qcow2build.bitmap_entries(data)[name])[0]
    offset = table if what == "table" else struct.unpack_from(">Q", data, table)[0]

    def fail(operation: Operation) -> None:
        if operation.offset == offset:
            raise EIO

    return fail


@pytest.mark.parametrize("what", ["table", "bits"])
def test_read_error_is_that_bitmaps_and_not_for_good(what: str) -> None:
    async def main() -> None:
        data = Image(size=DISK, bitmaps=[GOOD, Bitmap(b"b1", b"\7")]).build()
        file = MemoryFile(data)
        store = await load(file)
        file.before = failing_reads(data, b"b1", what)
        results = await asyncio.gather(*(store.bits("b1") for _ in range(3)), return_exceptions=True)
        for error in results:
            assert isinstance(error, BitmapError)
            assert str(error) == "bitmap 'b1': reading it failed: [Errno 5] Input/output error"
            assert error.errno == errno.EIO
        assert (await store.bits("good")).count() == 2
        file.before = None
        assert (await store.bits("b1")).count() == 3

    run(main())


def test_failure_that_nobody_waits_for() -> None:
    """No warning about an exception never retrieved (warnings are errors here)."""

    async def main() -> None:
        data = Image(size=DISK, bitmaps=[GOOD]).build()
        file = MemoryFile(data)
        store = await load(file)
        file.before = failing_reads(data, b"good", "bits")
        unhandled: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        caller = asyncio.create_task(store.bits("good"))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        for _ in range(10):
            await asyncio.sleep(0)
        assert unhandled == []

    run(main())


def test_close_ends_loads() -> None:
    async def main() -> None:
        file = MemoryFile(Image(size=DISK, bitmaps=[GOOD]).build())
        store = await load(file)
        caller = asyncio.create_task(store.bits("good"))
        await asyncio.sleep(0)
        await store.close()
        file.close()
        with pytest.raises(BitmapError, match="the image is being closed"):
            await caller
        await store.close()

    run(main())


def test_table_broken_since_it_was_judged() -> None:
    async def main() -> None:
        data = Image(size=DISK, bitmaps=[GOOD]).build()
        file = MemoryFile(data)
        store = await load(file)
        table = struct.unpack_from(">Q", data, qcow2build.bitmap_entries(data)[b"good"])[0]
        struct.pack_into(">Q", file.data, table, 2)
        with pytest.raises(BitmapError, match="entry 0 of its table is 0x2"):
            await store.bits("good")
        assert names(store) == {"good": "refused"}
        with pytest.raises(BitmapError, match=f"reserved bits are set; {REMEDY}"):
            await store.bits("good")

    run(main())


def test_least_recently_used_bits_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        # One segment of 128 bytes of bits each.
        image = Image(size=DISK, bitmaps=[Bitmap(b"b%d" % i, b"\1") for i in range(4)])
        store = await load(image)
        cost = (await store.bits("b0")).memory()
        assert cost > 128
        monkeypatch.setattr(bitmapstore, "LOADED_LIMIT", 2 * cost)
        kept = await store.bits("b1")
        await store.bits("b0")
        await store.bits("b2")
        assert [b.name for b in store.tracker if b.bits] == ["b0", "b2"]
        # Who held the dropped bits goes on with them; asked again, they are loaded again.
        assert kept.count() == 1
        again = await store.bits("b1")
        assert again is not kept
        assert dirty(again) == dirty(kept)
        assert [b.name for b in store.tracker if b.bits] == ["b1", "b2"]
        # The last one stays even if it is larger than the limit.
        monkeypatch.setattr(bitmapstore, "LOADED_LIMIT", 1)
        await store.bits("b3")
        assert [b.name for b in store.tracker if b.bits] == ["b3"]

    run(main())


def test_bits_of_a_writable_image_are_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(bitmapstore, "LOADED_LIMIT", 1)
        store = await load(Image(size=DISK, bitmaps=[GOOD, Bitmap(b"b1", b"\1")]), writable=True)
        await store.bits("good")
        await store.bits("b1")
        assert all(b.bits is not None for b in store.tracker)

    run(main())
