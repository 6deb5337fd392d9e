"""L2Editor: changes entries of L2 tables, in RAM. The writing twin of ``mapping.L2Decoder``.

Specification: "Standard Cluster Descriptor", "Extended L2 Entries". Words are native integers, one per
entry, or two with extended L2 entries (descriptor, subcluster bitmap). Entries have been judged by
``L2Decoder.runs`` before they come here, except in ``in_place``, which judges for itself.
"""

from __future__ import annotations

from array import array

from nbdbm.qcow2.compressed import CompressedDescriptor
from nbdbm.qcow2.constants import COMPRESSED, COPIED, L2_RESERVED_MASK, OFFSET_MASK, ZERO
from nbdbm.qcow2.geometry import Geometry
from nbdbm.qcow2.mapping import ALL


class L2Editor:
    """Looks at and changes the entries of one image's L2 slices."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self._index_mask = geometry.slice_entries - 1
        self._cluster_bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._unusual = COMPRESSED | ZERO | L2_RESERVED_MASK | geometry.misaligned_mask
        self.own_mask = self._unusual | COPIED
        """Without subclusters, and with the data in this file: what an entry leads to may be overwritten if
        it has COPIED alone of these bits."""

    def slot(self, offset: int) -> int:
        """Index in the slice's words of the entry for a guest offset."""
        geometry = self.geometry
        return ((offset >> geometry.cluster_bits) & self._index_mask) * geometry.words_per_entry

    def in_place(self, words: array[int], offset: int, length: int) -> tuple[int, int]:
        """How much of the range, from its start, may be overwritten where it lies: (host offset, length).

        That is data in clusters that nobody else uses, in one piece. Length 0: nothing.
        """
        geometry = self.geometry
        size = geometry.cluster_size
        within = offset & geometry.cluster_mask
        at = self.slot(offset)
        start = total = 0
        while total < length:
            entry = words[at]
            if not entry & COPIED or entry & self._unusual:
                break
            host = entry & OFFSET_MASK
            if geometry.external_data:
                if host != offset + total - within:
                    break
            elif not host:
                break
            if not total:
                start = host + within
            elif host != start + total:
                break
            part = min(length - total, size - within)
            if geometry.extended_l2:
                usable = self._allocated_run(words[at + 1], within, part)
                total += usable
                if usable < part:
                    break
            else:
                total += part
            within = 0
            at += geometry.words_per_entry
        return start, total

    def _allocated_run(self, bitmap: int, within: int, length: int) -> int:
        """How many of ``length`` bytes from ``within`` the cluster on are in allocated subclusters."""
        shift = self.geometry.subcluster_bits
        if bitmap & bitmap >> 32:
            return 0  # both allocated and zero: not to be read, so nothing is to be written there
        if bitmap & ALL == ALL:
            return length
        first = within >> shift
        missing = ~(bitmap & ALL) >> first
        count = (missing & -missing).bit_length() - 1
        return max(0, min(length, ((first + count) << shift) - within))

    def blank(self, words: array[int], offset: int, length: int) -> int:
        """How many clusters from ``offset`` on, in the range and the slice, have an entry of zero: nothing
        is mapped there. 0 with extended L2 entries."""
        if self.geometry.extended_l2:
            return 0
        at = self.slot(offset)
        count = ((offset + length - 1) >> self._cluster_bits) - (offset >> self._cluster_bits) + 1
        raw = words[at : at + count].tobytes()
        return (len(raw) - len(raw.lstrip(b"\0"))) // words.itemsize

    def owned(self, words: array[int], offset: int) -> int | None:
        """The host cluster that the entry alone uses, data or not; None if there is none."""
        entry = words[self.slot(offset)]
        if entry & COMPRESSED or not entry & COPIED:
            return None
        host = entry & OFFSET_MASK
        return host if host or self.geometry.external_data else None

    def references(self, words: array[int], offset: int) -> range:
        """The host clusters (numbers) that the entry counts as a user of."""
        geometry = self.geometry
        entry = words[self.slot(offset)]
        if geometry.external_data:
            return range(0)
        if entry & COMPRESSED:
            place = CompressedDescriptor.parse(geometry, entry)
            last = place.host_offset + place.length - 1
            return range(place.host_offset >> geometry.cluster_bits, (last >> geometry.cluster_bits) + 1)
        host = entry & OFFSET_MASK
        return range(host >> geometry.cluster_bits, (host >> geometry.cluster_bits) + 1) if host else range(0)

    def keeps_subclusters(self, words: array[int], offset: int) -> bool:
        """Whether subclusters outside of a write may stay as they are when the entry gets a host cluster."""
        entry = words[self.slot(offset)]
        return self.geometry.extended_l2 and not entry & COMPRESSED and not words[self.slot(offset) + 1] & ALL

    def link(self, words: array[int], offset: int, host: int, within: int, length: int) -> None:
        """Make ``length`` bytes from ``within`` the cluster data in the host cluster at ``host``.

        Whole subclusters; the others stay as they are. Without extended L2 entries: the whole cluster.
        """
        at = self.slot(offset)
        if self.geometry.extended_l2:
            mask = self._mask(within, length)
            bitmap = words[at + 1]
            if words[at] & COMPRESSED:
                bitmap = 0
            words[at + 1] = (bitmap | mask) & ~(mask << 32)
        words[at] = host | COPIED

    def link_blank(self, words: array[int], offset: int, host: int, count: int) -> None:
        """Make ``count`` blank clusters from ``offset`` on data in adjacent host clusters from ``host`` on:
        ``link`` for all of them at once."""
        at = self.slot(offset)
        first = host | COPIED
        words[at : at + count] = array(
            "Q", range(first, first + count * self._cluster_size, self._cluster_size)
        )

    def zero(self, words: array[int], offset: int, host: int | None) -> None:
        """Make the whole cluster read as zeroes, with a host cluster of its own set aside, or none."""
        at = self.slot(offset)
        if self.geometry.extended_l2:
            words[at] = 0 if host is None else host | COPIED
            words[at + 1] = ALL << 32
        else:
            words[at] = ZERO if host is None else host | COPIED | ZERO

    def zero_subclusters(self, words: array[int], offset: int, within: int, length: int) -> None:
        """Make whole subclusters read as zeroes. Extended L2 entries only; not of a compressed cluster."""
        at = self.slot(offset)
        mask = self._mask(within, length)
        words[at + 1] = (words[at + 1] & ~mask) | mask << 32

    def unallocate(self, words: array[int], offset: int) -> None:
        """Make the whole cluster unallocated."""
        at = self.slot(offset)
        words[at] = 0
        if self.geometry.extended_l2:
            words[at + 1] = 0

    def _mask(self, within: int, length: int) -> int:
        shift = self.geometry.subcluster_bits
        first, last = within >> shift, (within + length - 1) >> shift
        return ((1 << (last - first + 1)) - 1) << first
