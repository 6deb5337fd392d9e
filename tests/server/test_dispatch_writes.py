"""Dispatch of what changes an image: every flag arrives, and a failure is one request's own."""

from __future__ import annotations

import errno
import logging
from typing import Any

import pytest

from nbdbm.errors import ImageError
from nbdbm.nbd.constants import CmdFlag, NbdErrno
from nbdbm.nbd.events import Command, Flush, Trim, Write, WriteZeroes
from nbdbm.server.dispatch import REQUEST_COST, cost, reason
from tests.server.memimage import WritableImage
from tests.server.test_dispatch import carry_out

NO = CmdFlag(0)
SIZE = 4096


@pytest.mark.parametrize(
    ("event", "change"),
    [
        (Write(1, 5, memoryview(b"data"), NO), ("write", 5, 4)),
        (Write(1, 5, memoryview(b"data"), CmdFlag.FUA), ("write", 5, 4, "fua")),
        (WriteZeroes(1, 0, 10, NO), ("zeroes", 0, 10)),
        (WriteZeroes(1, 0, SIZE, CmdFlag.NO_HOLE), ("zeroes", 0, SIZE, "no_hole")),
        (WriteZeroes(1, 0, 10, CmdFlag.FAST_ZERO), ("zeroes", 0, 10, "fast")),
        (
            WriteZeroes(1, 0, 10, CmdFlag.FUA | CmdFlag.FAST_ZERO | CmdFlag.NO_HOLE),
            ("zeroes", 0, 10, "no_hole", "fast", "fua"),
        ),
        (Trim(1, SIZE - 1, 1, NO), ("trim", SIZE - 1, 1)),
        (Trim(1, 0, 10, CmdFlag.FUA), ("trim", 0, 10, "fua")),
    ],
)
def test_what_reaches_the_image(event: Command, change: tuple[Any, ...]) -> None:
    image = WritableImage(b"." * SIZE)
    assert carry_out(event, image) == [(1,)]
    assert image.changes == [change]


def test_data() -> None:
    image = WritableImage(b"." * 10)
    carry_out(Write(1, 3, memoryview(b"data"), NO), image)
    assert image.content == b"...data..."


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/secret"), NbdErrno.ENOSPC),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), NbdErrno.ENOSPC),
        (OSError(errno.EFBIG, "File too large"), NbdErrno.ENOSPC),
        (OSError(errno.EIO, "Input/output error"), NbdErrno.EIO),
        (OSError(errno.EROFS, "Read-only file system"), NbdErrno.EPERM),
        (OSError(errno.ENXIO, "No such device or address"), NbdErrno.EIO),
        (ImageError("/secret", "is open for reading only", errno=errno.EPERM), NbdErrno.EPERM),
        (ImageError("/secret", "would be slow", errno=errno.ENOTSUP), NbdErrno.ENOTSUP),
        (ImageError("/secret", "a sync failed"), NbdErrno.EIO),
    ],
)
@pytest.mark.parametrize(
    "event",
    [
        Write(7, 0, memoryview(b"data"), NO),
        WriteZeroes(7, 0, 10, NO),
        Trim(7, 0, 10, CmdFlag.FUA),
    ],
    ids=lambda event: type(event).__name__,
)
def test_failures(
    event: Command, failure: Exception, error: NbdErrno, caplog: pytest.LogCaptureFixture
) -> None:
    """One error reply, one line in the log, and the next request is carried out."""
    image = WritableImage(b"." * SIZE)
    image.failures[2] = failure
    with caplog.at_level(logging.WARNING, "nbdbm"):
        ((cookie, found, message),) = carry_out(event, image)
    assert (cookie, found) == (7, error)
    assert "secret" not in message and message.startswith(f"{type(event).__name__} failed: ")
    assert len(caplog.records) == 1 and reason(failure) in caplog.text
    assert image.changes == []
    assert carry_out(Write(8, 100, memoryview(b"x"), NO), image) == [(8,)]
    assert carry_out(Flush(9, NO), image) == [(9,)] and image.flushes == 1


def test_reason_names_the_file() -> None:
    assert reason(OSError(errno.EIO, "bad sector", "/disk")) == "/disk: bad sector"
    assert reason(OSError(errno.EIO, "bad sector")) == "[Errno 5] bad sector"
    assert reason(ImageError("/disk", "a sync failed")) == "/disk: a sync failed"


def test_a_write_costs_its_payload() -> None:
    assert cost(Write(1, 0, memoryview(bytes(1 << 20)), NO)) == REQUEST_COST + (1 << 20)
    assert cost(WriteZeroes(1, 0, 1 << 40, NO)) == cost(Trim(1, 0, 1 << 40, NO)) == REQUEST_COST
