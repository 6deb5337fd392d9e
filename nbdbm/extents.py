"""Extents: what a range of the disk looks like, as lengths and flags.

An ``ExtentList`` answers one block status query for one metadata context. It is built front to back
and is by construction ascending, contiguous, coalesced (no two neighbours have equal flags), clipped
to the range asked for, and capped in number.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple


class Extent(NamedTuple):
    """``length`` bytes that share ``flags``."""

    length: int
    flags: int


class ExtentList:
    """Extents of the half-open byte range ``[offset, offset + length)``, from its start.

    ``flat`` is ``[length, flags, length, flags, ...]`` as 64-bit words: many extents are added, counted and
    packed at once, where objects would take most of the time of a reply with a hundred thousand of them.

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
        self.flat: array[int] = array("Q")
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
            flat.extend((0, flags))
        rest = self.offset + self.length - self.position
        if length >= rest:
            length = rest
            self.full = True
        flat[-2] += length
        self.position += length
        return not self.full

    def add_packed(self, pairs: bytes, start: int, end: int) -> bool:
        """Describe many extents at once; as ``add`` for each.

        Args:
            pairs: lengths and flags as in ``flat``, neighbours with different flags (see runs.py).
            start: where the first of them begins, at ``position`` or before; it ends after ``position``.
            end: where the last of them ends. It alone may reach past the range.
        """
        if self.full or not pairs:
            return not self.full
        flat = self.flat
        many = array("Q", pairs)
        many[0] -= self.position - start
        if flat and flat[-1] == many[1]:
            flat[-2] += many[0]
            del many[:2]
        room = 2 * self.limit - len(flat)
        if len(many) > room:
            end -= sum(many[room::2])
            del many[room:]
            self.full = True
        if flat:
            flat += many
        else:
            self.flat = flat = many
        stop = self.offset + self.length
        if end >= stop:
            flat[-2] -= end - stop
            end = stop
            self.full = True
        self.position = end
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
