"""Staying awake for the next request of a client that sends one at a time.

To sleep until a request comes and be woken takes longer than to answer it from memory. So after an answer
the socket is asked again for some microseconds, if the request before came as soon as that:

    request ... answer | asked again: the next is here ... answer | asked again, nothing: sleep

A client that takes its time is met asleep, and costs nothing; one that is gone costs one vain wait. One that
sends many at a time is not waited for, but what it has sent meanwhile is taken without going to sleep.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

NEAR = 2
"""How many times the limit a request may take to arrive asleep for the next to be awaited awake: being woken
takes up to as long as the limit itself."""

TURN = 0.001
"""Seconds awake before the event loop gets its turn: other clients, signals and timers wait no longer."""


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

    def resume(self) -> None:
        """The event loop has had its turn."""
        self._turn_ends = self._clock() + TURN

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


def processors() -> int:
    """How many processors we may run on; with one, staying awake would only keep the client from running."""
    return len(os.sched_getaffinity(0))
