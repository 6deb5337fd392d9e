"""Coroutines that usually finish without waiting, run without a task until they do wait.

Most requests are answered from memory; a task for each would cost more than the request. Python 3.12 has
eager tasks for this, 3.11 does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any


def run_inline(
    coroutine: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop
) -> asyncio.Task[None] | None:
    """Run ``coroutine`` now up to its first wait; return a task that carries it on, or None if it is done.

    Exceptions before the first wait are raised here, later ones are the task's. Until its first wait the
    coroutine has no current task, so it must not begin with a TaskGroup or a timeout.
    """
    try:
        waiting = coroutine.send(None)
    except StopIteration:
        return None
    return loop.create_task(_Begun(coroutine, waiting))


class _Begun(Coroutine[Any, Any, None]):
    """A coroutine that is waiting for ``waiting`` already, in a shape that a task can begin with."""

    __slots__ = ("_begun", "_coroutine", "_waiting")

    def __init__(self, coroutine: Coroutine[Any, Any, None], waiting: Any) -> None:
        self._coroutine = coroutine
        self._waiting = waiting
        self._begun = False

    def send(self, value: Any) -> Any:
        if not self._begun:
            # The task's first step: let it wait for what the coroutine waits for.
            self._begun = True
            waiting, self._waiting = self._waiting, None
            return waiting
        return self._coroutine.send(value)

    def throw(
        self, typ: Any, val: BaseException | object | None = None, tb: TracebackType | None = None
    ) -> Any:
        self._begun = True
        # Tasks throw exception instances only.
        return self._coroutine.throw(typ)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Any:
        raise TypeError("already begun: only a task may carry it on")
