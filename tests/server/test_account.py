"""What is counted and said of each connection, over real sockets."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from nbdbm.config import ServerConfig
from nbdbm.metrics import Metrics, total
from nbdbm.peer import UNKNOWN, Peer
from nbdbm.server import account
from nbdbm.server.account import Account, Totals
from nbdbm.server.server import Server
from tests.server.memimage import MemoryImage, WritableImage
from tests.server.rawclient import (
    BLOCK_STATUS,
    CACHE,
    DISC,
    FLUSH,
    OPT_ABORT,
    OPT_STRUCTURED,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    request,
)
from tests.server.running import connected, run, running, until

KIB = 1024
ENDED = "ended"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """The fields of each line about a connection, so far."""
    caplog.set_level(logging.INFO, account.__name__)

    def fields() -> list[dict[str, Any]]:
        return [record.fields for record in caplog.records if hasattr(record, "fields")]

    return fields


async def gone(server: Server) -> None:
    await until(lambda: server.connections == 0)


def test_every_command_is_counted(tmp_path: Path) -> None:
    async def main() -> None:
        image = WritableImage(b"x" * 64 * KIB + bytes(64 * KIB), bitmaps={"b": []})
        async with running(image, tmp_path, name="disk") as (server, path):
            client = await RawClient.connect(path)
            await client.option(OPT_STRUCTURED)
            await client.select("base:allocation", name="disk")
            await client.go("disk")
            requests = {
                READ: (READ, 1, 0, 4 * KIB),
                WRITE_ZEROES: (WRITE_ZEROES, 2, 0, 8 * KIB),
                TRIM: (TRIM, 3, 0, 16 * KIB),
                FLUSH: (FLUSH, 4, 0, 0),
                CACHE: (CACHE, 5, 0, 32 * KIB),
                BLOCK_STATUS: (BLOCK_STATUS, 6, 0, 64 * KIB),
            }
            for each in requests.values():
                client.send(request(*each))
            client.send(request(WRITE, 7, 0, 512) + bytes(512))
            await client.replies(7)
            await client.close()
            await gone(server)
            (tally,) = server.metrics.exports.values()
            assert list(server.metrics.exports) == ["disk"]
            found = {name: (each.operations, each.bytes) for name, each in tally.commands.items()}
            assert found == {
                "read": (1, 4 * KIB),
                "write": (1, 512),
                "zero": (1, 8 * KIB),
                "trim": (1, 16 * KIB),
                "flush": (1, 0),
                "cache": (1, 32 * KIB),
                "status": (1, 0),
                "other": (0, 0),
            }
            assert all(sum(each.buckets) == each.operations for each in tally.commands.values())
            assert tally.errors == 0 and server.metrics.accepted == 1

    run(main)


def test_errors_by_command_and_kind(tmp_path: Path) -> None:
    async def main() -> None:
        image = MemoryImage(b"x" * 64 * KIB)
        image.failures[0] = OSError(errno.EIO, "broken")
        async with running(image, tmp_path) as (server, path):
            client = await connected(path)
            client.send(request(READ, 1, 0, 512))  # fails
            client.send(request(READ, 2, 64 * KIB, 512))  # past the end
            client.send(request(TRIM, 3, 0, 512))  # not on a read-only export
            client.send(request(77, 4, 0, 512))  # what is that?
            client.send(request(78, 5, 0, 512))
            await client.replies(5)
            await client.close()
            await gone(server)
            tally = server.metrics.export("")
            assert tally.commands["read"].errors == {"EIO": 1, "EINVAL": 1}
            assert tally.commands["read"].operations == 2 and tally.commands["read"].bytes == 0
            assert tally.commands["trim"].errors == {"EPERM": 1}
            assert tally.commands["other"].errors == {"EINVAL": 2}
            assert sum(tally.commands["read"].buckets) == 1  # the other one was not begun

    run(main)


def test_in_flight(tmp_path: Path) -> None:
    async def main() -> None:
        image = MemoryImage(b"x" * 64 * KIB)
        image.gate = asyncio.Event()
        async with running(image, tmp_path) as (server, path):
            client = await connected(path)
            for cookie in range(3):
                client.read(cookie, 0, 4 * KIB)
            (connection,) = server.clients
            await until(lambda: connection.running == 3)
            assert connection.held >= 12 * KIB
            image.gate.set()
            await client.replies(3)
            await until(lambda: not (connection.running or connection.held))
            await client.close()

    run(main)


def test_a_live_connection_counts_too(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(MemoryImage(b"x" * 64 * KIB), tmp_path) as (server, path):
            client = await connected(path)
            client.read(1, 0, 4 * KIB)
            await client.reply()
            (connection,) = server.clients
            assert connection.account.tally is not None
            assert total([connection.account.tally]).commands["read"].bytes == 4 * KIB
            assert connection.account.tally.at_once == 1 and server.metrics.exports == {}
            await client.close()
            await gone(server)
            assert server.metrics.export("").commands["read"].bytes == 4 * KIB

    run(main)


class TestHowItEnds:
    def test_goodbye(self, tmp_path: Path, lines: Any) -> None:
        async def main() -> None:
            async with running(MemoryImage(b"x" * 64 * KIB), tmp_path, name="disk") as (server, path):
                client = await RawClient.connect(path)
                await client.option(OPT_STRUCTURED)
                await client.select("base:allocation", name="disk")
                await client.go("disk")
                client.read(1, 0, 4 * KIB)
                await client.reply()
                client.send(request(DISC, 2))
                await client.ended()
                await client.close()
                await gone(server)
                assert not server.metrics.handshake_failures

        run(main)
        (line,) = lines()
        assert line.pop("seconds") >= 0
        assert line == {
            "client": f"unix pid {os.getpid()} uid {os.getuid()}",
            "export": "disk",
            "contexts": ["base:allocation"],
            "operations": 1,
            "errors": 0,
            "bytes_read": 4 * KIB,
            "bytes_written": 0,
            "ended": "goodbye",
        }

    def test_without_a_word(self, tmp_path: Path, lines: Any) -> None:
        async def main() -> None:
            async with running(MemoryImage(b"x" * 64 * KIB), tmp_path) as (server, path):
                client = await connected(path)
                await client.close()
                await gone(server)

        run(main)
        (line,) = lines()
        assert line[ENDED] == "disconnected" and "NBD_CMD_DISC" in line["reason"]

    def test_a_protocol_error(self, tmp_path: Path, lines: Any) -> None:
        async def main() -> None:
            async with running(MemoryImage(b"x" * 64 * KIB), tmp_path) as (server, path):
                client = await connected(path)
                client.send(b"\xee" * 28)
                await client.ended()
                await client.close()
                await gone(server)
                assert not server.metrics.handshake_failures  # that was over

        run(main)
        (line,) = lines()
        assert line[ENDED] == "protocol error" and "0xeeeeeeee" in line["reason"]

    def test_the_servers_end(self, tmp_path: Path, lines: Any) -> None:
        async def main() -> None:
            async with running(MemoryImage(b"x" * 64 * KIB), tmp_path) as (server, path):
                clients = [await connected(path), await RawClient.connect(path)]
                await until(lambda: server.connections == 2)
                await server.close()
                for client in clients:
                    await client.ended()
                    await client.close()
                assert not server.metrics.handshake_failures

        run(main)
        assert [line[ENDED] for line in lines()] == ["server shutdown"] * 2


class TestHandshakesThatFail:
    def failures(self, tmp_path: Path, client: Any, config: ServerConfig | None = None) -> dict[str, int]:
        found: dict[str, int] = {}

        async def main() -> None:
            async with running(MemoryImage(b"x" * 64 * KIB), tmp_path, config) as (server, path):
                one = await RawClient.connect(path)
                await client(one)
                await one.close()
                await gone(server)
                found.update(server.metrics.handshake_failures)
                assert server.metrics.exports == {}

        run(main)
        return found

    def test_disconnected(self, tmp_path: Path, lines: Any) -> None:
        async def client(one: RawClient) -> None:
            pass

        assert self.failures(tmp_path, client) == {"disconnected": 1}
        (line,) = lines()
        assert line["export"] is None and line["handshake"] == "disconnected"

    def test_nonsense(self, tmp_path: Path) -> None:
        async def client(one: RawClient) -> None:
            one.send(b"GET / HTTP/1.1\r\n\r\n")
            await one.ended()

        assert self.failures(tmp_path, client) == {"protocol error": 1}

    def test_time_out(self, tmp_path: Path, lines: Any) -> None:
        async def client(one: RawClient) -> None:
            await one.ended()

        assert self.failures(tmp_path, client, ServerConfig(handshake_timeout=0.1)) == {"time-out": 1}
        assert lines()[0]["reason"] == "no export asked for in 0.1 s"

    def test_no_such_export(self, tmp_path: Path) -> None:
        async def client(one: RawClient) -> None:
            for _ in range(3):
                await one.go("what\n\x1b[31mis that")
            await one.option(OPT_ABORT)

        assert self.failures(tmp_path, client) == {"unknown export": 1}

    def test_looking_around_is_none(self, tmp_path: Path) -> None:
        async def client(one: RawClient) -> None:
            await one.option(OPT_ABORT)

        assert self.failures(tmp_path, client) == {}


def test_many_contexts_are_not_all_named(lines: Any) -> None:
    made = Account(Metrics())
    made.enter("disk")
    made.contexts = [f"qemu:dirty-bitmap:{number}" for number in range(1000)]
    made.close(Peer(address="unix"))
    made.close(Peer(address="unix"))
    (line,) = lines()
    assert len(line["contexts"]) == account.SHOWN
    assert line["contexts_more"] == 1000 - account.SHOWN


class TestTotals:
    def test_a_connection_that_ends_between_two_looks_is_counted_once(self) -> None:
        metrics = Metrics()
        first, second, idle = Account(metrics), Account(metrics), Account(metrics)
        for each in (first, second):
            each.enter("disk").commands["read"].record(5, 100, 1)
        totals = Totals(metrics, [first, second, idle])
        assert [totals.of("disk")[0].operations, totals.of("disk")[1]] == [10, 2]
        first.close(UNKNOWN)
        tally, present = totals.of("disk")
        assert (tally.operations, tally.commands["read"].bytes, present) == (10, 200, 1)
        second.close(UNKNOWN)
        assert totals.of("disk")[0].operations == 10 and totals.of("disk")[1] == 0
        assert totals.of("another")[0].operations == 0
