"""Bytes as decisions: what a fuzzer mutates, read front to back.

Any bytes are a script; past their end every decision is 0, so that each target ends. What is decided by
few bytes is changed by few mutations, and a short input goes deep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Script:
    """Decisions taken from ``data``, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def more(self) -> bool:
        """Whether anything is left."""
        return self._at < len(self._data)

    def bytes(self, count: int) -> bytes:
        """The next ``count`` bytes, fewer at the end."""
        piece = self._data[self._at : self._at + count]
        self._at += len(piece)
        return piece

    def rest(self) -> bytes:
        """All that is left."""
        return self.bytes(len(self._data))

    def number(self, width: int) -> int:
        """An unsigned number of ``width`` bytes."""
        return int.from_bytes(self.bytes(width).ljust(width, b"\0"))

    def byte(self) -> int:
        return self.number(1)

    def flag(self) -> bool:
        return bool(self.byte() & 1)

    def pick(self, choices: Sequence[T]) -> T:
        """One of ``choices``, of which there are at most 65536."""
        return choices[self.number(1 if len(choices) <= 256 else 2) % len(choices)]

    def value(self, old: int = 0, places: Sequence[int] = ()) -> int:
        """A number that is likely to be a limit of something: 64 bits, no more.

        ``old`` is what it replaces, ``places`` are numbers that mean something where it goes.
        """
        kind = self.byte()
        match kind & 7:
            case 0:
                number = self.byte()
            case 1:
                number = 1 << (self.byte() & 63)
            case 2:
                number = (1 << (self.byte() & 63)) - 1
            case 3:
                number = -1 - self.byte()
            case 4:
                number = self.pick(places) if places else self.number(2)
                # The flags and the misalignments that entries of qcow2's tables have or may not have.
                number |= (kind >> 3 & 3) << 62 | kind >> 5 & 1
                number += (kind >> 6) * 256
            case 5:
                number = old ^ 1 << (self.byte() & 63)
            case 6:
                number = old + self.byte() - 128
            case _:
                number = self.number(8)
        return number & (1 << 64) - 1
