"""ServerProtocol: one connection, seen by the server. Bytes in, events out; answers in, bytes out.

The shell's loop::

    view = protocol.get_buffer()                      # 1. receive into it
    events = protocol.buffer_updated(count)           # 2. act on each event
    for buffer in protocol.data_to_send(): ...        # 3. send, after every call that may have queued

No exception leaves this class for anything a client does: what cannot be answered becomes a Disconnected
event, after which the shell sends what is queued, finishes what is in flight if ``clean``, and closes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from nbdbm.extents import ExtentList
from nbdbm.nbd.catalog import Catalog, ExportInfo
from nbdbm.nbd.constants import Cmd, CmdFlag, NbdErrno, Rep
from nbdbm.nbd.events import BlockStatus, Disconnected, Event, ExportWanted, GoRequested, StartTls
from nbdbm.nbd.handshake import (
    TRANSITIONS,
    Handshake,
    HeaderStyle,
    Negotiated,
    OptionEvent,
    ProtocolViolation,
    State,
    TlsMode,
)
from nbdbm.nbd.limits import DEFAULT_LIMITS, Limits
from nbdbm.nbd.messages import CLIENT_FLAGS, OPTION, OptionRequest, Request, reply_text
from nbdbm.nbd.options import Options
from nbdbm.nbd.receiver import SMALL_BODY, Receiver
from nbdbm.nbd.requests import Body, Goodbye, Requests
from nbdbm.nbd.transmission import REPLIES, Chunks, Origins, Output, Refusal, ReplyBuilder

HANDSHAKE_ROOM = OPTION.size + SMALL_BODY
"""Bytes received at once in a handshake ``in_turns``: an option. What nobody answers yet is kept."""

logger = logging.getLogger(__name__)


RECEIVE_FIRST = 4096
"""Bytes received at once, beside what is there, until they are payload for the most part. The whole scratch
holds 9362 requests that have none, refused or not: ninety clients that send nothing else kept every other
waiting for seconds."""

MANY = 100
"""Messages in one receive (a number), above which the next is of RECEIVE_FIRST again: fewer than the 128
extended headers, or 146 others, which that holds; more than there are writes of 4 KiB in the scratch."""


class ServerProtocol(Receiver):
    """One connection's state, from the greeting to the end. The greeting is queued at once.

    Args:
        catalog: the exports that may be seen.
        limits: what the client may make us hold or do.
        scratch: a receive buffer instead of the one shared by the whole process; needed only if
            connections live in several threads.
        allocate: gives the buffer, of the length asked for or more, that the payload of a large WRITE is
            received into. It belongs to the event then. None: not now; see ``starved``.
        refused: told the command (any number) and the error of each request that is answered with an error
            and becomes no event.
        tls: whether the client may or must ask for TLS.
        in_turns: whether options wait until ``go_on`` is called, once for each and for each part of a long
            answer: many clients, together, would otherwise keep everybody else waiting. Not all of an answer
            is in memory then.
        lend: see ``Requests``: an event of a WRITE may have to be ``owned`` before the next receive, by any
            connection that shares the scratch.
    """

    __slots__ = (
        "_after_skip",
        "_allocate",
        "_lend",
        "_limits",
        "_options",
        "_origins",
        "_out",
        "_refused",
        "_replies",
        "_requests",
        "_trace",
        "_write",
        "negotiated",
        "starved",
        "state",
    )

    def __init__(
        self,
        catalog: Catalog,
        *,
        limits: Limits = DEFAULT_LIMITS,
        scratch: bytearray | None = None,
        allocate: Callable[[int], Body | None] = bytearray,
        refused: Callable[[int, NbdErrno], None] | None = None,
        tls: TlsMode = TlsMode.OFF,
        in_turns: bool = False,
        lend: bool = False,
    ) -> None:
        super().__init__(scratch)
        self._lend = lend
        self._most = RECEIVE_FIRST
        if in_turns:
            self._room = HANDSHAKE_ROOM
        self._allocate = allocate
        self._refused = refused
        self.state = State.CLIENT_FLAGS
        self.negotiated: Negotiated | None = None
        """What was agreed upon, once ``accept`` was called."""
        self.starved = 0
        """Bytes of the payload for which ``allocate`` gave no buffer: receive no more, and call ``feed`` once
        it will. 0: none is wanted."""
        self._limits = limits
        self._trace = logger.isEnabledFor(logging.DEBUG)
        self._out: Output = []
        self._options: Options | None = Options(
            Handshake(catalog, limits, tls),
            limits,
            self._view,
            allocate=self._payload_buffer,
            in_turns=in_turns,
            trace=logger.debug if self._trace else None,
        )
        """Dropped when transmission begins: a connection lives long and should weigh little."""
        self._after_skip: tuple[OptionRequest, Rep] | tuple[Request, Refusal] | None = None
        """What to answer once the bytes being thrown away are gone."""
        self._write: Request | None = None
        """The WRITE whose payload is the body under way."""
        # From here on: set by accept().
        self._requests: Requests | None = None
        self._replies = REPLIES[HeaderStyle.SIMPLE]
        self._origins: Origins | None = None
        """Extended headers: the offset of each request that awaits its reply."""
        self._out += self._options.take_replies()

    # What is known

    @property
    def closed(self) -> bool:
        """A Disconnected event was returned; input is ignored from then on."""
        return self.state is State.CLOSED

    @property
    def sparse_reads(self) -> bool:
        """True if ``reply_read`` may be given holes without sending them as zeroes.

        A read with CmdFlag.DF must be given as data all the same.
        """
        return self.negotiated is not None and self.negotiated.structured

    @property
    def queued(self) -> bool:
        """Whether ``data_to_send`` would return anything."""
        return bool(self._out)

    @property
    def receiving(self) -> bool:
        """Whether a payload is coming in, or an option's data, into the buffer that ``allocate`` gave."""
        return self._write is not None or (self._options is not None and self._options.receiving)

    @property
    def unfinished(self) -> bool:
        """An option, or part of an answer, waits for ``go_on``; receive nothing until it does not."""
        return self._options is not None and self._options.unfinished

    @property
    def traced(self) -> bool:
        """Whether every message is logged."""
        return self._trace

    @property
    def max_extents(self) -> int:
        """The cap on each context's extents when all that were negotiated are reported."""
        return self._share(len(self.negotiated.contexts) if self.negotiated is not None else 1)

    def extent_limit(self, event: BlockStatus) -> int:
        """The ``limit`` for the ExtentList of each context of this request."""
        return 1 if event.flags & CmdFlag.REQ_ONE else self._share(len(event.contexts))

    def _share(self, contexts: int) -> int:
        limits = self._limits
        return min(limits.max_extents, max(1, limits.max_extents_per_reply // max(1, contexts)))

    # Receiving

    def buffer_updated(self, count: int) -> list[Event]:
        """Parse ``count`` bytes that were received into the last ``get_buffer``; return what to do.

        All complete messages are parsed, except after GoRequested and ExportWanted: the rest waits.
        """
        events: list[Event] = []
        if self.state is State.CLOSED:
            return events
        end = self._received(count)
        try:
            if self._body is not None:
                body = self._take_body()
                if body is not None:
                    self._body_complete(body, events)
            else:
                self._parse(end, events)
                if len(events) + len(self._out) > MANY:
                    self._most = RECEIVE_FIRST
                elif count == self._most:
                    self._most = len(self._scratch)
        except Goodbye:
            self._close(events, Disconnected(True, "the client said goodbye"))
        except ProtocolViolation as fault:
            self._close(events, Disconnected(False, str(fault)))
        return events

    def receive_data(self, data: bytes | memoryview) -> list[Event]:
        """The same for bytes at hand: tests, fuzzing, transports without receive-into."""
        events: list[Event] = []
        rest = memoryview(data)
        while rest and self.state is not State.CLOSED:
            view = self.get_buffer()
            count = min(len(view), len(rest))
            view[:count] = rest[:count]
            rest = rest[count:]
            events += self.buffer_updated(count)
            while self.unfinished:
                events += self.go_on()
        return events

    def receive_eof(self) -> list[Event]:
        """The client closed its side."""
        events: list[Event] = []
        if self.state is State.CLOSED:
            return events
        if self._partial or self._body is not None or self._skip:
            reason = "the connection ended in the middle of a message"
        elif self.state is State.TRANSMISSION:
            reason = "the connection ended without NBD_CMD_DISC"
        else:
            reason = "the connection ended during the handshake"
        self._close(events, Disconnected(False, reason))
        return events

    def data_to_send(self) -> list[bytes | memoryview]:
        """Take everything queued, in order. Payload views are the ones given to ``reply_read``."""
        out = self._out
        if out:
            self._out = []
            if self._options is not None:
                self._options.sent()
        return out

    def _parse(self, end: int, events: list[Event]) -> None:
        """Parse the scratch up to ``end`` and keep what is incomplete."""
        at = 0
        while True:
            if self._skip:
                at = self._skipped(at, end)
                if self._skip:
                    return
                self._skip_done()
            before = at
            if self.state is State.TRANSMISSION:
                at = self._parse_requests(at, end, events)
            elif self.state is State.OPTIONS and not self.unfinished:
                at = self._parse_option(at, end, events)
            elif self.state is State.CLIENT_FLAGS:
                at = self._parse_client_flags(at, end)
            if at in (before, end) and not self._skip:
                break
        if self.state is State.STARTING_TLS:
            if at < end:
                # Somebody on the way may have put it there, to have it taken for what comes through TLS.
                raise ProtocolViolation("plain text after NBD_OPT_STARTTLS")
            events.append(StartTls())
        if self.state is State.DECIDING and end - at >= self._room:
            raise ProtocolViolation("the client went on before its option was answered")
        if self.state is not State.CLOSED:
            self._keep(at, end)

    def _body_complete(self, body: memoryview, events: list[Event]) -> None:
        """Act on a message whose body came into its own buffer."""
        if self._write is not None:
            assert self._requests is not None
            request, self._write = self._write, None
            events.append(self._requests.received(request, body))
        elif self._options is not None:
            self._act(self._options, self._options.received(body), events)

    def _drain(self, length: int, after: tuple[OptionRequest, Rep] | tuple[Request, Refusal]) -> None:
        """Throw the next ``length`` bytes away, then answer."""
        self._skip = length
        self._after_skip = after
        if not length:
            self._skip_done()

    def _skip_done(self) -> None:
        assert self._after_skip is not None
        message, verdict = self._after_skip
        self._after_skip = None
        if isinstance(message, OptionRequest):
            assert self._options is not None and isinstance(verdict, Rep)
            self._options.handshake.dropped(message.option, message.length, verdict)
            self._out += self._options.take_replies()
        else:
            assert isinstance(verdict, Refusal)
            self._refuse_request(message, verdict)

    def _become(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], (self.state, state)
        self.state = state

    def _close(self, events: list[Event], event: Disconnected) -> None:
        self._become(State.CLOSED)
        self._partial = b""
        self._body = None
        self._skip = 0
        self._options = None
        events.append(event)

    # Handshake

    def tls_started(self) -> None:
        """TLS runs; what is received from now on came through it. Nothing agreed upon before is left."""
        if self.state is State.CLOSED:
            return
        assert self.state is State.STARTING_TLS and self._options is not None
        self._options.handshake.tls_started()
        self._become(State.OPTIONS)

    def accept(self, info: ExportInfo) -> list[Event]:
        """Answer GoRequested: enter transmission on ``info``. Returns events of input that was waiting."""
        if self.state is State.CLOSED:
            return []
        assert self.state is State.DECIDING and self._options is not None
        negotiated = self._options.handshake.accept(info)
        self._out += self._options.take_replies()
        self._options = None
        self._room = len(self._scratch)
        self.negotiated = negotiated
        self._replies = REPLIES[negotiated.style]
        self._origins = Origins() if negotiated.extended else None
        self._requests = Requests(
            negotiated,
            self._limits,
            self._view,
            origins=self._origins,
            allocate=self._payload_buffer,
            refuse=self._refuse_request,
            answer_empty=self._answer_empty,
            trace=self._log_request if self._trace else None,
            lend=self._lend,
        )
        self._become(State.TRANSMISSION)
        return self._resume()

    def opened(self) -> list[Event]:
        """The export of ExportWanted is open: answer the option, which may ask for more. Returns events."""
        if self.state is State.CLOSED:
            return []
        assert self.state is State.DECIDING and self._options is not None
        self._become(State.OPTIONS)
        events: list[Event] = []
        try:
            self._act(self._options, self._options.handshake.opened(), events)
        except ProtocolViolation as fault:
            self._close(events, Disconnected(False, str(fault)))
        return events if events else self._resume()

    def refuse(self, rep: Rep, text: str) -> list[Event]:
        """Answer GoRequested or ExportWanted with an error. Returns events of input that was waiting, or
        Disconnected: NBD_OPT_EXPORT_NAME cannot be refused otherwise."""
        if self.state is State.CLOSED:
            return []
        assert self.state is State.DECIDING and self._options is not None
        if not self._options.handshake.refuse(rep, text):
            events: list[Event] = []
            self._close(events, Disconnected(False, f"NBD_OPT_EXPORT_NAME: {text}"))
            return events
        self._out += self._options.take_replies()
        self._become(State.OPTIONS)
        return self._resume()

    def feed(self) -> list[Event]:
        """``allocate`` has a buffer for the payload that was ``starved``. Returns events."""
        self.starved = 0
        return self._resume()

    def go_on(self) -> list[Event]:
        """Answer an option, or the next part of it, if something is ``unfinished``. Returns events."""
        options = self._options
        if options is None or not options.unfinished:
            return []
        events: list[Event] = []
        try:
            self._act(options, options.go_on(), events)
            return events if events else self._resume()
        except ProtocolViolation as fault:
            self._close(events, Disconnected(False, str(fault)))
            return events
        finally:
            options.end_turn()

    def _resume(self) -> list[Event]:
        """Parse what came while the shell was deciding."""
        self.get_buffer()
        return self.buffer_updated(0)

    def _parse_client_flags(self, at: int, end: int) -> int:
        if end - at < CLIENT_FLAGS.size:
            return at
        assert self._options is not None
        self._options.handshake.client_flags(CLIENT_FLAGS.unpack_from(self._scratch, at)[0])
        self._become(State.OPTIONS)
        return at + CLIENT_FLAGS.size

    def _parse_option(self, at: int, end: int, events: list[Event]) -> int:
        """Parse one option at ``at``; return where the next one begins, or ``at`` if it is incomplete."""
        options = self._options
        assert options is not None
        at, event = options.parse(at, end)
        if options.rest is None:
            self._act(options, event, events)
            return at
        (option, fate), options.rest = options.rest, None
        if isinstance(fate, Rep):
            self._drain(option.length, (option, fate))
            return at
        self._begin_body(fate, at, end)
        return end

    def _act(self, options: Options, event: OptionEvent, events: list[Event]) -> None:
        """Queue what an option was answered, and do what it asked for."""
        self._out += options.take_replies()
        if isinstance(event, GoRequested | ExportWanted):
            self._become(State.DECIDING)
            events.append(event)
        elif isinstance(event, StartTls):
            self._become(State.STARTING_TLS)
        elif event is not None:
            self._close(events, event)

    # Transmission: requests

    def _parse_requests(self, at: int, end: int, events: list[Event]) -> int:
        """Parse requests from ``at`` on; return where the first incomplete one begins."""
        requests = self._requests
        assert requests is not None
        at = requests.parse(at, end, events)
        if requests.rest is None:
            return at
        (request, fate), requests.rest = requests.rest, None
        if isinstance(fate, Refusal):
            self._drain(request.length, (request, fate))
            return at
        self._write = request
        self._begin_body(fate, at, end)
        return end

    def _payload_buffer(self, length: int) -> Body | None:
        buffer = self._allocate(length)
        self.starved = length if buffer is None else 0
        return buffer

    def _answer_empty(self, request: Request) -> None:
        if request.type == Cmd.READ:
            self._replies.read(self._out, request.cookie, request.offset, ())
        else:
            self._replies.done(self._out, request.cookie, request.offset)

    def _refuse_request(self, request: Request, refusal: Refusal) -> None:
        before = len(self._out)
        self._replies.error(self._out, request.cookie, request.offset, *refusal)
        if self._refused is not None:
            self._refused(request.type, refusal.error)
        if self._trace:
            self._log_reply(before)

    # Transmission: replies

    def reply(self, cookie: int) -> None:
        """Queue success without payload."""
        before = len(self._out)
        self._replies.done(self._out, cookie, self._origin(cookie, 0))
        if self._trace:
            self._log_reply(before)

    def reply_read(self, cookie: int, offset: int, chunks: Chunks) -> None:
        """Queue a read's data: consecutive (length, data) from ``offset``, data None for a hole.

        The lengths sum up to the request's. Without ``sparse_reads`` holes are sent as zeroes. A view
        must stay as it is until it was sent.
        """
        before = len(self._out)
        self._origin(cookie, offset)
        self._replies.read(self._out, cookie, offset, chunks)
        if self._trace:
            self._log_reply(before)

    @property
    def replies(self) -> ReplyBuilder:
        """For a shell that packs and sends the replies to reads and writes itself; ``settle`` follows."""
        return self._replies

    @property
    def settle(self) -> Callable[[int, int], object] | None:
        """What to call with cookie and offset of each request answered so; None if nothing needs it."""
        return None if self._origins is None else self._origins.take

    def reply_block_status(self, cookie: int, contexts: Sequence[tuple[int, ExtentList]]) -> None:
        """Queue the extents for each context id of the event, none of them empty."""
        assert contexts and all(extents.flat for _, extents in contexts)
        before = len(self._out)
        origin = self._origin(cookie, contexts[0][1].offset)
        self._replies.status(self._out, cookie, origin, contexts)
        if self._trace:
            self._log_reply(before)

    def reply_error(self, cookie: int, error: NbdErrno, message: str = "") -> None:
        """Queue a failure; clients without structured replies get the number alone."""
        before = len(self._out)
        self._replies.error(self._out, cookie, self._origin(cookie, 0), error, message)
        if self._trace:
            self._log_reply(before)

    def _origin(self, cookie: int, offset: int) -> int:
        """The offset that the reply to ``cookie`` must repeat; the request is then no longer in flight."""
        return offset if self._origins is None else self._origins.take(cookie, offset)

    def _log_reply(self, before: int) -> None:
        logger.debug("> %s", reply_text(self._out[before]))

    def _log_request(self, request: Request) -> None:
        logger.debug("< %s", request)
