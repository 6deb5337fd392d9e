"""A small NBD server for tests of clients: a disk in memory behind the real server core and a real socket.

It answers honestly unless told otherwise, request by request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nbdbm.client import NbdClient
from nbdbm.extents import ExtentList
from nbdbm.nbd import events
from nbdbm.nbd.catalog import ExportInfo
from nbdbm.nbd.constants import MAX_PAYLOAD, NbdErrno, TransmissionFlag
from nbdbm.nbd.limits import Limits
from nbdbm.nbd.protocol import ServerProtocol
from nbdbm.uri import NbdUri

SIZE = 1 << 20
DIRTY = "qemu:dirty-bitmap:b"
FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.CAN_MULTI_CONN
)

Answer = Callable[[events.Command], bytes | None]


class OneExport:
    """A catalogue of one export."""

    def __init__(self, info: ExportInfo) -> None:
        self._info = info

    def listing(self) -> list[tuple[str, str]]:
        return [(self._info.name, self._info.description)]

    def info(self, name: str) -> ExportInfo | None:
        return self._info if name == self._info.name else None


class DiskServer:
    """A disk in memory behind the server core: every 64 KiB differ, the odd ones are dirty, odd MiBs zero.

    Args:
        answer: returns raw bytes to answer a command with, or None for the honest answer.
        extent_cap: the most extents in one answer, per context; lets contexts end at different places.
        answer_length: bytes that one answer describes at most.
    """

    def __init__(
        self,
        *,
        size: int = SIZE,
        maximum_payload: int = 65536,
        answer: Answer = lambda command: None,
        extent_cap: int = 5,
        answer_length: int = 1 << 40,
    ) -> None:
        self.data = bytearray(b"".join(bytes([i % 255 + 1]) * 65536 for i in range(min(size, SIZE) // 65536)))
        self.info = ExportInfo(
            name="disk",
            size=size,
            flags=FLAGS,
            description="a disk",
            maximum_payload=maximum_payload,
            contexts=("base:allocation", DIRTY),
        )
        self.limits = Limits(max_payload=max(maximum_payload, MAX_PAYLOAD))
        self.answer = answer
        self.extent_cap = extent_cap
        self.answer_length = answer_length
        self.commands: list[events.Command] = []
        self.goodbyes = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        core = ServerProtocol(OneExport(self.info), limits=self.limits)
        while not core.closed:
            for part in core.data_to_send():
                writer.write(bytes(part))
            received = await reader.read(65536)
            todo = core.receive_data(received) if received else core.receive_eof()
            while todo:
                event = todo.pop(0)
                if isinstance(event, events.GoRequested):
                    todo += core.accept(self.info)
                elif isinstance(event, events.Disconnected):
                    self.goodbyes += event.clean
                else:
                    self.commands.append(event)
                    raw = self.answer(event)
                    if raw is None:
                        self._serve(core, event)
                    else:
                        writer.write(raw)
        for part in core.data_to_send():
            writer.write(bytes(part))
        await writer.drain()

    def _serve(self, core: ServerProtocol, event: events.Command) -> None:
        match event:
            case events.Read(cookie, offset, length):
                data = bytes(self.data[offset : offset + length])
                core.reply_read(cookie, offset, [(length, data)])
            case events.Write(cookie, offset, data):
                self.data[offset : offset + len(data)] = data
                core.reply(cookie)
            case events.WriteZeroes(cookie, offset, length):
                self.data[offset : offset + length] = bytes(length)
                core.reply(cookie)
            case events.Trim(cookie, offset):
                if offset == 0:
                    core.reply_error(cookie, NbdErrno.ENOSPC, "no room for a trim")
                else:
                    core.reply(cookie)
            case events.BlockStatus(cookie, offset, length, _, contexts):
                answers = []
                for ident, name in contexts:
                    step = 65536 if name == DIRTY else 1 << 20
                    extents = ExtentList(offset, min(length, self.answer_length), self.extent_cap)
                    position = offset
                    while extents.add(step - position % step, position // step % 2):
                        position += step - position % step
                    answers.append((ident, extents))
                core.reply_block_status(cookie, answers)
            case _:
                core.reply(event.cookie)


@asynccontextmanager
async def serving(
    directory: Path,
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    *,
    tcp: bool = False,
) -> AsyncIterator[NbdUri]:
    """``serve`` behind a Unix socket in ``directory``, or on TCP; failures in it fail the test."""
    failures: list[BaseException] = []
    tasks: set[asyncio.Task[None] | None] = set()

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client had enough, as it should
        except BaseException as error:
            failures.append(error)
        finally:
            writer.close()

    if tcp:
        server = await asyncio.start_server(guarded, "127.0.0.1", 0)
        uri = NbdUri.tcp("127.0.0.1", server.sockets[0].getsockname()[1], "disk")
    else:
        uri = NbdUri.unix(str(directory / "socket"), "disk")
        server = await asyncio.start_unix_server(guarded, uri.socket)
    try:
        yield uri
        # Clients are gone by now, so every connection comes to its end.
        await asyncio.gather(*filter(None, tasks))
    finally:
        server.close()
    if failures:
        raise failures[0]


@asynccontextmanager
async def connected(
    directory: Path,
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    **options: Any,
) -> AsyncIterator[NbdClient]:
    """A client in transmission with ``serve``; goodbye is said before the server goes."""
    async with serving(directory, serve) as uri, await NbdClient.connect(uri, **options) as client:
        yield client


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))
