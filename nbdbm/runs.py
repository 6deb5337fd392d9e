"""Runs: equal bits or bytes as packed pairs of length and flags, and these as big-endian words.

A pair is two 64-bit words in native byte order. The functions exist twice, with the same results:
compiled (``_speed.c``), and in Python for installations without that. The latter work on all runs
together too, at 50 to 150 ns a run; compiled, one takes some nanoseconds.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from itertools import islice
from typing import TypeAlias

from bitarray import bitarray

Buffer: TypeAlias = "bytes | bytearray | memoryview | array[int] | bitarray"

FEW = 8
"""Runs up to which they are searched for one by one: asking for one looks at no more bits than it has."""

MAX_SHIFT = 62
"""Lengths stay below 2^63."""

_U32_MAX, _U64_MAX = (1 << 32) - 1, (1 << 64) - 1
_LITTLE = sys.byteorder == "little"


def pure_bit_runs(bits: Buffer, start: int, stop: int, shift: int, limit: int) -> tuple[bytes, int]:
    """The runs of bits [start, stop) as pairs, and the bit where the last of them ends.

    Bit 0 is the least significant of byte 0. A run of n bits has the length ``n << shift`` and the flags
    1 or 0.

    Args:
        limit: the greatest number of runs; only then the last of them ends before ``stop``.

    Raises:
        ValueError: the range is empty or not inside the buffer, or there are lengths of 63 bits or more.
    """
    raw = memoryview(bits).cast("B")
    _check(start, stop, 8 * len(raw), shift, limit)
    array_of_bits = bitarray(buffer=raw, endian="little")
    value = array_of_bits[start]
    ends = array("Q")
    if limit <= FEW:
        at, wanted = start, value
        while len(ends) < limit and at < stop:
            wanted = 1 - wanted
            at = array_of_bits.find(wanted, at, stop)
            if at < 0:
                at = stop
            ends.append(at - start)
    else:
        # All ends together, by one exclusive or:
        #
        #     bits     0 0 1 1 1 0 1        1 in the last row: a run ends here
        #     next     0 1 1 1 0 1
        #     ^        0 1 0 0 1 1
        changes = array_of_bits[start : stop - 1]
        changes ^= array_of_bits[start + 1 : stop]
        ends.extend(islice(changes.search(1), limit))
        ends = _plus(ends, 1)
        if len(ends) < limit:
            ends.append(stop - start)
    return _pairs(ends, shift, _alternating(value, 1 - value, len(ends))), start + ends[-1]


def pure_byte_runs(values: Buffer, start: int, stop: int, shift: int, limit: int) -> tuple[bytes, int]:
    """The same for bytes: each run has the flags that its bytes are."""
    raw = memoryview(values).cast("B")
    _check(start, stop, len(raw), shift, limit)
    part = bytes(raw[start:stop])
    ends = array("Q")
    if limit <= FEW:
        at = 0
        while len(ends) < limit and at < len(part):
            at = len(part) - len(part[at:].lstrip(part[at : at + 1]))
            ends.append(at)
    else:
        differ = int.from_bytes(part[:-1], "little") ^ int.from_bytes(part[1:], "little")
        changes = bitarray()
        changes.pack(differ.to_bytes(len(part) - 1, "little"))
        ends.extend(islice(changes.search(1), limit))
        ends = _plus(ends, 1)
        if len(ends) < limit:
            ends.append(len(part))
    first, second = part[0], part[ends[0]] if ends[0] < len(part) else 0
    if part.count(first) + part.count(second) >= len(part):
        flags = _alternating(first, second, len(ends))
    else:
        flags = array("Q", [part[end - 1] for end in ends])
    return _pairs(ends, shift, flags), start + ends[-1]


def pure_pack(pairs: Buffer, width: int, longest: int) -> bytes:
    """Pairs as big-endian words of ``width`` (4 or 8) bytes.

    The first length beyond ``longest`` is cut to that, and ends what is told: the next one would no longer
    follow it.

    Raises:
        ValueError: these are no pairs, or something does not fit in the width.
    """
    raw = bytes(memoryview(pairs).cast("B"))
    if len(raw) % 16 or width not in (4, 8):
        raise ValueError("not pairs, or not words of 4 or 8 bytes")
    if not 0 <= longest <= (_U32_MAX if width == 4 else _U64_MAX):
        raise ValueError("lengths would not fit")
    words = array("Q", raw)
    lengths = words[::2]
    if lengths and max(lengths) > longest:
        at = next(at for at, length in enumerate(lengths) if length > longest)
        del words[2 * at + 2 :]
        words[2 * at] = longest
    if width == 4:
        # Of each word the half that is not zero.
        halves = memoryview(words).cast("B").cast("I")
        if any(halves[3::4] if _LITTLE else halves[2::4]):
            raise ValueError("flags do not fit")
        words = array("I", (halves[::2] if _LITTLE else halves[1::2]).tobytes())
    if _LITTLE:
        words.byteswap()
    return words.tobytes()


def _check(start: int, stop: int, available: int, shift: int, limit: int) -> None:
    if not 0 <= start < stop <= available:
        raise ValueError("the range is empty or not inside the buffer")
    if not 0 <= shift <= MAX_SHIFT or stop >> (63 - shift):
        raise ValueError("lengths would not fit in 63 bits")
    if limit < 1:
        raise ValueError("the limit is less than one")


def _alternating(first: int, second: int, count: int) -> array[int]:
    return (array("Q", (first, second)) * (count // 2 + 1))[:count]


def _plus(words: array[int], addend: int) -> array[int]:
    """The words, each with ``addend`` added, as one sum of two large integers; no word overflows."""
    total = int.from_bytes(words.tobytes(), sys.byteorder)
    total += int.from_bytes(array("Q", (addend,)).tobytes() * len(words), sys.byteorder)
    return array("Q", total.to_bytes(8 * len(words), sys.byteorder))


def _pairs(ends: array[int], shift: int, flags: array[int]) -> bytes:
    """Ascending ends of runs, the first of which begins at 0, as lengths and flags.

    All lengths are had by one subtraction of large integers, since no word borrows from its neighbour.
    """
    begins = array("Q", (0,)) + ends[:-1]
    lengths = int.from_bytes(ends.tobytes(), sys.byteorder)
    lengths -= int.from_bytes(begins.tobytes(), sys.byteorder)
    lengths <<= shift
    pairs = array("Q", bytes(16 * len(ends)))
    pairs[::2] = array("Q", lengths.to_bytes(8 * len(ends), sys.byteorder))
    pairs[1::2] = flags
    return pairs.tobytes()


RunsOf = Callable[[Buffer, int, int, int, int], tuple[bytes, int]]

bit_runs: RunsOf = pure_bit_runs
byte_runs: RunsOf = pure_byte_runs
pack: Callable[[Buffer, int, int], bytes] = pure_pack
classify: Callable[[Buffer, bool, tuple[int, int, int, int, int], bytes], bytes] | None = None
"""(words of 64 bits, whether their bytes are to be swapped, masks, 32 letters) -> for each word the letter
number n, where bit i of n is set if the word has any bit of mask i. None without the compiled functions:
``L2Decoder.kinds_of`` has another way of its own."""

try:
    import nbdbm._speed as _speed
except ImportError:
    COMPILED = False
else:
    COMPILED = True
    bit_runs, byte_runs, pack = _speed.bit_runs, _speed.byte_runs, _speed.pack
    classify = _speed.classify
