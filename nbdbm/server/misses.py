"""Reads of one connection that have missed the page cache, until their data has come.

No task, no buffer: a read that waits is its event and nothing more, and once its data is in the page cache it
is done as if it came only then (fastpath.py). So what was written and acknowledged meanwhile, it sees.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import perf_counter_ns
from typing import Protocol

from nbdbm.exports import Export
from nbdbm.nbd.events import Read
from nbdbm.server.dispatch import REQUEST_COST
from nbdbm.server.holdings import Holdings

CALM_AFTER = 200_000
"""Nanoseconds after which a client that had its answer from the page cache is taken to ask no more: several
times what one takes that sends its next request at once."""

ONE_ONLY = 200_000
"""Nanoseconds that one client alone must have asked for it to be awaited awake: of several, others would wait
for the one who is."""

PATIENCE = 900_000
"""Nanoseconds for which reads whose data has come are not answered for want of calm. They have waited as long
for their disk, and are then answered many at a time, which takes half the processor time of two at a time.
Measured on two processors, a client at depth 1 whose reads hit beside one at depth 32 whose reads miss:
without this 5 000 reads a second and 64 000; waiting in turns of the event loop 14 000 and 27 000; awake, as
here, 19 000 and 21 000 (qemu-nbd with io_uring: 15 000 and 28 000, or 19 000 and 21 000)."""


class Asker(Protocol):
    """A client who is answered at once."""

    def look(self) -> None:
        """Stay awake for its next requests, for a moment."""


class Calm:
    """Whether clients ask for what is there already; one for all connections of a server.

    Such a client waits for each answer before it asks again, while the disk brings more and more for the
    others: answered as it comes, that would keep the processor busy all the time.
    """

    __slots__ = ("_asker", "_since", "asked")

    def __init__(self) -> None:
        self.asked = 0
        """When something was last answered at once, nanoseconds."""
        self._asker: Asker | None = None
        """Whose request that was, if we can stay awake for the next one."""
        self._since = 0
        """From when on nobody else was answered so, nanoseconds."""

    def answered(self, asker: Asker | None, now: int) -> None:
        """Something was answered at once, just now (nanoseconds)."""
        self.asked = now
        if asker is not self._asker:
            self._asker, self._since = asker, now

    def left(self, asker: Asker) -> None:
        """It will not ask any more."""
        if asker is self._asker:
            self._asker = None

    def pass_time(self) -> None:
        """There is nothing to do but to wait for calm: look after the one who asks, if only one does."""
        if self._asker is not None and self.asked - self._since >= ONE_ONLY:
            self._asker.look()

    def reigns(self, since: int) -> bool:
        """Whether nobody is to be let go first by those who have waited since then (nanoseconds)."""
        now = perf_counter_ns()
        return now - self.asked >= CALM_AFTER or now - since >= PATIENCE


class Misses:
    """What waits, and what waits no more.

    Args:
        calm: of the server; while it does not reign, ``arrived`` is left alone where there are other clients.
        holdings: where these reads are counted as commands in progress: while one is, the connection holds
            its export, even if the client has left.
        proceed: called, at some later time, whenever there is something in ``arrived``.
    """

    __slots__ = ("_bring", "_holdings", "_proceed", "arrived", "awaited_since", "calm")

    def __init__(self, export: Export, holdings: Holdings, calm: Calm, proceed: Callable[[], None]) -> None:
        self._bring = export.bring
        self._holdings = holdings
        self._proceed = proceed
        self.calm = calm
        self.awaited_since = 0
        """Since when ``arrived`` waits for calm, nanoseconds; 0: it does not."""
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

    def await_calm(self, loop: asyncio.AbstractEventLoop, then: Callable[[], None]) -> None:
        """Let those have their turns who ask for what was there, then call ``then``; once for all calls."""
        if not self.awaited_since:
            self.awaited_since = perf_counter_ns()
            loop.call_soon(self._look, loop, then)

    def _look(self, loop: asyncio.AbstractEventLoop, then: Callable[[], None]) -> None:
        if self.arrived and not self.calm.reigns(self.awaited_since):
            loop.call_soon(self._look, loop, then)
            self.calm.pass_time()
            return
        self.awaited_since = 0
        then()

    def _told(self, about: tuple[Read, int], what: int) -> None:
        self.arrived.append((*about, what))
        self._proceed()
