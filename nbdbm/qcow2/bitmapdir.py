"""The bitmaps extension, the bitmap directory and bitmap tables, as values.

Specification: "Bitmaps extension", "Bitmap directory", "Bitmap table". Three levels of trust:

    BitmapsExtension   judged as a whole: without it no bitmap can be found
    parse_directory    judged as a whole: where one entry ends the next begins
    DirectoryEntry     each judged by itself (``refusal``): one bad bitmap leaves its neighbours alone
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from nbdbm.errors import FormatError
from nbdbm.qcow2.constants import (
    BITMAP_ALL_ONES,
    BITMAP_ENTRY_RESERVED_MASK,
    BITMAP_TYPE_DIRTY,
    KNOWN_BITMAP_FLAGS,
    MAX_BITMAP_DATA,
    MAX_BITMAP_DIRECTORY,
    MAX_BITMAP_NAME,
    MAX_BITMAP_TABLE,
    MAX_BITMAPS,
    MAX_GRANULARITY_BITS,
    MIN_GRANULARITY_BITS,
    OFFSET_MASK,
    BitmapFlag,
    ExtensionType,
)
from nbdbm.qcow2.extensions import Buffer, HeaderExtension

EXTENSION_DATA = struct.Struct(">IIQQ")
ENTRY = struct.Struct(">QIIBBHI")
"""A directory entry's fixed part."""
FLAGS_AT = 12
"""Where an entry's flags are, from its start: 4 bytes, 4-aligned, so never torn by a sector's end."""

# Plain numbers: an operation on an IntFlag costs a microsecond, and a directory has up to 65535 entries.
_IN_USE = BitmapFlag.IN_USE.value
_AUTO = BitmapFlag.AUTO.value
_EXTRA_DATA_COMPATIBLE = BitmapFlag.EXTRA_DATA_COMPATIBLE.value


class BitmapsExtension(NamedTuple):
    """The data of the bitmaps header extension; bytes."""

    nb_bitmaps: int
    directory_size: int
    directory_offset: int

    @classmethod
    def parse(cls, data: Buffer) -> BitmapsExtension:
        """Read the extension's data, 24 bytes exactly.

        Raises:
            FormatError: the length is another.
        """
        if len(data) != EXTENSION_DATA.size:
            raise FormatError("length of the bitmaps extension", len(data), "must be 24 bytes")
        nb_bitmaps, _, size, offset = EXTENSION_DATA.unpack(data)
        return cls(nb_bitmaps, size, offset)

    def pack(self) -> bytes:
        """The 24 bytes of the extension's data."""
        return EXTENSION_DATA.pack(self.nb_bitmaps, 0, self.directory_size, self.directory_offset)

    def to_extension(self) -> HeaderExtension:
        """As a header extension."""
        return HeaderExtension(ExtensionType.BITMAPS, self.pack())

    def validate(self, cluster_size: int, file_size: int) -> None:
        """Judge number, size and place of the directory, before it is read.

        Raises:
            FormatError: no directory can be read there.
        """
        if not 1 <= self.nb_bitmaps <= MAX_BITMAPS:
            raise FormatError("nb_bitmaps", self.nb_bitmaps, f"must be 1 to {MAX_BITMAPS}")
        if not 1 <= self.directory_size <= MAX_BITMAP_DIRECTORY:
            raise FormatError(
                "bitmap_directory_size", self.directory_size, f"must be 1 to {MAX_BITMAP_DIRECTORY}"
            )
        offset = self.directory_offset
        if not offset or offset % cluster_size:
            raise FormatError(
                "bitmap_directory_offset",
                offset,
                f"must be a multiple of the cluster size ({cluster_size}), not 0",
            )
        if offset + self.directory_size > file_size:
            raise FormatError(
                "bitmap_directory_offset",
                offset,
                f"{self.directory_size} bytes from there reach past the file's end ({file_size})",
            )


