"""Mapping: what an L2 table says about guest clusters. Nobody else looks into its entries.

Specification: "Cluster mapping", "Extended L2 Entries". There are two ways through a table:
``L2Decoder.runs`` walks entries one by one and gives host offsets, for reading; ``L2Decoder.kinds``
classifies a whole table at C speed and gives one letter per entry, for block status.
"""

from __future__ import annotations

import functools
import sys
from array import array
from collections.abc import Callable
from enum import IntEnum
from typing import Literal, NamedTuple

from nbdbm.errors import FormatError
from nbdbm.qcow2.constants import COMPRESSED, COPIED, L1_RESERVED_MASK, L2_RESERVED_MASK, OFFSET_MASK, ZERO
from nbdbm.qcow2.geometry import Geometry
from nbdbm.runs import classify

ALL = 0xFFFF_FFFF
"""All subclusters of a cluster."""


class Kind(IntEnum):
    """Where the bytes of a range come from."""

    UNALLOCATED = 0
    """The backing file, or zeroes."""
    ZERO = 1
    """Zeroes; no host cluster."""
    ZERO_ALLOCATED = 2
    """Zeroes, with a host cluster set aside."""
    DATA = 3
    """The host cluster."""
    COMPRESSED = 4


class Mapping(NamedTuple):
    """``length`` guest bytes of one kind."""

    kind: Kind
    length: int
    host: int
    """DATA and ZERO_ALLOCATED: the host offset of the first byte. COMPRESSED: the L2 entry, for
    ``CompressedDescriptor.parse``; such a mapping never exceeds its cluster. Otherwise 0."""


UNALLOCATED, ZEROES, ZERO_ALLOCATED, DATA, PACKED = Kind
UNKNOWN = -1
"""Returned by ``L2Decoder.locate``: more than one mapping, or one that needs a closer look."""
ABSENT = -2
"""Returned by ``L2Decoder.locate``: the whole range is unallocated."""
BLANK = -3
"""Returned by ``L2Decoder.locate``: the whole range reads as zeroes."""


class EntryKind:
    """The letters of ``L2Decoder.kinds``."""

    UNALLOCATED = b"U"
    ZERO = b"Z"
    ZERO_ALLOCATED = b"A"
    DATA = b"D"
    COMPRESSED = b"C"
    MIXED = b"M"
    """Subclusters differ: ``runs`` tells more."""
    INVALID = b"X"
    """``runs`` raises the FormatError."""


def l2_table_offset(geometry: Geometry, entry: int) -> int:
    """The host offset of the L2 table that an L1 entry points to, 0 if there is none.

    Raises:
        FormatError: reserved bits, or an unaligned offset.
    """
    if entry & L1_RESERVED_MASK:
        raise FormatError("L1 entry", entry, "reserved bits are set")
    if entry & geometry.misaligned_mask:
        raise FormatError("L1 entry", entry, f"the L2 table is not aligned to {geometry.cluster_size} bytes")
    return entry & OFFSET_MASK


