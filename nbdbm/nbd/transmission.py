"""The transmission phase without its bytes' arrival: judging requests, and building replies.

``Judge`` says what can be said from the negotiation alone, so that events are always legal. The reply
builders, one class for each header style, append to a list of buffers and never copy a payload.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple, Protocol

from nbdbm.extents import ExtentList
from nbdbm.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    NbdErrno,
    ReplyFlag,
    ReplyType,
    TransmissionFlag,
)
from nbdbm.nbd.handshake import HeaderStyle, Negotiated
from nbdbm.nbd.messages import (
    CHUNK,
    DATA_OFFSET,
    ERROR,
    EXTENDED_CHUNK,
    HOLE,
    SIMPLE_REPLY,
    STATUS_EXT_HEAD,
    STATUS_HEAD,
    Request,
    display,
)
from nbdbm.runs import pack

Output = list[bytes | memoryview]
Chunks = Sequence[tuple[int, memoryview | bytes | None]]

MAX_EXTENT_32 = 0xFFFF0000
"""Longest extent in a 32-bit BLOCK_STATUS chunk, bytes: what fits, less what keeps 64 KiB alignment."""

MAX_EXTENT_64 = (1 << 64) - 1
"""Longest extent in a 64-bit chunk, bytes: any."""

ZEROES = memoryview(bytes(64 * 1024))
"""What a hole reads as where it cannot be sent as a hole."""

HEAD = 64
"""Bytes that no header of a reply exceeds, a read's first chunk included."""

COOKIE_AT = 8
"""Where the cookie is in the header of a chunk, bytes from its start."""

_DONE = int(ReplyFlag.DONE)
_OFFSET_DATA, _OFFSET_HOLE = int(ReplyType.OFFSET_DATA), int(ReplyType.OFFSET_HOLE)
"""Plain numbers for the read path: a member looked up in its class costs as much as a small pack."""


# Judging


class Refusal(NamedTuple):
    """Why a request is not carried out."""

    error: NbdErrno
    text: str


class _Rule(NamedTuple):
    """What holds for one command whatever the export."""

    flags: CmdFlag = CmdFlag(0)
    """Allowed beside FUA."""
    needs: TransmissionFlag = TransmissionFlag(0)
    """Must be advertised for the command to be known."""
    writes: bool = False
    past_end: NbdErrno = NbdErrno.EINVAL
    """Error for a range that leaves the export ("Error values")."""
    limited: bool = False
    """The length may not exceed the maximum payload."""


RULES: dict[int, _Rule] = {
    Cmd.READ: _Rule(CmdFlag.DF, limited=True),
    Cmd.WRITE: _Rule(CmdFlag.PAYLOAD_LEN, writes=True, past_end=NbdErrno.ENOSPC),
    Cmd.FLUSH: _Rule(needs=TransmissionFlag.SEND_FLUSH),
    Cmd.TRIM: _Rule(needs=TransmissionFlag.SEND_TRIM, writes=True),
    Cmd.CACHE: _Rule(needs=TransmissionFlag.SEND_CACHE, limited=True),
    Cmd.WRITE_ZEROES: _Rule(
        CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO,
        needs=TransmissionFlag.SEND_WRITE_ZEROES,
        writes=True,
        past_end=NbdErrno.ENOSPC,
    ),
    Cmd.BLOCK_STATUS: _Rule(CmdFlag.REQ_ONE | CmdFlag.PAYLOAD_LEN),
}
"""The commands that have a reply. DISC has none and never comes here."""

_FLAG_NEEDS = {
    CmdFlag.FUA: TransmissionFlag.SEND_FUA,
    CmdFlag.DF: TransmissionFlag.SEND_DF,
    CmdFlag.FAST_ZERO: TransmissionFlag.SEND_FAST_ZERO,
}


