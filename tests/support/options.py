"""Options of the handshake in hand-written bytes, and the server's answers taken apart."""

from __future__ import annotations

import struct

from nbdbm.nbd.events import Event, GoRequested
from nbdbm.nbd.limits import DEFAULT_LIMITS, Limits
from nbdbm.nbd.protocol import ServerProtocol
from tests.support.pair import ListCatalog
from tests.support.slices import in_slices

GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
FLAGS = b"\x00\x00\x00\x03"
REPLY_MAGIC = bytes.fromhex("0003e889045565a9")


def opt(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    """An option; ``length`` instead of the true one, if it shall lie."""
    return b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length) + data


def string(text: bytes | str, length: int | None = None) -> bytes:
    """A counted string."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(raw) if length is None else length) + raw


def info_data(name: bytes | str = "disk", *requests: int) -> bytes:
    """What INFO and GO carry."""
    return string(name) + struct.pack(f">H{len(requests)}H", len(requests), *requests)


def meta_data(name: bytes | str, *queries: bytes | str) -> bytes:
    """What LIST_META_CONTEXT and SET_META_CONTEXT carry."""
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


Replies = list[tuple[int, int, bytes]]


def split(data: bytes) -> Replies:
    """Option replies as (option, reply, data)."""
    found = []
    at = 0
    while at < len(data):
        assert data[at : at + 8] == REPLY_MAGIC
        option, reply, length = struct.unpack_from(">III", data, at + 8)
        at += 20 + length
        assert at <= len(data)
        found.append((option, reply, data[at - length : at]))
    return found


def haggle(
    data: bytes, *, limits: Limits = DEFAULT_LIMITS, flags: bytes = FLAGS
) -> tuple[Replies, list[Event]]:
    """What options ``data`` bring, however they arrive. GO is accepted if the catalog has it."""

    def run(pieces: list[bytes]) -> tuple[Replies, list[Event]]:
        catalog = ListCatalog()
        protocol = ServerProtocol(catalog, limits=limits)
        sent = b"".join(protocol.data_to_send())
        assert sent == GREETING
        sent = b""
        events: list[Event] = []
        for piece in [flags, *pieces]:
            pending = protocol.receive_data(piece)
            while pending:
                event = pending.pop(0)
                events.append(event)
                if isinstance(event, GoRequested):
                    info = catalog.info(event.name)
                    assert info is not None
                    pending += protocol.accept(info)
            sent += b"".join(protocol.data_to_send())
        return split(sent), events

    return in_slices(data, run)


def kinds(replies: Replies) -> list[tuple[int, int]]:
    """(option, reply) of each."""
    return [(option, reply) for option, reply, _ in replies]


def sent(protocol: ServerProtocol) -> Replies:
    """The replies that are queued."""
    return split(b"".join(protocol.data_to_send()))
