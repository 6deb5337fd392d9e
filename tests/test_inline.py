"""A coroutine runs without a task until it waits, and as in a task afterwards."""

from __future__ import annotations

import asyncio

import pytest

from nbdbm.inline import run_inline


def test_done_at_once() -> None:
    async def main() -> None:
        steps: list[int] = []

        async def work() -> None:
            steps.append(1)

        assert run_inline(work(), asyncio.get_running_loop()) is None
        assert steps == [1]

    asyncio.run(main())


def test_raises_at_once() -> None:
    async def main() -> None:
        async def work() -> None:
            raise ValueError("now")

        with pytest.raises(ValueError, match="now"):
            run_inline(work(), asyncio.get_running_loop())

    asyncio.run(main())


def test_waits_for_a_future() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        steps: list[object] = []
        future: asyncio.Future[str] = loop.create_future()

        async def work() -> None:
            steps.append("begun")
            steps.append(await future)
            await asyncio.sleep(0)
            assert asyncio.current_task() is task

        task = run_inline(work(), loop)
        assert task is not None and steps == ["begun"]
        await asyncio.sleep(0)
        future.set_result("result")
        await task
        assert steps == ["begun", "result"]

    asyncio.run(main())


def test_yields_first() -> None:
    async def main() -> None:
        async def work() -> None:
            await asyncio.sleep(0)
            await asyncio.to_thread(lambda: None)

        task = run_inline(work(), asyncio.get_running_loop())
        assert task is not None
        await task

    asyncio.run(main())


def test_failure_of_what_is_waited_for() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        seen: list[str] = []

        async def work() -> None:
            try:
                await future
            except OSError as error:
                seen.append(str(error))
                raise ValueError("later") from error

        task = run_inline(work(), loop)
        assert task is not None
        future.set_exception(OSError("broken"))
        with pytest.raises(ValueError, match="later"):
            await task
        assert seen == ["broken"]

    asyncio.run(main())


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_cancelled(turns: int) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        cleaned: list[bool] = []

        async def work() -> None:
            try:
                await loop.create_future()
            finally:
                cleaned.append(True)

        task = run_inline(work(), loop)
        assert task is not None
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cleaned == [True]

    asyncio.run(main())


def test_locks_work_from_the_first_step() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        lock = asyncio.Lock()
        order: list[int] = []

        async def work(number: int) -> None:
            async with lock:
                order.append(number)
                await asyncio.sleep(0)

        tasks = [run_inline(work(number), loop) for number in range(4)]
        await asyncio.gather(*(task for task in tasks if task is not None))
        assert order == [0, 1, 2, 3]

    asyncio.run(main())
