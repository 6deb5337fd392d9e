"""A host that fails, and then loses power: no promise is broken, and no bitmap wrongly calls itself true."""

from __future__ import annotations

import errno
import random
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from nbdbm.errors import ImageError
from tests.crash import mutants
from tests.crash.conftest import Made
from tests.crash.harness import Verdict, drive, judge, load, play
from tests.crash.scenarios import KINDS, WORKLOADS, Kind, random_workload, workload
from tests.crash.test_power_failure import SEED, STATES, report
from tests.support.faults import CHANGING, FaultFile, FaultPlan
from tests.support.marks import requires

pytestmark = requires("qemu-img", "qemu-io")


async def fail_and_judge(
    kind: Kind, place: Path, turns: int, mutant: mutants.Mutant | None = None
) -> Verdict:
    """In each turn some operation fails, once or from then on: in opening, in a request, in a flush, in
    closing. How requests are answered is not looked at; what the file is afterwards is."""
    verdict = Verdict()
    rng = random.Random(SEED)
    for turn in range(turns):
        plan = FaultPlan(
            int(rng.expovariate(1 / 25)),
            rng.choice(({"pwrite"}, CHANGING - {"sync"}, CHANGING, {"sync"})),
            rng.choice((errno.EIO, errno.ENOSPC)),
            sticky=rng.random() < 0.4,
            seed=turn,
        )
        name = rng.choice([*WORKLOADS, "random"])
        what = random_workload(kind, turn, 40) if name == "random" else workload(name, kind)
        recording = load(kind, place, seed=SEED + turn)
        with pytest.MonkeyPatch.context() as patch, suppress(OSError, ImageError):
            if mutant is not None:
                mutant(patch)
            await play(recording, what, wrap=partial(FaultFile, plan=plan))
        # (Where opening or closing failed, nothing went on from there.)
        for file in recording.files:
            file.closed = False
        # Of freeing what the old bitmaps took, a failure is only logged.
        recording.leaky = bool(plan.failed)
        now = recording.now()
        problems = await judge(recording, now)
        verdict.add(now, [*plan.failed, *problems] if problems else [])
        for state in recording.states(random=4, seed=turn):
            problems = await judge(recording, state, reopen=True)
            verdict.add(state, [*plan.failed, *problems] if problems else [])
        if mutant is not None and verdict.bad:
            break
    return verdict


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_a_failure_and_then_a_power_failure(kind: Kind, made: Made) -> None:
    async def main() -> None:
        report(await fail_and_judge(kind, made(kind), max(1, STATES // 2)))

    drive(main())


def test_a_commit_that_is_not_made_up_for_is_noticed(made: Made) -> None:
    kind = KINDS["small-clusters"]

    async def main() -> None:
        verdict = await fail_and_judge(kind, made(kind), 500, mutants.failed_commit_forgotten)
        assert verdict.bad

    drive(main())
