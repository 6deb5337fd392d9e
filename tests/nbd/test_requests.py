"""Requests: each becomes its event or is refused, and the stream stays in step, however it arrives."""

from __future__ import annotations

import struct
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdbm.nbd.catalog import ExportInfo
from nbdbm.nbd.constants import Cmd, CmdFlag, NbdErrno
from nbdbm.nbd.events import (
    BlockStatus,
    Cache,
    Disconnected,
    Event,
    Flush,
    Read,
    Trim,
    Write,
    WriteZeroes,
)
from nbdbm.nbd.handshake import HeaderStyle, State
from nbdbm.nbd.limits import Limits
from nbdbm.nbd.protocol import ServerProtocol
from nbdbm.nbd.receiver import SMALL_BODY
from nbdbm.nbd.requests import FLAGS, owned
from tests.support.options import FLAGS as CLIENT_FLAGS
from tests.support.options import info_data, opt
from tests.support.pair import COARSE, CONTEXTS, DISK, HUGE, SCRATCH, ListCatalog, events_without_data
from tests.support.transmission import (
    CHUNKED,
    EXTENDED,
    MIB,
    NONE,
    PAYLOAD,
    SIMPLE,
    STRUCTURED,
    STYLES,
    Outcome,
    errors,
    outcome,
    request,
    serving,
)


@STYLES
def test_every_command_becomes_its_event(style: HeaderStyle) -> None:
    data = b"".join(
        [
            request(style, Cmd.READ, 1, 100, 200),
            request(style, Cmd.READ, 2, 0, 65536, CmdFlag.FUA),
            request(style, Cmd.WRITE, 3, 7, 5, PAYLOAD if style is EXTENDED else 0, b"hello"),
            request(style, Cmd.WRITE, 4, 7, 5, CmdFlag.FUA, b"HELLO"),
            request(style, Cmd.FLUSH, 5, 0, 0),
            request(style, Cmd.TRIM, 6, 0, MIB, CmdFlag.FUA),
            request(style, Cmd.CACHE, 7, 512, 512),
            request(style, Cmd.WRITE_ZEROES, 8, 0, 10, CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO),
            request(style, Cmd.DISC, 9, 0, 0),
            request(style, Cmd.READ, 10, 100, 200),
        ]
    )
    events, replies = outcome(style, SCRATCH, data)
    assert events == [
        Read(1, 100, 200, NONE),
        Read(2, 0, 65536, CmdFlag.FUA),
        Write(3, 7, memoryview(b"hello"), NONE),
        Write(4, 7, memoryview(b"HELLO"), CmdFlag.FUA),
        Flush(5, NONE),
        Trim(6, 0, MIB, CmdFlag.FUA),
        Cache(7, 512, 512, NONE),
        WriteZeroes(8, 0, 10, CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO),
        Disconnected(True, "the client said goodbye"),
    ]
    assert replies == []


@CHUNKED
def test_block_status(style: HeaderStyle) -> None:
    data = request(style, Cmd.BLOCK_STATUS, 1, 0, MIB, CmdFlag.REQ_ONE)
    events, _ = outcome(style, DISK, data)
    assert events == [BlockStatus(1, 0, MIB, CmdFlag.REQ_ONE, tuple(enumerate(CONTEXTS)))]
    assert all(FLAGS[value] == CmdFlag(value) for value in range(len(FLAGS)))


def test_64_bit_lengths() -> None:
    data = request(EXTENDED, Cmd.BLOCK_STATUS, 1, 0, HUGE.size) + request(EXTENDED, Cmd.TRIM, 2, 0, 1 << 40)
    events, _ = outcome(EXTENDED, HUGE, data)
    assert [event.length for event in events if isinstance(event, BlockStatus | Trim)] == [1 << 46, 1 << 40]


WRITE = b"w" * 1000
READ_AFTER = 77


