"""Dispatch: each command reaches the export, each failure becomes one error reply."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import Any

import pytest

from nbdbm.errors import BitmapError, NbdbmError
from nbdbm.exports import Export
from nbdbm.metrics import Tally
from nbdbm.nbd.constants import CmdFlag, NbdErrno
from nbdbm.nbd.events import BlockStatus, Cache, Command, Flush, Read, Trim, Write, WriteZeroes
from nbdbm.peer import Peer
from nbdbm.server import dispatch
from nbdbm.server.buffers import BufferPool
from nbdbm.server.dispatch import Context, answer, cost
from tests.server.memimage import MemoryImage

NO = CmdFlag(0)
COMMANDS: list[Command] = [
    Read(1, 0, 10, NO),
    Write(1, 0, memoryview(b"data"), NO),
    WriteZeroes(1, 0, 10, NO),
    Trim(1, 0, 10, NO),
    Cache(1, 0, 10, NO),
    Flush(1, NO),
    BlockStatus(1, 0, 10, NO, ((0, "base:allocation"),)),
]


class Recorder:
    """A protocol that notes what is replied."""

    def __init__(self, *, sparse_reads: bool = True) -> None:
        self.sparse_reads = sparse_reads
        self.replies: list[tuple[Any, ...]] = []

    def extent_limit(self, event: BlockStatus) -> int:
        return 2

    def reply(self, cookie: int) -> None:
        self.replies.append((cookie,))

    def reply_read(self, cookie: int, offset: int, chunks: Any) -> None:
        self.replies.append((cookie, offset, [(length, data and bytes(data)) for length, data in chunks]))

    def reply_block_status(self, cookie: int, contexts: Any) -> None:
        self.replies.append((cookie, [(ident, list(extents.flat)) for ident, extents in contexts]))

    def reply_error(self, cookie: int, error: NbdErrno, message: str = "") -> None:
        self.replies.append((cookie, error, message))


def carry_out(event: Command, image: MemoryImage, recorder: Recorder | None = None) -> list[tuple[Any, ...]]:
    recorder = recorder or Recorder()
    export = Export.of(image)  # type: ignore[arg-type]
    asyncio.run(answer(event, Context(export, recorder, BufferPool(), [], Tally())))  # type: ignore[arg-type]
    return recorder.replies


def test_every_command_has_a_handler_and_a_cost() -> None:
    assert {type(event) for event in COMMANDS} == set(dispatch.HANDLERS)
    assert all(cost(event) >= dispatch.REQUEST_COST for event in COMMANDS)


class TestRead:
    IMAGE = MemoryImage(b"abc" + bytes(65533 + 65536))

    def test_sparse(self) -> None:
        assert carry_out(Read(9, 65536, 65536, NO), self.IMAGE) == [(9, 65536, [(65536, None)])]

    def test_whole_for_df(self) -> None:
        replies = carry_out(Read(9, 65536, 5, CmdFlag.DF), self.IMAGE)
        assert replies == [(9, 65536, [(5, bytes(5))])]

    def test_whole_for_simple_replies(self) -> None:
        replies = carry_out(Read(9, 65536, 5, NO), self.IMAGE, Recorder(sparse_reads=False))
        assert replies == [(9, 65536, [(5, bytes(5))])]

    def test_the_buffer_is_handed_on_for_reuse(self) -> None:
        export = Export.of(self.IMAGE)  # type: ignore[arg-type]
        context = Context(export, Recorder(), BufferPool(), [], Tally())  # type: ignore[arg-type]
        asyncio.run(answer(Read(1, 0, 3, NO), context))
        assert [bytes(buffer) for buffer in context.sent] == [b"abc"]

    def test_but_not_after_a_failure(self) -> None:
        image = MemoryImage(bytes(10))
        image.failures[0] = OSError(errno.EIO, "broken")
        context = Context(Export.of(image), Recorder(), BufferPool(), [], Tally())  # type: ignore[arg-type]
        asyncio.run(answer(Read(1, 0, 3, NO), context))
        assert context.sent == []


def test_block_status() -> None:
    image = MemoryImage((b"x" * 512 + bytes(512)) * 4, cluster_size=512)
    event = BlockStatus(3, 0, 4096, NO, ((4, "base:allocation"), (8, "qemu:allocation-depth")))
    assert carry_out(event, image) == [(3, [(4, [512, 0, 512, 3]), (8, [512, 1, 512, 0])])]
    one = event._replace(flags=CmdFlag.REQ_ONE)
    assert carry_out(one, image) == [(3, [(4, [512, 0]), (8, [512, 1])])]


def test_cache_and_flush() -> None:
    image = MemoryImage(bytes(4096))
    assert carry_out(Cache(1, 0, 4096, NO), image) == [(1,)]
    assert carry_out(Flush(2, NO), image) == [(2,)]
    assert image.reads == [(0, 4096)] and image.flushes == 1


@pytest.mark.parametrize(
    "event", [event for event in COMMANDS if isinstance(event, Write | WriteZeroes | Trim)]
)
def test_changes_never_reach_a_read_only_export(event: Command) -> None:
    ((cookie, error, _),) = carry_out(event, MemoryImage(bytes(4096)))
    assert (cookie, error) == (1, NbdErrno.EIO)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EPERM, NbdErrno.EPERM),
        (errno.EACCES, NbdErrno.EPERM),
        (errno.EROFS, NbdErrno.EPERM),
        (errno.EIO, NbdErrno.EIO),
        (errno.ENOENT, NbdErrno.EIO),
        (errno.EBADF, NbdErrno.EIO),
        (errno.ENOMEM, NbdErrno.ENOMEM),
        (errno.EINVAL, NbdErrno.EINVAL),
        (errno.ENOSPC, NbdErrno.ENOSPC),
        (errno.EDQUOT, NbdErrno.ENOSPC),
        (errno.EFBIG, NbdErrno.ENOSPC),
        (errno.EOVERFLOW, NbdErrno.EOVERFLOW),
        (errno.ENOTSUP, NbdErrno.ENOTSUP),
        (errno.ESHUTDOWN, NbdErrno.ESHUTDOWN),
    ],
)
def test_errno(number: int, error: NbdErrno) -> None:
    image = MemoryImage(bytes(10))
    image.failures[0] = OSError(number, "as it happened", "/secret")
    ((cookie, found, message),) = carry_out(Read(5, 0, 1, NO), image)
    assert (cookie, found) == (5, error)
    assert message.startswith("Read failed: ") and "secret" not in message


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (NbdbmError("what"), NbdErrno.EIO),
        (BitmapError("b", "what"), NbdErrno.EINVAL),
        (OSError("no number"), NbdErrno.EIO),
        (KeyError("a bug"), NbdErrno.EIO),
        (MemoryError(), NbdErrno.ENOMEM),
    ],
)
def test_other_failures(failure: Exception, error: NbdErrno, caplog: pytest.LogCaptureFixture) -> None:
    image = MemoryImage(bytes(10))
    image.failures[0] = failure
    recorder, export = Recorder(), Export.of(image, name="vda")  # type: ignore[arg-type]
    peer = Peer(address="192.0.2.7:1")
    context = Context(export, recorder, BufferPool(), [], Tally(), peer=peer)  # type: ignore[arg-type]
    with caplog.at_level(logging.DEBUG, "nbdbm"):
        asyncio.run(answer(Read(5, 0, 1, NO), context))
    ((_, found, _),) = recorder.replies
    assert found == error
    line = caplog.messages[0]
    assert line.startswith("192.0.2.7:1: export 'vda': Read at 0 of 1 bytes failed: ")
    assert str(failure) in line
    if isinstance(failure, KeyError):
        assert "Traceback" in caplog.text


def test_descriptions() -> None:
    texts = [dispatch.describe(event) for event in COMMANDS]
    assert texts[0] == "Read at 0 of 10 bytes" and texts[1] == "Write at 0 of 4 bytes" and texts[5] == "Flush"


def test_cost_follows_what_is_held() -> None:
    assert cost(Read(1, 0, 1 << 20, NO)) > 1 << 20
    many = tuple((number, "qemu:dirty-bitmap:x") for number in range(4096))
    assert cost(BlockStatus(1, 0, 1, NO, many)) < 1 << 28
    assert cost(BlockStatus(1, 0, 1, CmdFlag.REQ_ONE, many[:3])) < 4096
