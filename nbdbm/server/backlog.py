"""The general way of one connection: commands wait until the limits allow them, then each is begun.

    add  ->  waiting  ->  begin  ->  answered at once
                                 ->  a task, if it has to wait for something  ->  finished

Tasks are never cancelled while the loop lives: a command that has begun may be changing metadata.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial

from nbdbm.inline import run_inline
from nbdbm.nbd.events import Command
from nbdbm.server.dispatch import Context, answer, cost
from nbdbm.server.holdings import Holdings
from nbdbm.server.outbox import Outbox

log = logging.getLogger(__name__)

BATCH_BYTES = 256 * 1024
"""Replies gathered before they are sent, bytes: further commands start when these are on their way, so the
client works on the one while we work on the other, and other connections get their turn. Of 1 MiB, four
reads of 256 KiB were served at half the rate, since client and server took turns."""


class Backlog:
    """Commands that were taken from the client and have not been answered yet.

    Args:
        holdings: what the connection holds, where each command is counted from its beginning to its end.
        outbox: nothing begins while the client does not take what it holds.
        finished: called when a command has ended that had to wait.
        failed: called before that if it ended by an exception (a bug).
    """

    __slots__ = ("_failed", "_finished", "_holdings", "_loop", "_outbox", "_tasks", "context", "waiting")

    def __init__(
        self,
        holdings: Holdings,
        outbox: Outbox,
        finished: Callable[[], None],
        failed: Callable[[], None],
    ) -> None:
        self.context: Context | None = None
        """What handlers work with, once there is an export."""
        self.waiting: deque[tuple[int, Command]] = deque()
        """Commands not begun yet, each with its cost: what one receive brought beyond the limits."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._holdings = holdings
        self._outbox = outbox
        self._finished = finished
        self._failed = failed
        self._loop = asyncio.get_running_loop()

    def add(self, command: Command) -> None:
        """Have it begun after those that wait."""
        self.waiting.append((cost(command), command))

    def take_back(self) -> list[Command]:
        """Those that wait; they will not be begun."""
        commands = [command for _, command in self.waiting]
        self.waiting.clear()
        return commands

    def may_begin(self, receiving: bool) -> bool:
        """Whether the next one waits for nothing but its turn. ``receiving``: see ``Holdings.may_begin``."""
        return bool(self.waiting) and self._may(*self.waiting[0], receiving)

    def _may(self, price: int, command: Command, receiving: bool) -> bool:
        return not self._outbox.blocked and self._holdings.may_begin(price, command, receiving)

    def begin(self, most: int, receiving: bool) -> None:
        """Begin as many as the limits allow, ``most`` of them at most, or BATCH_BYTES."""
        waiting, holdings = self.waiting, self._holdings
        queued = holdings.answered
        begun = 0
        while (
            waiting
            and begun < most
            and holdings.answered - queued < BATCH_BYTES
            and self._may(*waiting[0], receiving)
        ):
            assert self.context is not None  # commands follow a GO
            price, command = waiting.popleft()
            begun += 1
            holdings.begin(price, command, receiving)
            try:
                task = run_inline(answer(command, self.context), self._loop)
            except BaseException:
                # A bug: this connection ends, its accounts must not keep it alive.
                holdings.finish(price)
                raise
            if task is None:
                holdings.finish(price)
            else:
                self._tasks.add(task)
                task.add_done_callback(partial(self._ended, price))

    def _ended(self, price: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._holdings.finish(price)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a request's task failed", exc_info=error)
            self._failed()
        self._finished()
