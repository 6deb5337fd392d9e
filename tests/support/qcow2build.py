"""A small builder of qcow2 images, byte by byte from the specification, and patches for existing ones.

It shares no code with nbdbm.qcow2, so that the two can disagree. What it builds is clean (``qemu-img check``
finds nothing) unless told otherwise: every field can be overridden, entries are taken as given.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FIELDS: dict[str, tuple[int, str]] = {
    "magic": (0, ">I"),
    "version": (4, ">I"),
    "backing_file_offset": (8, ">Q"),
    "backing_file_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible_features": (72, ">Q"),
    "compatible_features": (80, ">Q"),
    "autoclear_features": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
    "compression_type": (104, ">B"),
}
"""Header field -> (offset, format)."""

EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_DATA_FILE = 0x44415441

IN_USE, AUTO, EXTRA_COMPATIBLE = 1, 2, 4
COPIED = 1 << 63


@dataclass
class Bitmap:
    """A bitmap to build. With ``table`` its entries are taken as given; else ``bits`` are laid out in
    clusters, all-zero and all-one clusters by their short forms."""

    name: bytes
    bits: bytes = b""
    """As in the file: bit 0 is the least significant of byte 0; missing ones are 0."""
    granularity_bits: int = 16
    flags: int = AUTO
    type: int = 1
    extra_data: bytes = b""
    table: Sequence[int] | None = None
    table_offset: int | None = None
    """Overrides what the entry says."""
    table_size: int | None = None
    """Overrides what the entry says."""


@dataclass
class Image:
    """An image to build; ``build`` gives its bytes."""

    size: int = 1 << 20
    version: int = 3
    cluster_bits: int = 16
    refcount_order: int = 4
    header_length: int = 112
    incompatible: int = 0
    compatible: int = 0
    autoclear: int | None = None
    """None: bit 0 if there are bitmaps."""
    compression_type: int = 0
    backing: bytes = b""
    extensions: list[tuple[int, bytes]] = field(default_factory=list)
    end: bool = True
    """Close the extensions with END."""
    unknown_fields: bytes = b""
    """Behind compression_type."""
    clusters: dict[int, bytes | int] = field(default_factory=dict)
    """Guest cluster -> its data, or the L2 entry as given."""
    bitmaps: list[Bitmap] = field(default_factory=list)
    nb_bitmaps: int | None = None
    directory_size: int | None = None
    directory_padding: bytes = b""
    """Bytes behind the last entry, counted in the directory's size."""
    header: dict[str, int] = field(default_factory=dict)
    """Overrides of header fields, by their names in ``FIELDS``."""

    def build(self) -> bytes:
        return _Layout(self).build()


