"""Long work in short turns of the event loop, so that nobody waits for it."""

from __future__ import annotations

import asyncio
import time

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
