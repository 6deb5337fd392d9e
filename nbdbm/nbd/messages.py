"""The messages on the wire, one class a layout: parse, pack, and a text for the trace.

``parse`` takes a buffer that holds the whole fixed part and the offset at which it begins, and never
judges more than the layout; what the values mean is judged by the state machines. The specification's
section stands in each docstring. All integers are big-endian.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from nbdbm.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    IHAVEOPT,
    MAX_STRING,
    NBDMAGIC,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    Info,
    NbdErrno,
    Opt,
    Rep,
    ReplyFlag,
    ReplyType,
)

Buffer = bytes | bytearray | memoryview

GREETING = Struct(">QQH")
CLIENT_FLAGS = Struct(">I")
OPTION = Struct(">QII")
OPTION_REPLY = Struct(">QIII")
REQUEST = Struct(">IHHQQI")
EXTENDED_REQUEST = Struct(">IHHQQQ")
SIMPLE_REPLY = Struct(">IIQ")
CHUNK = Struct(">IHHQI")
EXTENDED_CHUNK = Struct(">IHHQQQ")

U16 = Struct(">H")
U32 = Struct(">I")
U64 = Struct(">Q")
EXPORT_REPLY = Struct(">QH")
"""Answer to NBD_OPT_EXPORT_NAME: size, transmission flags."""
INFO_EXPORT = Struct(">HQH")
INFO_BLOCK_SIZE = Struct(">HIII")
DATA_OFFSET = U64
HOLE = Struct(">QI")
ERROR = Struct(">IH")
STATUS_HEAD = U32
STATUS_EXT_HEAD = Struct(">II")

EXPORT_NAME_PADDING = bytes(124)
"""Zeroes after the answer to NBD_OPT_EXPORT_NAME unless both sides agreed on NO_ZEROES."""


def encode(text: str) -> bytes:
    """A string for the wire; the counterpart of ``decode``.

    Bytes that were no UTF-8 when they came in go out unchanged (surrogateescape); nothing raises.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")


def decode(raw: Buffer) -> str:
    """A string from the wire; bytes that are no UTF-8 become lone surrogates and match only themselves."""
    return str(raw, "utf-8", "surrogateescape")


def display(text: str) -> bytes:
    """A text for the human at the other end: no NUL, at most MAX_STRING bytes, whole characters."""
    raw = text.encode("utf-8", "backslashreplace").replace(b"\0", b"\\0")
    if len(raw) > MAX_STRING:
        raw = raw[:MAX_STRING].decode("utf-8", "ignore").encode()
    return raw


def _name(
    kind: type[Opt] | type[Rep] | type[Cmd] | type[ReplyType] | type[NbdErrno] | type[Info], value: int
) -> str:
    """The specification's name of a number, or the number."""
    try:
        return kind(value).name
    except ValueError:
        return f"{value:#x}"


class Greeting(NamedTuple):
    """The server's first words ("Newstyle negotiation")."""

    magic: int
    style: int
    flags: int

    @classmethod
    def parse(cls, buffer: Buffer, at: int = 0) -> Greeting:
        return cls._make(GREETING.unpack_from(buffer, at))

    def pack(self) -> bytes:
        return GREETING.pack(*self)

    @classmethod
    def newstyle(cls, flags: int) -> Greeting:
        return cls(NBDMAGIC, IHAVEOPT, flags)

    def __str__(self) -> str:
        return f"GREETING flags={self.flags:#x}"


class OptionRequest(NamedTuple):
    """One option, client to server ("Newstyle negotiation"); ``length`` bytes of data follow the head."""

    magic: int
    option: int
    length: int

    @classmethod
    def parse(cls, buffer: Buffer, at: int = 0) -> OptionRequest:
        return cls._make(OPTION.unpack_from(buffer, at))

    @staticmethod
    def pack(option: int, data: bytes = b"") -> bytes:
        return OPTION.pack(IHAVEOPT, option, len(data)) + data

    def __str__(self) -> str:
        return f"OPT_{_name(Opt, self.option)} [{self.length}]"


