"""The server's transmission phase, from the transport down to a real image and back, in all reply styles.

What must hold: no exception, and no error logged as unexpected; every request is answered once, by
well-formed replies, whatever the client takes and when; what is read is what the disk holds; the accounts of
memory end at nothing; and a bitmap that claims to be true afterwards has missed no change.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import struct
from collections.abc import Iterable
from typing import Any

from nbdbm.config import ServerConfig
from nbdbm.exports import Export
from nbdbm.image.image import Image, OpenOptions
from nbdbm.peer import UNKNOWN
from nbdbm.registry import ExportRegistry
from nbdbm.server.connection import NbdConnection
from nbdbm.server.server import Server
from tests.fuzz import disk, wire
from tests.fuzz.script import Script
from tests.fuzz.seeds import Seed, seeds

CONTEXTS = (
    b"base:allocation",
    b"qemu:allocation-depth",
    b"qemu:dirty-bitmap:recording",
    b"qemu:dirty-bitmap:full",
)
FLAGS = (0, 0, 0, 1, 2, 4, 8, 16, 32, 3, 7, 63, 64, 0x8000)
MAXIMUM = 32 << 20

PATIENCE = 15
"""Seconds for a connection to come to its end."""

MOST_REQUESTS = 128
MOST_BYTES = 96 << 20
"""That one connection may hold: 64 MiB, and one request of the longest that there is."""

log = logging.getLogger("nbdbm")


class Complaints(logging.Handler):
    """Errors that were logged: whatever is unexpected ends there."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class Line(asyncio.Transport):
    """The transport and, with its other names, the socket: what the client has not taken stays here."""

    family = socket.AF_UNIX

    def __init__(self) -> None:
        super().__init__()
        self.received = bytearray()
        """What the client has taken."""
        self.room = 1 << 30
        """Bytes that the client still takes."""
        self.paused = False
        self.protocol: NbdConnection | None = None
        self._held = bytearray()
        self._closing = False
        self._over = False

    # the transport

    def write(self, data: Any) -> None:
        if self._over:
            return  # as asyncio's transports, until connection_lost has been called
        self._held += data
        if not self._closing:
            self._deliver()
            if self._held and self.protocol is not None:
                self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return len(self._held)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def close(self) -> None:
        self._closing = True
        if not self._held:
            self.abort()

    def abort(self) -> None:
        self._closing = True
        if not self._over:
            self._over = True
            assert self.protocol is not None
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    # the socket

    def sendmsg(self, pieces: list[bytes | memoryview]) -> int:
        if self._over or self._held or not self.room:
            raise BlockingIOError
        data = b"".join(pieces)[: self.room]
        self.room -= len(data)
        self.received += data
        return len(data)

    def send(self, data: Any, flags: int = 0) -> int:
        return self.sendmsg([data])

    # the client

    def take(self, count: int) -> None:
        """The client takes ``count`` bytes more."""
        self.room += count
        blocked = bool(self._held)
        self._deliver()
        if blocked and not self._held and self.protocol is not None and not self._over:
            if self._closing:
                self.abort()
            else:
                self.protocol.resume_writing()

    def _deliver(self) -> None:
        count = min(self.room, len(self._held))
        self.received += self._held[:count]
        del self._held[:count]
        self.room -= count

    @property
    def over(self) -> bool:
        return self._over


def starts() -> Iterable[bytes]:
    """Scripts to begin with: each command in each style."""
    for number in range(len(seeds())):
        for mode in range(0, 24, 3):
            script = bytearray([number, mode, 15])
            for command in range(9):
                script += bytes([0, command, 0, 0, number * 3, 1, 200, 0x41, 0x42])
            yield bytes(script) + bytes([0xC0, 0xE0, 5])


@functools.cache
def _content(number: int) -> tuple[list[bytes | None], int]:
    """What a seed's disk holds, and its size."""
    seed = seeds()[number]
    files = disk.Files(seed, seed.data)

    async def look() -> tuple[list[bytes | None], int]:
        image = await Image.open(files.path, OpenOptions(), files.open)
        try:
            return await disk.read_all(image), image.size
        finally:
            await image.close()

    return disk.run(look())


def run(data: bytes) -> None:
    script = Script(data)
    number = script.byte() % len(seeds())
    mode = script.byte()
    complaints = Complaints()
    log.addHandler(complaints)
    try:
        content, size = _content(number)
        disk.run(_session(seeds()[number], script, mode, content, size))
    finally:
        log.removeHandler(complaints)
    assert not complaints.texts, complaints.texts


async def _session(seed: Seed, script: Script, mode: int, content: list[bytes | None], size: int) -> None:
    files = disk.Files(seed, seed.data, cached=not mode & 1)
    writable, style = bool(mode & 2), (mode >> 2) % 3
    claimed = disk.claims(files.image)
    failures: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: failures.append(str(context)))
    image = await Image.open(files.path, OpenOptions(read_only=not writable), files.open)
    registry = ExportRegistry()
    registry.add(Export.of(image))
    server = Server(registry, ServerConfig(busy_poll=0))
    line = Line()
    connection = server.adopt(line if mode & 32 else None, UNKNOWN)  # type: ignore[arg-type]
    line.protocol = connection
    connection.connection_made(line)
    stream, ends = await _talk(connection, line, script, style, size, bool(mode & 64))
    if script.flag():
        line.abort()
        ends = False
    elif not line.over:
        connection.eof_received()
    line.take(1 << 30)
    if ends:
        await asyncio.wait_for(server._empty.wait(), PATIENCE)
    server.hurry()
    await server.close()
    assert not failures, failures
    assert server.budget.used == 0 and server.connections == 0
    files.assert_closed()
    _, received = wire.option_replies(bytes(line.received[18:]))
    sent, open_end = wire.requests_of(stream, style, MAXIMUM)
    by_cookie = {one.cookie: one for one in sent}
    if len(by_cookie) == len(sent) and ends and open_end:
        answered = wire.answers(received, style, by_cookie)
        assert answered.keys() == by_cookie.keys(), "a request was not answered"
        if not any(one.command in (1, 4, 6) and not answered[one.cookie].error for one in sent):
            _compare(answered, content, size)
    if not writable:
        assert not files.changes, "a read-only export changed the file"
    else:
        await _judge(files, claimed, content)


