"""What opening for writing does to the header, and that the header follows what writing did."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from nbdbm.errors import ImageError, UnsupportedError
from nbdbm.image.bitmapedit import Remove, edit_bitmaps
from nbdbm.image.blockfile import ThreadedFile
from nbdbm.image.image import Image, OpenOptions
from nbdbm.image.writable import rewrite_header
from nbdbm.qcow2.bitmapdir import BitmapsExtension
from nbdbm.qcow2.header import Header
from tests.support.engine import read, use
from tests.support.qcow2build import AUTO, IN_USE, Bitmap, get_field, patch, patch_bitmap_flags
from tests.support.qcow2build import Image as Built
from tests.support.qemu import SYSTEM

MIB = 1024 * 1024


def test_the_corrupt_bit_refuses_writing_and_names_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(Built(incompatible=2).build())
    before = path.read_bytes()
    with pytest.raises(ImageError, match=r"corrupt bit is set.*nbdbm check --repair all"):
        asyncio.run(Image.open(str(path), OpenOptions(read_only=False)))
    assert path.read_bytes() == before


def test_unknown_autoclear_bits_are_cleared_and_unknown_extensions_stay(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    built = Built(autoclear=1 | 1 << 5, extensions=[(0x12345678, b"keep me")], bitmaps=[Bitmap(b"one")])
    path.write_bytes(built.build())

    async def notices(image: Image) -> list[str]:
        return list(image.notices)

    (notice,) = use(path, notices, read_only=False)
    assert "unknown autoclear features 0x20 have been cleared" in notice
    data = path.read_bytes()
    assert get_field(data, "autoclear_features") == 1
    header = Header.parse(data[:65536])
    assert any(e.type == 0x12345678 and e.data == b"keep me" for e in header.extensions)


@pytest.mark.requires("qemu-img")
def test_a_dirty_image_gets_its_refcounts_rebuilt(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(Built(clusters={0: b"A" * 65536, 3: b"B" * 65536}).build())
    data = path.read_bytes()
    table = get_field(data, "refcount_table_offset")
    block = int.from_bytes(data[table : table + 8], "big")
    with path.open("r+b") as file:  # as if nothing but the header were counted
        file.seek(block + 2)
        file.write(bytes(65534))
    patch(path, incompatible_features=1, compatible_features=1)

    async def work(image: Image) -> None:
        assert any("refcounts have been rebuilt" in notice for notice in image.notices)
        await image.write(5 * 65536, memoryview(b"C" * 65536))
        assert await read(image, 0, 65536) == b"A" * 65536

    use(path, work, read_only=False)
    SYSTEM.img("check", "-q", path)
    assert get_field(path.read_bytes(), "incompatible_features") == 0


BROKEN = {
    "a table outside of the file": Bitmap(b"bad", table_offset=1 << 50),
    "a table that is not aligned": Bitmap(b"bad", table_offset=0x10200),
    "a table far too long": Bitmap(b"bad", flags=IN_USE | AUTO, table_size=0xFFFFFFFF),
    "an entry with reserved bits": Bitmap(b"bad", flags=IN_USE | AUTO, table=[1 << 60]),
}


@pytest.mark.requires("qemu-img")
@pytest.mark.parametrize("bad", BROKEN.values(), ids=BROKEN)
def test_a_broken_bitmap_does_not_keep_a_dirty_image_from_being_written_to(
    bad: Bitmap, tmp_path: Path
) -> None:
    """The disk's refcounts can be made true; the good bitmap goes on, and the broken one stays in use."""
    path = tmp_path / "disk.qcow2"
    built = Built(clusters={0: b"A" * 65536}, bitmaps=[bad, Bitmap(b"good")], incompatible=1, compatible=1)
    path.write_bytes(built.build())

    async def work(image: Image) -> None:
        assert any("refcounts have been rebuilt" in notice for notice in image.notices)
        assert [b.name for b in image.tracker.usable()] == ["good"]
        await image.write(3 * 65536, memoryview(b"C" * 3 * 65536))

    use(path, work, read_only=False)

    async def judge(image: Image) -> None:
        assert await read(image, 0, 65536) == b"A" * 65536
        assert await read(image, 3 * 65536, 3 * 65536) == b"C" * 3 * 65536
        bits = await image.bits("good")
        assert list(bits.runs(0, image.size))[:2] == [(3 * 65536, False), (3 * 65536, True)]
        assert [b.state.value for b in image.tracker] == ["inconsistent", "read-only"]

    use(path, judge)
    assert get_field(path.read_bytes(), "incompatible_features") == 0
    # Without the broken one, QEMU has nothing to find fault with.
    asyncio.run(edit_bitmaps(str(path), [Remove("bad")]))
    SYSTEM.img("check", "-q", "-r", "leaks", path)
    SYSTEM.img("check", "-q", path)


def _growing(path: Path, *, bitmap: bool) -> None:
    """An image whose refcount table must move when 2 MiB have been written."""
    options = "cluster_size=512,refcount_bits=64"
    SYSTEM.img("create", "-q", "-f", "qcow2", "-o", options, path, 6 * MIB)
    if bitmap:
        SYSTEM.img("bitmap", "--add", path, "dirty")


@pytest.mark.requires("qemu-img")
def test_storing_bitmaps_leaves_a_moved_refcount_table_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    _growing(path, bitmap=True)
    before = get_field(path.read_bytes(), "refcount_table_offset")
    content = os.urandom(5 * MIB)

    async def work(image: Image) -> None:
        await image.write(0, memoryview(content))

    use(path, work, read_only=False)
    assert get_field(path.read_bytes(), "refcount_table_offset") != before
    SYSTEM.img("check", "-q", path)


@pytest.mark.requires("qemu-img")
@pytest.mark.parametrize("bitmap", (False, True))
def test_reopening_finds_a_moved_refcount_table(tmp_path: Path, bitmap: bool) -> None:
    path = tmp_path / "disk.qcow2"
    _growing(path, bitmap=bitmap)
    before = get_field(path.read_bytes(), "refcount_table_offset")

    async def work(image: Image) -> None:
        for start in (0, 3 * MIB):
            await image.write(start, memoryview(os.urandom(3 * MIB)))
            await image.reopen(read_only=True)
            SYSTEM.img("check", "-q", path)
            assert get_field(path.read_bytes(), "refcount_table_offset") != before
            await image.reopen(read_only=False)

    use(path, work, read_only=False)
    SYSTEM.img("check", "-q", path)


def test_a_header_without_room_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(Built(cluster_bits=9, size=1 << 15, extensions=[(0x12345678, bytes(380))]).build())
    before = path.read_bytes()

    async def run() -> None:
        file = ThreadedFile.open(str(path), writable=True)
        try:
            header = Header.parse(before[:512])
            extension = BitmapsExtension(1, 32, 512).to_extension()
            with pytest.raises(UnsupportedError, match="the header cannot be changed"):
                await rewrite_header(file, header.with_extension(extension))
        finally:
            file.close()

    asyncio.run(run())
    assert path.read_bytes() == before


def test_nothing_is_written_when_nothing_needs_to_be(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(Built(bitmaps=[Bitmap(b"one")]).build())
    patch_bitmap_flags(path, "one", set=1)
    before = path.read_bytes()

    async def nothing(image: Image) -> None:
        assert not image.read_only

    use(path, nothing, read_only=False)
    assert path.read_bytes() == before