class Judge:
    """Says of a request why it must be refused, from what was negotiated.

    The order of the checks is qemu-nbd's: who may write, range, size, flags; a client that breaks
    several rules at once sees the same error from both.
    """

    __slots__ = ("_allowed", "_negotiated")

    def __init__(self, negotiated: Negotiated) -> None:
        self._negotiated = negotiated
        told = negotiated.info.flags
        missing = CmdFlag(0)
        for flag, needed in _FLAG_NEEDS.items():
            if not told & needed:
                missing |= flag
        if not negotiated.extended:
            missing |= CmdFlag.PAYLOAD_LEN
        self._allowed = {
            command: int((rule.flags | CmdFlag.FUA) & ~missing) for command, rule in RULES.items()
        }

    def check(self, request: Request) -> Refusal | None:
        """Why not, or None. ``request.length`` is what the command is about, not a payload's length."""
        rule = RULES.get(request.type)
        if rule is None:
            return Refusal(NbdErrno.EINVAL, f"unknown command {request.type}")
        name = Cmd(request.type).name
        info = self._negotiated.info
        offset, length = request.offset, request.length
        if rule.writes and info.flags & TransmissionFlag.READ_ONLY:
            return Refusal(NbdErrno.EPERM, f"{name}: the export is read-only")
        if offset + length > info.size:
            return Refusal(
                rule.past_end, f"{name}: {offset}+{length} is past the end of the export, {info.size} bytes"
            )
        if rule.limited and length > self._negotiated.maximum_payload:
            # A simple reply has one fixed size, so the specification knows no EOVERFLOW there.
            error = NbdErrno.EOVERFLOW if self._negotiated.structured else NbdErrno.EINVAL
            return Refusal(error, f"{name}: {length} bytes, the limit is {self._negotiated.maximum_payload}")
        wrong = request.flags & ~self._allowed[request.type]
        if wrong:
            return Refusal(NbdErrno.EINVAL, f"{name}: flags {wrong:#x} are not allowed here")
        if rule.needs and not info.flags & rule.needs:
            return Refusal(NbdErrno.EINVAL, f"{name}: not advertised for this export")
        if (offset | length) % info.minimum_block:
            return Refusal(
                NbdErrno.EINVAL, f"{name}: {offset}+{length} is not aligned to {info.minimum_block} bytes"
            )
        if request.type == Cmd.BLOCK_STATUS:
            if not self._negotiated.contexts:
                return Refusal(NbdErrno.EINVAL, f"{name}: no metadata context was selected")
            if not length:
                return Refusal(NbdErrno.EINVAL, f"{name}: needs a length")
        return None


# Replies


class Origins:
    """Which offset the request of each cookie in flight had; every extended reply repeats it.

    A client SHOULD NOT use one cookie for several requests at once, but it may.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: dict[int, int | list[int]] = {}

    def note(self, cookie: int, offset: int) -> None:
        """A request was handed out."""
        held = self._held.get(cookie)
        if held is None:
            self._held[cookie] = offset
        elif isinstance(held, list):
            held.append(offset)
        else:
            self._held[cookie] = [held, offset]

    def take(self, cookie: int, offset: int) -> int:
        """Forget one request of ``cookie`` and return its offset: ``offset`` if one of several has that."""
        held = self._held.pop(cookie)
        if not isinstance(held, list):
            return held
        taken = held.pop(held.index(offset) if offset in held else 0)
        self._held[cookie] = held if len(held) > 1 else held[0]
        return taken


class ReplyBuilder(Protocol):
    """Appends replies to a list of buffers.

    ``origin`` is the request's offset, which extended headers repeat.
    """

    def done(self, out: Output, cookie: int, origin: int) -> None:
        """Success without payload."""

    def pack_done(self, buffer: bytearray | memoryview, at: int, cookie: int, origin: int) -> int:
        """Write what ``done`` appends at ``at`` of ``buffer``; return how many bytes it is, at most HEAD."""

    def pack_read(
        self, buffer: bytearray | memoryview, at: int, cookie: int, origin: int, length: int
    ) -> int:
        """Write what comes before ``length`` bytes of data that are a read's only chunk."""

    def pack_hole(
        self, buffer: bytearray | memoryview, at: int, cookie: int, origin: int, length: int
    ) -> int:
        """Write the whole answer to a read of nothing but zeroes; 0 if the style has none."""

    def error(self, out: Output, cookie: int, origin: int, error: NbdErrno, text: str) -> None:
        """Failure, with words if the style has room for them."""

    def read(self, out: Output, cookie: int, origin: int, chunks: Chunks) -> None:
        """A read's consecutive (length, data or None for a hole) from ``origin`` on."""

    def status(
        self, out: Output, cookie: int, origin: int, contexts: Sequence[tuple[int, ExtentList]]
    ) -> None:
        """Extents for each context id."""

    def pack_status(
        self, origin: int, contexts: Sequence[tuple[int, ExtentList]]
    ) -> tuple[bytearray, list[int]]:
        """``status`` for a cookie that is not known yet: the bytes, and where in them it goes (64 bits)."""


