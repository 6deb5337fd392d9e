"""An image in memory, standing in for the engine: it can be slow, fail, and count what is asked of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from nbdbm.errors import BitmapError
from nbdbm.image.image import Run
from nbdbm.image.read import FILLED, LATER, ZEROES
from nbdbm.metrics import BitmapFigures, CacheFigures

CLUSTER = 65536


class MemoryBits:
    """The dirty bits of a bitmap as a set of (offset, length)."""

    def __init__(self, dirty: Iterable[tuple[int, int]], size: int) -> None:
        self.dirty = sorted(dirty)
        self.size = size

    def extents(self, into: Any) -> None:
        position = into.offset
        for start, length in self.dirty:
            if start + length <= position:
                continue
            if start > position and not into.add(start - position, 0):
                return
            if not into.add(start + length - max(start, position), 1):
                return
            position = start + length
        into.add(self.size - position, 0)


class MemoryImage:
    """``content`` in clusters; those that are all zero are unallocated.

    ``gate``: reads wait for it. ``failures``: offset -> the exception that a read covering it raises.
    """

    bitmaps: Sequence[BitmapFigures] = ()
    caches: Sequence[CacheFigures] = ()

    def __init__(
        self,
        content: bytes,
        *,
        cluster_size: int = CLUSTER,
        bitmaps: dict[str, list[tuple[int, int]]] | None = None,
        refused: dict[str, str] | None = None,
        path: str = "memory.qcow2",
    ) -> None:
        self.content = content
        self.size = len(content)
        self.cluster_size = cluster_size
        self.path = path
        self.read_only = True
        self.notices: list[str] = []
        self.gate: asyncio.Event | None = None
        self.failures: dict[int, Exception] = {}
        self.status_runs: int | None = None
        """Runs per ``status`` call, or None for all."""
        self.status_calls = 0
        self.reads: list[tuple[int, int]] = []
        self.reading = 0
        self.flushes = 0
        self.closes = 0
        self._bits = {name: MemoryBits(dirty, self.size) for name, dirty in (bitmaps or {}).items()}
        usable = [SimpleNamespace(name=name, refusal=None) for name in self._bits]
        bad = [SimpleNamespace(name=name, refusal=why) for name, why in (refused or {}).items()]
        self.tracker = SimpleNamespace(usable=lambda: usable, refused=lambda: bad)

    def _is_data(self, cluster: int) -> bool:
        return any(self.content[cluster * self.cluster_size : (cluster + 1) * self.cluster_size])

    def _runs(self, offset: int, length: int) -> Iterable[tuple[int, bool]]:
        end = offset + length
        while offset < end:
            cluster = offset // self.cluster_size
            stop = min(end, (cluster + 1) * self.cluster_size)
            yield stop - offset, self._is_data(cluster)
            offset = stop

    async def _read(self, view: memoryview, offset: int) -> None:
        assert offset >= 0 and offset + len(view) <= self.size
        self.reads.append((offset, len(view)))
        self.reading += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
            for at, failure in self.failures.items():
                if offset <= at < offset + len(view):
                    raise failure
        finally:
            self.reading -= 1

    def try_send(self, offset: int, length: int) -> None:
        """It has no file."""

    def bring(self, offset: int, length: int, told: Any, about: object) -> bool:
        return False

    def try_read(self, view: memoryview, offset: int) -> int:
        if self.gate is not None or any(offset <= at < offset + len(view) for at in self.failures):
            return LATER
        kinds = {is_data for _, is_data in self._runs(offset, len(view))}
        if kinds == {True}:
            view[:] = self.content[offset : offset + len(view)]
            return FILLED
        return LATER if True in kinds else ZEROES

    def try_write(self, offset: int, data: memoryview) -> bool:
        return False

    async def read_into(self, view: memoryview, offset: int) -> None:
        await self._read(view, offset)
        view[:] = self.content[offset : offset + len(view)]

    async def read_sparse(self, view: memoryview, offset: int) -> list[tuple[int, bool]]:
        await self._read(view, offset)
        parts: list[tuple[int, bool]] = []
        position = 0
        for length, is_data in self._runs(offset, len(view)):
            part = view[position : position + length]
            # Not filled where zero: whoever relies on it shall see rubbish.
            part[:] = self.content[offset + position :][:length] if is_data else b"\xee" * length
            if parts and parts[-1][1] == is_data:
                parts[-1] = (parts[-1][0] + length, is_data)
            else:
                parts.append((length, is_data))
            position += length
        return parts

    async def status(self, offset: int, length: int) -> Sequence[Run]:
        assert length > 0 and offset + length <= self.size
        self.status_calls += 1
        runs: list[Run] = []
        for part, is_data in self._runs(offset, length):
            if runs and runs[-1].data == is_data:
                runs[-1] = runs[-1]._replace(length=runs[-1].length + part)
            elif len(runs) == self.status_runs:
                break
            else:
                runs.append(Run(part, is_data, not is_data, int(is_data)))
        return runs

    async def fill_status(self, offset: int, length: int, columns: Any) -> int:
        return offset

    async def bits(self, name: str) -> MemoryBits:
        if name not in self._bits:
            raise BitmapError(name, "no such bitmap")
        return self._bits[name]

    async def flush(self) -> None:
        self.flushes += 1

    async def close(self) -> None:
        self.closes += 1


class WritableImage(MemoryImage):
    """A MemoryImage that notes what changes it; ``failures`` hold for changes too. Never at once."""

    def __init__(self, content: bytes, **options: Any) -> None:
        super().__init__(content, **options)
        self.read_only = False
        self.changes: list[tuple[Any, ...]] = []

    def try_write(self, offset: int, data: memoryview) -> bool:
        return False

    async def _change(self, name: str, offset: int, length: int, data: bytes, *flags: str) -> None:
        assert offset >= 0 and offset + length <= self.size
        if self.gate is not None:
            await self.gate.wait()
        for at, failure in self.failures.items():
            if offset <= at < offset + length:
                raise failure
        self.changes.append((name, offset, length, *flags))
        self.content = self.content[:offset] + data + self.content[offset + length :]

    async def write(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        await self._change("write", offset, len(data), bytes(data), *["fua"] * fua)

    async def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool = False, fast: bool = False, fua: bool = False
    ) -> None:
        flags = ["no_hole"] * no_hole + ["fast"] * fast + ["fua"] * fua
        await self._change("zeroes", offset, length, bytes(length), *flags)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self._change("trim", offset, length, bytes(length), *["fua"] * fua)
