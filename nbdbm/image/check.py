"""check: the consistency walk over everything a qcow2 file refers to.

    survey(file, header)
      stored refcounts   <- refcount table and blocks
      counted references <- header, L1 tables, L2 tables, data, snapshots, bitmaps, refcount structure
      stored > counted: a leak. stored < counted: a corruption, data may be overwritten.

Memory: two bytes per cluster of the file (one for what is stored, one for what was counted), about a
hundred per metadata cluster, one L1 table and one L2 table. The numbers mean what they mean to
``qemu-img check``, with these differences:

- a reference past the file's end is one corruption, whatever its COPIED flag;
- the clusters of an entry that cannot be trusted (a conflicting subcluster bitmap, an unaligned L2 table)
  count as used, never as leaked, and what an unaligned "L2 table" holds is not taken for entries;
- metadata that something else also refers to is a corruption even where the refcounts agree with that.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import sub

from nbdbm.errors import CorruptError, FormatError, UnsupportedError, UnsupportedFormat
from nbdbm.image.blockfile import BlockFile, ThreadedFile
from nbdbm.image.counts import Counts
from nbdbm.qcow2.bitmapdir import DirectoryEntry, parse_directory
from nbdbm.qcow2.compressed import CompressedDescriptor
from nbdbm.qcow2.constants import (
    BITMAP_ENTRY_RESERVED_MASK,
    COMPRESSED,
    COPIED,
    L1_RESERVED_MASK,
    L2_RESERVED_MASK,
    MAX_BITMAP_TABLE,
    MAX_L1_SIZE,
    MAX_SNAPSHOT_TABLE,
    OFFSET_MASK,
    REFTABLE_RESERVED_MASK,
    V3_MIN_HEADER_LENGTH,
    ZERO,
    AutoclearFeature,
    ExtensionType,
)
from nbdbm.qcow2.geometry import Geometry
from nbdbm.qcow2.header import Header
from nbdbm.qcow2.snapshots import SnapshotEntry

MAX_HOST_CLUSTERS = 1 << 29
"""Of one file: 1 GiB of counts. 64 KiB clusters get to 32 TiB this way."""
MAX_PROBLEMS = 1000
"""Messages kept; a damaged L2 table of a large cluster alone could make a hundred thousand."""
BITMAP_TABLE_PART = 1 << 20
"""Bytes of a bitmap table read at a time."""
MIN_WINDOW = 4096
"""Clusters past the end of the file that new refcounts may need; an eighth of the file's where that is more
(a refcount block describes at least 64 clusters)."""

Progress = Callable[[int, int], None]
"""(steps done, steps in all), called now and then."""


@dataclass(slots=True)
class CheckReport:
    """What a check found. Counts under the names that ``qemu-img check --output=json`` gives them."""

    filename: str
    format: str = "qcow2"
    check_errors: int = 0
    """Places that could not be read."""
    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    """Bytes; no cluster from here on is in use."""
    total_clusters: int = 0
    """Of the virtual disk."""
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    problems: list[str] = field(default_factory=list)
    """One line each, at most MAX_PROBLEMS; what could be repaired is not in it any more."""
    more_problems: int = 0
    """How many lines did not fit."""

    @property
    def exit_status(self) -> int:
        """0 clean, 1 the check could not be completed, 2 corrupt, 3 leaks only."""
        if self.check_errors:
            return 1
        if self.corruptions:
            return 2
        return 3 if self.leaks else 0

    def say(self, problem: str) -> None:
        """Note a line."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)
        else:
            self.more_problems += 1

    def corrupt(self, problem: str) -> None:
        """Note a corruption."""
        self.corruptions += 1
        self.say(f"corrupt: {problem}")

    def failed(self, problem: str) -> None:
        """Note a place that could not be checked."""
        self.check_errors += 1
        self.say(f"not checked: {problem}")

    def to_json(self) -> dict[str, object]:
        """With qemu-img's keys; numbers of fixes only where something was fixed, as there."""
        found: dict[str, object] = {
            "filename": self.filename,
            "format": self.format,
            "check-errors": self.check_errors,
            "image-end-offset": self.image_end_offset,
            "total-clusters": self.total_clusters,
            "allocated-clusters": self.allocated_clusters,
            "fragmented-clusters": self.fragmented_clusters,
            "compressed-clusters": self.compressed_clusters,
        }
        for key, value in (
            ("corruptions", self.corruptions),
            ("leaks", self.leaks),
            ("corruptions-fixed", self.corruptions_fixed),
            ("leaks-fixed", self.leaks_fixed),
        ):
            if value:
                found[key] = value
        return found


