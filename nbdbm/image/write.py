"""The way down for writes to a qcow2 image: data first, then the mapping, in RAM (see commit.py).

    write  |------------------------------------|
    disk   | in place |  unallocated  | in place |
               |              |            |
            pwrite      lock clusters   pwrite
                        claim host clusters
                        pwrite data (with what surrounds it)
                        link in RAM, unlink the old
                        unlock

A range that is data in clusters of our own is overwritten where it lies, without a lock: what is under
way in an old place when a cluster is unlinked still finds that place unused (``Epochs``).
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from nbdbm.errors import FormatError, ImageError
from nbdbm.image.blockfile import CANNOT
from nbdbm.image.cache import Table
from nbdbm.image.commit import Metadata
from nbdbm.image.inflight import ClusterLocks
from nbdbm.image.read import Reader
from nbdbm.inline import run_inline
from nbdbm.qcow2.constants import COPIED, OFFSET_MASK
from nbdbm.qcow2.l2edit import L2Editor
from nbdbm.qcow2.mapping import Kind

T = TypeVar("T")

ZERO_CHUNK = 1024 * 1024
"""Bytes written at a time where zeroes must be stored as data."""

_ZEROES = bytes(ZERO_CHUNK)


class Writer:
    """Changes the active layer of a qcow2 image. Ranges are judged and marked dirty by the caller.

    Args:
        reader: reads the whole chain, for what surrounds a write in a new cluster.
        has_backing: unallocated clusters may show something other than zeroes.
        raw_data: the external data file must read like the disk by itself (data_file_raw).
    """

    def __init__(
        self, metadata: Metadata, reader: Reader, size: int, *, has_backing: bool, raw_data: bool
    ) -> None:
        self._metadata = metadata
        self._clusters = metadata.clusters
        self._geometry = metadata.clusters.geometry
        self._editor = L2Editor(self._geometry)
        self._reader = reader
        self._size = size
        self._has_backing = has_backing
        self._raw_data = raw_data
        self._locks = ClusterLocks()
        self._occupied = metadata.allocator.occupied
        self._data = metadata.data
        self._cluster_bits = self._geometry.cluster_bits
        self._external_data = self._geometry.external_data
        self._cluster_mask = self._geometry.cluster_mask
        self._cluster_size = self._geometry.cluster_size
        self._slice_shift = self._geometry.slice_shift
        self._index_mask = self._geometry.slice_entries - 1
        self._simple = not (self._geometry.extended_l2 or self._external_data)
        self._own_mask = self._editor.own_mask
        self._tables, self._tag = metadata.clusters.tables, metadata.clusters.tag

    @property
    def broken(self) -> str | None:
        """Why nothing may be written any more, once a sync has failed."""
        return self._metadata.broken

    async def flush(self) -> None:
        """Make everything durable that was finished before this call, see ``Metadata.flush``."""
        await self._metadata.flush()

    # -- the short way -------------------------------------------------------------------------

    def try_write(self, offset: int, data: memoryview) -> bool:
        """Write at once if all of it can be written in place, or to one new cluster, without waiting; False:
        nothing was done.

        Raises:
            OSError: the host refused it; some of it may have been written.
        """
        length = len(data)
        number = offset >> self._slice_shift
        table = self._tables.get(self._tag + number)
        if table is None or (offset + length - 1) >> self._slice_shift != number:
            return False
        self._tables.move_to_end(self._tag + number)
        if self._locks.held and self._holder(offset, length) is not None:
            return False
        within = offset & self._cluster_mask
        if not self._simple or within + length > self._cluster_size:
            host, part = self._in_place(table, offset, length)
            return part == length and self._data.try_pwrite(host, data)
        # The common write lies in one cluster: as ``_in_place``, at half the cost.
        entry = table.words[(offset >> self._cluster_bits) & self._index_mask]
        if not entry:
            return not self._has_backing and self._try_allocate(table, offset, data)
        if entry & self._own_mask != COPIED:
            return False
        host = entry & OFFSET_MASK
        place = host >> self._cluster_bits
        occupied = self._occupied
        if not host or place in occupied.single or (occupied.crowded and occupied.hit(place, place + 1)):
            return False
        host += within
        if host + length > self._data.size and not self._inside(host + length - 1):
            return False
        return self._data.try_pwrite(host, data)

    def _try_allocate(self, table: Table, offset: int, data: memoryview) -> bool:
        """``_allocate`` where there is nothing around the data, for a write to one cluster. It waits for
        nothing, so that nobody sees it half done: no lock, and no epoch."""
        metadata = self._metadata
        if metadata.pressing or not metadata.changeable(offset):
            return False
        allocator = metadata.allocator
        host = allocator.allocate_now()
        if host < 0:
            return False
        done = False
        try:
            done = self._data.try_pwrite(host + (offset & self._cluster_mask), data)
        except OSError:
            allocator.release_now(host, untouched=False)
            raise
        if done:
            self._editor.link_blank(table.words, offset, host, 1)
            metadata.changed(offset, table)
        else:
            allocator.release_now(host, untouched=True)
        return done

    def _in_place(self, table: Table, offset: int, length: int) -> tuple[int, int]:
        """What of the range may be overwritten where it lies, see ``L2Editor.in_place``; inside the file, and
        no metadata."""
        host, part = self._editor.in_place(table.words, offset, length)
        if part and not self._external_data:
            bits, end = self._cluster_bits, host + part
            if self._occupied.hit(host >> bits, ((end - 1) >> bits) + 1):
                return 0, 0  # ``_judge`` complains
            if end > self._data.size and not self._inside(end - 1):
                size = self._geometry.cluster_size
                part = max(0, -(-self._data.size // size) * size - host)
        return host, part

    async def _judge(self, offset: int, length: int) -> Table:
        """Judge the entries of a range in one slice: none that is wrong is built upon, or unlinked. Returns
        the slice, to be changed.

        Raises:
            CorruptError: an entry breaks the format's rules, or leads to metadata.
        """
        await self._clusters.map(offset, min(length, self._size - offset))
        table = await self._metadata.table(offset)
        size = self._geometry.cluster_size
        for cluster in range(offset & ~self._geometry.cluster_mask, offset + length, size):
            try:
                used = self._editor.references(table.words, cluster)
            except FormatError as error:
                raise self._clusters.complain_entry(cluster, error) from error
            if used and self._occupied.hit(used.start, used.stop):
                raise self._clusters.complain(
                    f"guest offset {cluster:#x}: its cluster at {used.start * size:#x} holds metadata and is"
                    " not written to; nbdbm check tells more"
                )
        return table

    def _inside(self, host: int) -> bool:
        """Whether a host offset lies in a cluster of the file; the last of them may be cut short."""
        return self._geometry.external_data or host & ~self._geometry.cluster_mask < self._metadata.file.size

    # -- write ---------------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data``. To its end, even if the caller is cancelled.

        Raises:
            OSError, CorruptError: it failed; any part of it may have been written, and the image is sound.
        """
        await _to_its_end(self._write(offset, data))
        if self._metadata.pressing:
            await self._metadata.flush()

    async def _write(self, offset: int, data: memoryview) -> None:
        epoch = self._metadata.epochs.enter()
        try:
            at = 0
            while at < len(data):
                at += await self._write_some(offset + at, data[at:])
        finally:
            self._metadata.epochs.leave(epoch)

    async def _write_some(self, offset: int, data: memoryview) -> int:
        """Write from the start of ``data`` as much as can be treated alike; return how much."""
        length = self._within_slice(offset, len(data))
        table = await self._lookup(offset)
        if table is not None:
            host, part = self._in_place(table, offset, length)
            if part:
                if (holder := self._holder(offset, part)) is not None:
                    # Of any of these clusters, not only the first: wait here, then look again.
                    await asyncio.shield(holder)
                    return 0
                await self._metadata.data.pwrite(host, data[:part])
                return part
            length = self._until_in_place(table, offset, length)
        return await self._locked(offset, length, lambda: self._allocate(offset, data[:length]))

    def _within_slice(self, offset: int, length: int) -> int:
        """The part of the range, from its start, that one L2 slice maps."""
        end = ((offset >> self._geometry.slice_shift) + 1) << self._geometry.slice_shift
        return min(length, end - offset)

    def _holder(self, offset: int, length: int) -> asyncio.Future[None] | None:
        """Who is changing the mapping of the range, as what ends with it."""
        bits = self._geometry.cluster_bits
        return self._locks.holder(offset >> bits, ((offset + length - 1) >> bits) + 1)

    def _until_in_place(self, table: Table, offset: int, length: int) -> int:
        """Bytes from ``offset`` to the first later cluster that can be overwritten where it lies."""
        size = self._geometry.cluster_size
        blank = max(1, self._editor.blank(table.words, offset, length))
        at = blank * size - (offset & self._geometry.cluster_mask)
        while at < length:
            if self._in_place(table, offset + at, min(size, length - at))[1]:
                return at
            at += size
        return length

    async def _lookup(self, offset: int) -> Table | None:
        """The slice that maps a guest offset, None if there is no table."""
        if not self._clusters.table_offset(offset >> self._geometry.l1_shift):
            return None
        return await self._clusters.slice(offset >> self._geometry.slice_shift)

    async def _locked(self, offset: int, length: int, work: Callable[[], Awaitable[T]]) -> T:
        """Run ``work`` with the clusters of the range locked."""
        bits = self._geometry.cluster_bits
        lock = await self._locks.acquire(offset >> bits, ((offset + length - 1) >> bits) + 1)
        try:
            return await work()
        finally:
            self._locks.release(lock)

    async def _allocate(self, offset: int, data: memoryview) -> int:
        """Write the start of ``data`` to where it cannot be written in place, and map it there.

        The clusters of all of ``data``, which lie in one slice, are locked. Returns how much was written.
        """
        geometry = self._geometry
        size = geometry.cluster_size
        within = offset & geometry.cluster_mask
        wanted = -(-(within + len(data)) // size)
        table = await self._metadata.table(offset)
        if self._editor.blank(table.words, offset, len(data)) < wanted:
            table = await self._judge(offset, len(data))
            if self._in_place(table, offset, len(data))[1]:
                return 0  # somebody else has just allocated it: look again
        owned = self._editor.owned(table.words, offset)
        if owned is not None and self._inside(owned):
            part = min(len(data), size - within)
            await self._fill(offset, data[:part], owned, fresh=False)
            return part
        if geometry.external_data:
            part = min(len(data), size - within)
            await self._fill(offset, data[:part], offset - within, fresh=False)
            return part
        # As many clusters as lie side by side in the file and need the same.
        count = max(1, self._editor.blank(table.words, offset, len(data)))
        while count < wanted and self._editor.owned(table.words, offset - within + count * size) is None:
            count += 1
        host, got, fresh = await self._metadata.allocator.allocate(count)
        part = min(len(data), got * size - within)
        try:
            await self._fill(offset, data[:part], host, fresh=fresh)
        except BaseException:
            await self._metadata.allocator.release(host, got)
            raise
        return part

    async def _fill(self, offset: int, data: memoryview, host: int, *, fresh: bool) -> None:
        """Write ``data`` to the adjacent host clusters from ``host`` on and link them there.

        What surrounds the data up to the edges of its (sub)clusters is copied from what the disk shows
        now. In a fresh place zeroes need not be written.
        """
        geometry = self._geometry
        size = geometry.cluster_size
        mask = geometry.cluster_mask
        end = offset + len(data)
        first, last = offset & ~mask, (end - 1) & ~mask
        table = await self._metadata.table(offset)
        if fresh and self._blank(table, first) and self._blank(table, last):
            # The common case, at a third of the cost: there is nothing around the data, nor in its place.
            start, stop, head, tail = first, last + size, None, None
        else:
            # Subclusters that the write does not touch stay as they are, unless the cluster's old place goes.
            start = self._copy_from(table, first, host, offset)
            stop = self._copy_to(table, last, host + last - first, end)
            head = await self._surrounding(start, offset - start)
            tail = await self._surrounding(end, stop - end)
        if (fresh and head is None and tail is None) or (start == offset and stop == end):
            await self._metadata.data.pwrite(host + offset - first, data)
        else:
            buffer = bytearray(stop - start)
            if head is not None:
                buffer[: offset - start] = head
            buffer[offset - start : end - start] = data
            if tail is not None:
                buffer[end - start :] = tail
            await self._metadata.data.pwrite(host + start - first, buffer)
        # The data is in the file (in its cache): from here to the end nothing waits, so the mapping
        # changes as one.
        table = await self._metadata.table(offset)
        count = ((last - first) >> geometry.cluster_bits) + 1
        if self._editor.blank(table.words, offset, len(data)) == count:
            self._editor.link_blank(table.words, first, host, count)
            self._metadata.changed(first, table, count=count)
            return
        for cluster in range(first, last + 1, size):
            place = host + cluster - first
            low, high = max(start, cluster), min(stop, cluster + size)
            unlinked: range | tuple[()] = ()
            if self._editor.owned(table.words, cluster) != place:
                unlinked = self._editor.references(table.words, cluster)
            self._editor.link(table.words, cluster, place, low - cluster, high - low)
            self._metadata.changed(cluster, table, unlinked)

    def _blank(self, table: Table, cluster: int) -> bool:
        """Whether a guest cluster has no entry and reads as zeroes. Never so where it has subclusters:
        they are mapped one by one."""
        return not (
            self._has_backing or self._geometry.extended_l2 or table.words[self._editor.slot(cluster)]
        )

    def _copy_from(self, table: Table, cluster: int, place: int, offset: int) -> int:
        """Where copying must begin in the first cluster of a write that begins at ``offset``."""
        if self._stored(table, offset, place):
            return offset
        if self._stays(table, cluster, place):
            return offset & ~(self._geometry.subcluster_size - 1)
        return cluster

    def _copy_to(self, table: Table, cluster: int, place: int, end: int) -> int:
        """Where copying must end in the last cluster of a write that ends at ``end``."""
        if self._stored(table, end - 1, place):
            return end
        if self._stays(table, cluster, place):
            return -(-end // self._geometry.subcluster_size) * self._geometry.subcluster_size
        return cluster + self._geometry.cluster_size

    def _stored(self, table: Table, at: int, place: int) -> bool:
        """Whether the subcluster that the byte ``at`` lies in is data in ``place`` already. What surrounds
        the byte is there then, and not to be touched: others may be writing it, in place."""
        host, part = self._editor.in_place(table.words, at, 1)
        return bool(part) and host & ~self._geometry.cluster_mask == place

    def _stays(self, table: Table, cluster: int, place: int) -> bool:
        """Whether the subclusters beside the write need no copy: they are in ``place``, or nowhere."""
        if not self._geometry.extended_l2:
            return False
        if self._editor.owned(table.words, cluster) == place:
            return True
        return self._editor.keeps_subclusters(table.words, cluster)

    async def _surrounding(self, offset: int, length: int) -> bytearray | None:
        """What the disk shows in a range of less than a cluster, None if that is zeroes. Past the end of
        the disk are zeroes."""
        inside = min(length, self._size - offset)
        if inside <= 0:
            return None
        buffer = bytearray(length)
        view = memoryview(buffer)
        parts = await self._reader.read_sparse(view[:inside], offset)
        if not any(is_data for _, is_data in parts):
            return None
        at = 0
        for part, is_data in parts:
            if not is_data:
                view[at : at + part] = bytes(part)
            at += part
        return buffer

    # -- zeroes and trim -----------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """Make the range read as zeroes; with ``punch`` its host clusters may be given back.

        Raises:
            ImageError: ENOTSUP, ``fast`` was asked for and zeroes would have to be written; nothing was done.
            OSError, CorruptError: it failed; any part of it may have been done.
        """
        if fast and not await self._is_fast(offset, length, punch):
            raise ImageError(
                self._metadata.file.path, "zeroes are not faster than data here", errno=errno.ENOTSUP
            )
        await _to_its_end(self._zero(offset, length, punch, fast))

    async def _zero(self, offset: int, length: int, punch: bool, fast: bool) -> None:
        """``write_zeroes``: whole units by mapping, the ends as data."""
        end = offset + length
        first, last = self._whole_units(offset, length, punch)
        if first >= last:
            await self._each_part(offset, length, self._zero_data)
            return
        last = min(last, end)
        # Before the ends: with a raw data file it is here that the host may say that it is not fast.
        await self._zero_whole(first, last - first, punch, fast)
        await self._each_part(offset, first - offset, self._zero_data)
        await self._each_part(last, end - last, self._zero_data)

    async def _zero_whole(self, offset: int, length: int, punch: bool, fast: bool) -> None:
        """Make whole units read as zeroes by mapping; the disk's last one may be cut off by its end."""

        async def zero(at: int, part: int) -> None:
            first, last = self._whole_units(at, part, punch)
            await self._locked(first, last - first, lambda: self._zero_units(first, last, punch, fast))

        await self._each_part(offset, length, zero)

    async def _is_fast(self, offset: int, length: int, punch: bool) -> bool:
        """Whether zeroes take less than data: not all of the range would have to be written as such."""
        first, last = self._whole_units(offset, length, punch)
        if first < last:
            return True
        return length < 2 * self._geometry.cluster_size and not await self._to_zero(offset, length)

    async def trim(self, offset: int, length: int) -> None:
        """Forget the content of the whole clusters in the range, and give their space back.

        They read as zeroes afterwards (version 2 with a backing file: as before, nothing is done).
        """
        size = self._geometry.cluster_size
        first = -(-offset // size) * size
        end = offset + length
        if end < self._size:
            end = end // size * size
        if end <= first or (self._geometry.version < 3 and self._has_backing):
            return
        await _to_its_end(self._zero_whole(first, end - first, True, False))

    async def _each_part(self, offset: int, length: int, work: Callable[[int, int], Awaitable[None]]) -> None:
        """Do ``work`` for the part of the range in each L2 slice; nothing where zeroes show without one."""
        end = offset + length
        while offset < end:
            part = self._within_slice(offset, end - offset)
            epoch = self._metadata.epochs.enter()
            try:
                if not self._raw_data and not self._has_backing:
                    gap = self._clusters.absent(offset, end - offset)
                    if gap:
                        offset += gap
                        continue
                await work(offset, part)
            finally:
                self._metadata.epochs.leave(epoch)
            offset += part
            if self._metadata.pressing:
                await self._metadata.flush()
            await asyncio.sleep(0)  # a slice maps thousands of clusters: let others have their turn

    def _whole_units(self, offset: int, length: int, punch: bool) -> tuple[int, int]:
        """The part of the range that can be zeroed by mapping; (first, last) with first >= last: nothing."""
        unit = self._geometry.subcluster_size
        end = offset + length
        if self._geometry.version < 3 and (self._has_backing or not punch):
            return end, end  # no zero flag: as data
        first = -(-offset // unit) * unit
        # The disk's last cluster counts as whole when the range reaches the disk's end.
        return first, -(-end // unit) * unit if end == self._size else end // unit * unit

    async def _to_zero(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts (offset, length) of the range that zeroes must be stored in to make it read as zeroes."""
        parts: list[tuple[int, int]] = []
        for kind, part, _ in await self._clusters.map(offset, length):
            zero = kind in (Kind.ZERO, Kind.ZERO_ALLOCATED)
            zero = zero or (kind is Kind.UNALLOCATED and not self._has_backing)
            if not zero or self._raw_data:
                parts.append((offset, part))
            offset += part
        return parts

    async def _zero_data(self, offset: int, length: int) -> None:
        """Store zeroes where the disk does not read as zeroes already."""
        for start, part in await self._to_zero(offset, length):
            at = 0
            while at < part:
                # Cut at round places, as in ``ThreadedFile._zero``.
                most = ZERO_CHUNK - (start + at) % ZERO_CHUNK
                at += await self._write_some(start + at, memoryview(_ZEROES)[: min(most, part - at)])

    async def _zero_units(self, first: int, last: int, punch: bool, fast: bool) -> None:
        """Make whole subclusters [first, last) of one slice, whose clusters are locked, read as zeroes."""
        geometry = self._geometry
        size = geometry.cluster_size
        await self._judge(first, last - first)
        if geometry.external_data:
            await self._zero_data_file(first, min(last, self._size) - first, punch, fast)
        for cluster in range(first & ~geometry.cluster_mask, last, size):
            low, high = max(first, cluster), min(last, cluster + size)
            table = await self._metadata.table(cluster)
            if high - low == size:
                await self._zero_cluster(table, cluster, punch)
                continue
            if self._compressed(table, cluster):
                # Written anew as a whole, with zeroes in one subcluster; the others follow below.
                await self._allocate(low, memoryview(_ZEROES)[: geometry.subcluster_size])
                table = await self._metadata.table(cluster)
            self._editor.zero_subclusters(table.words, cluster, low - cluster, high - low)
            self._metadata.changed(cluster, table)

    async def _zero_data_file(self, offset: int, length: int, punch: bool, fast: bool) -> None:
        """Zero a range of the external data file, which lies at its guest offset.

        All of it is covered by the request, so it may be gone at once; the mapping follows.
        """
        if self._raw_data:
            await self._metadata.data.zero(offset, length, punch=punch, fallback=not fast)
        elif punch:
            try:
                await self._metadata.data.zero(offset, length, punch=True, fallback=False)
            except OSError as error:
                if error.errno not in CANNOT:
                    raise
                # The host cannot; the mapping makes it read as zeroes.

    def _compressed(self, table: Table, cluster: int) -> bool:
        (mapping, *_) = self._clusters.runs_in(table, cluster, 1)
        return mapping.kind is Kind.COMPRESSED

    async def _zero_cluster(self, table: Table, cluster: int, punch: bool) -> None:
        """Make one whole locked cluster read as zeroes."""
        geometry = self._geometry
        kinds = {mapping.kind for mapping in self._clusters.runs_in(table, cluster, geometry.cluster_size)}
        if kinds == {Kind.ZERO} or (kinds == {Kind.UNALLOCATED} and not self._has_backing):
            return
        if kinds == {Kind.ZERO_ALLOCATED} and not punch:
            return
        keep: int | None = None
        if not punch and kinds - {Kind.UNALLOCATED, Kind.ZERO}:
            keep = self._editor.owned(table.words, cluster)
            if keep is None and geometry.external_data:
                keep = cluster
            elif keep is None:
                # Shared or compressed: what is kept allocated is a cluster of its own.
                keep, table = await self._set_aside(cluster)
        unlinked: range | tuple[()] = ()
        if keep is None or self._editor.owned(table.words, cluster) != keep:
            unlinked = self._editor.references(table.words, cluster)
        if geometry.version < 3:
            self._editor.unallocate(table.words, cluster)
        else:
            self._editor.zero(table.words, cluster, keep)
        self._metadata.changed(cluster, table, unlinked)

    async def _set_aside(self, cluster: int) -> tuple[int, Table]:
        """A host cluster that holds zeroes and whose space the host has set aside: its offset; and the
        slice that maps the guest's ``cluster``, to be changed."""
        host, _, _ = await self._metadata.allocator.allocate(1)
        try:
            await self._metadata.file.zero(host, self._geometry.cluster_size, punch=False)
            return host, await self._metadata.table(cluster)
        except BaseException:
            await self._metadata.allocator.release(host, 1)
            raise


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await ``work``, which changes the mapping; a cancelled caller leaves, the work goes on to its end."""
    # Most small writes wait for nothing, and a task would double what one costs.
    task = run_inline(work, asyncio.get_running_loop())
    if task is None:
        return
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        # The caller's buffers belong to it again when it leaves: stay until they are no longer used.
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError:
                continue
        if not task.cancelled():
            task.exception()
        raise
