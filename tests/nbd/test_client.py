"""The client's requests and replies: against hand-written servers, and back to back with our own."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdbm.errors import NbdError, UsageError
from nbdbm.extents import Extent
from nbdbm.nbd.client import ClientEvent, ClientProtocol, ContextsListed, ExportsListed, OptionRefused, Reply
from nbdbm.nbd.clienthandshake import ClientState
from nbdbm.nbd.constants import Cmd, CmdFlag, NbdErrno, Rep
from nbdbm.nbd.events import BlockStatus, Disconnected, Event, Read, Trim, Write
from nbdbm.nbd.limits import ClientLimits
from tests.nbd.test_clienthandshake import EXPORT, GREETING, rep
from tests.support.pair import CONTEXTS, Pair, content
from tests.support.slices import in_slices

MIB = 1 << 20
DONE = 1


def transmitting(structured: bool, extended: bool, limits: ClientLimits | None = None) -> ClientProtocol:
    """A client of a hand-written server, in transmission, with two contexts where there can be any."""
    made = ClientProtocol(structured=structured, extended=extended, limits=limits or ClientLimits())
    made.receive_data(GREETING)
    if extended:
        made.receive_data(rep(11, 1))
    elif structured:
        made.receive_data(rep(8, 1))
    if structured:
        made.set_contexts("disk", ["a:b", "c:d"])
        made.receive_data(rep(10, 4, b"\0\0\0\0a:b") + rep(10, 4, b"\0\0\0\7c:d") + rep(10, 1))
    made.go("disk")
    made.receive_data(rep(7, 3, EXPORT[:-2] + struct.pack(">H", 1 | 1 << 12)) + rep(7, 1))
    made.data_to_send()
    return made


def simple(error: int, cookie: int = 1, data: bytes = b"") -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


def chunk(
    flags: int, kind: int, payload: bytes = b"", *, cookie: int = 1, length: int | None = None
) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, size) + payload


def wide(flags: int, kind: int, payload: bytes = b"", *, offset: int = 0, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack(">IHHQQQ", 0x6E8A278C, flags, kind, 1, offset, size) + payload


SIMPLE, STRUCTURED, EXTENDED = (False, False), (True, False), (True, True)
DATA = bytes(range(100))


def replies(style: tuple[bool, bool], command: Cmd, answer: bytes) -> list[ClientEvent]:
    """What ``answer`` to one request of bytes 0 to 100 brings, however it arrives."""

    def run(pieces: list[bytes]) -> list[ClientEvent]:
        made = transmitting(*style)
        if command is Cmd.READ:
            made.read(0, 100)
        elif command is Cmd.BLOCK_STATUS:
            made.block_status(0, 100)
        else:
            made.write(0, DATA)
        events: list[ClientEvent] = []
        for piece in pieces:
            events += made.receive_data(piece)
        assert made.in_flight == (0 if events else 1)
        return [
            event._replace(extents={name: list(found) for name, found in event.extents.items()})  # type: ignore[misc]
            if isinstance(event, Reply) and event.extents
            else event
            for event in events
        ]

    return in_slices(answer, run)


def test_simple_read() -> None:
    assert replies(SIMPLE, Cmd.READ, simple(0, 1, DATA)) == [Reply(1, 0, "", memoryview(DATA))]


def test_simple_error() -> None:
    assert replies(SIMPLE, Cmd.READ, simple(5)) == [Reply(1, 5, "EIO")]
    assert replies(STRUCTURED, Cmd.WRITE, simple(12345)) == [Reply(1, 12345, "error 12345")]


def test_structured_read_in_two_parts_and_a_hole() -> None:
    answer = b"".join(
        [
            chunk(0, 1, struct.pack(">Q", 60) + DATA[60:]),
            chunk(0, 2, struct.pack(">QI", 0, 10)),
            chunk(0, 1, struct.pack(">Q", 10) + DATA[10:60]),
            chunk(DONE, 0),
        ]
    )
    expected = Reply(1, 0, "", memoryview(bytes(10) + DATA[10:]), ((0, 10),))
    assert replies(STRUCTURED, Cmd.READ, answer) == [expected]


def test_extended_read() -> None:
    answer = wide(DONE, 1, struct.pack(">Q", 0) + DATA)
    assert replies(EXTENDED, Cmd.READ, answer) == [Reply(1, 0, "", memoryview(DATA))]


def test_structured_status() -> None:
    answer = chunk(0, 5, struct.pack(">III", 7, 100, 1)) + chunk(DONE, 5, struct.pack(">III", 0, 100, 3))
    (reply,) = replies(STRUCTURED, Cmd.BLOCK_STATUS, answer)
    assert isinstance(reply, Reply)
    assert reply.extents == {"c:d": [Extent(100, 1)], "a:b": [Extent(100, 3)]}


def test_extended_status() -> None:
    answer = wide(0, 6, struct.pack(">IIQQ", 7, 1, 1 << 40, 1)) + wide(
        DONE, 6, struct.pack(">IIQQQQ", 0, 2, 50, 3, 50, 0)
    )
    (reply,) = replies(EXTENDED, Cmd.BLOCK_STATUS, answer)
    assert isinstance(reply, Reply)
    assert reply.extents == {"c:d": [Extent(100, 1)], "a:b": [Extent(50, 3), Extent(50, 0)]}


def test_error_chunks_after_data() -> None:
    error = struct.pack(">IH", 5, 4) + b"fire"
    answer = chunk(0, 1, struct.pack(">Q", 0) + DATA) + chunk(0, 0x8001, error) + chunk(DONE, 0)
    assert replies(STRUCTURED, Cmd.READ, answer) == [Reply(1, 5, "fire")]


def test_success_without_payload() -> None:
    assert replies(STRUCTURED, Cmd.WRITE, chunk(DONE, 0)) == [Reply(1, 0, "")]
    assert replies(STRUCTURED, Cmd.WRITE, simple(0)) == [Reply(1, 0, "")]
    assert replies(EXTENDED, Cmd.WRITE, wide(DONE, 0)) == [Reply(1, 0, "")]


HOSTILE: dict[str, tuple[tuple[bool, bool], Cmd, bytes, str]] = {
    "magic": (SIMPLE, Cmd.READ, b"\0" * 16, "magic"),
    "chunk_unnegotiated": (SIMPLE, Cmd.READ, chunk(DONE, 0), "magic"),
    "wide_unnegotiated": (STRUCTURED, Cmd.READ, wide(DONE, 0), "magic"),
    "simple_despite_extended": (EXTENDED, Cmd.WRITE, simple(0) + bytes(16), "magic"),
    "chunk_despite_extended": (EXTENDED, Cmd.WRITE, chunk(DONE, 0) + bytes(12), "magic"),
    "simple_read_despite_structured": (STRUCTURED, Cmd.READ, simple(0, 1, DATA), "simple reply"),
    "simple_error_read_despite_structured": (STRUCTURED, Cmd.READ, simple(5), "simple reply"),
    "cookie": (SIMPLE, Cmd.READ, simple(0, 2), "cookie 2"),
    "chunk_cookie": (STRUCTURED, Cmd.READ, chunk(DONE, 0, cookie=9), "cookie 9"),
    "wrong_origin": (EXTENDED, Cmd.WRITE, wide(DONE, 0, offset=512), "offset 512"),
    "none_not_done": (STRUCTURED, Cmd.WRITE, chunk(0, 0), "not the last"),
    "none_with_payload": (STRUCTURED, Cmd.WRITE, chunk(DONE, 0, b"x"), "limit is 0"),
    "unknown_type": (STRUCTURED, Cmd.WRITE, chunk(DONE, 9, b"x"), "type 9"),
    "data_for_write": (STRUCTURED, Cmd.WRITE, chunk(DONE, 1, struct.pack(">Q", 0) + DATA), "data in reply"),
    "data_without_data": (STRUCTURED, Cmd.READ, chunk(DONE, 1, bytes(8)), "8 bytes"),
    "data_outside": (STRUCTURED, Cmd.READ, chunk(DONE, 1, struct.pack(">Q", 1) + DATA), "outside"),
    "data_absurd": (EXTENDED, Cmd.READ, wide(DONE, 1, bytes(8), length=1 << 60), "outside"),
    "hole_long": (STRUCTURED, Cmd.READ, chunk(DONE, 2, bytes(13)), "limit is 12"),
    "hole_short": (STRUCTURED, Cmd.READ, chunk(DONE, 2, bytes(11)), "11 bytes"),
    "hole_outside": (STRUCTURED, Cmd.READ, chunk(DONE, 2, struct.pack(">QI", 0, 101)), "outside"),
    "too_little": (STRUCTURED, Cmd.READ, chunk(DONE, 1, struct.pack(">Q", 0) + DATA[:99]), "99 of 100"),
    "status_for_read": (STRUCTURED, Cmd.READ, chunk(DONE, 5, struct.pack(">III", 0, 1, 1)), "type 5"),
    "status_ext_unnegotiated": (
        STRUCTURED,
        Cmd.BLOCK_STATUS,
        chunk(DONE, 6, struct.pack(">IIQQ", 0, 1, 1, 1)),
        "type 6",
    ),
    "status_compact_despite_extended": (
        EXTENDED,
        Cmd.BLOCK_STATUS,
        wide(DONE, 5, struct.pack(">III", 0, 1, 1)),
        "type 5",
    ),
    "status_absurd": (STRUCTURED, Cmd.BLOCK_STATUS, chunk(DONE, 5, length=0xFFFFFFFF), "the limit is"),
    "status_missing": (
        STRUCTURED,
        Cmd.BLOCK_STATUS,
        chunk(DONE, 5, struct.pack(">III", 0, 100, 1)),
        "without status for c:d",
    ),
    "status_by_simple_reply": (STRUCTURED, Cmd.BLOCK_STATUS, simple(0), "without status"),
    "error_absurd": (STRUCTURED, Cmd.WRITE, chunk(DONE, 0x8001, length=1 << 30), "the limit is"),
}


@pytest.mark.parametrize(("style", "command", "answer", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile(style: tuple[bool, bool], command: Cmd, answer: bytes, words: str) -> None:
    with pytest.raises(NbdError, match=words):
        replies(style, command, answer)


def test_after_a_violation_nothing_is_parsed() -> None:
    made = transmitting(*SIMPLE)
    with pytest.raises(NbdError):
        made.receive_data(bytes(16))
    assert made.state is ClientState.CLOSED
    assert made.receive_data(simple(0)) == []


def test_a_large_status_comes_into_its_own_buffer() -> None:
    made = transmitting(*STRUCTURED)
    made.block_status(0, MIB)
    lengths = struct.pack(">20000I", *([8, 0, 8, 1] * 5000))
    answer = chunk(0, 5, bytes(4) + lengths) + chunk(DONE, 5, b"\0\0\0\7" + lengths)
    events: list[ClientEvent] = []
    for at in range(0, len(answer), 30_000):
        events += made.receive_data(answer[at : at + 30_000])
    (reply,) = events
    assert isinstance(reply, Reply) and reply.extents is not None
    assert {name: len(found) for name, found in reply.extents.items()} == {"a:b": 10_000, "c:d": 10_000}


def test_read_data_is_received_in_place() -> None:
    made = transmitting(*STRUCTURED)
    made.read(0, 8 * MIB)
    made.receive_data(chunk(DONE, 1, struct.pack(">Q", 0) + b"abc", length=8 * MIB + 8))
    view = made.get_buffer()
    assert len(view) == 8 * MIB - 3
    (reply,) = made.buffer_updated(len(view))
    assert isinstance(reply, Reply) and reply.data is not None
    assert reply.data[:4] == b"abc\0"


# requests


def test_requests_on_the_wire() -> None:
    made = transmitting(*EXTENDED)
    made.write(512, b"xy", CmdFlag.FUA)
    made.block_status(0, 1 << 40, CmdFlag.REQ_ONE, ["c:d"])
    made.disc()
    assert b"".join(made.data_to_send()) == (
        struct.pack(">IHHQQQ", 0x21E41C71, 33, 1, 1, 512, 2)
        + b"xy"
        + struct.pack(">IHHQQQ", 0x21E41C71, 40, 7, 2, 0, 12)
        + struct.pack(">QI", 1 << 40, 7)
        + struct.pack(">IHHQQQ", 0x21E41C71, 0, 2, 0, 0, 0)
    )


def test_compact_status_is_cut_to_what_fits() -> None:
    made = transmitting(*STRUCTURED)
    made.block_status(0, 1 << 40, contexts=["c:d"])
    assert struct.unpack(">IHHQQI", b"".join(made.data_to_send()))[1:] == (0, 7, 1, 0, 0xFFFF0000)


@pytest.mark.parametrize("style", [SIMPLE, EXTENDED], ids=["compact", "extended"])
def test_what_does_not_fit_is_not_sent(style: tuple[bool, bool]) -> None:
    made = transmitting(*style)
    too_long = 1 << (64 if style is EXTENDED else 32)
    for offset, length in ((0, too_long), (1 << 64, 1), (-1, 1)):
        with pytest.raises(UsageError, match="does not fit"):
            made.trim(offset, length)
    with pytest.raises(UsageError, match="the limit is"):
        made.read(0, 65 * MIB)
    assert made.data_to_send() == [] and made.in_flight == 0


def test_eof() -> None:
    made = transmitting(*SIMPLE)
    made.flush()
    made.disc()
    with pytest.raises(NbdError, match="closed the connection"):
        made.receive_eof()
    made.receive_data(simple(0))
    made.receive_eof()
    with pytest.raises(NbdError, match="closed the connection"):
        transmitting(*SIMPLE).receive_eof()


# back to back with our own server


STYLES = pytest.mark.parametrize(
    ("structured", "extended"), [SIMPLE, STRUCTURED, EXTENDED], ids=["simple", "structured", "extended"]
)
CUTS = pytest.mark.parametrize("cut", [1, 7, 1 << 20])


@STYLES
@CUTS
def test_session(structured: bool, extended: bool, cut: int) -> None:
    pair = Pair(structured=structured, extended=extended, cut=cut)
    assert (pair.client.structured, pair.client.extended) == (structured, extended)
    pair.client.list_exports()
    (listed,) = pair.run(ExportsListed)
    assert isinstance(listed, ExportsListed)
    assert [export.name for export in listed.exports] == ["disk", "scratch", "huge", "coarse"]
    pair.client.list_contexts("disk", ["qemu:dirty-bitmap:"])
    assert pair.run() == [ContextsListed(CONTEXTS[2:])]
    pair.client.info("missing")
    assert pair.run() == [OptionRefused(6, Rep.ERR_UNKNOWN, "no export 'missing'")]
    info = pair.go("disk", CONTEXTS if structured else ())
    assert (info.size, info.description, info.preferred_block) == (MIB, "a disk", 65536)
    assert info.contexts == (CONTEXTS if structured else ())
    pair.client.read(100, 3000)
    assert pair.reply().data == content(100, 3000)
    pair.client.cache(0, 512)
    assert pair.reply().error == 0
    pair.client.flush()
    assert pair.reply().error == 0
    pair.client.write(0, b"x" * 700)
    reply = pair.reply()
    assert reply.error == NbdErrno.EPERM
    assert reply.text == ("WRITE: the export is read-only" if structured else "EPERM")
    pair.client.read(MIB, 1)
    assert pair.errno() is NbdErrno.EINVAL
    if structured:
        pair.client.block_status(512, 700_000)
        extents = pair.reply().extents
        assert extents is not None and tuple(extents) == CONTEXTS
        assert all(found.covered == 700_000 and len(found) > 9 for found in extents.values())
        pair.client.block_status(0, MIB, CmdFlag.REQ_ONE)
        extents = pair.reply().extents
        assert extents is not None and all(len(found) == 1 for found in extents.values())
    else:
        pair.client.block_status(0, MIB)
        assert pair.errno() is NbdErrno.EINVAL
    pair.client.disc()
    pair.run()
    assert pair.requests[-1] == Disconnected(True, "the client said goodbye")


@STYLES
def test_writing(structured: bool, extended: bool) -> None:
    pair = Pair(structured=structured, extended=extended, cut=40_000)
    pair.go("scratch")
    pair.client.write(5, b"short")
    pair.client.write(0, bytes(300_000), CmdFlag.FUA)
    pair.client.write_zeroes(0, 512, CmdFlag.NO_HOLE)
    pair.client.trim(0, 512)
    pair.client.write(MIB, b"x")
    # What the core refuses on its own overtakes what it hands out.
    answers = sorted((reply.cookie, reply.error) for reply in pair.run() if isinstance(reply, Reply))
    assert answers == [
        (1, 0),
        (2, 0),
        (3, 0),
        (4, 0),
        (5, NbdErrno.ENOSPC),
    ]
    first, second = pair.requests[:2]
    assert isinstance(first, Write) and first.data == b"short"
    assert isinstance(second, Write) and second.data == bytes(300_000) and second.flags == CmdFlag.FUA


@STYLES
def test_replies_in_another_order(structured: bool, extended: bool) -> None:
    pair = Pair(structured=structured, extended=extended)
    pair.go("disk")
    held: list[Event] = []
    pair.answer = held.append
    cookies = [pair.client.read(at, 700) for at in (0, 100, 200)]
    assert pair.run() == []
    for event in reversed(held):
        pair.serve(event)
    found = [reply for reply in pair.run() if isinstance(reply, Reply)]
    assert [reply.cookie for reply in found] == cookies[::-1]
    assert [reply.data for reply in found] == [content(at, 700) for at in (200, 100, 0)]


@STYLES
def test_sparse_read(structured: bool, extended: bool) -> None:
    pair = Pair(structured=structured, extended=extended)
    pair.go("disk")

    def serve(event: Event) -> None:
        assert isinstance(event, Read)
        chunks = [(4096, None), (4096, b"x" * 4096), (1000, None)]
        pair.server.reply_read(event.cookie, event.offset, chunks)

    pair.answer = serve
    pair.client.read(4096, 9192)
    reply = pair.reply()
    assert reply.data == bytes(4096) + b"x" * 4096 + bytes(1000)
    assert reply.holes == (((4096, 4096), (12288, 1000)) if structured else ())


def test_extended_status_of_64_bits_for_one_context() -> None:
    pair = Pair()
    pair.go("huge", CONTEXTS)
    pair.client.block_status(0, 1 << 46, contexts=[CONTEXTS[2]])
    reply = pair.reply()
    assert reply.extents is not None and list(reply.extents) == [CONTEXTS[2]]
    (event,) = pair.requests
    assert isinstance(event, BlockStatus)
    assert (event.length, event.contexts) == (1 << 46, ((2, CONTEXTS[2]),))
    pair.client.trim(0, 1 << 45)
    assert pair.reply().error == 0
    assert pair.requests[-1] == Trim(2, 0, 1 << 45, CmdFlag(0))


@STYLES
def test_refused_go(structured: bool, extended: bool) -> None:
    pair = Pair(structured=structured, extended=extended)
    pair.client.go("missing")
    assert pair.run() == [OptionRefused(7, Rep.ERR_UNKNOWN, "no export 'missing'")]
    pair.go("disk")


# any input


@settings(max_examples=300, deadline=None)
@given(
    style=st.sampled_from([SIMPLE, STRUCTURED, EXTENDED]),
    head=st.sampled_from([b"", simple(0)[:4], chunk(1, 1)[:6], wide(1, 1)[:6], wide(1, 6)[:8]]),
    garbage=st.binary(max_size=200),
)
def test_garbage_raises_nothing_but_nbderror(style: tuple[bool, bool], head: bytes, garbage: bytes) -> None:
    made = transmitting(*style)
    made.read(0, 100)
    made.block_status(0, 100)
    try:
        made.receive_data(head + garbage)
    except NbdError:
        assert made.state is ClientState.CLOSED


@settings(max_examples=300, deadline=None)
@given(
    start=st.sampled_from(
        [b"", GREETING, GREETING + rep(11, 1), GREETING + rep(11, 1) + rep(3, 2, b"")[:-4]]
    ),
    garbage=st.binary(max_size=200),
)
def test_garbage_in_the_handshake_raises_nothing_but_nbderror(start: bytes, garbage: bytes) -> None:
    made = ClientProtocol()
    try:
        for event in made.receive_data(start):
            assert event is not None
            made.list_exports()
        made.receive_data(garbage)
    except NbdError:
        assert made.state is ClientState.CLOSED
