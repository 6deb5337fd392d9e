"""Compressed clusters, read and decompressed into a reader's view.

Neighbours on the disk mostly lie next to each other in the file too, so a batch of them takes few reads::

    guest   |  cluster 0   |  cluster 1   |  cluster 2   |     a batch: about 1 MiB
    file    ...|pack 1|pack 0|pack 2|......                    one read, into a buffer that is used again
    view    |  cluster 0   |  cluster 1   |  cluster 2   |     each copied there as soon as decompressed

What takes little processor time is decompressed at once, for a thread takes longer to be woken; the rest
in about as many threads as there are processors.
"""

from __future__ import annotations

import asyncio
import functools
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from nbdbm.errors import FormatError
from nbdbm.image.backing import Layer
from nbdbm.image.blockfile import BlockFile
from nbdbm.image.cache import ClusterCache
from nbdbm.image.clusters import ClusterMap
from nbdbm.image.threads import Pool, in_pool
from nbdbm.metrics import CacheFigures
from nbdbm.qcow2.compressed import CompressedDescriptor, Content

BATCH_BYTES = 1024 * 1024
"""Decompressed bytes of one batch, or one cluster if that is more."""

BATCH_CLUSTERS = 64
"""Clusters of one batch, however small they are."""

PARALLEL = 4
"""Batches of one request under way at the same time."""

NEAR = 4096
"""Bytes between two clusters' data that are read along rather than skipped by another read."""

INLINE_TIME = 200e-6
"""Seconds of processor time that a batch may take in the event loop's thread, where other requests wait.
One cluster of 64 KiB by zlib took a third longer in a thread, four of them an eighth less."""

FIRST_PACE = 1e-9
"""Seconds per decompressed byte, before anything has been measured: about what zlib takes."""

PACE_WEIGHT = 0.125
"""What one batch counts for in the pace that the next is judged by."""

KEPT = 8
"""Buffers for compressed data that the process keeps for the next batches."""


class Packed(NamedTuple):
    """``length`` bytes from ``within`` of a compressed cluster that belong at ``at``."""

    layer: Layer
    entry: int
    guest: int
    """Offset of the cluster on its layer's disk."""
    within: int
    at: int
    length: int


Put = Callable[[Packed, Content], None]
"""Called with each cluster's content, perhaps in a thread."""


class Unpacker:
    """Decompresses for one image, through its whole chain. Keeps clusters of which a part was read."""

    def __init__(self) -> None:
        self._clusters = ClusterCache()
        self._pace = FIRST_PACE
        """Seconds of processor time per decompressed byte, lately."""

    async def close(self) -> None:
        """Wait for what is still loading."""
        await self._clusters.close()

    def figures(self) -> CacheFigures:
        """What keeping clusters has been good for."""
        return self._clusters.figures("clusters")

    async def fill(self, packed: list[Packed], view: memoryview) -> None:
        """Fill the pieces' places in ``view``.

        Nothing writes into the view any more when this has returned or raised.

        Raises:
            CorruptError: a cluster cannot be decompressed, or its descriptor is damaged.
            OSError: reading failed.
        """
        batches = _batches(packed)
        if len(packed) <= BATCH_CLUSTERS and len(packed) * _cluster_size(packed[0]) <= BATCH_BYTES:
            await self._fill_batches(batches, view)
            return
        workers = [self._fill_batches(batches, view) for _ in range(PARALLEL)]
        for result in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _fill_batches(self, batches: Iterator[list[Packed]], view: memoryview) -> None:
        def put(piece: Packed, data: Content) -> None:
            view[piece.at : piece.at + piece.length] = data

        for number, batch in enumerate(batches):
            if number:
                await asyncio.sleep(0)  # others' turn
            size = _cluster_size(batch[0])
            whole = [piece for piece in batch if piece.length == size]
            if whole:
                await self._unpack(whole, put)
            for piece in batch:
                if piece.length != size:
                    data = await self._cluster(piece)
                    put(piece, data[piece.within : piece.within + piece.length])

    async def _cluster(self, piece: Packed) -> bytes:
        """The whole cluster of a piece, kept: neighbouring small reads are likely to want it."""
        clusters = _map(piece)
        key = clusters.tag + (piece.guest >> clusters.geometry.cluster_bits)
        data = self._clusters.get(key)
        if data is not None:
            return data
        data = self._unpack_now(piece)
        if data is not None:
            self._clusters.misses += 1
            self._clusters.put(key, data)
            return data

        async def load() -> bytes:
            found: list[bytes] = []
            await self._unpack([piece], lambda _, data: found.append(bytes(data)))
            return found[0]

        return await self._clusters.load(key, load)

    def _unpack_now(self, piece: Packed) -> bytes | None:
        """The whole cluster if that needs no waiting, which is most of a small read's time otherwise."""
        clusters, decompress = _map(piece), piece.layer.decompress
        assert decompress is not None
        size = clusters.geometry.cluster_size
        if self._pace * size > INLINE_TIME:
            return None
        offset, length = _span(clusters, piece)
        buffer = _take(length)
        try:
            view = memoryview(buffer)[:length]
            if not clusters.file.try_pread_into(view, offset):
                return None
            began = time.thread_time()
            data = bytes(decompress(view, size))
            self._learn(time.thread_time() - began, size)
            return data
        except FormatError as error:
            raise clusters.complain_entry(piece.guest, error) from error
        finally:
            _give(buffer)

    # -- one batch -----------------------------------------------------------------------------

    async def _unpack(self, batch: list[Packed], put: Put) -> None:
        """Read and decompress whole clusters of one layer."""
        clusters, decompress = _map(batch[0]), batch[0].layer.decompress
        assert decompress is not None
        size = clusters.geometry.cluster_size
        spans = [_span(clusters, piece) for piece in batch]
        runs, places = _runs(spans)
        total = sum(length for _, length in runs)
        buffer = _take(total)
        view = memoryview(buffer)
        try:
            await _read(clusters.file, runs, view)
            packed = [view[at : at + length] for at, (_, length) in zip(places, spans, strict=True)]

            def work() -> tuple[int, FormatError | None, float]:
                """How many succeeded, what ended it, and the processor time it took."""
                began = time.thread_time()
                done, failure = 0, None
                try:
                    for piece, data in zip(batch, packed, strict=True):
                        put(piece, decompress(data, size))
                        done += 1
                except FormatError as error:
                    failure = error
                return done, failure, time.thread_time() - began

            if self._pace * size * len(batch) <= INLINE_TIME:
                done, failure, took = work()
            else:
                done, failure, took = await in_pool(_pool(), work)
        finally:
            _give(buffer)
        if failure is not None:
            raise clusters.complain_entry(batch[done].guest, failure) from failure
        self._learn(took, size * done)

    def _learn(self, took: float, size: int) -> None:
        self._pace += (took / size - self._pace) * PACE_WEIGHT


