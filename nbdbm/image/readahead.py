"""Small reads that miss the page cache: many wait for the disk at the same time, few threads do.

    miss -> the kernel is told to fetch the range, and does so by itself (POSIX_FADV_WILLNEED)
         -> the oldest reads get a thread each, which waits for the disk and so says when something has come
    something has come -> those behind are tried again, most are there; the next oldest get the threads
    nothing has come for some milliseconds -> everything that still waits gets a thread

A thread for each read would do as well for the disk, but waking it and taking its result back costs several
times what the kernel's call does: with 32 reads under way the event loop had time for nothing else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from nbdbm.image.threads import in_thread

LARGEST = 64 * 1024
"""Bytes; a larger read is worth a thread."""

WATCHERS = 2
"""Reads that have a thread while others wait. Of one alone a single slow sector would hold up all others."""

PATIENCE = 0.003
"""Seconds; then whatever still waits gets a thread, where the disk is slow or the kernel fetches nothing."""

MISSES = 4
"""Reads tried again in vain before the rest is left for later: the disk answers nearly in order."""

AT_ONCE = 4
"""Reads ended in one turn of the event loop: what each of them sets off takes tens of microseconds."""


class Source(Protocol):
    """What misses are read from."""

    def read_now(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` from the page cache; return how many bytes of it, from its start, are filled."""

    def read_waiting(self, view: memoryview, offset: int) -> None:
        """Fill ``view``, in a thread. Raises OSError."""

    def fetch(self, offset: int, length: int) -> None:
        """Tell the kernel to have the range in the page cache soon. Does not fail."""


class _Read:
    """One read that waits."""

    __slots__ = ("done", "offset", "since", "threaded", "view")

    def __init__(self, view: memoryview, offset: int, loop: asyncio.AbstractEventLoop) -> None:
        self.view = view
        self.offset = offset
        self.done: asyncio.Future[None] = loop.create_future()
        self.since = loop.time()
        self.threaded = False


class ReadAhead:
    """The reads of one file that wait for the disk."""

    __slots__ = ("_looking", "_source", "_tasks", "_timer", "_waiting")

    def __init__(self, source: Source) -> None:
        self._source = source
        self._waiting: deque[_Read] = deque()
        """Without a thread, the oldest first."""
        self._tasks: set[asyncio.Task[None]] = set()
        """Those with a thread."""
        self._looking = False
        """``_look`` is about to be called."""
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, view: memoryview, offset: int) -> None:
        """Fill ``view``, at most LARGEST bytes, which is not used any more when this returns or raises.

        Raises:
            OSError: the host's.
        """
        self._source.fetch(offset, len(view))
        read = _Read(view, offset, asyncio.get_running_loop())
        self._waiting.append(read)
        self._watch()
        try:
            await asyncio.shield(read.done)
        except asyncio.CancelledError:
            if read.threaded:
                while not read.done.done():
                    try:
                        await asyncio.wait((read.done,))
                    except asyncio.CancelledError:
                        continue
                read.done.exception()
            elif not read.done.done():
                self._waiting.remove(read)
            raise

    def _watch(self) -> None:
        """See to it that somebody notices when something has come."""
        while self._waiting and len(self._tasks) < WATCHERS:
            self._give_thread(self._waiting.popleft())
        if self._waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._expired)

    def _give_thread(self, read: _Read) -> None:
        read.threaded = True
        task = asyncio.get_running_loop().create_task(self._in_thread(read))
        self._tasks.add(task)

    async def _in_thread(self, read: _Read) -> None:
        try:
            await in_thread(self._source.read_waiting, read.view, read.offset)
        except BaseException as error:
            read.done.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            read.done.set_result(None)
        finally:
            self._tasks.discard(asyncio.current_task())
            self._look_soon()
            self._watch()

    def _look(self) -> None:
        """Try those that wait again, until the disk seems to have come no further."""
        self._looking = False
        missed: list[_Read] = []
        come = 0
        while self._waiting and len(missed) < MISSES:
            if come == AT_ONCE:
                self._look_soon()
                break
            read = self._waiting.popleft()
            if self._source.read_now(read.view, read.offset) == len(read.view):
                read.done.set_result(None)
                come += 1
            else:
                missed.append(read)
        self._waiting.extendleft(reversed(missed))

    def _look_soon(self) -> None:
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._look)

    def _expired(self) -> None:
        self._timer = None
        self._look()
        patient = asyncio.get_running_loop().time() - PATIENCE
        while self._waiting and self._waiting[0].since <= patient:
            self._give_thread(self._waiting.popleft())
        self._watch()
