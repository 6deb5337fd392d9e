"""ClusterMap: one layer's guest ranges as runs of Mapping, through L1 and the cached L2 tables."""

from __future__ import annotations

import errno
import logging
import sys
from array import array

from nbdbm.errors import CorruptError, FormatError
from nbdbm.image.blockfile import BlockFile
from nbdbm.image.cache import TAG_SHIFT, Table, TableCache
from nbdbm.qcow2.geometry import Geometry
from nbdbm.qcow2.mapping import ABSENT, UNKNOWN, Kind, L2Decoder, Mapping, l2_table_offset

log = logging.getLogger(__name__)

MAX_COMPLAINTS = 100
"""Damaged places logged per layer, each once; a wholly damaged image must not fill a disk with logs."""

L1_CHUNK = 4096
"""L1 entries searched for the next table at a time."""


async def load_l1(file: BlockFile, offset: int, entries: int) -> array[int]:
    """Read an L1 table, whose place has been judged, as words in native byte order."""
    return await _load_words(file, offset, 8 * entries)


async def _load_words(file: BlockFile, offset: int, length: int) -> array[int]:
    words = array("Q", bytes(length))
    await file.pread_into(memoryview(words).cast("B"), offset)
    if sys.byteorder == "little":
        words.byteswap()
    return words


