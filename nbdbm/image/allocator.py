"""Allocator: which host clusters are in use, and how often.

Refcounts live in RAM as soon as they are touched and reach the file with the next commit
(``image/commit.py``). Counts rise before anything can point at a cluster and fall only after nothing
on disk does, so a count on disk is never lower than the mappings on disk need: a power failure leaks
clusters at worst.
"""

from __future__ import annotations

import asyncio
import errno
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable

from bitarray import bitarray

from nbdbm.errors import CorruptError, ImageError
from nbdbm.image.blockfile import BlockFile
from nbdbm.image.occupied import Occupied
from nbdbm.qcow2.constants import MAX_REFTABLE_SIZE, REFTABLE_OFFSET_MASK
from nbdbm.qcow2.header import Header
from nbdbm.qcow2.refcount import pack_counts, unpack_counts

PAGE = 4096
"""Bytes; the unit in which changed refcounts are written, or a whole block where that is smaller."""

BLOCK_CACHE = 32 * 1024 * 1024
"""Bytes of unchanged refcount blocks kept: with 64 KiB clusters they describe 1 TiB of file."""

REFTABLE_AT = 48
"""Where the header has refcount_table_offset and refcount_table_clusters: 12 bytes in one sector."""


class _Block:
    """One refcount block in RAM."""

    __slots__ = ("counts", "dirty", "offset", "used")

    def __init__(self, offset: int, counts: array[int]) -> None:
        self.offset = offset
        """Host offset of the block itself."""
        self.counts = counts
        self.used = bitarray()
        self.used.pack(bytes(map(bool, counts)))
        self.dirty = 0
        """One bit per page that differs from the file."""


