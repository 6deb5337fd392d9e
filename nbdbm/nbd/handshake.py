"""The server's side of the handshake: states, options, and what was agreed upon.

Fixed newstyle negotiation, with NBD_OPT_EXPORT_NAME for clients that know nothing else. The options'
data is judged here, completely and before anything is looked up; the answers come from the catalog,
except for GO and EXPORT_NAME, which the shell decides.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, IntEnum, auto
from typing import Literal

from nbdbm.nbd.catalog import Absent, Catalog, ExportInfo
from nbdbm.nbd.constants import (
    MAX_STRING,
    ClientFlag,
    HandshakeFlag,
    Info,
    Opt,
    Rep,
    TransmissionFlag,
)
from nbdbm.nbd.events import Disconnected, ExportWanted, GoRequested, StartTls
from nbdbm.nbd.limits import Limits
from nbdbm.nbd.messages import (
    EXPORT_NAME_PADDING,
    EXPORT_REPLY,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    U16,
    U32,
    Greeting,
    OptionReply,
    decode,
    display,
    encode,
)
from nbdbm.nbd.metacontext import MetaContext, Query, matches, selector


class State(Enum):
    """Where a connection stands, seen by the server."""

    CLIENT_FLAGS = auto()
    """The greeting is queued; the client's flags are awaited."""
    OPTIONS = auto()
    """Options are parsed and answered."""
    DECIDING = auto()
    """GoRequested or ExportWanted was handed out; nothing is parsed until the shell has decided."""
    STARTING_TLS = auto()
    """StartTls was handed out; any byte before ``tls_started`` would be plain text, which ends all."""
    TRANSMISSION = auto()
    CLOSED = auto()
    """A Disconnected event was returned; input is ignored."""


TRANSITIONS: dict[State, frozenset[State]] = {
    State.CLIENT_FLAGS: frozenset({State.OPTIONS, State.CLOSED}),
    State.OPTIONS: frozenset({State.DECIDING, State.STARTING_TLS, State.CLOSED}),
    State.STARTING_TLS: frozenset({State.OPTIONS, State.CLOSED}),
    State.DECIDING: frozenset({State.OPTIONS, State.TRANSMISSION, State.CLOSED}),
    State.TRANSMISSION: frozenset({State.CLOSED}),
    State.CLOSED: frozenset(),
}


class TlsMode(Enum):
    """What is done about TLS ("Server-side requirements")."""

    OFF = auto()
    """It is refused (NOTLS)."""
    ON = auto()
    """The client may have it (SELECTIVETLS)."""
    REQUIRE = auto()
    """Without it nothing is told and nothing is served (FORCEDTLS)."""


class HeaderStyle(IntEnum):
    """Which headers the transmission phase uses; a greater one has all that a lesser one has."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What the handshake settled; fixed for the rest of the connection."""

    info: ExportInfo
    """The export; its flags as the client was told them."""
    style: HeaderStyle
    contexts: tuple[MetaContext, ...]
    """Selected metadata contexts, ascending by id."""
    maximum_payload: int
    """Bytes; the lesser of the export's and ours."""

    @property
    def structured(self) -> bool:
        return self.style >= HeaderStyle.STRUCTURED

    @property
    def extended(self) -> bool:
        return self.style is HeaderStyle.EXTENDED


class ProtocolViolation(Exception):
    """The peer did what leaves no reply, only closing; caught where bytes enter the core."""


class _Unopened(Exception):
    """The option's export must be opened before the option can be answered."""


class _Invalid(Exception):
    """Option data that breaks its layout; answered ERR_INVALID with this text."""


class _TooBig(Exception):
    """Option data in order, but too much of it; answered ERR_TOO_BIG with this text."""


