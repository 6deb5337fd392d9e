"""When regions are split, with a clock of our own; and that a real file is the same before and after."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdbm.image.blockfile import ThreadedFile
from nbdbm.image.folios import (
    ATTENTION,
    CREDIT,
    EVERY,
    FIRST,
    MOST_KNOWN,
    PRICE,
    REGION,
    SLOW,
    SMALL,
    Folios,
    split,
)
from nbdbm.image.pagecache import PAGE, page

SIZE = 1 << 40
FAST = 1_000


class Disk:
    """Writes that take as long as the test says, and the regions that are split."""

    def __init__(self, *, clean: bool = True) -> None:
        self.took: Callable[[int], int] = lambda offset: FAST
        self.now = 0
        self.measured = 0
        self.split: list[int] = []
        self._clean = clean
        self.folios = Folios(split=self._split, clock=lambda: self.now)

    def _split(self, fd: int, start: int, length: int) -> bool:
        assert start % REGION == 0 and 0 < length <= REGION and length % PAGE == 0
        self.split.append(start // REGION)
        return self._clean

    def write(self, *offsets: int, size: int = SIZE) -> None:
        for offset in offsets:
            self.folios.countdown -= 1
            looked = self.folios.countdown <= 0
            if looked:
                self.measured += 1
                self.folios.before(0, offset, size)
            self.now += self.took(offset)
            if looked:
                self.folios.after()

    def be_slow(self) -> None:
        """Where it has not been split."""
        self.took = lambda offset: FAST if offset // REGION in self.split else SLOW + 1


def regions(count: int, first: int = 0) -> list[int]:
    return [number * REGION + 4096 for number in range(first, first + count)]


def test_nothing_is_split_where_writes_are_fast() -> None:
    disk = Disk()
    disk.write(*regions(1000))
    assert disk.split == []
    assert disk.measured <= FIRST + (1000 - FIRST) // EVERY + 1


def test_regions_are_split_before_their_first_write_once_writes_are_slow() -> None:
    disk = Disk()
    disk.be_slow()
    disk.write(*regions(100), *regions(100))
    assert disk.split == [*range(2, 100), 0, 1]


def test_one_slow_write_says_nothing() -> None:
    disk = Disk()
    disk.took = lambda offset: 50 * SLOW if offset // REGION % 2 else FAST
    disk.write(*regions(1000))
    assert disk.split == []


def test_slow_writes_are_noticed_later_on_too() -> None:
    disk = Disk()
    disk.write(*regions(1000))
    disk.be_slow()
    disk.write(*regions(100))
    assert len(disk.split) >= 100 - EVERY - 2


def test_it_is_forgotten_that_writes_were_slow() -> None:
    disk = Disk()
    disk.be_slow()
    disk.write(*regions(2))
    disk.took = lambda offset: FAST
    disk.write(*[0] * (ATTENTION + 1))
    before = list(disk.split)
    disk.measured = 0
    disk.write(*regions(160))
    assert disk.split == before and disk.measured <= 160 // EVERY + 1


def test_dirty_regions_are_tried_again_after_a_sync() -> None:
    disk = Disk(clean=False)
    disk.took = lambda offset: SLOW + 1
    disk.write(*regions(10), *regions(10))
    assert disk.split == [*range(2, 10), 0, 1]
    disk.folios.synced()
    disk.write(*regions(10))
    assert disk.split[10:] == [*range(10)]


def test_clean_regions_are_not() -> None:
    disk = Disk()
    disk.took = lambda offset: SLOW + 1
    disk.write(*regions(10), *regions(10))
    disk.folios.synced()
    disk.write(*regions(10))
    assert len(disk.split) == 10


def test_scattered_writes_are_not_split_for_each() -> None:
    disk = Disk()
    disk.took = lambda offset: SLOW + 1
    disk.write(*regions(20_000))
    assert len(disk.split) <= CREDIT + 20_000 // PRICE
    assert len(disk.split) > CREDIT


def test_what_is_remembered_is_bounded() -> None:
    disk = Disk()
    disk.took = lambda offset: SLOW + 1
    disk.write(*(offset for offset in regions(MOST_KNOWN + 2) for _ in range(PRICE)), size=SIZE)
    assert len(disk.folios._known) <= MOST_KNOWN


def test_a_kernel_that_cannot_is_asked_once() -> None:
    tried: list[int] = []

    class Cannot(Disk):
        def _split(self, fd: int, start: int, length: int) -> bool:
            tried.append(start)
            raise OSError(22, "Invalid argument")

    disk = Cannot()
    disk.took = lambda offset: SLOW + 1
    disk.write(*regions(10_000))
    assert len(tried) == 1


def test_the_end_of_a_file() -> None:
    disk = Disk()
    disk.took = lambda offset: SLOW + 1
    disk.write(0, 0, REGION + 100, 2 * REGION, size=REGION + 200)
    assert disk.split == []  # less than a page, and past the end


# -- a real file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Larger than two regions, and on the disk."""
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(2 * REGION + 5 * PAGE + 100))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


def test_splitting_changes_no_byte(path: Path) -> None:
    before = path.read_bytes()
    fd = os.open(path, os.O_RDWR)
    try:
        assert split(fd, 0, REGION)
        assert split(fd, REGION, REGION)
        assert split(fd, 2 * REGION, 5 * PAGE)
        os.pwrite(fd, b"x" * PAGE, 0)
        if page(fd, 0)[1]:  # where there is a disk, and a kernel that says so
            assert not split(fd, 0, REGION)
            os.fsync(fd)
            assert split(fd, 0, REGION)
        assert os.pread(fd, len(before), 0) == b"x" * PAGE + before[PAGE:]
        with pytest.raises(ValueError, match="length"):
            split(fd, 2 * REGION, REGION)
    finally:
        os.close(fd)


def test_what_is_not_cached_is_not_fetched(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if page(fd, 0)[0]:
            pytest.skip("this file system keeps pages that it is told to drop (tmpfs)")
        assert split(fd, 0, REGION)
        assert not page(fd, 0)[0]
    finally:
        os.close(fd)


def test_writes_that_are_always_slow(path: Path) -> None:
    """Every write goes with an attempt to split; the file is what was written."""
    expected = bytearray(path.read_bytes())
    ticks = iter(range(0, 1 << 60, SLOW + 1))
    tried: list[int] = []

    def noted(fd: int, start: int, length: int) -> bool:
        tried.append(start)
        return split(fd, start, length)

    async def run() -> None:
        file = ThreadedFile.open(str(path), writable=True)
        file._folios = Folios(split=noted, clock=lambda: next(ticks))
        rng = random.Random(2)
        try:
            for number in range(300):
                length = rng.choice((1, 512, PAGE, 5000, SMALL, SMALL + 1))
                at = rng.randrange(len(expected) + 3 * PAGE - length)
                data = rng.randbytes(length)
                assert file.try_pwrite(at, memoryview(data))
                expected.extend(bytes(max(0, at + length - len(expected))))
                expected[at : at + length] = data
                if number % 50 == 49:
                    await file.sync()
        finally:
            file.close()

    asyncio.run(run())
    assert path.read_bytes() == expected
    assert set(tried) == {0, REGION, 2 * REGION}
