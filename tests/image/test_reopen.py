"""Between reading and writing: what becomes of the bitmaps, and who is refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

from nbdbm.bitmaps.tracker import BitmapState
from nbdbm.errors import BitmapError, ImageError, LockedError
from nbdbm.image.image import Image, OpenOptions
from tests.support.marks import requires
from tests.support.qemu import SYSTEM

pytestmark = requires("qemu-img")

SIZE = 4 * 1024 * 1024
IN_USE = 1


def entry_of(path: Path, name: str) -> int:
    """Where the directory entry of this bitmap begins: names are 24 bytes behind that."""
    content = path.read_bytes()
    extension = content.index(b"\x23\x85\x28\x75")
    directory = int.from_bytes(content[extension + 24 : extension + 32], "big")
    return content.index(name.encode(), directory) - 24


def set_in_use(path: Path, name: str) -> None:
    at = entry_of(path, name) + 15
    with path.open("r+b") as file:
        file.seek(at)
        flags = file.read(1)[0]
        file.seek(at)
        file.write(bytes((flags | IN_USE,)))


def flags_of(path: Path) -> dict[str, list[str]]:
    info = json.loads(SYSTEM.img("info", "-U", "--output=json", str(path)))
    return {b["name"]: sorted(b["flags"]) for b in info["format-specific"]["data"]["bitmaps"]}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    SYSTEM.img("create", "-q", "-f", "qcow2", str(path), str(SIZE))
    for name in ("good-bitmap", "torn-bitmap"):
        SYSTEM.img("bitmap", "--add", str(path), name)
    SYSTEM.img("bitmap", "--add", "--disable", str(path), "idle-bitmap")
    set_in_use(path, "torn-bitmap")
    return path


def states(image: Image) -> dict[str, BitmapState]:
    return {bitmap.name: bitmap.state for bitmap in image.tracker}


def test_to_writing_and_back(disk: Path) -> None:
    async def run() -> None:
        before = hashlib.sha256(disk.read_bytes()).digest()
        image = await Image.open(str(disk), OpenOptions())
        assert states(image) == {
            "good-bitmap": BitmapState.READ_ONLY,
            "torn-bitmap": BitmapState.INCONSISTENT,
            "idle-bitmap": BitmapState.READ_ONLY,
        }
        with pytest.raises(ImageError, match="reading only"):
            await image.write(0, memoryview(b"x"))
        assert hashlib.sha256(disk.read_bytes()).digest() == before

        await image.reopen(read_only=False)
        assert states(image) == {
            "good-bitmap": BitmapState.IN_USE,
            "torn-bitmap": BitmapState.INCONSISTENT,
            "idle-bitmap": BitmapState.IN_USE,
        }
        assert flags_of(disk) == {
            "good-bitmap": ["auto", "in-use"],
            "torn-bitmap": ["auto", "in-use"],
            "idle-bitmap": ["in-use"],
        }
        await image.write(100_000, memoryview(b"x" * 10))
        with pytest.raises(LockedError):
            await Image.open(str(disk), OpenOptions(read_only=False))

        await image.reopen(read_only=True)
        assert flags_of(disk) == {
            "good-bitmap": ["auto"],
            "torn-bitmap": ["auto", "in-use"],
            "idle-bitmap": [],
        }
        assert states(image)["good-bitmap"] is BitmapState.READ_ONLY
        assert (await image.bits("good-bitmap")).dirty_bytes() == 65536
        assert (await image.bits("idle-bitmap")).dirty_bytes() == 0
        view = bytearray(10)
        await image.read_into(memoryview(view), 100_000)
        assert view == b"x" * 10
        other = await Image.open(str(disk), OpenOptions())  # readers share again
        await other.close()
        await image.reopen(read_only=False)
        await image.write(0, memoryview(b"y"))
        await image.close()
        SYSTEM.img("check", "-q", str(disk))
        again = await Image.open(str(disk), OpenOptions())
        assert (await again.bits("good-bitmap")).dirty_bytes() == 2 * 65536
        await again.close()

    asyncio.run(run())


def test_a_bitmap_that_somebody_else_uses_now_is_refused(disk: Path) -> None:
    async def run() -> None:
        image = await Image.open(str(disk), OpenOptions())
        set_in_use(disk, "good-bitmap")
        before = disk.read_bytes()
        with pytest.raises(BitmapError, match="somebody else"):
            await image.reopen(read_only=False)
        assert image.read_only
        assert disk.read_bytes() == before
        await image.close()

    asyncio.run(run())


def test_a_directory_that_has_changed_is_refused(disk: Path) -> None:
    async def run() -> None:
        image = await Image.open(str(disk), OpenOptions())
        at = entry_of(disk, "good-bitmap") + 24
        with disk.open("r+b") as file:
            file.seek(at)
            file.write(b"g00d")
        with pytest.raises(ImageError, match="has changed"):
            await image.reopen(read_only=False)
        await image.close()

    asyncio.run(run())


def test_somebody_reading_does_not_let_a_writer_in(disk: Path) -> None:
    async def run() -> None:
        image = await Image.open(str(disk), OpenOptions())
        other = await Image.open(str(disk), OpenOptions())
        with pytest.raises(LockedError):
            await image.reopen(read_only=False)
        assert image.read_only
        await other.close()
        await image.reopen(read_only=False)
        await image.close()

    asyncio.run(run())


def test_a_snapshot_stays_read_only(disk: Path) -> None:
    SYSTEM.img("snapshot", "-c", "then", str(disk))

    async def run() -> None:
        with pytest.raises(ImageError, match="snapshot"):
            await Image.open(str(disk), OpenOptions(read_only=False, snapshot="then"))
        image = await Image.open(str(disk), OpenOptions(snapshot="then"))
        with pytest.raises(ImageError, match="reading only"):
            await image.reopen(read_only=False)
        await image.close()

    asyncio.run(run())
