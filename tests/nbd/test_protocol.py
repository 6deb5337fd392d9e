"""The server's core around options and requests: replies, the end, the trace; and nothing raises."""

from __future__ import annotations

import logging
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nbdbm.extents import ExtentList
from nbdbm.nbd.constants import Cmd, CmdFlag, NbdErrno
from nbdbm.nbd.events import BlockStatus, Disconnected, GoRequested
from nbdbm.nbd.handshake import HeaderStyle
from nbdbm.nbd.limits import DEFAULT_LIMITS, Limits
from nbdbm.nbd.protocol import ServerProtocol
from tests.support.options import FLAGS, opt
from tests.support.pair import DISK, HUGE, SCRATCH, ListCatalog
from tests.support.transmission import (
    CHUNKED,
    EXTENDED,
    MIB,
    NONE,
    SIMPLE,
    STRUCTURED,
    STYLES,
    errors,
    request,
    serving,
)

# replies


@STYLES
def test_replies_carry_cookie_and_origin(style: HeaderStyle) -> None:
    protocol = serving(DISK, style)
    protocol.receive_data(request(style, Cmd.READ, 5, 1024, 3) + request(style, Cmd.CACHE, 6, 2048, 3))
    protocol.reply(6)
    protocol.reply_read(5, 1024, [(3, b"abc")])
    sent = b"".join(protocol.data_to_send())
    if style is EXTENDED:
        assert struct.unpack(">IHHQQQ", sent[:32])[3:] == (6, 2048, 0)
        assert struct.unpack(">IHHQQQ", sent[32:64])[3:] == (5, 1024, 11)
    assert sent.endswith(b"abc")
    assert protocol.data_to_send() == []


@CHUNKED
def test_status_of_100_000_extents(style: HeaderStyle) -> None:
    protocol = serving(HUGE, style)
    length = 0xFFFFFFFF if style is STRUCTURED else 1 << 40
    (event,) = protocol.receive_data(request(style, Cmd.BLOCK_STATUS, 5, 0, length))
    assert isinstance(event, BlockStatus)
    extents = ExtentList(0, length, protocol.extent_limit(event))
    for index in range(100_000):
        extents.add(4096, index & 1)
    protocol.reply_block_status(5, [(event.contexts[0][0], extents)])
    sent = b"".join(protocol.data_to_send())
    head, size = (24, 8) if style is STRUCTURED else (40, 16)
    assert len(sent) == head + 100_000 * size
    assert sent[-size:] == (4096).to_bytes(size // 2, "big") + (1).to_bytes(size // 2, "big")


def test_extent_limits() -> None:
    protocol = serving(DISK, STRUCTURED, limits=Limits(max_extents=100, max_extents_per_reply=150))
    assert protocol.max_extents == 37
    two = ((0, "a"), (1, "b"))
    assert protocol.extent_limit(BlockStatus(1, 0, 1, NONE, two)) == 75
    assert protocol.extent_limit(BlockStatus(1, 0, 1, NONE, two[:1])) == 100
    assert protocol.extent_limit(BlockStatus(1, 0, 1, CmdFlag.REQ_ONE, two)) == 1
    assert serving(DISK).max_extents == DEFAULT_LIMITS.max_extents


@STYLES
def test_what_is_known(style: HeaderStyle) -> None:
    protocol = serving(DISK, style)
    assert protocol.sparse_reads is (style is not SIMPLE)
    assert protocol.negotiated is not None
    assert protocol.negotiated.extended is (style is EXTENDED)
    assert not protocol.closed
    assert not ServerProtocol(ListCatalog()).sparse_reads


def test_replies_may_follow_a_goodbye() -> None:
    protocol = serving(DISK, EXTENDED)
    protocol.receive_data(request(EXTENDED, Cmd.READ, 1, 0, 1) + request(EXTENDED, Cmd.DISC, 2, 0, 0))
    assert protocol.closed
    protocol.reply_error(1, NbdErrno.ESHUTDOWN, "closing")
    assert errors(b"".join(protocol.data_to_send())) == [(1, NbdErrno.ESHUTDOWN)]


EOFS = {
    "between_requests": (b"", "without NBD_CMD_DISC"),
    "in_a_header": (request(SIMPLE, Cmd.READ, 1, 0, 1)[:20], "in the middle"),
    "in_a_small_payload": (request(SIMPLE, Cmd.WRITE, 1, 0, 100) + bytes(50), "in the middle"),
    "in_a_large_payload": (request(SIMPLE, Cmd.WRITE, 1, 0, MIB) + bytes(50), "in the middle"),
    "in_a_drained_payload": (request(SIMPLE, Cmd.WRITE, 1, MIB, 100) + bytes(50), "in the middle"),
}


@pytest.mark.parametrize(("data", "reason"), EOFS.values(), ids=EOFS.keys())
def test_eof(data: bytes, reason: str) -> None:
    protocol = serving(SCRATCH)
    assert protocol.receive_data(data) == []
    (event,) = protocol.receive_eof()
    assert isinstance(event, Disconnected) and not event.clean and reason in event.reason
    assert protocol.receive_eof() == []


def test_an_idle_connection_is_small() -> None:
    protocol = serving(DISK, EXTENDED)
    assert protocol._options is None and protocol._partial == b"" and protocol._out == []


def test_wire_trace(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "nbdbm.nbd.protocol"):
        protocol = serving(DISK, STRUCTURED)
        protocol.receive_data(
            request(STRUCTURED, Cmd.READ, 1, 0, 512) + request(STRUCTURED, Cmd.TRIM, 2, 0, 1)
        )
        protocol.reply_read(1, 0, [(512, bytes(512))])
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == ["< OPT_STRUCTURED_REPLY [0]", "> OPT_STRUCTURED_REPLY REP_ACK [0]"]
    assert "< READ #1 @0+512" in lines and "< TRIM #2 @0+1" in lines
    assert lines[-1] == "> CHUNK_OFFSET_DATA #1 [520] done"


# any input


@settings(max_examples=200, deadline=None)
@given(prefix=st.sampled_from([b"", FLAGS, FLAGS + opt(8)]), garbage=st.binary(max_size=300))
@example(prefix=b"", garbage=b"GET / HTTP/1.1\r\n\r\n")
def test_garbage_never_raises(prefix: bytes, garbage: bytes) -> None:
    protocol = ServerProtocol(ListCatalog())
    events = protocol.receive_data(prefix + garbage)
    if events and isinstance(events[-1], GoRequested):
        events = protocol.accept(DISK)
    events += protocol.receive_eof()
    assert isinstance(events[-1], Disconnected)
