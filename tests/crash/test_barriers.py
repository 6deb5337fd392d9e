"""Barriers: as many as are needed, each of them needed.

What each is for is told in image/commit.py and image/bitmapsave.py. A sync with nothing to do is none
(image/blockfile.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from nbdbm.image.image import Image
from tests.crash.conftest import Made
from tests.crash.harness import Recording, drive, is_needed, load, record
from tests.crash.scenarios import KINDS, TABLE_GROWTH, Kind, workload
from tests.support.marks import requires

pytestmark = requires("qemu-img", "qemu-io")

STATES = 240
"""After that many states in which nobody notices that it is missing, a sync counts as needless."""


# -- how many ----------------------------------------------------------------------------------


class Count:
    """An image of a recording, and the syncs that each step takes, as (image file, data file)."""

    def __init__(self, kind: Kind, made: Made) -> None:
        self.kind = kind
        self.recording = load(kind, made(kind))
        self.image: Image

    async def of(self, work: Awaitable[object]) -> tuple[int, int]:
        before = len(self.recording.timeline.syncs)
        await work
        numbers = [sync.file for sync in self.recording.timeline.syncs[before:]]
        return numbers.count(0), numbers.count(1)

    async def open(self) -> None:
        self.image = await self.recording.open(self.recording.files, read_only=False)

    async def write(self, at: float, count: float = 1, *, fua: bool = False) -> None:
        size = self.kind.cluster_size
        await self.image.write(int(at * size), memoryview(b"x" * int(count * size)), fua=fua)

    async def zeroes(self, at: int) -> None:
        await self.image.write_zeroes(at * self.kind.cluster_size, self.kind.cluster_size)

    async def trim(self, at: int) -> None:
        await self.image.trim(at * self.kind.cluster_size, self.kind.cluster_size)


def counting(kind: Kind, made: Made, work: Callable[[Count], Awaitable[None]]) -> None:
    async def main() -> None:
        count = Count(kind, made)
        await work(count)

    drive(main())


def test_barriers_of_an_ordinary_image(made: Made) -> None:
    hole = 16

    async def work(count: Count) -> None:
        of = count.of
        assert await of(count.open()) == (1, 0)  # IN_USE
        flush = count.image.flush
        assert await of(flush()) == (0, 0)  # nothing to do

        assert await of(count.write(0)) == (0, 0)
        assert await of(flush()) == (1, 0)  # in place: the data
        assert await of(count.write(0, 0.5, fua=True)) == (1, 0)

        for at in (hole, hole + 1.5):
            await count.write(at)
            assert await of(flush()) == (2, 0)  # data and counts; then the mapping
        await count.zeroes(1)
        assert await of(flush()) == (1, 0)  # the mapping alone
        await count.trim(2)
        assert await of(flush()) == (2, 0)  # the counts of what the zeroes freed; then the mapping
        assert await of(count.write(hole + 4, fua=True)) == (2, 0)
        await count.write(0)
        # In place; also takes along the counts of what was freed, which no flush waits for.
        assert await of(flush()) == (1, 0)

        together = [count.write(hole + n, fua=True) for n in range(5, 15)]
        syncs, _ = await of(asyncio.gather(*together))
        assert syncs <= 4  # one commit was under way; the others shared the next

        # Data and counts; bitmaps' new clusters; the header; counts of the old ones.
        await count.write(0)
        assert await of(count.image.close()) == (4, 0)

    counting(KINDS["v3"], made, work)


@pytest.mark.parametrize(
    ("name", "opening", "idle", "in_place", "allocating"),
    [
        ("v3", 1, 1, 4, 4),  # flags cleared where they are; see above; the first takes the mapping along
        ("v2", 0, 0, 1, 2),  # no bitmaps
        ("raw", 0, 0, 1, 1),
    ],
)
def test_barriers_of_closing(
    name: str, opening: int, idle: int, in_place: int, allocating: int, made: Made
) -> None:
    async def work(count: Count) -> None:
        assert await count.of(count.open()) == (opening, 0)
        assert await count.of(count.image.close()) == (idle, 0)
        for at, expected in ((0, in_place), (16, allocating)):
            count = Count(KINDS[name], made)
            await count.open()
            await count.write(at)
            assert await count.of(count.image.close()) == (expected, 0)

    counting(KINDS[name], made, work)


def test_barriers_with_an_external_data_file(made: Made) -> None:
    async def work(count: Count) -> None:
        assert await count.of(count.open()) == (1, 0)
        flush = count.image.flush
        await count.write(0)
        assert await count.of(flush()) == (0, 1)  # in place: the data alone
        await count.write(16)
        assert await count.of(flush()) == (1, 1)  # data; then the mapping
        await count.trim(1)
        assert await count.of(flush()) == (1, 1)
        assert await count.of(flush()) == (0, 0)
        # Nothing of the data file is waiting. Bitmaps' new clusters, the header, counts of the old ones.
        assert await count.of(count.image.close()) == (3, 0)

    counting(KINDS["data-file"], made, work)


def test_barriers_of_growing_tables(made: Made) -> None:
    async def small(count: Count) -> None:
        await count.open()
        await count.write(64)
        assert await count.of(count.image.flush()) == (2, 0)  # a new L2 table comes with the data
        await count.write(65, 63)
        await count.write(192, 64)
        # New refcount blocks before what leads to them; then as ever.
        assert await count.of(count.image.flush()) == (3, 0)

    async def growth(count: Count) -> None:
        await count.open()
        quarter = count.kind.clusters // 4
        await count.write(quarter, quarter)
        await count.image.flush()
        # The new refcount table with its blocks; the header that leads to it.
        assert await count.of(count.write(3 * quarter, quarter)) == (2, 0)
        # Blocks for the rest of the data, and then as ever.
        assert await count.of(count.image.flush()) == (3, 0)

    counting(KINDS["small-clusters"], made, small)
    counting(TABLE_GROWTH, made, growth)


# -- each is needed ----------------------------------------------------------------------------


def purpose(recording: Recording, number: int) -> str:
    """What sync ``number`` makes durable."""
    timeline = recording.timeline
    this = timeline.syncs[number]
    before = max((s.begun for s in timeline.syncs[:number] if s.file == this.file), default=0)
    ops = [op for op in timeline.ops if op.file == this.file and before < op.ended < this.begun]
    content = recording.files[0].data
    table = int.from_bytes(content[48:56]), int.from_bytes(content[56:60]) * recording.kind.cluster_size
    blocks = {int.from_bytes(content[at : at + 8]) for at in range(table[0], sum(table), 8)} - {0}
    size = recording.kind.cluster_size
    changes = [op for op in ops if op.kind not in ("sync", "discard")]
    if all(op.length == 4 for op in changes):
        return FLAGS
    if all(op.offset // size * size in blocks for op in changes):
        return COUNTS
    return "anything"


COUNTS = "counts"
"""Of clusters that were freed: without the sync they are leaked. They go with a flush, for which nothing
else was waiting, or before the bitmaps are stored, so that those find the space."""
FLAGS = "flags"
"""IN_USE, before a session in which nothing was written."""


@pytest.mark.parametrize(
    ("kind", "name", "needless"),
    [
        ("v3", "in-place", []),
        ("v3", "allocating", []),
        ("v3", "forced", [COUNTS]),
        ("v3", "zeroes-over-durable", []),
        ("v3", "reuse-after-zeroes", [COUNTS]),
        ("v3", "reopening", [FLAGS]),
        ("bitmaps", "reopening", [FLAGS]),
        ("snapshot", "allocating", [COUNTS]),
        ("compressed", "rewriting", []),
        ("small-clusters", "tables-anew", [COUNTS]),
        ("small-clusters", "growing", []),
        ("extended-l2-backing", "subclusters", []),
        ("data-file-backing", "allocating", []),
        ("data-file-backing", "reuse-after-trim", []),
    ],
)
def test_each_barrier_is_needed(
    kind: str, name: str, needless: list[str], made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    """Drop each sync in turn, from opening to the last: some state must be found bad."""
    caplog.set_level(logging.CRITICAL)

    async def main() -> None:
        recording = await record(KINDS[kind], made(KINDS[kind]), workload(name, KINDS[kind]))
        numbers = range(len(recording.timeline.syncs))
        unnoticed = [n for n in numbers if not await is_needed(recording, n, states=STATES)]
        assert [purpose(recording, n) for n in unnoticed] == needless, [
            str(recording.timeline.syncs[n]) for n in unnoticed
        ]

    drive(main())