class ClusterMap:
    """Where each byte of one layer's disk comes from.

    A damaged table or entry raises CorruptError for the requests that need it, and nothing else; it is
    logged once. Ranges lie inside the layer's disk.

    Args:
        file: the qcow2 file with the tables.
        data: where data clusters lie: ``file``, or the external data file.
        size: of the layer's disk, bytes.
        cache: shared with the other layers.
        place: in the chain, 0 for the active layer.
    """

    def __init__(
        self,
        file: BlockFile,
        data: BlockFile,
        geometry: Geometry,
        l1: array[int],
        size: int,
        cache: TableCache,
        place: int,
    ) -> None:
        self.file = file
        self.data = data
        self.geometry = geometry
        self.l1 = l1
        self.size = size
        self.tag = place << TAG_SHIFT
        self.decoder = L2Decoder(geometry)
        self._cache = cache
        self.tables = cache.values
        """The cached slices of all layers, by ``tag`` and number; see ``LoadingCache.values``."""
        self._slice_shift = geometry.slice_shift
        self._complaints: set[str] = set()

    # -- one request ---------------------------------------------------------------------------

    def locate(self, offset: int, length: int) -> int:
        """The place in ``data`` if the whole range is data in one piece and its table is cached.

        Otherwise ABSENT if all of it is unallocated, BLANK if all of it is zeroes, or UNKNOWN: ``map``
        tells then.
        """
        shift = self._slice_shift
        number = offset >> shift
        if (offset + length - 1) >> shift != number:
            return UNKNOWN
        key = self.tag + number
        table = self.tables.get(key)
        if table is None:
            index = offset >> self.geometry.l1_shift
            return ABSENT if index >= len(self.l1) or not self.l1[index] else UNKNOWN
        self.tables.move_to_end(key)
        host = self.decoder.locate(table.words, offset, length)
        if host >= 0 and host >= self.data.size and self.data is self.file:
            return UNKNOWN  # ``map`` complains
        return host

    async def map(self, offset: int, length: int) -> list[Mapping]:
        """The runs that make up the range, neighbours merged within each L2 slice.

        Raises:
            CorruptError: a table or an entry breaks the format's rules.
            OSError: a table could not be read.
        """
        assert offset >= 0 and length > 0 and offset + length <= self.size
        runs: list[Mapping] = []
        shift = self._slice_shift
        end = offset + length
        while offset < end:
            number = offset >> shift
            part = min(end, (number + 1) << shift) - offset
            table = self._cache.get(self.tag + number)
            if table is None:
                gap = self.absent(offset, end - offset)
                if gap:
                    runs.append(Mapping(Kind.UNALLOCATED, gap, 0))
                    offset += gap
                    continue
                table = await self.slice(number)
            try:
                here = self.decoder.runs(table.words, offset, part)
            except FormatError as error:
                raise self._corrupt_entry(offset, part, table, error) from error
            if self.data is self.file:
                self._check_inside(here, offset)
            runs += here
            offset += part
        return runs

    def _check_inside(self, runs: list[Mapping], offset: int) -> None:
        """Refuse data that begins past the file's end; a last cluster may be cut short (zeroes follow)."""
        limit = self.file.size
        size = self.geometry.cluster_size
        for kind, length, host in runs:
            # Clusters are whole in the file, or the last of them is cut.
            if kind is Kind.DATA and (host + length - 1) // size * size >= limit:
                where = f"guest offset {offset:#x}: data cluster at {host:#x}"
                raise self.complain(f"{where} lies past the file's end ({limit})")
            offset += length

    def absent(self, offset: int, length: int) -> int:
        """How many bytes from ``offset`` have no L2 table, looking at the L1 table only."""
        shift = self.geometry.l1_shift
        first = offset >> shift
        last = (offset + length - 1) >> shift
        index = first
        l1 = self.l1
        while index <= last and index < len(l1):
            # At C speed to the next entry that is not zero.
            raw = l1[index : min(last + 1, index + L1_CHUNK)].tobytes()
            rest = raw.lstrip(b"\0")
            index += (len(raw) - len(rest)) // 8
            if rest:
                if self.table_offset(index):
                    break
                index += 1
        else:
            return length
        return 0 if index == first else min(length, (index << shift) - offset)

    def table_offset(self, index: int) -> int:
        """Where the L2 table of the L1 entry lies, 0 if there is none."""
        entry = self.l1[index]
        try:
            where = l2_table_offset(self.geometry, entry)
        except FormatError as error:
            raise self.complain(f"L1 table, index {index}: {error}") from error
        if where and where + self.geometry.cluster_size > self.file.size:
            # Past the end everything would read as "unallocated": data lost without a word.
            limit = self.file.size
            raise self.complain(
                f"L1 table, index {index}: L1 entry is {entry:#x}: "
                f"the L2 table reaches past the file's end ({limit})"
            )
        return where

    async def slice(self, number: int) -> Table:
        """The slice, from the file if need be. Its L2 table exists."""
        geometry = self.geometry
        index = number // geometry.slices_per_table
        within = number % geometry.slices_per_table * geometry.slice_bytes

        async def read() -> Table:
            while True:
                where = self.table_offset(index)
                words = await _load_words(self.file, where + within, geometry.slice_bytes)
                # Meanwhile the table may have been copied for a writer, and its old place freed.
                if self.table_offset(index) == where:
                    return Table(words)

        return await self._cache.load(self.tag + number, read)

    # -- whole slices, for block status --------------------------------------------------------

    async def slice_kinds(self, offset: int, length: int) -> tuple[int, Table | None]:
        """The slice that covers ``offset``, classified (see ``Table.kinds``), and how many bytes of the
        range it covers. None instead of a table: that many bytes (of any number of slices) have none."""
        number = offset >> self._slice_shift
        table = self._cache.get(self.tag + number)
        if table is None:
            gap = self.absent(offset, length)
            if gap:
                return gap, None
            table = await self.slice(number)
        if table.kinds is None:
            table.kinds = self.decoder.kinds(table.words)
        return min(length, ((number + 1) << self._slice_shift) - offset), table

    async def kinds(self, offset: int, length: int) -> tuple[int, bytes | None, int]:
        """The kinds of the clusters of a part of the disk, for walking a long way.

        A slice that is not cached and that the range leaves behind is not kept: a walk over a large disk
        drops nothing that reads and writes need. What is cached may be newer than the file.

        Returns:
            how many bytes of the range, from its start, are told; letters of EntryKind for whole clusters
            that cover them, or None if they have no tables; and where the first of these clusters begins.
        """
        number = offset >> self._slice_shift
        begin, end = number << self._slice_shift, (number + 1) << self._slice_shift
        if offset + length > end and self.tag + number not in self.tables:
            gap = self.absent(offset, length)
            if gap:
                return gap, None, offset
            letters = await self._read_kinds(number)
            if letters is not None:
                return end - offset, letters, begin
        covered, table = await self.slice_kinds(offset, length)
        return covered, None if table is None else table.kinds, begin

    async def _read_kinds(self, number: int) -> bytes | None:
        """The kinds of a slice, from the file; None if meanwhile that has become the wrong place to look."""
        geometry = self.geometry
        index, within = divmod(number, geometry.slices_per_table)
        where = self.table_offset(index)
        raw = await self.file.pread(where + within * geometry.slice_bytes, geometry.slice_bytes)
        if self.table_offset(index) != where or self.tag + number in self.tables:
            return None
        return self.decoder.kinds_of(raw, "big")

    def runs_in(self, table: Table, offset: int, length: int) -> list[Mapping]:
        """The runs of a range inside the slice ``table``."""
        try:
            return self.decoder.runs(table.words, offset, length)
        except FormatError as error:
            raise self._corrupt_entry(offset, length, table, error) from error

    # -- complaints ----------------------------------------------------------------------------

    def _corrupt_entry(self, offset: int, length: int, table: Table, error: FormatError) -> CorruptError:
        """Name the first entry of the range that is at fault."""
        geometry = self.geometry
        start = offset & ~geometry.cluster_mask
        for guest in range(start, offset + length, geometry.cluster_size):
            try:
                self.decoder.runs(table.words, guest, geometry.cluster_size)
            except FormatError as found:
                return self.complain_entry(guest, found)
        return self.complain_entry(offset, error)

    def complain_entry(self, offset: int, error: FormatError) -> CorruptError:
        """The error for the L2 entry of the guest cluster at ``offset``, logged if it is news."""
        geometry = self.geometry
        index, entry = geometry.l1_index(offset), geometry.l2_index(offset)
        return self.complain(f"L2 table {index}, index {entry} (guest offset {offset:#x}): {error}")

    def complain(self, text: str) -> CorruptError:
        """The error to raise for a damaged place, logged if it is news."""
        error = CorruptError(self.file.path, text, errno=errno.EIO)
        if text not in self._complaints and len(self._complaints) < MAX_COMPLAINTS:
            self._complaints.add(text)
            log.error("%s", error)
        return error
