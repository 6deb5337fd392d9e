"""Extents: what a range of the disk looks like, as lengths and flags.

An ``ExtentList`` answers one block status query for one metadata context. It is built front to back
and is by construction ascending, contiguous, coalesced (no two neighbours have equal flags), clipped
to the range asked for, and capped in number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Extent(NamedTuple):
    """``length`` bytes that share ``flags``."""

    length: int
    flags: int


class ExtentList:
    """Extents of the half-open byte range ``[offset, offset + length)``, from its start.

    ``flat`` is ``[length, flags, length, flags, ...]``: one list of ints packs and counts far faster
    than objects when a reply holds a hundred thousand extents.

    Args:
        offset: where the range begins, bytes.
        length: how far it reaches, bytes; nothing is recorded beyond it.
        limit: the greatest number of extents; one of 1 answers NBD_CMD_FLAG_REQ_ONE.
    """

    __slots__ = ("flat", "full", "length", "limit", "offset", "position")

    def __init__(self, offset: int, length: int, limit: int) -> None:
        assert length >= 0 and limit >= 1
        self.offset = offset
        self.length = length
        self.limit = limit
        self.flat: list[int] = []
        self.position = offset
        """The first byte not yet described."""
        self.full = length == 0
        """True once another extent would change nothing: the range is covered or the cap is reached."""

    def add(self, length: int, flags: int) -> bool:
        """Describe the next ``length`` bytes; return False once the list is full.

        An extent that would exceed the cap is dropped, and so is everything after it: the described
        part stays contiguous.
        """
        if self.full or length <= 0:
            return not self.full
        flat = self.flat
        if not flat or flat[-1] != flags:
            if len(flat) == 2 * self.limit:
                self.full = True
                return False
            flat += (0, flags)
        rest = self.offset + self.length - self.position
        if length >= rest:
            length = rest
            self.full = True
        flat[-2] += length
        self.position += length
        return not self.full

    def add_alternating(self, lengths: list[int], first: int, second: int) -> bool:
        """Describe many extents at once whose flags are ``first, second, first, ...``; as ``add`` for each.

        All lengths are positive. A reply full of short extents is built several times faster this way.
        """
        assert first != second
        if self.full or not lengths:
            return not self.full
        flat = self.flat
        total = sum(lengths)
        if (flat and flat[-1] == first) or self.position + total >= self.offset + self.length:
            # The first merges with what is there, or the last is clipped.
            for i, length in enumerate(lengths):
                if not self.add(length, second if i & 1 else first):
                    break
            return not self.full
        room = self.limit - len(flat) // 2
        if len(lengths) > room:
            self.full = True
            lengths = lengths[:room]
            total = sum(lengths)
        count = len(lengths)
        pairs = [first] * (2 * count)
        pairs[::2] = lengths
        pairs[3::4] = [second] * (count // 2)
        flat += pairs
        self.position += total
        return not self.full

    @property
    def covered(self) -> int:
        """Bytes described so far."""
        return self.position - self.offset

    def __len__(self) -> int:
        return len(self.flat) // 2

    def __iter__(self) -> Iterator[Extent]:
        flat = self.flat
        for i in range(0, len(flat), 2):
            yield Extent(flat[i], flat[i + 1])

    def __repr__(self) -> str:
        shown = ", ".join(f"{e.length}:{e.flags}" for _, e in zip(range(4), self, strict=False))
        more = ", ..." if len(self) > 4 else ""
        return f"<ExtentList @{self.offset}+{self.length} [{shown}{more}]>"
