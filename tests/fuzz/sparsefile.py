"""SparseFile: a host file in memory that notes what changes it and never takes much."""

from __future__ import annotations

import asyncio
import errno
import os

from tests.support.files import Unlocked

PAGE = 4096

MAX_SIZE = 16 << 20
"""Bytes; the largest file that this file system knows."""


class Content:
    """What is stored. ``limit``: bytes of memory, beyond which the disk is full."""

    def __init__(self, data: bytes, *, limit: int = 8 << 20) -> None:
        self.size = 0
        self.changes = 0
        """Operations that changed, or could have changed, it."""
        self._limit = limit
        self._pages: dict[int, bytearray] = {}
        self.store(0, data)

    def whole(self) -> bytes:
        """All of it."""
        return self.load(0, self.size)

    def allocated(self) -> int:
        return len(self._pages) * PAGE

    def load(self, offset: int, length: int) -> bytes:
        """Bytes past the end are zeroes."""
        pages = self._pages
        found = bytearray(length)
        first, last = offset // PAGE, (offset + length - 1) // PAGE
        numbers = range(first, last + 1)
        for number in numbers if len(numbers) <= len(pages) else [n for n in pages if first <= n <= last]:
            page = pages.get(number)
            if page is None:
                continue
            at = number * PAGE - offset
            start, stop = max(0, at), min(length, at + PAGE)
            found[start:stop] = page[start - at : stop - at]
        return bytes(found)

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        at = 0
        while at < len(data):
            number, skip = divmod(offset + at, PAGE)
            piece = data[at : at + PAGE - skip]
            page = self._pages.get(number)
            if page is None:
                if not any(piece):
                    at += len(piece)
                    continue
                if len(self._pages) * PAGE >= self._limit:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                page = self._pages[number] = bytearray(PAGE)
            page[skip : skip + len(piece)] = piece
            at += len(piece)
        self.size = max(self.size, offset + len(data))

    def clear(self, offset: int, length: int) -> None:
        end = offset + length
        for number in [n for n in self._pages if n * PAGE < end and (n + 1) * PAGE > offset]:
            start, stop = max(offset - number * PAGE, 0), min(end - number * PAGE, PAGE)
            if stop - start == PAGE:
                del self._pages[number]
            else:
                self._pages[number][start:stop] = bytes(stop - start)


class SparseFile(Unlocked):
    """A HostFile: one descriptor on a content that others may have open, too.

    ``cached``: everything is in the page cache.
    """

    def __init__(self, content: Content, path: str, *, writable: bool, cached: bool = True) -> None:
        self.path = path
        self.writable = writable
        self.closed = False
        self._content = content
        self._cached = cached

    @property
    def size(self) -> int:
        return self._content.size

    @property
    def identity(self) -> tuple[int, int]:
        return (0, id(self._content))

    async def _change(self, offset: int, length: int) -> None:
        assert not self.closed and offset >= 0 and length >= 0
        await asyncio.sleep(0)
        if not self.writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if offset + length > MAX_SIZE:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self._content.changes += 1

    # -- BlockFile

    async def pread(self, offset: int, length: int) -> bytes:
        assert not self.closed and offset >= 0 and length >= 0
        await asyncio.sleep(0)
        return self._content.load(offset, length)

    def try_pread_into(self, view: memoryview, offset: int) -> bool:
        assert not self.closed and offset >= 0
        if self._cached:
            view[:] = self._content.load(offset, len(view))
        return self._cached

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        await self._change(offset, len(data))
        self._content.store(offset, data)

    def try_pwrite(self, offset: int, data: memoryview) -> bool:
        if not self._cached or offset + len(data) > MAX_SIZE or not self.writable:
            return False
        assert not self.closed and offset >= 0
        self._content.changes += 1
        self._content.store(offset, data)
        return True

    async def zero(self, offset: int, length: int, *, punch: bool, fallback: bool = True) -> None:
        await self._change(offset, length)
        self._content.clear(offset, length)
        self._content.size = max(self.size, offset + length)

    async def discard(self, offset: int, length: int) -> None:
        await self._change(offset, length)
        self._content.clear(offset, length)

    async def truncate(self, size: int) -> None:
        await self._change(size, 0)
        self._content.clear(size, max(0, self.size - size))
        self._content.size = size

    async def sync(self) -> None:
        assert not self.closed
        await asyncio.sleep(0)

    def allocated(self) -> int:
        return self._content.allocated()

    def close(self) -> None:
        self.closed = True
