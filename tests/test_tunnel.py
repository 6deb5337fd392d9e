"""TLS between two ends in this process: what arrives, what waits, how it ends, what a peer can do to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from nbdbm.tunnel import MAX_OWN, PIECE, RECEIVE, Tunnel
from tests.support.certificates import Pki

TIMEOUT = 30


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), TIMEOUT))


class Recorder(asyncio.BufferedProtocol):
    """Notes what it is told; ``limit``: pauses reading at so many bytes."""

    def __init__(self, limit: int | None = None) -> None:
        self.buffer = bytearray(100_000)
        self.limit = limit
        self.data = bytearray()
        self.calls: list[str] = []
        self.transport: asyncio.Transport | None = None
        self.changed = asyncio.Event()
        self.stay = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(high=0)

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self.buffer)

    def buffer_updated(self, nbytes: int) -> None:
        self.data += self.buffer[:nbytes]
        self.note("data")
        if self.limit is not None and len(self.data) >= self.limit:
            assert self.transport is not None
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        self.note("eof")
        return self.stay

    def pause_writing(self) -> None:
        self.note("pause")

    def resume_writing(self) -> None:
        self.note("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.note("lost")

    def note(self, call: str) -> None:
        if call != "data" or self.calls[-1:] != ["data"]:
            self.calls.append(call)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()


class End:
    """A tunnel's end, and what was said of its handshake."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.failure: str | None = None
        self.tunnel: Tunnel

    async def start(self, sock: socket.socket, context: ssl.SSLContext, server: bool) -> None:
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: self.recorder, sock=sock)
        self.tunnel = Tunnel(
            transport,
            self.recorder,
            context,
            server_side=server,
            hostname=None if server else "localhost",
            ready=lambda: self.recorder.note("ready"),
            failed=self.failed,
        )
        self.recorder.transport = self.tunnel
        self.tunnel.start()

    def failed(self, reason: str) -> None:
        self.failure = reason
        self.recorder.note("failed")


def contexts(
    pki: Pki, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pki.server / "server-cert.pem", pki.server / "server-key.pem")
    client = ssl.create_default_context(cafile=str(pki.anonymous / "ca-cert.pem"))
    client.maximum_version = version
    return server, client


