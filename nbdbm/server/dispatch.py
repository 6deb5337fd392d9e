"""From an event to the export and back: a handler per command, and the one except clause towards the wire."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from time import perf_counter_ns
from typing import Any, NamedTuple

from nbdbm.errors import NbdbmError
from nbdbm.exports import Export
from nbdbm.metrics import Tally
from nbdbm.nbd.constants import CmdFlag, NbdErrno
from nbdbm.nbd.events import BlockStatus, Cache, Command, Flush, Read, Trim, Write, WriteZeroes
from nbdbm.nbd.protocol import ServerProtocol
from nbdbm.peer import UNKNOWN, Peer
from nbdbm.server.ahead import StatusAhead
from nbdbm.server.buffers import Buffer, BufferPool

log = logging.getLogger(__name__)

REQUEST_COST = 512
"""Bytes that any request in progress takes at least: its event, its coroutine, its reply's header."""

STATUS_COST = 8 * 1024 * 1024
"""Bytes that a block status answer may take per context while it is built: MAX_EXTENTS pairs of integers."""

STATUS_CONTEXTS = 16
"""Contexts up to which the answers' sizes add up; more share one number of extents (``extent_limit``)."""

ERRNO: dict[int, NbdErrno] = {
    errno.EPERM: NbdErrno.EPERM,
    errno.EACCES: NbdErrno.EPERM,
    errno.EROFS: NbdErrno.EPERM,
    errno.ENOMEM: NbdErrno.ENOMEM,
    errno.EINVAL: NbdErrno.EINVAL,
    errno.ENOSPC: NbdErrno.ENOSPC,
    errno.EDQUOT: NbdErrno.ENOSPC,
    errno.EFBIG: NbdErrno.ENOSPC,
    errno.EOVERFLOW: NbdErrno.EOVERFLOW,
    errno.EOPNOTSUPP: NbdErrno.ENOTSUP,
    errno.ENOTSUP: NbdErrno.ENOTSUP,
    errno.ESHUTDOWN: NbdErrno.ESHUTDOWN,
}
"""The host's errors as the protocol can say them ("Error values"); anything else is EIO."""


class Context(NamedTuple):
    """What the handlers of one connection work with."""

    export: Export
    protocol: ServerProtocol
    buffers: BufferPool
    sent: list[Buffer]
    """Buffers whose content is queued as replies; the connection gives them back once it is sent."""
    tally: Tally
    ahead: StatusAhead | None = None
    """Makes answers to block status before they are asked for, if that is possible."""
    peer: Peer = UNKNOWN
    """The client, for the log."""

    @property
    def who(self) -> str:
        """Client and export, as they begin a line of the log."""
        return f"{self.peer}: export {self.export.info.name!r}"


async def answer(event: Command, context: Context) -> None:
    """Carry out one command and queue its reply, which is an error reply if it fails. Never raises."""
    kind = type(event)
    figures = context.tally.commands[NAMES[kind]]
    began = perf_counter_ns()
    try:
        await HANDLERS[kind](event, context)
        size = amount(event)
    except Exception as error:
        code, text = wire_error(event, error, context.who)
        context.protocol.reply_error(event.cookie, code, text)
        figures.fail(code.name)
        size = 0
    figures.record(1, size, perf_counter_ns() - began)
    context.tally.general += 1


def amount(event: Command) -> int:
    """Bytes that the command is about, for the statistics."""
    if isinstance(event, Flush | BlockStatus):
        return 0
    return len(event.data) if isinstance(event, Write) else event.length


def wire_error(event: Command, error: Exception, who: str) -> tuple[NbdErrno, str]:
    """The error as the client gets it, after logging it as it is; ``who`` met it.

    The text names no file: the client is not told where the host keeps its images.
    """
    what = type(event).__name__
    if isinstance(error, NbdbmError | OSError):
        log.warning("%s: %s failed: %s", who, describe(event), reason(error))
        log.debug("%s: %s failed", who, what, exc_info=error)
        number = error.errno or errno.EIO
    elif isinstance(error, MemoryError):
        log.warning("%s: %s failed: out of memory", who, describe(event))
        number = errno.ENOMEM
    else:
        log.error("%s: %s failed: unexpected %s: %s", who, describe(event), type(error).__name__, error)
        log.debug("%s: %s failed", who, what, exc_info=error)
        number = errno.EIO
    code = ERRNO.get(number, NbdErrno.EIO)
    return code, f"{what} failed: {os.strerror(code)}"


