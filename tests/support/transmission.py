"""Requests in hand-written bytes to a server's core in transmission, and what becomes of them."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from nbdbm.nbd.catalog import ExportInfo
from nbdbm.nbd.constants import CmdFlag
from nbdbm.nbd.events import Event, GoRequested
from nbdbm.nbd.handshake import HeaderStyle
from nbdbm.nbd.limits import DEFAULT_LIMITS, Limits
from nbdbm.nbd.protocol import ServerProtocol
from tests.support.options import FLAGS, info_data, meta_data, opt
from tests.support.pair import DISK, ListCatalog, events_without_data
from tests.support.slices import in_slices

SIMPLE, STRUCTURED, EXTENDED = HeaderStyle
STYLES = pytest.mark.parametrize("style", list(HeaderStyle), ids=lambda style: style.name.lower())
CHUNKED = pytest.mark.parametrize("style", [STRUCTURED, EXTENDED], ids=lambda style: style.name.lower())

MIB = 1 << 20
NONE = CmdFlag(0)
PAYLOAD = CmdFlag.PAYLOAD_LEN


def serving(
    info: ExportInfo = DISK,
    style: HeaderStyle = SIMPLE,
    *,
    limits: Limits = DEFAULT_LIMITS,
    contexts: bool = True,
    allocate: Callable[[int], bytearray | None] = bytearray,
) -> ServerProtocol:
    """A protocol in transmission on ``info``, with all of its contexts where there can be any."""
    protocol = ServerProtocol(ListCatalog(info), limits=limits, allocate=allocate)
    data = FLAGS
    if style is not SIMPLE:
        data += opt(11 if style is EXTENDED else 8)
        if contexts:
            data += opt(10, meta_data(info.name, *info.contexts))
    assert protocol.receive_data(data + opt(7, info_data(info.name))) == [GoRequested(info.name)]
    assert protocol.accept(info) == []
    protocol.data_to_send()
    return protocol


def request(
    style: HeaderStyle, command: int, cookie: int, offset: int, length: int, flags: int = 0, data: bytes = b""
) -> bytes:
    if style is EXTENDED:
        return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length) + data
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + data


Outcome = tuple[list[Event], list[tuple[int, int]]]


def outcome(style: HeaderStyle, info: ExportInfo, data: bytes, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Events and (cookie, error) of the replies that ``data`` brings, however it arrives."""

    def run(pieces: list[bytes]) -> Outcome:
        protocol = serving(info, style, limits=limits)
        events: list[Event] = []
        for piece in pieces:
            events += protocol.receive_data(piece)
        return events_without_data(events), errors(b"".join(protocol.data_to_send()))

    return in_slices(data, run)


def errors(data: bytes) -> list[tuple[int, int]]:
    """(cookie, error) of each reply, all without content."""
    found = []
    while data:
        magic = int.from_bytes(data[:4], "big")
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", data[4:16])
            data = data[16:]
        else:
            if magic == 0x668E33EF:
                flags, kind, cookie, length = struct.unpack(">HHQI", data[4:20])
                data = data[20:]
            else:
                assert magic == 0x6E8A278C
                flags, kind, cookie, _, length = struct.unpack(">HHQQQ", data[4:32])
                data = data[32:]
            assert flags == 1 and kind in (0, 0x8001)
            error = struct.unpack(">I", data[:4])[0] if kind else 0
            if kind:
                text = struct.unpack(">H", data[4:6])[0]
                assert 0 < text == length - 6
            data = data[length:]
        found.append((cookie, error))
    return found
