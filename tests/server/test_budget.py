"""The memory of all connections: the account, and clients that would have us hold more than there is."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from nbdbm.peer import UNKNOWN, Peer
from nbdbm.server import budget as budgets
from nbdbm.server.budget import SMALL, Budget
from tests.server.memimage import MemoryImage, WritableImage
from tests.server.rawclient import READ, WRITE, RawClient, request
from tests.server.running import connected, run, running, until

MIB = 1 << 20
CONTENT = bytes(range(256)) * (MIB // 64)
"""4 MiB: more than sockets hold."""


class Holder:
    """A connection that notes what it is told."""

    peer: Peer = UNKNOWN

    def __init__(self, behind_since: float | None = None) -> None:
        self.behind_since = behind_since
        self.told = 0
        self.aborted = False

    def proceed(self) -> None:
        self.told += 1

    def cut_off(self, why: str) -> None:
        self.aborted = True


class TestAccount:
    def test_room_is_given_in_order(self) -> None:
        async def main() -> None:
            budget = Budget(list, 100)
            budget.take(90)
            first, second, third = Holder(), Holder(), Holder()
            assert budget.has(10) and not budget.has(11)
            budget.wait(first, 50)
            budget.wait(second, 60)
            budget.wait(third, 5)
            budget.give(30)
            assert (first.told, second.told, third.told) == (0, 0, 0), "the first needs more"
            budget.give(10)
            assert (first.told, second.told, third.told) == (1, 0, 0), "the second is before the third"
            budget.forget(second)
            budget.give(1)
            assert (second.told, third.told) == (0, 1)

        asyncio.run(main())

    def test_what_exceeds_everything_may_go_alone(self) -> None:
        budget = Budget(list, 100)
        assert budget.has(1000)
        budget.take(1)
        assert not budget.has(1000) and not budget.exhausted
        budget.take(99)
        assert budget.exhausted

    def test_the_longest_holder_goes_if_somebody_waits_long(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(budgets, "PATIENCE", 0.05)
        monkeypatch.setattr(budgets, "LOOK_AGAIN", 0.01)

        async def main() -> None:
            now = asyncio.get_running_loop().time()
            fine, new, old = Holder(), Holder(now + 1000), Holder(now - 1)
            budget = Budget(lambda: [fine, new, old], 100)
            budget.take(100)
            await asyncio.sleep(0.1)
            assert not old.aborted, "nobody waits"
            waiter = Holder()
            budget.wait(waiter, 50)
            await asyncio.sleep(0.03)
            assert not old.aborted, "not for long yet"
            await until(lambda: old.aborted)
            assert not fine.aborted and not new.aborted
            budget.forget(waiter)

        asyncio.run(main())
        assert "unknown: cut off, others wait for the memory" in caplog.text


def test_clients_that_read_nothing_cannot_stop_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(budgets, "PATIENCE", 0.2)
    monkeypatch.setattr(budgets, "LOOK_AGAIN", 0.02)
    caplog.set_level(logging.WARNING)

    async def main() -> None:
        async with running(MemoryImage(CONTENT), tmp_path) as (server, path):
            server.budget.limit = 3 * len(CONTENT) + SMALL
            greedy = [await connected(path) for _ in range(6)]
            for client in greedy:
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
                for cookie in range(3):
                    client.send(request(READ, cookie, 0, len(CONTENT)))
            await until(lambda: server.budget.used >= 3 * len(CONTENT))
            honest = await connected(path)
            honest.read(1, 5, 100)
            assert (await honest.reply()).data == CONTENT[5:105], "small commands do not wait"
            honest.read(2, 0, len(CONTENT))
            assert (await honest.reply()).data == CONTENT, "once somebody was cut off"
            assert server.budget.used <= server.budget.limit + 7 * SMALL
            await honest.close()
            for client in greedy:
                client.writer.transport.abort()
            await until(lambda: server.connections == 0)
            assert server.budget.used == 0

    run(main)
    assert "cut off, others wait" in caplog.text


def write(cookie: int, offset: int, data: bytes) -> bytes:
    return request(WRITE, cookie, offset, len(data)) + data


def half_a_write(client: RawClient) -> None:
    """Its header, and the payload but for the last byte."""
    client.send(write(1, 0, b"h" * 2 * MIB)[:-1])


def test_payloads_that_are_never_finished_are_bounded_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "PATIENCE", 0.2)
    monkeypatch.setattr(budgets, "LOOK_AGAIN", 0.02)

    async def main() -> None:
        image = WritableImage(CONTENT)
        async with running(image, tmp_path) as (server, path):
            server.budget.limit = 2 * 2 * MIB + SMALL
            slow = [await connected(path) for _ in range(5)]
            for client in slow:
                half_a_write(client)
            await until(lambda: server.budget.used == 2 * 2 * MIB)
            honest = await connected(path)
            honest.send(write(7, MIB, b"n" * MIB))
            reply = await honest.reply()
            assert (reply.cookie, reply.error) == (7, 0), "once somebody was cut off"
            assert server.budget.used <= server.budget.limit
            await honest.close()
            for client in slow:
                client.writer.transport.abort()
            await until(lambda: server.connections == 0)
            assert server.budget.used == 0
        assert bytes(image.content[MIB : 2 * MIB]) == b"n" * MIB
        assert bytes(image.content[:MIB]) == CONTENT[:MIB]

    run(main)


def test_accounts_of_many_large_writes_come_out_even(tmp_path: Path) -> None:
    async def main() -> None:
        image = WritableImage(CONTENT)
        async with running(image, tmp_path) as (server, path):
            server.budget.limit = MIB + SMALL
            clients = [await connected(path) for _ in range(3)]
            for number, client in enumerate(clients):
                for cookie in range(8):
                    client.send(write(cookie, number * MIB, bytes([65 + number]) * MIB))
                    client.send(write(100 + cookie, 3 * MIB + number * 1000, b"s" * 1000))
            for client in clients:
                assert all(not reply.error for reply in (await client.replies(16)).values())
                await client.close()
            await until(lambda: server.connections == 0)
            assert server.budget.used == 0
        for number in range(3):
            assert image.content[number * MIB] == 65 + number

    run(main)


def test_the_end_of_the_server_while_a_payload_waits_for_memory(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(WritableImage(CONTENT), tmp_path) as (server, path):
            server.budget.limit = MIB
            first, second = await connected(path), await connected(path)
            first.send(write(1, 0, b"x" * MIB)[:-1])
            await until(lambda: server.budget.used == MIB)
            second.send(write(1, 0, b"y" * MIB))
            await asyncio.sleep(0.05)
            await asyncio.wait_for(server.close(), 20)
            for client in (first, second):
                await client.close()

    run(main)
