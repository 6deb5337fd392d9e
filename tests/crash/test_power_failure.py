"""Power failures: whatever a run's files may look like afterwards, no promise is broken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.crash.conftest import Made
from tests.crash.harness import OutsideJudge, Recording, Verdict, drive, judge_all, load, play
from tests.crash.scenarios import (
    DISABLED,
    KINDS,
    TABLE_GROWTH,
    WORKLOADS,
    Kind,
    Workload,
    random_workload,
    workload,
)
from tests.support.marks import requires

pytestmark = requires("qemu-img", "qemu-io")

STATES = int(os.environ.get("NBDBM_CRASH_STATES", "8"))
"""Crash states for each workload on each kind of image; long runs set thousands."""
SEED = int(os.environ.get("NBDBM_CRASH_SEED", "1"))
"""Of the order of events in each run, the states that are drawn, and the random workloads."""


async def run(kind: Kind, place: Path, what: Workload) -> Recording:
    recording = load(kind, place, seed=SEED)
    await play(recording, what)
    assert not recording.failures
    return recording


def report(verdict: Verdict) -> None:
    assert verdict.states and not verdict.bad, "\n\n".join(verdict.examples)


async def survives(kind: Kind, place: Path, scratch: Path, what: Workload, states: int) -> None:
    """Play it, and judge that many states; some of them by qemu-img check as well."""
    recording = await run(kind, place, what)
    outside = OutsideJudge(scratch / what.name, recording)
    drawn = recording.states(random=states, seed=SEED)
    report(await judge_all(recording, drawn, outside=outside, every=max(8, states // 2)))


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_every_workload_survives(kind: Kind, made: Made, tmp_path: Path) -> None:
    async def main() -> None:
        for name in WORKLOADS:
            await survives(kind, made(kind), tmp_path, workload(name, kind), STATES)

    drive(main())


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_random_workloads_survive(kind: Kind, made: Made, tmp_path: Path) -> None:
    async def main() -> None:
        for seed in (2 * SEED, 2 * SEED + 1):
            await survives(kind, made(kind), tmp_path, random_workload(kind, seed, 40), 2 * STATES)

    drive(main())


def test_the_refcount_table_moves(made: Made, tmp_path: Path) -> None:
    async def main() -> None:
        what = workload("filling", TABLE_GROWTH)
        recording = await run(TABLE_GROWTH, made(TABLE_GROWTH), what)
        before, after = recording.timeline.initial[0], recording.files[0].data
        assert before[48:60] != after[48:60]
        await survives(TABLE_GROWTH, made(TABLE_GROWTH), tmp_path, what, 4 * STATES)

    drive(main())


@pytest.mark.parametrize("name", ["in-place", "allocating", "forced", "reuse-after-trim"])
def test_every_single_state(name: str, made: Made) -> None:
    """Small clusters and whole operations: few enough states to try all of them."""
    kind = KINDS["small-clusters"]

    async def main() -> None:
        recording = await run(kind, made(kind), workload(name, kind))
        report(await judge_all(recording, recording.states(exhaustive=True, tear=1)))

    drive(main())


def test_the_bitmaps_are_exact_after_a_clean_close(made: Made) -> None:
    kind = KINDS["bitmaps"]

    async def main() -> None:
        for name in WORKLOADS:
            recording = await run(kind, made(kind), workload(name, kind))
            *changes, last = recording.timeline.ops
            assert last.kind == "sync" and all(op.ended < last.begun for op in changes)
            image = await recording.open(recording.files, read_only=True)
            usable = image.tracker.usable()
            assert len(usable) == 2 + len(kind.granularities)
            for bitmap in usable:
                size = bitmap.granularity
                bits = await image.bits(bitmap.name)
                dirty = {n for n in range(-(-kind.size // size)) if next(bits.runs(n * size, 1))[1]}
                touched = recording.model.expected_dirty(last.ended, size)
                assert dirty == (set() if bitmap.name == DISABLED else touched)
            await image.close()

    drive(main())
