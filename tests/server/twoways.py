"""A server without a listener, and clients that it serves the fast way or the general one."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdbm.exports import Export
from nbdbm.image.image import Image, OpenOptions
from nbdbm.peer import UNKNOWN
from nbdbm.registry import ExportRegistry
from nbdbm.server.connection import NbdConnection
from nbdbm.server.listener import prepare
from nbdbm.server.server import Server
from tests.server.rawclient import OPT_STRUCTURED, READ, WRITE, RawClient
from tests.support.qemu import SYSTEM

OPT_EXTENDED = 11
FUA, NO_HOLE, DF = 1, 2, 4
STYLES = ("simple", "structured", "extended")
KIB = 1024
SIZE = 2 * 1024 * KIB
BITMAPS = ("fine", "coarse", "off")

KINDS = {
    "plain": "cluster_size=64k",
    "small": "cluster_size=4k",
    "version-2": "compat=0.10",
    "extended": "cluster_size=64k,extended_l2=on",
    "backing": "cluster_size=64k",
    "packed": "cluster_size=64k",
}


def make(place: Path, kind: str) -> Path:
    """Data, zeroes, nothing, and (by kind) compressed clusters, a backing file, subclusters; bitmaps."""
    path = place / f"{kind}.qcow2"
    if path.exists():
        return path
    words = ["-o", KINDS[kind]]
    if kind == "backing":
        base = place / "base.qcow2"
        SYSTEM.img("create", "-q", "-f", "qcow2", base, 1536 * KIB + 512)
        SYSTEM.io(base, "write -q -P 1 0 500k", "write -q -P 2 1M 500k")
        words += ["-b", str(base), "-F", "qcow2"]
    SYSTEM.img("create", "-q", "-f", "qcow2", *words, path, SIZE)
    rng = random.Random(kind)
    commands = []
    if kind == "packed":
        commands += [f"write -q -c -P {n + 1} {n * 64}k 64k" for n in range(0, 32, 3)]
    for number in range(16):
        length = 512 * rng.randrange(1, 250)
        offset = 512 * rng.randrange((SIZE - length) // 512)
        verb = "write -q -z" if number % 4 == 3 and kind != "version-2" else f"write -q -P {number + 1}"
        commands.append(f"{verb} {offset} {length}")
    SYSTEM.io(path, *commands)
    if kind != "version-2":
        for name, granularity in zip(BITMAPS, (512, 65536, 4096), strict=True):
            SYSTEM.img(
                "bitmap", "--add", "-g", granularity, *(["--disable"] if name == "off" else []), path, name
            )
    return path


@asynccontextmanager
async def serving(path: Path, **options: Any) -> AsyncIterator[tuple[Server, Image]]:
    image = await Image.open(str(path), OpenOptions(**options))
    registry = ExportRegistry()
    registry.add(Export.of(image))
    server = Server(registry)
    try:
        yield server, image
    finally:
        server.hurry()
        await server.close()


async def connect(
    server: Server, style: str, *, fast: bool, buffer: int = 0, contexts: Sequence[str] = ()
) -> RawClient:
    """A client in transmission; ``buffer``: bytes of the server's send buffer."""
    ours, theirs = socket.socketpair()
    prepare(ours)
    if buffer:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)

    await asyncio.get_running_loop().connect_accepted_socket(
        lambda: server.adopt(ours if fast else None, UNKNOWN), ours
    )
    reader, writer = await asyncio.open_connection(sock=theirs, limit=1 << 16)
    client = RawClient(reader, writer)
    assert await reader.readexactly(18) == b"NBDMAGICIHAVEOPT\x00\x03"
    client.send(struct.pack(">I", 3))
    if style != "simple":
        await client.option(OPT_STRUCTURED if style == "structured" else OPT_EXTENDED)
    if contexts:
        assert len(await client.select(*contexts)) == len(contexts)
    assert (await client.go())[-1][0] == 1
    return client


def only(server: Server) -> NbdConnection:
    (one,) = server.clients
    return one


@dataclass
class Request:
    """One request, whatever the style of its header."""

    command: int
    cookie: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    data: bytes = b""

    def pack(self, style: str) -> bytes:
        flags = self.flags
        if style == "extended":
            flags |= 1 << 5 if self.command == WRITE else 0
            head = (0x21E41C71, flags, self.command, self.cookie, self.offset, self.length)
            return struct.pack(">IHHQQQ", *head) + self.data
        head = (0x25609513, flags, self.command, self.cookie, self.offset, self.length)
        return struct.pack(">IHHQQI", *head) + self.data


@dataclass
class Answer:
    """What came for one cookie."""

    error: int = 0
    data: bytes = b""


class Replies:
    """Takes the server's bytes apart, strictly, and puts each read together again."""

    def __init__(self, style: str, requests: list[Request]) -> None:
        self.extended = style == "extended"
        self.asked = {request.cookie: request for request in requests}
        self.found: dict[int, Answer] = {}
        self._parts: dict[int, bytearray] = {}

    async def take(self, reader: asyncio.StreamReader) -> int:
        """Read one reply or chunk; return its cookie."""
        (magic,) = struct.unpack(">I", await reader.readexactly(4))
        if magic == 0x67446698:
            assert not self.extended
            error, cookie = struct.unpack(">IQ", await reader.readexactly(12))
            request = self.asked[cookie]
            length = request.length if request.command == READ and not error else 0
            self._done(cookie, Answer(error, await reader.readexactly(length)))
            return int(cookie)
        if self.extended:
            assert magic == 0x6E8A278C
            flags, kind, cookie, origin, length = struct.unpack(">HHQQQ", await reader.readexactly(28))
            assert origin == self.asked[cookie].offset
        else:
            assert magic == 0x668E33EF
            flags, kind, cookie, length = struct.unpack(">HHQI", await reader.readexactly(16))
        body = await reader.readexactly(length)
        request = self.asked[cookie]
        parts = self._parts.setdefault(cookie, bytearray())
        error = 0
        if kind == 1:
            (offset,) = struct.unpack_from(">Q", body)
            assert offset == request.offset + len(parts)
            parts += body[8:]
        elif kind == 2:
            offset, hole = struct.unpack(">QI", body)
            assert offset == request.offset + len(parts) and not request.flags & DF
            parts += bytes(hole)
        elif kind & 1 << 15:
            (error,) = struct.unpack_from(">I", body)
        else:
            assert kind == 0 and not body
        if flags & 1:
            self._done(cookie, Answer(error, bytes(self._parts.pop(cookie))))
        return int(cookie)

    def _done(self, cookie: int, answer: Answer) -> None:
        assert cookie not in self.found
        if self.asked[cookie].command == READ and not answer.error:
            assert len(answer.data) == self.asked[cookie].length
        self.found[cookie] = answer