REFUSED: dict[str, tuple[ExportInfo, int, int, int, int, bytes, NbdErrno]] = {
    "write_read_only": (DISK, Cmd.WRITE, 0, 1000, 0, WRITE, NbdErrno.EPERM),
    "write_past_the_end": (SCRATCH, Cmd.WRITE, MIB - 999, 1000, 0, WRITE, NbdErrno.ENOSPC),
    "write_wrong_flag": (SCRATCH, Cmd.WRITE, 0, 1000, CmdFlag.REQ_ONE, WRITE, NbdErrno.EINVAL),
    "write_unaligned": (COARSE, Cmd.WRITE, 0, 1000, 0, WRITE, NbdErrno.EINVAL),
    "write_nothing_read_only": (DISK, Cmd.WRITE, 0, 0, 0, b"", NbdErrno.EPERM),
    "read_past_the_end": (DISK, Cmd.READ, MIB, 1, 0, b"", NbdErrno.EINVAL),
    "trim_read_only": (DISK, Cmd.TRIM, 0, 1, 0, b"", NbdErrno.EPERM),
    "unknown_command": (DISK, 1000, 0, 1, 0, b"", NbdErrno.EINVAL),
    "unknown_flag": (DISK, Cmd.READ, 0, 1, 1 << 14, b"", NbdErrno.EINVAL),
    "status_of_nothing": (DISK, Cmd.BLOCK_STATUS, 0, 0, 0, b"", NbdErrno.EINVAL),
}


@STYLES
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refused_and_the_stream_stays_in_step(
    style: HeaderStyle, case: tuple[ExportInfo, int, int, int, int, bytes, NbdErrno]
) -> None:
    info, command, offset, length, flags, payload, error = case
    data = request(style, command, 1, offset, length, flags, payload)
    data += request(style, Cmd.READ, READ_AFTER, 0, 512)
    events, replies = outcome(style, info, data)
    assert events == [Read(READ_AFTER, 0, 512, NONE)]
    assert replies == [(1, error)]


@STYLES
@pytest.mark.parametrize("command", [Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES])
def test_zero_length_succeeds_with_nothing_to_do(style: HeaderStyle, command: Cmd) -> None:
    data = request(style, command, 1, 512, 0) + request(style, Cmd.READ, 2, 0, 512)
    events, replies = outcome(style, SCRATCH, data)
    assert events == [Read(2, 0, 512, NONE)]
    assert replies == [(1, 0)]


@STYLES
@pytest.mark.parametrize("data", [b"\0" * 32, b"HTTP" * 8], ids=["zeroes", "http"])
def test_wrong_magic_disconnects(style: HeaderStyle, data: bytes) -> None:
    events, replies = outcome(style, DISK, request(style, Cmd.READ, 1, 0, 512) + data)
    assert events[0] == Read(1, 0, 512, NONE)
    assert events[1:] == [Disconnected(False, f"request magic 0x{data[:4].hex().lstrip('0') or '0'}")]
    assert replies == []


def test_compact_and_extended_headers_do_not_mix() -> None:
    for style, other in ((STRUCTURED, EXTENDED), (EXTENDED, STRUCTURED)):
        events, _ = outcome(style, DISK, request(other, Cmd.READ, 1, 0, 512) * 2)
        (event,) = events
        assert isinstance(event, Disconnected) and "magic" in event.reason


# payloads


@STYLES
@pytest.mark.parametrize(
    "length", [1, SMALL_BODY, SMALL_BODY + 1, 3 * MIB + 5], ids=["1", "small", "large", "huge"]
)
@pytest.mark.parametrize("step", [1 << 12, 99_991, 1 << 24])
def test_write_payloads_of_all_sizes(style: HeaderStyle, length: int, step: int) -> None:
    payload = bytes(i * 7 % 251 for i in range(length))
    flags = PAYLOAD if style is EXTENDED else 0
    data = request(style, Cmd.READ, 1, 0, 1)
    data += request(style, Cmd.WRITE, 2, 5, length, flags, payload) * 2
    data += request(style, Cmd.READ, 3, 0, 1)
    protocol = serving(replace(SCRATCH, size=8 * MIB), style)
    events: list[Event] = []
    for at in range(0, len(data), step):
        events += protocol.receive_data(data[at : at + step])
    assert [type(event) for event in events] == [Read, Write, Write, Read]
    for write in events[1:3]:
        assert isinstance(write, Write) and write.offset == 5 and write.flags == NONE
        assert write.data == payload


