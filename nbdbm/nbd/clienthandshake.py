"""The client's side of the handshake: greeting, agreement on headers, options and their answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum, auto

from nbdbm.errors import NbdError, UsageError
from nbdbm.nbd.catalog import ExportInfo
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
)
from nbdbm.nbd.constants import (
    IHAVEOPT,
    MAX_PAYLOAD,
    MAX_STRING,
    NBDMAGIC,
    OPTION_REPLY_MAGIC,
    ClientFlag,
    HandshakeFlag,
    Info,
    Opt,
    Rep,
    TransmissionFlag,
)
from nbdbm.nbd.limits import ClientLimits
from nbdbm.nbd.messages import (
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING,
    EXPORT_REPLY,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION_REPLY,
    U16,
    U32,
    U64,
    Greeting,
    OptionReply,
    OptionRequest,
    decode,
    encode,
)
from nbdbm.nbd.receiver import Receiver
from nbdbm.nbd.replies import readable

logger = logging.getLogger(__name__)

MAX_EXPORT = (1 << 63) - 1
"""Largest export that anybody has, bytes: offsets are signed on every system there is."""


class ClientState(Enum):
    """Where a connection stands, seen by the client."""

    GREETING = auto()
    """Nothing came yet."""
    AGREEING = auto()
    """TLS, extended headers or structured replies are being asked for."""
    STARTING_TLS = auto()
    """StartTls was handed out; any byte before ``tls_started`` would be plain text, which ends all."""
    OPTIONS = auto()
    """Options may be asked, or one is."""
    EXPORT_NAME = auto()
    """NBD_OPT_EXPORT_NAME was sent; its answer has no head."""
    TRANSMISSION = auto()
    CLOSED = auto()
    """The server broke the protocol; input is ignored."""


TRANSITIONS: dict[ClientState, frozenset[ClientState]] = {
    ClientState.GREETING: frozenset({ClientState.AGREEING, ClientState.OPTIONS, ClientState.CLOSED}),
    ClientState.AGREEING: frozenset({ClientState.STARTING_TLS, ClientState.OPTIONS, ClientState.CLOSED}),
    ClientState.STARTING_TLS: frozenset({ClientState.AGREEING, ClientState.OPTIONS, ClientState.CLOSED}),
    ClientState.OPTIONS: frozenset({ClientState.EXPORT_NAME, ClientState.TRANSMISSION, ClientState.CLOSED}),
    ClientState.EXPORT_NAME: frozenset({ClientState.TRANSMISSION, ClientState.CLOSED}),
    ClientState.TRANSMISSION: frozenset({ClientState.CLOSED}),
    ClientState.CLOSED: frozenset(),
}


class ClientHandshake(Receiver):
    """The handshake half of a client's connection; ClientProtocol adds the transmission half.

    One option is in flight at a time: each public method here is answered by exactly one event before
    the next one may be called.
    """

    def __init__(
        self, structured: bool, extended: bool, tls: bool, limits: ClientLimits, scratch: bytearray | None
    ) -> None:
        super().__init__(scratch)
        self.state = ClientState.GREETING
        self.structured = False
        """Replies come in chunks; so too with extended headers."""
        self.extended = False
        self.export: ExportInfo | None = None
        """Set once Ready."""
        self.contexts: dict[str, int] = {}
        """Selected contexts: name -> id."""
        self._limits = limits
        self._trace = logger.isEnabledFor(logging.DEBUG)
        self._out: list[bytes | memoryview] = []
        self._goodbye = False
        self._want_structured = structured
        self._want_extended = extended
        self._want_tls = tls
        self._fixed = False
        self._zeroes = True
        # The option that awaits its answer, and what of the answer has come.
        self._option: Opt | None = None
        self._name = ""
        self._asked: frozenset[str] = frozenset()
        self._listed: list[ListedExport] = []
        self._named: list[tuple[int, str]] = []
        self._items: dict[int, bytes] = {}
        self._contexts_of: str | None = None

    def _become(self, state: ClientState) -> None:
        assert state in TRANSITIONS[self.state], (self.state, state)
        self.state = state

    # What we ask

    def list_exports(self) -> None:
        """NBD_OPT_LIST -> ExportsListed."""
        self._listed = []
        self._ask(Opt.LIST)

    def info(self, name: str) -> None:
        """NBD_OPT_INFO -> InfoReceived."""
        self._ask_info(Opt.INFO, name)

    def list_contexts(self, name: str, queries: Sequence[str] = ()) -> None:
        """NBD_OPT_LIST_META_CONTEXT -> ContextsListed."""
        self._ask_contexts(Opt.LIST_META_CONTEXT, name, queries)

    def set_contexts(self, name: str, names: Sequence[str]) -> None:
        """NBD_OPT_SET_META_CONTEXT -> ContextsSelected. Replaces what was selected before."""
        self.contexts = {}
        self._contexts_of = name
        self._asked = frozenset(names)
        self._ask_contexts(Opt.SET_META_CONTEXT, name, names)

    def go(self, name: str) -> None:
        """NBD_OPT_GO, or NBD_OPT_EXPORT_NAME if the server is too old for it -> Ready."""
        if self._fixed:
            self._ask_info(Opt.GO, name)
        else:
            self._export_name(name)

    def abort(self) -> None:
        """NBD_OPT_ABORT: goodbye before ``go``; close once it is sent."""
        self._goodbye = True
        if self._fixed:
            self._send_option(Opt.ABORT)

    def _ask_info(self, option: Opt, name: str) -> None:
        raw = _name_bytes(name)
        wanted = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
        requests = U16.pack(len(wanted)) + b"".join(map(U16.pack, wanted))
        self._name = name
        self._items = {}
        self._ask(option, U32.pack(len(raw)) + raw + requests)

    def _ask_contexts(self, option: Opt, name: str, queries: Sequence[str]) -> None:
        raw = _name_bytes(name)
        parts = [U32.pack(len(raw)), raw, U32.pack(len(queries))]
        for query in queries:
            raw = _name_bytes(query)
            parts += (U32.pack(len(raw)), raw)
        self._named = []
        self._ask(option, b"".join(parts))

    def _export_name(self, name: str) -> None:
        raw = _name_bytes(name)
        self._name = name
        self._become(ClientState.EXPORT_NAME)
        self._send_option(Opt.EXPORT_NAME, raw)

    def _ask(self, option: Opt, data: bytes = b"") -> None:
        assert self._option is None, f"{option.name} asked while {self._option} awaits its answer"
        if not self._fixed:
            raise NbdError(f"the server is too old for {option.name}")
        self._option = option
        self._send_option(option, data)

    def _send_option(self, option: Opt, data: bytes = b"") -> None:
        if self._trace:
            logger.debug("> %s", OptionRequest(IHAVEOPT, option, len(data)))
        self._out.append(OptionRequest.pack(option, data))

    # What the server answers

    def _parse_greeting(self, at: int, end: int, events: list[ClientEvent]) -> int:
        if end - at < GREETING.size:
            if end - at >= U64.size and U64.unpack_from(self._scratch, at)[0] != NBDMAGIC:
                raise NbdError("no NBD server: it does not begin with NBDMAGIC")
            return at
        greeting = Greeting.parse(self._scratch, at)
        if greeting.magic != NBDMAGIC:
            raise NbdError("no NBD server: it does not begin with NBDMAGIC")
        if greeting.style != IHAVEOPT:
            raise NbdError("the server speaks the oldstyle handshake, which is not supported")
        self._fixed = bool(greeting.flags & HandshakeFlag.FIXED_NEWSTYLE)
        self._zeroes = not greeting.flags & HandshakeFlag.NO_ZEROES
        flags = ClientFlag(0)
        if self._fixed:
            flags |= ClientFlag.FIXED_NEWSTYLE
        if not self._zeroes:
            flags |= ClientFlag.NO_ZEROES
        self._out.append(CLIENT_FLAGS.pack(flags))
        if self._want_tls:
            if not self._fixed:
                raise NbdError("the server is too old for TLS")
            # First of all: what is agreed upon in plain text is worth nothing.
            self._become(ClientState.AGREEING)
            self._ask(Opt.STARTTLS)
            return at + GREETING.size
        if not self._fixed:
            self._want_extended = self._want_structured = False
        self._agree(events)
        return at + GREETING.size

    def tls_started(self) -> list[ClientEvent]:
        """TLS runs; what is received from now on came through it. Goes on with the handshake."""
        assert self.state is ClientState.STARTING_TLS
        events: list[ClientEvent] = []
        self._agree(events)
        return events

    def _agree(self, events: list[ClientEvent]) -> None:
        """Ask for the best headers that are still wanted, or report what there is."""
        if self._want_extended or self._want_structured:
            if self.state is not ClientState.AGREEING:
                self._become(ClientState.AGREEING)
            self._ask(Opt.EXTENDED_HEADERS if self._want_extended else Opt.STRUCTURED_REPLY)
        else:
            self._become(ClientState.OPTIONS)
            events.append(HandshakeReady(self.structured, self.extended))

    def _agreed(self, granted: bool, events: list[ClientEvent]) -> None:
        if granted:
            self.extended = self._want_extended
            self.structured = True
            self._want_extended = self._want_structured = False
        elif self._want_extended:
            self._want_extended = False
        else:
            self._want_structured = False
        self._agree(events)

    def _parse_option_reply(self, at: int, end: int, events: list[ClientEvent]) -> int:
        start = at + OPTION_REPLY.size
        if end < start:
            return at
        head = OptionReply.parse(self._scratch, at)
        if head.magic != OPTION_REPLY_MAGIC:
            raise NbdError(f"the server broke the protocol: option reply magic {head.magic:#x}")
        if head.length > self._limits.max_option_reply:
            raise NbdError(f"the server broke the protocol: {head} is too long")
        if end - start < head.length:
            return at
        if self._trace:
            logger.debug("< %s", head)
        data = bytes(self._view[start : start + head.length])
        if head.option == Opt.ABORT and self._goodbye:
            return start + head.length
        if head.option != self._option:
            raise NbdError(f"the server broke the protocol: {head} answers nothing that was asked")
        self._option_reply(head, data, events)
        return start + head.length

    def _option_reply(self, head: OptionReply, data: bytes, events: list[ClientEvent]) -> None:
        option = self._option
        assert option is not None
        if head.reply & REP_ERROR:
            self._option = None
            self._option_refused(option, head.reply, data, events)
        elif head.reply == Rep.ACK:
            if data:
                raise NbdError(f"the server broke the protocol: {head} has data")
            self._option = None
            self._option_done(option, events)
        elif head.reply == Rep.SERVER and option is Opt.LIST:
            self._count(self._listed)
            length = U32.unpack_from(data)[0] if len(data) >= U32.size else len(data) + 1
            rest = data[U32.size :]
            if length > len(rest) or length > MAX_STRING:
                raise NbdError(f"the server broke the protocol: {head} has an export name of {length} bytes")
            self._listed.append(ListedExport(decode(rest[:length]), readable(decode(rest[length:]))))
        elif head.reply == Rep.META_CONTEXT and option in (Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT):
            self._count(self._named)
            if not U32.size < len(data) <= U32.size + MAX_STRING:
                raise NbdError(f"the server broke the protocol: {head} has no context name of legal length")
            self._named.append((U32.unpack_from(data)[0], decode(data[U32.size :])))
        elif head.reply == Rep.INFO and option in (Opt.INFO, Opt.GO):
            if len(data) < U16.size:
                raise NbdError(f"the server broke the protocol: {head} has no type")
            kind: int = U16.unpack_from(data)[0]
            # "The client MUST ignore information replies it does not understand"; keep no more than those.
            if kind in INFO_SIZES:
                self._items[kind] = data
        else:
            raise NbdError(f"the server broke the protocol: {head} is no answer to it")

    def _count(self, held: Sequence[object]) -> None:
        if len(held) >= self._limits.max_listed:
            raise NbdError(f"the server lists more than {self._limits.max_listed} names")

    def _option_refused(self, option: Opt, error: int, data: bytes, events: list[ClientEvent]) -> None:
        # A server that did nothing wrong is left with NBD_OPT_ABORT ("a soft disconnect"); ``data_to_send``
        # has it, also where an error is raised.
        if option is Opt.STARTTLS:
            self.abort()
            raise NbdError(f"the server refuses TLS: {_refusal(error, data)}")
        if self.state is ClientState.AGREEING:
            if error == Rep.ERR_TLS_REQD:
                self.abort()
                raise NbdError("the server requires TLS: nbds:// or nbds+unix://")
            if error == Rep.ERR_SHUTDOWN:
                self.abort()
                raise NbdError(f"the server is shutting down: {_refusal(error, data)}")
            self._agreed(False, events)
            return
        if option is Opt.GO and error == Rep.ERR_UNSUP and not self.extended:
            self._export_name(self._name)
            return
        if option is Opt.SET_META_CONTEXT:
            self.contexts = {}
        events.append(OptionRefused(option, error, _refusal(error, data)))

    def _option_done(self, option: Opt, events: list[ClientEvent]) -> None:
        if option is Opt.STARTTLS:
            self._become(ClientState.STARTING_TLS)
        elif self.state is ClientState.AGREEING:
            self._agreed(True, events)
        elif option is Opt.LIST:
            events.append(ExportsListed(tuple(self._listed)))
        elif option is Opt.LIST_META_CONTEXT:
            events.append(ContextsListed(tuple(name for _, name in self._named)))
        elif option is Opt.SET_META_CONTEXT:
            self._select()
            events.append(ContextsSelected(tuple(self._named)))
        elif option is Opt.INFO:
            events.append(InfoReceived(self._told()))
        else:
            self._enter(self._told(), events)

    def _select(self) -> None:
        self.contexts = {name: number for number, name in self._named}
        if len(self.contexts) < len(self._named) or len(set(self.contexts.values())) < len(self._named):
            raise NbdError("the server broke the protocol: it selected a context twice")
        foreign = self.contexts.keys() - self._asked
        if foreign:
            raise NbdError(f"the server broke the protocol: it selected {min(foreign)!r} unasked")

    def _told(self) -> ExportInfo:
        """The export as INFO or GO described it."""
        for kind, data in self._items.items():
            least, most = INFO_SIZES[Info(kind)]
            if not least <= len(data) <= most:
                raise NbdError(f"the server broke the protocol: {Info(kind).name} of {len(data)} bytes")
        if Info.EXPORT not in self._items:
            raise NbdError("the server broke the protocol: it accepted the export without describing it")
        _, size, flags = INFO_EXPORT.unpack(self._items[Info.EXPORT])
        minimum, preferred, maximum = 1, 4096, MAX_PAYLOAD
        if Info.BLOCK_SIZE in self._items:
            _, minimum, preferred, maximum = INFO_BLOCK_SIZE.unpack(self._items[Info.BLOCK_SIZE])
            legal = _power_of_two(minimum) and minimum <= 65536 and _power_of_two(preferred)
            if not legal or not minimum <= preferred <= maximum:
                raise NbdError(
                    f"the server broke the protocol: block sizes {minimum}, {preferred}, {maximum}"
                )
        name = decode(self._items[Info.NAME][U16.size :]) if Info.NAME in self._items else self._name
        about = readable(decode(self._items.get(Info.DESCRIPTION, b"")[U16.size :]))
        return _export(name, size, flags, about, minimum, preferred, maximum)

    def _parse_export_reply(self, at: int, end: int, events: list[ClientEvent]) -> int:
        length = EXPORT_REPLY.size + (len(EXPORT_NAME_PADDING) if self._zeroes else 0)
        if end - at < length:
            return at
        size, flags = EXPORT_REPLY.unpack_from(self._scratch, at)
        self._enter(_export(self._name, size, flags, "", 1, 4096, MAX_PAYLOAD), events)
        return at + length

    def _enter(self, info: ExportInfo, events: list[ClientEvent]) -> None:
        """Begin transmission. Contexts that were selected for another name are void."""
        if self._contexts_of != self._name:
            self.contexts = {}
        self.export = replace(info, contexts=tuple(self.contexts))
        self._become(ClientState.TRANSMISSION)
        events.append(Ready(self.export))


REP_ERROR = 1 << 31
"""Every error among the option replies has this bit."""

INFO_SIZES = {
    Info.EXPORT: (INFO_EXPORT.size, INFO_EXPORT.size),
    Info.NAME: (U16.size, U16.size + MAX_STRING),
    Info.DESCRIPTION: (U16.size, U16.size + MAX_STRING),
    Info.BLOCK_SIZE: (INFO_BLOCK_SIZE.size, INFO_BLOCK_SIZE.size),
}
"""Information types we know, with the least and greatest length of their data, bytes."""


def _power_of_two(value: int) -> bool:
    return value > 0 and not value & (value - 1)


def _refusal(error: int, data: bytes) -> str:
    """The server's words about an error, or else the error's name."""
    try:
        name = Rep(error).name
    except ValueError:
        name = f"error {error:#x}"
    return readable(decode(data[:MAX_STRING])) or name


def _name_bytes(name: str) -> bytes:
    """A name or query for the wire; UsageError if it is none that may be sent."""
    raw = encode(name)
    if len(raw) > MAX_STRING or b"\0" in raw:
        raise UsageError(f"{name[:80]!r} cannot be sent: NUL, or more than {MAX_STRING} bytes")
    return raw


def _export(
    name: str, size: int, flags: int, about: str, minimum: int, preferred: int, maximum: int
) -> ExportInfo:
    """What a server said of an export, judged."""
    if size > MAX_EXPORT:
        raise NbdError(f"the server broke the protocol: an export of {size} bytes")
    known = TransmissionFlag(flags & KNOWN_FLAGS)
    return ExportInfo(name, size, known, about, minimum, preferred, maximum)


KNOWN_FLAGS = sum(TransmissionFlag)
"""\"Clients SHOULD ignore unknown flags\"."""
