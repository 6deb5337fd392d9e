"""What a connection holds: every byte taken is given back once, and the limits hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nbdbm.nbd.constants import CmdFlag
from nbdbm.nbd.events import Command, Read, Write
from nbdbm.peer import UNKNOWN
from nbdbm.server import holdings
from nbdbm.server.budget import SMALL, Budget
from nbdbm.server.buffers import BufferPool
from nbdbm.server.holdings import Holdings
from tests.server.running import run

MIB = 1 << 20
NONE = CmdFlag(0)
READ: Command = Read(1, 0, 4096, NONE)


class Waiting:
    """Counts how often it was told to proceed."""

    peer = UNKNOWN
    behind_since = None

    def __init__(self) -> None:
        self.told = 0

    def proceed(self) -> None:
        self.told += 1

    def cut_off(self, why: str) -> None:
        raise AssertionError(why)


def write(length: int) -> Command:
    return Write(2, 0, memoryview(bytes(length)), NONE)


@contextmanager
def account(limit: int = 100 * MIB) -> Iterator[tuple[Holdings, Budget, Waiting]]:
    """One connection's, and that of all; in the end nothing may be held."""
    claimant = Waiting()
    budget = Budget(lambda: [claimant], limit)
    held = Holdings(budget, BufferPool(), claimant)
    yield held, budget, claimant
    assert (held.bytes, held.answered, held.running, budget.used) == (0, 0, 0, 0)
    assert not held.payload and held.sent == []
    held.await_nothing()


def test_a_command_is_held_until_its_reply_has_left() -> None:
    async def main() -> None:
        with account() as (held, budget, _):
            held.begin(5000, READ, False)
            assert (held.running, held.bytes, held.answered, budget.used) == (1, 5000, 0, 5000)
            held.finish(5000)
            assert (held.running, held.bytes, held.answered, budget.used) == (0, 5000, 5000, 5000)
            held.begin(70, READ, False)
            held.release()
            assert (held.running, held.bytes, held.answered, budget.used) == (1, 70, 0, 70)
            held.finish(70)
            held.release()

    run(main)


def test_buffers_go_back_when_replies_have_left() -> None:
    async def main() -> None:
        pool = BufferPool()
        held = Holdings(Budget(list), pool, Waiting())
        held.sent.append(pool.take(MIB))
        assert pool.kept == 0
        held.release()
        assert pool.kept == MIB and held.sent == []

    run(main)


def test_requests_and_bytes_of_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdings, "MAX_REQUESTS", 2)
    monkeypatch.setattr(holdings, "MAX_BYTES", 1000)

    async def main() -> None:
        with account() as (held, _, _):
            assert held.may_begin(10**7, READ, False), "a single one always may"
            held.begin(600, READ, False)
            assert held.may_begin(400, READ, False) and not held.may_begin(401, READ, False)
            assert not held.full
            held.begin(10, READ, False)
            assert held.full and not held.may_begin(10, READ, False)
            held.finish(10)
            assert not held.full and held.may_begin(10, READ, False)
            held.finish(600)
            assert not held.may_begin(391, READ, False), "unsent replies count"
            held.release()
            assert held.may_begin(391, READ, False)

    run(main)


def test_a_small_command_of_one_that_has_nothing_needs_no_room() -> None:
    async def main() -> None:
        with account(MIB) as (held, budget, claimant):
            budget.take(MIB)
            assert held.may_begin(SMALL, READ, False)
            held.begin(SMALL, READ, False)
            assert not held.may_begin(1, READ, False)
            held.finish(SMALL)
            held.release()
            assert not held.may_begin(SMALL + 1, READ, False)
            assert claimant.told == 0
            budget.give(MIB)
            assert claimant.told == 1

    run(main)


def test_nothing_is_awaited_any_more() -> None:
    async def main() -> None:
        with account(MIB) as (held, budget, claimant):
            budget.take(MIB)
            held.await_room(MIB)
            held.await_nothing()
            budget.give(MIB)
            assert claimant.told == 0

    run(main)


def test_a_payload_is_part_of_its_commands_price() -> None:
    async def main() -> None:
        with account(3 * MIB) as (held, budget, _):
            assert held.payload_buffer(2 * MIB) is not None
            assert held.payload and budget.used == 2 * MIB and held.behind_since is not None
            price = 2 * MIB + 512
            # As long as it comes in, another command is no reason to count it less.
            assert not held.may_begin(price, write(2 * MIB), True)
            assert held.may_begin(price, write(2 * MIB), False)
            assert not held.may_begin(price, write(2 * MIB - 1), False), "not its payload"
            held.begin(price, write(2 * MIB), False)
            assert not held.payload and budget.used == price
            held.finish(price)
            held.release()
            assert held.behind_since is None

    run(main)


def test_a_payload_waits_for_room() -> None:
    async def main() -> None:
        with account(MIB) as (held, budget, _):
            budget.take(1)
            assert held.payload_buffer(MIB) is None and budget.used == 1
            budget.give(1)
            assert held.has_room(2 * MIB), "whatever it is, if nobody holds anything"
            assert held.payload_buffer(2 * MIB) is not None
            held.drop_payload()
            held.drop_payload()

    run(main)


def test_replies_left_over_of_the_fast_path() -> None:
    async def main() -> None:
        with account() as (held, budget, _):
            held.queue(3000)
            assert (held.running, held.bytes, held.answered, budget.used) == (0, 3000, 3000, 3000)
            since = held.behind_since
            assert since is not None
            held.fall_behind()
            assert held.behind_since == since, "since the first of them"
            held.release()
            assert held.behind_since is None

    run(main)
