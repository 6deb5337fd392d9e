"""The client's socket: servers that are not there, too slow, or mean harm."""

from __future__ import annotations

import asyncio
import errno
import struct
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdbm import clientlink
from nbdbm.client import NbdClient
from nbdbm.errors import NbdError, UsageError
from nbdbm.nbd import events
from nbdbm.nbd.constants import Opt, Rep, ReplyType
from nbdbm.nbd.messages import (
    CLIENT_FLAGS,
    OPTION,
    Chunk,
    ExtendedChunk,
    Greeting,
    OptionReply,
    OptionRequest,
    SimpleReply,
)
from nbdbm.uri import NbdUri
from tests.support.diskserver import DIRTY, SIZE, DiskServer, connected, run, serving


def test_connecting_to_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(NbdError, match="cannot connect: No such file") as caught:
            await NbdClient.connect(NbdUri.unix(str(tmp_path / "none")))
        assert caught.value.errno == errno.ENOENT
        with pytest.raises(NbdError, match=r"^nbd://localhost:1: cannot connect: Connection refused$"):
            await NbdClient.connect("nbd://localhost:1")
        with pytest.raises(UsageError, match="not an NBD URI"):
            await NbdClient.connect("disk.qcow2")

    run(main())


def test_a_cancelled_caller_harms_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, DiskServer()) as uri, await NbdClient.connect(uri) as client:
            task = asyncio.create_task(client.read(0, 4096))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert bytes(await client.read(65536, 1)) == b"\2"

    run(main())


def structured_read(offset: int, data: bytes, cookie: int, *, done: bool = True) -> bytes:
    payload = struct.pack(">Q", offset) + data
    return Chunk.pack(int(done), ReplyType.OFFSET_DATA, cookie, len(payload)) + payload


BAD_READS: dict[str, Callable[[events.Command], bytes]] = {
    "garbage": lambda c: b"\xff" * 4096,
    "magic of another mode": lambda c: SimpleReply.pack(0, 1) * 100,
    "wrong cookie": lambda c: structured_read(0, bytes(4096), c.cookie ^ 0x55),
    "chunk of 4 GiB": lambda c: Chunk.pack(1, ReplyType.OFFSET_DATA, c.cookie, 0xFFFFFFFF) + bytes(8),
    "more data than asked for": lambda c: structured_read(0, bytes(8192), c.cookie),
    "data before the range": lambda c: structured_read(8192 - 1, bytes(4096), c.cookie),
    "offset that overflows": lambda c: structured_read((1 << 64) - 1, bytes(4096), c.cookie),
    "data twice": lambda c: structured_read(0, bytes(4096), c.cookie, done=False) * 2,
    "too little": lambda c: structured_read(0, bytes(4095), c.cookie),
    "huge hole": lambda c: (
        Chunk.pack(1, ReplyType.OFFSET_HOLE, c.cookie, 12) + struct.pack(">QI", 0, 0xFFFFFFFF)
    ),
    "chunk too short": lambda c: Chunk.pack(1, ReplyType.OFFSET_DATA, c.cookie, 3) + b"abc",
    "unknown chunk": lambda c: Chunk.pack(1, 77, c.cookie, 0),
    "status for a read": lambda c: (
        Chunk.pack(1, ReplyType.BLOCK_STATUS, c.cookie, 12) + struct.pack(">III", 0, 4096, 0)
    ),
    "error without an error": lambda c: (
        Chunk.pack(1, ReplyType.ERROR, c.cookie, 6) + struct.pack(">IH", 0, 0)
    ),
    "error longer than its chunk": lambda c: (
        Chunk.pack(1, ReplyType.ERROR, c.cookie, 6) + struct.pack(">IH", 5, 0xFFFF)
    ),
    "nothing": lambda c: Chunk.pack(1, ReplyType.NONE, c.cookie, 0),
    "extended header": lambda c: ExtendedChunk.pack(1, ReplyType.NONE, c.cookie, 0, 0),
}


@pytest.mark.parametrize("case", BAD_READS)
def test_bad_answers_to_a_read(tmp_path: Path, case: str) -> None:
    async def main() -> None:
        disk = DiskServer(answer=BAD_READS[case])
        async with connected(tmp_path, disk, extended=False, timeout=5) as client:
            await refused(client.read(0, 4096), client.uri)

    tracemalloc.start()
    try:
        started = time.monotonic()
        run(main())
        assert time.monotonic() - started < 4
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def status(cookie: int, ident: int, *extents: tuple[int, int]) -> bytes:
    payload = struct.pack(">I", ident) + b"".join(struct.pack(">II", *e) for e in extents)
    return Chunk.pack(1, ReplyType.BLOCK_STATUS, cookie, len(payload)) + payload


