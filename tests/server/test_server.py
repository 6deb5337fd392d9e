"""The server: how many it serves, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from pathlib import Path

import pytest

from nbdbm.config import ListenConfig, ServerConfig
from nbdbm.errors import UsageError
from nbdbm.exports import Export
from nbdbm.registry import ExportRegistry
from nbdbm.server import connection as connection_module
from nbdbm.server import server as server_module
from nbdbm.server.listener import Listener, UnixListener, bind, bind_tcp
from nbdbm.server.server import Server
from tests.server.memimage import MemoryImage
from tests.server.rawclient import RawClient, request
from tests.server.running import connected, run, running, until

CONTENT = b"x" * 100_000


def test_tcp_and_unix_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        registry = ExportRegistry()
        registry.add(Export.of(MemoryImage(CONTENT)))  # type: ignore[arg-type]
        server = Server(registry)
        tcp = bind_tcp("127.0.0.1", 0)
        await server.start([tcp, bind(ListenConfig(socket=str(tmp_path / "s")))])
        reader, writer = await asyncio.open_connection(*tcp.sockets[0].getsockname())
        assert (await reader.readexactly(8)) == b"NBDMAGIC"
        client = await connected(str(tmp_path / "s"))
        assert server.connections == 2
        await server.close()
        assert await client.ended() == b""
        await client.close()
        writer.close()
        assert os.listdir(tmp_path) == []

    run(main)


def test_max_connections(tmp_path: Path) -> None:
    async def main() -> None:
        image = MemoryImage(CONTENT)
        async with running(image, tmp_path, ServerConfig(max_connections=2)) as (server, path):
            first, second = await connected(path), await connected(path)
            waiting = asyncio.ensure_future(connected(path))
            await asyncio.sleep(0.05)
            assert not waiting.done() and server.connections == 2
            await first.close()
            third = await waiting
            third.read(1, 0, 5)
            assert (await third.reply()).data == b"xxxxx"
            for client in (second, third):
                await client.close()
            # All places are free again.
            again = [await connected(path) for _ in range(2)]
            for client in again:
                await client.close()

    run(main)


def test_unlimited_connections(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(MemoryImage(CONTENT), tmp_path, ServerConfig(max_connections=0)) as (server, path):
            clients = [await connected(path) for _ in range(150)]
            assert server.connections == 150
            for client in clients:
                await client.close()
            await until(lambda: server.connections == 0)

    run(main)


def test_out_of_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "ACCEPT_PAUSE", 0.05)

    class Exhausted:
        """A listening socket whose accept fails twice."""

        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock
            self.failures = 2

        def accept(self) -> object:
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return self.sock.accept()

        def __getattr__(self, name: str) -> object:
            return getattr(self.sock, name)

    async def main() -> None:
        registry = ExportRegistry()
        registry.add(Export.of(MemoryImage(CONTENT)))  # type: ignore[arg-type]
        server = Server(registry)
        listener = UnixListener(str(tmp_path / "s"))
        exhausted = Exhausted(listener.sockets[0])
        listener.sockets[0] = exhausted  # type: ignore[call-overload]
        await server.start([listener])
        client = await connected(str(tmp_path / "s"))
        assert exhausted.failures == 0
        await client.close()
        await server.close()

    with caplog.at_level(logging.WARNING):
        run(main)
    assert caplog.text.count("Too many open files") == 2


def test_a_client_gone_before_it_is_served(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(MemoryImage(CONTENT), tmp_path) as (server, path):
            for _ in range(20):
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(path)
            survivor = await connected(path)
            await until(lambda: server.connections == 1)
            await survivor.close()

    run(main)


def test_failed_start_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        first, second = UnixListener(str(tmp_path / "s")), UnixListener(str(tmp_path / "s"))
        with pytest.raises(UsageError, match="somebody else"):
            await Server(ExportRegistry()).start([first, second])

    run(main)
    assert os.listdir(tmp_path) == []


class TestClose:
    def test_requests_in_progress_are_answered_others_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("nbdbm.server.holdings.MAX_REQUESTS", 2)

        async def main() -> None:
            image = MemoryImage(CONTENT)
            image.gate = asyncio.Event()
            async with running(image, tmp_path) as (server, path):
                client = await connected(path)
                client.send(b"".join(request(0, cookie, 0, 100) for cookie in range(4)))
                await until(lambda: image.reading == 2)
                closing = asyncio.ensure_future(server.close())
                client.reads = {0: 100, 1: 100}
                replies = await client.replies(2)
                assert [replies[cookie].error for cookie in (2, 3)] == [108, 108]
                assert os.listdir(tmp_path) == [] and image.closes == 0
                image.gate.set()
                replies = await client.replies(2)
                assert [replies[cookie].data for cookie in (0, 1)] == [CONTENT[:100]] * 2
                assert await client.ended() == b""
                await closing
                assert image.closes == 1
                await client.close()

        run(main)

    def test_twice(self, tmp_path: Path) -> None:
        async def main() -> None:
            image = MemoryImage(CONTENT)
            async with running(image, tmp_path) as (server, _):
                await asyncio.gather(server.close(), server.close())
                await server.close()
            assert image.closes == 1

        run(main)

    def test_never_started(self) -> None:
        async def main() -> None:
            image = MemoryImage(CONTENT)
            registry = ExportRegistry()
            registry.add(Export.of(image))  # type: ignore[arg-type]
            await Server(registry).close()
            assert image.closes == 1

        run(main)

    def test_clients_in_the_handshake_do_not_hold_it_up(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with running(MemoryImage(CONTENT), tmp_path) as (server, path):
                client = await RawClient.connect(path)
                await server.close()
                assert await client.ended() == b""
                await client.close()

        run(main)

    @pytest.mark.parametrize("hurry", [False, True])
    def test_a_client_that_reads_nothing_does_not_either(self, tmp_path: Path, hurry: bool) -> None:
        async def main() -> None:
            config = ServerConfig(drain_timeout=1000 if hurry else 0.05)
            async with running(MemoryImage(bytes(32 << 20)), tmp_path, config) as (server, path):
                client = await connected(path)
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
                client.send(request(0, 1, 0, 32 << 20))
                await until(lambda: server.budget.used > 0)
                closing = asyncio.ensure_future(server.close())
                await asyncio.sleep(0)
                if hurry:
                    server.hurry()
                await closing
                assert server.connections == 0
                await client.close()

        run(main)

    def test_the_image_outlives_its_requests(self, tmp_path: Path) -> None:
        async def main() -> None:
            image = MemoryImage(CONTENT)
            image.gate = asyncio.Event()
            async with running(image, tmp_path) as (server, path):
                client = await connected(path)
                client.read(1, 0, 10)
                await until(lambda: image.reading == 1)
                server.hurry()
                closing = asyncio.ensure_future(server.close())
                await client.ended()
                assert image.reading == 1 and image.closes == 0
                image.gate.set()
                await closing
                assert image.closes == 1
                await client.close()

        run(main)

    def test_failure_of_the_image_is_told(self, tmp_path: Path) -> None:
        class Failing(MemoryImage):
            async def close(self) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

        async def main() -> None:
            registry = ExportRegistry()
            registry.add(Export.of(Failing(CONTENT)))  # type: ignore[arg-type]
            server = Server(registry)
            for _ in range(2):
                with pytest.raises(OSError, match="No space"):
                    await server.close()

        run(main)


def tcp_server(config: ServerConfig) -> tuple[Server, Listener]:
    registry = ExportRegistry()
    registry.add(Export.of(MemoryImage(CONTENT)))  # type: ignore[arg-type]
    return Server(registry, config), bind_tcp("127.0.0.1", 0)


class TestPlaces:
    def test_of_one_address(self, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            server, listener = tcp_server(ServerConfig(max_connections_per_address=2))
            await server.start([listener])
            address = listener.sockets[0].getsockname()
            clients = [await asyncio.open_connection(*address) for _ in range(2)]
            for reader, _ in clients:
                assert await reader.readexactly(8) == b"NBDMAGIC"
            refused, writer = await asyncio.open_connection(*address)
            assert await refused.read() == b""
            writer.close()
            # With one gone there is room again.
            clients[0][1].close()
            await until(lambda: server.connections == 1)
            reader, writer = await asyncio.open_connection(*address)
            assert await reader.readexactly(8) == b"NBDMAGIC"
            writer.close()
            clients[1][1].close()
            await server.close()

        run(main)
        (record,) = (record for record in caplog.records if "refused" in record.message)
        assert record.message.endswith("refused, 127.0.0.1 has 2 connections")

    def test_idle_handshakes_make_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server_module, "EVICT_AFTER", 0.05)
        monkeypatch.setattr(server_module, "CROWDED", 0.02)

        async def main() -> None:
            server, listener = tcp_server(ServerConfig(max_connections=2))
            await server.start([listener])
            address = listener.sockets[0].getsockname()
            idle = [await asyncio.open_connection(*address) for _ in range(2)]
            for reader, _ in idle:
                await reader.readexactly(18)
            await asyncio.sleep(0.2)
            assert server.connections == 2, "nobody waits: they may stay"
            reader, writer = await asyncio.open_connection(*address)
            assert await asyncio.wait_for(reader.readexactly(8), 10) == b"NBDMAGIC"
            # The one that came first had to go.
            assert await idle[0][0].read() == b"" and not idle[1][0].at_eof()
            for _, other in [*idle, (reader, writer)]:
                other.close()
            await server.close()

        run(main)

    def test_hundreds_that_say_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """They were first, and they stay: whoever comes after them waits for its turn, but gets it."""
        monkeypatch.setattr(server_module, "EVICT_AFTER", 0.05)
        monkeypatch.setattr(server_module, "EVICT_NEXT", 0.001)

        async def main() -> None:
            config = ServerConfig(max_connections=100)
            async with running(MemoryImage(CONTENT), tmp_path, config) as (server, path):
                silent = [socket.socket(socket.AF_UNIX) for _ in range(400)]
                try:
                    for sock in silent:
                        sock.connect(path)
                    client = await connected(path)
                    client.read(1, 0, 5)
                    assert (await client.reply()).data == b"xxxxx"
                    assert server.connections <= 100
                    await client.close()
                finally:
                    for sock in silent:
                        sock.close()
                await until(lambda: server.connections == 0)

        run(main)

    def test_clients_past_the_handshake_stay(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server_module, "EVICT_AFTER", 0.02)
        monkeypatch.setattr(server_module, "CROWDED", 0.01)

        async def main() -> None:
            config = ServerConfig(max_connections=1)
            async with running(MemoryImage(CONTENT), tmp_path, config) as (server, path):
                first = await connected(path)
                waiting = asyncio.ensure_future(connected(path))
                await asyncio.sleep(0.1)
                assert not waiting.done()
                first.read(1, 0, 5)
                assert (await first.reply()).data == b"xxxxx"
                await first.close()
                await (await waiting).close()
                await until(lambda: server.connections == 0)

        run(main)

    def test_those_of_clients_that_vanished(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing was heard of one of two."""
        monkeypatch.setattr(server_module, "LOOK_AROUND", 0.02)
        gone: list[tuple[str, int]] = []
        monkeypatch.setattr(
            connection_module,
            "silence",
            lambda sock: server_module.SILENCE + 1.0 if sock.getpeername() in gone else 1.0,
        )

        async def main() -> None:
            server, listener = tcp_server(ServerConfig())
            await server.start([listener])
            address = listener.sockets[0].getsockname()
            clients = [await asyncio.open_connection(*address) for _ in range(2)]
            for reader, _ in clients:
                assert await reader.readexactly(18)
            await asyncio.sleep(0.1)
            assert server.connections == 2
            gone.append(clients[0][1].get_extra_info("sockname"))
            assert await clients[0][0].read() == b""
            assert server.connections == 1 and not clients[1][0].at_eof()
            for _, writer in clients:
                writer.close()
            await server.close()

        run(main)

    def test_other_limits_from_now_on(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with running(MemoryImage(CONTENT), tmp_path, ServerConfig(max_connections=1)) as (
                server,
                path,
            ):
                first = await connected(path)
                waiting = asyncio.ensure_future(connected(path))
                await asyncio.sleep(0.05)
                assert not waiting.done()
                server.reconfigure(ServerConfig(max_connections=2))
                await (await waiting).close()
                await first.close()

        run(main)
