"""Geometry: every size, shift and index that follows from a header, computed once."""

from __future__ import annotations

from nbdbm.qcow2.constants import OFFSET_MASK, SUBCLUSTERS
from nbdbm.qcow2.header import Header

MAX_SLICE = 64 * 1024
"""Bytes of an L2 table that are read and kept at a time. A whole table of 2 MiB would cost a random
read 500 times its payload and push everything else out of the cache."""


class Geometry:
    """How guest offsets become table indices in one image. Immutable; sizes in bytes.

    A guest offset splits, from its least significant bit, like this::

        | L1 index | L2 index within the table              | offset within the cluster |
                   | slice of the table | index in the slice | <- cluster_bits --------> |
                                        | <- slice_shift -----------------------------> |
                   | <- l1_shift -----------------------------------------------------> |
    """

    __slots__ = (
        "cluster_bits",
        "cluster_mask",
        "cluster_size",
        "compressed_offset_mask",
        "compressed_sectors_shift",
        "extended_l2",
        "external_data",
        "l1_shift",
        "l2_bits",
        "l2_entries",
        "l2_entry_size",
        "misaligned_mask",
        "refcount_block_bits",
        "refcount_block_entries",
        "refcount_order",
        "slice_bytes",
        "slice_entries",
        "slice_shift",
        "slices_per_table",
        "subcluster_bits",
        "subcluster_size",
        "subclusters",
        "version",
        "words_per_entry",
    )

    def __init__(self, header: Header) -> None:
        self.version = header.version
        self.cluster_bits = header.cluster_bits
        self.cluster_size = 1 << self.cluster_bits
        self.cluster_mask = self.cluster_size - 1
        self.misaligned_mask = OFFSET_MASK & self.cluster_mask
        """Offset bits of a table entry that no cluster-aligned offset has."""
        self.extended_l2 = header.extended_l2
        self.external_data = header.has_data_file

        self.l2_entry_size = 16 if self.extended_l2 else 8
        self.words_per_entry = self.l2_entry_size // 8
        self.l2_entries = self.cluster_size // self.l2_entry_size
        self.l2_bits = self.l2_entries.bit_length() - 1
        self.l1_shift = self.cluster_bits + self.l2_bits
        """Guest offset >> l1_shift is the L1 index."""
        self.slice_bytes = min(self.cluster_size, MAX_SLICE)
        self.slice_entries = self.slice_bytes // self.l2_entry_size
        self.slices_per_table = self.cluster_size // self.slice_bytes
        self.slice_shift = self.cluster_bits + self.slice_entries.bit_length() - 1
        """Guest offset >> slice_shift numbers the slices of the whole disk."""

        self.subclusters = SUBCLUSTERS if self.extended_l2 else 1
        """Per cluster."""
        self.subcluster_size = self.cluster_size // self.subclusters
        self.subcluster_bits = self.subcluster_size.bit_length() - 1

        self.compressed_sectors_shift = 62 - (self.cluster_bits - 8)
        """Compressed Clusters Descriptor: bit x."""
        self.compressed_offset_mask = (1 << self.compressed_sectors_shift) - 1

        self.refcount_order = header.refcount_order
        self.refcount_block_bits = self.cluster_bits + 3 - self.refcount_order
        self.refcount_block_entries = 1 << self.refcount_block_bits
        """Refcounts in one block, which is one cluster."""

    def l1_index(self, offset: int) -> int:
        """Index of the L1 entry for a guest offset."""
        return offset >> self.l1_shift

    def l2_index(self, offset: int) -> int:
        """Index within its L2 table of the entry for a guest offset."""
        return (offset >> self.cluster_bits) & (self.l2_entries - 1)

    def l1_entries(self, size: int) -> int:
        """L1 entries that a disk of ``size`` bytes needs."""
        return -(-size >> self.l1_shift)

    def clusters(self, length: int) -> int:
        """Clusters that ``length`` bytes from a cluster's start touch."""
        return -(-length >> self.cluster_bits)

    def refcount_table_index(self, host_offset: int) -> int:
        """Index of the refcount table entry for a host offset."""
        return host_offset >> (self.cluster_bits + self.refcount_block_bits)

    def refcount_block_index(self, host_offset: int) -> int:
        """Index within its refcount block of the count for a host offset."""
        return (host_offset >> self.cluster_bits) & (self.refcount_block_entries - 1)