BAD_STATUS: dict[str, Callable[[events.Command, int], bytes]] = {
    "no extents": lambda c, ident: status(c.cookie, ident),
    "empty extent": lambda c, ident: status(c.cookie, ident, (0, 0)),
    "half an extent": lambda c, ident: (
        Chunk.pack(1, ReplyType.BLOCK_STATUS, c.cookie, 8) + struct.pack(">II", ident, 1)
    ),
    "unknown context": lambda c, ident: status(c.cookie, ident + 77, (4096, 0)),
    "no context": lambda c, ident: Chunk.pack(1, ReplyType.NONE, c.cookie, 0),
    "chunk of 4 GiB": lambda c, ident: Chunk.pack(1, ReplyType.BLOCK_STATUS, c.cookie, 0xFFFFFFFC),
}


@pytest.mark.parametrize("case", BAD_STATUS)
def test_bad_answers_to_block_status(tmp_path: Path, case: str) -> None:
    def answer(command: events.Command) -> bytes:
        assert isinstance(command, events.BlockStatus)
        return BAD_STATUS[case](command, command.contexts[0][0])

    async def main() -> None:
        async with connected(
            tmp_path, DiskServer(answer=answer), contexts=["base:allocation"], extended=False, timeout=5
        ) as client:
            await refused(client.block_status(0, SIZE), client.uri)

    run(main())


def test_closed_in_mid_reply(tmp_path: Path) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def answer(command: events.Command) -> bytes:
            writer.write(structured_read(0, bytes(4096), command.cookie)[:-1])
            writer.close()
            return b""

        await DiskServer(answer=answer)(reader, writer)

    async def main() -> None:
        async with connected(tmp_path, half, extended=False) as client:
            # Both of those under way, and every later one, hear of it.
            reads = [asyncio.create_task(client.read(0, 4096)) for _ in range(2)]
            for read in reads:
                await refused(read, client.uri)
            await refused(client.flush(), client.uri)

    run(main())


def test_no_answer_in_time(tmp_path: Path) -> None:
    async def main() -> None:
        disk = DiskServer(answer=lambda command: b"")
        async with connected(tmp_path, disk, timeout=0.3) as client:
            with pytest.raises(NbdError, match=r"no answer within 0.3 s") as caught:
                await client.read(0, 4096)
            assert caught.value.errno == errno.ETIMEDOUT
            await refused(client.flush(), client.uri)

    run(main())


def test_closing_while_a_request_waits(tmp_path: Path) -> None:
    async def main() -> None:
        asked = asyncio.Event()

        def answer(command: events.Command) -> bytes:
            asked.set()
            return b""

        disk = DiskServer(answer=answer)
        async with serving(tmp_path, disk) as uri:
            client = await NbdClient.connect(uri)
            read = asyncio.create_task(client.read(0, 4096))
            await asked.wait()
            await client.close()
            await client.close()
            await refused(read, uri)
            await refused(client.read(0, 4096), uri)
        assert disk.goodbyes == 1

    run(main())


async def refused(doing: Awaitable[object], uri: NbdUri) -> None:
    with pytest.raises(NbdError) as caught:
        await doing
    assert str(caught.value).startswith(f"{uri}: ")
    assert "\n" not in str(caught.value)


RAW: dict[str, bytes] = {
    "closed at once": b"",
    "closed in the greeting": Greeting.newstyle(3).pack()[:-1],
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "zeroes": bytes(4096),
    "oldstyle": struct.pack(">QQQI", 0x4E42444D41474943, 0x00420281861253, SIZE, 0) + bytes(124),
    "not fixed": Greeting.newstyle(0).pack() + b"\xff" * 64,
}


