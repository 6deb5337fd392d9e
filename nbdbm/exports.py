"""Exports: one name, one image each; the only module that speaks both the engine's and the wire's language.

Runs of an image become extents of a metadata context, read parts become data and hole chunks, and what
the image allows becomes transmission flags. Nothing here knows a socket.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING

from nbdbm.errors import BitmapError
from nbdbm.extents import ExtentList
from nbdbm.image.read import FILLED, LATER, ZEROES
from nbdbm.image.ring import CACHED, Told
from nbdbm.metrics import BitmapFigures, CacheFigures
from nbdbm.nbd.catalog import ExportInfo
from nbdbm.nbd.constants import (
    CONTEXT_ALLOCATION,
    CONTEXT_BITMAP,
    CONTEXT_DEPTH,
    AllocationFlag,
    TransmissionFlag,
)

if TYPE_CHECKING:
    from nbdbm.image.image import Image, Run

__all__ = ["CACHED", "FILLED", "LATER", "ZEROES", "Export"]

MAX_EXTENTS = 128 * 1024
"""Extents in one context's answer. QEMU's cap for bitmaps: an answer then stays near 1 MiB (2 MiB in the
64-bit form), so a client asking about a finely speckled disk can make us hold no more than that per context;
it asks again from where the answer ends."""

MAX_STATUS_STEPS = 4096
"""Calls of ``Image.status`` for one answer. One call looks at a bounded part of the disk, so a client asking
about 64 TiB in one request gets a truthful prefix soon instead of everything late."""

STEPS_PER_TURN = 32
"""Calls of ``Image.status`` between two turns of the event loop: tables in the page cache are read without
waiting, and a long walk must not keep other clients waiting either."""

MIN_HOLE = 4096
"""Zero parts of a read shorter than this travel as data, in bytes. Each chunk costs a header and a step of
the client's parser, and with 512-byte clusters a read of 32 MiB could otherwise become 65536 chunks."""

MAX_PREFETCH = 64 * 1024 * 1024
"""Bytes that one CACHE request reads ahead; the command is a hint, and one of 2^64 - 1 bytes must end."""

PREFETCH_STEP = 1024 * 1024
"""Bytes per read of a prefetch."""

_prefetched = memoryview(mmap.mmap(-1, PREFETCH_STEP))
"""Where all of them go, at once if need be: nobody looks at it. With a buffer for each, a thousand pipelined
CACHE requests took half a gigabyte."""

LONG = 64 * 1024 * 1024
"""Bytes from which requests to zero or trim take turns on an image. One of 4 GiB takes a tenth of a second of
table entries: a thousand of them begun at once kept everybody else from being served for 5 s."""

MIN_PREFERRED_BLOCK = 4096
MAX_PREFERRED_BLOCK = 2 * 1024 * 1024
"""Bounds of the preferred block size told to clients, bytes: qcow2's largest cluster, and a page."""

READ_ONLY_FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.READ_ONLY
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.CAN_MULTI_CONN
)
"""What ``qemu-nbd -r`` advertises. FLUSH and FUA have nothing to do and so are kept trivially, but clients
that require them would otherwise refuse; nothing is written, so connections cannot disagree."""

WRITABLE_FLAGS = (
    (READ_ONLY_FLAGS & ~TransmissionFlag.READ_ONLY)
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
)
"""All connections share one image, and a flush makes durable what was finished on any of them, so several
connections may write (CAN_MULTI_CONN)."""

_HOLE = int(AllocationFlag.HOLE)
_ZERO = int(AllocationFlag.ZERO)
_ALLOCATION_COLUMN = (_HOLE | _ZERO, _HOLE | _ZERO, 0)
_DEPTH_COLUMN = (0, 1, 1)
"""Flags of what is unallocated, zero and data in an image without others under it."""