@STYLES
@given(cuts=st.lists(st.integers(0, 400_000), max_size=4), refusals=st.integers(1, 3))
def test_a_payload_waits_for_memory(style: HeaderStyle, cuts: list[int], refusals: int) -> None:
    """``allocate`` gives nothing at first: no byte of the stream is lost, and the order stays."""
    info = replace(SCRATCH, size=8 * MIB)
    flags = PAYLOAD if style is EXTENDED else NONE
    payloads = [b"a" * 10, b"b" * (SMALL_BODY + 5), b"c" * 300_000, b"d" * 20]
    data = b"".join(
        request(style, Cmd.WRITE, cookie, cookie * MIB, len(payload), flags, payload)
        for cookie, payload in enumerate(payloads)
    )
    left = refusals

    def allocate(length: int) -> bytearray | None:
        nonlocal left
        left -= 1
        return None if left >= 0 else bytearray(length)

    protocol = serving(info, style, allocate=allocate)
    found: list[Event] = []
    bounds = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    for begin, end in pairwise(bounds):
        piece = memoryview(data)[begin:end]
        while piece:
            view = protocol.get_buffer()
            count = min(len(view), len(piece))
            view[:count] = piece[:count]
            piece = piece[count:]
            found += protocol.buffer_updated(count)
            while protocol.starved:
                assert not protocol.receiving
                assert protocol.starved in (len(payloads[1]), len(payloads[2]))
                found += protocol.feed()
    assert [event.cookie for event in found] == [0, 1, 2, 3]  # type: ignore[union-attr]
    assert [bytes(event.data) for event in found] == payloads  # type: ignore[union-attr]


def test_a_large_payload_is_received_in_place() -> None:
    protocol = serving(replace(SCRATCH, size=8 * MIB))
    protocol.receive_data(request(SIMPLE, Cmd.WRITE, 1, 0, 4 * MIB) + b"abc")
    view = protocol.get_buffer()
    assert len(view) == 4 * MIB - 3
    view[:] = bytes(4 * MIB - 3)
    (event,) = protocol.buffer_updated(len(view))
    assert isinstance(event, Write) and event.data[:4] == b"abc\0"


def test_large_payloads_come_in_the_buffers_given() -> None:
    given: list[bytearray] = []

    def allocate(length: int) -> bytearray:
        given.append(bytearray(2 * length))
        return given[-1]

    protocol = serving(replace(SCRATCH, size=8 * MIB), allocate=allocate)
    data = request(SIMPLE, Cmd.WRITE, 1, 0, SMALL_BODY, 0, bytes(SMALL_BODY))
    assert len(protocol.receive_data(data)) == 1 and not given
    payload = b"x" * (SMALL_BODY + 1)
    data = request(SIMPLE, Cmd.WRITE, 1, 0, len(payload), 0, payload)
    assert protocol.receive_data(data[:100]) == []
    (event,) = protocol.receive_data(data[100:])
    assert isinstance(event, Write) and event.data == payload
    assert event.data.obj is given[0] and len(given) == 1


def test_events_own_their_payload() -> None:
    protocol = serving(SCRATCH)
    (first,) = protocol.receive_data(request(SIMPLE, Cmd.WRITE, 1, 0, 4, 0, b"1111"))
    (second,) = protocol.receive_data(request(SIMPLE, Cmd.WRITE, 1, 0, 4, 0, b"2222"))
    assert isinstance(first, Write) and first.data == b"1111"
    assert isinstance(second, Write) and second.data == b"2222"


