"""What a server has told a client, worked out from the server's bytes alone.

Written from the protocol's specification, and sharing no code with nbdbm.nbd. It believes everything: what a
client must refuse, it may take. But no client may hear anything else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.fuzz import wire

GREETING = 18
CODES = {
    "list": wire.LIST,
    "info": wire.INFO,
    "contexts": wire.LIST_META,
    "select": wire.SET_META,
    "go": wire.GO,
}

Told = tuple[str, object]
"""What is heard of an answer: a word, and what is known then."""


class Handshake(NamedTuple):
    """What was said until transmission began."""

    told: list[Told]
    rest: bytes | None
    """What came then; None: it did not begin."""
    style: int
    contexts: dict[str, int]
    secure_from: int
    """Bytes before TLS; -1: it did not begin."""


def hear_handshake(stream: bytes, style: int, tls: bool, asked: Sequence[str]) -> Handshake:
    """``asked``: keys of CODES, in order. ``style``: the best headers that are wanted."""
    told: list[Told] = []
    contexts: dict[str, int] = {}
    secure_from = -1
    granted = 0
    if len(stream) < GREETING:
        return Handshake(told, None, granted, contexts, secure_from)
    flags = struct.unpack_from(">H", stream, 16)[0]
    fixed = bool(flags & 1)
    wanted = [wire.EXTENDED, wire.STRUCTURED][2 - style :] if fixed else []
    questions = [wire.STARTTLS] * tls + wanted
    options = [CODES[what] for what in asked]
    bare = GREETING + (10 if flags & 2 else 134)
    if not questions:
        told.append(("ready", 0))
    if not fixed:
        # There is nothing to ask but for the export, by the oldest option.
        begins = not tls and options[:1] == [wire.GO] and len(stream) >= bare
        if begins:
            told.append(("go", struct.unpack_from(">Q", stream, GREETING)[0]))
        return Handshake(told, stream[bare:] if begins else None, 0, contexts, secure_from)
    at = GREETING
    group: list[tuple[int, bytes]] = []
    replies, _ = wire.option_replies(stream[GREETING:])
    for code, kind, data in replies:
        at += 20 + len(data)
        if code != next(iter(questions or options), None):
            break
        if kind != 1 and not kind >> 31:
            group.append((kind, data))
            continue
        (questions or options).pop(0)
        if code in (wire.STARTTLS, wire.EXTENDED, wire.STRUCTURED):
            if kind != 1 and (code == wire.STARTTLS or kind == 0x80000005):
                break  # without it there is nothing to go on with
            if code == wire.STARTTLS:
                told.append(("tls", None))
                secure_from = at
            elif kind == 1:
                granted = 2 if code == wire.EXTENDED else 1
                questions = []
            if not questions:
                told.append(("ready", granted))
        elif kind >> 31:
            if code == wire.SET_META:
                contexts = {}
            if code == wire.GO and kind == 0x80000001 and granted < 2:
                bare += at - GREETING
                if len(stream) < bare:
                    break
                told.append(("go", struct.unpack_from(">Q", stream, at)[0]))
                return Handshake(told, stream[bare:], granted, contexts, secure_from)
            told.append(("refused", (code, kind)))
        else:
            told.append(_granted(code, group))
            if code == wire.SET_META:
                contexts = {name: number for number, name in told[-1][1]}  # type: ignore[attr-defined]
            if code == wire.GO:
                return Handshake(told, stream[at:], granted, contexts, secure_from)
        group = []
    return Handshake(told, None, granted, contexts, secure_from)


def _granted(code: int, group: list[tuple[int, bytes]]) -> Told:
    if code == wire.LIST:
        names = []
        for _, data in group:
            length = int.from_bytes(data[:4])
            names.append(_text(data[4 : 4 + length]))
        return "list", tuple(names)
    if code in (wire.INFO, wire.GO):
        size = None
        for _, data in group:
            if data[:2] == b"\0\0" and len(data) == 12:
                size = int.from_bytes(data[2:10])
        return ("info" if code == wire.INFO else "go"), size
    named = tuple((int.from_bytes(data[:4]), _text(data[4:])) for _, data in group)
    if code == wire.LIST_META:
        return "contexts", tuple(name for _, name in named)
    return "select", named


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


class Asked(NamedTuple):
    """A request that was sent."""

    command: int
    offset: int
    length: int


class Answer(NamedTuple):
    """What came for one request."""

    cookie: int
    error: int
    data: bytes | None = None
    holes: tuple[tuple[int, int], ...] = ()
    extents: dict[int, list[tuple[int, int]]] | None = None
    """By the context's id, (length, flags): neighbours with the same flags are one; none passes the end."""


