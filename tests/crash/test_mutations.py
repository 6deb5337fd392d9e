"""The power-failure tests notice an engine that does things in the wrong order."""

from __future__ import annotations

import re
from functools import partial

import pytest

from nbdbm.errors import ImageError
from tests.crash import mutants
from tests.crash.conftest import Made
from tests.crash.harness import drive, first_problem, judge, record
from tests.crash.scenarios import KINDS, workload
from tests.support.faults import FaultFile, FaultPlan
from tests.support.marks import requires

pytestmark = requires("qemu-img", "qemu-io")


@pytest.mark.parametrize(
    ("mutant", "kind", "name", "words"),
    [
        (mutants.mapping_before_counts, "v3", "allocating", "has refcount 0"),
        (mutants.mapping_before_counts, "snapshot", "reuse-after-rewrite", "has refcount 0"),
        (mutants.mapping_before_data, "backing", "allocating", "permitted are"),
        (mutants.mapping_before_data, "small-clusters", "growing", ""),
        (mutants.tables_not_blanked, "small-clusters", "tables-anew", "L2 table"),
        (mutants.linked_before_written, "backing", "many-flushes", "permitted are|past the file's end"),
        (mutants.linked_before_written, "data-file-backing", "many-flushes", "permitted are"),
        (mutants.counted_down_early, "v3", "reuse-after-trim", "has refcount 0"),
        (mutants.counted_down_early, "snapshot", "reuse-after-rewrite", "has refcount"),
        (mutants.freed_before_unlinked_at_the_end, "v3", "freeing-last", "permitted are"),
        (mutants.armed_after_first_write, "v3", "in-place", "falsely clean"),
        (mutants.armed_after_first_write, "bitmaps", "reopening", "falsely clean"),
        (mutants.switched_before_durable, "v3", "in-place", ""),
        (mutants.freed_before_switched, "bitmaps", "reopening", "has refcount 0"),
    ],
)
def test_a_power_failure_tells(mutant: mutants.Mutant, kind: str, name: str, words: str, made: Made) -> None:
    async def main() -> None:
        what = workload(name, KINDS[kind])
        careful = await record(KINDS[kind], made(KINDS[kind]), what)
        assert not await first_problem(careful, states=40)
        careless = await record(KINDS[kind], made(KINDS[kind]), what, mutant=mutant)
        problems = await first_problem(careless, states=3000)
        assert problems and any(re.search(words, problem) for problem in problems), problems

    drive(main())


@pytest.mark.parametrize("mutant", [None, mutants.marked_after_written])
def test_a_failed_write_tells(mutant: mutants.Mutant | None, made: Made) -> None:
    """What a failed write has left of itself must be dirty after a clean close, whichever write fails."""
    kind = KINDS["v3"]
    what = workload("allocating", kind)

    async def main() -> None:
        missed = failed = 0
        for nth in range(40):
            faulty = partial(FaultFile, plan=FaultPlan(nth=nth, kinds={"pwrite"}, seed=nth))
            try:
                recording = await record(kind, made(kind), what, mutant=mutant, wrap=faulty)
            except (OSError, ImageError):
                continue  # opening or closing failed: the bitmaps stay marked as in use
            if not recording.failures:
                break
            failed += 1
            problems = await judge(recording, recording.now())
            assert all("falsely clean" in problem for problem in problems)
            missed += bool(problems)
        assert failed > 2
        assert bool(missed) == (mutant is not None)

    drive(main())
