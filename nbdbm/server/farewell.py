"""The end of a connection over vsock, told in such a way that the client sees an end and not an error.

With TCP and Unix sockets, what was sent before a close arrives, and then the end. With vsock, a client that
says goodbye, shuts down its half and then reads to the end, as libnbd does, may be told ENOTCONN instead
if we have closed first. So the server shuts down its own half, waits for the client's, and then closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

PATIENCE = 5.0
"""Seconds that the client gets to shut down or close: nothing but a descriptor waits for it."""


class Farewell:
    """Keeps a connection from being closed for a while, though its transport is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = sock.dup()
        self._socket.setblocking(False)
        with contextlib.suppress(OSError):  # gone already
            self._socket.shutdown(socket.SHUT_WR)
        self._loop.add_reader(self._socket, self._read)
        self._timer = self._loop.call_later(PATIENCE, self._close)

    def _read(self) -> None:
        try:
            if self._socket.recv(1 << 16):
                return  # whatever it is, it comes too late
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            pass  # that, too, is an end
        self._close()

    def _close(self) -> None:
        self._timer.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()


def part(sock: socket.socket | None) -> None:
    """Called when a transport is about to close ``sock``: does what its family needs for a good end."""
    if sock is not None and sock.family == getattr(socket, "AF_VSOCK", None):
        with contextlib.suppress(OSError):  # no descriptor left for it: then without
            Farewell(sock)