class Allocator:
    """Host clusters of one qcow2 file. Cluster numbers count from the start of the file."""

    def __init__(self, file: BlockFile, header: Header, table: array[int]) -> None:
        self.file = file
        self.cluster_size = header.cluster_size
        self.cluster_bits = header.cluster_bits
        self.order = header.refcount_order
        self.per_block = (self.cluster_size * 8) >> self.order
        self.maximum = (1 << (1 << self.order)) - 1
        self.table = table
        self.table_offset = header.refcount_table_offset
        self.table_clusters = header.refcount_table_clusters
        self.sync: Callable[[], Awaitable[None]] = file.sync
        """Makes durable what was written; whoever owns the allocator learns of its failures here."""
        self.give_up: Callable[[str, OSError], ImageError] = self._give_up
        """Told that nobody can know what the file says now (what failed, and how); returns the error."""
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._dropped = 0
        """How many blocks have left the cache."""
        self._dirty: dict[int, _Block] = {}
        self._cache_blocks = max(2, BLOCK_CACHE // self.cluster_size)
        self._new: list[int] = []
        """Block numbers whose entry in the refcount table is not in the file yet."""
        self._hint = 0
        self._end = -(-file.size // self.cluster_size)
        """No cluster from this one on was ever part of the file or handed out: it reads as zeroes."""
        self._structure = asyncio.Lock()
        """Held while the refcount table moves or gains entries in the file."""
        self._page = min(PAGE, self.cluster_size)
        self._per_page = (self._page * 8) >> self.order
        self.occupied = Occupied()
        """Clusters that are never handed out, whatever the refcounts claim: metadata is there."""
        self.spared: set[int] = set()
        """Those of them that are passed over if the refcounts call them free: what bitmaps consist of. With
        the others that is an error: where they are not counted, the guest's data may not be either."""
        self.occupied.add({(e & REFTABLE_OFFSET_MASK) >> self.cluster_bits for e in table if e})
        self.protect(0, self.cluster_size)
        self.protect(self.table_offset, self.table_clusters * self.cluster_size)

    @classmethod
    async def load(cls, file: BlockFile, header: Header) -> Allocator:
        """Read the refcount table; blocks follow when they are needed.

        Raises:
            CorruptError: an entry is misaligned or points outside the file.
        """
        length = header.refcount_table_clusters * header.cluster_size
        table = array("Q", await file.pread(header.refcount_table_offset, length))
        table.byteswap()
        seen: set[int] = set()
        for index, entry in enumerate(table):
            if entry and (entry % header.cluster_size or entry >= file.size or entry in seen):
                raise CorruptError(
                    file.path,
                    f"refcount table entry {index} is {entry:#x}: must be a cluster of its own inside the"
                    " file; repair it with: nbdbm check --repair all",
                )
            if entry:
                seen.add(entry)
        return cls(file, header, table)

    def _give_up(self, what: str, error: OSError) -> ImageError:
        return ImageError(self.file.path, f"{what} failed: {error.strerror or error}", errno=error.errno)

    def protect(self, offset: int, length: int) -> None:
        """Note that metadata is in this range's clusters."""
        self.occupied.protect((offset >> self.cluster_bits, -(-(offset + length) // self.cluster_size)))

    def unprotect(self, offset: int) -> None:
        """Take back ``protect`` for the range that begins at ``offset``."""
        self.occupied.unprotect(offset >> self.cluster_bits)

    # Looking

    async def _block(self, number: int) -> _Block | None:
        """The refcount block of this number, or None where the table has none."""
        block = self._blocks.get(number)
        if block is not None:
            self._blocks.move_to_end(number)
            return block
        if number >= len(self.table) or not self.table[number]:
            return None
        offset = self.table[number]
        while True:
            dropped = self._dropped
            data = await self.file.pread(offset, self.cluster_size)
            again = self._blocks.get(number)
            if again is not None:  # somebody else read it meanwhile, and may have changed it
                return again
            if dropped == self._dropped:  # else it may have been read, changed, written and dropped
                break
        block = _Block(offset, unpack_counts(data, self.order))
        self._remember(number, block)
        return block

    def _remember(self, number: int, block: _Block) -> None:
        self._blocks[number] = block
        if len(self._blocks) > self._cache_blocks:
            for old in self._blocks:
                if old not in self._dirty and old not in self._new and old != number:
                    del self._blocks[old]
                    self._dropped += 1
                    break

    async def count(self, cluster: int) -> int:
        """The refcount of a host cluster."""
        number, index = divmod(cluster, self.per_block)
        block = await self._block(number)
        return block.counts[index] if block is not None else 0

    # Changing, in RAM

    def _touch(self, number: int, block: _Block, first: int, count: int) -> None:
        low, high = first // self._per_page, (first + count - 1) // self._per_page
        block.dirty |= ((1 << (high - low + 1)) - 1) << low
        self._dirty[number] = block

    async def allocate(self, count: int) -> tuple[int, int, bool]:
        """Claim up to ``count`` adjacent clusters: (host offset, how many, fresh).

        They have a refcount of one from now on. ``fresh`` says that nothing was ever stored there: what is
        not written reads as zeroes. Whoever fails to link them gives them back with ``release``.

        Raises:
            CorruptError: the refcounts call a cluster free that holds metadata.
            OSError: a refcount block cannot be read; ENOSPC (as ImageError) at the format's end.
        """
        while True:
            number, index = divmod(self._hint, self.per_block)
            block = await self._block(number)
            if block is None:
                await self._add_block(number)
                continue
            index = self._hint - number * self.per_block  # the hint may have moved while we waited
            if not 0 <= index < self.per_block:
                continue
            first = block.used.find(False, index)
            if first < 0:
                self._hint = (number + 1) * self.per_block
                continue
            stop = min(first + count, self.per_block)
            end = block.used.find(True, first, stop)
            end = stop if end < 0 else end
            start = number * self.per_block + first
            if self.occupied.hit(start, start + end - first):
                spared = self.spared.intersection(range(start, start + end - first))
                if not spared:
                    self._refuse_protected(start, start + end - first)
                for cluster in spared:
                    block.used[cluster - number * self.per_block] = True
                continue
            self._claim(number, block, first, end - first)
            self._hint = start + end - first
            fresh = start >= self._end
            self._end = max(self._end, self._hint)
            return start << self.cluster_bits, end - first, fresh

    def allocate_now(self) -> int:
        """``allocate`` for one fresh cluster where that waits for nothing: its host offset; else -1."""
        number, index = divmod(self._hint, self.per_block)
        block = self._blocks.get(number)
        if block is None:
            return -1
        first = block.used.find(False, index)
        start = number * self.per_block + first
        if first < 0 or start < self._end or self.occupied.hit(start, start + 1):
            return -1
        self._claim(number, block, first, 1)
        self._hint = self._end = start + 1
        return start << self.cluster_bits

    def release_now(self, offset: int, *, untouched: bool) -> None:
        """Give back what ``allocate_now`` has just given; ``untouched``: nothing was stored there."""
        start = offset >> self.cluster_bits
        number, index = divmod(start, self.per_block)
        block = self._blocks[number]
        block.counts[index] = 0
        block.used[index] = False
        self._touch(number, block, index, 1)
        self._hint = start
        if untouched:
            self._end = start

    async def allocate_exact(self, count: int) -> tuple[int, bool]:
        """Claim exactly ``count`` adjacent clusters, for a table that is longer: (host offset, fresh)."""
        if count >= self.per_block:
            # There is a refcount block in every region: so many are free side by side only behind the file.
            return await self._allocate_behind(count)
        passed: list[tuple[int, int]] = []
        offset = got = 0
        fresh = True
        try:
            while got < count:
                more, extra, also = await self.allocate(count - got)
                if got and more != offset + (got << self.cluster_bits):
                    passed.append((offset, got))
                    got = 0
                if not got:
                    offset, fresh = more, True
                got, fresh = got + extra, fresh and also
        except BaseException:
            if got:
                passed.append((offset, got))
            raise
        finally:
            for gap, length in passed:
                await self.release(gap, length)
        return offset, fresh

    async def _allocate_behind(self, count: int) -> tuple[int, bool]:
        """``allocate_exact`` behind all that there is; the refcount blocks for it come first.

        | blocks | blocks, clusters ...      | ...       |      regions without a block
        """
        blocks = 1
        while blocks * self.per_block < blocks + count:
            blocks += 1
        async with self._structure:
            return await self._regions_behind(blocks, count)

    async def _regions_behind(self, blocks: int, count: int) -> tuple[int, bool]:
        number = 0
        while True:
            number = max(number, -(-self._end // self.per_block))
            if len(self.table) < number + blocks:
                await self._grow_table(max(len(self.table), number))
                continue
            taken = [at for at in range(number, number + blocks) if self.table[at]]
            if not taken:
                break
            number = taken[-1] + 1
        first = number * self.per_block
        self._refuse_protected(first, first + blocks + count)
        for at in range(number, number + blocks):
            cluster = first + at - number
            block = _Block(cluster << self.cluster_bits, unpack_counts(bytes(self.cluster_size), self.order))
            self.table[at] = block.offset
            self.occupied.add({cluster})
            self._new.append(at)
            self._remember(at, block)
            used = min(self.per_block, first + blocks + count - at * self.per_block)
            self._claim(at, block, 0, used)
            self._touch(at, block, 0, self.per_block)
        self._end = first + blocks + count
        return (first + blocks) << self.cluster_bits, True

    def _claim(self, number: int, block: _Block, first: int, count: int) -> None:
        for index in range(first, first + count):
            block.counts[index] = 1
        block.used[first : first + count] = True
        self._touch(number, block, first, count)

    def _refuse_protected(self, first: int, end: int) -> None:
        if self.occupied.hit(first, end):
            raise CorruptError(
                self.file.path,
                f"refcounts call the cluster at {first << self.cluster_bits:#x} free, but it holds metadata;"
                " repair it with: nbdbm check --repair all",
            )

    async def release(self, offset: int, count: int) -> None:
        """Give back clusters that were claimed and never linked, or that nothing can reach any more."""
        start = offset >> self.cluster_bits
        for cluster in range(start, start + count):
            number, index = divmod(cluster, self.per_block)
            block = await self._block(number)
            assert block is not None, "a claimed cluster has a refcount block"
            block.counts[index] = 0
            block.used[index] = False
            self._touch(number, block, index, 1)
        self._hint = min(self._hint, start)

    async def decrement(self, clusters: Iterable[int]) -> list[int]:
        """Lower each cluster's refcount by one; returns those that nobody uses any more.

        Only for clusters whose unlinking is durable. A count that is zero already stays so: a reference
        too few is for the check to report, not for us to make worse.
        """
        freed: list[int] = []
        for cluster in clusters:
            number, index = divmod(cluster, self.per_block)
            block = await self._block(number)
            if block is None or not block.counts[index]:
                continue
            block.counts[index] -= 1
            self._touch(number, block, index, 1)
            if not block.counts[index]:
                block.used[index] = False
                freed.append(cluster)
                self._hint = min(self._hint, cluster)
        return freed

    def reserve(self, first: int, count: int) -> bool:
        """Keep free clusters from being handed out, without counting them; False if one is in use.

        The caller lets no commit write the counts until ``unreserve``.
        """
        for cluster in range(first, first + count):
            block = self._blocks.get(cluster // self.per_block)
            if block is None or block.used[cluster % self.per_block]:
                return False
        self._mark(first, count, True)
        return True

    def unreserve(self, first: int, count: int) -> None:
        """Undo ``reserve``."""
        self._mark(first, count, False)
        self._hint = min(self._hint, first)

    def _mark(self, first: int, count: int, used: bool) -> None:
        for cluster in range(first, first + count):
            self._blocks[cluster // self.per_block].used[cluster % self.per_block] = used

    # Growing the refcount structure

    async def _add_block(self, number: int) -> None:
        """Put a refcount block for a region that has none into that region's first cluster."""
        async with self._structure:
            if number >= len(self.table):
                await self._grow_table(number)
                return
            if self.table[number]:
                return  # somebody else was faster
            cluster = number * self.per_block
            self._refuse_protected(cluster, cluster + 1)
            # The host gives it space now: that a disk is full shall be told to who writes, while the flush
            # can still carry out what was written before.
            await self.file.pwrite(cluster << self.cluster_bits, bytes(self.cluster_size))
            empty = unpack_counts(bytes(self.cluster_size), self.order)
            block = _Block(cluster << self.cluster_bits, empty)
            self.table[number] = block.offset
            self.occupied.add({cluster})
            self._new.append(number)
            self._end = max(self._end, cluster + 1)
            self._remember(number, block)
            self._claim(number, block, 0, 1)
            self._touch(number, block, 0, self.per_block)

    async def _grow_table(self, number: int) -> None:
        """Move the refcount table to a longer one, which begins the first region it did not cover.

        The region holds its own refcount blocks first, then the table.
        """
        entries_per_cluster = self.cluster_size // 8
        first = number * self.per_block
        wanted = max(number + 1, len(self.table) + len(self.table) // 2)
        while True:
            clusters = -(-wanted // entries_per_cluster)
            blocks = 1
            while blocks * self.per_block < blocks + clusters:
                blocks += 1
            if number + blocks <= clusters * entries_per_cluster:
                break
            wanted = number + blocks
        if clusters * self.cluster_size > MAX_REFTABLE_SIZE:
            raise ImageError(
                self.file.path,
                f"refcount table would exceed {MAX_REFTABLE_SIZE} bytes: the file cannot grow further with"
                f" {self.cluster_size} byte clusters",
                errno=errno.ENOSPC,
            )
        self._refuse_protected(first, first + blocks + clusters)
        table = array("Q", self.table)
        table.extend([0] * (clusters * entries_per_cluster - len(table)))
        added: dict[int, _Block] = {}
        for i in range(blocks):
            offset = (first + i) << self.cluster_bits
            block = _Block(offset, unpack_counts(bytes(self.cluster_size), self.order))
            table[number + i] = offset
            added[number + i] = block
        for cluster in range(first, first + blocks + clusters):
            at, index = divmod(cluster, self.per_block)
            added[at].counts[index] = 1
            added[at].used[index] = True
        raw = array("Q", table)
        raw.byteswap()
        self._end = max(self._end, first + blocks + clusters)  # should this fail, what is there is not zeroes
        for block in added.values():
            await self.file.pwrite(block.offset, pack_counts(block.counts, self.order))
        new = list(self._new)
        for fresh in new:
            block = self._blocks[fresh]
            await self.file.pwrite(block.offset, pack_counts(block.counts, self.order))
        new_offset = (first + blocks) << self.cluster_bits
        await self.file.pwrite(new_offset, raw.tobytes())
        await self.sync()
        # Disk: a second refcount structure, complete, which nothing points to.
        try:
            await self.file.pwrite(REFTABLE_AT, new_offset.to_bytes(8, "big") + clusters.to_bytes(4, "big"))
        except OSError as error:
            raise self.give_up("moving the refcount table", error) from error
        await self.sync()
        # Disk: the header (one sector) points to the new table; the old one is leaked until freed below.
        old_first, old_clusters = self.table_offset >> self.cluster_bits, self.table_clusters
        self.unprotect(self.table_offset)
        self.table.extend(table[len(self.table) :])  # entries set while we waited stay
        self.table_offset, self.table_clusters = new_offset, clusters
        self.protect(new_offset, clusters * self.cluster_size)
        self.occupied.add({block.offset >> self.cluster_bits for block in added.values()})
        self._new = [n for n in self._new if n not in new]
        for at, block in added.items():
            self._remember(at, block)
        await self.decrement(range(old_first, old_first + old_clusters))

    # Reaching the file

    @property
    def dirty(self) -> bool:
        """Whether RAM knows refcounts that the file does not."""
        return bool(self._dirty or self._new)

    async def write_new_blocks(self) -> bool:
        """Write new blocks, sync, then point the refcount table at them; True if there were any.

        The caller's next sync makes the entries durable.
        """
        if not self._new:
            return False
        async with self._structure:
            return await self._write_new_blocks()

    async def _write_new_blocks(self) -> bool:
        new = list(self._new)  # they stay there until it is done: the cache must not drop them
        try:
            for number in new:
                block = self._blocks[number]
                block.dirty = 0  # whole block below; what changes from here on is marked again
                await self.file.pwrite(block.offset, pack_counts(block.counts, self.order))
            await self.sync()
            # Disk: the blocks are complete; the table does not know them, so their clusters are leaked.
            for number in new:
                await self.file.pwrite(self.table_offset + 8 * number, self.table[number].to_bytes(8, "big"))
        except BaseException:
            for number in new:
                self._touch(number, self._blocks[number], 0, self.per_block)
            raise
        self._new = [number for number in self._new if number not in new]
        return True

    async def write_dirty(self) -> None:
        """Write every changed page of refcounts; the caller syncs."""
        for number, block in list(self._dirty.items()):
            pages, block.dirty = block.dirty, 0
            try:
                await self._write_pages(block, pages)
            except BaseException:
                block.dirty |= pages
                raise
            if not block.dirty:  # nobody changed it while we wrote
                self._dirty.pop(number, None)

    async def _write_pages(self, block: _Block, pages: int) -> None:
        index = 0
        while pages:
            skip = (pages & -pages).bit_length() - 1
            pages >>= skip
            index += skip
            run = (~pages & (pages + 1)).bit_length() - 1
            first, last = index * self._per_page, (index + run) * self._per_page
            data = pack_counts(block.counts[first:last], self.order)
            await self.file.pwrite(block.offset + index * self._page, data)
            pages >>= run
            index += run
