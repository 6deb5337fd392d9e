"""Block status: which parts of the disk are data, zero, or allocated in which layer.

The answers are QEMU's (``bdrv_block_status_above``, ``bdrv_is_allocated_above``):

    qcow2 data, compressed      data            depth of the layer
    qcow2 zero clusters         hole, zero      depth of the layer
    qcow2 unallocated           asked of the layer below; at the bottom: hole, zero, depth 0
    past a backing file's end   hole, zero      depth of that backing file
    raw data / hole             data / hole, zero    depth of the layer

In an image with preallocated metadata, data clusters that are holes in the file read as zero. Looking
into the file for every cluster is slow, so, like QEMU, it is done only where such an image is likely.
"""

from __future__ import annotations

import asyncio
import functools
import re
import sys
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from nbdbm.errors import CorruptError
from nbdbm.extents import ExtentList
from nbdbm.image.backing import Layer
from nbdbm.image.blockfile import BlockFile
from nbdbm.image.cache import Table
from nbdbm.image.clusters import ClusterMap
from nbdbm.qcow2.constants import REFTABLE_OFFSET_MASK
from nbdbm.qcow2.mapping import Kind, count_used
from nbdbm.runs import byte_runs

STEP_SLICES = 4
"""L2 slices of one layer walked before the layers below are asked about the gaps: a bound on what is
thrown away when the work allowed per call ends in between."""

CALL_SLICES = 64
"""L2 slices walked per call."""

CALL_RUNS = 64 * 1024
"""Runs returned per call, about."""

FILE_RUNS = 4096
"""Holes and data parts of a file looked at per step."""

LOOK_AHEAD = 1024 * 1024 * 1024
"""Bytes of a raw layer looked at together."""

MAX_BLOCKS = 16384
"""Refcount blocks read to detect preallocation: a file of 32 TiB with 64 KiB clusters. A larger one is
taken for an ordinary image."""

UNALLOCATED, ZERO, DATA, DATA_ZERO = range(4)
"""States of a range in one layer; DATA_ZERO: a data cluster that is a hole in the file."""

KIND_RUNS = re.compile(rb"U+|[ZA]+|[DC]+|M+|X+")
STATES = {ord("U"): UNALLOCATED, ord("Z"): ZERO, ord("A"): ZERO, ord("D"): DATA, ord("C"): DATA}
KIND_STATES = {
    Kind.UNALLOCATED: UNALLOCATED,
    Kind.ZERO: ZERO,
    Kind.ZERO_ALLOCATED: ZERO,
    Kind.DATA: DATA,
    Kind.COMPRESSED: DATA,
}


class Run(NamedTuple):
    """``length`` bytes of the disk that are alike."""

    length: int
    data: bool
    """Backed by data (base:allocation: no hole)."""
    zero: bool
    """Reads as zeroes."""
    depth: int
    """0 unallocated in every layer, 1 allocated in the active layer, n in the n-th layer down."""


Column = tuple[ExtentList, tuple[int, int, int]]
"""A list to be filled, and the flags for UNALLOCATED, ZERO and DATA, of which two at most differ."""

Verdict = tuple[bool, bool, int]
"""A Run but for its length."""