_free: list[mmap.mmap] = []
"""Buffers of BATCH_BYTES for the process's next batches."""


def _take(length: int) -> mmap.mmap:
    """A buffer for compressed data, at a page's start: the kernel copies fastest to there."""
    if length <= BATCH_BYTES:
        return _free.pop() if _free else mmap.mmap(-1, BATCH_BYTES)
    return mmap.mmap(-1, length)


def _give(buffer: mmap.mmap) -> None:
    """Keep the buffer, which nobody reads or writes any more, if it is of use."""
    if len(buffer) == BATCH_BYTES and len(_free) < KEPT:
        _free.append(buffer)


@functools.cache
def _pool() -> Pool:
    """The process's threads for decompressing: as many as can run, and two for when some wait for the
    interpreter. More would only hand it to each other."""
    return Pool(len(os.sched_getaffinity(0)) + 2, "nbdbm-unpack")


def _map(piece: Packed) -> ClusterMap:
    assert piece.layer.map is not None
    return piece.layer.map


def _cluster_size(piece: Packed) -> int:
    return _map(piece).geometry.cluster_size


def _batches(packed: list[Packed]) -> Iterator[list[Packed]]:
    """Pieces of the same layer, as many as make a batch at a time."""
    batch: list[Packed] = []
    most = 0
    for piece in packed:
        if batch and (len(batch) >= most or batch[0].layer is not piece.layer):
            yield batch
            batch = []
        if not batch:
            most = min(BATCH_CLUSTERS, max(1, BATCH_BYTES // _cluster_size(piece)))
        batch.append(piece)
    if batch:
        yield batch


def _span(clusters: ClusterMap, piece: Packed) -> tuple[int, int]:
    """Offset and length of a cluster's data in the file; the last sector may be cut by the file's end."""
    try:
        where = CompressedDescriptor.parse(clusters.geometry, piece.entry)
        if where.host_offset >= clusters.file.size:
            raise FormatError("L2 entry", piece.entry, "its compressed data lies past the file's end")
    except FormatError as error:
        raise clusters.complain_entry(piece.guest, error) from error
    return where


def _runs(spans: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int]]:
    """The reads (offset, length) that cover the spans, to lie behind each other in a buffer; and for each
    span where it begins in that. Spans may overlap, and lie anywhere."""
    runs: list[tuple[int, int]] = []
    places = [0] * len(spans)
    begin = end = spans[0][0]
    at = 0  # where the run that grows, of the file's bytes from ``begin`` to ``end``, lies in the buffer
    first = True
    for number in sorted(range(len(spans)), key=spans.__getitem__):
        offset, length = spans[number]
        if first or offset > end + NEAR:
            if not first:
                runs.append((begin, end - begin))
                at += end - begin
            begin = end = offset
            first = False
        places[number] = at + offset - begin
        end = max(end, offset + length)
    runs.append((begin, end - begin))
    return runs, places


async def _read(file: BlockFile, runs: Iterable[tuple[int, int]], view: memoryview) -> None:
    """Read the runs into ``view``, behind each other; those that have to wait, at the same time."""
    waiting = []
    at = 0
    for offset, length in runs:
        part = view[at : at + length]
        if not file.try_pread_into(part, offset):
            waiting.append(file.pread_into(part, offset))
        at += length
    if len(waiting) == 1:
        await waiting[0]
    elif waiting:
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