class Export:
    """One image under one name.

    Ranges given to its methods lie inside the disk: the protocol core has checked them. Failures are
    NbdbmError or OSError, with an errno.
    """

    def __init__(self, info: ExportInfo, image: Image) -> None:
        self.info = info
        self._image = image
        self._long = asyncio.Lock()

    @classmethod
    def of(
        cls,
        image: Image,
        *,
        name: str = "",
        description: str = "",
        bitmaps: Sequence[str] | None = None,
        allocation_depth: bool = True,
    ) -> Export:
        """Export ``image`` under ``name``, with ``bitmaps`` only or (None) with every usable one.

        Raises BitmapError for a bitmap that does not exist or cannot be used.
        """
        contexts = [CONTEXT_ALLOCATION]
        if allocation_depth:
            contexts.append(CONTEXT_DEPTH)
        contexts += [CONTEXT_BITMAP + bitmap for bitmap in _bitmap_names(image, bitmaps)]
        return cls(
            ExportInfo(
                name=name,
                size=image.size,
                flags=READ_ONLY_FLAGS if image.read_only else WRITABLE_FLAGS,
                description=description,
                preferred_block=min(max(image.cluster_size, MIN_PREFERRED_BLOCK), MAX_PREFERRED_BLOCK),
                contexts=tuple(contexts),
            ),
            image,
        )

    @property
    def read_only(self) -> bool:
        """Whether clients may only read."""
        return bool(self.info.flags & TransmissionFlag.READ_ONLY)

    @property
    def bitmaps(self) -> Sequence[BitmapFigures]:
        """Every bitmap of the image as it is now, those that are not served too; nothing is loaded for it."""
        return self._image.bitmaps

    @property
    def caches(self) -> Sequence[CacheFigures]:
        """The image's caches, since it was opened."""
        return self._image.caches

    @property
    def try_read(self) -> Callable[[memoryview, int], int]:
        """``Image.try_read``: (view, offset) -> what was done with it."""
        return self._image.try_read

    @property
    def bring(self) -> Callable[[int, int, Told, object], bool]:
        """``Image.bring``: (offset, length, told, about) -> whether ``told(about, what)`` is called."""
        return self._image.bring

    @property
    def try_send(self) -> Callable[[int, int], tuple[int, int] | None] | None:
        """``Image.try_send``: (offset, length) -> (descriptor, place); None: nothing is sent so."""
        return self._image.try_send if self.read_only else None

    @property
    def try_write(self) -> Callable[[int, memoryview], bool]:
        """Write now if that needs no waiting; False: nothing was done that ``write`` does not do again."""
        return self._image.try_write

    async def read(
        self, view: memoryview, offset: int, *, sparse: bool
    ) -> Sequence[tuple[int, memoryview | None]]:
        """Read ``len(view)`` bytes at ``offset``; return consecutive (length, data), data None for zeroes.

        The data are parts of ``view``; what ``view`` holds at a None is undefined. Unless ``sparse``,
        there is exactly one part and it is the whole.
        """
        if not sparse:
            await self._image.read_into(view, offset)
            return ((len(view), view),)
        parts = await self._image.read_sparse(view, offset)
        if len(parts) == 1:
            length, is_data = parts[0]
            return ((length, view if is_data else None),)
        return _chunks(view, parts)

    async def block_status(
        self,
        contexts: Sequence[tuple[int, str]],
        offset: int,
        length: int,
        *,
        req_one: bool = False,
        limit: int = MAX_EXTENTS,
    ) -> list[tuple[int, ExtentList]]:
        """Describe the range, or a non-empty prefix of it, in each of ``contexts`` (id, name).

        The answers are in the order of ``contexts``, never reach past the range, and have at most
        ``limit`` extents each, one with ``req_one``.
        """
        limit = 1 if req_one else min(limit, MAX_EXTENTS)
        answers: list[tuple[int, ExtentList]] = []
        allocation: ExtentList | None = None
        depth: ExtentList | None = None
        for ident, name in contexts:
            extents = ExtentList(offset, length, limit)
            answers.append((ident, extents))
            if name == CONTEXT_ALLOCATION:
                allocation = extents
            elif name == CONTEXT_DEPTH:
                depth = extents
            else:
                bits = await self._image.bits(name.removeprefix(CONTEXT_BITMAP))
                bits.extents(extents)
        if allocation is not None or depth is not None:
            await self._walk(allocation, depth, offset, length)
        return answers

    async def _walk(
        self, allocation: ExtentList | None, depth: ExtentList | None, offset: int, length: int
    ) -> None:
        """Fill the lists from the image's runs, one walk for both, until each is full or work is bounded."""
        end = offset + length
        columns = []
        if allocation is not None:
            columns.append((allocation, _ALLOCATION_COLUMN))
        if depth is not None:
            columns.append((depth, _DEPTH_COLUMN))
        position = await self._image.fill_status(offset, length, columns)
        if position >= end or all(extents.full for extents, _ in columns):
            return
        for step in range(1, MAX_STATUS_STEPS + 1):
            runs = await self._image.status(position, end - position)
            for run in runs:
                if allocation is not None:
                    allocation.add(run.length, _allocation_flags(run))
                if depth is not None:
                    depth.add(run.length, run.depth)
                position += run.length
            wanted = (allocation is not None and not allocation.full) or (
                depth is not None and not depth.full
            )
            if not wanted or position >= end:
                return
            if step % STEPS_PER_TURN == 0:
                await asyncio.sleep(0)

    async def cache(self, offset: int, length: int) -> None:
        """Read the range's data once so that the host has it in memory; a hint, bounded."""
        length = min(length, MAX_PREFETCH)
        position, end = offset, offset + length
        while position < end:
            step = min(end - position, PREFETCH_STEP)
            await self._image.read_sparse(_prefetched[:step], position)
            position += step
            await asyncio.sleep(0)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Write all of ``data``; durable on return with ``fua``."""
        await self._image.write(offset, data, fua=fua)

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool, fast: bool, fua: bool) -> None:
        """Make the range read as zeroes; ENOTSUP where ``fast`` was asked for and it would not be."""
        async with self._turn(length):
            await self._image.write_zeroes(offset, length, no_hole=no_hole, fast=fast, fua=fua)

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """Forget the range's content, where that gives space back."""
        async with self._turn(length):
            await self._image.trim(offset, length, fua=fua)

    def _turn(self, length: int) -> AbstractAsyncContextManager[None]:
        """To be held while ``length`` bytes are zeroed or trimmed."""
        return self._long if length >= LONG else nullcontext()

    async def flush(self) -> None:
        """Return once everything written before is on stable storage."""
        await self._image.flush()

    async def close(self) -> None:
        """Close the image; idempotent."""
        await self._image.close()


