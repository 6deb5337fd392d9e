"""The way down for reads: a range of the disk to pieces of files, through all layers.

A read is planned first and carried out then::

    disk range  |----------------------------------------------|
    layer 0     |data A|  unallocated     |zero |data B |packed|    its map
    layer 1            |data C | unalloc. |                         asked for the gaps only
    layer 2                    |past its end: zero

    pieces: A, B from layer 0's file, C from layer 1's; two zero parts; one cluster to decompress
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, NamedTuple

from nbdbm.image.backing import Layer
from nbdbm.image.blockfile import BlockFile, fill_zeroes
from nbdbm.image.clusters import ClusterMap
from nbdbm.image.ring import Told
from nbdbm.image.unpack import Packed, Unpacker
from nbdbm.metrics import CacheFigures
from nbdbm.qcow2.mapping import ABSENT, BLANK, Kind

PARALLEL = 16
"""Pieces of one request that wait for the disk at the same time."""

NOWAIT_BATCH = 64
"""Pieces read from the page cache before other requests get their turn."""

MIN_HOLE = 4096
"""Bytes; zeroes between data that are not worth a chunk of their own on the wire."""

SPARSE_RAW = 64 * 1024
"""Bytes; raw images are asked for holes only by reads of at least this."""

RAW_RUNS = 64
"""Holes and data parts of a raw image looked at per read; what follows is read as data."""

LATER, FILLED, ZEROES = range(3)
"""What ``Reader.try_read`` has done: nothing, so that it takes the general way; the view is filled; or the
view is left as it was, and zeroes are what it should hold."""


class Piece(NamedTuple):
    """``length`` bytes of ``file`` at ``host`` that belong at ``at`` in the reader's view."""

    file: BlockFile
    host: int
    at: int
    length: int


class Plan:
    """What one read takes."""

    __slots__ = ("packed", "pieces", "zeroes")

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.packed: list[Packed] = []
        self.zeroes: list[tuple[int, int]] = []
        """(at, length), not necessarily ascending."""


