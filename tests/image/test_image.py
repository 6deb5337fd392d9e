import asyncio
import os
import resource
import struct
from pathlib import Path

import pytest

from nbdbm.errors import BitmapError, CorruptError, ImageError, UnsupportedError
from nbdbm.image.image import Image, OpenOptions
from nbdbm.qcow2.constants import COPIED, IncompatFeature
from tests.support import engine, qcow2build
from tests.support.qcow2build import Bitmap

CLUSTER = 65536


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    bitmaps = [Bitmap(b"first", b"\x05"), Bitmap(b"torn", flags=1)]
    image = qcow2build.Image(size=4 * CLUSTER + 7, clusters={1: b"x" * CLUSTER}, bitmaps=bitmaps)
    path.write_bytes(image.build())
    return path


def open_error(path: Path, **options: object) -> ImageError:
    with pytest.raises(ImageError) as caught:
        asyncio.run(Image.open(str(path), OpenOptions(**options)))  # type: ignore[arg-type]
    return caught.value


def test_what_it_tells(path: Path) -> None:
    async def look(image: Image) -> None:
        assert (image.path, image.size, image.format) == (str(path), 4 * CLUSTER + 7, "qcow2")
        assert image.read_only
        assert image.cluster_size == CLUSTER
        assert image.header is not None and image.header.size == image.size
        assert image.snapshots == []
        (layer,) = image.chain
        assert layer.path == str(path) and layer.data_file is None
        assert layer.allocated == path.stat().st_blocks * 512
        await image.flush()

    engine.use(path, look)


def test_bitmaps(path: Path) -> None:
    async def look(image: Image) -> None:
        assert [bitmap.name for bitmap in image.tracker.usable()] == ["first"]
        assert [bitmap.name for bitmap in image.tracker.refused()] == ["torn"]
        bits = await image.bits("first")
        assert list(bits.runs(0, image.size)) == [
            (CLUSTER, True),
            (CLUSTER, False),
            (CLUSTER, True),
            (CLUSTER + 7, False),
        ]
        with pytest.raises(BitmapError):
            await image.bits("torn")

    engine.use(path, look)


def test_raw_images_have_no_bitmaps(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"r" * 1000)

    async def look(image: Image) -> None:
        assert (image.format, image.size, image.header) == ("raw", 1000, None)
        assert image.cluster_size == 65536
        assert not list(image.tracker.usable())
        with pytest.raises(BitmapError, match="no bitmaps"):
            await image.bits("any")

    engine.use(tmp_path / "raw", look, format="raw")


