"""Reads of one connection that have missed the page cache, until their data has come.

No task, no buffer: a read that waits is its event and nothing more, and once its data is in the page cache it
is done as if it came only then (fastpath.py). So what was written and acknowledged meanwhile, it sees.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter_ns

from nbdbm.exports import Export
from nbdbm.nbd.events import Read
from nbdbm.server.dispatch import REQUEST_COST
from nbdbm.server.holdings import Holdings


class Misses:
    """What waits, and what waits no more.

    Args:
        holdings: where these reads are counted as commands in progress: while one is, the connection holds
            its export, even if the client has left.
        proceed: called, at some later time, whenever there is something in ``arrived``.
    """

    __slots__ = ("_bring", "_holdings", "_proceed", "arrived")

    def __init__(self, export: Export, holdings: Holdings, proceed: Callable[[], None]) -> None:
        self._bring = export.bring
        self._holdings = holdings
        self._proceed = proceed
        self.arrived: deque[tuple[Read, int, int]] = deque()
        """Reads to be done now, when they began (nanoseconds), and what became of their data. ``finish`` is
        to be called for each that is taken out."""

    def begin(self, event: Read) -> bool:
        """Have a read wait for its data. False: it takes the general way."""
        holdings = self._holdings
        about = (event, perf_counter_ns())
        if holdings.full or not self._bring(event.offset, event.length, self._told, about):
            return False
        holdings.begin(REQUEST_COST, event, False)
        return True

    def finish(self) -> None:
        """A read is answered, or takes the general way."""
        self._holdings.finish(REQUEST_COST)

    def drop(self) -> None:
        """Nobody wants the answers any more."""
        for _ in self.arrived:
            self.finish()
        self.arrived.clear()

    def _told(self, about: tuple[Read, int], what: int) -> None:
        self.arrived.append((*about, what))
        self._proceed()
