"""Commit: how changed mappings and refcounts reach the file, in an order that survives a power failure.

Metadata is changed in RAM only; a commit carries it to the file. One commit at a time:

    snapshot   copies of the changed parts of L2 tables and of changed L1 entries. An entry gets into RAM
               only when its data has been written, so all data of the snapshot is in the file's cache
    write      refcounts, which have only risen (new L2 tables were written, blank, when they were made)
    SYNC 1     disk: data, counts, blank tables, and nothing that leads to them: leaks at worst
    write      the snapshot
    SYNC 2     disk: the new mapping as well. A flush is answered now
    free       what the snapshot unlinked loses its reference, in RAM; the next commit writes that

A power failure between the syncs leaves any part of the snapshot on disk. Each entry lies within a sector
and was right before and is right after; a table that is linked but not yet filled is blank, that is, in
its old state. Without changed metadata a commit is one sync.

At the end of a session the bitmaps' barriers follow (bitmapsave.py), and the first of them serves as SYNC 2,
unless something was unlinked.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from array import array
from collections import Counter
from collections.abc import Iterable

from nbdbm.errors import ImageError
from nbdbm.image.allocator import Allocator
from nbdbm.image.blockfile import BlockFile
from nbdbm.image.cache import Table, TableCache
from nbdbm.image.clusters import ClusterMap
from nbdbm.image.inflight import Epochs
from nbdbm.qcow2.constants import COPIED, OFFSET_MASK

log = logging.getLogger(__name__)

PAGE_WORDS = 512
"""Words (4 KiB) of an L2 slice that are written together."""

L1_CHUNK = 65536
"""L1 entries looked at together."""

MOST_TABLES = 1 << 19
"""L2 tables whose places are kept in memory, about 50 MiB of it; with 4 KiB clusters they map 1 TiB, with
larger ones far more. An image of nothing but tables costs no more."""


class Metadata:
    """The changeable metadata of one qcow2 file that is open for writing.

    Args:
        clusters: the active layer's map; its L1 table and cached slices are what is changed.
        l1_offset: where the L1 table lies in the file, bytes.
    """

    def __init__(
        self, clusters: ClusterMap, cache: TableCache, allocator: Allocator, l1_offset: int, *, punch: bool
    ) -> None:
        self.file: BlockFile = clusters.file
        self.data: BlockFile = clusters.data
        self.clusters = clusters
        self.allocator = allocator
        self.epochs = Epochs()
        self.l1_offset = l1_offset
        self.broken: str | None = None
        """Why nothing may be written any more, once a sync has failed."""
        self._owing = False
        """A mapping of ``write_out`` awaits its sync."""
        self._cache = cache
        self._geometry = clusters.geometry
        self._punch = punch
        self._tables: dict[int, Table] = {}
        """Changed slices by number."""
        self._l1: set[int] = set()
        self._unlinked: list[int] = []
        """Host clusters (a number as often as it lost a reference) since the last snapshot."""
        self._limbo: list[tuple[int, list[int]]] = []
        """(epoch, clusters) durably unlinked, but a request of that epoch may still use them."""
        self._wrong_tables: set[int] = set()
        """Host clusters of L2 tables that must not be changed: they are something else as well."""
        self._table_lock = asyncio.Lock()
        self._commit_lock = asyncio.Lock()
        self._started = 0
        self._finished = 0
        allocator.sync = self.sync
        allocator.give_up = self.give_up

    # -- changing ------------------------------------------------------------------------------

    def claim_tables(self) -> None:
        """Note where the L2 tables are: nothing else goes there. Other metadata must be known before.

        A table that lies where other metadata is, or that two L1 entries lead to, is never changed. (Of more
        than ``MOST_TABLES`` nothing is known.)
        """
        bits = self._geometry.cluster_bits
        counts = Counter[int]()
        for at in range(0, len(self.clusters.l1), L1_CHUNK):
            chunk = self.clusters.l1[at : at + L1_CHUNK]
            counts.update((entry & OFFSET_MASK) >> bits for entry in chunk if entry)
            if len(counts) > MOST_TABLES:
                return
        del counts[0]
        tables = set(counts)
        self._wrong_tables = self.allocator.occupied.among(tables)
        if counts.total() > len(tables):
            self._wrong_tables |= {table for table, count in counts.items() if count > 1}
        self.allocator.occupied.add(tables)

    async def table(self, offset: int) -> Table:
        """The L2 slice for a guest offset, to be changed: made or copied first where needed.

        Nothing may be awaited between this call and the change; report the change with ``changed``.

        Raises:
            CorruptError, OSError: the table cannot be read, made or copied; nothing has changed.
        """
        number = offset >> self._geometry.slice_shift
        index = offset >> self._geometry.l1_shift
        if self._wrong_tables:
            self._judge_table(index)
        if not self.clusters.l1[index] & COPIED:
            async with self._table_lock:
                if not self.clusters.l1[index] & COPIED:
                    await self._own_table(index)
        key = self.clusters.tag + number
        while True:
            table = await self.clusters.slice(number)
            # While we were woken it may have been dropped, and loaded again for somebody else.
            if self._cache.get(key) is table:
                return table

    def changeable(self, offset: int) -> bool:
        """Whether the cached slice for a guest offset may be changed as it is: ``table`` would return it."""
        index = offset >> self._geometry.l1_shift
        return not self._wrong_tables and bool(self.clusters.l1[index] & COPIED)

    def _judge_table(self, index: int) -> None:
        place = self.clusters.table_offset(index)
        if place >> self._geometry.cluster_bits in self._wrong_tables:
            raise self.clusters.complain(
                f"L1 table, index {index}: the L2 table at {place:#x} is other metadata as well: it is not"
                " written to; nbdbm check tells more"
            )

    async def _own_table(self, index: int) -> None:
        """Give the L1 entry a table of its own: a blank one, or a copy of one that snapshots share."""
        size = self._geometry.cluster_size
        old = self.clusters.table_offset(index)
        content = await self.file.pread(old, size) if old else bytes(size)
        host, _, _ = await self.allocator.allocate(1)
        try:
            # In full and before anything leads here (commit, SYNC 1): a crash must not find old bytes.
            await self.file.pwrite(host, content)
        except BaseException:
            await self.allocator.release(host, 1)
            raise
        self.clusters.l1[index] = host | COPIED
        self._l1.add(index)
        self.allocator.occupied.add({host >> self._geometry.cluster_bits})
        if old:
            self.allocator.occupied.discard((old >> self._geometry.cluster_bits,))
            self._unlinked.append(old >> self._geometry.cluster_bits)

    def changed(self, offset: int, table: Table, unlinked: Iterable[int] = (), *, count: int = 1) -> None:
        """Note that the entry for a guest offset has changed (or ``count`` entries from there on), and which
        host clusters it no longer uses."""
        geometry = self._geometry
        number = offset >> geometry.slice_shift
        word = ((offset >> geometry.cluster_bits) & (geometry.slice_entries - 1)) * geometry.words_per_entry
        first, last = word // PAGE_WORDS, (word + count * geometry.words_per_entry - 1) // PAGE_WORDS
        table.kinds = None
        table.dirty |= ((2 << last - first) - 1) << first
        table.pinned = True
        self._tables[number] = table
        self._unlinked += unlinked

    @property
    def pressing(self) -> bool:
        """Whether changed slices fill so much of the cache that a commit should not wait for a flush."""
        return len(self._tables) * self._geometry.slice_bytes > self._cache.limit // 2

    @property
    def dirty(self) -> bool:
        """Whether a commit would write anything."""
        return bool(self._tables or self._l1 or self.allocator.dirty)

    def check(self) -> None:
        """Refuse to go on after a failed sync.

        Raises:
            ImageError: EIO, with the reason.
        """
        if self.broken is not None:
            raise ImageError(self.file.path, self.broken)

    # -- commit --------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Make everything durable that was finished before this call.

        Flushes that arrive while a commit runs share the next one. Cancelling a caller stops none.

        Raises:
            OSError: a write failed; what it was to write stays to be written by the next commit.
            ImageError: a sync failed, now or before; nothing is written any more.
        """
        await asyncio.shield(asyncio.ensure_future(self._flush()))

    async def write_out(self) -> None:
        """``flush``, but for the last sync: that is left to the caller, if nothing needs it before (what was
        unlinked must not get a new user before that is durable). Raises as ``flush``."""
        async with self._commit_lock:
            self.check()
            self._started += 1  # and not finished: whoever flushes does not rely on it
            await self._commit(durably=False)

    async def _flush(self) -> None:
        wanted = self._started + 1
        async with self._commit_lock:
            if self._finished >= wanted:
                return  # a commit that began after we were called has ended well
            self.check()
            self._started += 1
            turn = self._started
            await self._commit()
            self._finished = turn

    async def _commit(self, *, durably: bool = True) -> None:
        await self._reap()
        tables, self._tables = self._tables, {}
        l1, self._l1 = self._l1, set()
        unlinked, self._unlinked = self._unlinked, []
        pages = [self._take(number, table) for number, table in tables.items()]
        try:
            entries = self._l1_writes(l1)
            if tables or l1 or self.allocator.dirty:
                if await self.allocator.write_new_blocks():
                    # Disk: new refcount blocks are complete, and no mapping needs them yet.
                    pass
                await self.allocator.write_dirty()
            await self._sync(self.data, self.file)
            # Disk: data, refcounts and blank tables. The old mapping holds; new clusters are leaked.
            if tables or l1:
                for offset, data in entries:
                    await self.file.pwrite(offset, data)
                for _, writes in pages:
                    for offset, data in writes:
                        await self.file.pwrite(offset, data)
                if durably or unlinked:
                    await self._sync(self.file)
                    # Disk: the new mapping. What it no longer uses is leaked until its counts fall.
                else:
                    # Disk: any part of the new mapping, as between the syncs, and all that it needs. Nothing
                    # that it replaces is free, for nothing was unlinked.
                    self._owing = True
        except BaseException:
            for (mask, _), (number, table) in zip(pages, tables.items(), strict=True):
                table.dirty |= mask
                self._tables[number] = table
            self._l1 |= l1
            self._unlinked = unlinked + self._unlinked
            raise
        for number, table in tables.items():
            if number not in self._tables:
                table.pinned = False
        if unlinked:
            self._limbo.append((self.epochs.turn(), unlinked))
            await self._reap()

    def _take(self, number: int, table: Table) -> tuple[int, list[tuple[int, bytes]]]:
        """Copy a slice's changed pages: (which, [(host offset, bytes)])."""
        geometry = self._geometry
        mask, table.dirty = table.dirty, 0
        base = self.clusters.l1[number // geometry.slices_per_table] & OFFSET_MASK
        base += number % geometry.slices_per_table * geometry.slice_bytes
        writes: list[tuple[int, bytes]] = []
        left, at = mask, 0
        while left:
            skip = (left & -left).bit_length() - 1
            left >>= skip
            at += skip
            run = (~left & (left + 1)).bit_length() - 1
            words = table.words[at * PAGE_WORDS : (at + run) * PAGE_WORDS]
            writes.append((base + at * PAGE_WORDS * 8, _pack(words)))
            left >>= run
            at += run
        return mask, writes

    def _l1_writes(self, indices: set[int]) -> list[tuple[int, bytes]]:
        """The changed L1 entries, neighbours together."""
        writes: list[tuple[int, bytes]] = []
        run: list[int] = []
        for index in [*sorted(indices), -1]:
            if run and index != run[-1] + 1:
                words = self.clusters.l1[run[0] : run[-1] + 1]
                writes.append((self.l1_offset + 8 * run[0], _pack(words)))
                run = []
            run.append(index)
        return writes

    async def settle(self) -> None:
        """Make durable what ``write_out`` has left, unless some sync has done so, or has failed to.

        Raises:
            ImageError: the sync failed.
        """
        if self._owing and self.broken is None:
            await self.sync()

    async def sync(self) -> None:
        """Sync the file, outside of a commit; failing breaks the image as it does there."""
        await self._sync(self.file)

    async def _sync(self, *files: BlockFile) -> None:
        """Sync each file once. After a failure the kernel may have dropped what it could not write, and a
        later sync would succeed without it: nothing can be promised any more."""
        try:
            for file in dict.fromkeys(files):
                await file.sync()
            if self.file in files:
                self._owing = False
        except OSError as error:
            raise self.give_up("a sync", error) from error

    def give_up(self, what: str, error: OSError) -> ImageError:
        """Accept no more writes, because ``what`` failed and nobody knows what the disk holds; returns
        the error to raise."""
        reason = (
            f"{what} failed ({error.strerror or error}): what was written since the last flush may be lost;"
            " the image accepts no more writes, and its bitmaps stay marked as in use"
        )
        if self.broken is None:  # one message, about what came first
            self.broken = reason
            log.error("%s: %s", self.file.path, reason)
        return ImageError(self.file.path, reason, errno=error.errno)

    # -- freeing -------------------------------------------------------------------------------

    async def _reap(self) -> None:
        """Free clusters whose unlinking is durable, once nobody can be using them."""
        while self._limbo and self.epochs.passed(self._limbo[0][0]):
            _, clusters = self._limbo.pop(0)
            try:
                freed = await self.allocator.decrement(clusters)
            except OSError as error:
                # Their counts cannot be read. Nothing depends on it but space: they are leaked.
                log.warning("%s: freeing clusters failed: %s", self.file.path, error.strerror or error)
                continue
            if self._punch and freed:
                await self._punch_holes(freed)

    async def _punch_holes(self, clusters: list[int]) -> None:
        """Give freed clusters back to the host. Held in use meanwhile: a new user's data must survive."""
        bits = self._geometry.cluster_bits
        runs: list[list[int]] = []
        for cluster in sorted(clusters):
            if runs and runs[-1][0] + runs[-1][1] == cluster:
                runs[-1][1] += 1
            else:
                runs.append([cluster, 1])
        for first, count in runs:
            if not self.allocator.reserve(first, count):
                continue
            try:
                await self.file.discard(first << bits, count << bits)
            except OSError as error:
                log.warning("%s: punching a hole failed: %s", self.file.path, error.strerror or error)
            finally:
                self.allocator.unreserve(first, count)

    async def drain(self) -> None:
        """Free everything that waits to be freed; no request is under way any more."""
        if self._unlinked:
            await self.flush()
        await self._reap()
        assert not self._limbo


def _pack(words: array[int]) -> bytes:
    raw = words[:]
    if sys.byteorder == "little":
        raw.byteswap()
    return raw.tobytes()
