"""DirtyBitmap: which granules of a disk are dirty; compact, and searched at C speed.

The bits are cut into segments, each in the cheapest form that holds it:

    bits     0        segment_bits      2*              3*            bit_count
    segment  | absent  | True            | bitarray      | absent     |
             | clean   | all dirty       | some of each  | clean      |

A clean disk costs nothing however large it is, and whole segments are passed in one step. The bits of a
bitarray are in the order of the file (bit 0 is the least significant of byte 0), so loading and storing
are copies.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitarray import bitarray

from nbdbm.extents import ExtentList
from nbdbm.runs import bit_runs

SEGMENT_BITS = 1 << 19
"""64 KiB of memory each: a 64 TiB disk with granules of 64 KiB has 2048, so even one dirty granule in each
costs no more than the 128 MiB of a plain bitmap, and the first bit set in one costs some microseconds."""


class DirtyBitmap:
    """One bit per granule of ``granularity`` bytes, over a disk of ``size`` bytes; all clean at first.

    Ranges are (offset, length) in bytes and must lie inside the disk.
    """

    __slots__ = (
        "_mask",
        "_segment_shift",
        "_segments",
        "_shift",
        "bit_count",
        "granularity",
        "segment_bits",
        "size",
    )

    def __init__(self, size: int, granularity: int, *, segment_bits: int = SEGMENT_BITS) -> None:
        assert size >= 0
        assert granularity > 0 and granularity & (granularity - 1) == 0
        assert segment_bits >= 8 and segment_bits & (segment_bits - 1) == 0
        self.size = size
        self.granularity = granularity
        self.segment_bits = segment_bits
        self._shift = granularity.bit_length() - 1
        self._segment_shift = segment_bits.bit_length() - 1
        self._mask = segment_bits - 1
        self.bit_count = -(-size // granularity)
        self._segments: dict[int, bitarray | bool] = {}
        """Segment number -> its bits, or True when all are set. Absent: none is; False never occurs."""

    def __repr__(self) -> str:
        return f"<DirtyBitmap {self.count()} of {self.bit_count} granules of {self.granularity} bytes>"

    # -- changing ------------------------------------------------------------------------------

    def set(self, offset: int, length: int) -> None:
        """Make every granule that the range touches dirty."""
        if length <= 0:
            return
        assert offset >= 0 and offset + length <= self.size
        first = offset >> self._shift
        last = (offset + length - 1) >> self._shift
        if first == last:
            # The common write is smaller than a granule, and its segment exists already.
            segment = self._segments.get(first >> self._segment_shift)
            if segment is True:
                return
            if segment is not None:
                segment[first & self._mask] = 1  # type: ignore[index]
                return
        self._fill(first, last + 1)

    def reset(self, offset: int, length: int) -> None:
        """Make every granule clean that lies wholly in the range; those partly in it stay as they are."""
        assert offset >= 0 and offset + length <= self.size
        end = offset + length
        first = -(-offset >> self._shift)
        # The last granule may be cut off by the disk's end: then it lies in the range nevertheless.
        stop = self.bit_count if end == self.size else end >> self._shift
        for index, start, end in self._parts(first, stop):
            segment = self._segments.get(index)
            if segment is None:
                continue
            if end - start == self._length(index):
                del self._segments[index]
            else:
                self._materialize(index)[start:end] = 0

    def clear(self) -> None:
        """Make all of it clean."""
        self._segments.clear()

    def merge(self, other: DirtyBitmap) -> None:
        """Add what is dirty in ``other``, a bitmap of the same size and any granularity.

        Where the granularities differ, granules are widened outward: nothing dirty is lost.
        """
        assert other.size == self.size
        if other.granularity != self.granularity or other.segment_bits != self.segment_bits:
            position = 0
            for length, dirty in other.runs(0, other.size):
                if dirty:
                    self.set(position, length)
                position += length
            return
        for index, theirs in other._segments.items():
            ours = self._segments.get(index)
            if ours is True:
                continue
            if isinstance(theirs, bool):
                self._segments[index] = True
            elif ours is None:
                self._segments[index] = theirs.copy()
            else:
                ours |= theirs  # type: ignore[operator]

    def absorb(self, other: DirtyBitmap) -> None:
        """``merge`` for an ``other`` of the same shape that nobody uses any more: its bits are not copied."""
        assert other.granularity == self.granularity and other.segment_bits == self.segment_bits
        self._segments, other._segments = other._segments, self._segments
        self.merge(other)

    def copy(self) -> DirtyBitmap:
        """An independent bitmap with the same bits."""
        twin = DirtyBitmap(self.size, self.granularity, segment_bits=self.segment_bits)
        twin._segments = {i: s if isinstance(s, bool) else s.copy() for i, s in self._segments.items()}
        return twin

    def grown(self, size: int) -> DirtyBitmap:
        """The same bits for a disk of ``size`` bytes, no less than now; what is new is clean."""
        assert size >= self.size
        twin = DirtyBitmap(size, self.granularity, segment_bits=self.segment_bits)
        for index, segment in self._segments.items():
            if isinstance(segment, bool) and self._length(index) == twin._length(index):
                twin._segments[index] = True
                continue
            bits = bitarray(twin._length(index), endian="little")
            bits.setall(False)
            bits[: self._length(index)] = segment
            twin._segments[index] = bits
        return twin

    # -- asking --------------------------------------------------------------------------------

    def get(self, offset: int) -> bool:
        """Whether the granule that holds byte ``offset`` is dirty."""
        assert 0 <= offset < self.size
        bit = offset >> self._shift
        segment = self._segments.get(bit >> self._segment_shift)
        if isinstance(segment, bitarray):
            return bool(segment[bit & self._mask])
        return segment is True

    def any(self) -> bool:
        """Whether anything is dirty."""
        return any(s is True or s.any() for s in self._segments.values())  # type: ignore[union-attr]

    def count(self) -> int:
        """Dirty granules."""
        return sum(self._length(i) if isinstance(s, bool) else s.count() for i, s in self._segments.items())

    def dirty_bytes(self) -> int:
        """Bytes of the disk in dirty granules."""
        total = self.count() << self._shift
        if self.size and self.get(self.size - 1):
            total -= (self.bit_count << self._shift) - self.size
        return total

    def memory(self) -> int:
        """Bytes that the bits take now, roughly."""
        return sum(100 if isinstance(s, bool) else 200 + len(s) // 8 for s in self._segments.values())

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """The range as consecutive (length in bytes, dirty), neighbours always differing."""
        assert offset >= 0 and offset + length <= self.size
        if not length:
            return
        end = offset + length
        position, begun = offset, False
        dirty = False
        for bit, value in self._edges(offset >> self._shift, ((end - 1) >> self._shift) + 1):
            if begun:
                edge = bit << self._shift
                yield edge - position, dirty
                position = edge
            begun, dirty = True, value
        yield end - position, dirty

    def extents(self, into: ExtentList) -> None:
        """Describe the rest of ``into``'s range: flags 1 where dirty, else 0.

        The fast twin of ``runs``.
        """
        end = into.offset + into.length
        assert end <= self.size
        if into.full:
            return
        shift = self._shift
        bit = into.position >> shift
        stop = ((end - 1) >> shift) + 1
        while bit < stop and not into.full:
            index = bit >> self._segment_shift
            base = index << self._segment_shift
            segment_stop = min(base + self.segment_bits, stop)
            segment = self._segments.get(index)
            if isinstance(segment, bitarray):
                # One more than there is room for: the first may belong to the last of the segment before.
                room = into.limit - len(into) + 1
                pairs, edge = bit_runs(segment, bit - base, segment_stop - base, shift, room)
                into.add_packed(pairs, bit << shift, (base + edge) << shift)
                bit = base + edge
            else:
                into.add((segment_stop << shift) - into.position, int(segment is True))
                bit = segment_stop

    def _edges(self, first: int, stop: int) -> Iterator[tuple[int, bool]]:
        """(bit, value) of the first bit and of each bit in ``[first, stop)`` that differs from its neighbour
        before it."""
        current: bool | None = None
        for index, start, end in self._parts(first, stop):
            base = index << self._segment_shift
            segment = self._segments.get(index)
            if not isinstance(segment, bitarray):
                if current is not (segment is True):
                    current = segment is True
                    yield base + start, current
                continue
            at = start
            while at < end:
                value = bool(segment[at])
                if value is not current:
                    current = value
                    yield base + at, value
                at = segment.find(not value, at, end)
                if at < 0:
                    break

    # -- loading and storing: positions in the stream of bytes that the file holds ----------------

    @property
    def byte_count(self) -> int:
        """Bytes of the whole stream of bits."""
        return -(-self.bit_count // 8)

    def load(self, at: int, data: bytes | bytearray | memoryview) -> None:
        """Take the bits of ``data`` as those from byte ``at`` on; bits past the disk's end are ignored."""
        view = memoryview(data)
        position = 8 * at
        for index, start, end in self._parts(position, min(position + 8 * len(view), self.bit_count)):
            begin = ((index << self._segment_shift) + start - position) // 8
            part = bitarray(endian="little")
            part.frombytes(bytes(view[begin : begin + -(-(end - start) // 8)]))
            del part[end - start :]
            if end - start == self._length(index):
                self._replace(index, part)
            elif index in self._segments or part.any():
                self._materialize(index)[start:end] = part

    def load_ones(self, at: int, length: int) -> None:
        """Take the ``length`` bytes of the stream from byte ``at`` on as all ones."""
        stop = min(8 * (at + length), self.bit_count)
        if 8 * at < stop:
            self._fill(8 * at, stop)

    def dump(self, at: int, length: int) -> bytes | bool:
        """The ``length`` bytes of the stream from byte ``at`` on; True if every bit of the disk in them is
        set, False if none is. Bits past the disk's end are 0 in bytes, and bytes past it are left out."""
        first, stop = 8 * at, min(8 * (at + length), self.bit_count)
        joined = bitarray(endian="little")
        for index, start, end in self._parts(first, stop):
            segment = self._segments.get(index, False)
            whole = end - start == stop - first  # nothing is to be joined, so nothing is copied
            if isinstance(segment, bool):
                if whole:
                    return segment
                filled = bitarray(end - start, endian="little")
                filled.setall(segment)
                joined += filled
            elif whole and end - start == len(segment):
                joined = segment
            else:
                joined += segment[start:end]
        if not joined.any():
            return False
        return True if joined.all() else joined.tobytes()

    def pieces(self, length: int) -> Iterator[int]:
        """Numbers of the pieces of ``length`` bytes, counted from the stream's start, in which a bit may be
        set; ascending. In the others none is, and they cost nothing."""
        bits = 8 * length
        following = 0
        for index in sorted(self._segments):
            first = index << self._segment_shift
            stop = (first + self._length(index) - 1) // bits + 1
            yield from range(max(following, first // bits), stop)
            following = stop

    # -- segments ------------------------------------------------------------------------------

    def _length(self, index: int) -> int:
        """Bits of a segment: all have ``segment_bits`` but the last."""
        return min(self.segment_bits, self.bit_count - (index << self._segment_shift))

    def _parts(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The bits ``[first, stop)`` as (segment, start, end), start and end counted inside the segment."""
        while first < stop:
            index = first >> self._segment_shift
            base = index << self._segment_shift
            end = min(stop, base + self.segment_bits)
            yield index, first - base, end - base
            first = end

    def _materialize(self, index: int) -> bitarray:
        """The segment as a bitarray that can be changed in part."""
        segment = self._segments.get(index, False)
        if isinstance(segment, bool):
            bits = bitarray(self._length(index), endian="little")
            bits.setall(segment)
            self._segments[index] = bits
            return bits
        return segment

    def _replace(self, index: int, bits: bitarray) -> None:
        """Put ``bits`` in the place of a whole segment, in the cheapest form."""
        if not bits.any():
            self._segments.pop(index, None)
        else:
            self._segments[index] = True if bits.all() else bits

    def _fill(self, first: int, stop: int) -> None:
        """Set the bits ``[first, stop)``."""
        for index, start, end in self._parts(first, stop):
            if end - start == self._length(index):
                self._segments[index] = True
            elif self._segments.get(index) is not True:
                self._materialize(index)[start:end] = 1