class SimpleReplies:
    """Simple replies ("Simple reply message")."""

    def pack_done(self, buffer: bytearray | memoryview, at: int, cookie: int, origin: int) -> int:
        SIMPLE_REPLY.pack_into(buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)
        return SIMPLE_REPLY.size

    def pack_read(
        self, buffer: bytearray | memoryview, at: int, cookie: int, origin: int, length: int
    ) -> int:
        SIMPLE_REPLY.pack_into(buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)
        return SIMPLE_REPLY.size

    def pack_hole(
        self, buffer: bytearray | memoryview, at: int, cookie: int, origin: int, length: int
    ) -> int:
        return 0

    def done(self, out: Output, cookie: int, origin: int) -> None:
        out.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie))

    def error(self, out: Output, cookie: int, origin: int, error: NbdErrno, text: str) -> None:
        out.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie))

    def read(self, out: Output, cookie: int, origin: int, chunks: Chunks) -> None:
        out.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie))
        for length, data in chunks:
            if data is None:
                append_zeroes(out, length)
            else:
                out.append(data)

    def status(
        self, out: Output, cookie: int, origin: int, contexts: Sequence[tuple[int, ExtentList]]
    ) -> None:
        raise AssertionError("BLOCK_STATUS has no simple reply, and no context can be selected")

    def pack_status(
        self, origin: int, contexts: Sequence[tuple[int, ExtentList]]
    ) -> tuple[bytearray, list[int]]:
        raise AssertionError("as status")


class StructuredReplies:
    """Structured replies ("Structured reply chunk message"); success without payload stays simple."""

    _READ = Struct(">IHHQIQ")
    """A chunk's head and the offset of its data."""

    def pack_done(self, buffer: bytearray | memoryview, at: int, cookie: int, origin: int) -> int:
        SIMPLE_REPLY.pack_into(buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)
        return SIMPLE_REPLY.size

    def pack_read(
        self, buffer: bytearray | memoryview, at: int, cookie: int, origin: int, length: int
    ) -> int:
        size = DATA_OFFSET.size + length
        self._READ.pack_into(buffer, at, STRUCTURED_REPLY_MAGIC, _DONE, _OFFSET_DATA, cookie, size, origin)
        return self._READ.size

    def pack_hole(
        self, buffer: bytearray | memoryview, at: int, cookie: int, origin: int, length: int
    ) -> int:
        whole = self._head(_DONE, _OFFSET_HOLE, cookie, origin, HOLE.size) + HOLE.pack(origin, length)
        buffer[at : at + len(whole)] = whole
        return len(whole)

    def done(self, out: Output, cookie: int, origin: int) -> None:
        out.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie))

    def empty(self, out: Output, cookie: int, origin: int) -> None:
        """Success of a READ that covers nothing: a READ never has a simple reply here."""
        out.append(self._head(ReplyFlag.DONE, ReplyType.NONE, cookie, origin, 0))

    def error(self, out: Output, cookie: int, origin: int, error: NbdErrno, text: str) -> None:
        raw = display(text)
        head = self._head(ReplyFlag.DONE, ReplyType.ERROR, cookie, origin, ERROR.size + len(raw))
        out.append(head + ERROR.pack(error, len(raw)) + raw)

    def read(self, out: Output, cookie: int, origin: int, chunks: Chunks) -> None:
        if len(chunks) == 1:
            length, data = chunks[0]
            if data is not None and length:
                # The common case: all data, one chunk, one pack.
                out.append(self._data_head(_DONE, cookie, origin, origin, length))
                out.append(data)
                return
        self._read_parts(out, cookie, origin, chunks)

    def _read_parts(self, out: Output, cookie: int, origin: int, chunks: Chunks) -> None:
        """Chunks in general: neighbours of one kind share a chunk, the last one carries DONE."""
        parts: list[tuple[int, list[memoryview | bytes] | None]] = []
        for length, data in chunks:
            if not length:
                continue
            if parts and (parts[-1][1] is None) is (data is None):
                held, buffers = parts[-1]
                parts[-1] = (held + length, buffers)
            else:
                buffers = None if data is None else []
                parts.append((length, buffers))
            if buffers is not None and data is not None:
                buffers.append(data)
        if not parts:
            self.empty(out, cookie, origin)
            return
        at = origin
        last = len(parts) - 1
        for index, (length, buffers) in enumerate(parts):
            flags = ReplyFlag.DONE if index == last else 0
            if buffers is None:
                head = self._head(flags, ReplyType.OFFSET_HOLE, cookie, origin, HOLE.size)
                out.append(head + HOLE.pack(at, length))
            else:
                out.append(self._data_head(flags, cookie, origin, at, length))
                out.extend(buffers)
            at += length

    def status(
        self, out: Output, cookie: int, origin: int, contexts: Sequence[tuple[int, ExtentList]]
    ) -> None:
        last = len(contexts) - 1
        for index, (number, extents) in enumerate(contexts):
            payload = self._extents(number, extents)
            flags = ReplyFlag.DONE if index == last else 0
            length = sum(map(len, payload))
            out.append(self._head(flags, self._status_type, cookie, origin, length))
            out.extend(payload)

    def pack_status(
        self, origin: int, contexts: Sequence[tuple[int, ExtentList]]
    ) -> tuple[bytearray, list[int]]:
        packed = bytearray()
        places = []
        last = len(contexts) - 1
        for index, (number, extents) in enumerate(contexts):
            payload = self._extents(number, extents)
            flags = ReplyFlag.DONE if index == last else 0
            places.append(len(packed) + COOKIE_AT)
            packed += self._head(flags, self._status_type, 0, origin, sum(map(len, payload)))
            packed += b"".join(payload)
        return packed, places

    # what differs with extended headers

    _status_type = ReplyType.BLOCK_STATUS

    def _head(self, flags: int, type: int, cookie: int, origin: int, length: int) -> bytes:
        return CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, type, cookie, length)

    def _data_head(self, flags: int, cookie: int, origin: int, at: int, length: int) -> bytes:
        size = DATA_OFFSET.size + length
        return self._READ.pack(STRUCTURED_REPLY_MAGIC, flags, _OFFSET_DATA, cookie, size, at)

    def _extents(self, number: int, extents: ExtentList) -> tuple[bytes, bytes]:
        # What follows an extent that is too long would no longer be contiguous: the client asks again.
        return STATUS_HEAD.pack(number), pack(extents.flat, 4, MAX_EXTENT_32)


