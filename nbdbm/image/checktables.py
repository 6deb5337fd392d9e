"""L2 tables under a check: what they refer to is counted, and what they say is judged.

Most tables are plain: nothing compressed, nothing wrong. Those are taken as one big integer of 64-bit
lanes and go through a dozen C calls; the others are walked entry by entry, to the same result.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import sub
from typing import TYPE_CHECKING

from nbdbm.errors import FormatError
from nbdbm.qcow2.compressed import CompressedDescriptor
from nbdbm.qcow2.constants import COMPRESSED, COPIED, L2_RESERVED_MASK, OFFSET_MASK, ZERO

if TYPE_CHECKING:
    from nbdbm.image.check import Survey


class L2Tables:
    """The L2 tables of one walk; counts and findings go to ``survey``."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.report = survey.report
        self.geometry = geometry = survey.geometry
        self.bits = survey.bits
        self.size = survey.size
        unusual = COMPRESSED | L2_RESERVED_MASK | geometry.misaligned_mask
        if geometry.extended_l2 or geometry.version < 3:
            unusual |= ZERO
        entries = geometry.l2_entries
        self._ones = _lanes(1, entries)
        self._ramp = int.from_bytes(
            array("Q", range(0, entries << survey.bits, survey.size)).tobytes(), sys.byteorder
        )
        """Lane n: what the n-th entry of a table adds to the first one's if the clusters are contiguous."""
        self._unusual = _lanes(unusual, entries)
        self._offsets = _lanes(OFFSET_MASK, entries)
        self._copied = _lanes(COPIED, entries)
        self._low_halves = _lanes(0xFFFF_FFFF, entries)

    def check(self, name: str, raw: bytes, l1_index: int, active: bool) -> int:
        """Count what an L2 table refers to; return how many COPIED flags are wrong."""
        words = words_of(raw)
        bitmaps: array[int] | None = None
        if self.geometry.extended_l2:
            words, bitmaps = words[::2], words[1::2]
            if not self._plain_bitmaps(words, bitmaps):
                return self.entries(name, words, bitmaps, l1_index, active)
        if self.geometry.external_data:
            return self._external(name, words, bitmaps, l1_index, active)
        table = int.from_bytes(words.tobytes(), sys.byteorder)
        if table & self._unusual:
            return self.entries(name, words, bitmaps, l1_index, active)
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
        if (last if run else max(used)) >= self.survey.clusters:
            return self.entries(name, words, bitmaps, l1_index, active)
        if active:
            low = self.survey.stored.low
            ones = (low[first : last + 1] if run else bytes(map(low.__getitem__, used))).count(1)
            copied = (table & self._copied).bit_count()
            agree = copied == ones and copied in (0, len(used)) and not words.count(COPIED)
            if not agree or self.survey.unknown_blocks:
                # Mixed flags are right or wrong one by one.
                return self.entries(name, words, bitmaps, l1_index, active)
            self.report.allocated_clusters += len(used)
            if not run:
                self.report.fragmented_clusters += _breaks(used)
        if run:
            self.survey.counted.add_run(first, last + 1)
        else:
            self.survey.counted.add(used)
        return 0

    def _plain_bitmaps(self, words: array[int], bitmaps: array[int]) -> bool:
        """Whether no subcluster bitmap contradicts itself, or its entry."""
        flat = int.from_bytes(bitmaps.tobytes(), sys.byteorder)
        if flat >> 32 & flat & self._low_halves:
            return False
        return not any(bitmap & 0xFFFF_FFFF and not word for word, bitmap in zip(words, bitmaps, strict=True))

    def entries(
        self, name: str, words: array[int], bitmaps: array[int] | None, l1_index: int, active: bool
    ) -> int:
        """The slow twin of ``check``'s short way: entry by entry, whatever they hold."""
        report, geometry, size = self.report, self.geometry, self.size
        counted, shift, clusters = self.survey.counted, self.bits, self.survey.clusters
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
                if (
                    not has_data
                    and (not self.survey.zeroable or self.survey.zeroable[-1] != l1_index)
                    and zeroable
                ):
                    self.survey.zeroable.append(l1_index)
            allocated += 1
            if expected and offset != expected:
                fragmented += 1
            expected = offset + size
            cluster = offset >> shift
            if cluster < clusters and not offset & misaligned:
                counted.add((cluster,))
            else:
                self.survey.refer(offset, size, f"the cluster of entry {index} of {name}")
            if active and cluster < clusters and self.survey.known(cluster):
                stored = self.survey.stored[cluster]
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
        if last < self.survey.clusters:
            self.survey.counted.add((first,) if first == last else (first, last))
        else:
            self.survey.refer(
                where.host_offset, where.length, f"the compressed cluster of entry {index} of {name}"
            )
            self.survey.references_end = max(self.survey.references_end, last + 1)
        return copied

    def _external(
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


def words_of(raw: bytes) -> array[int]:
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