@pytest.mark.parametrize("style", [SIMPLE, STRUCTURED], ids=lambda style: style.name.lower())
@pytest.mark.parametrize(
    ("info", "offset", "error"),
    [
        (SCRATCH, 0, NbdErrno.EINVAL),
        (SCRATCH, SCRATCH.size - 99_999, NbdErrno.ENOSPC),
        (DISK, 0, NbdErrno.EPERM),
    ],
    ids=["writable", "past_the_end", "read_only"],
)
def test_oversize_write_is_drained(
    style: HeaderStyle, info: ExportInfo, offset: int, error: NbdErrno
) -> None:
    limits = Limits(max_payload=65536, max_drained=1 << 20)
    info = replace(info, preferred_block=4096)
    protocol = serving(info, style, limits=limits)
    assert protocol.receive_data(request(style, Cmd.WRITE, 1, offset, 100_000, 0, bytes(50_000))) == []
    assert protocol.data_to_send() == []
    assert protocol.receive_data(bytes(49_999)) == []
    assert protocol.receive_data(bytes(1) + request(style, Cmd.READ, 2, 0, 1)) == [Read(2, 0, 1, NONE)]
    assert errors(b"".join(protocol.data_to_send())) == [(1, error)]


@STYLES
@pytest.mark.parametrize("offset", [0, MIB], ids=["served", "refused"])
def test_much_is_received_at_once_only_while_it_is_payload(style: HeaderStyle, offset: int) -> None:
    """However much a client sends, it does not keep us busy with requests for long while others wait."""
    protocol = serving(SCRATCH, style)
    write = request(style, Cmd.WRITE, 1, 0, 4096, PAYLOAD if style is EXTENDED else 0, bytes(4096))
    read = request(style, Cmd.READ, 2, offset, 1)

    def receive(stream: bytes) -> int:
        """Give it as much of an endless ``stream`` as it takes at once; return how many messages that was."""
        view = protocol.get_buffer()
        unfinished = len(protocol._partial)
        stream = (stream * (len(view) // len(stream) + 2))[unfinished:]
        view[:] = stream[: len(view)]
        events = protocol.buffer_updated(len(view))
        return len(events) + len(protocol.data_to_send())

    for _ in range(3):
        assert receive(read) <= 150
        assert receive(read) <= 150
        # What is left of a read must not be taken for a write's beginning.
        protocol.receive_data(read[len(protocol._partial) :] if protocol._partial else b"")
        protocol.data_to_send()
        assert receive(write) <= 1
        assert receive(write) in range(60, 65), "a whole scratch"
        assert receive(write) in range(60, 65)
        protocol.receive_data(write[len(protocol._partial) :] if protocol._partial else b"")
        protocol.data_to_send()
        assert receive(read) > 8000, "the price of a change"


@pytest.mark.parametrize(
    ("style", "length"), [(SIMPLE, (1 << 20) + 1), (STRUCTURED, 0xFFFFFFFF), (EXTENDED, 65537)]
)
def test_absurd_write_is_answered_and_ends_the_connection(style: HeaderStyle, length: int) -> None:
    protocol = serving(SCRATCH, style, limits=Limits(max_payload=65536, max_drained=1 << 20))
    flags = PAYLOAD if style is EXTENDED else 0
    (event,) = protocol.receive_data(request(style, Cmd.WRITE, 1, 0, length, flags))
    assert event == Disconnected(False, f"payload of {length} bytes, the limit is 65536")
    assert errors(b"".join(protocol.data_to_send())) == [(1, NbdErrno.EINVAL)]


def test_absurd_payload_of_another_command_ends_the_connection() -> None:
    protocol = serving(SCRATCH, EXTENDED)
    (event,) = protocol.receive_data(request(EXTENDED, Cmd.READ, 1, 0, 1 << 60, PAYLOAD))
    assert isinstance(event, Disconnected)


def test_largest_write_is_accepted() -> None:
    protocol = serving(replace(SCRATCH, size=1 << 40))
    assert protocol.receive_data(request(SIMPLE, Cmd.WRITE, 1, 0, 32 * MIB)) == []
    assert len(protocol.get_buffer()) == 32 * MIB


# payloads of other commands: extended headers only


def select(effect: int, *ids: int) -> bytes:
    return struct.pack(f">Q{len(ids)}I", effect, *ids)


def status_payload(payload: bytes, flags: int = 0) -> Outcome:
    data = request(EXTENDED, Cmd.BLOCK_STATUS, 1, 512, len(payload), PAYLOAD | flags, payload)
    return outcome(EXTENDED, DISK, data + request(EXTENDED, Cmd.READ, 2, 0, 1))


def test_block_status_payload_selects_contexts() -> None:
    events, replies = status_payload(select(1024, 2, 0), CmdFlag.REQ_ONE)
    chosen = ((0, CONTEXTS[0]), (2, CONTEXTS[2]))
    assert events == [BlockStatus(1, 512, 1024, CmdFlag.REQ_ONE, chosen), Read(2, 0, 1, NONE)]
    assert replies == []


STATUS_PAYLOADS = {
    "no_ids": select(1024),
    "short": b"\0" * 7,
    "one_byte": b"\0",
    "ragged": select(1024, 0) + b"\0",
    "duplicate": select(1024, 1, 1),
    "unknown_id": select(1024, 9),
    "unknown_beside_known": select(1024, 0, 9),
    "more_than_there_are": select(1024, 0, 1, 2, 3, 4),
    "very_many": select(1024, *range(2000)),
    "no_length": select(0, 0),
    "past_the_end": select(MIB, 0),
    "absurd_length": select((1 << 64) - 1, 0),
}


@pytest.mark.parametrize("payload", STATUS_PAYLOADS.values(), ids=STATUS_PAYLOADS.keys())
def test_malformed_block_status_payload(payload: bytes) -> None:
    events, replies = status_payload(payload)
    assert events == [Read(2, 0, 1, NONE)]
    assert replies == [(1, NbdErrno.EINVAL)]


def test_block_status_payload_without_contexts() -> None:
    protocol = serving(DISK, EXTENDED, contexts=False)
    payload = select(1024, 0)
    data = request(EXTENDED, Cmd.BLOCK_STATUS, 1, 0, len(payload), PAYLOAD, payload)
    assert protocol.receive_data(data + request(EXTENDED, Cmd.READ, 2, 0, 1)) == [Read(2, 0, 1, NONE)]
    assert errors(b"".join(protocol.data_to_send())) == [(1, NbdErrno.EINVAL)]


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.FLUSH, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, 99])
def test_unexpected_payload_is_drained(command: int) -> None:
    data = request(EXTENDED, command, 1, 0, 500, PAYLOAD, bytes(500))
    events, replies = outcome(EXTENDED, SCRATCH, data + request(EXTENDED, Cmd.READ, 2, 0, 1))
    assert events == [Read(2, 0, 1, NONE)]
    assert replies == [(1, NbdErrno.EINVAL)]


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.BLOCK_STATUS])
def test_payload_flag_without_payload(command: int) -> None:
    data = request(EXTENDED, command, 1, 0, 0, PAYLOAD) + request(EXTENDED, Cmd.READ, 2, 0, 1)
    assert outcome(EXTENDED, DISK, data) == ([Read(2, 0, 1, NONE)], [(1, NbdErrno.EINVAL)])


