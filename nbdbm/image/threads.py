"""Threads for calls that block: for disks that answer late, and for work that takes processors long.

    loop     in_thread -> queue                    deliver: every result that is there, in one turn
    threads              call ... call -> results -> wake the loop, unless it has been woken already

A pool of our own, since concurrent.futures with asyncio around it takes three times as long for each call and
wakes the loop for each result: a client whose reads miss the page cache kept everybody else waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

IO_THREADS = 64
"""Calls of one process that wait for disks at the same time, as in QEMU: two connections of depth 32 keep a
disk as busy as they can. Threads are started when there is something to do for them."""

AT_ONCE = 8
"""Results delivered in one turn of the event loop: what each sets off takes tens of microseconds, and others
are to have their turns between."""


class _Job(Generic[T]):
    """One call, and who waits for its end."""

    __slots__ = ("args", "delivered", "delivery", "error", "free", "function", "future", "pool", "result")

    def __init__(
        self, pool: Pool, function: Callable[..., T], args: tuple[Any, ...], delivery: _Delivery
    ) -> None:
        self.pool = pool
        self.function = function
        self.args = args
        self.delivery = delivery
        self.future: asyncio.Future[T] = delivery.loop.create_future()
        self.free = [True]
        """Popped by whoever is first: the thread that carries it out, or the waiter that is cancelled."""
        self.result: T | None = None
        self.error: BaseException | None = None
        self.delivered = False

    def run(self) -> None:
        """In a thread: carry it out if it is still wanted."""
        try:
            self.free.pop()
        except IndexError:
            return
        try:
            self.result = self.function(*self.args)
        except BaseException as error:
            self.error = error
        self.delivery.done(self)


class _Delivery:
    """Brings results from threads to one event loop."""

    __slots__ = ("_results", "_woken", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._results: deque[_Job[Any]] = deque()
        self._woken = False

    def done(self, job: _Job[Any]) -> None:
        """In a thread: a job has ended."""
        self._results.append(job)
        if not self._woken:
            # Several threads may come here at once; a vain wake-up does no harm.
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First: what comes from now on wakes us again.
        self._woken = False
        for _ in range(AT_ONCE):
            if not self._results:
                return
            job = self._results.popleft()
            job.delivered = True
            job.pool.outstanding -= 1
            if job.future.done():
                continue  # its waiter was cancelled, and looks at ``delivered`` before it waits again
            if job.error is not None:
                job.future.set_exception(job.error)
                job.error = None  # its traceback leads back to the job
            else:
                job.future.set_result(job.result)
        if self._results and not self._woken:
            self._woken = True
            self.loop.call_soon(self._deliver)


class Pool:
    """At most ``limit`` threads. They end with the process: whoever gave them work has waited for its end."""

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        self.outstanding = 0
        """Jobs handed over and not delivered. With loops in several threads a guess, which is enough."""
        self._threads = 0
        self._jobs: SimpleQueue[_Job[Any]] = SimpleQueue()

    def submit(self, job: _Job[Any]) -> None:
        """Have a thread carry out ``job``."""
        self.outstanding += 1
        if self.outstanding > self._threads < self._limit:
            self._threads += 1
            threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            # No name holds on to the job while this waits for the next one.
            self._jobs.get().run()


POOL = Pool(IO_THREADS, "nbdbm-io")
"""For calls that wait for disks."""

_delivery: _Delivery | None = None


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Run a call that may wait for a disk in a thread, see ``in_pool``."""
    return await in_pool(POOL, function, *args)


async def in_pool(pool: Pool, function: Callable[..., T], *args: Any) -> T:
    """Run a call in a thread of ``pool``.

    Cancellation waits until the call has ended: a thread may be filling a buffer whose owner would
    otherwise give it to somebody else.
    """
    global _delivery
    loop = asyncio.get_running_loop()
    delivery = _delivery
    if delivery is None or delivery.loop is not loop:
        delivery = _delivery = _Delivery(loop)
    job = _Job(pool, function, args, delivery)
    pool.submit(job)
    try:
        return await job.future
    except asyncio.CancelledError:
        try:
            job.free.pop()
        except IndexError:
            await _end_of(job)
        else:
            pool.outstanding -= 1
        raise


async def _end_of(job: _Job[Any]) -> None:
    """Wait for the end of a job that a thread has begun and whose waiter is cancelled, however often."""
    if job.delivered:
        return
    job.future = ended = job.delivery.loop.create_future()
    while not ended.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((ended,))
    ended.exception()
