"""Turns: work goes on in steps, and the event loop gets its turn when enough was done."""

from __future__ import annotations

import asyncio

import pytest

from nbdbm.server import turns
from nbdbm.server.turns import Place, Rota, Turns


@pytest.mark.parametrize(("each", "expected"), [(0.0, 0), (0.0005, 2), (0.01, 10)])
def test_others_get_a_turn_when_enough_was_done(
    each: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(turns.time, "monotonic", lambda: now)

    async def main() -> None:
        nonlocal now
        others = 0

        async def another() -> None:
            nonlocal others
            while True:
                await asyncio.sleep(0)
                others += 1

        task = asyncio.ensure_future(another())
        await asyncio.sleep(0)
        mine = Turns()
        for _ in range(10):
            now += each
            await mine.step()
        assert others == expected
        assert mine.spent == pytest.approx(each * 10, abs=turns.TURN)
        task.cancel()

    asyncio.run(main())


def test_the_rota_prefers_those_who_had_little_and_ends_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(turns.time, "monotonic", lambda: now)

    async def main() -> None:
        nonlocal now
        rota, log = Rota(), []
        had = {"greedy": 5.0, "second": 1.0, "third": 1.0}

        def work(name: str) -> None:
            nonlocal now
            log.append(name)
            now += turns.TURN / 2
            if name == "greedy" and len(log) < 12:
                had[name] += turns.TURN / 2
                rota.add(had[name], lambda: work(name))

        def broken() -> None:
            raise ValueError("a bug")

        asyncio.get_running_loop().set_exception_handler(lambda loop, context: log.append("bug"))
        for name in had:
            rota.add(had[name], lambda name=name: work(name))  # type: ignore[misc]
        assert log == []
        await asyncio.sleep(0)
        assert log == ["second", "third"]
        await asyncio.sleep(0)
        assert log == ["second", "third", "greedy", "greedy"]
        rota.add(0.0, lambda: work("newcomer"))
        rota.add(0.0, broken)
        await asyncio.sleep(0)
        assert log[4:] == ["newcomer", "bug"]
        while len(log) < 12:  # noqa: ASYNC110  the loop's turns are what is tested
            await asyncio.sleep(0)
        assert set(log[6:]) == {"greedy"}

    asyncio.run(main())


def test_a_place_has_one_turn_for_all_who_ask_and_counts_what_it_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(turns.time, "monotonic", lambda: now)

    async def main() -> None:
        rota, log = Rota(), []

        def step(name: str, took: float) -> None:
            nonlocal now
            now += took
            log.append(name)
            if len(log) < 5:
                places[name].ask()

        places = {
            "greedy": Place(rota, lambda: step("greedy", turns.TURN)),
            "modest": Place(rota, lambda: step("modest", turns.TURN / 100)),
        }
        for _ in range(3):
            places["greedy"].ask()
        await asyncio.sleep(0)
        assert log == ["greedy"]
        places["modest"].ask()
        for _ in range(9):
            await asyncio.sleep(0)
        # What it asks for within a turn, it asks for with the time that it had before that.
        assert log[:5] == ["greedy"] * 2 + ["modest"] * 3

    asyncio.run(main())
