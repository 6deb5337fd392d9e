"""Backlog: what waits is begun in order and within the limits, and each command is accounted for once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from nbdbm.nbd.constants import CmdFlag
from nbdbm.nbd.events import Read
from nbdbm.peer import UNKNOWN
from nbdbm.server import backlog as backlog_module
from nbdbm.server.backlog import BATCH_BYTES, Backlog
from nbdbm.server.budget import Budget
from nbdbm.server.buffers import BufferPool
from nbdbm.server.dispatch import Context, cost
from nbdbm.server.holdings import MAX_REQUESTS, Holdings
from nbdbm.server.outbox import Outbox
from tests.server.running import run

CONTEXT = cast(Context, object())
"""What the handlers get; here nobody looks into it."""


class Connection:
    """Who owns the backlog. Replaces the handlers: a command with an odd cookie waits for ``gate``."""

    peer = UNKNOWN
    behind_since = None

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []
        self.log: list[str] = []
        self.gate = asyncio.Event()
        self.bug: BaseException | None = None
        self.outbox = Outbox(None)
        self.holdings = Holdings(Budget(lambda: [self], 1 << 30), BufferPool(), self)
        self.backlog = Backlog(
            self.holdings, self.outbox, lambda: self.log.append("finished"), lambda: self.log.append("failed")
        )
        self.backlog.context = CONTEXT
        monkeypatch.setattr(backlog_module, "answer", self._answer)

    async def _answer(self, command: Any, context: Context) -> None:
        assert context is CONTEXT
        self.begun.append(command.cookie)
        if command.cookie % 2:
            await self.gate.wait()
        if self.bug is not None:
            raise self.bug

    def proceed(self) -> None:
        self.log.append("proceed")

    def cut_off(self, why: str) -> None:
        raise AssertionError(why)

    def ask(self, *cookies: int, length: int = 4096) -> None:
        for cookie in cookies:
            self.backlog.add(Read(cookie, 0, length, CmdFlag(0)))


@asynccontextmanager
async def connection(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Connection]:
    one = Connection(monkeypatch)
    yield one
    one.gate.set()
    while one.holdings.running:  # noqa: ASYNC110  what is waited for has no event
        await asyncio.sleep(0)
    one.holdings.release()
    assert one.holdings.bytes == 0


def test_commands_begin_in_order_and_only_some_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with connection(monkeypatch) as one:
            one.ask(2, 1, 4, 6)
            one.backlog.begin(3, False)
            await asyncio.sleep(0)
            assert one.begun == [2, 1, 4] and one.holdings.running == 1 and one.log == []
            assert len(one.backlog.waiting) == 1 and one.backlog.may_begin(False)
            one.backlog.begin(3, False)
            assert one.begun[-1] == 6 and not one.backlog.may_begin(False)
            one.gate.set()
            await asyncio.sleep(0.01)
            assert one.log == ["finished"] and one.holdings.running == 0
            assert one.holdings.answered == one.holdings.bytes == 4 * cost(Read(0, 0, 4096, CmdFlag(0)))

    run(main)


def test_limits_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with connection(monkeypatch) as one:
            one.ask(*range(1, 2 * MAX_REQUESTS + 9, 2))
            one.backlog.begin(1000, False)
            await asyncio.sleep(0)
            assert len(one.begun) == MAX_REQUESTS and not one.backlog.may_begin(False)
            one.gate.set()
            await asyncio.sleep(0.01)
            assert one.log == ["finished"] * MAX_REQUESTS
            one.backlog.begin(1000, False)
            assert len(one.begun) == MAX_REQUESTS + 4

    run(main)


def test_replies_leave_before_more_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with connection(monkeypatch) as one:
            one.ask(*range(0, 20, 2), length=BATCH_BYTES // 2)
            one.backlog.begin(1000, False)
            assert one.begun == [0, 2]
            one.outbox.blocked = True
            one.backlog.begin(1000, False)
            assert one.begun == [0, 2] and not one.backlog.may_begin(False)
            one.outbox.blocked = False
            one.holdings.release()
            one.backlog.begin(1000, False)
            assert one.begun == [0, 2, 4, 6]
            assert [command.cookie for command in one.backlog.take_back()] == list(range(8, 20, 2))
            assert not one.backlog.waiting and not one.backlog.may_begin(False)

    run(main)


@pytest.mark.parametrize("cookie", [0, 1])
def test_a_bug_leaves_no_command_behind(
    cookie: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with connection(monkeypatch) as one:
            one.bug = ZeroDivisionError("here")
            one.ask(cookie)
            if cookie == 0:
                # The transport that has called us ends the connection.
                with pytest.raises(ZeroDivisionError):
                    one.backlog.begin(1, False)
                return
            one.backlog.begin(1, False)
            one.gate.set()
            await asyncio.sleep(0.01)
            assert one.log == ["failed", "finished"] and one.holdings.running == 0
            assert [record.levelno for record in caplog.records] == [logging.ERROR]

    run(main)
