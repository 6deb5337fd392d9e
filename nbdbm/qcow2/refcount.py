"""Refcount blocks: how often each host cluster is used, 1 to 64 bits wide.

Specification: "Host cluster management". One block is one cluster; wide refcounts are big-endian, narrow
ones begin at the least significant bit of their byte:

    order 1 (2 bits):   byte 0 = | 3 | 2 | 1 | 0 |   byte 1 = | 7 | 6 | 5 | 4 |
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator

from nbdbm.qcow2.constants import MAX_REFCOUNT_ORDER

WIDE = {3: struct.Struct(">B"), 4: struct.Struct(">H"), 5: struct.Struct(">I"), 6: struct.Struct(">Q")}


class RefcountBlock:
    """The refcounts in ``buffer`` (one cluster, not copied), each ``1 << order`` bits wide.

    Setting needs a writable buffer.
    """

    __slots__ = ("_struct", "bits", "buffer", "maximum", "order")

    def __init__(self, buffer: bytes | bytearray | memoryview, order: int) -> None:
        assert 0 <= order <= MAX_REFCOUNT_ORDER
        self.buffer = buffer
        self.order = order
        self.bits = 1 << order
        self.maximum = (1 << self.bits) - 1
        """The greatest refcount that fits."""
        self._struct = WIDE.get(order)

    def __len__(self) -> int:
        return len(self.buffer) * 8 // self.bits

    def get(self, index: int) -> int:
        """The refcount of the block's ``index``-th cluster."""
        assert 0 <= index < len(self)
        if self._struct is not None:
            value: int = self._struct.unpack_from(self.buffer, index * self._struct.size)[0]
            return value
        bit = index * self.bits
        return self.buffer[bit >> 3] >> (bit & 7) & self.maximum

    def set(self, index: int, value: int) -> None:
        """Change the refcount of the block's ``index``-th cluster; ``value`` must fit (see ``maximum``)."""
        assert 0 <= index < len(self) and 0 <= value <= self.maximum
        assert not isinstance(self.buffer, bytes)
        if self._struct is not None:
            self._struct.pack_into(self.buffer, index * self._struct.size, value)
            return
        bit = index * self.bits
        shift = bit & 7
        self.buffer[bit >> 3] = self.buffer[bit >> 3] & ~(self.maximum << shift) & 0xFF | value << shift

    def __iter__(self) -> Iterator[int]:
        if self._struct is not None:
            return (value for (value,) in self._struct.iter_unpack(self.buffer))
        shifts = range(0, 8, self.bits)
        return (byte >> shift & self.maximum for byte in self.buffer for shift in shifts)


def unpack_counts(data: bytes, order: int) -> array[int]:
    """All refcounts of a block (or a part of one) as numbers in native order."""
    counts = array("BBBBHIQ"[order])
    if order >= 3:
        counts.frombytes(data)
        if sys.byteorder == "little":
            counts.byteswap()
    else:
        counts.extend(RefcountBlock(data, order))
    return counts


def pack_counts(counts: array[int], order: int) -> bytes:
    """The inverse of ``unpack_counts``."""
    if order >= 3:
        raw = counts[:]
        if sys.byteorder == "little":
            raw.byteswap()
        return raw.tobytes()
    bits = 1 << order
    packed = bytearray(len(counts) * bits // 8)
    for step in range(8 // bits):
        for at, value in enumerate(counts[step :: 8 // bits]):
            packed[at] |= value << step * bits
    return bytes(packed)
