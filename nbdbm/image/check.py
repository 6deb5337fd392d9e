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

from array import array
from collections.abc import Callable

from nbdbm.errors import CorruptError, FormatError, UnsupportedError, UnsupportedFormat
from nbdbm.image.blockfile import BlockFile, ThreadedFile
from nbdbm.image.checkreport import CheckReport
from nbdbm.image.checktables import L2Tables, words_of
from nbdbm.image.counts import Counts
from nbdbm.qcow2.bitmapdir import DirectoryEntry, parse_directory
from nbdbm.qcow2.constants import (
    BITMAP_ENTRY_RESERVED_MASK,
    COPIED,
    L1_RESERVED_MASK,
    MAX_BITMAP_TABLE,
    MAX_L1_SIZE,
    MAX_SNAPSHOT_TABLE,
    OFFSET_MASK,
    REFTABLE_RESERVED_MASK,
    V3_MIN_HEADER_LENGTH,
    AutoclearFeature,
    ExtensionType,
)
from nbdbm.qcow2.geometry import Geometry
from nbdbm.qcow2.header import Header
from nbdbm.qcow2.snapshots import SnapshotEntry

MAX_HOST_CLUSTERS = 1 << 29
"""Of one file: 1 GiB of counts. 64 KiB clusters get to 32 TiB this way."""
BITMAP_TABLE_PART = 1 << 20
"""Bytes of a bitmap table read at a time."""
MIN_WINDOW = 4096
"""Clusters past the end of the file that new refcounts may need; an eighth of the file's where that is more
(a refcount block describes at least 64 clusters)."""

Progress = Callable[[int, int], None]
"""(steps done, steps in all), called now and then."""


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
        self._zeroes = bytes(self.size)
        self.tables = L2Tables(self)

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
        self.refer(0, self.size, "the header", exclusive=True)
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
        self.refer(
            header.refcount_table_offset,
            header.refcount_table_clusters << self.bits,
            "the refcount table",
            exclusive=True,
        )
        before = self.report.corruptions + self.report.check_errors
        await self._bitmaps()
        self.report.bitmap_faults = self.report.corruptions + self.report.check_errors - before
        self._refer_to_blocks()
        self._compare()
        self._overlaps()
        progress(steps, steps)

    # -- references ----------------------------------------------------------------------------

    def refer(self, offset: int, length: int, what: str, *, exclusive: bool = False) -> bool:
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
        self.reftable = words_of(raw)
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
                self.refer(entry, self.size, f"refcount block {index}")
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
        if not self.refer(offset, 8 * entries, what, exclusive=True):
            self.blind_spots += 1
            return entries
        raw = await self._read(offset, 8 * entries, what)
        if raw is None:
            return entries
        for index, entry in enumerate(words_of(raw)):
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
            self.refer(offset, self.size, name)
            return
        if not self.refer(offset, self.size, name):
            self.blind_spots += 1
            return
        cluster = offset >> self.bits
        self._l2_tables[cluster] = self._l2_tables.get(cluster, 0) + 1
        wrong = 0
        if active and self.known(cluster):
            stored = self.stored[cluster]
            if (stored == 1) != bool(entry & COPIED):
                report.corrupt(
                    f"entry {index} of {what} is {entry:#x}: wrong COPIED flag, the refcount is {stored}"
                )
                wrong = 1
        raw = await self._read(offset, self.size, name)
        if raw is not None and raw != self._zeroes:
            wrong += self.tables.check(name, raw, index, active)
        if wrong:
            self.flagged.append(index)

    def known(self, cluster: int) -> bool:
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
        self.refer(header.snapshots_offset, size, "the snapshot table", exclusive=True)
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
            self.refer(
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
        if not self.refer(offset, 8 * entries, name, exclusive=True):
            self.blind_spots += 1
            return
        bad = BITMAP_ENTRY_RESERVED_MASK | self.geometry.misaligned_mask
        what = f"the bits of bitmap {entry.name!r}"
        for start in range(0, 8 * entries, BITMAP_TABLE_PART):
            raw = await self._read(offset + start, min(BITMAP_TABLE_PART, 8 * entries - start), name)
            if raw is None:
                return
            for index, value in enumerate(words_of(raw), start // 8):
                if value & bad or (value & 1 and value != 1):
                    report.corrupt(f"entry {index} of {name} is {value:#x}: reserved bits, or not aligned")
                elif value > 1:
                    self.refer(value & OFFSET_MASK, self.size, what, exclusive=True)

    # -- the verdict ---------------------------------------------------------------------------

    def _compare(self) -> None:
        """Every cluster's refcount against the references to it."""
        report, stored, counted = self.report, self.stored, self.counted
        if not counted.low[self.clusters]:
            # What is stored for clusters that are not part of the file does not matter.
            stored[self.clusters] = 0
        for cluster in stored.differences(counted):
            if not self.known(cluster):
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
        if self.stored[cluster] == count or not self.known(cluster):
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


def _times(count: int) -> str:
    if count == 0:
        return "nothing refers to it"
    return "1 place refers to it" if count == 1 else f"{count} places refer to it"