def test_compact_requests_know_no_payload_flag() -> None:
    data = request(STRUCTURED, Cmd.BLOCK_STATUS, 1, 0, 512, PAYLOAD) + request(STRUCTURED, Cmd.READ, 2, 0, 1)
    assert outcome(STRUCTURED, DISK, data) == ([Read(2, 0, 1, NONE)], [(1, NbdErrno.EINVAL)])


# any input


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


@st.composite
def streams(draw: st.DrawFn, style: HeaderStyle) -> bytes:
    """Well-formed requests of any kind, legal or not."""
    parts = []
    for _ in range(draw(st.integers(1, 12))):
        command = draw(st.sampled_from([0, 0, 1, 1, 3, 4, 5, 6, 7, 7, 99]))
        flags = draw(st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 32, 33, 64]))
        offset = draw(st.sampled_from([0, 512, MIB - 512, MIB, 1 << 63]))
        length = draw(st.sampled_from([0, 1, 12, 512, 5000, 70_000, MIB + 1]))
        payload = b""
        if command == Cmd.WRITE or (style is EXTENDED and flags & PAYLOAD):
            payload = bytes([len(parts)]) * length
        parts.append(request(style, command, len(parts), offset, length, flags, payload))
    return b"".join(parts)


@STYLES
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_split_of_a_stream_gives_the_same(style: HeaderStyle, data: st.DataObject) -> None:
    stream = data.draw(streams(style))
    cuts = data.draw(st.lists(st.integers(0, 1 << 24), max_size=12))
    whole, cut = serving(SCRATCH, style), serving(SCRATCH, style)
    expected = whole.receive_data(stream)
    events: list[Event] = []
    for piece in pieces_of(stream, cuts):
        events += cut.receive_data(piece)
    assert events_without_data(events) == events_without_data(expected)
    sent = b"".join(whole.data_to_send())
    assert b"".join(cut.data_to_send()) == sent
    assert cut.state is whole.state is State.TRANSMISSION
    # Each request is either handed out or answered at once.
    assert len(events) + len(errors(sent)) == count_requests(stream, style)


