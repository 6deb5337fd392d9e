"""The client's view of one request in flight: what its reply has brought so far, and whether that is legal.

The server is not trusted. Whatever lies outside the request, comes twice, is missing at the end or is
longer than it may be raises NbdError, before anything is kept.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right

from nbdbm.errors import NbdError
from nbdbm.extents import ExtentList
from nbdbm.nbd.constants import MAX_STRING, Cmd, CmdFlag, NbdErrno, ReplyType
from nbdbm.nbd.messages import ERROR, STATUS_EXT_HEAD, STATUS_HEAD, U64, Buffer, decode

MAX_GAPS = 4096
"""Disjoint pieces (a number) of one read that may be waiting for what lies between them. Servers answer
front to back or in a few parallel streams; only a hostile one scatters, and we would keep its pieces."""


def readable(text: str) -> str:
    """A server's text for our terminal: what would move its cursor or colour it shows as ``?``."""
    return "".join(c if c.isprintable() else "?" for c in text)


def errno_text(error: int) -> str:
    """The specification's name of a wire error, or its number."""
    try:
        return NbdErrno(error).name
    except ValueError:
        return f"error {error}"


class Covered:
    """Which parts of a range were seen, each at most once. Bytes, half-open."""

    __slots__ = ("_ends", "_starts", "total")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total = 0

    def add(self, start: int, end: int) -> bool:
        """Note ``[start, end)``; False if some of it was seen before, or the pieces are too many."""
        starts, ends = self._starts, self._ends
        at = bisect_right(starts, start)
        if at and ends[at - 1] > start:
            return False
        if at < len(starts) and starts[at] < end:
            return False
        self.total += end - start
        touches_before = at > 0 and ends[at - 1] == start
        touches_after = at < len(starts) and starts[at] == end
        if touches_before and touches_after:
            ends[at - 1] = ends.pop(at)
            del starts[at]
        elif touches_before:
            ends[at - 1] = end
        elif touches_after:
            starts[at] = start
        else:
            starts.insert(at, start)
            ends.insert(at, end)
        return len(starts) <= MAX_GAPS