def hear_replies(stream: bytes, style: int, asked: dict[int, Asked]) -> Iterator[Answer | None]:
    """The answers, in order of their ends; None, and then nothing more, where something is illegal."""
    parts: dict[int, list[tuple[int, bytes]]] = {}
    for cookie, kind, done, data in _chunks(stream, style, asked):
        if cookie not in asked:
            yield None
            return
        parts.setdefault(cookie, []).append((kind, data))
        if done:
            answer = _whole(cookie, asked[cookie], parts.pop(cookie))
            yield answer
            if answer is None:
                return


SIMPLE_ERROR = 1 << 16
"""Not a chunk's type: the error of a simple reply."""


def _chunks(stream: bytes, style: int, asked: dict[int, Asked]) -> Iterator[tuple[int, int, bool, bytes]]:
    """(cookie, type, whether it is the last one, payload)."""
    at = 0
    while len(stream) - at >= 16:
        magic = struct.unpack_from(">I", stream, at)[0]
        if magic == 0x67446698 and style < 2:
            error, cookie = struct.unpack_from(">IQ", stream, at + 4)
            at += 16
            if error:
                yield cookie, SIMPLE_ERROR, True, struct.pack(">IH", error, 0)
            elif cookie in asked and asked[cookie].command == wire.READ and not style:
                one = asked[cookie]
                if len(stream) - at < one.length:
                    return
                yield cookie, 1, True, struct.pack(">Q", one.offset) + stream[at : at + one.length]
                at += one.length
            else:
                yield cookie, 0, True, b""
            continue
        head, wanted = (">IHHQQQ", 0x6E8A278C) if style == 2 else (">IHHQI", 0x668E33EF)
        if magic != wanted or len(stream) - at < struct.calcsize(head):
            return
        _, flags, kind, cookie, *_, length = struct.unpack_from(head, stream, at)
        at += struct.calcsize(head)
        if len(stream) - at < length:
            return
        yield cookie, kind, bool(flags & 1), stream[at : at + length]
        at += length


def _whole(cookie: int, one: Asked, chunks: list[tuple[int, bytes]]) -> Answer | None:
    for kind, data in chunks:
        if kind & (1 << 15 | SIMPLE_ERROR):
            return Answer(cookie, int.from_bytes(data[:4]))
    if one.command == wire.READ:
        return _read(cookie, one, chunks)
    if one.command == wire.BLOCK_STATUS:
        extents = {}
        for kind, data in chunks:
            if kind in (5, 6):
                pairs = list(
                    struct.iter_unpack(">II", data[4:]) if kind == 5 else struct.iter_unpack(">QQ", data[8:])
                )
                extents[int.from_bytes(data[:4])] = joined(pairs, one.length)
        return Answer(cookie, 0, extents=extents)
    return Answer(cookie, 0)


def _read(cookie: int, one: Asked, chunks: list[tuple[int, bytes]]) -> Answer | None:
    content = bytearray(one.length)
    seen = bytearray(one.length)
    holes = []
    for kind, data in chunks:
        at = int.from_bytes(data[:8]) - one.offset
        piece = data[8:]
        if kind == 2:
            piece = bytes(min(int.from_bytes(data[8:]), one.length + 1))
            holes.append((at + one.offset, len(piece)))
        elif kind != 1:
            continue
        if at < 0 or at + len(piece) > one.length or any(seen[at : at + len(piece)]):
            return None
        content[at : at + len(piece)] = piece
        seen[at : at + len(piece)] = b"\1" * len(piece)
    return Answer(cookie, 0, bytes(content), tuple(sorted(holes))) if all(seen) else None


def joined(pairs: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Extents as they are compared."""
    found: list[tuple[int, int]] = []
    for part, flags in pairs:
        part = min(part, length)
        length -= part
        if part and found and found[-1][1] == flags:
            found[-1] = (found[-1][0] + part, flags)
        elif part:
            found.append((part, flags))
    return found
