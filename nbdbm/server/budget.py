"""The memory that all connections share: who may take how much, who waits, and who must go.

What a client makes us hold (replies that it does not read, payloads that it does not finish) is counted. When
there is no room a command waits for its turn, and so does the payload of a large write before anything is
allocated for it. Small commands do not wait as long as their connection has nothing else. A client that holds
memory for long while others wait for it is cut off: clients that take nothing, however many, cannot stop the
others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from nbdbm.peer import Peer

log = logging.getLogger(__name__)

MAX_BYTES = 512 * 1024 * 1024
"""Memory of the commands, payloads and unsent replies of all connections, bytes: sixteen of the largest
requests there are, and four thousand of those that clients send."""

SMALL = 64 * 1024
"""Cost in bytes up to which a connection that has nothing else need not wait. What connections hold together
is then at most MAX_BYTES and this for each."""

PATIENCE = 10.0
"""Seconds that somebody waits for memory, and somebody else holds some without finishing, before that one is
cut off: enough for 32 MiB over a line of 30 Mbit/s, and only where memory is short."""

LOOK_AGAIN = 1.0
"""Seconds between two cuts."""


class Claimant(Protocol):
    """A connection, seen by the budget."""

    peer: Peer

    @property
    def behind_since(self) -> float | None:
        """Since when it holds memory that its client could relieve it of, on the loop's clock; or None."""

    def proceed(self) -> None:
        """There may be room now for what it waits for."""

    def cut_off(self, why: str) -> None:
        """End it; what it holds is given back soon."""


class Budget:
    """An account in bytes. Whoever takes gives back."""

    def __init__(self, claimants: Callable[[], Iterable[Claimant]], limit: int = MAX_BYTES) -> None:
        self.limit = limit
        self.used = 0
        self._claimants = claimants
        self._waiting: dict[Claimant, tuple[int, float]] = {}
        """What they wait for, and since when, the longest first."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def exhausted(self) -> bool:
        return self.used >= self.limit

    def has(self, count: int) -> bool:
        """Whether ``count`` bytes may be taken now; if nobody else holds any, always."""
        return not self.used or self.used + count <= self.limit

    def take(self, count: int) -> None:
        self.used += count

    def give(self, count: int) -> None:
        self.used -= count
        if self._waiting:
            self._wake()

    def wait(self, claimant: Claimant, count: int) -> None:
        """``claimant`` shall proceed when ``count`` bytes may be taken; it waits for one thing at a time."""
        loop = asyncio.get_running_loop()
        since = self._waiting[claimant][1] if claimant in self._waiting else loop.time()
        self._waiting[claimant] = (count, since)
        if self._timer is None:
            self._timer = loop.call_later(PATIENCE, self._look)

    def forget(self, claimant: Claimant) -> None:
        """It does not wait any more."""
        self._waiting.pop(claimant, None)
        if not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        room = self.limit - self.used
        for claimant, (count, _) in list(self._waiting.items()):
            if count > room:
                return  # those behind it have waited less
            room -= count
            self.forget(claimant)
            claimant.proceed()

    def _look(self) -> None:
        """Cut off the one that has held memory for the longest, if others have waited for it for long."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(LOOK_AGAIN, self._look)
        now = loop.time()
        _, since = next(iter(self._waiting.values()))
        if now - since < PATIENCE:
            return
        holders = [(each.behind_since, each) for each in self._claimants() if each.behind_since is not None]
        if not holders:
            return
        held, longest = min(holders, key=lambda holder: holder[0])
        if now - held >= PATIENCE:
            log.warning("%s: cut off, others wait for the memory that its requests hold", longest.peer)
            longest.cut_off("others wait for the memory that its requests hold")
