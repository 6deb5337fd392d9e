"""HTTP as real clients speak it, and as those do who mean harm."""

from __future__ import annotations

import asyncio
import http.client
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from nbdbm.server import responder
from nbdbm.server.listener import UnixListener, bind_tcp
from nbdbm.server.responder import MAX_CALLERS, MAX_REQUEST, Page, Responder
from nbdbm.server.responder import http as http_talk

TIMEOUT = 30
BIG = b"x" * (32 << 20)


def serving(work: Callable[[int], None]) -> None:
    """Do ``work`` in a thread while a responder is at the port that it is given."""

    async def small() -> Page:
        return Page(200, b"small\n")

    async def big() -> Page:
        return Page(200, BIG)

    async def broken() -> Page:
        raise RuntimeError("a bug")

    async def main() -> None:
        listener = bind_tcp("127.0.0.1", 0)
        made = Responder(listener, http_talk({"/": small, "/big": big, "/broken": broken}))
        made.start()
        try:
            port = listener.uri("").port
            await asyncio.wait_for(asyncio.to_thread(work, port), TIMEOUT)
        finally:
            await made.close()
            await made.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), TIMEOUT)

    asyncio.run(main())


def got(port: int, path: str, method: str = "GET") -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def sent(port: int, data: bytes) -> bytes:
    """All that is answered to these bytes, until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return rest(client)


def rest(client: socket.socket) -> bytes:
    found = b""
    try:
        while some := client.recv(65536):
            found += some
    except ConnectionResetError:
        pass
    return found


@contextmanager
def waiting(port: int, count: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT)) for _ in range(count)
        ]


def test_pages() -> None:
    def work(port: int) -> None:
        status, content, headers = got(port, "/")
        assert (status, content, headers["Content-Length"]) == (200, b"small\n", "6")
        assert got(port, "/?a=b")[:2] == (200, b"small\n")
        assert got(port, "/big")[:2] == (200, BIG)
        status, content, headers = got(port, "/big", "HEAD")
        assert (status, content, headers["Content-Length"]) == (200, b"", str(len(BIG)))

    serving(work)


def test_errors(caplog: pytest.LogCaptureFixture) -> None:
    def work(port: int) -> None:
        assert got(port, "/other")[0] == 404
        status, _, headers = got(port, "/", "POST")
        assert (status, headers["Allow"]) == (405, "GET, HEAD")
        assert got(port, "/broken")[0] == 500
        assert got(port, "/")[0] == 200

    serving(work)
    assert "a page could not be made" in caplog.text


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\n\r\n", 200),
        (b"GET /\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\n\r\n", 400),
        (b"GET http://x/ HTTP/1.1\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x00\xff\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"GET /\xff\x00 HTTP/1.1\r\n\r\n", 404),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * MAX_REQUEST + b"\r\n\r\n", 431),
        (b"x" * (100 * MAX_REQUEST), 431),
        (b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n123456789", 405),
    ],
)
def test_what_is_sent(request_: bytes, status: int) -> None:
    def work(port: int) -> None:
        try:
            answer = sent(port, request_)
        except (BrokenPipeError, ConnectionResetError):
            assert status == 431  # it does not read on for ever
            return
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()) and answer.count(b"HTTP/1.1") == 1

    serving(work)


def test_half_a_request_is_not_answered() -> None:
    serving(lambda port: None if sent(port, b"GET / HTTP/1.1\r\n") == b"" else pytest.fail("answered"))


def test_those_who_are_slow_lose_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responder, "MAX_SECONDS", 0.5)

    def work(port: int) -> None:
        with waiting(port, MAX_CALLERS) as clients:
            for client in clients[:8]:
                client.sendall(b"GET / HT")
            for client in clients[8:]:
                # It is sent more than the system holds, and reads nothing.
                client.sendall(b"GET /big HTTP/1.1\r\n\r\n")
            deadline = time.monotonic() + TIMEOUT
            while True:  # until there is room again
                try:
                    assert got(port, "/")[0] == 200
                    break
                except (ConnectionError, http.client.HTTPException):
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            assert all(rest(client) == b"" for client in clients[:8])
            assert all(len(rest(client)) < len(BIG) for client in clients[8:])

    serving(work)


def test_more_than_there_is_room_for() -> None:
    def work(port: int) -> None:
        with waiting(port, MAX_CALLERS) as inside:
            with waiting(port, 50) as outside:
                assert all(rest(client) == b"" for client in outside)
            for client in inside:
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")
                client.shutdown(socket.SHUT_WR)
                assert rest(client).startswith(b"HTTP/1.1 200 ")
        assert got(port, "/")[0] == 200

    serving(work)


def test_on_a_unix_socket(tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).upper())

    async def main() -> None:
        path = tmp_path / "s"
        made = Responder(UnixListener(str(path), 0o600), talk)
        made.start()
        assert path.stat().st_mode & 0o777 == 0o600
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b"hello\n")
        assert await asyncio.wait_for(reader.read(), TIMEOUT) == b"HELLO\n"
        writer.close()
        # One who waits is hung up on.
        reader, writer = await asyncio.open_unix_connection(str(path))
        await made.close()
        assert await asyncio.wait_for(reader.read(), TIMEOUT) == b""
        writer.close()
        assert not path.exists()

    asyncio.run(main())