class StatusWalker:
    """Walks the disk that a chain of layers makes up."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._preallocated: list[asyncio.Task[bool] | None] = [None] * len(layers)

    async def close(self) -> None:
        """Wait for what is still looking at files."""
        await asyncio.gather(*(task for task in self._preallocated if task), return_exceptions=True)

    async def status(self, offset: int, length: int) -> list[Run]:
        """Describe a non-empty prefix of the range.

        Raises:
            CorruptError, OSError: the first byte of the range cannot be judged.
        """
        assert length > 0
        layers = self._layers
        collected = _Runs()
        cursors: dict[int, _FileCursor] = {}
        # Ranges still to be judged, the leftmost last: (layer, offset, length), or with a layer of -1
        # (-1, state and depth, length).
        todo = [(0, offset, length)]
        budget = CALL_SLICES
        while todo:
            place, at, size = todo.pop()
            if place < 0:
                collected.add(size, _verdicts(at >> 2)[at & 3])
                continue
            if (budget <= 0 or len(collected.runs) >= CALL_RUNS) and collected:
                break
            layer = layers[place]
            if at >= layer.size:
                # Zeroes past a short layer's end count as its own.
                collected.add(size, _verdicts(place + 1)[ZERO])
                continue
            inside = min(size, layer.size - at)
            try:
                states, slices = await self._layer_states(place, layer, at, inside, cursors)
            except (CorruptError, OSError):
                if collected:
                    break  # the next call begins here, and raises
                raise
            budget -= slices
            await asyncio.sleep(0)  # lets other requests in between
            covered = sum(length for length, _ in states)
            if covered < size:
                todo.append((place, at + covered, size - covered))
            last = place + 1 == len(layers)
            if last or all(state for _, state in states):
                verdicts = _verdicts(place + 1)
                for part, state in states:
                    collected.add(part, verdicts[state])
                continue
            end = at + covered
            for part, state in reversed(states):
                end -= part
                if state == UNALLOCATED:
                    todo.append((place + 1, end, part))
                else:
                    todo.append((-1, state | (place + 1) << 2, part))
        return collected.finish()

    async def fill(self, offset: int, length: int, columns: Sequence[Column]) -> int:
        """Describe the range in several lists at once, from ``offset``, as long as the short way knows how.

        That is a qcow2 image alone, with whole clusters of a kind. Stops where all lists are full, and
        returns how far it came; ``status`` knows the rest (which may be everything) or raises.
        """
        (layer, *below) = self._layers
        if below or layer.map is None or offset + length > layer.size:
            return offset
        end = offset + length
        bits = layer.map.geometry.cluster_bits
        steps = 0
        while offset < end and not all(extents.full for extents, _ in columns):
            try:
                covered, kinds, base = await layer.map.kinds(offset, end - offset)
            except (CorruptError, OSError):
                break
            if kinds is None:
                for extents, flags in columns:
                    extents.add(covered, flags[UNALLOCATED])
                offset += covered
                continue
            if b"M" in kinds or b"X" in kinds:
                break
            if (b"D" in kinds or b"C" in kinds) and await self._is_preallocated(0, layer):
                break
            last = (offset + covered - 1 - base) >> bits
            for extents, flags in columns:
                if not extents.full:
                    _add_clusters(extents, kinds.translate(_flags_by_kind(flags)), bits, base, last)
            offset += covered
            steps += 1
            if steps % CALL_SLICES == 0:
                await asyncio.sleep(0)
        return offset

    async def _layer_states(
        self, place: int, layer: Layer, offset: int, length: int, cursors: dict[int, _FileCursor]
    ) -> tuple[list[tuple[int, int]], int]:
        """(length, state) of a non-empty prefix of the range in this layer alone, and the work it took."""
        if layer.map is None:
            cursor = cursors.get(place)
            if cursor is None:
                cursor = cursors[place] = _FileCursor(layer.file, layer.size)
            return await cursor.states(offset, length)
        states: list[tuple[int, int]] = []
        start = offset
        slices = 0
        while length and slices < STEP_SLICES:
            covered, table = await layer.map.slice_kinds(offset, length)
            slices += 1
            if table is None:
                states.append((covered, UNALLOCATED))
                told = covered
            else:
                told = _slice_states(states, layer.map, table, offset, covered)
            offset += told
            length -= told
            if told < covered:
                break  # the next entry is invalid: the next call raises
        if any(state == DATA for _, state in states) and await self._is_preallocated(place, layer):
            return await _look_into_file(layer.map, states, start), slices + STEP_SLICES
        return states, slices

    async def _is_preallocated(self, place: int, layer: Layer) -> bool:
        """Whether the layer likely has preallocated metadata; found out once, on first need."""
        task = self._preallocated[place]
        if task is None:
            task = asyncio.ensure_future(_detect_preallocation(layer))
            self._preallocated[place] = task
        return await asyncio.shield(task)


def _add_clusters(extents: ExtentList, flags: bytes, bits: int, base: int, last: int) -> None:
    """Describe the clusters from where ``extents`` is up to number ``last``.

    There is a byte of ``flags`` for each cluster from the one that begins at ``base`` on.
    """
    first = (extents.position - base) >> bits
    while first <= last and not extents.full:
        # One more than there is room for: the first may belong to the last of those before.
        room = extents.limit - len(extents) + 1
        pairs, stop = byte_runs(flags, first, last + 1, bits, room)
        extents.add_packed(pairs, base + (first << bits), base + (stop << bits))
        first = stop


@functools.cache
def _flags_by_kind(flags: tuple[int, int, int]) -> bytes:
    """A translation table from letters of EntryKind to flags."""
    table = bytearray(256)
    for letter, state in STATES.items():
        table[letter] = flags[state]
    return bytes(table)


class _Runs:
    """Runs under construction, neighbours merged."""

    __slots__ = ("_length", "_verdict", "runs")

    def __init__(self) -> None:
        self.runs: list[Run] = []
        """Complete ones; the last is still growing."""
        self._length = 0
        self._verdict: Verdict = (False, False, -1)

    def __bool__(self) -> bool:
        return self._length > 0

    def add(self, length: int, verdict: Verdict) -> None:
        """Describe the next ``length`` bytes."""
        if verdict == self._verdict:
            self._length += length
            return
        if self._length:
            self.runs.append(Run(self._length, *self._verdict))
        self._length, self._verdict = length, verdict

    def finish(self) -> list[Run]:
        """All runs."""
        if self._length:
            self.runs.append(Run(self._length, *self._verdict))
        return self.runs


class _FileCursor:
    """Holes and data of a raw layer during one call.

    The gaps of the layer above may be many and small: asking for the file's runs around each would take a
    thread's visit every time, so some are kept from one gap to the next.
    """

    __slots__ = ("_end", "_file", "_next", "_position", "_runs")

    def __init__(self, file: BlockFile, end: int) -> None:
        self._file = file
        self._end = end
        self._runs: list[tuple[bool, int]] = []
        self._next = 0
        """Index in ``_runs`` of the one that begins at ``_position``."""
        self._position = 0

    async def states(self, offset: int, length: int) -> tuple[list[tuple[int, int]], int]:
        """(length, state) of a non-empty prefix of the range; the work in units of slices."""
        work = 0
        if offset < self._position:
            self._next = len(self._runs)
        while self._next < len(self._runs) and self._position + self._runs[self._next][1] <= offset:
            self._position += self._runs[self._next][1]
            self._next += 1
        if self._next == len(self._runs):
            ahead = min(self._end - offset, max(length, LOOK_AHEAD))
            self._runs = await self._file.data_runs(offset, ahead, FILE_RUNS)
            self._next, self._position = 0, offset
            work = 1 + len(self._runs) // 64
        states: list[tuple[int, int]] = []
        end = offset + length
        at = self._position
        for data, part in self._runs[self._next :]:
            at += part
            if at > offset:
                states.append((min(at, end) - offset, DATA if data else ZERO))
                offset = at
            if at >= end:
                break
        return states, work


@functools.cache
def _verdicts(depth: int) -> tuple[Verdict, ...]:
    """By state: what a Run says of it in the layer at ``depth``."""
    return (False, True, 0), (False, True, depth), (True, False, depth), (True, True, depth)


def _slice_states(
    states: list[tuple[int, int]], clusters: ClusterMap, table: Table, offset: int, length: int
) -> int:
    """Append (length, state) of a range inside one slice; stop before an invalid entry.

    Returns:
        the bytes described.

    Raises:
        CorruptError: the very first entry is invalid and ``states`` was empty.
    """
    geometry = clusters.geometry
    bits = geometry.cluster_bits
    base = offset >> geometry.slice_shift << geometry.slice_shift
    end = offset + length
    start = offset
    assert table.kinds is not None
    first, last = (offset - base) >> bits, (end - base - 1) >> bits
    for match in KIND_RUNS.finditer(table.kinds, first, last + 1):
        after = min(base + (match.end() << bits), end)
        state = STATES.get(table.kinds[match.start()])
        if state is not None:
            states.append((after - offset, state))
        else:
            try:
                runs = clusters.runs_in(table, offset, after - offset)
            except CorruptError:
                if not states:
                    raise
                return offset - start
            states += [(run.length, KIND_STATES[run.kind]) for run in runs]
        offset = after
    return length


async def _look_into_file(
    clusters: ClusterMap, states: list[tuple[int, int]], offset: int
) -> list[tuple[int, int]]:
    """The states with data clusters that are holes of the file told from those that are not."""
    told: list[tuple[int, int]] = []
    for length, state in states:
        if state != DATA:
            told.append((length, state))
            offset += length
            continue
        try:
            runs = await clusters.map(offset, length)
        except CorruptError:
            # Reading will say so; as for the status, it is data.
            told.append((length, DATA))
            offset += length
            continue
        for kind, part, host in runs:
            if kind is not Kind.DATA:
                told.append((part, DATA))
                continue
            held = await clusters.data.data_runs(host, part, FILE_RUNS)
            told += [(piece, DATA if data else DATA_ZERO) for data, piece in held]
            if sum(piece for _, piece in held) < part:
                return told  # a prefix: the caller asks again
        offset += length
    return told


async def _detect_preallocation(layer: Layer) -> bool:
    """Whether far more clusters are in use than the host has allocated space for.

    QEMU's measure: a tenth more, and two at least.
    """
    header, file = layer.header, layer.file
    assert header is not None
    cluster_size = header.cluster_size
    allocated = file.allocated() // cluster_size
    threshold = max(allocated * 10 // 9, allocated + 2)
    clusters = -(-file.size // cluster_size)
    if clusters < threshold:
        return False
    per_block = cluster_size * 8 >> header.refcount_order
    blocks = min(-(-clusters // per_block), header.refcount_table_clusters * cluster_size // 8, MAX_BLOCKS)
    table = array("Q", await file.pread(header.refcount_table_offset, 8 * blocks))
    if sys.byteorder == "little":
        table.byteswap()
    used = 0
    for entry in table:
        offset = entry & REFTABLE_OFFSET_MASK
        if not offset:
            continue
        if offset % cluster_size:
            return False
        used += count_used(await file.pread(offset, cluster_size), header.refcount_order)
        if used >= threshold:
            return True
        await asyncio.sleep(0)
    return False