@pytest.mark.parametrize("case", RAW)
def test_bad_greetings(tmp_path: Path, case: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(RAW[case])
        writer.write_eof()
        await reader.read()

    async def main() -> None:
        async with serving(tmp_path, serve) as uri:
            await refused(NbdClient.connect(uri, timeout=5), uri)

    run(main())


def test_a_server_that_requires_tls_is_left_politely(tmp_path: Path) -> None:
    heard = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(Greeting.newstyle(3).pack())
        await reader.readexactly(CLIENT_FLAGS.size + OPTION.size)
        writer.write(OptionReply.pack(Opt.EXTENDED_HEADERS, Rep.ERR_TLS_REQD))
        heard.extend(await reader.read())

    async def main() -> None:
        async with serving(tmp_path, serve) as uri:
            with pytest.raises(NbdError, match="requires TLS"):
                await NbdClient.connect(uri, timeout=5)
        assert heard == OptionRequest.pack(Opt.ABORT)

    run(main())


def test_a_silent_server(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def main() -> None:
        async with serving(tmp_path, serve) as uri:
            with pytest.raises(NbdError, match=r"handshake: no answer within 0.2 s"):
                await NbdClient.connect(uri, timeout=0.2)

    run(main())


def ack(option: int) -> bytes:
    return OptionReply.pack(option, Rep.ACK)


def server_reply(name: bytes) -> bytes:
    return OptionReply.pack(Opt.LIST, Rep.SERVER, struct.pack(">I", len(name)) + name)


def context_reply(ident: int, name: bytes) -> bytes:
    return OptionReply.pack(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, struct.pack(">I", ident) + name)


BAD_OPTIONS: dict[str, tuple[Opt, bytes]] = {
    "wrong magic": (Opt.GO, b"\xff" * 20),
    "reply to another option": (Opt.GO, ack(Opt.LIST)),
    "unknown reply": (Opt.GO, OptionReply.pack(Opt.GO, 77)),
    "reply of 4 GiB": (Opt.GO, OptionReply.pack(Opt.GO, Rep.INFO)[:-4] + b"\xff\xff\xff\xff"),
    "no export information": (Opt.GO, ack(Opt.GO)),
    "information too short": (Opt.GO, OptionReply.pack(Opt.GO, Rep.INFO, b"\0")),
    "export information too short": (Opt.GO, OptionReply.pack(Opt.GO, Rep.INFO, b"\0\0abc") + ack(Opt.GO)),
    "disk of 2^64 - 1": (
        Opt.GO,
        OptionReply.pack(Opt.GO, Rep.INFO, struct.pack(">HQH", 0, (1 << 64) - 1, 1)) + ack(Opt.GO),
    ),
    "blocks of 0": (
        Opt.GO,
        OptionReply.pack(Opt.GO, Rep.INFO, struct.pack(">HQH", 0, SIZE, 1))
        + OptionReply.pack(Opt.GO, Rep.INFO, struct.pack(">HIII", 3, 0, 0, 0))
        + ack(Opt.GO),
    ),
    "name longer than its reply": (
        Opt.LIST,
        OptionReply.pack(Opt.LIST, Rep.SERVER, struct.pack(">I", 0xFFFFFFFF) + b"x") + ack(Opt.LIST),
    ),
    "context not asked for": (
        Opt.SET_META_CONTEXT,
        context_reply(1, b"base:other") + ack(Opt.SET_META_CONTEXT),
    ),
    "context id twice": (
        Opt.SET_META_CONTEXT,
        context_reply(1, b"base:allocation") + context_reply(1, DIRTY.encode()) + ack(Opt.SET_META_CONTEXT),
    ),
    "context reply too short": (
        Opt.SET_META_CONTEXT,
        OptionReply.pack(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, b"ab"),
    ),
    "refusal in control characters": (
        Opt.GO,
        OptionReply.pack(Opt.GO, Rep.ERR_POLICY, b"\xff" * 100),
    ),
}


class OptionServer:
    """Acknowledges every option but one, which it answers with ``reply``, over and over if ``endless``."""

    def __init__(self, option: Opt, reply: bytes, *, endless: bool = False) -> None:
        self.option = option
        self.reply = reply
        self.endless = endless

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(Greeting.newstyle(3).pack())
        await reader.readexactly(CLIENT_FLAGS.size)
        while True:
            request = OptionRequest.parse(await reader.readexactly(OPTION.size))
            await reader.readexactly(request.length)
            writer.write(self.reply if request.option == self.option else ack(request.option))
            while self.endless and request.option == self.option:
                await writer.drain()
                writer.write(self.reply * 100)


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_answers_to_options(tmp_path: Path, case: str) -> None:
    option, reply = BAD_OPTIONS[case]

    async def main() -> None:
        async with serving(tmp_path, OptionServer(option, reply)) as uri:
            await refused(negotiate(uri, option), uri)

    async def negotiate(uri: NbdUri, option: Opt) -> None:
        async with await NbdClient.open(uri, timeout=5) as client:
            if option == Opt.LIST:
                await client.list_exports()
            await client.go(["base:allocation", DIRTY] if option == Opt.SET_META_CONTEXT else [])

    run(main())


@pytest.mark.parametrize(
    ("option", "reply"),
    [
        (Opt.LIST, server_reply(b"x" * 4000)),
        (
            Opt.LIST_META_CONTEXT,
            context_reply(0, b"base:" + b"x" * 4000).replace(b"\0\0\0\x0a", b"\0\0\0\x09"),
        ),
        (Opt.SET_META_CONTEXT, context_reply(1, b"base:allocation")),
        (Opt.GO, OptionReply.pack(Opt.GO, Rep.INFO, struct.pack(">H", 999) + bytes(4000))),
        (Opt.GO, OptionReply.pack(Opt.GO, Rep.INFO, struct.pack(">H", 1) + b"n" * 4000)),
    ],
    ids=["exports", "contexts", "selections", "information", "names"],
)
def test_replies_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: Opt, reply: bytes
) -> None:
    monkeypatch.setattr(clientlink, "MAX_ANSWER", 256 << 10)

    async def main() -> None:
        server = OptionServer(option, reply, endless=True)
        async with serving(tmp_path, server) as uri, await NbdClient.open(uri, timeout=20) as client:
            started = time.monotonic()
            if option == Opt.LIST:
                await refused(client.list_exports(), uri)
            elif option == Opt.LIST_META_CONTEXT:
                await refused(client.list_contexts(), uri)
            elif option == Opt.SET_META_CONTEXT:
                await refused(client.go(["base:allocation"]), uri)
            else:
                await refused(client.go(), uri)
            assert time.monotonic() - started < 15

    tracemalloc.start()
    try:
        run(main())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
