"""Staying awake for the next request of a client that sends one at a time.

To sleep until a request comes and be woken takes longer than to answer it from memory. So after an answer
the socket is asked again for some microseconds, if the request before came as soon as that:

    request ... answer | asked again: the next is here ... answer | asked again, nothing: sleep

A client that takes its time is met asleep, and costs nothing; one that is gone costs one vain wait. One that
sends many at a time is not waited for, but what it has sent meanwhile is taken without going to sleep.

With more clients than one nobody is awaited so, but where all others wait for calm (misses.py).
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable

NEAR = 2
"""How many times the limit a request may take to arrive asleep for the next to be awaited awake: being woken
takes up to as long as the limit itself."""

TURN = 0.001
"""Seconds awake before the event loop gets its turn: other clients, signals and timers wait no longer."""

LOOK = 0.0002
"""The same while there are other clients: as long as a few requests take."""


class BusyPoll:
    """Awaits the next request of one connection awake.

    ``begin`` after a request that came through the event loop, then ``receive`` until it returns 0; if it is
    ``going_on`` then, the event loop gets its turn, and ``resume`` begins the next one.

    Args:
        sock: non-blocking, without TLS.
        limit: seconds that are waited for one request.
    """

    __slots__ = ("_clock", "_limit", "_receive", "_slept", "_turn_ends", "going_on")

    def __init__(
        self, sock: socket.socket, limit: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._receive = sock.recv_into
        self._limit = limit
        self._clock = clock
        self._slept = float("-inf")
        """When it was last given up."""
        self._turn_ends = 0.0
        self.going_on = False
        """Requests come so fast that the next one is to be awaited awake."""

    def begin(self) -> bool:
        """A request that woke us is answered: whether to call ``receive`` for the next one."""
        if self.going_on:
            return False  # it came during the event loop's turn: ``resume`` follows
        now = self._clock()
        self.going_on = now - self._slept <= NEAR * self._limit
        self._slept = now
        self._turn_ends = now + TURN
        return self.going_on

    def resume(self, turn: float = TURN) -> None:
        """The event loop has had its turn; the next comes in ``turn`` seconds."""
        self._turn_ends = self._clock() + turn

    def receive(self, get_buffer: Callable[[], memoryview]) -> int:
        """Receive into ``get_buffer()`` if something comes within the limit and the turn; else 0.

        What the client's end or an error was is left to the transport, which meets it again.
        """
        receive, clock = self._receive, self._clock
        buffer = get_buffer()
        began = now = clock()
        while now - began <= self._limit:
            if now >= self._turn_ends:
                return 0
            try:
                count = receive(buffer)
            except BlockingIOError:
                # The client may want this very processor.
                os.sched_yield()
                now = clock()
                continue
            except OSError:
                break
            if count:
                return count
            break
        self.stop()
        return 0

    def receive_now(self, get_buffer: Callable[[], memoryview]) -> int:
        """Receive what is there, if the turn is not over; else 0. As ``receive``, without waiting."""
        if self._clock() >= self._turn_ends:
            return 0
        try:
            return self._receive(get_buffer())
        except OSError:
            return 0

    def stop(self) -> None:
        """Nothing came, or nobody is to be waited for awake: sleep."""
        self.going_on = False
        self._slept = self._clock()


class Awake:
    """Goes on with one connection past the event loop, while that does not hold up anybody else.

    Args:
        poll: asks the socket.
        get_buffer: where the next bytes belong.
        serve: acts on so many received bytes; how many requests that were if all of them are answered and
            sent and nothing else is to be done for the connection, else less than 0.
        may: whether there is nothing to do for the connection but to wait, and nobody else has to wait for
            the event loop meanwhile; called with True where others do not mind.
        failed: ends the connection after an exception (a bug) that nobody else would notice.
    """

    __slots__ = ("_failed", "_get_buffer", "_loop", "_may", "_poll", "_serve")

    def __init__(
        self,
        poll: BusyPoll,
        get_buffer: Callable[[], memoryview],
        serve: Callable[[int], int],
        may: Callable[[bool], bool],
        failed: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._poll = poll
        self._get_buffer = get_buffer
        self._serve = serve
        self._may = may
        self._failed = failed

    def go_on(self, served: int) -> None:
        """So many requests have just been answered in a turn of the event loop, and nothing is left to do."""
        if not self._may(False):
            return
        if served > 1:
            self._take_more()
        elif self._poll.begin():
            self._stay()

    def look(self) -> None:
        """Everybody else waits for something else: stay awake for this client for a moment."""
        if not self._may(True):
            return
        self._poll.resume(LOOK)
        self._guarded(self._answer_ones)

    def _take_more(self) -> None:
        """Answer what has come while the requests before it were answered."""
        self._poll.resume()
        while count := self._poll.receive_now(self._get_buffer):
            if self._serve(count) < 0:
                return

    def _stay(self) -> None:
        """Answer requests that come one by one without going back to the event loop for each."""
        self._answer_ones()
        if self._poll.going_on:
            self._loop.call_soon(self._stay_on)

    def _answer_ones(self) -> None:
        poll = self._poll
        while count := poll.receive(self._get_buffer):
            if not 0 <= self._serve(count) <= 1:
                # It waits for something, or several came at once: this client need not be waited for.
                poll.stop()
                return

    def _stay_on(self) -> None:
        """The event loop has looked after everybody else, without sleeping."""
        if not self._may(False):
            self._poll.stop()
            return
        self._poll.resume()
        self._guarded(self._stay)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:
            # Where the transport has called us it ends the connection.
            self._failed()
            raise


def processors() -> int:
    """How many processors we may run on; with one, staying awake would only keep the client from running."""
    return len(os.sched_getaffinity(0))