class _Cursor:
    """Reads option data front to back; what is missing or too long is _Invalid."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = data
        self.at = 0

    def _advance(self, count: int, what: str) -> int:
        at = self.at
        if count > len(self.data) - at:
            raise _Invalid(f"{what}: needs {count} bytes, {len(self.data) - at} are left")
        self.at = at + count
        return at

    def u16(self, what: str) -> int:
        value: int = U16.unpack_from(self.data, self._advance(2, what))[0]
        return value

    def u16s(self, count: int, what: str) -> tuple[int, ...]:
        values: tuple[int, ...] = struct.unpack_from(f">{count}H", self.data, self._advance(2 * count, what))
        return values

    def u32(self, what: str) -> int:
        value: int = U32.unpack_from(self.data, self._advance(4, what))[0]
        return value

    def string(self, what: str) -> str | None:
        """A counted string, or None if it exceeds MAX_STRING (and was skipped)."""
        length = self.u32(f"{what} length")
        at = self._advance(length, what)
        if length > MAX_STRING:
            return None
        raw = bytes(self.data[at : at + length])
        if b"\0" in raw:
            raise _Invalid(f"{what}: contains a NUL")
        return decode(raw)

    def export_name(self) -> str:
        name = self.string("export name")
        if name is None:
            raise _Invalid(f"export name: longer than {MAX_STRING} bytes")
        return name

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def end(self) -> None:
        if self.at != len(self.data):
            raise _Invalid(f"{len(self.data) - self.at} bytes too many")


def _context(option: Opt, number: int, name: str) -> bytes:
    return OptionReply.pack(option, Rep.META_CONTEXT, U32.pack(number) + encode(name))


def _shown(name: str) -> str:
    """An export name for an error text: cut, so that a hostile name does not fill a screen."""
    return repr(name if len(name) <= 80 else name[:80] + "...")


OptionEvent = GoRequested | ExportWanted | StartTls | Disconnected | None
"""What an option asks of the shell; None: it was answered."""


class Handshake:
    """The options of one connection, from the client's flags until it enters transmission.

    Replies are appended to ``out``, and long answers go on in ``more``; the caller takes them. ``option``
    returns an event when the shell must act, and raises ProtocolViolation where only closing is left.
    """

    __slots__ = (
        "_catalog",
        "_contexts",
        "_contexts_of",
        "_encrypted",
        "_fixed",
        "_ids",
        "_limits",
        "_name_wanted",
        "_next_id",
        "_option",
        "_option_bytes",
        "_options",
        "_pending",
        "_tls",
        "_zeroes",
        "more",
        "out",
        "style",
    )

    def __init__(self, catalog: Catalog, limits: Limits, tls: TlsMode) -> None:
        self._catalog = catalog
        self._limits = limits
        self._tls = tls
        self._encrypted = False
        self._fixed = False
        self._zeroes = True
        self._options = 0
        self._option_bytes = 0
        self._option = 0
        self._pending: bytes | None = None
        """Data of the option that awaits the opening of its export."""
        self._name_wanted = False
        """The only piece of information that is sent on request."""
        self._ids: dict[str, int] = {}
        """Of the contexts selected last, which a client that selects once more gets again."""
        self._next_id = 0
        self._contexts: tuple[MetaContext, ...] = ()
        self._contexts_of: str | None = None
        self.style = HeaderStyle.SIMPLE
        self.more: Iterator[bytes] | None = None
        """Replies to the last option that come after those in ``out``: there may be many. An empty one is no
        reply; finding that out took time."""
        self.out: list[bytes] = [
            Greeting.newstyle(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES).pack()
        ]

    # what the client sends

    def client_flags(self, flags: int) -> None:
        """Judge the client's flags ("Client flags"): unknown ones end the connection."""
        # Plain numbers: the complement of an IntFlag has, in some versions of Python, only known bits.
        if flags & ~int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES):
            raise ProtocolViolation(f"unknown client flags {flags:#x}")
        self._fixed = bool(flags & ClientFlag.FIXED_NEWSTYLE)
        self._zeroes = not flags & ClientFlag.NO_ZEROES

    def begin(self, option: int, length: int) -> Rep | None:
        """Judge an option's head before its data is read.

        Returns the error with which to answer once the data was thrown away, or None to keep it.
        """
        self._options += 1
        if self._options > self._limits.max_options:
            raise ProtocolViolation(f"more than {self._limits.max_options} options in one handshake")
        refused = self._tls is TlsMode.REQUIRE and not self._encrypted
        if option == Opt.EXPORT_NAME:
            if refused:
                raise ProtocolViolation("NBD_OPT_EXPORT_NAME without TLS, and it cannot be refused")
            if length > MAX_STRING:
                raise ProtocolViolation(f"export name of {length} bytes, the limit is {MAX_STRING}")
            if self.style is HeaderStyle.EXTENDED:
                # "a client MUST NOT use NBD_OPT_EXPORT_NAME", and there is no way to say no.
                raise ProtocolViolation("NBD_OPT_EXPORT_NAME after extended headers were agreed upon")
        elif not self._fixed:
            raise ProtocolViolation(f"option {option:#x} from a client without fixed newstyle")
        if option != Opt.ABORT:  # whose data is never read
            self._option_bytes += length
            if self._option_bytes > self._limits.max_option_bytes:
                limit = self._limits.max_option_bytes
                raise ProtocolViolation(f"more than {limit} bytes of option data in one handshake")
        if refused and option not in (Opt.STARTTLS, Opt.ABORT):
            return Rep.ERR_TLS_REQD
        if option == Opt.SET_META_CONTEXT:
            # "Issuing this command replaces all previously-set metadata contexts (including when this
            # command fails)".
            self._contexts = ()
            self._contexts_of = None
        if option not in OPTION_HANDLERS:
            return Rep.ERR_UNSUP
        if length and option in WITHOUT_DATA:
            return Rep.ERR_INVALID
        return Rep.ERR_TOO_BIG if length > self._limits.max_option_length else None

    def dropped(self, option: int, length: int, rep: Rep) -> None:
        """Answer an option whose data was thrown away because ``begin`` said so."""
        if rep is Rep.ERR_TLS_REQD:
            text = "this server is for clients with TLS"
        elif rep is Rep.ERR_TOO_BIG:
            text = f"{length} bytes of option data, the limit is {self._limits.max_option_length}"
        elif rep is Rep.ERR_INVALID:
            text = f"{Opt(option).name}: {length} bytes too many"
        else:
            text = f"option {option:#x} is not supported"
        self._error(option, rep, text)

    def option(self, option: int, data: bytes | memoryview) -> OptionEvent:
        """Answer one option that ``begin`` let pass, or return what the shell must do about it."""
        self._option = option
        try:
            return OPTION_HANDLERS[option](self, data)
        except _Unopened as wanted:
            self._pending = bytes(data)
            return ExportWanted(str(wanted))
        except _Invalid as fault:
            self._error(option, Rep.ERR_INVALID, f"{Opt(option).name}: {fault}")
            return None
        except _TooBig as excess:
            self._error(option, Rep.ERR_TOO_BIG, f"{Opt(option).name}: {excess}")
            return None

    def tls_started(self) -> None:
        """All that comes from now on is encrypted. What was agreed upon before, anybody may have sent: it is
        void. The client's flags stay, for they are not sent again."""
        self._encrypted = True
        self.style = HeaderStyle.SIMPLE
        self._ids = {}
        self._next_id = 0
        self._contexts = ()
        self._contexts_of = None

    # what the shell decides

    def opened(self) -> OptionEvent:
        """Answer the pending option, now that its export is open."""
        data, self._pending = self._pending, None
        assert data is not None
        return self.option(self._option, data)

    def accept(self, info: ExportInfo) -> Negotiated:
        """Answer the pending GO or EXPORT_NAME with success; transmission follows."""
        contexts = self._contexts if self._contexts_of == info.name else ()
        # The export may have been closed and opened anew since they were selected, without some of them.
        still = set(info.contexts) if contexts else ()
        contexts = tuple(context for context in contexts if context.name in still)
        told = self._told(info, selecting=bool(contexts))
        maximum = min(info.maximum_payload, self._limits.max_payload)
        if self._option == Opt.GO:
            self._send_info(Opt.GO, told)
            self._ack(Opt.GO)
        else:
            self.out.append(EXPORT_REPLY.pack(told.size, told.flags))
            if self._zeroes:
                self.out.append(EXPORT_NAME_PADDING)
        return Negotiated(told, self.style, contexts, maximum)

    def refuse(self, rep: Rep, text: str) -> bool:
        """Answer the pending option with an error; False if it was EXPORT_NAME, which can only be closed."""
        self._pending = None
        if self._option == Opt.EXPORT_NAME:
            return False
        self._error(self._option, rep, text)
        return True

    # options

    def _export_name(self, data: bytes | memoryview) -> OptionEvent:
        name = decode(data)
        info = self._lookup(name)
        if info is Absent.NEEDS_TLS:
            raise ProtocolViolation(
                f"export {_shown(name)} without TLS, and NBD_OPT_EXPORT_NAME cannot be refused"
            )
        if info is None:
            raise ProtocolViolation(f"no export {_shown(name)}, and NBD_OPT_EXPORT_NAME cannot be refused")
        return GoRequested(info.name)

    def _abort(self, data: bytes | memoryview) -> OptionEvent:
        # "a server SHOULD ignore any data sent by the client rather than rejecting the request".
        self._ack(Opt.ABORT)
        return Disconnected(True, "the client aborted the handshake")

    def _list(self, data: bytes | memoryview) -> OptionEvent:
        self.more = self._listed()
        return None

    def _listed(self) -> Iterator[bytes]:
        for export in self._catalog.listing():
            if export is None:
                yield b""
                continue
            raw = encode(export[0])
            about = display(export[1])
            yield OptionReply.pack(Opt.LIST, Rep.SERVER, U32.pack(len(raw)) + raw + about)
        yield OptionReply.pack(Opt.LIST, Rep.ACK)

    def _starttls(self, data: bytes | memoryview) -> OptionEvent:
        if self._tls is TlsMode.OFF:
            # Known, but not wanted here; qemu-nbd answers alike.
            self._error(Opt.STARTTLS, Rep.ERR_POLICY, "this server does not offer TLS")
            return None
        if self._encrypted:
            raise _Invalid("TLS has begun already")
        self._ack(Opt.STARTTLS)
        return StartTls()

    def _info(self, data: bytes | memoryview) -> OptionEvent:
        option = Opt(self._option)
        cursor = _Cursor(data)
        name = cursor.export_name()
        count = cursor.u16("number of information requests")
        wanted = cursor.u16s(count, "information request")
        cursor.end()
        info = self._find(option, name)
        if info is None:
            return None
        self._name_wanted = Info.NAME in wanted
        if option is Opt.GO:
            return GoRequested(info.name)
        self._send_info(option, self._told(info, selecting=True))
        self._ack(option)
        return None

    def _structured_reply(self, data: bytes | memoryview) -> OptionEvent:
        if self.style is HeaderStyle.EXTENDED:
            self._error(
                Opt.STRUCTURED_REPLY, Rep.ERR_EXT_HEADER_REQD, "extended headers are already agreed upon"
            )
        elif self.style is HeaderStyle.STRUCTURED:
            self._error(Opt.STRUCTURED_REPLY, Rep.ERR_INVALID, "structured replies are already agreed upon")
        else:
            self.style = HeaderStyle.STRUCTURED
            self._ack(Opt.STRUCTURED_REPLY)
        return None

    def _extended_headers(self, data: bytes | memoryview) -> OptionEvent:
        if self.style is HeaderStyle.EXTENDED:
            self._error(Opt.EXTENDED_HEADERS, Rep.ERR_INVALID, "extended headers are already agreed upon")
        else:
            self.style = HeaderStyle.EXTENDED
            self._ack(Opt.EXTENDED_HEADERS)
        return None

    def _list_meta_context(self, data: bytes | memoryview) -> OptionEvent:
        # Before structured replies this is a SHOULD NOT for the client and a MAY for our refusal: answered.
        info, queries = self._meta_request(data)
        if info is None:
            return None
        self.more = self._matching(queries, info.contexts)
        return None

    @staticmethod
    def _matching(queries: list[Query], names: Sequence[str]) -> Iterator[bytes]:
        wanted = selector(queries, listing=True) if queries else None
        for name in names:
            yield _context(Opt.LIST_META_CONTEXT, 0, name) if wanted is None or wanted(name) else b""
        yield OptionReply.pack(Opt.LIST_META_CONTEXT, Rep.ACK)

    def _set_meta_context(self, data: bytes | memoryview) -> OptionEvent:
        if self.style is HeaderStyle.SIMPLE:
            raise _Invalid("needs structured replies or extended headers")
        info, queries = self._meta_request(data)
        if info is None:
            return None
        names = matches(queries, info.contexts, listing=False)
        if len(names) > self._limits.max_contexts:
            raise _TooBig(f"{len(names)} contexts selected, the limit is {self._limits.max_contexts}")
        # What was selected before keeps its id, and no id is given to two names, so that a client that asks
        # twice cannot mix up old and new answers.
        ids: dict[str, int] = {}
        for name in names:
            number = self._ids.get(name)
            if number is None:
                number, self._next_id = self._next_id, self._next_id + 1
            ids[name] = number
        self._ids = ids
        self._contexts = tuple(sorted(MetaContext(number, name) for name, number in ids.items()))
        self._contexts_of = info.name
        self.more = self._selected(self._contexts)
        return None

    @staticmethod
    def _selected(contexts: Sequence[MetaContext]) -> Iterator[bytes]:
        for context in contexts:
            yield _context(Opt.SET_META_CONTEXT, *context)
        yield OptionReply.pack(Opt.SET_META_CONTEXT, Rep.ACK)

    # parts of answers

    def _meta_request(self, data: bytes | memoryview) -> tuple[ExportInfo | None, list[Query]]:
        """Export and queries of LIST/SET_META_CONTEXT; (None, []) if it was answered: no such export."""
        cursor = _Cursor(data)
        name = cursor.export_name()
        count = cursor.u32("number of queries")
        if count > self._limits.max_queries:
            if cursor.left < U32.size * count:
                raise _Invalid(f"{count} queries in {cursor.left} bytes")
            raise _TooBig(f"{count} queries, the limit is {self._limits.max_queries}")
        queries = list(self._queries(cursor, count))
        cursor.end()
        return self._find(Opt(self._option), name), queries

    @staticmethod
    def _queries(cursor: _Cursor, count: int) -> Iterator[Query]:
        for _ in range(count):
            text = cursor.string("query")
            # Longer than any name can be: matches nothing, and is as little an error as a name we lack.
            yield Query.parse("" if text is None else text)

    def _lookup(self, name: str) -> ExportInfo | Literal[Absent.NEEDS_TLS] | None:
        info = self._catalog.info(name)
        if info is Absent.UNOPENED:
            raise _Unopened(name)
        return info

    def _find(self, option: Opt, name: str) -> ExportInfo | None:
        """The export, or None if the option was answered: it cannot be told of."""
        info = self._lookup(name)
        if info is Absent.NEEDS_TLS:
            # "MUST NOT send NBD_REP_ERR_TLS_REQD in response to any option other than" those which enter it:
            # where TLS is optional it would say that no option at all works without.
            rep = Rep.ERR_TLS_REQD if option in (Opt.INFO, Opt.GO) else Rep.ERR_POLICY
            self._error(option, rep, f"export {_shown(name)} is for clients with TLS")
            return None
        if info is None:
            self._error(option, Rep.ERR_UNKNOWN, f"no export {_shown(name)}")
        return info

    def _told(self, info: ExportInfo, *, selecting: bool) -> ExportInfo:
        """The export with the transmission flags that depend on what was agreed upon.

        BLOCK_STAT_PAYLOAD goes only with extended headers, and with GO only if contexts were selected
        ("Transmission flags"). INFO tells of it in any case, or nobody could learn of it before; a GO right
        behind it then differs in this flag, which is what qemu-nbd does too.
        """
        flags = info.flags | TransmissionFlag.HAS_FLAGS
        flags &= ~(TransmissionFlag.SEND_DF | TransmissionFlag.BLOCK_STAT_PAYLOAD)
        if self.style >= HeaderStyle.STRUCTURED:
            flags |= TransmissionFlag.SEND_DF
        if self.style is HeaderStyle.EXTENDED and selecting:
            flags |= TransmissionFlag.BLOCK_STAT_PAYLOAD
        return replace(info, flags=flags)

    def _send_info(self, option: Opt, told: ExportInfo) -> None:
        if self._name_wanted:
            self._item(option, U16.pack(Info.NAME) + encode(told.name))
        if told.description:
            self._item(option, U16.pack(Info.DESCRIPTION) + display(told.description))
        # Sent unasked as well: clients that know it profit, others must ignore it; qemu-nbd does so too.
        maximum = min(told.maximum_payload, self._limits.max_payload)
        sizes = (told.minimum_block, told.preferred_block, maximum)
        self._item(option, INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes))
        self._item(option, INFO_EXPORT.pack(Info.EXPORT, told.size, told.flags))

    def _item(self, option: Opt, data: bytes) -> None:
        self.out.append(OptionReply.pack(option, Rep.INFO, data))

    def _ack(self, option: Opt) -> None:
        self.out.append(OptionReply.pack(option, Rep.ACK))

    def _error(self, option: int, rep: Rep, text: str) -> None:
        self.out.append(OptionReply.pack(option, rep, display(text)))


WITHOUT_DATA = frozenset({Opt.LIST, Opt.STARTTLS, Opt.STRUCTURED_REPLY, Opt.EXTENDED_HEADERS})
"""Options that "MUST NOT" have data: it is thrown away, however long it is, and refused."""

OPTION_HANDLERS: dict[int, Callable[[Handshake, bytes | memoryview], OptionEvent]] = {
    Opt.EXPORT_NAME: Handshake._export_name,
    Opt.ABORT: Handshake._abort,
    Opt.LIST: Handshake._list,
    Opt.STARTTLS: Handshake._starttls,
    Opt.INFO: Handshake._info,
    Opt.GO: Handshake._info,
    Opt.STRUCTURED_REPLY: Handshake._structured_reply,
    Opt.EXTENDED_HEADERS: Handshake._extended_headers,
    Opt.LIST_META_CONTEXT: Handshake._list_meta_context,
    Opt.SET_META_CONTEXT: Handshake._set_meta_context,
}