class Reader:
    """Reads the disk that a chain of layers makes up."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._unpacker = Unpacker()

    async def close(self) -> None:
        """Wait for what is still loading."""
        await self._unpacker.close()

    def figures(self) -> CacheFigures:
        """Of the cache of decompressed clusters."""
        return self._unpacker.figures()

    # -- the short way -------------------------------------------------------------------------

    def try_read(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` at once if the range is one piece (or nothing at all), its table cached, and its
        data in the page cache. Returns FILLED, ZEROES, or LATER with anything in ``view``."""
        length = len(view)
        for layer in self._layers:
            if offset + length > layer.size:
                return LATER
            clusters = layer.map
            if clusters is None:
                if layer.sparse and length >= SPARSE_RAW:
                    return LATER  # its holes are worth a look
                return layer.file.try_pread_into(view, offset)
            host = clusters.locate(offset, length)
            if host >= 0:
                return clusters.data.try_pread_into(view, host)
            if host != ABSENT:
                return ZEROES if host == BLANK else LATER
        return ZEROES

    def try_read_into(self, view: memoryview, offset: int) -> bool:
        """``try_read`` with the zeroes filled in; whether ``view`` is filled now."""
        done = self.try_read(view, offset)
        if done == ZEROES:
            fill_zeroes(view)
        return done != LATER

    def try_send(self, offset: int, length: int) -> tuple[int, int] | None:
        """The range as (descriptor, place in its file) if it is data in one piece, its table cached, and all
        of it in the page cache."""
        piece = self._one_piece(offset, length)
        if piece is None:
            return None
        fd = piece.file.cached_fd(piece.host, length)
        return None if fd < 0 else (fd, piece.host)

    def bring(self, offset: int, length: int, told: Told, about: object) -> bool:
        """Have the range in the page cache soon, so that ``try_read`` fills a view of it, and ``told`` called
        then, see BlockFile. False where that would not be enough, or cannot be done."""
        for layer in self._layers:
            if offset + length > layer.size:
                return False
            clusters = layer.map
            if clusters is None:
                if layer.sparse and length >= SPARSE_RAW:
                    return False
                return layer.file.bring(offset, length, told, about)
            host = clusters.locate(offset, length)
            if host >= 0:
                return clusters.data.bring(host, length, told, about)
            if host != ABSENT:
                return False
        return False

    def _one_piece(self, offset: int, length: int) -> Piece | None:
        """The range's only piece, if it is all data in one piece of a qcow2 layer and its table is cached."""
        for layer in self._layers:
            if layer.map is None or offset + length > layer.size:
                return None
            host = layer.map.locate(offset, length)
            if host >= 0:
                return Piece(layer.map.data, host, 0, length)
            if host != ABSENT:
                return None
        return None

    # -- the general way -----------------------------------------------------------------------

    async def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset``."""
        if not len(view) or self.try_read_into(view, offset):
            return
        plan = await self._plan(offset, len(view), sparse=False)
        for at, length in plan.zeroes:
            fill_zeroes(view[at : at + length])
        await self._carry_out(plan, view)

    async def read_sparse(self, view: memoryview, offset: int) -> list[tuple[int, bool]]:
        """Fill the parts of ``view`` that may hold data; return (length, is data) for all of it."""
        total = len(view)
        if not total:
            return []
        done = self.try_read(view, offset)
        if done != LATER:
            return [(total, done == FILLED)]
        if (piece := self._one_piece(offset, total)) is not None:
            # The common miss of the page cache, at a third of the cost.
            await piece.file.pread_into(view, piece.host, hot=False)
            return [(total, True)]
        plan = await self._plan(offset, total, sparse=True)
        holes = _merge(plan.zeroes)
        parts: list[tuple[int, bool]] = []
        end = 0
        for at, length in holes:
            if length < MIN_HOLE and length < total:
                fill_zeroes(view[at : at + length])
                continue
            if at > end:
                parts.append((at - end, True))
            parts.append((length, False))
            end = at + length
        if end < total:
            parts.append((total - end, True))
        await self._carry_out(plan, view)
        return parts

    async def _plan(self, offset: int, length: int, *, sparse: bool) -> Plan:
        """Find the pieces. What a layer leaves unallocated is looked for in the next one down."""
        plan = Plan()
        gaps = [(offset, length)]
        for layer in self._layers:
            if not gaps:
                break
            below: list[tuple[int, int]] = []
            for start, size in gaps:
                inside = min(size, layer.size - start)
                if inside < size:
                    # A layer shorter than those above reads as zeroes past its end.
                    cut = max(start, layer.size)
                    plan.zeroes.append((cut - offset, start + size - cut))
                if inside <= 0:
                    continue
                if layer.map is None:
                    await _plan_raw(plan, layer, start, inside, offset, sparse)
                else:
                    await _plan_qcow2(plan, layer, layer.map, start, inside, offset, below)
            gaps = below
        plan.zeroes += [(start - offset, size) for start, size in gaps]
        return plan

    async def _carry_out(self, plan: Plan, view: memoryview) -> None:
        """Read and decompress all pieces into their places."""
        waiting: list[Coroutine[Any, Any, None]] = []
        left: list[Piece] = []
        for count, piece in enumerate(plan.pieces, 1):
            if not piece.file.try_pread_into(view[piece.at : piece.at + piece.length], piece.host):
                left.append(piece)
            if not count % NOWAIT_BATCH:
                await asyncio.sleep(0)
        if left:
            work = iter(left)
            waiting += [_read_pieces(work, view) for _ in range(min(PARALLEL, len(left)))]
        if plan.packed:
            waiting.append(self._unpacker.fill(plan.packed, view))
        if len(waiting) == 1:
            await waiting[0]
        elif waiting:
            # All of them have ended when this returns or raises: nobody writes into the view any more.
            for result in await asyncio.gather(*waiting, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result


async def _plan_raw(plan: Plan, layer: Layer, start: int, length: int, offset: int, sparse: bool) -> None:
    """Pieces of a raw layer: one, or around its holes if the reader cares."""
    if sparse and layer.sparse and length >= SPARSE_RAW:
        for data, part in await layer.file.data_runs(start, length, RAW_RUNS):
            if data:
                plan.pieces.append(Piece(layer.file, start, start - offset, part))
            else:
                plan.zeroes.append((start - offset, part))
            start += part
            length -= part
    if length:
        plan.pieces.append(Piece(layer.file, start, start - offset, length))


async def _plan_qcow2(
    plan: Plan,
    layer: Layer,
    clusters: ClusterMap,
    start: int,
    length: int,
    offset: int,
    below: list[tuple[int, int]],
) -> None:
    """Pieces of a qcow2 layer; unallocated ranges go to ``below``, neighbours merged."""
    mask = clusters.geometry.cluster_mask
    for kind, part, host in await clusters.map(start, length):
        if kind is Kind.DATA:
            plan.pieces.append(Piece(clusters.data, host, start - offset, part))
        elif kind is Kind.UNALLOCATED:
            if below and sum(below[-1]) == start:
                below[-1] = (below[-1][0], below[-1][1] + part)
            else:
                below.append((start, part))
        elif kind is Kind.COMPRESSED:
            within = start & mask
            plan.packed.append(Packed(layer, host, start - within, within, start - offset, part))
        else:
            plan.zeroes.append((start - offset, part))
        start += part


async def _read_pieces(work: Iterable[Piece], view: memoryview) -> None:
    """Read one piece after the other; several of these share one iterator."""
    for file, host, at, length in work:
        await file.pread_into(view[at : at + length], host, hot=False)


def _merge(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans in ascending order, neighbours joined."""
    merged: list[tuple[int, int]] = []
    for at, length in sorted(spans):
        if merged and sum(merged[-1]) == at:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((at, length))
    return merged
