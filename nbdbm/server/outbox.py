"""Replies on their way to one client: past the transport while it holds nothing back, and never much into it.

What the socket does not take stays here, since the transport would copy it; the transport gets only as much
as makes it say when the client reads again. TLS takes all there is: what goes out is not what was written.
"""

from __future__ import annotations

import asyncio
import socket

from nbdbm.tunnel import Tunnel

JOIN_BELOW = 32 * 1024
"""Pieces of replies below this size are joined to one write, in bytes; copying larger ones costs more than
the call saved."""

HANDOVER = 16 * 1024
"""Bytes given to the transport when the client does not take more at once: it copies them and waits. Given
everything, forty clients that read nothing cost 2.4 GB instead of half of it."""

MAX_PIECES = 1024
"""Pieces that one system call sends: IOV_MAX."""

Pieces = list[bytes | memoryview]


class Outbox:
    """What was queued for one client and is not on its way yet.

    Args:
        sock: the transport's own socket, if what is written to it goes out as it is.
    """

    __slots__ = ("_transport", "blocked", "socket", "tunnel", "unsent")

    def __init__(self, sock: socket.socket | None) -> None:
        self.socket = sock
        """To send past the transport; None: it must not be done."""
        self.tunnel: Tunnel | None = None
        """TLS, once it is begun; then it is the transport."""
        self.blocked = False
        """The transport holds bytes that the client has not taken; it says so to the connection."""
        self.unsent: Pieces = []
        """Replies beyond what the transport holds, when it holds any."""
        self._transport: asyncio.Transport | None = None

    @property
    def full(self) -> bool:
        """Whether the client must take something first."""
        return bool(self.unsent) or self.blocked

    @property
    def left(self) -> int:
        """Bytes that the client has not taken yet."""
        assert self._transport is not None
        return self._transport.get_write_buffer_size() + sum(map(len, self.unsent))

    def attach(self, transport: asyncio.Transport) -> None:
        """Send through this, before anything is sent."""
        # 0: told as soon as anything is left over, and again when nothing is; buffers are reusable then.
        transport.set_write_buffer_limits(high=0)
        self._transport = transport

    def encrypt(self, tunnel: Tunnel) -> None:
        """Send through TLS from now on."""
        self.socket = None
        self._transport = self.tunnel = tunnel

    def send(self, pieces: Pieces) -> None:
        """Send what was left over, then ``pieces``. Their content must stay until nothing is left."""
        self.unsent += pieces
        if not self.unsent:
            return
        if self.socket is not None:
            self._send_directly(self.socket)
        else:
            pieces, self.unsent = self.unsent, []
            self._write(pieces)

    def _send_directly(self, sock: socket.socket) -> None:
        """One system call for all that is queued, past the transport, while that holds nothing back."""
        transport = self._transport
        assert transport is not None
        while self.unsent and not self.blocked and not transport.is_closing():
            self.unsent = send_now(sock, self.unsent)
            if self.unsent:
                first = memoryview(self.unsent[0])
                if len(first) > HANDOVER:
                    self.unsent[0] = first[HANDOVER:]
                else:
                    del self.unsent[0]
                transport.write(first[:HANDOVER])

    def _write(self, pieces: Pieces) -> None:
        transport = self._transport
        assert transport is not None
        if self.tunnel is not None:
            transport.writelines(pieces)
            return
        small: Pieces = []
        for piece in pieces:
            if len(piece) < JOIN_BELOW:
                small.append(piece)
                continue
            if small:
                transport.write(b"".join(small))
                small.clear()
            transport.write(piece)
        if small:
            transport.write(b"".join(small) if len(small) > 1 else small[0])


def send_now(sock: socket.socket, pieces: Pieces) -> Pieces:
    """Send what the socket takes without waiting; return the rest.

    Errors are left to the transport: it meets them with the rest, and closes.
    """
    at = 0
    while at < len(pieces):
        batch = pieces[at : at + MAX_PIECES]
        try:
            sent = sock.sendmsg(batch)
        except OSError:
            break
        at += len(batch)
        if sent < sum(map(len, batch)):
            for index, piece in enumerate(batch):
                if sent < len(piece):
                    return [memoryview(piece)[sent:], *batch[index + 1 :], *pieces[at:]]
                sent -= len(piece)
    return pieces[at:]
