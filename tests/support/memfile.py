"""MemoryFile: a BlockFile in memory, that counts, refuses and delays as told."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import Literal, NamedTuple

from tests.support.files import InMemory

Kind = Literal["pread", "pwrite", "zero", "discard", "truncate", "sync"]


class Operation(NamedTuple):
    """One call that touched the file. ``length`` and ``offset`` are 0 where they mean nothing."""

    kind: Kind
    offset: int = 0
    length: int = 0
    data: bytes = b""
    """What was written."""


class MemoryFile(InMemory):
    """A file that is a bytearray.

    ``log`` records every operation in the order in which it took effect. ``before``, when set, is called
    first with the operation; an OSError that it raises is the operation's outcome, and nothing happened.
    """

    def __init__(self, data: bytes = b"", *, path: str = "memory.qcow2", writable: bool = True) -> None:
        self.data = bytearray(data)
        self.size = len(data)
        self.path = path
        self.writable = writable
        self.closed = False
        self.log: list[Operation] = []
        self.before: Callable[[Operation], None] | None = None

    def count(self, kind: Kind) -> int:
        """How often there was an operation of this kind."""
        return sum(operation.kind == kind for operation in self.log)

    async def _begin(self, operation: Operation) -> None:
        """Every operation yields once, as a real one does, so that concurrent callers interleave."""
        assert not self.closed
        await asyncio.sleep(0)
        if self.before is not None:
            self.before(operation)
        if operation.kind not in ("pread", "sync") and not self.writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self.log.append(operation)

    async def pread(self, offset: int, length: int) -> bytes:
        await self._begin(Operation("pread", offset, length))
        return bytes(self.data[offset : offset + length]).ljust(length, b"\0")

    def try_pread_into(self, view: memoryview, offset: int) -> bool:
        view[:] = bytes(self.data[offset : offset + len(view)]).ljust(len(view), b"\0")
        return True

    def _put(self, offset: int, data: bytes) -> None:
        self.data.extend(bytes(max(0, offset + len(data) - len(self.data))))
        self.data[offset : offset + len(data)] = data
        self.size = len(self.data)

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        await self._begin(Operation("pwrite", offset, len(data), bytes(data)))
        self._put(offset, bytes(data))

    def try_pwrite(self, offset: int, data: memoryview) -> bool:
        return False

    async def zero(self, offset: int, length: int, *, punch: bool, fallback: bool = True) -> None:
        await self._begin(Operation("zero", offset, length))
        self._put(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        await self._begin(Operation("discard", offset, length))
        # Undefined from here on: what comes back must not look like anything that was written.
        self.data[offset : offset + length] = b"\xdd" * len(self.data[offset : offset + length])

    async def truncate(self, size: int) -> None:
        await self._begin(Operation("truncate", size))
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        self.size = size

    async def sync(self) -> None:
        await self._begin(Operation("sync"))

    def allocated(self) -> int:
        return len(self.data)

    def close(self) -> None:
        self.closed = True
