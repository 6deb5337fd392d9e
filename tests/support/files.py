"""What the files of tests have in common: those in memory, and those around another file."""

from __future__ import annotations

import os

from nbdbm.image.blockfile import HostFile
from nbdbm.image.ring import Told


class InMemory:
    """The part of a BlockFile that follows from the rest where there is no host."""

    size: int

    async def pread(self, offset: int, length: int) -> bytes:
        raise NotImplementedError

    async def pread_into(self, view: memoryview, offset: int, *, hot: bool = True) -> None:
        view[:] = await self.pread(offset, len(view))

    def cached_fd(self, offset: int, length: int) -> int:
        return -1

    def bring(self, offset: int, length: int, told: Told, about: object) -> bool:
        return False

    async def data_runs(self, offset: int, length: int, limit: int) -> list[tuple[bool, int]]:
        """As of a host that cannot tell: all is data up to the end of the file."""
        assert length > 0 and limit > 0
        data = max(0, min(length, self.size - offset))
        runs = [(True, data), (False, length - data)]
        return [run for run in runs if run[1]][:limit]


class Unlocked(InMemory):
    """What a HostFile has beyond a BlockFile, for files that nobody else can see."""

    path: str
    writable: bool

    @property
    def identity(self) -> tuple[int, int]:
        return (0, id(self))

    def real_path(self) -> str:
        return os.path.realpath(self.path)

    def lock(self, *, writable: bool, force_share: bool) -> str | None:
        return None

    def reopen(self, *, writable: bool) -> None:
        self.writable = writable


class Around:
    """``inner``, unchanged where nothing is read, written or waited for."""

    def __init__(self, inner: HostFile) -> None:
        self.inner = inner
        self.path = inner.path

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def writable(self) -> bool:
        return self.inner.writable

    @property
    def identity(self) -> tuple[int, int]:
        return self.inner.identity

    def real_path(self) -> str:
        return self.inner.real_path()

    def lock(self, *, writable: bool, force_share: bool) -> str | None:
        return self.inner.lock(writable=writable, force_share=force_share)

    def reopen(self, *, writable: bool) -> None:
        self.inner.reopen(writable=writable)

    def cached_fd(self, offset: int, length: int) -> int:
        return -1

    def bring(self, offset: int, length: int, told: Told, about: object) -> bool:
        return False

    async def data_runs(self, offset: int, length: int, limit: int) -> list[tuple[bool, int]]:
        return await self.inner.data_runs(offset, length, limit)

    def allocated(self) -> int:
        return self.inner.allocated()

    def close(self) -> None:
        self.inner.close()
