"""BitmapSaver: carries out on disk what the tracker decides: arm before the first write, store at the end.

A bitmap's entry says IN_USE on disk from before the first write until its bits are stored, so whatever
the moment of a crash, a bitmap that calls itself consistent has missed nothing:

    arm      flags of each consistent entry rewritten in place, 4 bytes in one sector; one sync
    ...      writes; bits change in RAM only
    store    changed bits to fresh clusters, new tables, a new directory without IN_USE; sync
             the header leads to the new directory: 8 bytes in one sector; sync
             the old ones are freed

Entries of inconsistent bitmaps are carried over byte for byte. Unlike QEMU's, no step clears the header's
autoclear bit: no crash loses all bitmaps.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable
from dataclasses import replace

from nbdbm.bitmaps.dirty import DirtyBitmap
from nbdbm.bitmaps.tracker import BitmapState, Step, TrackedBitmap
from nbdbm.errors import ImageError
from nbdbm.image.bitmapstore import BitmapStore, StoredBitmap
from nbdbm.image.commit import Metadata
from nbdbm.image.writable import rewrite_header
from nbdbm.qcow2.bitmapdir import BitmapsExtension, DirectoryEntry, bitmap_bytes, table_entries
from nbdbm.qcow2.constants import (
    BITMAP_ALL_ONES,
    BITMAP_TYPE_DIRTY,
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

    async def load_recording(self) -> None:
        """Load the bits of all bitmaps that must record; a write asserts that they are there.

        Raises:
            BitmapError: the bits of one cannot be read.
        """
        for bitmap in list(self._store.tracker):
            if bitmap.enabled and bitmap.usable:
                await self._store.bits(bitmap.name)

    # -- store ---------------------------------------------------------------------------------

    async def store(self) -> None:
        """Store every bitmap and take IN_USE off; after the last write, when all data is durable.

        When this raises, the data is safe, and each bitmap is as it was, IN_USE, or is stored.

        Raises:
            OSError, ImageError: a write or sync failed, or there is no space.
        """
        tracker = self._store.tracker
        known = {s.tracked: s for s in self._store.stored}
        order = list(tracker)
        saving = [b for b in order if b.state in (BitmapState.IN_USE, BitmapState.NEW)]
        if not saving and order == [s.tracked for s in self._store.stored]:
            return
        new = _Clusters(self._metadata)
        old: list[int] = []
        try:
            entries: list[DirectoryEntry] = []
            for bitmap in order:
                stored = known.get(bitmap)
                if stored is not None and bitmap not in saving:
                    entries.append(stored.entry)
                else:
                    entries.append(await self._save(bitmap, stored, new, old))
            if self._only_flags(entries):
                # Nothing moved: the flags are all that is to be changed, and each is whole in a sector.
                await self._rewrite_flags([known[b] for b in saving], lambda f: f & ~int(BitmapFlag.IN_USE))
            else:
                await self._switch(order, entries, new, old)
        except BaseException:
            await new.give_back()
            raise
        tracker.apply(Step.STORE, *saving)

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
        if bitmap.bits is None:
            assert stored is not None, "a new bitmap has its bits in memory"
            return entry  # never loaded, so never changed
        before = await self._read_table(stored.entry) if stored is not None else ()
        size = self._store.tracker.size
        count = table_entries(size, bitmap.granularity, self._cluster_size)
        after = await self._write_bits(bitmap.bits, before, count, new)
        old += [e >> self.header.cluster_bits for e in _places(before) - _places(after)]
        if after == before:
            return entry
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
        after: list[int] = []
        for index in range(count):
            content = bits.dump(index * size, min(size, total - index * size))
            was = before[index] if index < len(before) else 0
            if isinstance(content, bool):
                after.append(BITMAP_ALL_ONES if content else 0)
            elif was & OFFSET_MASK and await self._file.pread(was & OFFSET_MASK, len(content)) == content:
                after.append(was)
            else:
                after.append(await new.write(content.ljust(size, b"\0")))
        return tuple(after)

    async def _switch(
        self,
        order: list[TrackedBitmap],
        entries: list[DirectoryEntry],
        new: _Clusters,
        old: list[int],
    ) -> None:
        """Have the header lead to a new directory of these entries, then free the old one."""
        extension = self._store.extension
        packed = b"".join(entry.pack() for entry in entries)
        header = self.header
        features = header.autoclear_features
        if entries:
            place = await new.write(packed)
            after = BitmapsExtension(len(entries), len(packed), place)
            header = header.with_extension(after.to_extension())
            features |= AutoclearFeature.BITMAPS
        else:
            place, after = 0, None
            header = header.without_extension(ExtensionType.BITMAPS)
            features &= ~int(AutoclearFeature.BITMAPS)
        await self._metadata.flush()
        # Disk: bits, tables and directory, complete and counted, and nothing leads to them. The old
        # directory holds, with IN_USE.
        new.keep()  # if the next step fails, nobody knows whether the header leads to them
        self.header = await rewrite_header(self._file, replace(header, autoclear_features=features))
        # Disk: the new directory. What only the old one led to is leaked until it is freed.
        if extension is not None:
            old += self._span(extension.directory_offset, extension.directory_size)
            self._metadata.allocator.unprotect(extension.directory_offset)
        if after is not None:
            self._metadata.allocator.protect(after.directory_offset, after.directory_size)
        self._store.extension = after
        stored = []
        for bitmap, entry in zip(order, entries, strict=True):
            stored.append(StoredBitmap(bitmap, entry, place))
            place += entry.packed_size
        self._store.replace(stored)
        try:
            await self._metadata.allocator.decrement(old)
            await self._metadata.flush()
        except (OSError, ImageError) as error:
            # The bitmaps are stored; some clusters are leaked, as after a crash.
            log.warning("%s: freeing the old bitmaps failed: %s", self._file.path, error)

    def _span(self, offset: int, length: int) -> Iterable[int]:
        """The clusters of a range that begins at a cluster."""
        first = offset >> self.header.cluster_bits
        return range(first, first + -(-length // self._cluster_size))


def _places(table: tuple[int, ...]) -> set[int]:
    """Host offsets that a bitmap table leads to."""
    return {entry & OFFSET_MASK for entry in table if entry & OFFSET_MASK}


class _Clusters:
    """Clusters that are written for a new directory and nothing leads to yet."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._taken: list[tuple[int, int]] = []

    async def write(self, data: bytes) -> int:
        """Write ``data`` to fresh adjacent clusters: their host offset."""
        bits = self._metadata.allocator.cluster_bits
        count = (len(data) + (1 << bits) - 1) >> bits
        offset, _ = await self._metadata.allocator.allocate_exact(count)
        self._taken.append((offset, count))
        await self._metadata.file.pwrite(offset, data.ljust(count << bits, b"\0"))
        return offset

    def keep(self) -> None:
        """They are in use now."""
        self._taken.clear()

    async def give_back(self) -> None:
        """Free them again."""
        taken, self._taken = self._taken, []
        for offset, count in taken:
            try:
                await self._metadata.allocator.release(offset, count)
            except OSError as error:
                log.warning("%s: some clusters are leaked: %s", self._metadata.file.path, error)