def count_requests(stream: bytes, style: HeaderStyle) -> int:
    count, at = 0, 0
    while at < len(stream):
        if style is EXTENDED:
            _, flags, command, _, _, length = struct.unpack_from(">IHHQQQ", stream, at)
            at += 32
        else:
            _, flags, command, _, _, length = struct.unpack_from(">IHHQQI", stream, at)
            at += 28
        if command == Cmd.WRITE or (style is EXTENDED and flags & PAYLOAD):
            at += length
        count += 1
    return count


@STYLES
@settings(max_examples=100, deadline=None)
@given(garbage=st.binary(max_size=300), magic=st.booleans())
def test_garbage_in_transmission_never_raises(style: HeaderStyle, garbage: bytes, magic: bool) -> None:
    protocol = serving(SCRATCH, style)
    if magic:
        garbage = request(style, 0, 0, 0, 0)[:4] + garbage
    events = protocol.receive_data(garbage)
    events += protocol.receive_eof()
    assert isinstance(events[-1], Disconnected)
    assert protocol.receive_data(garbage) == []


def test_data_that_is_lent_is_the_scratch_until_it_is_owned() -> None:
    lending = ServerProtocol(ListCatalog(SCRATCH), lend=True)
    lending.receive_data(CLIENT_FLAGS + opt(7, info_data(SCRATCH.name)))
    lending.accept(SCRATCH)
    first, _, read = lending.receive_data(
        request(SIMPLE, Cmd.WRITE, 1, 0, 4, data=b"aaaa")
        + request(SIMPLE, Cmd.WRITE, 2, 0, 4, data=b"bbbb")
        + request(SIMPLE, Cmd.READ, 3, 0, 4)
    )
    assert isinstance(first, Write)
    kept = owned(first)
    assert isinstance(kept, Write) and kept == first
    assert owned(kept) is kept and owned(read) is read
    lending.receive_data(request(SIMPLE, Cmd.WRITE, 4, 0, 4, data=b"cccc"))
    assert bytes(first.data) == b"cccc" and bytes(kept.data) == b"aaaa"
    large = Write(1, 0, memoryview(bytearray(SMALL_BODY + 1)), NONE)
    assert owned(large) is large
