"""Blocking calls in threads: results and errors come back, and a cancelled waiter leaves no call behind."""

from __future__ import annotations

import asyncio
import errno
import threading
import time

import pytest

from nbdbm.image.threads import IO_THREADS, POOL, in_thread


def test_results_and_errors_come_out_of_the_thread() -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "full")

    async def run() -> None:
        assert await in_thread(divmod, 17, 5) == (3, 2)
        assert await in_thread(threading.get_ident) != threading.get_ident()
        with pytest.raises(OSError) as caught:
            await in_thread(fail)
        assert caught.value.errno == errno.ENOSPC

    for _ in range(2):  # one loop after the other
        asyncio.run(run())
    assert POOL.outstanding == 0


def test_many_at_once_and_no_more() -> None:
    running = most = 0
    guard = threading.Lock()
    full = threading.Event()

    def work(number: int) -> int:
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
            if running == IO_THREADS:
                full.set()
        full.wait(30)
        with guard:
            running -= 1
        return number

    async def run() -> None:
        count = 3 * IO_THREADS
        assert await asyncio.gather(*(in_thread(work, n) for n in range(count))) == list(range(count))

    asyncio.run(run())
    assert most == IO_THREADS
    assert POOL.outstanding == 0


def test_results_that_come_together_wake_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = threading.Barrier(8)
    woken: list[object] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(callback, *args):  # type: ignore[no-untyped-def]
            woken.append(callback)
            # All of them come while the loop is busy elsewhere.
            time.sleep(0.05)
            return wake(callback, *args)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        await asyncio.gather(*(in_thread(ready.wait) for _ in range(8)))

    asyncio.run(run())
    assert 1 <= len(woken) < 8


def test_cancellation_waits_for_the_thread() -> None:
    """The thread may be writing into the caller's buffer."""
    started, ended = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        time.sleep(0.1)
        ended.set()

    async def run() -> None:
        task = asyncio.ensure_future(in_thread(work))
        await asyncio.to_thread(started.wait)
        task.cancel()
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(run())
    assert POOL.outstanding == 0


def test_cancellation_when_the_result_is_there() -> None:
    """It was delivered in the very turn in which the waiter is cancelled: nothing else will come."""

    async def run() -> None:
        task = asyncio.ensure_future(in_thread(int))
        await asyncio.sleep(0)
        time.sleep(0.05)  # noqa: ASYNC251  the thread ends, and the loop does not hear of it
        asyncio.get_running_loop().call_soon(task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)

    asyncio.run(run())
    assert POOL.outstanding == 0


def test_cancellation_before_the_thread_begins() -> None:
    release = threading.Event()
    done: list[int] = []

    async def run() -> None:
        busy = [asyncio.ensure_future(in_thread(release.wait)) for _ in range(IO_THREADS)]
        late = asyncio.ensure_future(in_thread(done.append, 1))
        await asyncio.sleep(0.01)
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        release.set()
        await asyncio.gather(*busy)
        assert await in_thread(int) == 0

    asyncio.run(run())
    assert not done
    assert POOL.outstanding == 0


def test_a_loop_that_is_gone_is_not_missed() -> None:
    release = threading.Event()
    loop = asyncio.new_event_loop()
    task = loop.create_task(in_thread(release.wait))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    release.set()
    time.sleep(0.02)
    assert asyncio.run(in_thread(int)) == 0
    del task
    POOL.outstanding = 0  # its result was never delivered