class OptionReply(NamedTuple):
    """One reply to an option ("Fixed newstyle negotiation"); ``length`` bytes of data follow the head."""

    magic: int
    option: int
    reply: int
    length: int

    @classmethod
    def parse(cls, buffer: Buffer, at: int = 0) -> OptionReply:
        return cls._make(OPTION_REPLY.unpack_from(buffer, at))

    @staticmethod
    def pack(option: int, reply: int, data: bytes = b"") -> bytes:
        return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data

    def __str__(self) -> str:
        return f"OPT_{_name(Opt, self.option)} REP_{_name(Rep, self.reply)} [{self.length}]"


class Request(NamedTuple):
    """A command, client to server, compact or extended ("Request message")."""

    magic: int
    flags: int
    type: int
    cookie: int
    offset: int
    length: int
    """Payload length if a payload follows, else how many bytes the command is about."""

    @classmethod
    def parse(cls, buffer: Buffer, at: int = 0) -> Request:
        return cls._make(REQUEST.unpack_from(buffer, at))

    @classmethod
    def parse_extended(cls, buffer: Buffer, at: int = 0) -> Request:
        return cls._make(EXTENDED_REQUEST.unpack_from(buffer, at))

    def pack(self) -> bytes:
        if self.magic == EXTENDED_REQUEST_MAGIC:
            return EXTENDED_REQUEST.pack(*self)
        return REQUEST.pack(*self)

    @classmethod
    def compact(cls, type: int, cookie: int, offset: int, length: int, flags: int = 0) -> Request:
        return cls(REQUEST_MAGIC, flags, type, cookie, offset, length)

    @classmethod
    def extended(cls, type: int, cookie: int, offset: int, length: int, flags: int = 0) -> Request:
        return cls(EXTENDED_REQUEST_MAGIC, flags, type, cookie, offset, length)

    def __str__(self) -> str:
        flags = f" {CmdFlag(self.flags)!r}" if self.flags else ""
        return f"{_name(Cmd, self.type)} #{self.cookie:x} @{self.offset}+{self.length}{flags}"


class SimpleReply(NamedTuple):
    """A simple reply ("Simple reply message"); data follows if it answers a READ and ``error`` is 0."""

    magic: int
    error: int
    cookie: int

    @classmethod
    def parse(cls, buffer: Buffer, at: int = 0) -> SimpleReply:
        return cls._make(SIMPLE_REPLY.unpack_from(buffer, at))

    @staticmethod
    def pack(error: int, cookie: int) -> bytes:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)

    def __str__(self) -> str:
        return f"REPLY #{self.cookie:x} {_name(NbdErrno, self.error) if self.error else 'ok'}"


class Chunk(NamedTuple):
    """A chunk of a structured reply ("Structured reply chunk message"); ``length`` bytes follow the head."""

    magic: int
    flags: int
    type: int
    cookie: int
    length: int

    @classmethod
    def parse(cls, buffer: Buffer, at: int = 0) -> Chunk:
        return cls._make(CHUNK.unpack_from(buffer, at))

    @staticmethod
    def pack(flags: int, type: int, cookie: int, length: int) -> bytes:
        return CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, type, cookie, length)

    def __str__(self) -> str:
        return _chunk_text(self.flags, self.type, self.cookie, self.length)


class ExtendedChunk(NamedTuple):
    """A chunk of an extended reply ("Extended reply chunk message"); ``offset`` repeats the request's."""

    magic: int
    flags: int
    type: int
    cookie: int
    offset: int
    length: int

    @classmethod
    def parse(cls, buffer: Buffer, at: int = 0) -> ExtendedChunk:
        return cls._make(EXTENDED_CHUNK.unpack_from(buffer, at))

    @staticmethod
    def pack(flags: int, type: int, cookie: int, offset: int, length: int) -> bytes:
        return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, flags, type, cookie, offset, length)

    def __str__(self) -> str:
        return _chunk_text(self.flags, self.type, self.cookie, self.length)


def _chunk_text(flags: int, type: int, cookie: int, length: int) -> str:
    done = " done" if flags & ReplyFlag.DONE else ""
    return f"CHUNK_{_name(ReplyType, type)} #{cookie:x} [{length}]{done}"


def reply_text(head: Buffer) -> str:
    """A transmission reply's head as text, whichever style it has."""
    magic = U32.unpack_from(head)[0]
    if magic == SIMPLE_REPLY_MAGIC:
        return str(SimpleReply.parse(head))
    return str(Chunk.parse(head) if magic == STRUCTURED_REPLY_MAGIC else ExtendedChunk.parse(head))
