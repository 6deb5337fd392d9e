"""The host refuses one operation of a run, each in turn, or all from one on: what the guest may find.

A request that is refused says so with the host's errno; what it covers is old or new, sector by sector.
All else is as if nothing had happened, and the image is sound. ``NBDBM_TEST_SLOW=n`` tries n times as
many places of each run.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbm.errors import BitmapError, ImageError
from nbdbm.image.blockfile import HostFile, ThreadedFile
from nbdbm.image.image import Image, OpenOptions
from tests.support.faults import CHANGING, FaultFile, FaultPlan
from tests.support.qcow2build import IN_USE, bitmap_entries
from tests.support.qemu import SYSTEM, run
from tests.support.writekinds import INCONSISTENT, KINDS, WriteKind

pytestmark = pytest.mark.requires("qemu-img", "qemu-io")

SLOW = int(os.environ.get("NBDBM_TEST_SLOW", "1"))
PLACES = 4 * SLOW
"""Operations of a run that are refused, one run each."""
SECTOR = 512
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

CHOSEN = (
    "v3",
    "512",
    "512-growing",
    "v2-backing",
    "compressed-snapshot",
    "extended-16k-odd",
    "extended-backing",
    "snapshot",
    "refcounts-1",
    "data-file",
    "preallocated",
)


class Guest:
    """Works on an image in units of sectors, and knows what it may find afterwards."""

    def __init__(self, kind: WriteKind, seed: int) -> None:
        self.kind = kind
        self.disk = bytearray(kind.initial())
        self.open: defaultdict[int, set[bytes]] = defaultdict(set)
        """Sector -> what else it may hold, because requests that cover it have failed."""
        self.unflushed: defaultdict[int, set[bytes]] = defaultdict(set)
        """Sector -> what it may hold if nothing is flushed any more."""
        self.rng = random.Random(seed)
        self.problems: list[str] = []
        self.errors: list[OSError | ImageError] = []

    def place(self) -> tuple[int, int]:
        unit = self.kind.cluster
        first = self.rng.choice((0, self.rng.randrange(max(1, self.kind.size // unit))))
        offset = first * unit + self.rng.choice((0, 0, unit // 2 // SECTOR * SECTOR))
        length = self.rng.choice((unit, 2 * unit, 5 * unit, SECTOR, unit // 4 // SECTOR * SECTOR or SECTOR))
        offset = min(offset, (self.kind.size - SECTOR) // SECTOR * SECTOR)
        return offset, min(length, self.kind.size - offset)

    async def work(self, image: Image, requests: int) -> None:
        """Requests one after the other, and some together in different places."""
        for number in range(requests):
            if number % 5 == 4:
                await self.flush(image)
            else:
                await self.request(image)

    async def request(self, image: Image) -> None:
        offset, length = self.place()
        what = self.rng.choice(("write", "write", "write", "zeroes", "no hole", "trim"))
        content = self.rng.randbytes(length) if what == "write" else bytes(length)
        start, end = offset, offset + length
        if what == "trim":
            unit = self.kind.cluster
            start = -(-offset // unit) * unit
            end = end if end == self.kind.size else end // unit * unit
            if self.kind.version < 3 and self.kind.backing is not None:
                end = start
            content = bytes(max(0, end - start))
        sectors = range(start // SECTOR, -(-max(start, end) // SECTOR))
        before = {s: bytes(self.disk[s * SECTOR : (s + 1) * SECTOR]) for s in sectors}
        new = bytearray(self.disk)
        new[start : start + len(content)] = content
        try:
            if what == "write":
                await image.write(offset, memoryview(content))
            elif what == "trim":
                await image.trim(offset, length)
            else:
                await image.write_zeroes(offset, length, no_hole=what == "no hole")
        except (OSError, ImageError) as error:
            self.errors.append(error)
            for s in sectors:
                self.open[s] |= {before[s], bytes(new[s * SECTOR : (s + 1) * SECTOR])}
        else:
            for s in sectors:
                self.unflushed[s] |= {before[s]} | self.open.pop(s, set())
            self.disk = new

    async def flush(self, image: Image) -> None:
        try:
            await image.flush()
        except (OSError, ImageError) as error:
            self.errors.append(error)
        else:
            self.unflushed.clear()

    def judge(self, disk: bytes, *, flushed: bool) -> None:
        """Compare what was found."""
        assert len(disk) == len(self.disk)
        for at in range(0, len(disk), SECTOR):
            got, number = disk[at : at + SECTOR], at // SECTOR
            if got == self.disk[at : at + SECTOR] or got in self.open.get(number, ()):
                continue
            assert not flushed, f"sector {number} was lost"
            assert got in self.unflushed.get(number, ()), f"sector {number} was never like that"


def in_use(kind: WriteKind, path: Path) -> list[bool]:
    """Of each recording bitmap."""
    data = path.read_bytes()
    entries = bitmap_entries(data)
    flags = {name: int.from_bytes(data[at + 12 : at + 16], "big") for name, at in entries.items()}
    assert flags[INCONSISTENT.encode()] & IN_USE
    return [bool(flags[bitmap.name.encode()] & IN_USE) for bitmap in kind.bitmaps]


async def session(kind: WriteKind, path: Path, plan: FaultPlan, seed: int) -> tuple[Guest, bool, bool]:
    """Work with faults; (guest, whether the image was given up, whether closing went well)."""

    def open_file(name: str, writable: bool) -> HostFile:
        file = ThreadedFile.open(name, writable=writable)
        faulty: HostFile = FaultFile(file, plan) if writable else file  # type: ignore[assignment]
        return faulty

    guest = Guest(kind, seed)
    try:
        image = await Image.open(str(path), OpenOptions(read_only=False), open_file)
    except (OSError, ImageError, BitmapError) as error:
        assert plan.failed, error
        return guest, False, False
    assert image._side is not None
    await guest.work(image, 24)
    if plan.sticky and plan.failed:
        plan.heal()
    broken = image._side.broken is not None
    if broken:
        with pytest.raises(ImageError, match="accepts no more writes"):
            await image.write(0, memoryview(bytes(SECTOR)))
    closed = True
    try:
        await image.close()
    except (OSError, ImageError) as error:
        guest.errors.append(error)
        closed = False
    return guest, broken, closed


def judge(kind: WriteKind, path: Path, plan: FaultPlan, outcome: tuple[Guest, bool, bool]) -> None:
    """What is on disk now."""
    guest, broken, closed = outcome
    what = f"{plan.nth} {plan.failed} {guest.errors}"
    for error in guest.errors:
        assert error.errno in (plan.errno, errno.EIO), what
    assert broken is False or not closed, what
    done = run(SYSTEM.argv("qemu-img", "check", path), check=False)
    assert done.returncode in ((0,) if not plan.failed else (0, 3)), what + done.stdout + done.stderr
    out = path.with_name("out.raw")
    SYSTEM.img("convert", "-q", "-f", "qcow2", "-O", "raw", path, out)
    guest.judge(out.read_bytes(), flushed=closed)
    if kind.bitmaps:
        flags = in_use(kind, path)
        if closed and not any("pread" in failed for failed in plan.failed):
            assert not any(flags), what
        elif broken:
            assert all(flags), what
    # And it can be used again.
    SYSTEM.io(path, f"read 0 {kind.size}")


def rehearse(kind: WriteKind, cache: Path, kinds: frozenset[str], seed: int) -> int:
    """How many operations a run has that nothing refuses."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        path = kind.copy(cache, Path(place))
        plan = FaultPlan(kinds=kinds)
        outcome = asyncio.run(session(kind, path, plan, seed))
        assert not outcome[0].errors and outcome[1:] == (False, True)
        judge(kind, path, plan, outcome)
        return plan.seen


