"""FaultFile: a HostFile whose n-th operation fails, as a full or dying disk makes it fail."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise

from nbdbm.image.blockfile import HostFile
from tests.support.files import Around
from tests.support.powercut import SECTOR

CHANGING = frozenset({"pwrite", "zero", "discard", "truncate", "sync"})
EVERY = CHANGING | {"pread"}


@dataclass
class FaultPlan:
    """When to fail; one plan may serve several files, which are then counted together.

    Args:
        nth: which operation fails, counted from 0 among those of ``kinds``; None: none does, count only.
        kinds: which operations count: pread, pwrite, zero, discard, truncate, sync.
        errno: of the OSError.
        sticky: every later operation of ``kinds`` fails too, until ``heal``.
        short: a failing write or zero may leave some of its sectors behind.
    """

    nth: int | None = None
    kinds: Collection[str] = CHANGING
    errno: int = errno.EIO
    sticky: bool = False
    short: bool = True
    seed: int = 0
    seen: int = 0
    failed: list[str] = field(default_factory=list)
    """What was made to fail, for messages."""

    def __post_init__(self) -> None:
        assert set(self.kinds) <= EVERY
        self.rng = random.Random(self.seed)

    def heal(self) -> None:
        """From now on nothing fails."""
        self.nth = None

    def hits(self, kind: str) -> bool:
        """Count one operation; return whether it is to fail."""
        if kind not in self.kinds:
            return False
        number = self.seen
        self.seen += 1
        return self.nth is not None and (number >= self.nth if self.sticky else number == self.nth)

    def failure(self, path: str, kind: str, offset: int = 0, length: int = 0) -> OSError:
        """The error to raise."""
        self.failed.append(f"{kind} {path} @{offset:#x}+{length:#x}")
        return OSError(self.errno, os.strerror(self.errno), path)


class FaultFile(Around):
    """``inner``, with failures by ``plan``. A failed sync did not sync; a failed read read nothing."""

    def __init__(self, inner: HostFile, plan: FaultPlan) -> None:
        super().__init__(inner)
        self.plan = plan

    async def pread(self, offset: int, length: int) -> bytes:
        if self.plan.hits("pread"):
            raise self.plan.failure(self.path, "pread", offset, length)
        return await self.inner.pread(offset, length)

    async def pread_into(self, view: memoryview, offset: int, *, hot: bool = True) -> None:
        if self.plan.hits("pread"):
            raise self.plan.failure(self.path, "pread", offset, len(view))
        await self.inner.pread_into(view, offset)

    def try_pread_into(self, view: memoryview, offset: int) -> bool:
        # Where reads can fail everything goes the long way: this one has no way to report.
        return "pread" not in self.plan.kinds and self.inner.try_pread_into(view, offset)

    def _survivors(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Ranges (low, high) of a failed write that were written nevertheless."""
        if not self.plan.short:
            return []
        edges = [offset, *range(offset + SECTOR - offset % SECTOR, offset + length, SECTOR), offset + length]
        if self.plan.rng.random() < 0.5:  # a prefix, as of an ordinary short write
            keep = self.plan.rng.randrange(len(edges))
            return [(offset, edges[keep])] if keep else []
        return [(a, b) for a, b in pairwise(edges) if self.plan.rng.random() < 0.5]

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if self.plan.hits("pwrite"):
            for low, high in self._survivors(offset, len(data)):
                await self.inner.pwrite(low, memoryview(data)[low - offset : high - offset])
            raise self.plan.failure(self.path, "pwrite", offset, len(data))
        await self.inner.pwrite(offset, data)

    def try_pwrite(self, offset: int, data: memoryview) -> bool:
        # A write that may fail goes the long way, where its sectors are torn.
        return "pwrite" not in self.plan.kinds and self.inner.try_pwrite(offset, data)

    async def zero(self, offset: int, length: int, *, punch: bool, fallback: bool = True) -> None:
        if self.plan.hits("zero"):
            for low, high in self._survivors(offset, length):
                await self.inner.zero(low, high - low, punch=punch)
            raise self.plan.failure(self.path, "zero", offset, length)
        await self.inner.zero(offset, length, punch=punch, fallback=fallback)

    async def discard(self, offset: int, length: int) -> None:
        if self.plan.hits("discard"):
            raise self.plan.failure(self.path, "discard", offset, length)
        await self.inner.discard(offset, length)

    async def truncate(self, size: int) -> None:
        if self.plan.hits("truncate"):
            raise self.plan.failure(self.path, "truncate", size)
        await self.inner.truncate(size)

    async def sync(self) -> None:
        if self.plan.hits("sync"):
            raise self.plan.failure(self.path, "sync")
        await self.inner.sync()
