"""Connections: every command answered, in any order, within the limits, whatever the client does."""

from __future__ import annotations

import asyncio
import logging
import struct
from pathlib import Path

import pytest

from nbdbm.config import ServerConfig
from nbdbm.errors import ImageError
from nbdbm.server import connection, holdings
from tests.server.memimage import MemoryImage
from tests.server.rawclient import (
    BLOCK_STATUS,
    CACHE,
    DISC,
    FLUSH,
    OPT_ABORT,
    OPT_STRUCTURED,
    WRITE,
    RawClient,
    request,
)
from tests.server.running import connected, run, running, until

K64 = 65536
CONTENT = b"".join(bytes([value]) * 4096 for value in range(256)) + bytes(1 << 20)


def test_reads(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(MemoryImage(CONTENT), tmp_path) as (_, path):
            client = await connected(path)
            assert client.size == len(CONTENT)
            assert client.flags == 0x1 | 0x2 | 0x4 | 0x8 | 0x100 | 0x400
            ranges = [(0, 512), (4095, 2), (5000, 100_000), (0, len(CONTENT)), (len(CONTENT) - 1, 1)]
            for cookie, (offset, length) in enumerate(ranges):
                client.read(cookie, offset, length)
            replies = await client.replies(len(ranges))
            for cookie, (offset, length) in enumerate(ranges):
                assert replies[cookie].data == CONTENT[offset : offset + length]
            await client.close()

    run(main)


def test_many_requests_in_one_packet(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(MemoryImage(CONTENT), tmp_path) as (_, path):
            client = await connected(path)
            count = 3 * holdings.MAX_REQUESTS
            for cookie in range(count):
                client.read(cookie, cookie * 4096 % len(CONTENT), 4096)
            replies = await client.replies(count)
            assert all(
                reply.data == CONTENT[cookie * 4096 % len(CONTENT) :][:4096]
                for cookie, reply in replies.items()
            )
            await client.close()

    run(main)


def test_structured_reads(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(MemoryImage(CONTENT), tmp_path) as (_, path):
            client = await RawClient.connect(path)
            assert await client.option(OPT_STRUCTURED) == [(1, b"")]
            await client.go()
            client.read(7, (1 << 20) - 10, 10 + K64)
            data, hole = await client.reply(), await client.reply()
            assert (data.kind, data.flags, data.data[8:]) == (1, 0, CONTENT[(1 << 20) - 10 : 1 << 20])
            assert (hole.kind, hole.flags, hole.data) == (2, 1, struct.pack(">QI", 1 << 20, K64))
            client.read(8, (1 << 20) - 10, 10 + K64, flags=1 << 2)  # DF
            whole = await client.reply()
            assert (whole.kind, whole.flags) == (1, 1)
            assert whole.data[8:] == CONTENT[(1 << 20) - 10 :][: 10 + K64]
            await client.close()

    run(main)


def test_block_status(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(MemoryImage(CONTENT, bitmaps={"b": [(0, K64)]}), tmp_path) as (_, path):
            client = await RawClient.connect(path)
            await client.option(OPT_STRUCTURED)
            ids = await client.select("base:allocation", "qemu:dirty-bitmap:b")
            await client.go()
            client.send(request(BLOCK_STATUS, 1, K64 - 512, 1 << 20))
            first, second = await client.reply(), await client.reply()
            assert first.data == struct.pack(">5I", ids[0], (1 << 20) - K64 + 512, 0, K64 - 512, 3)
            assert second.data == struct.pack(">5I", ids[1], 512, 1, (1 << 20) - 512, 0)
            client.send(request(BLOCK_STATUS, 1, 0, 1 << 20, flags=1 << 3))  # REQ_ONE
            await client.reply()
            assert (await client.reply()).data == struct.pack(">3I", ids[1], K64, 1)
            await client.close()

    run(main)


def test_other_commands(tmp_path: Path) -> None:
    async def main() -> None:
        image = MemoryImage(CONTENT)
        async with running(image, tmp_path) as (_, path):
            client = await connected(path)
            client.send(request(FLUSH, 1) + request(CACHE, 2, 0, K64))
            client.send(request(WRITE, 3, 0, 1000) + bytes(1000) + request(99, 4))
            replies = await client.replies(4)
            assert [replies[cookie].error for cookie in (1, 2, 3, 4)] == [0, 0, 1, 22]
            assert image.flushes == 1 and (0, K64) in image.reads
            await client.close()

    run(main)


def test_replies_overtake(tmp_path: Path) -> None:
    async def main() -> None:
        image = MemoryImage(CONTENT)
        async with running(image, tmp_path) as (_, path):
            client = await connected(path)
            image.gate = asyncio.Event()
            client.read(1, 0, 10)
            client.send(request(FLUSH, 2))
            assert (await client.reply()).cookie == 2
            image.gate.set()
            assert (await client.reply()).data == CONTENT[:10]
            await client.close()

    run(main)


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (OSError(5, "Input/output error"), 5),
        (OSError(28, "No space left on device"), 28),
        (ImageError("/secret/disk.qcow2", "l2_offset: broken"), 5),
        (ZeroDivisionError("a bug"), 5),
        (MemoryError(), 12),
    ],
)
def test_failures(tmp_path: Path, failure: Exception, error: int, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        image = MemoryImage(CONTENT)
        image.failures[100] = failure
        async with running(image, tmp_path) as (server, path):
            client = await RawClient.connect(path)
            await client.option(OPT_STRUCTURED)
            await client.go()
            client.read(1, 0, 512)
            reply = await client.reply()
            assert reply.error == error and reply.flags == 1
            assert b"Read failed" in reply.data and b"secret" not in reply.data
            client.read(2, 512, 5)
            assert (await client.reply()).data[8:] == CONTENT[512:517]
            assert server.connections == 1
            await client.close()

    with caplog.at_level(logging.WARNING):
        run(main)
    assert "Read at 0 of 512 bytes failed" in caplog.text


@pytest.mark.parametrize("direct", [False, True])
def test_with_and_without_the_transports_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """Past the transport or through it (as TLS needs): the client gets the same, slow as it may be."""
    if not direct:
        new = connection.NbdConnection.__init__
        monkeypatch.setattr(
            connection.NbdConnection, "__init__", lambda self, server, _, peer: new(self, server, None, peer)
        )

    async def main() -> None:
        async with running(MemoryImage(CONTENT), tmp_path) as (server, path):
            client = await connected(path)
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            ranges = [(cookie * 1000, 1 if cookie % 3 else 1_000_000) for cookie in range(60)]
            for cookie, (offset, length) in enumerate(ranges):
                client.read(cookie, offset, length)
            await until(lambda: server.budget.used > 0)
            await asyncio.sleep(0.05)
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            replies = await client.replies(len(ranges))
            for cookie, (offset, length) in enumerate(ranges):
                assert replies[cookie].data == CONTENT[offset : offset + length]
            await client.close()

    run(main)


class TestLimits:
    def test_requests_in_progress(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(holdings, "MAX_REQUESTS", 4)

        async def main() -> None:
            image = MemoryImage(CONTENT)
            image.gate = asyncio.Event()
            async with running(image, tmp_path) as (_, path):
                client = await connected(path)
                for cookie in range(10):
                    client.read(cookie, cookie, 1)
                await until(lambda: image.reading == 4)
                await asyncio.sleep(0.05)
                assert image.reading == 4
                image.gate.set()
                replies = await client.replies(10)
                assert [replies[cookie].data for cookie in range(10)] == [b"\0"] * 10
                await client.close()

        run(main)

    def test_bytes_in_progress(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(holdings, "MAX_BYTES", 250_000)

        async def main() -> None:
            image = MemoryImage(CONTENT)
            image.gate = asyncio.Event()
            async with running(image, tmp_path) as (server, path):
                client = await connected(path)
                for cookie in range(5):
                    client.read(cookie, cookie, 100_000)
                await until(lambda: image.reading == 2)
                await asyncio.sleep(0.05)
                assert image.reading == 2 and 200_000 < server.budget.used < 250_000
                image.gate.set()
                await client.replies(5)
                assert server.budget.used == 0
                await client.close()

        run(main)

    def test_one_large_request_is_always_possible(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(holdings, "MAX_BYTES", 1000)

        async def main() -> None:
            async with running(MemoryImage(CONTENT), tmp_path) as (_, path):
                client = await connected(path)
                for cookie in range(5):
                    client.read(cookie, 0, len(CONTENT))
                replies = await client.replies(5)
                assert all(reply.data == CONTENT for reply in replies.values())
                await client.close()

        run(main)

    def test_all_connections_together(self, tmp_path: Path) -> None:
        async def main() -> None:
            image = MemoryImage(CONTENT)
            image.gate = asyncio.Event()
            async with running(image, tmp_path) as (server, path):
                server.budget.limit = 150_000
                clients = [await connected(path) for _ in range(3)]
                for client in clients:
                    for cookie in range(4):
                        client.read(cookie, 0, 100_000)
                await until(lambda: image.reading == 1)
                await asyncio.sleep(0.05)
                assert image.reading == 1 and server.budget.used < 150_000
                # Small commands of those that have nothing else need not wait.
                other = await connected(path)
                other.read(1, 0, 1000)
                await until(lambda: image.reading == 2)
                image.gate.set()
                assert (await other.reply()).data == CONTENT[:1000]
                await other.close()
                for client in clients:
                    assert len(await client.replies(4)) == 4
                    await client.close()

        run(main)

    def test_a_client_that_never_reads(self, tmp_path: Path) -> None:
        async def main() -> None:
            image = MemoryImage(CONTENT)
            async with running(image, tmp_path) as (server, path):
                client = await connected(path)
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
                for cookie in range(2000):
                    client.send(request(0, cookie, 0, len(CONTENT)))
                await until(lambda: server.budget.used > 0)
                for _ in range(20):
                    await asyncio.sleep(0.01)
                    assert server.budget.used <= holdings.MAX_BYTES
                seen = len(image.reads)
                await asyncio.sleep(0.1)
                assert len(image.reads) == seen < 40
                # Others are served meanwhile.
                other = await connected(path)
                other.read(1, 0, 4)
                assert (await other.reply()).data == CONTENT[:4]
                await other.close()
                client.writer.transport.abort()
                await until(lambda: server.connections == 0)
                assert server.budget.used == 0

        run(main)


class TestEnds:
    def test_goodbye_after_requests(self, tmp_path: Path) -> None:
        async def main() -> None:
            image = MemoryImage(CONTENT)
            image.gate = asyncio.Event()
            async with running(image, tmp_path) as (server, path):
                client = await connected(path)
                client.read(1, 0, 10)
                client.send(request(DISC, 2))
                await until(lambda: image.reading == 1)
                image.gate.set()
                assert (await client.reply()).data == CONTENT[:10]
                assert await client.ended() == b""
                await client.close()
                await until(lambda: server.connections == 0)

        run(main)

    def test_half_closed(self, tmp_path: Path) -> None:
        async def main() -> None:
            image = MemoryImage(CONTENT)
            async with running(image, tmp_path) as (server, path):
                client = await connected(path)
                for cookie in range(20):
                    client.read(cookie, 0, len(CONTENT))
                client.writer.write_eof()
                replies = await client.replies(20)
                assert all(reply.data == CONTENT for reply in replies.values())
                assert await client.ended() == b""
                await client.close()
                await until(lambda: server.connections == 0)

        run(main)

    def test_abort_in_the_handshake(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with running(MemoryImage(CONTENT), tmp_path) as (server, path):
                client = await RawClient.connect(path)
                assert await client.option(OPT_ABORT) == [(1, b"")]
                assert await client.ended() == b""
                await client.close()
                await until(lambda: server.connections == 0)

        run(main)

    def test_gone_while_a_request_runs(self, tmp_path: Path) -> None:
        async def main() -> None:
            image = MemoryImage(CONTENT)
            image.gate = asyncio.Event()
            async with running(image, tmp_path) as (server, path):
                client = await connected(path)
                client.read(1, 0, K64)
                await until(lambda: image.reading == 1)
                client.writer.transport.abort()
                await asyncio.sleep(0.05)
                assert server.connections == 1  # the request is still on its way
                image.gate.set()
                await until(lambda: server.connections == 0)
                assert server.budget.used == 0

        run(main)

    @pytest.mark.parametrize(
        "rubbish", [b"GET / HTTP/1.0\r\n\r\n" * 4, b"\xff" * 300_000, request(0, 1)[:-1] + b"\0" + b"x" * 28]
    )
    @pytest.mark.parametrize("handshake", [False, True])
    def test_rubbish(self, tmp_path: Path, rubbish: bytes, handshake: bool) -> None:
        async def main() -> None:
            async with running(MemoryImage(CONTENT), tmp_path) as (server, path):
                client = await (RawClient.connect(path) if handshake else connected(path))
                client.send(rubbish)
                await client.ended()
                await client.close()
                await until(lambda: server.connections == 0)

        run(main)

    def test_no_such_export(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with running(MemoryImage(CONTENT), tmp_path, name="disk") as (_, path):
                client = await RawClient.connect(path)
                assert (await client.go("other"))[-1][0] == (1 << 31) + 6
                assert (await client.go("disk"))[-1][0] == 1
                await client.close()

        run(main)

    def test_slow_handshake(self, tmp_path: Path) -> None:
        async def main() -> None:
            config = ServerConfig(handshake_timeout=0.05)
            async with running(MemoryImage(CONTENT), tmp_path, config) as (server, path):
                quick = await connected(path)
                slow = await RawClient.connect(path)
                assert await slow.ended() == b""
                await until(lambda: server.connections == 1)
                quick.read(1, 0, 3)
                assert (await quick.reply()).data == CONTENT[:3]
                await quick.close()
                await slow.close()

        run(main)

    def test_a_client_that_takes_no_last_reply(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connection, "LINGER", 0.05)

        async def main() -> None:
            async with running(MemoryImage(bytes(32 << 20)), tmp_path) as (server, path):
                client = await connected(path)
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
                client.read(1, 0, 32 << 20)
                client.send(request(DISC, 2))
                await until(lambda: server.connections == 0)
                await client.close()

        run(main)


@pytest.mark.parametrize("clients", [1, 2])
def test_slow_commands_begin_a_few_at_a_time_beside_others(tmp_path: Path, clients: int) -> None:
    async def main() -> None:
        image = MemoryImage(CONTENT)
        image.gate = asyncio.Event()
        async with running(image, tmp_path) as (_, path):
            busy = await connected(path)
            others = [await connected(path) for _ in range(clients - 1)]
            for cookie in range(32):
                busy.read(cookie, cookie * 4096, 4096)
            begun: list[int] = []
            while image.reading < 32:
                before = image.reading
                await asyncio.sleep(0)
                begun.append(image.reading - before)
            if others:
                assert max(begun) <= connection.BEGIN_AT_ONCE
            else:
                assert max(begun) > connection.BEGIN_AT_ONCE
            image.gate.set()
            replies = await busy.replies(32)
            for cookie in range(32):
                assert replies[cookie].data == CONTENT[cookie * 4096 :][:4096]
            for client in (busy, *others):
                await client.close()

    run(main)
