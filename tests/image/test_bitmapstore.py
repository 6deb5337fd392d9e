"""The bitmaps of an image, found and judged: which can be used, and why the others cannot."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from nbdbm.bitmaps.dirty import DirtyBitmap
from nbdbm.bitmaps.tracker import INCONSISTENT_REASON, REMEDY, BitmapState
from nbdbm.errors import BitmapError
from nbdbm.image import bitmapstore
from nbdbm.image.bitmapstore import JUDGED_TABLES
from tests.image.bitmapload import DISK, EIO, GOOD, MIB, dirty, load, names, run
from tests.support import qcow2build, qemu
from tests.support.marks import requires
from tests.support.memfile import MemoryFile, Operation
from tests.support.qcow2build import AUTO, EXTRA_COMPATIBLE, IN_USE, Bitmap, Image

# -- no bitmaps ------------------------------------------------------------------------------


def test_image_without_bitmaps() -> None:
    store = run(load(Image()))
    assert (len(store.tracker), store.notices, store.extension) == (0, [], None)


@pytest.mark.parametrize(
    ("image", "notice"),
    [
        (Image(autoclear=1), "autoclear feature bit 0 (bitmaps) is set, but there is no bitmaps extension"),
        (Image(bitmaps=[Bitmap(b"b0")], autoclear=0), "the bitmaps extension is stale"),
        (Image(version=2, bitmaps=[Bitmap(b"b0")]), "the bitmaps extension is stale"),
        (Image(autoclear=1, extensions=[(0x23852875, bytes(23))]), "length of the bitmaps extension is 0x17"),
        (Image(autoclear=1, extensions=[(0x23852875, bytes(24))]), "nb_bitmaps is 0x0"),
        (Image(bitmaps=[Bitmap(b"b0")], extensions=[(0x23852875, bytes(24))]), "appears more than once"),
        (
            Image(bitmaps=[Bitmap(b"b0")], nb_bitmaps=2),
            "nb_bitmaps is 0x2: the bitmap directory has 1",
        ),
        (
            Image(bitmaps=[Bitmap(b"b0"), Bitmap(b"b1")], nb_bitmaps=1),
            "32 bytes are left after all 1",
        ),
        (Image(bitmaps=[Bitmap(b"b0")], directory_size=31), "the entry at byte 0 is 32 bytes long"),
        (Image(bitmaps=[Bitmap(b"b0")], directory_size=40), "8 bytes are left after all 1"),
        (Image(bitmaps=[Bitmap(b"b0")], directory_size=0), "bitmap_directory_size is 0x0"),
        (Image(bitmaps=[Bitmap(b"b0")], directory_size=1 << 27), "bitmap_directory_size is 0x8000000"),
        (Image(bitmaps=[Bitmap(b"b0")], directory_size=1 << 25), "reach past the file's end"),
    ],
)
def test_no_bitmap_can_be_used(image: Image, notice: str) -> None:
    store = run(load(image))
    assert len(store.tracker) == 0
    assert store.extension is None
    assert len(store.notices) == 1
    assert notice in store.notices[0]


def test_directory_that_cannot_be_read() -> None:
    async def main() -> None:
        file = MemoryFile(Image(bitmaps=[Bitmap(b"b0")]).build())

        def fail(operation: Operation) -> None:
            raise EIO

        file.before = fail
        store = await load(file)
        assert len(store.tracker) == 0
        assert store.notices == [
            "no bitmap can be used: reading the bitmap directory failed: [Errno 5] Input/output error"
        ]

    run(main())


def test_huge_directory_is_refused_before_it_is_read() -> None:
    async def main() -> None:
        file = MemoryFile(Image(bitmaps=[Bitmap(b"b0")], directory_size=1 << 60).build())
        await load(file)
        assert file.log == []

    run(main())


# -- judging ---------------------------------------------------------------------------------


@pytest.mark.parametrize("writable", [False, True])
def test_good_bitmaps(writable: bool) -> None:
    async def main() -> None:
        image = Image(
            size=DISK,
            bitmaps=[
                GOOD,
                Bitmap("Grün".encode(), granularity_bits=9, flags=0),
                Bitmap(b"extra", flags=AUTO | EXTRA_COMPATIBLE, extra_data=b"anything"),
            ],
        )
        store = await load(image, writable=writable)
        assert store.notices == []
        state = BitmapState.VALID if writable else BitmapState.READ_ONLY
        assert [(b.name, b.granularity, b.enabled, b.state, b.bits) for b in store.tracker] == [
            ("good", 65536, True, state, None),
            ("Grün", 512, False, state, None),
            ("extra", 65536, True, state, None),
        ]
        assert dirty(await store.bits("good")) == [
            (65536, True),
            (65536, False),
            (65536, True),
            (DISK - 3 * 65536, False),
        ]
        assert not (await store.bits("Grün")).any()

    run(main())


BAD = {
    "type": (Bitmap(b"bad", type=2), "its type is 2"),
    "granularity_low": (Bitmap(b"bad", granularity_bits=8), "granularity_bits is 8"),
    "granularity_high": (Bitmap(b"bad", granularity_bits=32), "granularity_bits is 32"),
    "reserved_flag": (Bitmap(b"bad", flags=AUTO | 8), "reserved flags are set (0x8)"),
    "extra_data": (Bitmap(b"bad", extra_data=b"x" * 9), "9 bytes of extra data"),
    "table_offset_zero": (Bitmap(b"bad", table_offset=0), "bitmap_table_offset is 0x0"),
    "table_offset_unaligned": (Bitmap(b"bad", table_offset=65544), "bitmap_table_offset is 0x10008"),
    "table_offset_outside": (Bitmap(b"bad", table_offset=1 << 40), "the table reaches past the file's end"),
    "table_size_zero": (Bitmap(b"bad", table_size=0), "bitmap_table_size is 0"),
    "table_size_small": (Bitmap(b"bad", granularity_bits=9, table_size=1 << 30), "bitmap_table_size is"),
    "table_size_large": (Bitmap(b"bad", table_size=2), "needs 1 entries"),
    "entry_reserved": (Bitmap(b"bad", table=[0x100]), "entry 0 of its table is 0x100: reserved bits"),
    "entry_high_reserved": (Bitmap(b"bad", table=[1 << 60]), "reserved bits"),
    "entry_offset_and_ones": (Bitmap(b"bad", table=[0x20001]), "reserved bits"),
    "entry_unaligned": (Bitmap(b"bad", table=[0x20200]), "not a multiple of the cluster size"),
    "entry_outside": (Bitmap(b"bad", table=[1 << 50]), "past the file's end"),
    "name_empty": (Bitmap(b""), "its name is 0 bytes long"),
    "name_long": (Bitmap(b"n" * 1024), "its name is 1024 bytes long"),
    "name_not_utf8": (Bitmap(b"\xff\xfe"), "its name is not UTF-8"),
    "name_nul": (Bitmap(b"a\0b"), "NUL"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_bitmap_leaves_its_neighbours_alone(name: str) -> None:
    bad, reason = BAD[name]

    async def main() -> None:
        store = await load(Image(size=DISK, bitmaps=[Bitmap(b"before", b"\1"), bad, Bitmap(b"after", b"\2")]))
        assert store.notices == []
        assert [b.name for b in store.tracker.usable()] == ["before", "after"]
        (refused,) = store.tracker.refused()
        assert refused.state is BitmapState.REFUSED
        assert reason in (refused.refusal or "")
        with pytest.raises(BitmapError) as raised:
            await store.bits(refused.name)
        assert str(raised.value).endswith(f"{refused.refusal}; {REMEDY}")
        assert dirty(await store.bits("before"))[0] == (65536, True)
        assert dirty(await store.bits("after"))[:2] == [(65536, False), (65536, True)]

    run(main())


def test_all_of_a_duplicate_name_are_refused() -> None:
    async def main() -> None:
        twins = [Bitmap(b"twin", b"\1"), Bitmap(b"twin", b"\2", flags=0), Bitmap(b"twin", flags=IN_USE)]
        store = await load(Image(size=DISK, bitmaps=[GOOD, *twins]))
        assert [b.name for b in store.tracker.usable()] == ["good"]
        assert {b.refusal for b in store.tracker.refused()} == {"there is more than one bitmap of this name"}
        assert [b.state.value for b in store.tracker.refused()] == ["refused", "refused", "inconsistent"]
        with pytest.raises(BitmapError, match="more than one"):
            await store.bits("twin")

    run(main())


def test_a_name_that_only_reads_the_same_is_no_duplicate() -> None:
    async def main() -> None:
        store = await load(Image(size=DISK, bitmaps=[Bitmap(b"a\xff"), Bitmap(b"a\\xff", b"\1")]))
        assert [b.state.value for b in store.tracker] == ["refused", "read-only"]
        assert (await store.bits("a\\xff")).count() == 1

    run(main())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"table_offset": 0, "table_size": 0},
        {"table_offset": 12345, "table_size": 0xFFFFFFFF},
        {"table": [0xFFFFFFFFFFFFFFFF]},
    ],
    ids=["sound", "no_table", "absurd_table", "absurd_entries"],
)
def test_in_use_is_inconsistent_and_never_looked_at(fields: dict[str, Any]) -> None:
    async def main() -> None:
        bitmaps = [Bitmap(b"crashed", b"\xff", flags=IN_USE | AUTO, **fields), GOOD]
        file = MemoryFile(Image(size=DISK, bitmaps=bitmaps).build())
        store = await load(file)
        assert names(store) == {"crashed": "inconsistent", "good": "read-only"}
        crashed = store.tracker.get("crashed")
        assert crashed is not None
        assert crashed.refusal == INCONSISTENT_REASON
        assert [(each.name, each.enabled) for each in store.figures()] == [("crashed", False), ("good", True)]
        with pytest.raises(BitmapError, match="it is inconsistent"):
            await store.bits("crashed")
        assert (await store.bits("good")).count() == 2
        # The directory, then table (twice) and bits of the good one.
        assert file.count("pread") == 4
        assert file.count("pwrite") == 0

    run(main())


def test_missing() -> None:
    async def main() -> None:
        store = await load(Image(size=DISK, bitmaps=[GOOD]))
        with pytest.raises(BitmapError, match="bitmap 'none': there is no such bitmap in the image"):
            await store.bits("none")

    run(main())


def test_entries_are_kept_verbatim_with_their_places() -> None:
    bitmaps = [
        GOOD,
        Bitmap(b"odd", flags=IN_USE | 64, type=9, extra_data=b"12345", table=[3]),
        BAD["name_long"][0],
    ]
    data = Image(size=DISK, bitmaps=bitmaps).build()
    store = run(load(data))
    assert [s.offset for s in store.stored] == list(qcow2build.bitmap_entries(data).values())
    for stored in store.stored:
        packed = stored.entry.pack()
        assert data[stored.offset : stored.offset + len(packed)] == packed


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_table_that_cannot_be_read(failing: int) -> None:
    """At load the bitmap is refused with that reason, its neighbours are not."""

    async def main() -> None:
        data = Image(size=DISK, bitmaps=[Bitmap(b"b%d" % i) for i in range(3)]).build()
        offset = struct.unpack_from(">Q", data, qcow2build.bitmap_entries(data)[b"b%d" % failing])[0]
        file = MemoryFile(data)

        def fail(operation: Operation) -> None:
            if operation.offset == offset:
                raise EIO

        file.before = fail
        store = await load(file)
        (refused,) = store.tracker.refused()
        assert refused.name == f"b{failing}"
        assert refused.refusal == "reading its table failed: [Errno 5] Input/output error"

    run(main())


def test_truncated_file() -> None:
    """Bits that the file has lost would read as clean: the bitmap is refused."""
    data = Image(size=DISK, cluster_bits=9, bitmaps=[Bitmap(b"b0", b"\xff" * 50)]).build()
    at = qcow2build.bitmap_entries(data)[b"b0"]
    table = struct.unpack_from(">Q", data, at)[0]
    cluster = struct.unpack_from(">Q", data, table)[0]
    moved = bytearray(data)
    struct.pack_into(">Q", moved, table, len(data) // 512 * 512)

    async def main() -> None:
        whole = await load(bytes(moved) + data[cluster : cluster + 128])
        assert (await whole.bits("b0")).count() == 400
        cut = await load(bytes(moved) + data[cluster : cluster + 127])
        assert "past the file's end" in (cut.tracker.refused()[0].refusal or "")

    run(main())


# -- many and large --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [65535, 8192])
def test_many_bitmaps(count: int) -> None:
    """In a second or so, a bounded number of reads, and memory in proportion to the directory."""
    shared = 2 << 16  # the table that all but the first share
    bitmaps = [Bitmap(b"b0", b"\1", granularity_bits=31)]
    bitmaps += [
        Bitmap(b"bitmap-%d" % i, table=[], table_size=1, table_offset=shared) for i in range(1, count)
    ]
    data = bytearray(Image(size=DISK, bitmaps=bitmaps).build())
    struct.pack_into(">Q", data, shared, 1)

    async def main() -> None:
        file = MemoryFile(bytes(data))
        if count < 65535:
            tracemalloc.start()  # too slow for more
        began = time.process_time()
        try:
            store = await load(file)
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert time.process_time() - began < 5
        assert held < count * 900
        assert len(store.tracker.usable()) == count
        assert file.count("pread") == 1 + JUDGED_TABLES
        assert (await store.bits(f"bitmap-{count - 1}")).count() == 1024

    run(main())


def test_judging_many_large_tables_is_bounded() -> None:
    """The same 8 MiB table a thousand times: a small file must not keep the server from starting."""

    async def main() -> None:
        # 512 MiB of bits in clusters of 512 bytes: 2^20 entries.
        table = Image(size=(1 << 41) // 16, cluster_bits=9)
        entries = 1 << 16
        bitmaps = [Bitmap(b"b0", table=[1] * entries, granularity_bits=9)]
        data = Image(size=table.size, cluster_bits=9, bitmaps=bitmaps).build()
        offset = struct.unpack_from(">Q", data, qcow2build.bitmap_entries(data)[b"b0"])[0]
        bitmaps += [
            Bitmap(b"b%d" % i, table=[], table_size=entries, table_offset=offset, granularity_bits=9)
            for i in range(1, 200)
        ]
        file = MemoryFile(Image(size=table.size, cluster_bits=9, bitmaps=bitmaps).build())
        store = await load(file)
        assert len(store.tracker.usable()) == 200
        assert sum(o.length for o in file.log if o.length == 8 * entries) == bitmapstore.JUDGED_TABLE_BYTES
        assert (await store.bits("b199")).count() == table.size // 512

    run(main())


# -- files written by QEMU -----------------------------------------------------------------------


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    return tmp_path / "disk.qcow2"


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize(
    ("options", "granularity"),
    [("cluster_size=64k", 65536), ("cluster_size=512", 512), ("cluster_size=2M", 4096)],
)
def test_written_by_qemu(image_path: Path, options: str, granularity: int) -> None:
    img = qemu.SYSTEM.img
    img("create", "-q", "-f", "qcow2", "-o", options, image_path, "40M")
    img("bitmap", "--add", "-g", granularity, image_path, "recording")
    img("bitmap", "--add", "--disable", image_path, "disabled")
    writes = [(0, 1), (65535, 2), (20 * MIB + 100, 3 * MIB), (40 * MIB - 1, 1)]
    qemu.SYSTEM.io(image_path, *(f"write {offset} {length}" for offset, length in writes))
    qcow2build.patch_bitmap_flags(image_path, "disabled", set=IN_USE)
    img("bitmap", "--add", image_path, "late")

    async def main() -> None:
        store = await load(image_path.read_bytes())
        assert names(store) == {"recording": "read-only", "disabled": "inconsistent", "late": "read-only"}
        wanted = DirtyBitmap(40 * MIB, granularity)
        for offset, length in writes:
            wanted.set(offset, length)
        assert dirty(await store.bits("recording")) == dirty(wanted)
        assert not (await store.bits("late")).any()

    run(main())


@requires("qemu-img")
@pytest.mark.parametrize("cluster_bits", [9, 16, 21])
@pytest.mark.parametrize("refcount_order", range(7))
def test_builder_makes_clean_images(image_path: Path, cluster_bits: int, refcount_order: int) -> None:
    """The builder is the oracle of many tests: here is its own."""
    image = Image(
        size=5 * MIB + 512,
        cluster_bits=cluster_bits,
        refcount_order=refcount_order,
        clusters={0: b"x" * (1 << cluster_bits), 2: b"y" * (1 << cluster_bits)},
        bitmaps=[GOOD, Bitmap(b"fine", b"\xff" * 1200 + b"\1", granularity_bits=9, flags=0)],
    )
    image_path.write_bytes(image.build())
    qemu.SYSTEM.img("check", "-q", image_path)
    info = qemu.SYSTEM.img_json("info", image_path)["format-specific"]["data"]
    assert [(b["name"], b["flags"], b["granularity"]) for b in info["bitmaps"]] == [
        ("good", ["auto"], 65536),
        ("fine", [], 512),
    ]
