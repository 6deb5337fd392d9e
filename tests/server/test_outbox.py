"""Replies on their way: whole and in order, and what the client does not take stays out of the transport."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import pytest

from nbdbm.server.outbox import HANDOVER, JOIN_BELOW, Outbox, Pieces, send_now


def drained(sock: socket.socket) -> bytes:
    """All that can be received now."""
    got = b""
    with contextlib.suppress(BlockingIOError):
        while data := sock.recv(1 << 20):
            got += data
    return got


class Recorder(asyncio.Transport):
    """A transport that sends nothing, and says so as one with a write limit of 0 does."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.outbox: Outbox | None = None
        self.closing = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self.written))

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))
        if self.outbox is not None:
            self.outbox.blocked = True


class TestSendNow:
    """Pieces go out in order, whole or not at all twice."""

    @pytest.mark.parametrize(
        "pieces",
        [[], [b"a"], [b"ab"] * 3000, [b"a", bytes(300_000), b"b", memoryview(bytes(5_000_000)), b"c", b"d"]],
    )
    def test_what_is_sent_and_the_rest_are_the_whole(self, pieces: list[bytes | memoryview]) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            rest = send_now(ours, list(pieces))
            got = b""
            with contextlib.suppress(BlockingIOError):
                while data := theirs.recv(1 << 20):
                    got += data
            assert got + b"".join(rest) == b"".join(pieces)
            assert bool(rest) == (len(b"".join(pieces)) > 5_000_000)

    def test_errors_are_the_transports(self) -> None:
        ours, theirs = socket.socketpair()
        with ours:
            theirs.close()
            assert send_now(ours, [b"a", b"b"]) == [b"a", b"b"]


class TestPastTheTransport:
    """The socket is written to directly as long as it takes all."""

    def test_what_is_taken_leaves_nothing(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            transport = Recorder()
            outbox = Outbox(ours)
            outbox.attach(transport)
            outbox.send([b"a", memoryview(b"b" * 1000)])
            assert not outbox.full and outbox.left == 0 and transport.written == []
            assert theirs.recv(2000) == b"a" + b"b" * 1000

    @pytest.mark.parametrize("size", [1000, 5_000_000])
    def test_the_transport_gets_little_of_the_rest(self, size: int) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            transport = Recorder()
            outbox = transport.outbox = Outbox(ours)
            outbox.attach(transport)
            first = bytes(5_000_000)
            while not outbox.full:
                outbox.send([first])
            (held,) = transport.written
            assert 0 < len(held) <= HANDOVER and outbox.blocked
            before = outbox.left
            # More that is queued waits here, and is not tried: it would overtake what the transport holds.
            outbox.send([b"x" * size])
            assert outbox.left == before + size and transport.written == [held]
            rest = drained(theirs)
            assert set(rest) == {0}
            # The transport has sent its part; all else follows in order.
            transport.written.clear()
            outbox.blocked = False
            outbox.send([])
            got = drained(theirs) + b"".join(map(bytes, transport.written)) + b"".join(outbox.unsent)
            assert got.endswith(b"\0" + b"x" * size) and len(got) == before - len(held) + size

    def test_nothing_once_the_transport_is_closing(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.setblocking(False)
            transport = Recorder()
            transport.closing = True
            outbox = Outbox(ours)
            outbox.attach(transport)
            outbox.send([b"late"])
            assert outbox.unsent == [b"late"] and transport.written == [] and drained(theirs) == b""


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([10], [10]),
        ([10, 20, 30], [60]),
        ([10, JOIN_BELOW], [10, JOIN_BELOW]),
        ([JOIN_BELOW, 10, JOIN_BELOW - 1, JOIN_BELOW], [JOIN_BELOW, JOIN_BELOW + 9, JOIN_BELOW]),
    ],
)
def test_small_pieces_are_joined_for_the_transport(sizes: list[int], expected: list[int]) -> None:
    transport = Recorder()
    outbox = Outbox(None)
    outbox.attach(transport)
    pieces: Pieces = [bytes([65 + number]) * size for number, size in enumerate(sizes)]
    outbox.send(pieces)
    assert list(map(len, transport.written)) == expected
    assert b"".join(transport.written) == b"".join(pieces) and outbox.unsent == []
