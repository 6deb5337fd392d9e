"""A client that speaks bytes: it can send what a good client would not, and stop reading."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from dataclasses import dataclass

OPT_EXPORT_NAME, OPT_ABORT, OPT_GO, OPT_STRUCTURED, OPT_SET_META = 1, 2, 7, 8, 10
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
DONE = 1


@dataclass
class Reply:
    """A simple reply, or one chunk of a structured one (``kind`` not None)."""

    cookie: int
    error: int
    data: bytes = b""
    kind: int | None = None
    flags: int = DONE


def request(command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


class RawClient:
    """Use ``connect``, then the ``go`` of choice."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.size = 0
        self.flags = 0
        self.reads: dict[int, int] = {}
        """Cookie -> length of the reads that are to be answered by simple replies."""

    @classmethod
    async def connect(cls, path: str) -> RawClient:
        reader, writer = await asyncio.open_unix_connection(path, limit=1 << 20)
        client = cls(reader, writer)
        assert await reader.readexactly(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        client.send(struct.pack(">I", 3))
        return client

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return its replies (type, data) up to the ACK or the error."""
        self.send(struct.pack(">QII", 0x49484156454F5054, option, len(data)) + data)
        return await self.answer(option)

    async def answer(self, option: int) -> list[tuple[int, bytes]]:
        """The replies to an option that was sent."""
        replies = []
        while True:
            magic, about, kind, length = struct.unpack(">QIII", await self.reader.readexactly(20))
            assert (magic, about) == (0x0003E889045565A9, option)
            replies.append((kind, await self.reader.readexactly(length)))
            if kind == 1 or kind & 1 << 31:
                return replies

    async def go(self, name: str = "") -> list[tuple[int, bytes]]:
        raw = name.encode()
        replies = await self.option(OPT_GO, struct.pack(">I", len(raw)) + raw + b"\0\0")
        for kind, data in replies:
            if kind == 3 and data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", data[2:])
        return replies

    async def select(self, *contexts: str, name: str = "") -> list[int]:
        """Select metadata contexts; return their ids."""
        data = struct.pack(">I", len(name)) + name.encode() + struct.pack(">I", len(contexts))
        for context in contexts:
            data += struct.pack(">I", len(context)) + context.encode()
        replies = await self.option(OPT_SET_META, data)
        return [struct.unpack_from(">I", data)[0] for kind, data in replies if kind == 4]

    def read(self, cookie: int, offset: int, length: int, flags: int = 0) -> None:
        self.reads[cookie] = length
        self.send(request(READ, cookie, offset, length, flags))

    async def reply(self) -> Reply:
        magic = struct.unpack(">I", await self.reader.readexactly(4))[0]
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", await self.reader.readexactly(12))
            length = self.reads.pop(cookie, 0) if not error else 0
            return Reply(cookie, error, await self.reader.readexactly(length))
        assert magic == 0x668E33EF
        flags, kind, cookie, length = struct.unpack(">HHQI", await self.reader.readexactly(16))
        data = await self.reader.readexactly(length)
        error = struct.unpack_from(">I", data)[0] if kind & 1 << 15 else 0
        return Reply(cookie, error, data, kind, flags)

    async def replies(self, count: int) -> dict[int, Reply]:
        found = [await self.reply() for _ in range(count)]
        return {reply.cookie: reply for reply in found}

    async def ended(self) -> bytes:
        """Whatever comes until the server closes."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
