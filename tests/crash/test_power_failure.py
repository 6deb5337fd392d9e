"""Power failures: whatever a run's files may look like afterwards, no promise is broken."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from nbdbm.image.image import Image
from tests.crash.harness import (
    READING,
    OutsideJudge,
    Recording,
    Verdict,
    judge,
    judge_all,
    load,
    opener,
    play,
)
from tests.crash.scenarios import (
    DISABLED,
    GRANULARITY,
    KINDS,
    RECORDING,
    WORKLOADS,
    Workload,
    random_workload,
    workload,
)
from tests.support.marks import requires

pytestmark = requires("qemu-img", "qemu-io")

STATES = int(os.environ.get("NBDBM_CRASH_STATES", "10"))
"""Crash states for each workload on each kind of image; long runs set thousands."""


async def run(kind: str, place: Path, what: Workload, *, seed: int = 1) -> Recording:
    recording = load(KINDS[kind], place, seed=seed)
    await play(recording, what)
    assert not recording.failures
    return recording


def report(verdict: Verdict) -> None:
    assert verdict.states and not verdict.bad, "\n\n".join(verdict.examples)


@pytest.mark.parametrize("kind", KINDS)
def test_every_workload_survives(kind: str, tmp_path: Path) -> None:
    KINDS[kind].make(tmp_path)

    async def main() -> None:
        for name in WORKLOADS:
            recording = await run(kind, tmp_path, workload(name, KINDS[kind]))
            outside = OutsideJudge(tmp_path / name, recording)
            states = recording.states(random=STATES, seed=len(name))
            report(await judge_all(recording, states, outside=outside, every=max(10, STATES // 2)))

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_random_workloads_survive(kind: str, tmp_path: Path) -> None:
    KINDS[kind].make(tmp_path)

    async def main() -> None:
        for seed in range(2):
            what = random_workload(KINDS[kind], seed, 40)
            recording = await run(kind, tmp_path, what, seed=seed)
            outside = OutsideJudge(tmp_path / what.name, recording)
            states = recording.states(random=2 * STATES, seed=seed)
            report(await judge_all(recording, states, outside=outside, every=STATES))

    asyncio.run(main())


@pytest.mark.parametrize("name", ["in-place", "allocating", "forced", "reuse-after-trim"])
def test_every_single_state(name: str, tmp_path: Path) -> None:
    """Small clusters and whole operations: few enough states to try all of them."""
    kind = KINDS["small-clusters"]
    kind.make(tmp_path)

    async def main() -> None:
        recording = await run(kind.name, tmp_path, workload(name, kind))
        report(await judge_all(recording, recording.states(exhaustive=True, tear=1), every=1 << 30))

    asyncio.run(main())


async def noticed(recording: Recording, dropped: int, *, most: int) -> bool:
    """Whether some state is found bad when sync number ``dropped`` does nothing."""
    for state in recording.states(random=most, seed=dropped, dropped={dropped}):
        if await judge(recording, state):
            return True
    return False


@pytest.mark.parametrize("name", ["reuse-after-zeroes", "allocating", "zeroes-over-durable"])
def test_each_barrier_of_the_guests_flushes_is_needed(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Drop each sync in turn, from opening to the guest's last flush: some state must be found bad."""
    caplog.set_level(logging.CRITICAL)
    kind = KINDS["v3"]
    kind.make(tmp_path)

    async def main() -> None:
        recording = await run(kind.name, tmp_path, workload(name, kind))
        last = max(op.ended for op in recording.model.ops if op.kind == "flush")
        syncs = [n for n, sync in enumerate(recording.timeline.syncs) if sync.begun < last]
        assert len(syncs) >= 4
        unnoticed = [n for n in syncs if not await noticed(recording, n, most=1500)]
        assert not unnoticed, [str(recording.timeline.syncs[n]) for n in unnoticed]

    asyncio.run(main())


def test_the_bitmaps_are_exact_after_a_clean_close(tmp_path: Path) -> None:
    kind = KINDS["v3"]
    kind.make(tmp_path)

    async def main() -> None:
        for name in WORKLOADS:
            recording = await run(kind.name, tmp_path, workload(name, kind))
            *changes, last = recording.timeline.ops
            assert last.kind == "sync" and all(op.ended < last.begun for op in changes)
            image = await Image.open(recording.files[0].path, READING, opener(recording.files))
            assert {b.name for b in image.tracker.usable()} == {RECORDING, DISABLED}
            bits = await image.bits(RECORDING)
            dirty = {
                n for n in range(kind.size // GRANULARITY) if next(bits.runs(n * GRANULARITY, GRANULARITY))[1]
            }
            assert dirty == recording.model.expected_dirty(last.ended, GRANULARITY)
            assert not (await image.bits(DISABLED)).count()
            await image.close()

    asyncio.run(main())