@pytest.fixture(scope="module")
def cache() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(dir=MEMORY))
    yield place
    shutil.rmtree(place)


@pytest.mark.timeout(120 * max(1, SLOW))
@pytest.mark.parametrize(
    ("kinds", "code", "sticky"),
    [
        (frozenset(CHANGING - {"sync"}), errno.ENOSPC, False),
        (frozenset({"pwrite"}), errno.EDQUOT, True),
        (frozenset({"sync"}), errno.EIO, False),
        (frozenset({"pread"}), errno.EIO, False),
        (frozenset({"pread", "pwrite", "zero"}), errno.EIO, True),
    ],
    ids=("full", "quota", "sync", "pread", "dead"),
)
@pytest.mark.parametrize("name", CHOSEN)
def test_each_refusal_is_survived(
    name: str, kinds: frozenset[str], code: int, sticky: bool, cache: Path
) -> None:
    kind, seed = KINDS[name], 1
    total = rehearse(kind, cache, kinds, seed)
    assert total > 0
    rng = random.Random(f"{name} {sorted(kinds)} {sticky}")
    for nth in sorted(rng.sample(range(total), min(total, PLACES))):
        with tempfile.TemporaryDirectory(dir=MEMORY) as place:
            path = kind.copy(cache, Path(place))
            plan = FaultPlan(nth=nth, kinds=kinds, errno=code, sticky=sticky, seed=nth)
            outcome = asyncio.run(session(kind, path, plan, seed))
            judge(kind, path, plan, outcome)