@contextlib.asynccontextmanager
async def pair(
    pki: Pki, *, limit: int | None = None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> AsyncIterator[tuple[End, End]]:
    """Server and client; nobody has waited for the handshake."""
    ours, theirs = socket.socketpair()
    server, client = contexts(pki, version)
    ends = End(Recorder(limit)), End(Recorder())
    await ends[0].start(ours, server, True)
    await ends[1].start(theirs, client, False)
    try:
        yield ends
    finally:
        for end in ends:
            end.tunnel.abort()
            await end.recorder.until(lambda end=end: "lost" in end.recorder.calls)  # type: ignore[misc]


@contextlib.asynccontextmanager
async def raw(pki: Pki) -> AsyncIterator[tuple[End, socket.socket]]:
    """A server's end, and a plain socket as its client's."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    end = End(Recorder())
    await end.start(ours, contexts(pki)[0], True)
    try:
        yield end, theirs
    finally:
        end.tunnel.abort()
        await end.recorder.until(lambda: "lost" in end.recorder.calls)
        theirs.close()


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.mark.parametrize("version", VERSIONS, ids=["tls1.2", "tls1.3"])
def test_both_ways_and_goodbye(pki: Pki, version: ssl.TLSVersion) -> None:
    data = os.urandom(3 * RECEIVE + 17)

    async def main() -> None:
        async with pair(pki, version=version) as (server, client):
            await client.recorder.until(lambda: "ready" in client.recorder.calls)
            client.tunnel.write(data)
            await server.recorder.until(lambda: len(server.recorder.data) == len(data))
            server.tunnel.writelines([data[:5], memoryview(data)[5:]])
            await client.recorder.until(lambda: len(client.recorder.data) == len(data))
            assert server.recorder.data == client.recorder.data == data
            assert server.recorder.calls[0] == "ready"
            server.tunnel.close()
            # Told by TLS, and then by the connection.
            await client.recorder.until(lambda: "lost" in client.recorder.calls)
            assert client.recorder.calls[-2:] == ["eof", "lost"]
            assert server.failure is client.failure is None

    run(main)


def test_ready_comes_before_what_came_with_the_handshake(pki: Pki) -> None:
    async def main() -> None:
        async with pair(pki) as (server, client):
            # In TLS 1.3 the client may go on at once: this travels with the end of its handshake.
            client.tunnel.write(b"early")
            await server.recorder.until(lambda: bool(server.recorder.data))
            assert server.recorder.calls[:2] == ["ready", "data"]
            assert server.recorder.data == b"early"

    run(main)


def test_a_peer_that_takes_nothing(pki: Pki) -> None:
    """What waits is the writer's own memory; one piece at most is encrypted ahead."""
    data = bytes(8 << 20)

    async def main() -> None:
        async with pair(pki) as (server, client):
            await server.recorder.until(lambda: "ready" in server.recorder.calls)
            client.tunnel.pause_reading()
            before = server.tunnel.send(data)
            assert 0 < before < len(data)
            assert server.recorder.calls[-1] == "pause"
            assert server.tunnel.send(data) == 0
            view = memoryview(data)[before:]
            server.tunnel.write(view)
            left = server.tunnel.get_write_buffer_size() - len(view)
            assert 0 < left < 2 * PIECE
            assert server.tunnel.send(b"x") == 0, "nothing overtakes"
            client.tunnel.resume_reading()
            await client.recorder.until(lambda: len(client.recorder.data) == len(data))
            await server.recorder.until(lambda: server.recorder.calls[-1] == "resume")
            assert server.tunnel.get_write_buffer_size() == 0
            assert client.recorder.data == data

    run(main)


def test_close_sends_what_waits(pki: Pki) -> None:
    data = os.urandom(4 << 20)

    async def main() -> None:
        async with pair(pki) as (server, client):
            await server.recorder.until(lambda: "ready" in server.recorder.calls)
            client.tunnel.pause_reading()
            server.tunnel.write(data)
            server.tunnel.close()
            server.tunnel.write(b"too late")
            assert server.tunnel.is_closing()
            client.tunnel.resume_reading()
            await client.recorder.until(lambda: "eof" in client.recorder.calls)
            assert client.recorder.data == data

    run(main)


def test_paused_reading_holds_little(pki: Pki) -> None:
    data = os.urandom(8 << 20)

    async def main() -> None:
        async with pair(pki, limit=1) as (server, client):
            await client.recorder.until(lambda: "ready" in client.recorder.calls)
            client.tunnel.write(data)
            await client.recorder.until(lambda: "pause" in client.recorder.calls)
            await server.recorder.until(lambda: bool(server.recorder.data))
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(server.recorder.data) <= len(server.recorder.buffer)
            assert client.tunnel.get_write_buffer_size() > len(data) // 2
            server.recorder.limit = None
            server.tunnel.resume_reading()
            await server.recorder.until(lambda: len(server.recorder.data) == len(data))
            assert server.recorder.data == data

    run(main)


def test_half_closed(pki: Pki) -> None:
    """The client said goodbye; what it asked for still goes out."""

    async def main() -> None:
        async with pair(pki) as (server, client):
            server.recorder.stay = True
            await server.recorder.until(lambda: "ready" in server.recorder.calls)
            with contextlib.suppress(ssl.SSLError):
                client.tunnel.tls.unwrap()
            client.tunnel._flush()
            await server.recorder.until(lambda: "eof" in server.recorder.calls)
            assert not server.tunnel.is_closing()
            assert server.tunnel.send(b"rest") == 4
            server.tunnel.close()
            await server.recorder.until(lambda: "lost" in server.recorder.calls)

    run(main)


def test_end_of_the_connection_without_goodbye(pki: Pki) -> None:
    async def main() -> None:
        async with pair(pki) as (server, client):
            await client.recorder.until(lambda: "ready" in client.recorder.calls)
            await server.recorder.until(lambda: "ready" in server.recorder.calls)
            client.tunnel.write(b"last words")
            client.tunnel.get_extra_info("socket").shutdown(socket.SHUT_WR)
            await server.recorder.until(lambda: "lost" in server.recorder.calls)
            assert server.recorder.data == b"last words"
            assert server.recorder.calls[-2:] == ["eof", "lost"]

    run(main)


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", b"IHAVEOPT" + bytes(100), bytes(300), b"\x16\x03\x01\xff\xff" + bytes(70000)],
    ids=["http", "nbd", "zeroes", "huge-record"],
)
def test_garbage_instead_of_a_handshake(pki: Pki, garbage: bytes) -> None:
    async def main() -> None:
        async with raw(pki) as (end, client):
            await asyncio.get_running_loop().sock_sendall(client, garbage)
            await end.recorder.until(lambda: "lost" in end.recorder.calls)
            assert end.failure and "\n" not in end.failure
            assert "ready" not in end.recorder.calls and end.recorder.data == b""

    run(main)


