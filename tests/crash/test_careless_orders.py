"""Five orders in which QEMU loses data to a power failure, each shown here to be impossible.

Every test goes both ways: it passes on our engine, and it fails on the same engine made careless in just
that way, so it is known to look where it must.
"""

from __future__ import annotations

import pytest

from tests.crash import mutants
from tests.crash.conftest import Made
from tests.crash.harness import drive, first_problem, judge, record
from tests.crash.scenarios import KINDS, LAZY, Kind, random_workload, workload
from tests.support.marks import requires

FOUND = "permitted are"
"""How a judgement on what the disk shows reads."""

pytestmark = requires("qemu-img", "qemu-io")

STATES = 60
"""Crash states of the careful engine; the careless get more chances, and need few."""


async def both_ways(
    kind: Kind, made: Made, name: str, mutant: mutants.Mutant, *words: str, reopen: bool = False
) -> None:
    """The careful engine survives the workload; the careless does not, and one of ``words`` says why."""
    what = workload(name, kind)
    careful = await record(kind, made(kind), what)
    assert not careful.failures and not await first_problem(careful, states=STATES, reopen=reopen)
    careless = await record(kind, made(kind), what, mutant=mutant)
    problems = await first_problem(careless, states=2000, reopen=reopen)
    assert any(word in problem for problem in problems for word in words), problems


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("v3", "reuse-after-zeroes"),
        ("backing", "reuse-after-zeroes"),
        ("v3", "reuse-after-trim"),
        ("small-clusters", "reuse-after-trim"),
        ("compressed", "rewriting"),
        ("zstd", "rewriting"),
    ],
)
def test_freed_clusters_are_reused_only_after_the_durable_unlink(kind: str, name: str, made: Made) -> None:
    """Else one place of the disk shows what was written to another."""
    drive(both_ways(KINDS[kind], made, name, mutants.freed_at_once, FOUND, "damaged", "refcount"))


@pytest.mark.parametrize(
    ("kind", "name", "mutant"),
    [
        ("v3", "in-place", mutants.zeroed_before_written),
        ("data-file", "in-place", mutants.zeroed_before_written),
        ("extended-l2", "subclusters", mutants.cluster_zeroed_before_filled),
    ],
)
def test_durable_data_is_not_zeroed_on_the_way(
    kind: str, name: str, mutant: mutants.Mutant, made: Made
) -> None:
    """Else a power failure leaves zeroes that nobody wrote."""
    drive(both_ways(KINDS[kind], made, name, mutant, FOUND))


@pytest.mark.parametrize("kind", [KINDS["lazy-refcounts"], LAZY], ids=str)
def test_the_mapping_waits_for_data_and_file_size_with_lazy_refcounts(kind: Kind, made: Made) -> None:
    """Our engine keeps refcounts true at all times, whatever the image allows."""
    mutant = mutants.lazy_and_mapping_before_data
    drive(both_ways(kind, made, "growing", mutant, ""))


def test_the_repair_of_a_dirty_image_leaves_used_clusters_alone(made: Made) -> None:
    """An orderly writer with lazy refcounts left the dirty bit: refcounts, even their blocks, are missing."""
    what = workload("growing", LAZY)

    async def main() -> None:
        recording = await record(LAZY, made(LAZY), what, mutant=mutants.lazy_refcounts)
        assert not await first_problem(recording, states=4 * STATES, reopen=True)
        with pytest.MonkeyPatch.context() as patch:
            mutants.repaired_by_old_counts(patch)
            assert await first_problem(recording, states=4 * STATES, reopen=True)

    drive(main())


@pytest.mark.parametrize("name", ["allocating", "growing", "forced"])
def test_an_external_data_file_is_synced_before_the_mapping(name: str, made: Made) -> None:
    """Else the disk shows what the data file held before: here, zeroes over the backing file."""
    kind = KINDS["data-file-backing"]
    drive(both_ways(kind, made, name, mutants.data_file_synced_last, FOUND))


@pytest.mark.parametrize("kind", ["v3", "backing", "snapshot-small", "extended-l2"])
def test_overlapping_requests_leave_sound_metadata_without_a_crash(kind: str, made: Made) -> None:
    """Writes, zeroes and trims under way on the same clusters, and a clean close."""

    async def problems(seed: int, mutant: mutants.Mutant | None) -> list[str]:
        what = random_workload(KINDS[kind], seed, 40, together=10)
        recording = await record(KINDS[kind], made(KINDS[kind]), what, seed=seed, mutant=mutant)
        return recording.failures + await judge(recording, recording.now())

    async def main() -> None:
        for seed in range(6):
            assert not await problems(seed, None)
        for seed in range(60):
            if await problems(seed, mutants.nobody_is_waited_for):
                return
        pytest.fail("requests without locks were not noticed")

    drive(main())
