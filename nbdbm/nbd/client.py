"""The client's half of the protocol, sans-I/O: negotiates, builds requests, and judges every reply.

The shell sends what ``data_to_send`` returns and feeds what arrives to ``receive_data`` (or through the
``get_buffer``/``buffer_updated`` door), which return events. The server is not trusted: what breaks the
protocol or claims too much raises NbdError, and the connection is then of no further use.

A session::

    client = ClientProtocol()                   # or extended=False, structured=False
    events: HandshakeReady                      # greeting, extended/structured agreed upon
    client.set_contexts("disk", ["base:allocation"])   -> ContextsSelected
    client.go("disk")                           -> Ready(info)
    cookie = client.read(0, 65536)              -> Reply(cookie, ...)
    client.disc()                               # then send what is queued and close

One option is in flight at a time: each of ``list_exports``, ``info``, ``list_contexts``,
``set_contexts``, ``go`` is answered by exactly one event, its own or OptionRefused, before the next one
may be asked. Requests may be in flight in any number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nbdbm.errors import NbdError, UsageError
from nbdbm.nbd.clientevents import (
    ClientEvent,
    ContextsListed,
    ContextsSelected,
    ExportsListed,
    HandshakeReady,
    InfoReceived,
    ListedExport,
    OptionRefused,
    Ready,
    Reply,
    StartTls,
)
from nbdbm.nbd.clienthandshake import ClientHandshake, ClientState, logger
from nbdbm.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    ReplyFlag,
    ReplyType,
    TransmissionFlag,
)
from nbdbm.nbd.limits import DEFAULT_CLIENT_LIMITS, ClientLimits
from nbdbm.nbd.messages import (
    CHUNK,
    DATA_OFFSET,
    EXTENDED_CHUNK,
    HOLE,
    SIMPLE_REPLY,
    U32,
    U64,
    Buffer,
    Chunk,
    ExtendedChunk,
    Request,
    SimpleReply,
)
from nbdbm.nbd.receiver import SMALL_BODY
from nbdbm.nbd.replies import InFlight, errno_text

__all__ = [
    "ClientEvent",
    "ClientProtocol",
    "ContextsListed",
    "ContextsSelected",
    "ExportsListed",
    "HandshakeReady",
    "InfoReceived",
    "ListedExport",
    "OptionRefused",
    "Ready",
    "Reply",
    "StartTls",
]

NO_FLAGS = CmdFlag(0)

CHUNK_ERROR = 1 << 15
"""Every error among the chunk types has this bit."""

MAX_COMPACT_STATUS = 0xFFFF0000
"""Longest BLOCK_STATUS under 32-bit headers, bytes: what fits, less what keeps 64 KiB alignment."""


class ClientProtocol(ClientHandshake):
    """One connection, seen by the client.

    Args:
        structured: ask for structured replies (needed for contexts unless extended is granted).
        extended: ask for extended headers first, falling back to structured replies.
        tls: insist on TLS before anything else; the event StartTls comes then.
        scratch: a receive buffer instead of the one shared by the whole process; needed only if
            connections live in several threads.
    """

    def __init__(
        self,
        *,
        structured: bool = True,
        extended: bool = True,
        tls: bool = False,
        limits: ClientLimits = DEFAULT_CLIENT_LIMITS,
        scratch: bytearray | None = None,
    ) -> None:
        super().__init__(structured, extended, tls, limits, scratch)
        # Requests that await their replies, and the chunk whose body is under way.
        self._requests: dict[int, InFlight] = {}
        self._cookie = 0
        self._after_body: Callable[[memoryview, list[ClientEvent]], None] | None = None

    @property
    def in_flight(self) -> int:
        """Requests without a complete answer."""
        return len(self._requests)

    # Receiving

    def buffer_updated(self, count: int) -> list[ClientEvent]:
        """Parse ``count`` bytes that were received into the last ``get_buffer``; raises NbdError."""
        events: list[ClientEvent] = []
        end = self._received(count)
        if self.state is ClientState.CLOSED:
            return events
        try:
            if self._body is not None:
                body = self._take_body()
                if body is not None:
                    assert self._after_body is not None
                    self._after_body(body, events)
            else:
                self._parse(end, events)
        except NbdError:
            self._become(ClientState.CLOSED)
            self._body = None
            raise
        return events

    def receive_data(self, data: bytes | memoryview) -> list[ClientEvent]:
        """The same for bytes at hand; raises NbdError."""
        events: list[ClientEvent] = []
        rest = memoryview(data)
        while rest:
            view = self.get_buffer()
            count = min(len(view), len(rest))
            view[:count] = rest[:count]
            rest = rest[count:]
            events += self.buffer_updated(count)
        return events

    def receive_eof(self) -> None:
        """The server closed; raises NbdError unless we had said goodbye and nothing is owed to us."""
        if self.state is ClientState.CLOSED or (self._goodbye and not self._requests):
            return
        if self.state is ClientState.EXPORT_NAME:
            raise NbdError(f"the server has no export {self._name!r} for us: it closed the connection")
        during = "" if self.state is ClientState.TRANSMISSION else " during the handshake"
        raise NbdError(f"the server closed the connection{during}")

    def data_to_send(self) -> list[bytes | memoryview]:
        """Take everything queued, in order; the caller sends it. Payload views are those of ``write``."""
        out = self._out
        self._out = []
        return out

    def _parse(self, end: int, events: list[ClientEvent]) -> None:
        at, before = 0, -1
        while at != before:
            before = at
            if self.state is ClientState.TRANSMISSION:
                at = self._parse_reply(at, end, events)
            elif self.state in (ClientState.AGREEING, ClientState.OPTIONS):
                at = self._parse_option_reply(at, end, events)
            elif self.state is ClientState.GREETING:
                at = self._parse_greeting(at, end, events)
            elif self.state is ClientState.EXPORT_NAME:
                at = self._parse_export_reply(at, end, events)
        if self.state is ClientState.STARTING_TLS:
            if at < end:
                # Somebody on the way may have put it there, to have it taken for what comes through TLS.
                raise NbdError("the server broke the protocol: plain text after it agreed to TLS")
            events.append(StartTls())
        self._keep(at, end)

    # Requests; each returns its cookie. What the server would refuse is not refused here.

    def read(self, offset: int, length: int, flags: CmdFlag = NO_FLAGS) -> int:
        """NBD_CMD_READ; UsageError if it is longer than we want to hold."""
        if length > self._limits.max_read:
            raise UsageError(f"a read of {length} bytes, the limit is {self._limits.max_read}")
        return self._send(Cmd.READ, offset, length, flags)

    def write(self, offset: int, data: bytes | memoryview, flags: CmdFlag = NO_FLAGS) -> int:
        """NBD_CMD_WRITE; ``data`` must stay as it is until it was sent."""
        if self.extended:
            flags |= CmdFlag.PAYLOAD_LEN
        cookie = self._send(Cmd.WRITE, offset, len(data), flags)
        self._out.append(data)
        return cookie

    def write_zeroes(self, offset: int, length: int, flags: CmdFlag = NO_FLAGS) -> int:
        """NBD_CMD_WRITE_ZEROES."""
        return self._send(Cmd.WRITE_ZEROES, offset, length, flags)

    def trim(self, offset: int, length: int, flags: CmdFlag = NO_FLAGS) -> int:
        """NBD_CMD_TRIM."""
        return self._send(Cmd.TRIM, offset, length, flags)

    def cache(self, offset: int, length: int, flags: CmdFlag = NO_FLAGS) -> int:
        """NBD_CMD_CACHE."""
        return self._send(Cmd.CACHE, offset, length, flags)

    def flush(self, flags: CmdFlag = NO_FLAGS) -> int:
        """NBD_CMD_FLUSH."""
        return self._send(Cmd.FLUSH, 0, 0, flags)

    def block_status(
        self,
        offset: int,
        length: int,
        flags: CmdFlag = NO_FLAGS,
        contexts: Sequence[str] | None = None,
    ) -> int:
        """NBD_CMD_BLOCK_STATUS for all selected contexts, or for ``contexts`` among them.

        Where the server has no means to narrow (extended headers), it reports all, and so does the Reply.
        Under 32-bit headers a longer range is cut to MAX_COMPACT_STATUS: it is a hint in any case.
        """
        assert self.export is not None
        wanted = self.contexts
        payload = b""
        if not self.extended:
            length = min(length, MAX_COMPACT_STATUS)
        elif contexts is not None and self.export.flags & TransmissionFlag.BLOCK_STAT_PAYLOAD:
            wanted = {name: self.contexts[name] for name in contexts}
            payload = U64.pack(length) + b"".join(map(U32.pack, wanted.values()))
            flags |= CmdFlag.PAYLOAD_LEN
        ids = {number: name for name, number in wanted.items()}
        cookie = self._send(Cmd.BLOCK_STATUS, offset, length, flags, ids, len(payload) or None)
        if payload:
            self._out.append(payload)
        return cookie

    def disc(self) -> None:
        """NBD_CMD_DISC: no reply comes; close once it is sent."""
        self._goodbye = True
        self._queue(Cmd.DISC, 0, 0, 0, NO_FLAGS)

    def _send(
        self,
        command: Cmd,
        offset: int,
        length: int,
        flags: CmdFlag,
        wanted: dict[int, str] | None = None,
        payload: int | None = None,
    ) -> int:
        """Queue a request's head and expect its reply."""
        cookie = self._cookie + 1
        self._queue(command, cookie, offset, length if payload is None else payload, flags)
        self._cookie = cookie
        self._requests[cookie] = InFlight(cookie, command, offset, length, flags, wanted)
        return cookie

    def _queue(self, command: Cmd, cookie: int, offset: int, length: int, flags: CmdFlag) -> None:
        assert self.state is ClientState.TRANSMISSION, "go() comes first"
        limit = 1 << 64 if self.extended else 1 << 32
        if not 0 <= offset < 1 << 64 or not 0 <= length < limit:
            raise UsageError(f"{command.name} {offset}+{length} does not fit into a request")
        make = Request.extended if self.extended else Request.compact
        request = make(command, cookie, offset, length, flags)
        if self._trace:
            logger.debug("> %s", request)
        self._out.append(request.pack())

    # Replies

    def _parse_reply(self, at: int, end: int, events: list[ClientEvent]) -> int:
        """Parse one reply or chunk at ``at``; return where the next begins, or ``at`` if it is incomplete."""
        if end - at < SIMPLE_REPLY.size:
            return at
        magic: int = U32.unpack_from(self._scratch, at)[0]
        if self.extended:
            expected, size = magic == EXTENDED_REPLY_MAGIC, EXTENDED_CHUNK.size
        elif magic == STRUCTURED_REPLY_MAGIC:
            expected, size = self.structured, CHUNK.size
        else:
            expected, size = magic == SIMPLE_REPLY_MAGIC, SIMPLE_REPLY.size
        if not expected:
            raise NbdError(f"the server broke the protocol: reply magic {magic:#x}")
        if end - at < size:
            return at
        if magic == SIMPLE_REPLY_MAGIC:
            simple = SimpleReply.parse(self._scratch, at)
            if self._trace:
                logger.debug("< %s", simple)
            return self._simple_reply(simple, at + size, end, events)
        if magic == STRUCTURED_REPLY_MAGIC:
            chunk = Chunk.parse(self._scratch, at)
            request = self._find(chunk.cookie)
        else:
            wide = ExtendedChunk.parse(self._scratch, at)
            request = self._find(wide.cookie)
            if wide.offset != request.offset:
                raise request.bad(f"a reply to offset {wide.offset}")
            chunk = Chunk(wide.magic, wide.flags, wide.type, wide.cookie, wide.length)
        after = self._chunk(chunk, request, at + size, end, events)
        if after is None:
            return at
        if self._trace:
            logger.debug("< %s", chunk)
        return after

    def _find(self, cookie: int) -> InFlight:
        request = self._requests.get(cookie)
        if request is None:
            raise NbdError(
                f"the server broke the protocol: a reply to cookie {cookie}, which is not in flight"
            )
        return request

    def _simple_reply(self, reply: SimpleReply, at: int, end: int, events: list[ClientEvent]) -> int:
        request = self._find(reply.cookie)
        if self.structured and request.command is Cmd.READ:
            raise request.bad("a simple reply to a read")
        if reply.error:
            request.fail(reply.error, errno_text(reply.error))
        elif request.command is Cmd.READ and request.length:
            into = request.content(request.offset, request.length)
            return self._fill(into, request, True, at, end, events)
        self._finish(request, events)
        return at

    def _chunk(
        self, chunk: Chunk, request: InFlight, at: int, end: int, events: list[ClientEvent]
    ) -> int | None:
        """Act on a chunk whose payload begins at ``at``; return where the next begins, None if not yet."""
        length, kind, done = chunk.length, chunk.type, bool(chunk.flags & ReplyFlag.DONE)
        if kind == ReplyType.OFFSET_DATA:
            if length <= DATA_OFFSET.size:
                raise request.bad(f"a data chunk of {length} bytes")
            if end - at < DATA_OFFSET.size:
                return None
            offset: int = DATA_OFFSET.unpack_from(self._scratch, at)[0]
            into = request.content(offset, length - DATA_OFFSET.size)
            return self._fill(into, request, done, at + DATA_OFFSET.size, end, events)
        act, limit = self._meaning(kind, request)
        if length > limit:
            raise request.bad(f"{chunk}, the limit is {limit}")
        if end - at < length:
            if length <= SMALL_BODY:
                return None

            def complete(body: memoryview, events: list[ClientEvent]) -> None:
                act(body)
                self._chunk_done(request, done, events)

            self._after_body = complete
            self._begin_body(memoryview(bytearray(length)), at, end)
            return end
        if kind == ReplyType.NONE and not done:
            raise request.bad("an empty chunk that is not the last")
        act(self._view[at : at + length])
        self._chunk_done(request, done, events)
        return at + length

    def _meaning(self, kind: int, request: InFlight) -> tuple[Callable[[memoryview], None], int]:
        """What a chunk's payload is given to, and how long it may be."""
        if kind == ReplyType.NONE:
            return _nothing, 0
        if kind == ReplyType.OFFSET_HOLE:

            def hole(payload: memoryview) -> None:
                if len(payload) != HOLE.size:
                    raise request.bad(f"a hole chunk of {len(payload)} bytes")
                request.hole(*HOLE.unpack(payload))

            return hole, HOLE.size
        if kind & CHUNK_ERROR:
            return lambda payload: request.error_chunk(kind, payload), self._limits.max_error_payload
        status = ReplyType.BLOCK_STATUS_EXT if self.extended else ReplyType.BLOCK_STATUS
        if kind == status and request.command is Cmd.BLOCK_STATUS:
            return request.status_ext if self.extended else request.status, self._limits.max_status
        raise request.bad(f"a chunk of type {kind}")

    def _fill(
        self, into: memoryview, request: InFlight, done: bool, at: int, end: int, events: list[ClientEvent]
    ) -> int:
        """Bring read data where it belongs: from the scratch, or received in place."""
        length = len(into)
        if end - at >= length:
            into[:] = self._view[at : at + length]
            self._chunk_done(request, done, events)
            return at + length

        def complete(body: memoryview, events: list[ClientEvent]) -> None:
            self._chunk_done(request, done, events)

        self._after_body = complete
        self._begin_body(into, at, end)
        return end

    def _chunk_done(self, request: InFlight, done: bool, events: list[ClientEvent]) -> None:
        if done:
            self._finish(request, events)

    def _finish(self, request: InFlight, events: list[ClientEvent]) -> None:
        request.finish()
        del self._requests[request.cookie]
        if request.error:
            events.append(Reply(request.cookie, request.error, request.text))
        else:
            holes = tuple(sorted(request.holes))
            extents = request.extents if request.command is Cmd.BLOCK_STATUS else None
            events.append(Reply(request.cookie, 0, "", request.data, holes, extents))


def _nothing(payload: Buffer) -> None:
    """An empty chunk says nothing."""
