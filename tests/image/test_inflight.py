"""Epochs and cluster locks."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given
from hypothesis import strategies as st

from nbdbm.image.inflight import ClusterLocks, Epochs


def test_nothing_under_way_has_passed() -> None:
    epochs = Epochs()
    assert epochs.passed(epochs.turn())


def test_an_epoch_passes_when_its_last_request_leaves() -> None:
    epochs = Epochs()
    early, also = epochs.enter(), epochs.enter()
    closed = epochs.turn()
    late = epochs.enter()
    assert not epochs.passed(closed)
    epochs.leave(early)
    assert not epochs.passed(closed)
    epochs.leave(also)
    assert epochs.passed(closed)
    epochs.leave(late)
    assert epochs.passed(epochs.turn())


@given(st.lists(st.sampled_from(["enter", "leave", "turn"]), max_size=60), st.randoms(use_true_random=False))
def test_passed_means_nobody_older_is_left(steps: list[str], pick: random.Random) -> None:
    epochs = Epochs()
    inside: list[int] = []
    for step in steps:
        if step == "enter":
            inside.append(epochs.enter())
        elif step == "turn":
            epochs.turn()
        elif inside:
            epochs.leave(inside.pop(pick.randrange(len(inside))))
        for epoch in range(epochs.current):
            assert epochs.passed(epoch) == all(one > epoch for one in inside)


def test_overlapping_ranges_exclude_each_other() -> None:
    async def run() -> None:
        locks = ClusterLocks()
        inside: set[int] = set()
        done = 0

        async def use(first: int, end: int) -> None:
            nonlocal done
            lock = await locks.acquire(first, end)
            mine = set(range(first, end))
            assert not inside & mine
            inside.update(mine)
            for _ in range(3):
                await asyncio.sleep(0)
            inside.difference_update(mine)
            locks.release(lock)
            done += 1

        pick = random.Random(7)
        spans = [(a, a + pick.randrange(1, 6)) for a in (pick.randrange(12) for _ in range(80))]
        async with asyncio.timeout(10):
            await asyncio.gather(*(use(a, b) for a, b in spans))
        assert done == 80
        assert locks.holder(0, 100) is None

    asyncio.run(run())


def test_a_cancelled_waiter_disturbs_nobody() -> None:
    async def run() -> None:
        locks = ClusterLocks()
        held = await locks.acquire(0, 4)
        waiters = [asyncio.create_task(locks.acquire(2, 3)) for _ in range(2)]
        await asyncio.sleep(0)
        waiters[0].cancel()
        await asyncio.sleep(0)
        assert not held[2].cancelled()
        locks.release(held)
        lock = await waiters[1]
        locks.release(lock)
        assert waiters[0].cancelled()

    asyncio.run(run())


def test_disjoint_ranges_do_not_wait() -> None:
    async def run() -> None:
        locks = ClusterLocks()
        one = await locks.acquire(0, 4)
        other = await asyncio.wait_for(locks.acquire(4, 8), 1)
        locks.release(one)
        locks.release(other)

    asyncio.run(run())
