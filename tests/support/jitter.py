"""JitterFile: a HostFile whose calls take their time, and happen in pieces, in an order that a seed decides.

A real file answers most small calls at once, so that requests under way together hardly ever meet. Here
every call waits for a few turns of the event loop before, between and after its pieces.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from nbdbm.image.blockfile import HostFile, ThreadedFile
from tests.support.files import Around

SECTOR = 512


class JitterFile(Around):
    """``inner``, slowed down. ``patience`` is the most turns that a call waits at a time."""

    def __init__(self, inner: HostFile, rng: random.Random, *, patience: int = 4) -> None:
        super().__init__(inner)
        self._rng = rng
        self._patience = patience

    async def _wait(self) -> None:
        for _ in range(self._rng.randrange(self._patience + 1)):
            await asyncio.sleep(0)

    def _cut(self, offset: int, length: int) -> int:
        """Where to take a range in two: at the edge of a sector, since those are whole to everybody."""
        edge = offset + self._rng.randrange(length + 1)
        return max(0, edge - edge % SECTOR - offset)

    async def pread(self, offset: int, length: int) -> bytes:
        await self._wait()
        data = await self.inner.pread(offset, length)
        await self._wait()
        return data

    async def pread_into(self, view: memoryview, offset: int, *, hot: bool = True) -> None:
        await self._wait()
        cut = self._cut(offset, len(view))
        await self.inner.pread_into(view[:cut], offset)
        await self._wait()
        await self.inner.pread_into(view[cut:], offset + cut)
        await self._wait()

    def try_pread_into(self, view: memoryview, offset: int) -> bool:
        return self._rng.random() < 0.3 and self.inner.try_pread_into(view, offset)

    async def data_runs(self, offset: int, length: int, limit: int) -> list[tuple[bool, int]]:
        await self._wait()
        return await self.inner.data_runs(offset, length, limit)

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        await self._wait()
        view = memoryview(data)
        cut = self._cut(offset, len(view))
        pieces = [(0, cut), (cut, len(view))]
        if self._rng.random() < 0.5:
            pieces.reverse()
        for low, high in pieces:
            if low < high:
                await self.inner.pwrite(offset + low, view[low:high])
                await self._wait()

    def try_pwrite(self, offset: int, data: memoryview) -> bool:
        return self._rng.random() < 0.3 and self.inner.try_pwrite(offset, data)

    async def zero(self, offset: int, length: int, *, punch: bool, fallback: bool = True) -> None:
        await self._wait()
        await self.inner.zero(offset, length, punch=punch, fallback=fallback)
        await self._wait()

    async def discard(self, offset: int, length: int) -> None:
        await self._wait()
        await self.inner.discard(offset, length)
        await self._wait()

    async def truncate(self, size: int) -> None:
        await self._wait()
        await self.inner.truncate(size)

    async def sync(self) -> None:
        await self._wait()  # whether it reaches the disk is nothing that these tests could tell


def jittery(seed: int, *, patience: int = 4) -> Callable[[str, bool], HostFile]:
    """Opens host files as JitterFile, for ``Image.open``."""
    rng = random.Random(seed)

    def open_file(path: str, writable: bool) -> HostFile:
        return JitterFile(ThreadedFile.open(path, writable=writable), rng, patience=patience)

    return open_file