class L2Decoder:
    """Reads L2 entries of one image, strictly: whatever breaks the format's rules is a FormatError.

    Tables come as slices: ``array("Q")`` in native byte order, one word per entry, or two with
    extended L2 entries.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self._wrong = L2_RESERVED_MASK | geometry.misaligned_mask
        if geometry.version < 3 or geometry.extended_l2:
            self._wrong |= ZERO
        self._unusual = COMPRESSED | ZERO | self._wrong
        """Bits that a plain data entry has not."""
        self._masks = (OFFSET_MASK, self._wrong, COMPRESSED, COPIED, ZERO & ~self._wrong)
        """Bits that make up the first five facts (see below) about a standard entry."""
        self._plain = not geometry.extended_l2 and not geometry.external_data
        self._cluster_bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._cluster_mask = geometry.cluster_mask
        self._index_mask = geometry.slice_entries - 1
        self.runs: Callable[[array[int], int, int], list[Mapping]] = (
            self._extended_runs if geometry.extended_l2 else self._standard_runs
        )
        """(slice, guest offset, length) -> mappings that cover the range, which must lie in the slice."""

    # -- one request ---------------------------------------------------------------------------

    def locate(self, words: array[int], offset: int, length: int) -> int:
        """The host offset if the range is data in one piece, else ABSENT, BLANK or UNKNOWN.

        The range must lie in the slice. This is the short way for small reads: it knows only the
        plain cases.
        """
        within = offset & self._cluster_mask
        if self._plain and within + length <= self._cluster_size:
            entry = words[(offset >> self._cluster_bits) & self._index_mask]
            if not entry & self._unusual:
                host = entry & OFFSET_MASK
                return host + within if host else ABSENT
        return self._locate_run(words, offset, length)

    def _locate_run(self, words: array[int], offset: int, length: int) -> int:
        index = (offset >> self._cluster_bits) & self._index_mask
        if words[2 * index if self.geometry.extended_l2 else index] & COMPRESSED:
            return UNKNOWN  # whatever follows; to look at all of it would be in vain
        try:
            runs = self.runs(words, offset, length)
        except FormatError:
            return UNKNOWN
        kind, _, host = runs[0]
        if len(runs) == 1:
            if kind == DATA:
                return host
            if kind == UNALLOCATED:
                return ABSENT
            if kind in (ZEROES, ZERO_ALLOCATED):
                return BLANK
        return UNKNOWN

    def _standard_runs(self, words: array[int], offset: int, length: int) -> list[Mapping]:
        geometry = self.geometry
        size = geometry.cluster_size
        within = offset & geometry.cluster_mask
        index = (offset >> geometry.cluster_bits) & (geometry.slice_entries - 1)
        unusual = self._unusual
        external = geometry.external_data
        runs: list[Mapping] = []
        kind: Kind | None = None
        start = covered = 0
        while length > 0:
            entry = words[index]
            index += 1
            part = size - within
            if part > length:
                part = length
            if not entry & unusual and not external:
                host = entry & OFFSET_MASK
                here = DATA if host else UNALLOCATED
            else:
                here, host = self._standard(entry, offset - within)
            if here is DATA or here is ZERO_ALLOCATED:
                host += within
                joins = here is kind and host == start + covered
            else:
                joins = here is kind and here is not PACKED
            if joins:
                covered += part
            else:
                if kind is not None:
                    runs.append(Mapping(kind, covered, start))
                kind, start, covered = here, host, part
            offset += part
            length -= part
            within = 0
        assert kind is not None
        runs.append(Mapping(kind, covered, start))
        return runs

    def _standard(self, entry: int, guest: int) -> tuple[Kind, int]:
        """Kind and host offset (or the entry itself) of one standard entry for the cluster at ``guest``."""
        if entry & COMPRESSED:
            self._check_compressed(entry)
            return PACKED, entry
        self._check_bits(entry)
        host = entry & OFFSET_MASK
        if entry & ZERO:
            if not host:
                return ZEROES, 0
            self._check_external(entry, host, guest)
            return ZERO_ALLOCATED, host
        if self._has_cluster(entry):
            self._check_external(entry, host, guest)
            return DATA, host
        return UNALLOCATED, 0

    def _extended_runs(self, words: array[int], offset: int, length: int) -> list[Mapping]:
        geometry = self.geometry
        size = geometry.cluster_size
        within = offset & geometry.cluster_mask
        at = 2 * ((offset >> geometry.cluster_bits) & (geometry.slice_entries - 1))
        runs: list[Mapping] = []
        while length > 0:
            entry, bitmap = words[at], words[at + 1]
            at += 2
            part = min(size - within, length)
            for kind, pieces, host in self._extended(entry, bitmap, offset - within, within, part):
                last = runs[-1] if runs else None
                if last is not None and last.kind is kind and kind is not PACKED:
                    placed = kind is DATA or kind is ZERO_ALLOCATED
                    if not placed or last.host + last.length == host:
                        runs[-1] = Mapping(kind, last.length + pieces, last.host)
                        continue
                runs.append(Mapping(kind, pieces, host))
            offset += part
            length -= part
            within = 0
        return runs

    def _extended(self, entry: int, bitmap: int, guest: int, within: int, length: int) -> list[Mapping]:
        """``length`` bytes from ``within`` of the cluster at ``guest``, neighbouring subclusters merged."""
        if entry & COMPRESSED:
            self._check_compressed(entry)
            return [Mapping(PACKED, length, entry)]
        self._check_bits(entry)
        host = entry & OFFSET_MASK
        present = self._has_cluster(entry)
        if present:
            self._check_external(entry, host, guest)
        data, zero = bitmap & ALL, bitmap >> 32
        if data & zero:
            raise FormatError("L2 entry's bitmap", bitmap, "a subcluster is both allocated and zero")
        if data and not present:
            raise FormatError("L2 entry's bitmap", bitmap, "subclusters are allocated without a host cluster")
        shift = self.geometry.subcluster_bits
        size = 1 << shift
        runs: list[Mapping] = []
        while length > 0:
            sub = within >> shift
            bit = 1 << sub
            if data & bit:
                kind, same = DATA, data
            elif zero & bit:
                kind, same = (ZERO_ALLOCATED if present else ZEROES), zero
            else:
                kind, same = UNALLOCATED, ~(data | zero) & ALL
            # Ones from this subcluster up: how many are alike.
            alike = ~(same >> sub)
            count = (alike & -alike).bit_length() - 1
            part = min((count << shift) - (within & (size - 1)), length)
            where = host + within if kind is DATA or kind is ZERO_ALLOCATED else 0
            runs.append(Mapping(kind, part, where))
            within += part
            length -= part
        return runs

    def _has_cluster(self, entry: int) -> bool:
        """Whether a standard descriptor names a host cluster: offset 0 is one in a data file only."""
        return bool(entry & OFFSET_MASK) or bool(self.geometry.external_data and entry & COPIED)

    def _check_bits(self, entry: int) -> None:
        if entry & self._wrong:
            geometry = self.geometry
            if entry & L2_RESERVED_MASK:
                raise FormatError("L2 entry", entry, "reserved bits are set")
            if entry & geometry.misaligned_mask:
                size = geometry.cluster_size
                raise FormatError("L2 entry", entry, f"the cluster is not aligned to {size} bytes")
            what = "with extended L2 entries" if geometry.extended_l2 else "in version 2"
            raise FormatError("L2 entry", entry, f"bit 0 (reads as zeroes) is reserved {what}")

    def _check_compressed(self, entry: int) -> None:
        if self.geometry.external_data:
            raise FormatError("L2 entry", entry, "compressed clusters cannot be in an external data file")

    def _check_external(self, entry: int, host: int, guest: int) -> None:
        if self.geometry.external_data and host != guest:
            raise FormatError("L2 entry", entry, f"in a data file the cluster must lie at its own {guest:#x}")

    # -- whole tables --------------------------------------------------------------------------

    def kinds(self, words: array[int]) -> bytes:
        """One letter of EntryKind per entry of the slice."""
        return self.kinds_of(words.tobytes(), sys.byteorder)

    def kinds_of(self, raw: bytes, byteorder: Literal["little", "big"]) -> bytes:
        """One letter of EntryKind per entry of any number of entries; in the file they are big-endian.

        The words are taken apart into eight strips, one per byte of an entry. Each strip is translated
        to facts about the entry (one bit per fact), the strips are ORed as big integers, and the
        result is translated to letters: a dozen C calls whatever the slice holds. Compiled, standard entries
        are looked at one by one, by the same facts and letters, in a fifth of the time.
        """
        geometry = self.geometry
        tables, letters = _classifier(self._wrong, geometry.extended_l2, geometry.external_data, byteorder)
        if classify is not None and not geometry.extended_l2:
            return classify(raw, byteorder != sys.byteorder, self._masks, letters[:32])
        stride = geometry.l2_entry_size
        count = len(raw) // stride
        if raw == bytes(len(raw)):
            return EntryKind.UNALLOCATED * count
        facts = 0
        uniform = 0
        for at, table in enumerate(tables):
            strip = raw[at::stride]
            if strip == strip[:1] * count:
                # Most strips of most tables: flags, low and high offset bytes.
                uniform |= table[strip[0]]
            else:
                facts |= int.from_bytes(strip.translate(table), "little")
        if not facts:
            return letters[uniform : uniform + 1] * count
        if uniform:
            facts |= int.from_bytes(bytes((uniform,)) * count, "little")
        return facts.to_bytes(count, "little").translate(letters)


# Facts about an entry, one bit each.
HAS_OFFSET = 1
WRONG = 2
IS_COMPRESSED = 4
IS_COPIED = 8
ZERO_SOME = 16
ZERO_NOT_ALL = 32
DATA_SOME = 64
DATA_NOT_ALL = 128


@functools.cache
def _classifier(wrong: int, extended: bool, external: bool, byteorder: str) -> tuple[list[bytes], bytes]:
    """Translation tables: one per byte of an entry in memory order, and one from facts to letters."""

    def descriptor_facts(value: int) -> int:
        """``value``: the entry with all but one byte zero."""
        facts = 0
        if value & OFFSET_MASK:
            facts |= HAS_OFFSET
        if value & wrong:
            facts |= WRONG
        if value & COMPRESSED:
            facts |= IS_COMPRESSED
        if value & COPIED:
            facts |= IS_COPIED
        if value & ZERO and not wrong & ZERO:
            facts |= ZERO_SOME
        return facts

    def bitmap_facts(position: int, value: int) -> int:
        some, not_all = (DATA_SOME, DATA_NOT_ALL) if position < 4 else (ZERO_SOME, ZERO_NOT_ALL)
        return (some if value else 0) | (not_all if value != 0xFF else 0)

    # Position 0 is the least significant byte.
    tables = [bytes(descriptor_facts(v << 8 * p) for v in range(256)) for p in range(8)]
    bitmaps = [bytes(bitmap_facts(p, v) for v in range(256)) for p in range(8)]
    if byteorder == "big":
        tables.reverse()
        bitmaps.reverse()
    if extended:
        tables += bitmaps
    letter = _extended_letter if extended else _standard_letter
    letters = b"".join(
        (EntryKind.INVALID if external else EntryKind.COMPRESSED)
        if facts & IS_COMPRESSED
        else EntryKind.INVALID
        if facts & WRONG
        else letter(facts, bool(facts & HAS_OFFSET or (external and facts & IS_COPIED)))
        for facts in range(256)
    )
    return tables, letters


def _standard_letter(facts: int, present: bool) -> bytes:
    if facts & ZERO_SOME:
        return EntryKind.ZERO_ALLOCATED if facts & HAS_OFFSET else EntryKind.ZERO
    return EntryKind.DATA if present else EntryKind.UNALLOCATED


def _extended_letter(facts: int, present: bool) -> bytes:
    if facts & DATA_SOME and not present:
        return EntryKind.INVALID
    if not facts & DATA_NOT_ALL:
        return EntryKind.INVALID if facts & ZERO_SOME else EntryKind.DATA
    if not facts & ZERO_NOT_ALL:
        if facts & DATA_SOME:
            return EntryKind.INVALID
        return EntryKind.ZERO_ALLOCATED if present else EntryKind.ZERO
    return EntryKind.MIXED if facts & (DATA_SOME | ZERO_SOME) else EntryKind.UNALLOCATED


def count_used(block: bytes, order: int) -> int:
    """How many refcounts of a refcount block are not zero; ``order`` is the header's refcount_order."""
    if block == bytes(len(block)):
        return 0
    if order >= 3:
        width = 1 << (order - 3)
        used = int.from_bytes(block[0::width], "little")
        for at in range(1, width):
            used |= int.from_bytes(block[at::width], "little")
        count = len(block) // width
        return count - used.to_bytes(count, "little").count(0)
    bits = 1 << order
    per_byte = bytes(
        sum(1 for shift in range(0, 8, bits) if value >> shift & ((1 << bits) - 1)) for value in range(256)
    )
    return sum(block.translate(per_byte))
