"""BitmapSaver: carries out on disk what the tracker decides: arm before the first write, store at the end.

A bitmap's entry says IN_USE on disk from before the first write until its bits are stored, so whatever
the moment of a crash, a bitmap that calls itself consistent has missed nothing:

    arm      flags of each consistent entry rewritten in place, 4 bytes in one sector; one sync
    ...      writes; bits change in RAM only, while what is stored is loaded (bitmapstore.py) and added
    store    changed bits to fresh clusters, new tables, a new directory without IN_USE; sync, also of what
             the guest wrote last
             the header leads to the new directory: 8 bytes in one sector; sync
             the old ones are freed

Entries of inconsistent bitmaps are carried over byte for byte. Unlike QEMU's, no step clears the header's
autoclear bit: no crash loses all bitmaps.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from bitarray import bitarray

from nbdbm.bitmaps.dirty import DirtyBitmap
from nbdbm.bitmaps.tracker import BitmapState, Step, TrackedBitmap
from nbdbm.errors import BitmapError, ImageError
from nbdbm.image.bitmapstore import BitmapStore, StoredBitmap
from nbdbm.image.commit import Metadata
from nbdbm.image.writable import rewrite_header
from nbdbm.qcow2.bitmapdir import (
    BitmapsExtension,
    DirectoryEntry,
    bitmap_bytes,
    table_entries,
    table_refusal,
)
from nbdbm.qcow2.constants import (
    BITMAP_ALL_ONES,
    BITMAP_TYPE_DIRTY,
    MAX_BITMAP_DATA,
    OFFSET_MASK,
    AutoclearFeature,
    BitmapFlag,
    ExtensionType,
)
from nbdbm.qcow2.header import Header

log = logging.getLogger(__name__)

FLAGS_AT = 12
"""Where a directory entry has its flags, 4 bytes."""


class BitmapSaver:
    """Arms and stores the bitmaps of one file that is open for writing.

    Args:
        header: of the file; ``self.header`` is what it has become.
    """

    def __init__(self, store: BitmapStore, metadata: Metadata, header: Header) -> None:
        self.header = header
        self._store = store
        self._metadata = metadata
        self._file = metadata.file
        self._cluster_size = header.cluster_size
        allocator = metadata.allocator
        store.places -= allocator.occupied.among(store.places)
        allocator.occupied.add(store.places)
        allocator.spared |= store.places

    # -- arm -----------------------------------------------------------------------------------

    async def arm(self) -> None:
        """Have the disk say IN_USE of every bitmap that claims to be true; before the first write.

        Writes nothing if there is none. When this raises, no bitmap may be written past.

        Raises:
            OSError: a write or sync failed.
        """
        store = self._store
        if store.extension is None and self.header.autoclear_features & AutoclearFeature.BITMAPS:
            # The directory cannot be walked, so nothing in it can be told that it is missing writes.
            kept = self.header.autoclear_features & ~int(AutoclearFeature.BITMAPS)
            self.header = await rewrite_header(self._file, replace(self.header, autoclear_features=kept))
        states = (BitmapState.VALID, BitmapState.REFUSED)
        arming = [s for s in store.stored if s.tracked.state in states and not s.entry.in_use]
        if not arming:
            return
        await self._rewrite_flags(arming, lambda flags: flags | BitmapFlag.IN_USE)
        # Disk: IN_USE, and no write has happened yet. (A crash before the sync: some entries have the
        # flag, others do not and are true.)
        store.tracker.apply(Step.ARM, *(s.tracked for s in arming))

    async def _rewrite_flags(self, which: list[StoredBitmap], change: Callable[[int], int]) -> None:
        """Rewrite the flags of these entries where they lie, and sync."""
        changed: dict[int, StoredBitmap] = {}
        for stored in which:
            flags = int(change(stored.entry.flags))
            await self._file.pwrite(stored.offset + FLAGS_AT, flags.to_bytes(4, "big"))
            changed[id(stored)] = stored._replace(entry=stored.entry._replace(flags=flags))
        await self._metadata.sync()
        self._store.replace([changed.get(id(s), s) for s in self._store.stored])

    # -- store ---------------------------------------------------------------------------------

    async def store(self) -> None:
        """Store every bitmap and take IN_USE off; after the last write, when all data is durable, and what
        maps it durable or written (``Metadata.write_out``).

        When this raises, each bitmap is as it was, IN_USE, or is stored.

        Raises:
            OSError, ImageError: a write or sync failed, or there is no space.
        """
        tracker = self._store.tracker
        failure = await self._complete()
        saving = [b for b in tracker if b.state in (BitmapState.IN_USE, BitmapState.NEW)]
        staged = await self._stage(saving, only_flags=True)
        if staged is not None:
            await self.switch(staged)
            await self.free(staged)
        tracker.apply(Step.STORE, *saving)
        if failure is not None:
            raise failure

    async def _complete(self) -> ImageError | None:
        """Load what the disk has of each bitmap in which something was marked since; where that fails, the
        bitmap stays IN_USE on disk, and the first failure is returned."""
        failure: ImageError | None = None
        for bitmap in list(self._store.tracker):
            if self._unmarked(bitmap) or self._store.complete(bitmap):
                continue
            try:
                await self._store.bits(bitmap.name)
            except BitmapError as error:
                reason = f"what it held before could not be loaded: {error}"
                self._store.tracker.apply(Step.LOSE, bitmap, reason=reason)
                what = f"{error}; it stays marked as in use, the data is safe"
                failure = failure or ImageError(self._file.path, what, errno=error.errno)
        return failure

    def _unmarked(self, bitmap: TrackedBitmap) -> bool:
        """Whether what the disk has of the bitmap is all there is: nothing was loaded, and nothing marked."""
        return bitmap.bits is None or not (self._store.complete(bitmap) or bitmap.bits.any())

    async def stage(self, changed: Iterable[TrackedBitmap] = ()) -> Staged | None:
        """Write all that a directory of the tracker's bitmaps needs, durably; nothing leads to it yet.

        Those that are new or in ``changed`` are written anew, the other entries are carried over byte for
        byte. Returns None, having written nothing, if the directory would be the one that there is. What is
        returned is for ``switch``, or for ``abandon``.

        Raises:
            OSError, ImageError: a write or sync failed, or there is no space. Nothing is kept.
        """
        return await self._stage([*changed, *(b for b in self._store.tracker if b.state is BitmapState.NEW)])

    async def _stage(self, saving: Collection[TrackedBitmap], *, only_flags: bool = False) -> Staged | None:
        """``stage``; with ``only_flags``, if nothing but IN_USE flags is to go, they go where they lie."""
        stored = self._store.stored
        known = {s.tracked: s for s in stored}
        order = list(self._store.tracker)
        saving = frozenset(saving)
        new = _Clusters(self._metadata)
        old: list[int] = []
        try:
            entries: list[DirectoryEntry] = []
            for bitmap in order:
                was = known.pop(bitmap, None)
                if was is not None and bitmap not in saving:
                    entries.append(was.entry)
                else:
                    entries.append(await self._save(bitmap, was, new, old))
            if entries == [s.entry for s in stored]:
                return None
            if only_flags and self._only_flags(entries):
                # Nothing moved: the flags are all that is to be changed, and each is whole in a sector.
                clear = [s for s in stored if s.tracked in saving]
                await self._rewrite_flags(clear, lambda f: f & ~int(BitmapFlag.IN_USE))
                return None
            for removed in known.values():
                old += await self._clusters_of(removed)
            return await self._directory(order, entries, new, old)
        except BaseException:
            await new.give_back()
            raise

    async def _directory(
        self, order: list[TrackedBitmap], entries: list[DirectoryEntry], new: _Clusters, old: list[int]
    ) -> Staged:
        """Write the directory, and make it durable with all that it needs."""
        packed = b"".join(entry.pack() for entry in entries)
        extension = None
        if entries:
            extension = BitmapsExtension(len(entries), len(packed), await new.write(packed))
        await new.finish()
        if (was := self._store.extension) is not None:
            old += self._span(was.directory_offset, was.directory_size)
        await self._metadata.flush()
        # Disk: bits, tables and directory, complete and counted, and nothing leads to them. The old
        # directory holds. At the end of a session: the guest's last mapping, too.
        return Staged(order, entries, extension, new, old)

    def header_for(self, staged: Staged) -> Header:
        """The header that leads to ``staged``."""
        header = self.header
        features = header.autoclear_features
        if staged.extension is None:
            header = header.without_extension(ExtensionType.BITMAPS)
            features &= ~int(AutoclearFeature.BITMAPS)
        else:
            header = header.with_extension(staged.extension.to_extension())
            features |= AutoclearFeature.BITMAPS
        return replace(header, autoclear_features=features)

    async def switch(self, staged: Staged, header: Header | None = None) -> None:
        """Have the header lead to ``staged``; durable on return. ``free`` is to follow, or ``revert``.

        ``header`` is ``header_for(staged)`` with what else is to change in the same step.

        Raises:
            UnsupportedError: the header has no room; nothing has changed.
            OSError: the header leads to the old directory or to the new one.
        """
        staged.before = self.header
        self.header = await rewrite_header(self._file, header or self.header_for(staged))
        # Disk: the new directory. What only the old one led to is leaked until it is freed.
        allocator = self._metadata.allocator
        allocator.occupied.discard(self._store.places)  # the guest writes nothing from here on
        if self._store.extension is not None:
            allocator.unprotect(self._store.extension.directory_offset)
        self._store.extension = staged.extension
        place = 0
        if staged.extension is not None:
            place = staged.extension.directory_offset
            allocator.protect(place, staged.extension.directory_size)
        stored = []
        for bitmap, entry in zip(staged.order, staged.entries, strict=True):
            stored.append(StoredBitmap(bitmap, entry, place))
            place += entry.packed_size
        self._store.replace(stored)

    async def revert(self, staged: Staged) -> None:
        """Have the header lead to where it led before ``switch``, whether that raised or not.

        Only ``close`` may follow: what memory knows of the bitmaps is not what the disk says.

        Raises:
            OSError, ImageError: the header leads to the old directory or to the new one.
        """
        assert staged.before is not None
        self.header = await rewrite_header(self._file, staged.before)
        # Disk: the old directory, which is whole.
        await self.abandon(staged)

    async def abandon(self, staged: Staged) -> None:
        """Give back what ``stage`` took; nothing leads to it. Only logs what fails: it is leaked then."""
        await staged.new.give_back()
        await self._settle("what a new bitmap directory took")

    async def free(self, staged: Staged) -> None:
        """Give back what only the old directory led to. Only logs what fails: it is leaked then."""
        occupied = self._metadata.allocator.occupied
        try:
            # What a broken bitmap calls its own may be something else's.
            await self._metadata.allocator.decrement(c for c in staged.old if not occupied.hit(c, c + 1))
        except (OSError, ImageError) as error:
            log.warning("%s: freeing the old bitmaps failed: %s", self._file.path, error)
        await self._settle("the old bitmaps")

    async def _settle(self, what: str) -> None:
        try:
            await self._metadata.flush()
        except (OSError, ImageError) as error:
            # The bitmaps are as they should be; some clusters are leaked, as after a crash.
            log.warning("%s: freeing %s failed: %s", self._file.path, what, error)

    def _only_flags(self, entries: list[DirectoryEntry]) -> bool:
        """Whether the directory differs from what is on disk in IN_USE flags only."""
        stored = self._store.stored
        return len(entries) == len(stored) and all(
            e == s.entry or e._replace(flags=e.flags | BitmapFlag.IN_USE) == s.entry
            for e, s in zip(entries, stored, strict=True)
        )

    async def _save(
        self, bitmap: TrackedBitmap, stored: StoredBitmap | None, new: _Clusters, old: list[int]
    ) -> DirectoryEntry:
        """Write the bits and the table; return the entry for the new directory. What is in the same
        place as before stays there."""
        flags = stored.entry.flags & BitmapFlag.EXTRA_DATA_COMPATIBLE if stored is not None else 0
        flags |= BitmapFlag.AUTO if bitmap.enabled else 0
        extra = stored.entry.extra_data if stored is not None else b""
        entry = DirectoryEntry(
            stored.entry.table_offset if stored is not None else 0,
            stored.entry.table_size if stored is not None else 0,
            int(flags),
            BITMAP_TYPE_DIRTY,
            bitmap.granularity.bit_length() - 1,
            extra,
            bitmap.name.encode(),
        )
        if bitmap.bits is None or self._unmarked(bitmap):
            assert stored is not None, "a new bitmap has its bits in memory"
            return entry
        before: tuple[int, ...] = ()
        if stored is not None:
            before = await self._read_table(entry)
            span = entry.table_size * self._cluster_size
            if table_refusal(before, self._cluster_size, span, self._file.size) is not None:
                before = ()  # cleared without having been looked at: what it leads to is leaked
        size = self._store.tracker.size
        count = table_entries(size, bitmap.granularity, self._cluster_size)
        after = await self._write_bits(bitmap.bits, before, count, new)
        if after == before:
            return entry
        old += [place >> self.header.cluster_bits for place in _places(set(before).difference(after))]
        old += self._span(entry.table_offset, 8 * entry.table_size)
        place = 0
        if after:
            place = await new.write(struct.pack(f">{len(after)}Q", *after))
        return entry._replace(table_offset=place, table_size=len(after))

    async def _read_table(self, entry: DirectoryEntry) -> tuple[int, ...]:
        raw = await self._file.pread(entry.table_offset, 8 * entry.table_size)
        return struct.unpack(f">{entry.table_size}Q", raw)

    async def _write_bits(
        self, bits: DirtyBitmap, before: tuple[int, ...], count: int, new: _Clusters
    ) -> tuple[int, ...]:
        """Write the bits that are not as the table ``before`` has them; return the new table."""
        size = self._cluster_size
        total = bitmap_bytes(bits.size, bits.granularity)
        after = [0] * count
        for index in bits.pieces(size):
            content = bits.dump(index * size, min(size, total - index * size))
            was = before[index] if index < len(before) else 0
            if isinstance(content, bool):
                after[index] = BITMAP_ALL_ONES if content else 0
            elif was & OFFSET_MASK and await self._file.pread(was & OFFSET_MASK, len(content)) == content:
                after[index] = was
            else:
                after[index] = await new.write_bits(content)
        return tuple(after)

    async def _clusters_of(self, removed: StoredBitmap) -> list[int]:
        """The host clusters of a bitmap that is going; none if what describes them cannot be trusted:
        better leaked than taken from somebody else."""
        entry = removed.entry
        size, table_size = self._cluster_size, entry.table_size
        if removed.tracked.state is BitmapState.REFUSED or table_size * size > MAX_BITMAP_DATA + size:
            refusal: str | None = removed.tracked.refusal or "its table is too long"
        elif not entry.table_offset or entry.table_offset % size:
            refusal = "its table is misplaced"
        elif entry.table_offset + 8 * table_size > self._file.size:
            refusal = "its table reaches past the file's end"
        else:
            # Of an IN_USE entry the size may be that of another day; table and data are what was stored.
            try:
                table = await self._read_table(entry)
                refusal = table_refusal(table, size, table_size * size, self._file.size)
            except OSError as error:
                refusal = f"reading its table failed: {error}"
        if refusal is not None:
            log.warning(
                "%s: the clusters of bitmap %r are leaked (%s); nbdbm check --repair leaks frees them",
                self._file.path,
                removed.tracked.name,
                refusal,
            )
            return []
        data = sorted(place >> self.header.cluster_bits for place in _places(table))
        return [*self._span(entry.table_offset, 8 * table_size), *data]

    def _span(self, offset: int, length: int) -> Iterable[int]:
        """The clusters of a range that begins at a cluster."""
        first = offset >> self.header.cluster_bits
        return range(first, first + -(-length // self._cluster_size))


def _places(table: Iterable[int]) -> set[int]:
    """Host offsets that entries of a bitmap table lead to."""
    return {entry & OFFSET_MASK for entry in table if entry & OFFSET_MASK}


class _Clusters:
    """Clusters that are written for a new directory and nothing leads to yet."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._taken: list[tuple[int, int]] = []
        self._end = 0
        """Where the file has to end at least."""

    async def write(self, data: bytes) -> int:
        """Write ``data`` to fresh adjacent clusters: their host offset. What it does not fill of the last
        one is left as it is: nobody reads behind a table or a directory."""
        offset, _ = await self._take(len(data))
        await self._metadata.file.pwrite(offset, data)
        return offset

    async def write_bits(self, bits: bytes) -> int:
        """Write a cluster of bits, which has zeroes behind them: its host offset. ``finish`` is to follow.

        Where nothing was ever stored, zeroes at both ends need not be written: most clusters have few bits
        set, close to each other, and the sync of twenty takes two thirds of the time then.
        """
        size = self._metadata.allocator.cluster_size
        offset, blank = await self._take(size)
        if blank:
            whole = bitarray(buffer=bits, endian="little")
            first, last = whole.find(1) // 8, whole.find(1, right=True) // 8
            await self._metadata.file.pwrite(offset + first, bits[first : last + 1])
            self._end = max(self._end, offset + size)
        else:
            await self._metadata.file.pwrite(offset, bits.ljust(size, b"\0"))
        return offset

    async def finish(self) -> None:
        """Make the file as long as its clusters of bits say."""
        if self._end > self._metadata.file.size:
            await self._metadata.file.pwrite(self._end - 1, b"\0")

    async def _take(self, length: int) -> tuple[int, bool]:
        """Adjacent clusters for that many bytes: their host offset, and whether nothing was ever there."""
        allocator = self._metadata.allocator
        count = (length + allocator.cluster_size - 1) >> allocator.cluster_bits
        offset, blank = await allocator.allocate_exact(count)
        self._taken.append((offset, count))
        return offset, blank

    async def give_back(self) -> None:
        """Free them again."""
        taken, self._taken = self._taken, []
        for offset, count in taken:
            try:
                await self._metadata.allocator.release(offset, count)
            except OSError as error:
                log.warning("%s: some clusters are leaked: %s", self._metadata.file.path, error)


@dataclass(slots=True)
class Staged:
    """A new directory, complete and durable, that nothing leads to yet."""

    order: list[TrackedBitmap]
    entries: list[DirectoryEntry]
    extension: BitmapsExtension | None
    """None: no bitmap is left."""
    new: _Clusters
    old: list[int]
    """Host clusters that only the old directory leads to."""
    before: Header | None = None
    """The header that led to the old directory; set by ``switch``."""
