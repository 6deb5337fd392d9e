"""Growing the disk of an image that nobody uses, its bitmaps with it.

    zero      what the old tables map behind the old end is made to read as zeroes, as a guest's
              write-zeroes would do it: leftovers of a shrunk disk, of a snapshot's machine state, and the
              part of a longer backing file that would come to light
    write     a longer L1 table beside the old one, with tables of zero clusters where a longer backing
              file reaches behind those; bitmaps of the new size, and a new directory; refcounts; sync
    switch    the header: size, L1 table and directory, all at once (qcow2/headeredit.py); sync
    free      the old L1 table, the old bitmaps

Until the switch the disk is the old one: what lies behind its end does not show, and a crash leaks clusters
at worst. From then on it is the new one. In no state does a bitmap of one size belong to a disk of another.

A bitmap that records has all of the new range dirty, a granule that the old end cut in two included: an extra
dirty bit costs a copy of zeroes, a missing one could cost the data that was in the way. One that is disabled
says what changed up to some day in the past, when there was no such range: clean.
"""

from __future__ import annotations

import errno
import sys
from array import array
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from nbdbm.bitmaps.tracker import REMEDY
from nbdbm.errors import BitmapError, ImageError, UnsupportedError
from nbdbm.image.backing import ChainOpener, Confinement, FileOpener, Layer
from nbdbm.image.bitmapsave import BitmapSaver, Staged
from nbdbm.image.bitmapstore import BitmapStore
from nbdbm.image.cache import TableCache
from nbdbm.image.clusters import ClusterMap, load_l1
from nbdbm.image.commit import Metadata
from nbdbm.image.read import Reader
from nbdbm.image.writable import load_metadata, prepare, rewrite_header
from nbdbm.image.write import Writer
from nbdbm.qcow2.bitmapdir import bitmap_bytes
from nbdbm.qcow2.constants import (
    MAX_BITMAP_DATA,
    MAX_L1_SIZE,
    OFFSET_MASK,
    AutoclearFeature,
    ExtensionType,
)
from nbdbm.qcow2.header import Header

UNIT = 512
"""Bytes; QEMU has no disks of parts of a sector."""


@dataclass(frozen=True, slots=True)
class Resized:
    """What came of it; sizes in bytes."""

    before: int
    after: int
    notices: list[str]
    """What the user should hear of."""


async def resize(
    path: str,
    size: int,
    *,
    relative: bool = False,
    format: str | None = None,
    open_file: FileOpener | None = None,
) -> Resized:
    """Grow the disk at ``path`` to ``size`` bytes, or by as many if ``relative``.

    Raises:
        ImageError, BitmapError: it cannot be done; the disk is the old one.
        OSError: a write or sync failed; the disk is the old one, or the new one.
    """
    cache = TableCache()
    notices: list[str] = []
    opener = ChainOpener(Confinement(), cache, notices, open_file)
    layers = await opener.open(path, format, None, writable=True)
    try:
        top = layers[0]
        before = top.size
        after = before + size if relative else size
        _judge_size(path, before, after)
        if after > before:
            if top.header is None:
                await top.file.truncate(after)
                await top.file.sync()
            else:
                await _Growth(layers, top.header, after, cache).run(notices)
        return Resized(before, after, notices)
    finally:
        await cache.close()
        for layer in layers:
            layer.close()


def _judge_size(path: str, before: int, after: int) -> None:
    if after < before:
        raise UnsupportedError(
            path, f"has {before} bytes; making it smaller is not supported (qemu-img resize --shrink does it)"
        )
    if after % UNIT and after != before:
        raise ImageError(path, f"cannot have {after} bytes: not a multiple of {UNIT}", errno=errno.EINVAL)


