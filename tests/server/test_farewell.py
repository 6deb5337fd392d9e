"""An end in two steps, seen from the client; with Unix sockets, which vsock is like but for its closing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from nbdbm.server import farewell
from tests.server.running import run, until


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(20)
        yield ours, theirs


def is_open(ending: farewell.Farewell) -> bool:
    return ending._socket.fileno() >= 0


def test_ours_ends_first_then_theirs(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair

    async def main() -> None:
        ending = farewell.Farewell(ours)
        ours.close()
        assert theirs.recv(1) == b""
        theirs.send(b"too late")
        await asyncio.sleep(0.05)
        assert is_open(ending)
        theirs.shutdown(socket.SHUT_WR)
        await until(lambda: not is_open(ending))

    run(main)


def test_who_never_ends_is_not_waited_for(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(farewell, "PATIENCE", 0.05)

    async def main() -> None:
        ending = farewell.Farewell(pair[0])
        await until(lambda: not is_open(ending))

    run(main)


def test_vsock_only(pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    parted = []
    monkeypatch.setattr(farewell, "Farewell", parted.append)
    farewell.part(pair[0])
    farewell.part(None)
    assert not parted
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
        farewell.part(sock)
        assert parted == [sock]
