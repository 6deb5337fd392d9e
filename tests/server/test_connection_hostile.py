"""Clients that break off, go on too long, or say too much: what of it counts, and when they are gone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

import pytest

from nbdbm.config import ServerConfig
from nbdbm.exports import Export
from nbdbm.server import budget as budgets
from nbdbm.server.server import Server
from tests.server.memimage import MemoryImage, WritableImage
from tests.server.rawclient import DISC, FLUSH, OPT_ABORT, OPT_GO, WRITE, RawClient, request
from tests.server.running import connected, run, running, until

CONTENT = bytes(range(256)) * 400


def option(code: int, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack(">QII", 0x49484156454F5054, code, len(data) if length is None else length) + data


LIST, LIST_META, UNKNOWN = 3, 9, 99

DRIBBLES: dict[str, Iterable[bytes]] = {
    "client_flags": [b"\0", b"\0", b"\0"],
    "option_head": [bytes([byte]) for byte in option(LIST)[:15]],
    "option_data": itertools.chain([option(LIST_META, length=1000)], itertools.repeat(b"\0")),
    "large_option_data": itertools.chain([option(LIST_META, length=1 << 20)], itertools.repeat(b"\0" * 100)),
    "refused_option_data": itertools.chain([option(UNKNOWN, length=1 << 24)], itertools.repeat(b"\0" * 100)),
    "whole_options": itertools.repeat(option(UNKNOWN)),
}
"""What comes of a handshake in small pieces, for ever or up to a point."""


@pytest.mark.parametrize("name", DRIBBLES)
def test_a_slow_handshake_ends_in_time(tmp_path: Path, name: str) -> None:
    """Neither bytes nor options that go on coming make its time longer."""

    async def main() -> None:
        config = ServerConfig(handshake_timeout=0.3)
        async with running(MemoryImage(CONTENT), tmp_path, config) as (server, path):
            quick = await connected(path)
            reader, writer = await asyncio.open_unix_connection(path)
            await reader.readexactly(18)
            gone = asyncio.ensure_future(reader.read())
            if name != "client_flags":
                writer.write(struct.pack(">I", 3))
            pieces = iter(DRIBBLES[name])
            while not gone.done():
                # 100 a second: were the time counted from the last of them, it would never be over.
                with contextlib.suppress(StopIteration):
                    writer.write(next(pieces))
                await asyncio.sleep(0.01)
            with contextlib.suppress(ConnectionError):
                await gone
            writer.close()
            await until(lambda: server.connections == 1)
            quick.read(1, 0, 256)
            assert (await quick.reply()).data == CONTENT[:256]
            await quick.close()

    run(main)


def test_nothing_after_the_goodbye_counts(tmp_path: Path) -> None:
    """One packet: a write, DISC, and a write that must not happen."""

    async def main() -> None:
        image = WritableImage(CONTENT)
        async with running(image, tmp_path) as (server, path):
            client = await connected(path)
            client.send(
                request(WRITE, 1, 0, 4)
                + b"good"
                + request(DISC, 2)
                + request(WRITE, 3, 512, 4)
                + b"late"
                + request(FLUSH, 4)
            )
            assert (await client.reply()).cookie == 1
            assert await client.ended() == b""
            await client.close()
            await until(lambda: server.connections == 0)
        assert image.changes == [("write", 0, 4)]

    run(main)


def test_nothing_after_abort_counts(tmp_path: Path) -> None:
    async def main() -> None:
        image = WritableImage(CONTENT)
        async with running(image, tmp_path) as (server, path):
            client = await RawClient.connect(path)
            go = option(OPT_GO, struct.pack(">IH", 0, 0))
            client.send(option(OPT_ABORT) + b"\xff" * 1000 + go + request(WRITE, 1, 0, 4) + b"late")
            (kind, _) = struct.unpack(">II", (await client.reader.readexactly(20))[12:])
            assert kind == 1
            assert await client.ended() == b""
            await client.close()
            await until(lambda: server.connections == 0)
        assert image.changes == []

    run(main)


def test_cookies_need_not_differ(tmp_path: Path) -> None:
    """A client that numbers its requests badly hurts itself only: each is answered, and once."""

    async def main() -> None:
        image = WritableImage(CONTENT)
        image.gate = asyncio.Event()
        async with running(image, tmp_path) as (server, path):
            client = await connected(path)
            client.send(b"".join(request(WRITE, 7, 512 * at, 4) + b"same" for at in range(100)))
            await until(lambda: server.budget.used > 0)
            image.gate.set()
            for _ in range(100):
                reply = await client.reply()
                assert (reply.cookie, reply.error) == (7, 0)
            client.send(request(FLUSH, 8))
            assert (await client.reply()).cookie == 8
            await client.close()
            await until(lambda: server.connections == 0)
            assert server.budget.used == 0
        assert sorted(image.changes) == [("write", 512 * at, 4) for at in range(100)]

    run(main)


@pytest.mark.parametrize("sent", [0, 1, 4095, 4096, 300_000])
def test_a_reset_in_the_middle_of_a_payload(tmp_path: Path, sent: int) -> None:
    """What did not come whole is not written, and what it took is given back."""

    async def main() -> None:
        image = WritableImage(bytes(1 << 20))
        async with running(image, tmp_path) as (server, path):
            client = await connected(path)
            client.send(request(WRITE, 1, 0, 1 << 19) + b"x" * sent)
            await client.writer.drain()
            await asyncio.sleep(0.02)
            sock = client.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.writer.transport.abort()
            await until(lambda: server.connections == 0)
            assert server.budget.used == 0
        assert image.changes == []

    run(main)


def unread(server: Server) -> int:
    """Bytes that the server holds of replies to the one that takes least."""
    return max(client._outbox.left for client in server.clients)


@pytest.mark.parametrize("asking", ["exports", "contexts", "information"])
def test_a_crowd_that_asks_for_long_answers_and_reads_none(tmp_path: Path, asking: str) -> None:
    """Nearly nothing is held for each, whatever the whole answer is, and who comes later is served."""
    bitmaps = {f"{number:0900}": list[tuple[int, int]]() for number in range(2000)}
    image = MemoryImage(CONTENT, bitmaps=bitmaps)

    async def main() -> None:
        async with running(image, tmp_path, ServerConfig(max_connections=0), name="disk") as (server, path):
            for number in range(2000):
                text = f"{number:0900}"
                export = Export.of(MemoryImage(b""), name=text, description=text)  # type: ignore[arg-type]
                server.registry.add(export)
            name = struct.pack(">I", 4) + b"disk"
            options = {
                "exports": option(LIST),
                "contexts": option(LIST_META, name + bytes(4)),
                "information": option(6, name + struct.pack(">HH", 1, 1)) * 50,
            }
            crowd = [await RawClient.connect(path) for _ in range(50)]
            for client in crowd:
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
                client.send(options[asking] * 20)
            await until(lambda: unread(server) > 0 or asking == "information")
            honest = await connected(path, "disk")
            honest.read(1, 5, 100)
            assert (await honest.reply()).data == CONTENT[5:105]
            await honest.close()
            assert unread(server) < 256 * 1024 and server.budget.used < 1 << 20
            # And who reads gets all of it, in order.
            crowd[0].writer.transport.resume_reading()  # type: ignore[attr-defined]
            code, count = {"exports": (LIST, 2002), "contexts": (LIST_META, 2003), "information": (6, 4)}[
                asking
            ]
            for _ in range(3):
                assert len(await crowd[0].answer(code)) == count
            for client in crowd:
                client.writer.transport.abort()

    run(main)


def test_data_of_options_are_in_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that announce much and never send the last byte: bounded together, and gone if others wait."""
    monkeypatch.setattr(budgets, "PATIENCE", 0.2)
    monkeypatch.setattr(budgets, "LOOK_AGAIN", 0.02)
    query = "x" * 4000
    data = struct.pack(">II", 0, 250) + (struct.pack(">I", len(query)) + query.encode()) * 250
    assert len(data) < 1 << 20

    async def main() -> None:
        async with running(MemoryImage(CONTENT), tmp_path, ServerConfig(max_connections=0)) as (server, path):
            server.budget.limit = 10 << 20
            crowd = [await RawClient.connect(path) for _ in range(50)]
            for client in crowd:
                client.send(option(LIST_META, data)[:-1])
            await until(lambda: server.budget.used > 9 << 20)
            honest = await connected(path)
            honest.read(1, 5, 100)
            assert (await honest.reply()).data == CONTENT[5:105], "what is small does not wait"
            await honest.close()
            patient = await RawClient.connect(path)
            assert await patient.option(LIST_META, data) == [(1, b"")], "once somebody was cut off"
            assert server.budget.used <= server.budget.limit
            await patient.close()
            for client in crowd:
                client.writer.transport.abort()
            await until(lambda: server.connections == 0)
            assert server.budget.used == 0

    run(main)
