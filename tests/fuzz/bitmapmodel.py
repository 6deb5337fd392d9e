"""The bitmaps of an image, as its bytes alone have them.

Written from the format's specification, and sharing no code with nbdbm.qcow2.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from tests.support import qcow2build
from tests.support.qcow2build import AUTO, EXTRA_COMPATIBLE, IN_USE, get_field

RESERVED = 0xFF00_0000_0000_01FE
ENTRY = struct.Struct(">QIIBBHI")


class Stored(NamedTuple):
    """One bitmap."""

    name: bytes
    flags: int
    granularity: int
    """Bytes of the disk."""
    dirty: frozenset[int] | None
    """Its dirty granules; None: its entry, or its table, is none that may be used."""

    @property
    def in_use(self) -> bool:
        return bool(self.flags & IN_USE)

    @property
    def records(self) -> bool:
        return bool(self.flags & AUTO)

    @property
    def offered(self) -> bool:
        return not self.in_use and self.dirty is not None


def stored(data: bytes) -> list[Stored] | None:
    """Every bitmap of the directory; None if there is no directory that may be trusted."""
    if get_field(data, "version") < 3 or not get_field(data, "autoclear_features") & 1:
        return None
    cluster = 1 << get_field(data, "cluster_bits")
    try:
        found = [each for each in qcow2build.extensions(data) if each[0] == qcow2build.EXT_BITMAPS]
    except struct.error:
        return None
    if len(found) != 1 or found[0][2] != 24:
        return None
    count, _, size, at = struct.unpack_from(">IIQQ", data, found[0][1])
    if not count or not size or not at or at % cluster or at + size > len(data):
        return None
    entries = []
    directory = data[at : at + size]
    at = 0
    while at < size:
        if size - at < ENTRY.size:
            return None
        *fields, name_length, extra_length = ENTRY.unpack_from(directory, at)
        length = ENTRY.size + extra_length + name_length
        begin = at + ENTRY.size
        at += length + -length % 8
        if at > size:
            return None
        name = directory[begin + extra_length : begin + extra_length + name_length]
        entries.append((fields, extra_length, name))
    if len(entries) != count:
        return None
    names = [name for _, _, name in entries]
    return [_one(data, cluster, *entry, unique=names.count(entry[2]) == 1) for entry in entries]


def _one(data: bytes, cluster: int, fields: list[int], extra: int, name: bytes, *, unique: bool) -> Stored:
    table_at, table_size, flags, kind, bits, *_ = fields
    wrong = kind != 1 or flags & ~7 or not 9 <= bits <= 31 or (extra and not flags & EXTRA_COMPATIBLE)
    size = get_field(data, "size")
    if wrong or not unique or not _is_name(name):
        return Stored(name, flags, 1 << min(bits, 63), None)
    count = -(-size >> bits)
    length = -(-count // 8)
    if table_size != -(-length // cluster) or table_at % cluster or (table_size and not table_at):
        return Stored(name, flags, 1 << bits, None)
    if table_at + 8 * table_size > len(data):
        return Stored(name, flags, 1 << bits, None)
    dirty: set[int] = set()
    for index, entry in enumerate(struct.unpack_from(f">{table_size}Q", data, table_at)):
        part = min(cluster, length - index * cluster)
        if entry & RESERVED or (entry > 1 and (entry % cluster or entry + part > len(data))):
            return Stored(name, flags, 1 << bits, None)
        piece = data[entry : entry + part] if entry > 1 else (b"\xff" if entry else b"\0") * part
        ones = int.from_bytes(piece, "little")
        first = index * cluster * 8
        dirty |= {first + bit for bit in range(8 * part) if ones >> bit & 1}
    return Stored(name, flags, 1 << bits, frozenset(bit for bit in dirty if bit << bits < size))


def _is_name(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return 1 <= len(name) <= 1023 and b"\0" not in name


def granules(offset: int, length: int, granularity: int) -> set[int]:
    """Those that a range touches."""
    return set(range(offset // granularity, (offset + length - 1) // granularity + 1)) if length else set()