def reason(error: Exception) -> str:
    """The error for a log line, ``FILE: what`` where the host has said something about a file."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
        return f"{error.filename}: {error.strerror}"
    return str(error)


def describe(event: Command) -> str:
    """The command for a log line, without its payload."""
    if isinstance(event, Flush):
        return "Flush"
    length = len(event.data) if isinstance(event, Write) else event.length
    return f"{type(event).__name__} at {event.offset} of {length} bytes"


def cost(event: Command) -> int:
    """Bytes of memory that carrying out the command and answering it may take, roughly and from above."""
    if isinstance(event, Read):
        return REQUEST_COST + event.length
    if isinstance(event, Write):
        return REQUEST_COST + len(event.data)
    if isinstance(event, BlockStatus):
        if event.flags and event.flags & CmdFlag.REQ_ONE:
            return REQUEST_COST * (1 + len(event.contexts))
        return REQUEST_COST + STATUS_COST * min(len(event.contexts), STATUS_CONTEXTS)
    return REQUEST_COST


NAMES: dict[type, str] = {
    Read: "read",
    Write: "write",
    WriteZeroes: "zero",
    Trim: "trim",
    Cache: "cache",
    Flush: "flush",
    BlockStatus: "status",
}
"""Commands as they are counted."""


async def _read(event: Read, context: Context) -> None:
    buffer = context.buffers.take(event.length)
    view = memoryview(buffer)[: event.length]
    protocol = context.protocol
    # Most reads have no flags, and an IntFlag's & costs more than the rest of this function.
    sparse = protocol.sparse_reads and not (event.flags and event.flags & CmdFlag.DF)
    chunks = await context.export.read(view, event.offset, sparse=sparse)
    protocol.reply_read(event.cookie, event.offset, chunks)
    context.sent.append(buffer)


async def _block_status(event: BlockStatus, context: Context) -> None:
    answers = await context.export.block_status(
        event.contexts,
        event.offset,
        event.length,
        req_one=bool(event.flags and event.flags & CmdFlag.REQ_ONE),
        limit=context.protocol.extent_limit(event),
    )
    if context.ahead is not None and not event.flags:
        context.ahead.note(event, answers)
    context.protocol.reply_block_status(event.cookie, answers)


async def _cache(event: Cache, context: Context) -> None:
    await context.export.cache(event.offset, event.length)
    context.protocol.reply(event.cookie)


async def _flush(event: Flush, context: Context) -> None:
    await context.export.flush()
    context.protocol.reply(event.cookie)


async def _write(event: Write, context: Context) -> None:
    fua = bool(event.flags and event.flags & CmdFlag.FUA)
    await context.export.write(event.offset, event.data, fua=fua)
    # Only now: after a failure somebody may still hold it.
    context.buffers.give(event.data.obj)
    context.protocol.reply(event.cookie)


async def _write_zeroes(event: WriteZeroes, context: Context) -> None:
    flags = event.flags
    await context.export.write_zeroes(
        event.offset,
        event.length,
        no_hole=bool(flags & CmdFlag.NO_HOLE),
        fast=bool(flags & CmdFlag.FAST_ZERO),
        fua=bool(flags & CmdFlag.FUA),
    )
    context.protocol.reply(event.cookie)


async def _trim(event: Trim, context: Context) -> None:
    await context.export.trim(event.offset, event.length, fua=bool(event.flags & CmdFlag.FUA))
    context.protocol.reply(event.cookie)


HANDLERS: dict[type, Callable[[Any, Context], Awaitable[None]]] = {
    Read: _read,
    Write: _write,
    WriteZeroes: _write_zeroes,
    Trim: _trim,
    Cache: _cache,
    Flush: _flush,
    BlockStatus: _block_status,
}