class _Growth:
    """One qcow2 image on its way to a larger size."""

    def __init__(self, layers: list[Layer], header: Header, size: int, cache: TableCache) -> None:
        self.layers = layers
        self.layer = layers[0]
        self.path = self.layer.path
        self.header = header
        self.before = header.size
        self.size = size
        self._cache = cache

    async def run(self, notices: list[str]) -> None:
        """Judge, then all steps in order."""
        layer, clusters = self.layer, self.layer.map
        assert clusters is not None
        self._judge_tables(clusters)
        store = await BitmapStore.load(layer.file, self.header, self.before, writable=True)
        self._judge_bitmaps(store)
        for bitmap in store.tracker:
            await store.bits(bitmap.name)
        notices += store.notices

        # From here on things are written; the disk stays the old one until the switch.
        await prepare(layer, notices)
        assert layer.header is not None
        header = self.header = layer.header
        metadata = await load_metadata(layer, self._cache, punch=False)
        saver = BitmapSaver(store, metadata, header)
        # With entries behind the disk's end, which may be anything.
        clusters.l1 = await load_l1(layer.file, header.l1_table_offset, header.l1_size)
        clusters.size = layer.size = self.size
        await self._grow_data_file()
        mapped = min(self.size, header.l1_size << clusters.geometry.l1_shift)
        await self._zero(metadata, self.before, mapped)
        await metadata.flush()
        await metadata.drain()
        # Disk: the old one, with nothing but zeroes behind its end as far as its L1 table reaches.

        entries = clusters.geometry.l1_entries(self.size)
        staged: Staged | None = None
        try:
            if entries > header.l1_size:
                await self._lengthen(metadata, clusters, entries)
                await self._zero(metadata, mapped, self.size)
            self._grow_bitmaps(store)
            staged = await saver.stage(list(store.tracker))
            await metadata.flush()
            # Disk: the old one; L1 table, bitmaps and directory of the new one, to which nothing leads.
            new = self._new_header(metadata, saver.header if staged is None else saver.header_for(staged))
        except BaseException:
            if staged is not None:
                await saver.abandon(staged)
            await self._undo(metadata, clusters)
            raise
        try:
            if staged is not None:
                await saver.switch(staged, new)
            else:
                await rewrite_header(layer.file, new)
        except UnsupportedError:
            if staged is not None:
                await saver.abandon(staged)
            await self._undo(metadata, clusters)
            raise
        # Disk: the new one. What only the old one needed is leaked until it is freed.
        if metadata.l1_offset != header.l1_table_offset:
            if header.l1_size:
                metadata.allocator.unprotect(header.l1_table_offset)
            await metadata.allocator.decrement(self._span(header.l1_table_offset, 8 * header.l1_size))
        if staged is not None:
            await saver.free(staged)
        await metadata.flush()

    # -- judging -------------------------------------------------------------------------------

    def _judge_tables(self, clusters: ClusterMap) -> None:
        """Refuse what the format, or QEMU, could not do.

        Raises:
            ImageError: with the reason.
        """
        header = self.header
        entries = clusters.geometry.l1_entries(self.size)
        if 8 * entries > MAX_L1_SIZE:
            most = MAX_L1_SIZE // 8 << clusters.geometry.l1_shift
            raise ImageError(
                self.path,
                f"cannot have {self.size} bytes: with clusters of {header.cluster_size} bytes a disk has at"
                f" most {most}",
                errno=errno.EFBIG,
            )
        if any(snapshot.disk_size is None for snapshot in self.layer.snapshots) or (
            header.version < 3 and self.layer.snapshots
        ):
            raise UnsupportedError(
                self.path,
                "has internal snapshots that do not record their size (version 2, compat 0.10): it would"
                " become theirs too; make it version 3 first: "
                f"qemu-img amend -f qcow2 -o compat=1.1 {self.path}",
            )
        if header.version < 3 and self._hidden > self.before:
            raise UnsupportedError(
                self.path,
                f"its backing file is longer ({self._hidden} bytes), and version 2 (compat 0.10) has no way"
                " to hide that; make it version 3 first: "
                f"qemu-img amend -f qcow2 -o compat=1.1 {self.path}",
            )

    @property
    def _hidden(self) -> int:
        """How far the backing file reaches, which must not come to light."""
        return self.layers[1].size if len(self.layers) > 1 else 0

    def _judge_bitmaps(self, store: BitmapStore) -> None:
        """Refuse while there are bitmaps of which nobody knows what they are to become.

        Raises:
            ImageError, BitmapError: which, and what to do about it.
        """
        claimed = self.header.autoclear_features & AutoclearFeature.BITMAPS
        if claimed and store.extension is None and self.header.extension(ExtensionType.BITMAPS) is not None:
            raise ImageError(
                self.path,
                f"{'; '.join(store.notices)}; to drop all its bitmaps: "
                f"nbdbm bitmap remove --inconsistent {self.path}",
            )
        for bitmap in store.tracker:
            if bitmap.refusal is not None:
                raise BitmapError(bitmap.name, f"{bitmap.refusal}; {REMEDY}")
            if bitmap_bytes(self.size, bitmap.granularity) > MAX_BITMAP_DATA:
                raise BitmapError(
                    bitmap.name,
                    f"its bits would take more than {MAX_BITMAP_DATA >> 20} MiB for {self.size} bytes, with"
                    f" its granularity of {bitmap.granularity}; add one with a larger one in its place",
                )

    # -- steps ---------------------------------------------------------------------------------

    async def _grow_data_file(self) -> None:
        """An external data file is as long as the disk at least; nothing old shows in what is new."""
        data = self.layer.data_file
        if data is None:
            return
        if self.header.raw_data_file and data.size > self.before:
            await data.zero(self.before, data.size - self.before, punch=True)
        if data.size < self.size:
            await data.truncate(self.size)

    async def _zero(self, metadata: Metadata, start: int, end: int) -> None:
        """Make [start, end) read as zeroes; tables are made only where a backing file would show."""
        mask = self.header.cluster_size - 1
        hidden = min(end, (self._hidden + mask) & ~mask)
        for first, last, has_backing in ((start, hidden, True), (max(start, hidden), end, False)):
            if first < last:
                writer = Writer(
                    metadata, Reader(self.layers), self.size, has_backing=has_backing, raw_data=False
                )
                await writer.write_zeroes(first, last - first, punch=True, fast=False)

    async def _lengthen(self, metadata: Metadata, clusters: ClusterMap, entries: int) -> None:
        """Write a longer L1 table; from here on commits change that one, which nothing leads to."""
        size = self.header.cluster_size
        longer = array("Q", clusters.l1)
        longer.extend([0] * (entries - len(longer)))
        raw = longer[:]
        if sys.byteorder == "little":
            raw.byteswap()
        length = -(-8 * entries // size) * size
        offset, _ = await metadata.allocator.allocate_exact(length // size)
        metadata.l1_offset = offset
        clusters.l1 = longer
        await metadata.file.pwrite(offset, raw.tobytes().ljust(length, b"\0"))

    def _grow_bitmaps(self, store: BitmapStore) -> None:
        store.tracker.size = self.size
        for bitmap in store.tracker:
            assert bitmap.bits is not None
            bitmap.bits = bitmap.bits.grown(self.size)
            if bitmap.enabled:
                bitmap.bits.set(self.before, self.size - self.before)

    def _new_header(self, metadata: Metadata, header: Header) -> Header:
        assert self.layer.map is not None
        return replace(
            header,
            size=self.size,
            l1_size=len(self.layer.map.l1),
            l1_table_offset=metadata.l1_offset,
        )

    async def _undo(self, metadata: Metadata, clusters: ClusterMap) -> None:
        """Give back the longer L1 table and the tables that only it leads to, if the disk still writes."""
        old = self.header.l1_size
        if metadata.l1_offset == self.header.l1_table_offset or metadata.broken is not None:
            return
        bits = self.header.cluster_bits
        taken = [*self._span(metadata.l1_offset, 8 * len(clusters.l1))]
        taken += [(entry & OFFSET_MASK) >> bits for entry in clusters.l1[old:] if entry]
        with suppress(OSError, ImageError):  # leaked then, as after a crash; what is being raised is the news
            await metadata.allocator.decrement(taken)
            await metadata.allocator.write_dirty()
            await metadata.sync()

    def _span(self, offset: int, length: int) -> Iterable[int]:
        """The clusters of a range that begins at a cluster."""
        first = offset >> self.header.cluster_bits
        return range(first, first + -(-length // self.header.cluster_size))
