"""The fast path: small reads and writes that need no waiting, answered in the turn that received them.

A coroutine, an account and a buffer for each request cost more than the request where its data is in the
page cache. Here a whole batch of requests is carried out synchronously, the replies are gathered in one
arena, header and payload behind each other, and one system call sends them:

    received   | READ | READ | FLUSH | WRITE | READ |          events, in order
    arena      | head data | head data | head | head data |    one send
    left over          FLUSH                                    the general way (dispatch.py)

Whatever cannot be done now (not in the page cache, several pieces, a cluster to allocate, large, with
flags) is left to the general way; NBD allows replies in any order. The two ways answer alike:
tests/server/test_fastpath.py has every request go through both.
"""

from __future__ import annotations

import socket

from nbdbm.exports import Export
from nbdbm.nbd.events import Event, Read, Write
from nbdbm.nbd.protocol import ServerProtocol
from nbdbm.nbd.transmission import HEAD

ARENA = 512 * 1024
"""Bytes of replies gathered for one send, and sent early when it is full. Shared by all connections: it is
in use within one turn of the event loop only."""

TURN_BYTES = 2 * ARENA
"""Bytes of replies in one turn of the event loop; then other connections get theirs. What is left of the
batch goes the general way, which has limits of its own."""

LARGEST = 64 * 1024
"""Bytes; larger reads gain nothing here, and what is copied once more is better not copied."""

_arena = bytearray(ARENA)
_view = memoryview(_arena)


class FastPath:
    """Carries out requests of one connection on one export.

    Args:
        sock: where replies go as they are (no TLS); non-blocking.
    """

    __slots__ = ("_export", "_protocol", "_sock")

    def __init__(self, export: Export, protocol: ServerProtocol, sock: socket.socket) -> None:
        self._export = export
        self._protocol = protocol
        self._sock = sock

    def serve(self, events: list[Event]) -> tuple[list[Event], bytes]:
        """Carry out what can be done now: (the events that are left, replies that could not be sent).

        Nothing is queued at the transport or the protocol when this is called. Once something could not
        be sent, no further event is carried out.
        """
        left: list[Event] = []
        budget = TURN_BYTES
        try_read, try_write = self._export.try_read, self._export.try_write
        pack_read, pack_done = self._protocol.pack_read, self._protocol.pack_done
        settle = self._protocol.settle
        at = 0
        for number, event in enumerate(events):
            if type(event) is Read:
                cookie, offset, length, flags = event
                if flags or length > LARGEST:
                    left.append(event)
                    continue
                if at + HEAD + length > ARENA:
                    budget -= at
                    unsent = self._send(at)
                    at = 0
                    if unsent or budget < ARENA:
                        return left + events[number:], unsent
                start = at + pack_read(_arena, at, cookie, offset, length)
                if not try_read(_view[start : start + length], offset):
                    left.append(event)
                    continue
                at = start + length
                if settle is not None:
                    settle(cookie, offset)
            elif type(event) is Write:
                cookie, offset, data, flags = event
                if at + HEAD > ARENA:
                    unsent = self._send(at)
                    at = 0
                    if unsent:
                        return left + events[number:], unsent
                if flags or not try_write(offset, data):
                    left.append(event)
                    continue
                at += pack_done(_arena, at, cookie, offset)
                if settle is not None:
                    settle(cookie, offset)
            else:
                left.append(event)
        return left, self._send(at)

    def _send(self, length: int) -> bytes:
        """Send the arena's first ``length`` bytes; return what the socket did not take. Errors are left to
        the transport, which meets them with the rest."""
        if not length:
            return b""
        try:
            sent = self._sock.send(_view[:length])
        except OSError:
            sent = 0
        return bytes(_view[sent:length]) if sent < length else b""