def _bitmap_names(image: Image, wanted: Sequence[str] | None) -> list[str]:
    tracker = image.tracker
    usable = [bitmap.name for bitmap in tracker.usable()]
    if wanted is None:
        return usable
    refused = {bitmap.name: bitmap.refusal for bitmap in tracker.refused()}
    names: list[str] = []
    for name in wanted:
        if name in refused:
            raise BitmapError(name, f"cannot be served: {refused[name]}")
        if name not in usable:
            raise BitmapError(name, "there is no such bitmap in the image")
        if name not in names:
            names.append(name)
    return names


def _allocation_flags(run: Run) -> int:
    return (0 if run.data else _HOLE) | (_ZERO if run.zero else 0)


def _chunks(view: memoryview, parts: Sequence[tuple[int, bool]]) -> list[tuple[int, memoryview | None]]:
    """Turn read parts into chunks, short zero parts joined to the data beside them.

    parts   data | zero 512 | data | zero 64 KiB | data
    chunks  data .................. | None        | data
    """
    chunks: list[tuple[int, memoryview | None]] = []
    position = start = 0  # view[start:position] is data not yet in a chunk
    for length, is_data in parts:
        if not is_data:
            if length < MIN_HOLE:
                view[position : position + length] = bytes(length)
            else:
                if position > start:
                    chunks.append((position - start, view[start:position]))
                chunks.append((length, None))
                start = position + length
        position += length
    if position > start:
        chunks.append((position - start, view[start:position]))
    return chunks