class DirectoryEntry(NamedTuple):
    """One bitmap as the directory describes it, verbatim; ``table_offset`` in bytes.

    Well-formed only in so far as it can be walked; whether it can be used is ``refusal``'s question.
    """

    table_offset: int
    table_size: int
    """Entries."""
    flags: int
    type: int
    granularity_bits: int
    extra_data: bytes
    raw_name: bytes

    @classmethod
    def parse(cls, buf: Buffer, at: int = 0) -> tuple[DirectoryEntry, int]:
        """Read the entry at ``at``; return it and where the next one begins (a multiple of 8 further).

        Raises:
            FormatError: it reaches past the end of ``buf``.
        """
        left = len(buf) - at
        if left < ENTRY.size:
            raise FormatError("bitmap directory", None, f"ends {left} bytes into the entry at byte {at}")
        table_offset, table_size, flags, type_, granularity_bits, name_size, extra_size = ENTRY.unpack_from(
            buf, at
        )
        length = ENTRY.size + extra_size + name_size
        length += -length % 8
        if length > left:
            raise FormatError(
                "bitmap directory",
                None,
                f"the entry at byte {at} is {length} bytes long, but {left} are left",
            )
        name_at = at + ENTRY.size + extra_size
        entry = cls(
            table_offset,
            table_size,
            flags,
            type_,
            granularity_bits,
            bytes(buf[at + ENTRY.size : name_at]),
            bytes(buf[name_at : name_at + name_size]),
        )
        return entry, at + length

    def pack(self) -> bytes:
        """The entry, padded with zeroes to a multiple of 8 bytes."""
        packed = (
            ENTRY.pack(
                self.table_offset,
                self.table_size,
                self.flags,
                self.type,
                self.granularity_bits,
                len(self.raw_name),
                len(self.extra_data),
            )
            + self.extra_data
            + self.raw_name
        )
        return packed + bytes(-len(packed) % 8)

    @property
    def packed_size(self) -> int:
        """Bytes that the entry takes in the directory."""
        length = ENTRY.size + len(self.extra_data) + len(self.raw_name)
        return length + -length % 8

    @property
    def in_use(self) -> bool:
        """Not saved since it was last opened for writing: metadata and bits may be outdated."""
        return bool(self.flags & _IN_USE)

    @property
    def auto(self) -> bool:
        """The bitmap is enabled: every write must be recorded in it."""
        return bool(self.flags & _AUTO)

    @property
    def granularity(self) -> int:
        """Bytes of disk per bit."""
        return 1 << self.granularity_bits

    @property
    def name(self) -> str:
        """The name for messages and lookups; what is not UTF-8 is shown with backslashes."""
        return self.raw_name.decode("utf-8", "backslashreplace")

    def name_refusal(self) -> str | None:
        """Why the name cannot be used, or None. A bitmap is only ever addressed by its name."""
        if not 1 <= len(self.raw_name) <= MAX_BITMAP_NAME:
            return f"its name is {len(self.raw_name)} bytes long (1 to {MAX_BITMAP_NAME} are allowed)"
        try:
            self.raw_name.decode("utf-8")
        except UnicodeDecodeError:
            return "its name is not UTF-8"
        if b"\0" in self.raw_name:
            return "its name contains a NUL byte"
        return None

    def refusal(self, size: int, cluster_size: int, file_size: int) -> str | None:
        """Why this bitmap cannot be used with a disk of ``size`` bytes, or None.

        Of an IN_USE entry everything but name and type may be outdated ("the metadata (such as the auto
        flag or bitmap size) or data contents"), so nothing about its table is judged.
        """
        if reason := self.name_refusal():
            return reason
        if self.type != BITMAP_TYPE_DIRTY:
            return f"its type is {self.type} (only 1, dirty tracking, is known)"
        if reserved := self.flags & ~KNOWN_BITMAP_FLAGS:
            return f"reserved flags are set ({reserved:#x})"
        if self.extra_data and not self.flags & _EXTRA_DATA_COMPATIBLE:
            return f"it has {len(self.extra_data)} bytes of extra data that only other programs understand"
        if not MIN_GRANULARITY_BITS <= self.granularity_bits <= MAX_GRANULARITY_BITS:
            return f"granularity_bits is {self.granularity_bits} (9 to 31 are allowed)"
        if self.in_use:
            return None
        if bitmap_bytes(size, self.granularity) > MAX_BITMAP_DATA:
            return "its bits take more than 512 MiB"
        needed = table_entries(size, self.granularity, cluster_size)
        if self.table_size != needed or needed > MAX_BITMAP_TABLE:
            return (
                f"bitmap_table_size is {self.table_size}, but a disk of {size} bytes needs {needed} entries"
            )
        if self.table_offset % cluster_size or (not self.table_offset and needed):
            return f"bitmap_table_offset is {self.table_offset:#x}, not a multiple of {cluster_size} above 0"
        if self.table_offset + 8 * self.table_size > file_size:
            return f"bitmap_table_offset is {self.table_offset:#x}: the table reaches past the file's end"
        return None