class InFlight:
    """One request that awaits its reply.

    Args:
        wanted: BLOCK_STATUS: id -> name of each context that must be answered.
    """

    __slots__ = (
        "command",
        "contents",
        "cookie",
        "covered",
        "data",
        "error",
        "extents",
        "flags",
        "holes",
        "length",
        "offset",
        "text",
        "wanted",
    )

    def __init__(
        self,
        cookie: int,
        command: Cmd,
        offset: int,
        length: int,
        flags: CmdFlag,
        wanted: dict[int, str] | None = None,
    ) -> None:
        self.cookie = cookie
        self.command = command
        self.offset = offset
        self.length = length
        self.flags = flags
        self.wanted = wanted if wanted is not None else {}
        self.data: memoryview | None = memoryview(bytearray(length)) if command is Cmd.READ else None
        self.covered = Covered()
        self.contents = 0
        """Content chunks seen."""
        self.holes: list[tuple[int, int]] = []
        self.extents: dict[str, ExtentList] = {}
        self.error = 0
        self.text = ""

    def __str__(self) -> str:
        return f"{self.command.name} {self.offset}+{self.length}"

    def bad(self, what: str) -> NbdError:
        """An error that says of which request the server's answer is wrong."""
        return NbdError(f"the server broke the protocol: {self}: {what}")

    def fail(self, error: int, text: str) -> None:
        """The server reports an error; the first one is kept."""
        if not error:
            raise self.bad("an error chunk without an error")
        if not self.error:
            self.error = error
            self.text = text or errno_text(error)

    # content chunks

    def content(self, offset: int, length: int) -> memoryview:
        """Where ``length`` bytes that the server has for ``offset`` belong."""
        if self.data is None:
            raise self.bad("data in reply to it")
        if not length:
            raise self.bad("an empty content chunk")
        start = offset - self.offset
        if start < 0 or start + length > self.length:
            raise self.bad(f"content for {offset}+{length}, outside the request")
        if not self.covered.add(start, start + length):
            raise self.bad(f"content for {offset}+{length} overlaps earlier content, or is too scattered")
        self.contents += 1
        if self.contents > 1 and self.flags & CmdFlag.DF:
            raise self.bad("fragments, although it asked for none")
        return self.data[start : start + length]

    def hole(self, offset: int, length: int) -> None:
        """A part that reads as zeroes."""
        self.content(offset, length)
        if self.flags & CmdFlag.DF:
            raise self.bad("a hole, although it asked for data in one piece")
        self.holes.append((offset, length))

    # status chunks

    def status(self, payload: Buffer) -> None:
        """A BLOCK_STATUS chunk's payload."""
        words = self._words("I", payload, STATUS_HEAD.size)
        self._status(STATUS_HEAD.unpack_from(payload)[0], words)

    def status_ext(self, payload: Buffer) -> None:
        """A BLOCK_STATUS_EXT chunk's payload."""
        words = self._words("Q", payload, STATUS_EXT_HEAD.size)
        number, count = STATUS_EXT_HEAD.unpack_from(payload)
        if 2 * count != len(words):
            raise self.bad(f"{len(words) // 2} extents, {count} announced")
        self._status(number, words)

    def _words(self, typecode: str, payload: Buffer, head: int) -> array[int]:
        """The lengths and flags after ``head`` bytes."""
        words = array(typecode)
        size = len(payload) - head
        if size <= 0 or size % (2 * words.itemsize):
            raise self.bad(f"a status chunk of {len(payload)} bytes")
        words.frombytes(memoryview(payload)[head:])
        if sys.byteorder == "little":
            words.byteswap()
        return words

    def _status(self, number: int, words: array[int]) -> None:
        name = self.wanted.get(number)
        if name is None:
            raise self.bad(f"status for context id {number}, which was not asked for")
        if name in self.extents:
            raise self.bad(f"status for {name} twice")
        lengths = words[::2]
        total = sum(lengths)
        if not min(lengths):
            raise self.bad(f"an empty extent for {name}")
        if self.flags & CmdFlag.REQ_ONE:
            if len(lengths) > 1 or total > self.length:
                raise self.bad(f"more than one extent of its own range for {name}")
        elif total - lengths[-1] >= self.length:
            raise self.bad(f"extents beyond its range for {name}")
        extents = ExtentList(self.offset, self.length, len(lengths))
        for length, flags in zip(lengths, words[1::2], strict=True):
            extents.add(length, flags)
        self.extents[name] = extents

    # error chunks

    def error_chunk(self, type: int, payload: Buffer) -> None:
        """An error chunk's payload; unknown types begin like the known ones and count as errors."""
        size = len(payload)
        if size < ERROR.size:
            raise self.bad(f"an error chunk of {size} bytes")
        error, length = ERROR.unpack_from(payload)
        rest = size - ERROR.size - length
        if rest < 0 or length > MAX_STRING:
            raise self.bad(f"an error text of {length} bytes in a chunk of {size}")
        if type == ReplyType.ERROR_OFFSET:
            if rest < U64.size:
                raise self.bad(f"an error chunk of {size} bytes without its offset")
            at: int = U64.unpack_from(payload, ERROR.size + length)[0]
            if not self.offset <= at < self.offset + max(1, self.length):
                raise self.bad(f"an error at {at}, outside the request")
        text = decode(memoryview(payload)[ERROR.size : ERROR.size + length])
        self.fail(error, readable(text))

    # the end

    def finish(self) -> None:
        """Judge a reply that claims to be complete; one with an error may be partial."""
        if self.error:
            return
        if self.command is Cmd.READ and self.covered.total != self.length:
            raise self.bad(f"success with {self.covered.total} of {self.length} bytes")
        if self.command is Cmd.BLOCK_STATUS and len(self.extents) != len(self.wanted):
            missing = ", ".join(name for name in self.wanted.values() if name not in self.extents)
            raise self.bad(f"success without status for {missing}")
