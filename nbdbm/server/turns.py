"""Long work in short turns of the event loop, so that nobody waits for it."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable
from itertools import count

TURN = 0.002
"""Seconds of work after which the event loop gets its turn: less than a client notices."""


class Turns:
    """For a coroutine that does much in small steps: ``await turns.step()`` after each."""

    def __init__(self) -> None:
        self.spent = 0.0
        """Seconds of work in the turns that are over."""
        self._began = time.monotonic()

    async def step(self) -> None:
        """Let everybody else have a turn, if this one has lasted long enough."""
        worked = time.monotonic() - self._began
        if worked >= TURN:
            self.spent += worked
            await asyncio.sleep(0)
            self._began = time.monotonic()


class Rota:
    """Small pieces of work for many who may have much of it: TURN for all together, then everybody else.

    Those come first who have had the least until now: one who has just come does not wait for a crowd that
    keeps us busy.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []
        """A heap: seconds had until now, a number for those who have had the same, and the work."""
        self._numbers = count()
        self._scheduled = False

    def add(self, had: float, work: Callable[[], None]) -> None:
        """Do ``work`` when its turn comes; who asks for it has ``had`` seconds before."""
        heapq.heappush(self._waiting, (had, next(self._numbers), work))
        self._schedule()

    def _schedule(self) -> None:
        if self._waiting and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._work)

    def _work(self) -> None:
        self._scheduled = False
        until = time.monotonic() + TURN
        try:
            while self._waiting and time.monotonic() < until:
                heapq.heappop(self._waiting)[2]()
        finally:
            self._schedule()


class Place:
    """One's place in a rota, for work that goes on by one ``step`` in each turn."""

    __slots__ = ("_awaited", "_had", "_rota", "_step")

    def __init__(self, rota: Rota, step: Callable[[], None]) -> None:
        self._rota = rota
        self._step = step
        self._awaited = False
        self._had = 0.0
        """Seconds of the turns that it has had."""

    def ask(self) -> None:
        """Have a turn, one for all who ask before it comes."""
        if not self._awaited:
            self._awaited = True
            self._rota.add(self._had, self._turn)

    def _turn(self) -> None:
        self._awaited = False
        began = time.monotonic()
        self._step()
        self._had += time.monotonic() - began