def test_an_empty_image(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(qcow2build.Image(size=0).build())

    async def look(image: Image) -> None:
        assert image.size == 0
        assert await image.read_sparse(memoryview(bytearray()), 0) == []

    engine.use(tmp_path / "disk", look)


def test_reading_changes_no_byte(path: Path) -> None:
    os.utime(path, ns=(10**18, 10**18))
    content, before = path.read_bytes(), path.stat()

    async def look(image: Image) -> None:
        await engine.read_all(image)
        await engine.walk(image)
        await image.bits("first")
        await image.flush()

    engine.use(path, look)
    after = path.stat()
    assert path.read_bytes() == content
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


def test_close_is_idempotent_and_leaves_nothing_open(path: Path) -> None:
    async def run() -> None:
        before = len(os.listdir("/proc/self/fd"))
        image = await Image.open(str(path), OpenOptions())
        await engine.read_all(image)
        await image.close()
        await image.close()
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(run())


@pytest.mark.parametrize(
    "feature, word", [(IncompatFeature.DIRTY, "dirty"), (IncompatFeature.CORRUPT, "corrupt")]
)
def test_notices(path: Path, feature: IncompatFeature, word: str) -> None:
    qcow2build.patch(path, incompatible_features=int(feature))

    async def look(image: Image) -> None:
        assert any(word in notice for notice in image.notices)
        assert (await engine.read(image, CLUSTER, 3)) == b"xxx"

    engine.use(path, look)


def test_a_disk_of_64_tib_takes_little_memory(tmp_path: Path) -> None:
    """Every table is there and looked at, none for long."""
    path = tmp_path / "huge"
    image = qcow2build.Image(size=1 << 46)
    data = bytearray(image.build())
    l1 = qcow2build.get_field(data, "l1_table_offset")
    # All of the 128 Ki entries share one L2 table: 8 GiB if each were kept.
    table = len(data)
    data += struct.pack(">Q", COPIED | table + CLUSTER).ljust(CLUSTER, b"\0") + b"y" * CLUSTER
    data[l1 : l1 + (1 << 20)] = struct.pack(">Q", table) * (1 << 17)
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    async def look(image: Image) -> None:
        for at in range(0, image.size, image.size // 1000 >> 29 << 29):
            assert await engine.read(image, at, 2) == b"yy"
        assert image._cache.weight <= image._cache.limit

    engine.use(path, look)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 80 * 1024  # KiB: the L1 table, the cache, and slack


# -- snapshots


def with_snapshot(path: Path, *, size: int | None = None, l1_offset: int | None = None) -> Path:
    """An image whose cluster 0 was "old" in snapshot 1, "before", and is "new" now."""
    data = bytearray(qcow2build.Image(size=2 * CLUSTER, clusters={0: b"new" * 20000}).build())
    at = len(data)
    extra = struct.pack(">QQ", 0, size) if size is not None else b""
    entry = struct.pack(">QIHHIIQII", at if l1_offset is None else l1_offset, 1, 1, 6, 0, 0, 0, 0, len(extra))
    data += struct.pack(">Q", at + CLUSTER).ljust(CLUSTER, b"\0")
    data += struct.pack(">Q", at + 2 * CLUSTER).ljust(CLUSTER, b"\0")
    data += (b"old" * 20000).ljust(CLUSTER, b"\0")
    data += (entry + extra + b"1before").ljust(CLUSTER, b"\0")
    path.write_bytes(data)
    qcow2build.patch(path, nb_snapshots=1, snapshots_offset=at + 3 * CLUSTER)
    return path


async def start(image: Image) -> tuple[int, bytes]:
    return image.size, await engine.read(image, 0, 3)


def test_snapshots(tmp_path: Path) -> None:
    path = with_snapshot(tmp_path / "disk")
    assert engine.use(path, start) == (2 * CLUSTER, b"new")
    for wanted in ("1", "before"):
        assert engine.use(path, start, snapshot=wanted) == (2 * CLUSTER, b"old")

    async def names(image: Image) -> list[str]:
        return [snapshot.name for snapshot in image.snapshots]

    assert engine.use(path, names) == ["before"]


def test_a_snapshot_has_its_own_size(tmp_path: Path) -> None:
    path = with_snapshot(tmp_path / "disk", size=CLUSTER + 512)
    assert engine.use(path, start, snapshot="before") == (CLUSTER + 512, b"old")
    path = with_snapshot(tmp_path / "disk", size=9 * CLUSTER)
    assert engine.use(path, start, snapshot="before") == (9 * CLUSTER, b"old")


def test_snapshot_refusals(tmp_path: Path) -> None:
    path = with_snapshot(tmp_path / "disk")
    assert "no snapshot 'x' (there are: 'before')" in str(open_error(path, snapshot="x"))
    for offset in (77, 1 << 50):
        path = with_snapshot(tmp_path / "disk", l1_offset=offset)
        error = open_error(path, snapshot="before")
        assert isinstance(error, CorruptError) and "l1_table_offset" in str(error)
        # The disk itself is served none the less.
        assert engine.use(path, start) == (2 * CLUSTER, b"new")
    path = with_snapshot(tmp_path / "disk", size=1 << 62)
    assert "l1_size" in str(open_error(path, snapshot="before"))


# -- refusals keep their kind


def test_refusals(path: Path) -> None:
    qcow2build.patch(path, crypt_method=2)
    assert isinstance(open_error(path), UnsupportedError)
    qcow2build.patch(path, crypt_method=0, l1_table_offset=CLUSTER + 1)
    error = open_error(path)
    assert isinstance(error, CorruptError)
    assert str(error).startswith(f"{path}: l1_table_offset is 0x10001")
