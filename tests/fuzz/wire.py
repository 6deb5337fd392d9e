"""NBD's messages, built and taken apart for the targets; shares no code with nbdbm.nbd."""

from __future__ import annotations

import struct
from typing import NamedTuple

from tests.fuzz.script import Script

EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = (
    1, 2, 3, 5, 6, 7, 8, 9, 10, 11,
)  # fmt: skip
OPTIONS = (EXPORT_NAME, ABORT, LIST, 4, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED, 12, 99)
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)

FINAL = 1
"""NBD_REP_ACK; errors have bit 31."""

GREETING = b"NBDMAGICIHAVEOPT"


def option(code: int, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack(">8sII", b"IHAVEOPT", code, len(data) if length is None else length) + data


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def options_of(stream: bytes) -> tuple[list[int], bool]:
    """The codes of the complete options behind the client's flags, and whether nothing else is there."""
    at, found = 4, []
    while len(stream) - at >= 16:
        magic, code, length = struct.unpack_from(">8sII", stream, at)
        if magic != b"IHAVEOPT":
            return found, False
        if len(stream) - at - 16 < length and code != ABORT:
            return found, True
        found.append(code)
        at += 16 + length
    return found, True


def option_replies(data: bytes) -> tuple[list[tuple[int, int, bytes]], bytes]:
    """(option, type, data) of each reply, and what is left behind the last that is one."""
    at, found = 0, []
    while len(data) - at >= 20:
        magic, code, kind, length = struct.unpack_from(">QIII", data, at)
        if magic != 0x3E889045565A9 or len(data) - at - 20 < length:
            break
        found.append((code, kind, data[at + 20 : at + 20 + length]))
        at += 20 + length
    return found, data[at:]


class Sent(NamedTuple):
    """A request as it stands in the client's stream, whole."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int


def request(style: int, command: int, flags: int, cookie: int, offset: int, length: int) -> bytes:
    form, magic = (">IHHQQQ", 0x21E41C71) if style == 2 else (">IHHQQI", 0x25609513)
    mask = (1 << 64 if style == 2 else 1 << 32) - 1
    return struct.pack(form, magic, flags, command, cookie, offset, length & mask)


def requests_of(stream: bytes, style: int, maximum: int) -> tuple[list[Sent], bool]:
    """The requests in the stream that are there as a whole, and whether nothing ends it before its end."""
    form, wanted = (">IHHQQQ", 0x21E41C71) if style == 2 else (">IHHQQI", 0x25609513)
    size = struct.calcsize(form)
    at, found = 0, []
    while len(stream) - at >= size:
        magic, flags, command, cookie, offset, length = struct.unpack_from(form, stream, at)
        if magic != wanted or command == DISC:
            return found, False
        at += size
        if command == WRITE or (style == 2 and flags & 32):
            if length > maximum and (style == 2 or length > 4 * maximum):
                return found, False
            if len(stream) - at < length:
                break
            at += length
        found.append(Sent(command, flags, cookie, offset, length))
    return found, True


class Answer(NamedTuple):
    """All that came for one cookie."""

    error: int
    data: list[tuple[int, bytes]]
    """(offset, bytes) of a read."""
    contexts: list[int]


def answers(data: bytes, style: int, sent: dict[int, Sent]) -> dict[int, Answer]:
    """What the server answered; every cookie is one that was sent, and is answered once and wholly."""
    at = 0
    done: dict[int, Answer] = {}
    parts: dict[int, Answer] = {}
    while at < len(data):
        magic = struct.unpack_from(">I", data, at)[0]
        if magic == 0x67446698:
            error, cookie = struct.unpack_from(">IQ", data, at + 4)
            at += 16
            assert style < 2 and cookie in sent and cookie not in done and cookie not in parts
            one = sent[cookie]
            content = []
            if one.command == READ and not error:
                assert style == 0 or not one.length
                content = [(one.offset, data[at : at + one.length])]
                assert len(content[0][1]) == one.length
                at += one.length
            done[cookie] = Answer(error, content, [])
            continue
        if magic == 0x668E33EF:
            assert style == 1
            flags, kind, cookie, length = struct.unpack_from(">HHQI", data, at + 4)
            at += 20
        else:
            assert style == 2 and magic == 0x6E8A278C
            flags, kind, cookie, offset, length = struct.unpack_from(">HHQQQ", data, at + 4)
            assert offset == sent[cookie].offset
            at += 32
        assert cookie in sent and cookie not in done and not flags & ~1
        body = data[at : at + length]
        assert len(body) == length
        at += length
        _chunk(parts.setdefault(cookie, Answer(0, [], [])), sent[cookie], kind, body, parts, cookie)
        if flags & 1:
            done[cookie] = parts.pop(cookie)
            _whole(done[cookie], sent[cookie])
    assert not parts, "an answer without an end"
    return done


def _chunk(answer: Answer, one: Sent, kind: int, body: bytes, parts: dict[int, Answer], cookie: int) -> None:
    if kind == 0:
        assert not body
    elif kind == 1:
        assert one.command == READ and len(body) > 8
        answer.data.append((struct.unpack(">Q", body[:8])[0], body[8:]))
    elif kind == 2:
        assert one.command == READ and len(body) == 12
        at, length = struct.unpack(">QI", body)
        answer.data.append((at, bytes(length)))
    elif kind in (5, 6):
        assert one.command == BLOCK_STATUS
        head, pair = (4, ">II") if kind == 5 else (8, ">QQ")
        pairs = list(struct.iter_unpack(pair, body[head:]))
        assert pairs and all(length for length, _ in pairs)
        if kind == 6:
            assert struct.unpack_from(">I", body, 4)[0] == len(pairs)
        if not one.flags & 32:
            assert sum(length for length, _ in pairs) <= one.length
        answer.contexts.append(struct.unpack_from(">I", body)[0])
    else:
        assert kind == 1 << 15 | 1, kind
        error, length = struct.unpack_from(">IH", body)
        assert error and len(body) == 6 + length
        body[6:].decode()
        parts[cookie] = answer._replace(error=error)


def _whole(answer: Answer, one: Sent) -> None:
    if answer.error:
        return
    if one.command == READ:
        at = one.offset
        for offset, piece in sorted(answer.data):
            assert offset == at
            at += len(piece)
        assert at == one.offset + one.length
    elif one.command == BLOCK_STATUS:
        assert answer.contexts and len(set(answer.contexts)) == len(answer.contexts)


def cut(data: bytes, script: Script) -> list[bytes]:
    """``data`` in pieces, of lengths that the script says in few bytes."""
    lengths = [script.byte() + 1 for _ in range(script.byte() & 7)]
    pieces, at = [], 0
    for length in lengths:
        pieces.append(data[at : at + length])
        at += length
    return [piece for piece in [*pieces, data[at:]] if piece]