class ExtendedReplies(StructuredReplies):
    """Extended replies ("Extended reply chunk message"): always chunks, with 64-bit extents."""

    _READ = Struct(">IHHQQQQ")

    _status_type = ReplyType.BLOCK_STATUS_EXT

    def pack_done(self, buffer: bytearray | memoryview, at: int, cookie: int, origin: int) -> int:
        head = self._head(_DONE, ReplyType.NONE, cookie, origin, 0)
        buffer[at : at + len(head)] = head
        return len(head)

    def pack_read(
        self, buffer: bytearray | memoryview, at: int, cookie: int, origin: int, length: int
    ) -> int:
        size = DATA_OFFSET.size + length
        self._READ.pack_into(
            buffer, at, EXTENDED_REPLY_MAGIC, _DONE, _OFFSET_DATA, cookie, origin, size, origin
        )
        return self._READ.size

    def done(self, out: Output, cookie: int, origin: int) -> None:
        self.empty(out, cookie, origin)

    def _head(self, flags: int, type: int, cookie: int, origin: int, length: int) -> bytes:
        return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, flags, type, cookie, origin, length)

    def _data_head(self, flags: int, cookie: int, origin: int, at: int, length: int) -> bytes:
        size = DATA_OFFSET.size + length
        return self._READ.pack(EXTENDED_REPLY_MAGIC, flags, _OFFSET_DATA, cookie, origin, size, at)

    def _extents(self, number: int, extents: ExtentList) -> tuple[bytes, bytes]:
        return STATUS_EXT_HEAD.pack(number, len(extents)), pack(extents.flat, 8, MAX_EXTENT_64)


REPLIES: dict[HeaderStyle, ReplyBuilder] = {
    HeaderStyle.SIMPLE: SimpleReplies(),
    HeaderStyle.STRUCTURED: StructuredReplies(),
    HeaderStyle.EXTENDED: ExtendedReplies(),
}


def append_zeroes(out: Output, length: int) -> None:
    """``length`` zero bytes, as slices of one shared block."""
    while length > len(ZEROES):
        out.append(ZEROES)
        length -= len(ZEROES)
    out.append(ZEROES[:length])
