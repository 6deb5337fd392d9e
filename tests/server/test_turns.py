"""Turns: work goes on in steps, and the event loop gets its turn when enough was done."""

from __future__ import annotations

import asyncio

import pytest

from nbdbm.server import turns
from nbdbm.server.turns import Turns


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
