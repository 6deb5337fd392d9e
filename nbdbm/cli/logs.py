"""What a server logs, and where to: lines of text or JSON on stderr, which can neither hold it up nor flood.

Names in messages come from clients and images that may mean harm: no control character gets through, and a
kind of line that comes too often is counted instead of written.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from nbdbm.cli import PROGRAM, printable

FORMATS = ("text", "json")

WINDOW = 10.0
"""Seconds in which lines of one kind (one place in the program) are counted."""

BURST = 100
"""Lines of one kind written in a window, unless the record says otherwise (``burst``); others are counted,
and their number written once. A client whose every request fails could otherwise fill the disk."""

MAX_MESSAGE = 2000
"""Characters of a message; longer ones are cut. An export's name alone can have 4096 bytes."""

PIECE = select.PIPE_BUF
"""Bytes that are written at once: so many never block where poll says that there is room (pipe(7))."""


def set_up(log_format: str, verbose: int, quiet: bool, *, captive: bool) -> None:
    """Log to stderr from now on.

    Args:
        verbose: 1: what happens; 2: what is said on the wire, too, which costs much.
        captive: a command runs with the server, and stderr is that command's.
    """
    level = logging.INFO
    if quiet or captive:
        level = logging.WARNING
    if verbose:
        level = logging.DEBUG
    handler = ServerLog(_writer())
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    # The wire is traced message by message if its logger is on DEBUG, and then without the fast path.
    logging.getLogger("nbdbm.nbd").setLevel(logging.NOTSET if verbose > 1 else logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def say_warnings() -> None:
    """Write warnings to stderr as lines of the program, for commands that have not asked for a log."""
    if not logging.root.handlers:
        set_up("text", verbose=0, quiet=True, captive=False)


class TextLines(logging.Formatter):
    """``nbdbm: message``; a traceback follows on its own lines."""

    def format(self, record: logging.LogRecord) -> str:
        lines = [f"{PROGRAM}: {message(record)}"]
        if record.exc_info:
            lines += self.formatException(record.exc_info).split("\n")
        return "\n".join(printable(line) for line in lines)


class JsonLines(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, and the record's ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        import json  # only where asked for: the start of the server is short
        from datetime import UTC, datetime

        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message(record),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(_clean(line))


def message(record: logging.LogRecord) -> str:
    """The record's message, cut if it is very long."""
    text = record.getMessage()
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "..."


def _clean(value: Any) -> Any:
    """Without lone surrogates (from file names that are not UTF-8), which not every reader takes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(each) for each in value]
    return value


class _Kind:
    """Lines of one kind in the present window."""

    __slots__ = ("began", "count", "last", "more")

    def __init__(self, began: float) -> None:
        self.began = began
        self.count = 0
        self.more = 0
        """Lines that were not written."""
        self.last: logging.LogRecord | None = None


class ServerLog(logging.Handler):
    """Writes lines, no more than ``BURST`` of one kind in ``WINDOW``.

    Args:
        write: takes one line; False if it could not be written.
    """

    def __init__(self, write: Callable[[str], bool], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._write = write
        self._clock = clock
        self._kinds: dict[tuple[str, int, str], _Kind] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._lost = 0
        """Lines that could not be written, since one could."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            for each in self._admitted(record):
                self._put(self.format(each))
        except Exception as error:  # a bug in a message; the server goes on
            self._put(f"{PROGRAM}: a message of {record.name} cannot be written: {printable(repr(error))}")

    def _put(self, line: str) -> None:
        if self._lost and self._write(
            self.format(_record(logging.WARNING, "%d lines were lost", self._lost))
        ):
            self._lost = 0
        if not self._write(line):
            self._lost += 1

    def _admitted(self, record: logging.LogRecord) -> Iterator[logging.LogRecord]:
        """What is to be written now that there is this record."""
        if record.levelno < logging.INFO:
            yield record  # was asked for
            return
        key = (record.name, record.levelno, str(record.msg))
        kind, now = self._kinds.get(key), self._clock()
        if kind is None or now - kind.began >= WINDOW:
            if kind is not None:
                yield from _rest(kind)
            kind = self._kinds[key] = _Kind(now)
        kind.count += 1
        if kind.count <= getattr(record, "burst", BURST):
            yield record
            return
        kind.more += 1
        kind.last = record
        if self._timer is None:
            with suppress(RuntimeError):  # in a thread: whoever logs next says it
                self._timer = asyncio.get_running_loop().call_later(WINDOW, self.settle)

    def settle(self) -> None:
        """Write how many lines were not written."""
        self.acquire()
        try:
            self._timer = None
            for kind in self._kinds.values():
                for record in _rest(kind):
                    self._put(self.format(record))
        finally:
            self.release()

    def close(self) -> None:
        self.settle()
        super().close()


def _rest(kind: _Kind) -> Iterator[logging.LogRecord]:
    if kind.more and kind.last is not None:
        text = "%d more lines like this one: %s"
        record = _record(kind.last.levelno, text, kind.more, kind.last.getMessage(), name=kind.last.name)
        record.fields = {"more": kind.more}
        kind.more = 0
        yield record


def _record(level: int, text: str, *values: object, name: str = __name__) -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, text, values, None)


def _writer() -> Callable[[str], bool]:
    """To stderr's descriptor, or to what stands in for it in a test."""
    try:
        return Writer(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):
        return _echo


def _echo(line: str) -> bool:
    print(line, file=sys.stderr)
    return True


class Writer:
    """Writes lines to a descriptor without ever waiting for whoever reads it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._cut = False
        """The last line was written in part."""
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def __call__(self, line: str) -> bool:
        data = ("\n" * self._cut + line + "\n").encode("utf-8", "backslashreplace")
        done = 0
        try:
            while done < len(data):
                if not any(events & select.POLLOUT for _, events in self._poll.poll(0)):
                    break
                done += os.write(self._descriptor, data[done : done + PIECE])
        except OSError:
            pass  # closed, or a full disk: not what a server ends for
        if done:
            self._cut = done < len(data)
        return done == len(data)