def parse_directory(buf: Buffer, nb_bitmaps: int) -> list[DirectoryEntry]:
    """Every entry of the directory, in order.

    Raises:
        FormatError: the entries are not exactly ``nb_bitmaps`` or do not end exactly where ``buf`` does:
            then no boundary between them can be trusted.
    """
    entries: list[DirectoryEntry] = []
    at = 0
    while at < len(buf):
        if len(entries) == nb_bitmaps:
            raise FormatError(
                "bitmap directory", None, f"{len(buf) - at} bytes are left after all {nb_bitmaps} entries"
            )
        entry, at = DirectoryEntry.parse(buf, at)
        entries.append(entry)
    if len(entries) != nb_bitmaps:
        raise FormatError("nb_bitmaps", nb_bitmaps, f"the bitmap directory has {len(entries)} entries")
    return entries


def duplicate_names(entries: list[DirectoryEntry]) -> set[bytes]:
    """Names that more than one entry bears."""
    return {name for name, count in Counter(e.raw_name for e in entries).items() if count > 1}


def bitmap_bytes(size: int, granularity: int) -> int:
    """Bytes that the bits of a disk of ``size`` bytes take."""
    bits = -(-size // granularity)
    return -(-bits // 8)


def table_entries(size: int, granularity: int, cluster_size: int) -> int:
    """Bitmap table entries, which is clusters of bits, that a disk of ``size`` bytes takes."""
    return -(-bitmap_bytes(size, granularity) // cluster_size)


def table_refusal(table: tuple[int, ...], cluster_size: int, total: int, file_size: int) -> str | None:
    """Why a bitmap's table cannot be used, or None ("Bitmap table": reserved bits, alignment).

    Each of the ``total`` bytes of bits must lie inside the file: what is past its end would read as clean.
    """
    bad_bits = BITMAP_ENTRY_RESERVED_MASK | (cluster_size - 1)
    last = len(table) - 1
    highest = file_size - cluster_size
    for index, entry in enumerate(table):
        if not entry:
            continue
        if entry & bad_bits:
            if entry == BITMAP_ALL_ONES:
                continue
            if entry & BITMAP_ENTRY_RESERVED_MASK or (entry & BITMAP_ALL_ONES and entry & OFFSET_MASK):
                return f"entry {index} of its table is {entry:#x}: reserved bits are set"
            return f"entry {index} of its table is {entry:#x}: not a multiple of the cluster size"
        if entry > highest and not (index == last and entry + total - last * cluster_size <= file_size):
            return f"entry {index} of its table is {entry:#x}: past the file's end ({file_size})"
    return None


def data_runs(
    table: tuple[int, ...], cluster_size: int, total: int, limit: int
) -> Iterator[tuple[int, int, int | None]]:
    """What of ``total`` bytes of bits is not zero: (position, length, host offset), None for all ones.

    Clusters that lie next to each other in the file are read together, up to ``limit`` bytes (which is a
    multiple of the cluster size or less than it). The table was judged before.
    """
    entries = len(table)
    index = 0
    while index < entries:
        entry = table[index]
        if not entry:
            index += 1
            continue
        first = index
        index += 1
        if entry == BITMAP_ALL_ONES:
            while index < entries and table[index] == BITMAP_ALL_ONES:
                index += 1
        else:
            most = first + max(1, limit // cluster_size)
            following = entry + cluster_size
            while index < entries and index < most and table[index] == following:
                index += 1
                following += cluster_size
        at = first * cluster_size
        host = None if entry == BITMAP_ALL_ONES else entry
        yield at, min(index * cluster_size, total) - at, host
