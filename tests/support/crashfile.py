"""CrashFile: what a power failure left of one file, and what it is made of.

A ``Base`` holds what is certain and only moves forward; a CrashFile is the base and the sectors that
differ from it. ``Scratch`` shows one to programs that want a real file.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.support.files import Unlocked

SECTOR = 512
"""Bytes; a disk writes one whole or not at all."""
NEVER = 1 << 62
"""The tick of what did not happen."""
GARBAGE = bytes(range(0x80, 0x100)) * (SECTOR // 128)
"""What a discarded sector may read as: nothing that any run writes."""

Kind = Literal["write", "zero", "discard", "truncate", "sync"]


@dataclass(slots=True)
class Op:
    """One operation on one file; ``begun`` and ``ended`` are ticks."""

    file: int
    kind: Kind
    offset: int
    """For a truncate: the new size."""
    length: int
    data: bytes
    begun: int
    ended: int = NEVER

    def sectors(self) -> int:
        """How many sectors it touches; a truncate counts as one."""
        if not self.length:
            return int(self.kind == "truncate")
        return (self.offset + self.length - 1) // SECTOR - self.offset // SECTOR + 1

    def __str__(self) -> str:
        return f"{self.kind} file {self.file} @{self.offset:#x}+{self.length:#x} [{self.begun}, {self.ended}]"


class CrashFile(Unlocked):
    """A HostFile: a shared base and the sectors that differ from it. Writing changes only this one."""

    def __init__(self, base: Base, path: str) -> None:
        self.base = base
        self.path = path
        self.writable = True
        self.size = len(base.data)
        self.closed = False
        self.sectors: dict[int, bytes] = {}
        """By number; in full, zeroes past the end of the file."""
        self._cut = self.size
        """The base counts only up to here: what was cut off does not come back."""

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes; past the end they are zeroes."""
        stop = min(offset + length, self._cut)
        buf = bytearray(self.base.data[offset:stop] if stop > offset else b"")
        buf.extend(bytes(length - len(buf)))
        first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
        numbers: Iterable[int] = range(first, last)
        if len(self.sectors) < last - first:
            numbers = (n for n in self.sectors if first <= n < last)
        for number in numbers:
            content = self.sectors.get(number)
            if content is not None:
                at = number * SECTOR - offset
                skip = max(0, -at)
                content = content[skip : length - at]
                buf[at + skip : at + skip + len(content)] = content
        return bytes(buf)

    def put(self, offset: int, data: bytes | memoryview) -> None:
        """Overwrite, extending the file."""
        end = offset + len(data)
        at = offset
        while at < end:
            number, skip = divmod(at, SECTOR)
            piece = bytes(data[at - offset : at - offset + SECTOR - skip])
            if len(piece) < SECTOR:
                old = self.read(number * SECTOR, SECTOR)
                piece_end = skip + len(piece)
                self.sectors[number] = old[:skip] + piece + old[piece_end:]
                at += piece_end - skip
            else:
                self.sectors[number] = piece
                at += SECTOR
        self.size = max(self.size, end)

    def resize(self, size: int) -> None:
        """Set the length; what is cut off reads as zeroes should the file grow again."""
        if size < self.size:
            partial = size % SECTOR
            kept = self.read(size - partial, partial) if partial else b""
            self._cut = min(self._cut, size)
            for number in [n for n in self.sectors if n * SECTOR >= size - partial]:
                del self.sectors[number]
            if partial:
                self.sectors[size // SECTOR] = kept + bytes(SECTOR - partial)
        self.size = size

    @property
    def visible(self) -> int:
        """How many bytes of the base count."""
        return self._cut

    def to_bytes(self) -> bytes:
        """The whole file, copied."""
        return self.read(0, self.size)

    # -- BlockFile -----------------------------------------------------------------------------

    async def _turn(self) -> None:
        assert not self.closed
        await asyncio.sleep(0)

    async def pread(self, offset: int, length: int) -> bytes:
        await self._turn()
        return self.read(offset, length)

    def try_pread_into(self, view: memoryview, offset: int) -> bool:
        view[:] = self.read(offset, len(view))
        return True

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        await self._turn()
        self.put(offset, memoryview(data))

    def try_pwrite(self, offset: int, data: memoryview) -> bool:
        self.put(offset, data)
        return True

    async def zero(self, offset: int, length: int, *, punch: bool, fallback: bool = True) -> None:
        await self._turn()
        self.put(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        await self._turn()
        self.put(offset, self.base.discarded(offset, min(offset + length, self.size)))

    async def truncate(self, size: int) -> None:
        await self._turn()
        self.resize(size)

    async def sync(self) -> None:
        await self._turn()

    def allocated(self) -> int:
        return self.size

    def close(self) -> None:
        self.closed = True


class Base:
    """What is certain of one file by now. ``changes`` logs the ranges in which it was ever changed."""

    def __init__(self, data: bytes, *, garbage: bool) -> None:
        self.data = bytearray(data)
        self.changes: list[tuple[int, int]] = []
        self.garbage = garbage

    def discarded(self, offset: int, end: int) -> bytes:
        """The worst that a discarded range may read as."""
        return garbage_of(offset, end) if self.garbage else bytes(max(0, end - offset))

    def apply(self, op: Op) -> None:
        """Let ``op`` take place in full."""
        if op.kind == "truncate":
            old = len(self.data)
            del self.data[op.offset :]
            self.data.extend(bytes(op.offset - len(self.data)))
            low, high = sorted((old, op.offset))
            self.changes.append((low, high - low))
            return
        end = op.offset + op.length
        data = op.data
        if op.kind == "zero":
            data = bytes(op.length)
        elif op.kind == "discard":
            end = max(op.offset, min(end, len(self.data)))
            data = self.discarded(op.offset, end)
        self.data.extend(bytes(max(0, end - len(self.data))))
        self.data[op.offset : end] = data
        self.changes.append((op.offset, op.length))


@dataclass
class Scratch:
    """A real file that takes on one crash state after the other, for outside judges.

    Only what differs from the state before is written.
    """

    path: Path
    _base: Base | None = None
    _changes: int = 0
    """How many of the base's changes the file has."""
    _odd: set[int] = field(default_factory=set)
    """Sectors in which the file is not the base."""

    def show(self, state: CrashFile) -> Path:
        """Make the file equal to ``state`` as it is now, later writes to it included; return its path."""
        stale: set[int] = set(self._odd)
        if self._base is not state.base:
            self.path.write_bytes(state.base.data)
            self._base, stale = state.base, set()
            self._changes = len(state.base.changes)
        for offset, length in state.base.changes[self._changes :]:
            stale.update(range(offset // SECTOR, -(-(offset + length) // SECTOR)))
        self._changes = len(state.base.changes)
        stale.update(state.sectors)
        with self.path.open("r+b") as file:
            file.truncate(min(os.path.getsize(self.path), state.visible))
            file.truncate(state.size)
            for first, stop in runs_of(sorted(stale)):
                low, high = first * SECTOR, min(stop * SECTOR, state.size)
                if low < high:
                    file.seek(low)
                    file.write(state.read(low, high - low))
        # What a cut hid of the base must come back should the next state not have it.
        hidden = range(state.visible // SECTOR, -(-len(state.base.data) // SECTOR))
        self._odd = set(state.sectors) | set(hidden)
        return self.path


def garbage_of(offset: int, end: int) -> bytes:
    return (GARBAGE * (max(0, end - offset) // SECTOR + 2))[offset % SECTOR :][: max(0, end - offset)]


def runs_of(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as half-open runs."""
    at = 0
    while at < len(numbers):
        stop = at + 1
        while stop < len(numbers) and numbers[stop] == numbers[stop - 1] + 1:
            stop += 1
        yield numbers[at], numbers[stop - 1] + 1
        at = stop