def test_garbage_later(pki: Pki) -> None:
    async def main() -> None:
        async with pair(pki) as (server, client):
            await server.recorder.until(lambda: "ready" in server.recorder.calls)
            client.tunnel._transport.write(b"plain text, with nothing of TLS in it")
            await server.recorder.until(lambda: "lost" in server.recorder.calls)
            assert server.recorder.data == b""
            assert server.failure is None

    run(main)


def test_end_during_the_handshake(pki: Pki) -> None:
    async def main() -> None:
        async with raw(pki) as (end, client):
            client.close()
            await end.recorder.until(lambda: "lost" in end.recorder.calls)
            assert end.failure and "handshake" in end.failure

    run(main)


def test_abort_during_the_handshake(pki: Pki) -> None:
    async def main() -> None:
        async with raw(pki) as (end, _):
            end.tunnel.abort()
            await end.recorder.until(lambda: "lost" in end.recorder.calls)
            assert end.failure and "handshake" in end.failure

    run(main)


def test_a_client_that_does_not_trust_us(pki: Pki) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        server, client = End(Recorder()), End(Recorder())
        await server.start(ours, contexts(pki)[0], True)
        await client.start(theirs, ssl.create_default_context(cafile=os.devnull), False)
        await client.recorder.until(lambda: "lost" in client.recorder.calls)
        await server.recorder.until(lambda: "lost" in server.recorder.calls)
        assert client.failure and client.failure.startswith("certificate verify failed: ")
        assert server.failure == "tlsv1 alert unknown ca"

    with pytest.MonkeyPatch.context() as patch:
        # No certificate of the system's either.
        patch.setattr(ssl, "create_default_context", lambda cafile: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        run(main)


def test_a_peer_that_wants_answers_of_tls_itself_and_takes_none(pki: Pki) -> None:
    """New keys asked for again and again: what we would have to say about it does not pile up."""

    async def main() -> None:
        async with pair(pki) as (server, client):
            await server.recorder.until(lambda: "ready" in server.recorder.calls)
            client.tunnel.pause_reading()
            server.tunnel.write(bytes(8 << 20))
            assert server.recorder.calls[-1] == "pause"
            # OpenSSL's Python module cannot ask for keys: the answers are made up instead.
            server.tunnel._outgoing.write(bytes(MAX_OWN + 1))
            client.tunnel.write(b"x")
            await server.recorder.until(lambda: "lost" in server.recorder.calls)
            assert server.failure is None

    run(main)


def test_a_bug_in_the_protocol_ends_the_connection(pki: Pki) -> None:
    async def main() -> None:
        seen: list[str] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: seen.append(str(context["exception"]))
        )
        async with pair(pki, limit=1) as (server, client):
            await client.recorder.until(lambda: "ready" in client.recorder.calls)
            client.tunnel.write(bytes(1 << 20))
            await server.recorder.until(lambda: bool(server.recorder.data))

            def broken(nbytes: int) -> None:
                raise ValueError("a bug")

            server.recorder.buffer_updated = broken  # type: ignore[method-assign]
            server.tunnel.resume_reading()
            await server.recorder.until(lambda: "lost" in server.recorder.calls)
        assert seen == ["a bug"]

    run(main)