async def _talk(
    connection: NbdConnection, line: Line, script: Script, style: int, size: int, in_turn: bool
) -> tuple[bytes, bool]:
    """Shake hands, then send what the script says; returns the requests' bytes, and whether all went."""
    opening = struct.pack(">I", 3)
    if style:
        opening += wire.option(wire.STRUCTURED if style == 1 else wire.EXTENDED)
    chosen = script.byte()
    queries = [name for bit, name in enumerate(CONTEXTS) if chosen >> bit & 1]
    opening += wire.option(
        wire.SET_META,
        wire.string(b"") + struct.pack(">I", len(queries)) + b"".join(map(wire.string, queries)),
    )
    opening += wire.option(wire.GO, wire.string(b"") + b"\0\0")
    await _feed(connection, line, opening)
    stream = bytearray()
    pending = bytearray()
    cookie = 0
    while script.more and not line.over:
        kind = script.byte()
        if kind < 0xC0:
            cookie += 1
            piece = _request(script, style, cookie if kind < 0xB0 else script.byte(), size)
            pending += piece
            if not in_turn:
                continue
        elif kind < 0xC8:
            pending += script.bytes(kind & 7)
        elif kind < 0xD0:
            line.room = min(line.room, script.number(2))
            continue
        elif kind < 0xE0:
            line.take(1 << (kind & 15) + 4)
            continue
        pieces = wire.cut(bytes(pending), script) if kind >= 0xC0 else [bytes(pending)]
        pending.clear()
        for piece in pieces:
            stream += piece
            if not await _feed(connection, line, piece):
                return bytes(stream), False
        for _ in range(kind & 15):
            await asyncio.sleep(0)
    stream += pending
    return bytes(stream), await _feed(connection, line, bytes(pending)) and not line.over


async def _feed(connection: NbdConnection, line: Line, data: bytes) -> bool:
    """Hand over all of ``data`` as a transport does; False if the server does not want it any more."""
    rest = memoryview(data)
    waited = 0
    while rest:
        if line.over or line.is_closing():
            return False
        if line.paused:
            # A client that sends on must take its replies in the end.
            waited += 1
            if waited > 20:
                line.take(1 << 16)
            assert waited < 20_000, "reading stays paused"
            await asyncio.sleep(0)
            continue
        waited = 0
        view = connection.get_buffer(-1)
        assert len(view)
        count = min(len(view), len(rest))
        view[:count] = rest[:count]
        rest = rest[count:]
        connection.buffer_updated(count)
        assert connection.running <= MOST_REQUESTS and connection.held <= MOST_BYTES, "too much is held"
    return True


def _request(script: Script, style: int, cookie: int, size: int) -> bytes:
    command = script.byte()
    if command < 0xF0:
        command = (
            wire.READ,
            wire.WRITE,
            wire.FLUSH,
            wire.TRIM,
            wire.CACHE,
            wire.WRITE_ZEROES,
            wire.BLOCK_STATUS,
            9,
        )[command % 8]
    elif command < 0xF8:
        command = script.number(2)
    else:
        command = wire.DISC
    flags = script.pick(FLAGS)
    place = script.byte()
    offset = script.value(size, (size,)) if place >= 0xF0 else place * 512 + script.byte()
    length = script.value(size, (size,)) if place & 15 == 15 else script.number(2)
    head = wire.request(style, command, flags, cookie, offset, length)
    length &= (1 << 64 if style == 2 else 1 << 32) - 1
    if command == wire.BLOCK_STATUS and flags & 32 and style == 2:
        ids = script.bytes(script.byte() & 3)
        body = struct.pack(">Q", length) + b"".join(struct.pack(">I", each & 7) for each in ids)
        return wire.request(style, command, flags, cookie, offset, len(body)) + body
    if command == wire.WRITE or (style == 2 and flags & 32):
        pattern = script.bytes(2) or b"\0"
        return head + (pattern * (min(length, 100_000) // len(pattern) + 1))[: min(length, 100_000)]
    return head


def _compare(answered: dict[int, wire.Answer], content: list[bytes | None], size: int) -> None:
    """What was read, with what the disk holds; nobody has written."""
    held = b"".join(piece or b"" for piece in content)
    for answer in answered.values():
        for offset, data in answer.data:
            known = held[offset : offset + len(data)]
            if len(held) >= min(size, offset + len(data)):
                assert data == known, f"a read at {offset} brought something else"


async def _judge(files: disk.Files, claimed: dict[bytes, int], before: list[bytes | None]) -> None:
    """Closed in order: the image is sound, and the bitmaps know what changed."""
    assert await disk.is_sound(files.image), "an unsound image was left"
    image = await Image.open(files.path, OpenOptions(), files.open)
    try:
        after = await disk.read_all(image)
        bits = await disk.look_at_bitmaps(image)
        now = disk.claims(files.image)
        assert now.keys() == claimed.keys(), "the bitmaps that claim to be true are others"
        for name, flags in claimed.items():
            if flags & 2:
                missed = disk.changed_granules_missed(before, after, image.size, bits[name.decode()])
                assert not missed, f"bitmap {name!r} has missed changes at {missed}"
    finally:
        await image.close()