class _Layout:
    def __init__(self, image: Image) -> None:
        self.image = image
        self.cluster = 1 << image.cluster_bits
        self.data = bytearray(self.cluster)

    def allocate(self, content: bytes) -> int:
        """Append ``content``, padded to whole clusters; return where."""
        offset = len(self.data)
        self.data += content + bytes(-len(content) % self.cluster)
        return offset

    def build(self) -> bytes:
        image = self.image
        l1_offset, l1_size = self.mapping()
        extensions = list(image.extensions)
        if image.bitmaps or image.nb_bitmaps:
            extensions.append((EXT_BITMAPS, self.bitmaps()))
        reftable_offset, reftable_clusters = self.refcounts()
        autoclear = image.autoclear
        if autoclear is None:
            autoclear = 1 if image.bitmaps else 0

        length = 72 if image.version == 2 else image.header_length
        area = b"".join(
            struct.pack(">II", type_, len(data)) + data + bytes(-len(data) % 8) for type_, data in extensions
        )
        if image.end:
            area += bytes(8)
        fields = {
            "magic": 0x514649FB,
            "version": image.version,
            "backing_file_offset": length + len(area) if image.backing else 0,
            "backing_file_size": len(image.backing),
            "cluster_bits": image.cluster_bits,
            "size": image.size,
            "l1_size": l1_size,
            "l1_table_offset": l1_offset,
            "refcount_table_offset": reftable_offset,
            "refcount_table_clusters": reftable_clusters,
            "incompatible_features": image.incompatible,
            "compatible_features": image.compatible,
            "autoclear_features": autoclear,
            "refcount_order": image.refcount_order,
            "header_length": length,
            "compression_type": image.compression_type,
        }
        fields.update(image.header)
        head = bytearray(length)
        for name, value in fields.items():
            at, format_ = FIELDS[name]
            if at + struct.calcsize(format_) <= length:
                struct.pack_into(format_, head, at, value)
        head[105 : 105 + len(image.unknown_fields)] = image.unknown_fields
        first = bytes(head[:length]) + area + image.backing
        assert len(first) <= self.cluster
        self.data[: len(first)] = first
        return bytes(self.data)

    def mapping(self) -> tuple[int, int]:
        """Lay out data clusters, L2 tables and the L1 table; return the last one's place and entries."""
        extended = bool(self.image.incompatible & 0x10)
        entry_size = 16 if extended else 8
        per_table = self.cluster // entry_size
        l1_size = -(-self.image.size // (per_table * self.cluster))
        l1 = [0] * l1_size
        tables: dict[int, bytearray] = {}
        for index, content in sorted(self.image.clusters.items()):
            table = tables.setdefault(index // per_table, bytearray(self.cluster))
            raw = content if isinstance(content, int) else self.allocate(content) | COPIED
            at = index % per_table * entry_size
            struct.pack_into(">Q", table, at, raw)
            if extended and not isinstance(content, int):
                struct.pack_into(">Q", table, at + 8, 0xFFFFFFFF)
        for index, table in tables.items():
            l1[index] = self.allocate(bytes(table)) | COPIED
        return self.allocate(struct.pack(f">{l1_size}Q", *l1)), l1_size

    def bitmaps(self) -> bytes:
        """Lay out bitmap data, tables and directory; return the header extension's data."""
        image = self.image
        directory = bytearray()
        for bitmap in image.bitmaps:
            table = bitmap.table
            if table is None:
                bits = -(-image.size // (1 << bitmap.granularity_bits))
                data = bitmap.bits.ljust(-(-bits // 8), b"\0")
                table = [
                    self.bitmap_cluster(data[at : at + self.cluster])
                    for at in range(0, len(data), self.cluster)
                ]
            offset = self.allocate(struct.pack(f">{len(table)}Q", *table)) if table else 0
            directory += struct.pack(
                ">QIIBBHI",
                offset if bitmap.table_offset is None else bitmap.table_offset,
                len(table) if bitmap.table_size is None else bitmap.table_size,
                bitmap.flags,
                bitmap.type,
                bitmap.granularity_bits,
                len(bitmap.name),
                len(bitmap.extra_data),
            )
            directory += bitmap.extra_data + bitmap.name
            directory += bytes(-len(directory) % 8)
        directory += image.directory_padding
        size = len(directory) if image.directory_size is None else image.directory_size
        count = len(image.bitmaps) if image.nb_bitmaps is None else image.nb_bitmaps
        return struct.pack(">IIQQ", count, 0, size, self.allocate(bytes(directory)))

    def bitmap_cluster(self, data: bytes) -> int:
        if not any(data):
            return 0
        if len(data) == self.cluster and data == b"\xff" * len(data):
            return 1
        return self.allocate(data)

    def refcounts(self) -> tuple[int, int]:
        """Lay out the refcount structures, each cluster counted once; return the table's place and size."""
        bits = 1 << self.image.refcount_order
        per_block = self.cluster * 8 // bits
        used = len(self.data) // self.cluster
        blocks = table_clusters = 0
        while True:
            total = used + blocks + table_clusters
            needed_blocks = -(-total // per_block)
            needed = needed_blocks, -(-needed_blocks * 8 // self.cluster)
            if needed == (blocks, table_clusters):
                break
            blocks, table_clusters = needed
        offsets = []
        for block in range(blocks):
            count = min(per_block, total - block * per_block)
            if bits >= 8:
                raw = (1).to_bytes(bits // 8) * count
            else:
                packed = sum(1 << i * bits for i in range(8 // bits))
                raw = bytes([packed]) * (count * bits // 8)
                if rest := count * bits % 8:
                    raw += bytes([packed & (1 << rest) - 1])
            offsets.append(self.allocate(raw.ljust(self.cluster, b"\0")))
        return self.allocate(struct.pack(f">{blocks}Q", *offsets)), table_clusters


# -- existing images -----------------------------------------------------------------------------


def get_field(data: bytes | bytearray, name: str) -> int:
    """A header field of an image."""
    at, format_ = FIELDS[name]
    value: int = struct.unpack_from(format_, data, at)[0]
    return value


def patch(path: Path, **fields: int) -> None:
    """Overwrite header fields of an image file, by name."""
    with path.open("r+b") as file:
        for name, value in fields.items():
            at, format_ = FIELDS[name]
            file.seek(at)
            file.write(struct.pack(format_, value))


def patch_bytes(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of an image file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def extensions(data: bytes | bytearray) -> Iterator[tuple[int, int, int]]:
    """(type, offset of the data, length of it) of each header extension."""
    at = 72 if get_field(data, "version") == 2 else get_field(data, "header_length")
    while True:
        type_, length = struct.unpack_from(">II", data, at)
        if not type_:
            return
        yield type_, at + 8, length
        at += 8 + length + -length % 8


def bitmap_entries(data: bytes | bytearray) -> dict[bytes, int]:
    """Bitmap name -> offset of its directory entry in the file."""
    at = next(at for type_, at, _ in extensions(data) if type_ == EXT_BITMAPS)
    _, _, size, offset = struct.unpack_from(">IIQQ", data, at)
    found = {}
    entry = offset
    while entry < offset + size:
        name_size, extra = struct.unpack_from(">HI", data, entry + 18)
        name_at = entry + 24 + extra
        found[bytes(data[name_at : name_at + name_size])] = entry
        length = 24 + extra + name_size
        entry += length + -length % 8
    return found


def patch_bitmap_flags(path: Path, name: str, *, set: int = 0, clear: int = 0) -> None:
    """Change the flags in a bitmap's directory entry, as a crashed program would have left them."""
    data = path.read_bytes()
    at = bitmap_entries(data)[name.encode()] + 12
    flags = struct.unpack_from(">I", data, at)[0]
    patch_bytes(path, at, struct.pack(">I", (flags | set) & ~clear))