async def check(file: BlockFile, header: Header, *, progress: Progress | None = None) -> CheckReport:
    """Walk the image and report; nothing is written.

    Args:
        header: validated against the file.

    Raises:
        UnsupportedError: more clusters than can be counted.
    """
    return (await survey(file, header, progress=progress)).report


async def survey(file: BlockFile, header: Header, *, progress: Progress | None = None) -> Survey:
    """``check``, keeping the counts for a repair."""
    found = Survey(file, header)
    await found.run(progress or (lambda done, total: None))
    return found


class Survey:
    """One walk and what it gathered. Made by ``survey``."""

    def __init__(self, file: BlockFile, header: Header) -> None:
        self.file = file
        self.header = header
        self.geometry = Geometry(header)
        self.bits = header.cluster_bits
        self.size = header.cluster_size
        self.file_size = file.size
        self.clusters = -(-file.size >> self.bits)
        """Of the file, the last one perhaps partly there."""
        if self.clusters > MAX_HOST_CLUSTERS:
            raise UnsupportedError(
                file.path,
                f"the file has {self.clusters} clusters of {self.size} bytes; "
                f"at most {MAX_HOST_CLUSTERS} can be checked",
            )
        # One more: an unaligned reference at the end reaches over it.
        self.stored = Counts(self.clusters + 1)
        self.counted = Counts(self.clusters + 1)
        self.report = CheckReport(file.path, total_clusters=-(-header.size >> self.bits))

        self.window = max(MIN_WINDOW, self.clusters // 8)
        self.blind_spots = 0
        """Structures that could not be followed: what they refer to was not counted."""
        self.rebuild = False
        """The refcount structure itself is damaged or incomplete: changing numbers in it is not enough."""
        self.lost_refcounts = False
        """Some stored refcounts could not be read."""
        self.reftable: array[int] = array("Q")
        self.unknown_blocks: set[int] = set()
        """Indices of refcount blocks that could not be read: the refcounts there are not compared."""
        self.flagged: list[int] = []
        """L1 indices whose entry, or an entry of whose L2 table, has a wrong COPIED flag."""
        self.zeroable: list[int] = []
        """L1 indices of tables with unaligned entries that read as zeroes (no data is lost without them)."""
        self.references_end = self.clusters
        """One more than the highest well-formed reference, inside the file or past its end."""
        self.haunted = False
        """Something refers to the ``window`` behind the file's end: the file must not grow into that."""

        self.overlapped: set[int] = set()
        """Clusters of metadata that something else refers to too: writing there would change that."""

        self._owners: dict[int, str] = {}
        """Cluster -> what it holds, for metadata that only one place may refer to."""
        self._l2_tables: dict[int, int] = {}
        """Cluster -> how many L1 entries refer to it as an L2 table."""
        self._blocks: dict[int, int] = {}
        """Cluster -> index of the refcount block in it."""
        geometry = self.geometry
        unusual = COMPRESSED | L2_RESERVED_MASK | geometry.misaligned_mask
        if geometry.extended_l2 or geometry.version < 3:
            unusual |= ZERO
        entries = geometry.l2_entries
        self._zeroes = bytes(self.size)
        self._ones = _lanes(1, entries)
        self._ramp = int.from_bytes(
            array("Q", range(0, entries << self.bits, self.size)).tobytes(), sys.byteorder
        )
        """Lane n: what the n-th entry of a table adds to the first one's if the clusters are contiguous."""
        self._unusual = _lanes(unusual, entries)
        self._offsets = _lanes(OFFSET_MASK, entries)
        self._copied = _lanes(COPIED, entries)
        self._low_halves = _lanes(0xFFFF_FFFF, entries)

    @property
    def complete(self) -> bool:
        """Everything that refers to a cluster was seen: what was not counted is not in use."""
        return not self.blind_spots

    def target(self, cluster: int) -> int:
        """The refcount that the cluster should have, as far as the walk can tell."""
        counted = self.counted[cluster]
        return counted if self.complete else max(counted, self.stored[cluster])

    async def run(self, progress: Progress) -> None:
        """The walk; once."""
        header = self.header
        await self._load_refcounts()
        self._refer(0, self.size, "the header", exclusive=True)
        snapshots = await self._snapshots()
        steps = header.l1_size + sum(s.l1_size for s in snapshots) or 1
        done = await self._l1_table(
            "the L1 table", header.l1_table_offset, header.l1_size, True, lambda n: progress(n, steps)
        )
        for snapshot in snapshots:
            before = done
            done += await self._l1_table(
                f"the L1 table of snapshot {snapshot.id}",
                snapshot.l1_table_offset,
                snapshot.l1_size,
                False,
                lambda n, before=before: progress(before + n, steps),  # type: ignore[misc]
            )
        self._refer(
            header.refcount_table_offset,
            header.refcount_table_clusters << self.bits,
            "the refcount table",
            exclusive=True,
        )
        await self._bitmaps()
        self._refer_to_blocks()
        self._compare()
        self._overlaps()
        progress(steps, steps)

    # -- references ----------------------------------------------------------------------------

    def _refer(self, offset: int, length: int, what: str, *, exclusive: bool = False) -> bool:
        """Count a reference to each cluster of the range; False if (a part of) it is past the file's end."""
        if length <= 0:
            return True
        first, end = offset >> self.bits, (offset + length - 1 >> self.bits) + 1
        # The last cluster of a file may be there in part only.
        if offset + length - self.file_size >= self.size:
            self.report.corrupt(f"{what} at {offset:#x} is outside the file ({self.file_size} bytes)")
            if not offset & (self.size - 1):
                self.references_end = max(self.references_end, end)
            self.haunted |= first < self.clusters + self.window
            return False
        self.counted.add_run(first, end)
        if exclusive:
            for cluster in range(first, end):
                self._owners.setdefault(cluster, what)
        return True

    async def _read(self, offset: int, length: int, what: str) -> bytes | None:
        """Bytes of the file, or None after noting the error and the blind spot."""
        raw = await self._try_read(offset, length, what)
        if raw is None:
            self.blind_spots += 1
        return raw

    async def _try_read(self, offset: int, length: int, what: str) -> bytes | None:
        buffer = bytearray(length)
        view = memoryview(buffer)
        try:
            if not self.file.try_pread_into(view, offset):
                await self.file.pread_into(view, offset)
        except OSError as error:
            self.report.failed(f"{what} at {offset:#x} cannot be read: {error.strerror or error}")
            return None
        return bytes(buffer)

    # -- refcounts as stored -------------------------------------------------------------------

    async def _load_refcounts(self) -> None:
        header, report = self.header, self.report
        raw = await self._try_read(
            header.refcount_table_offset, header.refcount_table_clusters << self.bits, "the refcount table"
        )
        if raw is None:
            self.rebuild = self.lost_refcounts = True
            self.unknown_blocks.update(range(-(-self.clusters // self.geometry.refcount_block_entries)))
            return
        self.reftable = _words(raw)
        for index, entry in enumerate(self.reftable):
            if not entry:
                continue
            name = f"refcount block {index}"
            if entry & REFTABLE_RESERVED_MASK or entry & (self.size - 1):
                why = "reserved bits are set" if entry & REFTABLE_RESERVED_MASK else "not aligned"
                report.corrupt(f"refcount table entry {index} is {entry:#x}: {why}")
                self.rebuild = self.lost_refcounts = True
                self.unknown_blocks.add(index)
                continue
            if entry >> self.bits >= self.clusters:
                report.corrupt(f"{name} at {entry:#x} is outside the file")
                self.rebuild = self.lost_refcounts = True
                continue
            block = await self._try_read(entry, self.size, name)
            if block is None:
                self.unknown_blocks.add(index)
                self.rebuild = self.lost_refcounts = True
                continue
            self._blocks[entry >> self.bits] = index
            first = index << self.geometry.refcount_block_bits
            if first < len(self.stored) and block != self._zeroes:
                self.stored.load(first, block, header.refcount_order)

    def _refer_to_blocks(self) -> None:
        """Last of all, as in QEMU: a block that anything before refers to cannot be trusted."""
        for index, entry in enumerate(self.reftable):
            if entry and not entry & (self.size - 1) and entry >> self.bits < self.clusters:
                self._refer(entry, self.size, f"refcount block {index}")
                if self.counted[entry >> self.bits] != 1:
                    self.report.corrupt(
                        f"refcount block {index} at {entry:#x} is also used for something else"
                    )
                    self.rebuild = True

    # -- L1 and L2 -----------------------------------------------------------------------------

    async def _l1_table(
        self, what: str, offset: int, entries: int, active: bool, step: Callable[[int], None]
    ) -> int:
        """Walk one L1 table and all below it; return its number of entries."""
        if not entries:
            return 0
        if not self._refer(offset, 8 * entries, what, exclusive=True):
            self.blind_spots += 1
            return entries
        raw = await self._read(offset, 8 * entries, what)
        if raw is None:
            return entries
        for index, entry in enumerate(_words(raw)):
            if not entry:
                continue
            await self._l1_entry(what, index, entry, active)
            step(index)
        return entries

    async def _l1_entry(self, what: str, index: int, entry: int, active: bool) -> None:
        report = self.report
        if entry & L1_RESERVED_MASK:
            report.corrupt(f"entry {index} of {what} is {entry:#x}: reserved bits are set")
        offset = entry & OFFSET_MASK
        if not offset:
            if active and entry & COPIED:
                report.corrupt(f"entry {index} of {what} is {entry:#x}: COPIED without an L2 table")
                self.flagged.append(index)
            return
        name = f"the L2 table of entry {index} of {what}"
        if offset & (self.size - 1):
            report.corrupt(f"{name} at {offset:#x} is not aligned")
            self.blind_spots += 1
            self._refer(offset, self.size, name)
            return
        if not self._refer(offset, self.size, name):
            self.blind_spots += 1
            return
        cluster = offset >> self.bits
        self._l2_tables[cluster] = self._l2_tables.get(cluster, 0) + 1
        wrong = 0
        if active and self._known(cluster):
            stored = self.stored[cluster]
            if (stored == 1) != bool(entry & COPIED):
                report.corrupt(
                    f"entry {index} of {what} is {entry:#x}: wrong COPIED flag, the refcount is {stored}"
                )
                wrong = 1
        raw = await self._read(offset, self.size, name)
        if raw is not None and raw != self._zeroes:
            wrong += self._l2_table(name, raw, index, active)
        if wrong:
            self.flagged.append(index)

    def _l2_table(self, name: str, raw: bytes, l1_index: int, active: bool) -> int:
        """Count what an L2 table refers to; return how many COPIED flags are wrong."""
        words = _words(raw)
        bitmaps: array[int] | None = None
        if self.geometry.extended_l2:
            words, bitmaps = words[::2], words[1::2]
            if not self._plain_bitmaps(words, bitmaps):
                return self._l2_entries(name, words, bitmaps, l1_index, active)
        if self.geometry.external_data:
            return self._external_entries(name, words, bitmaps, l1_index, active)
        table = int.from_bytes(words.tobytes(), sys.byteorder)
        if table & self._unusual:
            return self._l2_entries(name, words, bitmaps, l1_index, active)
        used: Sequence[int]
        if words[0] & OFFSET_MASK and table == words[0] * self._ones + self._ramp:
            # The best of tables, and common: full, and in one piece.
            first = (words[0] & OFFSET_MASK) >> self.bits
            last = first + len(words) - 1
            used, run = range(first, last + 1), True
        else:
            hosts = array("Q")
            hosts.frombytes(((table & self._offsets) >> self.bits).to_bytes(8 * len(words), sys.byteorder))
            used = list(filter(None, hosts))
            if not used:
                return 0
            first, last = used[0], used[-1]
            run = last - first == len(used) - 1 and used == list(range(first, last + 1))
        if (last if run else max(used)) >= self.clusters:
            return self._l2_entries(name, words, bitmaps, l1_index, active)
        if active:
            low = self.stored.low
            ones = (low[first : last + 1] if run else bytes(map(low.__getitem__, used))).count(1)
            copied = (table & self._copied).bit_count()
            agree = copied == ones and copied in (0, len(used)) and not words.count(COPIED)
            if not agree or self.unknown_blocks:
                # Mixed flags are right or wrong one by one.
                return self._l2_entries(name, words, bitmaps, l1_index, active)
            self.report.allocated_clusters += len(used)
            if not run:
                self.report.fragmented_clusters += _breaks(used)
        if run:
            self.counted.add_run(first, last + 1)
        else:
            self.counted.add(used)
        return 0

    def _plain_bitmaps(self, words: array[int], bitmaps: array[int]) -> bool:
        """Whether no subcluster bitmap contradicts itself, or its entry."""
        flat = int.from_bytes(bitmaps.tobytes(), sys.byteorder)
        if flat >> 32 & flat & self._low_halves:
            return False
        return not any(bitmap & 0xFFFF_FFFF and not word for word, bitmap in zip(words, bitmaps, strict=True))

    def _l2_entries(
        self, name: str, words: array[int], bitmaps: array[int] | None, l1_index: int, active: bool
    ) -> int:
        """The slow twin of ``_l2_table``'s short way: entry by entry, whatever they hold."""
        report, geometry, size = self.report, self.geometry, self.size
        counted, shift, clusters = self.counted, self.bits, self.clusters
        reserved = L2_RESERVED_MASK | (ZERO if bitmaps is not None or geometry.version < 3 else 0)
        misaligned = geometry.misaligned_mask
        zeroable = active and geometry.version >= 3
        allocated = compressed = fragmented = wrong = 0
        expected = 0
        for index, entry in enumerate(words):
            bitmap = bitmaps[index] if bitmaps is not None else 0
            if not entry and not bitmap:
                continue
            if entry & COMPRESSED:
                allocated += 1
                compressed += 1
                wrong += self._compressed_entry(name, index, entry, bitmap, active)
                continue
            offset = entry & OFFSET_MASK
            if entry & reserved:
                report.corrupt(f"entry {index} of {name} is {entry:#x}: reserved bits are set")
            if bitmap:
                self._judge_bitmap(name, index, entry, bitmap)
            if not offset:
                continue
            if offset & misaligned:
                report.corrupt(f"entry {index} of {name} is {entry:#x}: the cluster is not aligned")
                has_data = bitmap & 0xFFFF_FFFF if bitmaps is not None else not entry & ZERO
                if not has_data and (not self.zeroable or self.zeroable[-1] != l1_index) and zeroable:
                    self.zeroable.append(l1_index)
            allocated += 1
            if expected and offset != expected:
                fragmented += 1
            expected = offset + size
            cluster = offset >> shift
            if cluster < clusters and not offset & misaligned:
                counted.add((cluster,))
            else:
                self._refer(offset, size, f"the cluster of entry {index} of {name}")
            if active and cluster < clusters and self._known(cluster):
                stored = self.stored[cluster]
                if (stored == 1) != bool(entry & COPIED):
                    report.corrupt(
                        f"entry {index} of {name} is {entry:#x}: wrong COPIED flag, the refcount is {stored}"
                    )
                    wrong += 1
        if active:
            report.allocated_clusters += allocated
            report.compressed_clusters += compressed
            # Compressed clusters share sectors: each counts as a fragment.
            report.fragmented_clusters += fragmented + compressed
        return wrong

    def _judge_bitmap(self, name: str, index: int, entry: int, bitmap: int) -> None:
        if bitmap >> 32 & bitmap & 0xFFFF_FFFF:
            self.report.corrupt(f"entry {index} of {name}: subclusters are both allocated and zero")
        elif bitmap & 0xFFFF_FFFF and not self._has_cluster(entry):
            self.report.corrupt(f"entry {index} of {name}: subclusters are allocated without a cluster")

    def _has_cluster(self, entry: int) -> bool:
        return bool(entry & OFFSET_MASK) or (self.geometry.external_data and bool(entry & COPIED))

    def _compressed_entry(self, name: str, index: int, entry: int, bitmap: int, active: bool) -> int:
        """Count a compressed cluster's host clusters; return 1 if it has a COPIED flag."""
        report = self.report
        copied = 0
        if entry & COPIED:
            report.corrupt(f"entry {index} of {name} is {entry:#x}: COPIED and compressed")
            copied = int(active)
        if bitmap:
            report.corrupt(f"entry {index} of {name}: compressed, but its subcluster bitmap is not zero")
        if self.geometry.external_data:
            report.corrupt(f"entry {index} of {name} is {entry:#x}: compressed, with an external data file")
            return copied
        try:
            where = CompressedDescriptor.parse(self.geometry, entry & ~COPIED)
        except FormatError as error:
            report.corrupt(f"entry {index} of {name}: {error}")
            return copied
        first = where.host_offset >> self.bits
        last = where.host_offset + where.length - 1 >> self.bits
        if last < self.clusters:
            self.counted.add((first,) if first == last else (first, last))
        else:
            self._refer(where.host_offset, where.length, f"the compressed cluster of entry {index} of {name}")
            self.references_end = max(self.references_end, last + 1)
        return copied

    def _external_entries(
        self, name: str, words: array[int], bitmaps: array[int] | None, l1_index: int, active: bool
    ) -> int:
        """An L2 table over an external data file: nothing to count, but the entries are judged."""
        report, size = self.report, self.size
        reserved = L2_RESERVED_MASK | (ZERO if bitmaps is not None else 0)
        wrong = allocated = fragmented = expected = 0
        for index, entry in enumerate(words):
            bitmap = bitmaps[index] if bitmaps is not None else 0
            if not entry and not bitmap:
                continue
            if entry & COMPRESSED:
                allocated += 1
                wrong += self._compressed_entry(name, index, entry, bitmap, active)
                continue
            if entry & reserved:
                report.corrupt(f"entry {index} of {name} is {entry:#x}: reserved bits are set")
            if bitmap:
                self._judge_bitmap(name, index, entry, bitmap)
            offset = entry & OFFSET_MASK
            if not self._has_cluster(entry) or (not offset and bitmaps is None and entry & ZERO):
                continue
            if offset & (size - 1):
                report.corrupt(f"entry {index} of {name} is {entry:#x}: the cluster is not aligned")
            allocated += 1
            fragmented += bool(expected and offset != expected)
            expected = offset + size
            if active and not entry & COPIED:
                # "This bit is always set with an external data file", whose clusters are never shared.
                report.corrupt(f"entry {index} of {name} is {entry:#x}: the COPIED flag is missing")
                wrong += 1
        if active:
            report.allocated_clusters += allocated
            report.fragmented_clusters += fragmented
        return wrong

    def _known(self, cluster: int) -> bool:
        """Whether the stored refcount of the cluster could be read."""
        if not self.unknown_blocks:
            return True
        return cluster >> self.geometry.refcount_block_bits not in self.unknown_blocks

    # -- snapshots and bitmaps -----------------------------------------------------------------

    async def _snapshots(self) -> list[SnapshotEntry]:
        """The snapshots that can be walked."""
        header, report = self.header, self.report
        if not header.nb_snapshots:
            return []
        table: list[SnapshotEntry] | None = None
        length = 64 * 1024
        while table is None:
            left = min(length, MAX_SNAPSHOT_TABLE, max(0, self.file_size - header.snapshots_offset))
            raw = await self._read(header.snapshots_offset, left, "the snapshot table")
            if raw is None:
                return []
            try:
                table = SnapshotEntry.parse_table(raw, header.nb_snapshots)
            except FormatError as error:
                report.corrupt(str(error))
                self.blind_spots += 1
                return []
            if table is None and left < length:
                report.corrupt(f"the snapshot table at {header.snapshots_offset:#x} ends outside the file")
                self.blind_spots += 1
                return []
            length *= 4
        size = sum(len(entry.pack()) for entry in table)
        self._refer(header.snapshots_offset, size, "the snapshot table", exclusive=True)
        sound: list[SnapshotEntry] = []
        for entry in table:
            if entry.l1_table_offset & (self.size - 1) or 8 * entry.l1_size > MAX_L1_SIZE:
                report.corrupt(
                    f"the L1 table of snapshot {entry.id} at {entry.l1_table_offset:#x} "
                    f"({entry.l1_size} entries) is not aligned, or too large"
                )
                self.blind_spots += 1
            else:
                sound.append(entry)
        return sound

    async def _bitmaps(self) -> None:
        header, report = self.header, self.report
        if not header.autoclear_features & AutoclearFeature.BITMAPS:
            return
        if header.extension(ExtensionType.BITMAPS) is None:
            return
        extension = header.bitmaps
        try:
            if extension is None:
                raise FormatError("bitmaps extension", None, "cannot be read")
            extension.validate(self.size, self.file_size)
            self._refer(
                extension.directory_offset, extension.directory_size, "the bitmap directory", exclusive=True
            )
            raw = await self._read(
                extension.directory_offset, extension.directory_size, "the bitmap directory"
            )
            if raw is None:
                return
            entries = parse_directory(raw, extension.nb_bitmaps)
        except FormatError as error:
            report.corrupt(str(error))
            self.blind_spots += 1
            return
        for entry in entries:
            await self._bitmap(entry)

    async def _bitmap(self, entry: DirectoryEntry) -> None:
        report = self.report
        name = f"the table of bitmap {entry.name!r}"
        offset, entries = entry.table_offset, entry.table_size
        if not entries:
            return
        if offset & (self.size - 1) or not offset or entries > MAX_BITMAP_TABLE:
            report.corrupt(f"{name} at {offset:#x} ({entries} entries) is not aligned, or too large")
            self.blind_spots += 1
            return
        if not self._refer(offset, 8 * entries, name, exclusive=True):
            self.blind_spots += 1
            return
        bad = BITMAP_ENTRY_RESERVED_MASK | self.geometry.misaligned_mask
        what = f"the bits of bitmap {entry.name!r}"
        for start in range(0, 8 * entries, BITMAP_TABLE_PART):
            raw = await self._read(offset + start, min(BITMAP_TABLE_PART, 8 * entries - start), name)
            if raw is None:
                return
            for index, value in enumerate(_words(raw), start // 8):
                if value & bad or (value & 1 and value != 1):
                    report.corrupt(f"entry {index} of {name} is {value:#x}: reserved bits, or not aligned")
                elif value > 1:
                    self._refer(value & OFFSET_MASK, self.size, what, exclusive=True)

    # -- the verdict ---------------------------------------------------------------------------

    def _compare(self) -> None:
        """Every cluster's refcount against the references to it."""
        report, stored, counted = self.report, self.stored, self.counted
        if not counted.low[self.clusters]:
            # What is stored for clusters that are not part of the file does not matter.
            stored[self.clusters] = 0
        for cluster in stored.differences(counted):
            if not self._known(cluster):
                continue
            has, needs = stored[cluster], counted[cluster]
            if has < needs:
                report.corrupt(f"cluster {cluster} has refcount {has}, but {_times(needs)}")
                if not self.block_exists(cluster):
                    self.rebuild = True
            else:
                report.leaks += 1
                report.say(f"leaked: cluster {cluster} has refcount {has}, but {_times(needs)}")
        report.image_end_offset = max(stored.end(), counted.end()) << self.bits

    def block_exists(self, cluster: int) -> bool:
        index = cluster >> self.geometry.refcount_block_bits
        return index < len(self.reftable) and bool(self.reftable[index]) and index not in self.unknown_blocks

    def _overlaps(self) -> None:
        """Metadata that something else refers to as well."""
        for cluster, what in self._owners.items():
            if (count := self.counted[cluster]) != 1:
                self._overlap(cluster, what, count)
        for cluster, references in self._l2_tables.items():
            if (count := self.counted[cluster]) != references and cluster not in self._owners:
                self._overlap(cluster, "an L2 table", count)

    def _overlap(self, cluster: int, what: str, count: int) -> None:
        self.overlapped.add(cluster)
        line = f"cluster {cluster} holds {what}, but {_times(count)}"
        if (
            self.header.refcount_table_offset >> self.bits
            <= cluster
            < (self.header.refcount_table_offset >> self.bits) + self.header.refcount_table_clusters
        ):
            self.rebuild = True
        if self.stored[cluster] == count or not self._known(cluster):
            self.report.corrupt(line)
        else:
            # The refcount already made this one a corruption.
            self.report.say(f"corrupt: {line}")


async def open_locked(
    path: str, *, writable: bool, force_share: bool = False
) -> tuple[ThreadedFile, Header, str | None]:
    """Open and lock a qcow2 file by itself, without what it refers to; the third value is a notice or None.

    Raises:
        ImageError: and its kin: no readable file, no qcow2 image, in use, or a header that breaks a rule.
    """
    file = ThreadedFile.open(path, writable=writable)
    try:
        notice = file.lock(writable=writable, force_share=force_share)
        try:
            start = await file.pread(0, min(V3_MIN_HEADER_LENGTH, file.size))
            header = Header.parse(await file.pread(0, Header.peek_cluster_size(start)))
            header.validate(file.size)
        except UnsupportedFormat as error:
            raise UnsupportedError(path, str(error)) from error
        except FormatError as error:
            raise CorruptError(path, str(error)) from error
        return file, header, notice
    except BaseException:
        file.close()
        raise


def _words(raw: bytes) -> array[int]:
    """Big-endian 64-bit numbers."""
    words = array("Q")
    words.frombytes(raw)
    if sys.byteorder == "little":
        words.byteswap()
    return words


def _lanes(word: int, count: int) -> int:
    """``word`` in each of ``count`` 64-bit lanes of one integer."""
    return int.from_bytes(word.to_bytes(8, sys.byteorder) * count, sys.byteorder)


def _breaks(clusters: Iterable[int]) -> int:
    """How often a cluster is not followed by its neighbour."""
    values = list(clusters)
    return len(values) - 1 - list(map(sub, islice(values, 1, None), values)).count(1)


def _times(count: int) -> str:
    if count == 0:
        return "nothing refers to it"
    return "1 place refers to it" if count == 1 else f"{count} places refer to it"
