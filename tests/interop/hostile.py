"""A client that says exactly what it is told to, and the words to tell it."""

from __future__ import annotations

import socket
import struct
from typing import Any

from nbdbm.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    IHAVEOPT,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Opt,
    Rep,
)
from tests.support import libnbd, servers


class Peer:
    """A client that says exactly what it is told to."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected

    def send(self, *pieces: bytes) -> None:
        self.socket.sendall(b"".join(pieces))

    def pour(self, data: bytes, seconds: float = 3) -> int:
        """Send until the server takes no more for a while, or is gone; return how many bytes it took."""
        self.socket.settimeout(seconds)
        sent = 0
        try:
            while sent < len(data):
                sent += self.socket.send(data[sent : sent + (1 << 20)])
        except (TimeoutError, ConnectionError):
            pass
        return sent

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            if not piece:
                raise ConnectionResetError(f"the server hung up after {len(data)} of {length} bytes")
            data += piece
        return data

    def hung_up(self) -> bool:
        """Whether the server ends this connection within the timeout, having read what was sent."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return True

    def reset(self) -> None:
        """Be gone at once, without a goodbye of any kind: over TCP, with a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def greet(self, flags: int = 3) -> None:
        assert self.receive(18)[:8] == b"NBDMAGIC"
        self.send(struct.pack(">I", flags))

    def reply(self) -> tuple[int, int, bytes]:
        """One option reply: option, type, data."""
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == OPTION_REPLY_MAGIC
        return option, kind, self.receive(length)

    def chunk(self) -> tuple[int, int, int, bytes]:
        """One chunk of a structured reply: flags, type, cookie, data."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.receive(20))
        assert magic == STRUCTURED_REPLY_MAGIC
        return flags, kind, cookie, self.receive(length)

    def extended_chunk(self) -> tuple[int, int, int, bytes]:
        """The same with extended headers."""
        magic, flags, kind, cookie, _, length = struct.unpack(">IHHQQQ", self.receive(32))
        assert magic == EXTENDED_REPLY_MAGIC
        return flags, kind, cookie, self.receive(length)

    def final_reply(self) -> int:
        """The type of the reply that ends an option."""
        while True:
            _, kind, _ = self.reply()
            if kind == Rep.ACK or kind & 1 << 31:
                return kind

    def go(self, *options: tuple[int, bytes]) -> None:
        """Negotiate ``options``, then enter transmission."""
        self.greet()
        for code, data in (*options, (Opt.GO, struct.pack(">IH", 0, 0))):
            self.send(option(code, data))
            assert self.final_reply() == Rep.ACK


def option(code: int, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack(">QII", IHAVEOPT, code, len(data) if length is None else length) + data


def request(kind: int, offset: int = 0, length: int = 0, cookie: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">IHHQQI", REQUEST_MAGIC, flags, kind, cookie, offset, length)


def extended(kind: int, offset: int = 0, length: int = 0, cookie: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">IHHQQQ", EXTENDED_REQUEST_MAGIC, flags, kind, cookie, offset, length)


def queries(*names: bytes) -> bytes:
    """The data of a meta context option for the default export."""
    return b"".join(
        [struct.pack(">II", 0, len(names)), *(struct.pack(">I", len(name)) + name for name in names)]
    )


ALLOCATION = queries(b"base:allocation")


def client(server: servers.Server) -> Any:
    """A good client."""
    h = libnbd.module().NBD()
    h.connect_uri(server.uri)
    return h
