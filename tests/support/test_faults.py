"""FaultFile: the n-th operation fails, and leaves what a real failure may leave."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable

import pytest

from tests.support.faults import FaultFile, FaultPlan
from tests.support.powercut import SECTOR, PowerCutFile, Timeline

KINDS = ["pread", "pwrite", "zero", "discard", "truncate", "sync"]


def operation(file: FaultFile, kind: str) -> Awaitable[object]:
    match kind:
        case "pread":
            return file.pread(0, 10)
        case "pwrite":
            return file.pwrite(0, b"x" * 4 * SECTOR)
        case "zero":
            return file.zero(0, SECTOR, punch=False)
        case "discard":
            return file.discard(0, SECTOR)
        case "truncate":
            return file.truncate(9 * SECTOR)
        case _:
            return file.sync()


async def outcomes(file: FaultFile, kinds: list[str]) -> list[int]:
    """The errno of each operation, 0 for success."""
    found = []
    for kind in kinds:
        try:
            await operation(file, kind)
            found.append(0)
        except OSError as error:
            assert error.errno is not None
            found.append(error.errno)
    return found


def faulty(plan: FaultPlan) -> tuple[FaultFile, PowerCutFile]:
    inner = PowerCutFile(Timeline(), bytes(8 * SECTOR), path="disk")
    return FaultFile(inner, plan), inner


@pytest.mark.parametrize("kind", KINDS)
def test_the_nth_of_a_kind_fails_once(kind: str) -> None:
    file, _ = faulty(FaultPlan(nth=1, kinds={kind}, errno=errno.ENOSPC))
    script = [k for k in KINDS for _ in range(3)]
    expected = [errno.ENOSPC if (k, n) == (kind, 1) else 0 for k in KINDS for n in range(3)]
    assert asyncio.run(outcomes(file, script)) == expected


def test_kinds_are_counted_together_over_files() -> None:
    plan = FaultPlan(nth=2, kinds={"pwrite", "sync"})
    (one, _), (two, _) = faulty(plan), faulty(plan)

    async def run() -> list[int]:
        return await outcomes(one, ["pwrite", "pread"]) + await outcomes(two, ["sync", "pwrite", "sync"])

    assert asyncio.run(run()) == [0, 0, 0, errno.EIO, 0]
    assert plan.failed == ["pwrite disk @0x0+0x800"] and plan.seen == 4


def test_from_then_on_until_healed() -> None:
    plan = FaultPlan(nth=1, kinds={"sync"}, sticky=True)
    file, _ = faulty(plan)

    async def run() -> list[int]:
        found = await outcomes(file, ["sync", "sync", "pwrite", "sync"])
        plan.heal()
        return found + await outcomes(file, ["sync"])

    assert asyncio.run(run()) == [0, errno.EIO, 0, errno.EIO, 0]


def test_a_failed_write_may_leave_some_sectors() -> None:
    left = set()
    for seed in range(200):
        file, inner = faulty(FaultPlan(nth=0, seed=seed))
        assert asyncio.run(outcomes(file, ["pwrite"])) == [errno.EIO]
        left.add(tuple(inner.data[n * SECTOR] != 0 for n in range(4)))
        assert set(bytes(inner.data)) <= {0, ord("x")}
    assert len(left) == 16
    file, inner = faulty(FaultPlan(nth=0, short=False))
    assert asyncio.run(outcomes(file, ["pwrite"])) == [errno.EIO]
    assert not any(inner.data)


def test_a_failed_sync_makes_nothing_certain() -> None:
    file, inner = faulty(FaultPlan(nth=1))
    assert asyncio.run(outcomes(file, ["pwrite", "sync"])) == [0, errno.EIO]
    assert inner.timeline.syncs == []
    assert any(not any(s.files[0].to_bytes()) for s in inner.timeline.states(exhaustive=True))
