"""The numbers of the qcow2 format (QEMU's docs/interop/qcow2), and the limits put on outside data."""

from __future__ import annotations

from enum import IntEnum, IntFlag

MAGIC = 0x514649FB
"""``QFI\\xfb``, the first four bytes of every image."""

V2_HEADER_LENGTH = 72
V3_MIN_HEADER_LENGTH = 104
V2_REFCOUNT_ORDER = 4
"""Version 2 has no such field: its refcounts are always 16 bits wide."""

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
"""Bits 9-55: a host offset in an L1, a standard L2, or a bitmap table entry."""
REFTABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
"""Bits 9-63: the host offset in a refcount table entry."""

COPIED = 1 << 63
"""L1 and L2 entries: what is pointed to has a refcount of exactly one."""
COMPRESSED = 1 << 62
"""L2 entries: a compressed cluster descriptor."""
ZERO = 1 << 0
"""Standard L2 entries: the cluster reads as zeroes (not with version 2 or extended L2 entries)."""
L1_RESERVED_MASK = 0x7F00_0000_0000_01FF
L2_RESERVED_MASK = 0x3F00_0000_0000_01FE
"""Standard cluster descriptor; bit 0 is reserved too where it cannot mean ZERO."""
REFTABLE_RESERVED_MASK = 0x1FF

SUBCLUSTERS = 32
"""Per cluster, with extended L2 entries."""
COMPRESSED_SECTOR = 512
"""Bytes; the unit of a compressed cluster's length."""

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_EXTENDED_L2_CLUSTER_BITS = 14
"""So that a subcluster is at least 512 bytes."""
MAX_REFCOUNT_ORDER = 6

# QEMU's limits: an image beyond them opens nowhere, and the tables below are held in memory.
MAX_L1_SIZE = 32 * 1024 * 1024
"""Bytes; held in memory."""
MAX_REFTABLE_SIZE = 8 * 1024 * 1024
"""Bytes; held in memory when writing."""
MAX_BACKING_NAME = 1023
"""Bytes."""
MAX_BACKING_FORMAT = 15
"""Bytes; no driver's name is longer."""
MAX_DATA_FILE_NAME = 1023
"""Bytes; ours: QEMU has no limit, but opens no longer name as a file."""
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE = 1024 * MAX_SNAPSHOTS
"""Bytes; read as a whole."""
MAX_SNAPSHOT_EXTRA = 1024
"""Bytes per snapshot."""
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY = 1024 * MAX_BITMAPS
"""Bytes; read as a whole."""
MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31
MAX_BITMAP_NAME = 1023
"""Bytes."""
MAX_BITMAP_TABLE = 0x8000000
"""Entries."""
MAX_BITMAP_DATA = 512 * 1024 * 1024
"""Bytes of bits of one bitmap; the greatest part of what it costs in memory."""


class IncompatFeature(IntFlag):
    """Incompatible features: an unknown one forbids opening."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


class CompatFeature(IntFlag):
    """Compatible features: an unknown one may be ignored."""

    LAZY_REFCOUNTS = 1 << 0


class AutoclearFeature(IntFlag):
    """Autoclear features: an unknown one is cleared before writing."""

    BITMAPS = 1 << 0
    RAW_DATA_FILE = 1 << 1


KNOWN_INCOMPATIBLE = sum(IncompatFeature)
KNOWN_AUTOCLEAR = sum(AutoclearFeature)


class CryptMethod(IntEnum):
    """Header field crypt_method."""

    NONE = 0
    AES = 1
    LUKS = 2


class CompressionType(IntEnum):
    """Header field compression_type."""

    ZLIB = 0
    ZSTD = 1


class ExtensionType(IntEnum):
    """Header extension types."""

    END = 0x00000000
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


class FeatureKind(IntEnum):
    """Which field an entry of the feature name table is about."""

    INCOMPATIBLE = 0
    COMPATIBLE = 1
    AUTOCLEAR = 2


class BitmapFlag(IntFlag):
    """Flags of a bitmap directory entry, 32 bits; the others are reserved."""

    IN_USE = 1 << 0
    AUTO = 1 << 1
    EXTRA_DATA_COMPATIBLE = 1 << 2


KNOWN_BITMAP_FLAGS = sum(BitmapFlag)

BITMAP_TYPE_DIRTY = 1
"""The one bitmap type there is: a dirty tracking bitmap."""

BITMAP_ALL_ONES = 1 << 0
"""Bitmap table entries without an offset: every bit of the cluster is set."""
BITMAP_ENTRY_RESERVED_MASK = 0xFF00_0000_0000_01FE
