"""The picture of a disk: many extents drawn as a few rows of blocks. Pure: extents in, text out.

The disk is cut into equal blocks, one character each. A block shows the most telling class of what it
holds; a class differs from its neighbours by its character, so that colour is only a comfort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from nbdbm.nbd.constants import CONTEXT_ALLOCATION, CONTEXT_BITMAP, CONTEXT_DEPTH, AllocationFlag, DirtyFlag

SMALLEST_BLOCK = 512
"""Bytes; a finer picture would show nothing more, a sector is the least that differs."""


class Span(NamedTuple):
    """A piece of a line: ``text`` in one ``style`` (rich's names; empty for plain)."""

    text: str
    style: str = ""


class Mark(NamedTuple):
    """How one class of extents looks."""

    word: str
    glyph: str
    ascii: str
    style: str


PARTLY = ("▒", "+")
"""A block that holds the first class, and something else too."""


class Palette(NamedTuple):
    """The classes of one metadata context, the most telling first, and how flags fall into them."""

    marks: tuple[Mark, ...]
    classify: Callable[[int], int]


_ALLOCATION = Palette(
    (
        Mark("data", "█", "#", "blue"),
        Mark("zero", "o", "o", "cyan"),
        Mark("hole", "·", ".", "bright_black"),
    ),
    lambda flags: 0 if not flags & AllocationFlag.ZERO else 2 if flags & AllocationFlag.HOLE else 1,
)
_DIRTY = Palette(
    (Mark("dirty", "█", "#", "red"), Mark("clean", "·", ".", "bright_black")),
    lambda flags: 0 if flags & DirtyFlag.DIRTY else 1,
)
_DEPTH = Palette(
    (
        Mark("this layer", "█", "#", "blue"),
        Mark("backing", "=", "=", "yellow"),
        Mark("absent", "·", ".", "bright_black"),
    ),
    lambda depth: 2 if depth == 0 else 0 if depth == 1 else 1,
)
_OTHER = Palette(
    (Mark("set", "█", "#", "magenta"), Mark("unset", "·", ".", "bright_black")),
    lambda flags: 0 if flags else 1,
)


def palette(context: str) -> Palette:
    """How extents of this metadata context are drawn."""
    if context.startswith(CONTEXT_BITMAP):
        return _DIRTY
    return {CONTEXT_ALLOCATION: _ALLOCATION, CONTEXT_DEPTH: _DEPTH}.get(context, _OTHER)


def human(count: int) -> str:
    """``count`` bytes for people: three digits at most, binary units, exact where it can be."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} EiB"


class Picture:
    """A disk of ``size`` bytes in at most ``cells`` blocks; ``add`` extents in any order, then draw.

    Memory depends on ``cells`` alone; a call of ``add`` touches the blocks that the extent overlaps.
    """

    def __init__(self, size: int, cells: int, palette: Palette) -> None:
        self.size = size
        self.palette = palette
        self.block = SMALLEST_BLOCK
        """Bytes that one character stands for; a power of two."""
        while self.block * cells < size:
            self.block *= 2
        self.cells = -(-size // self.block)
        self._bytes = [[0] * self.cells for _ in palette.marks]
        self.totals = [0] * len(palette.marks)
        """Bytes of each class."""

    def add(self, offset: int, length: int, flags: int) -> None:
        """Count ``length`` bytes at ``offset`` in; the range lies inside the disk."""
        assert 0 <= offset <= self.size - length
        index = self.palette.classify(flags)
        cells, block = self._bytes[index], self.block
        self.totals[index] += length
        end = offset + length
        while offset < end:
            cell = offset // block
            step = min(end, (cell + 1) * block) - offset
            cells[cell] += step
            offset += step

    def _mark(self, cell: int, plain: bool) -> Span:
        """The character of one block."""
        amounts = [cells[cell] for cells in self._bytes]
        first = self.palette.marks[0]
        if amounts[0] and any(amounts[1:]):
            return Span(PARTLY[plain], first.style)
        mark = self.palette.marks[amounts.index(max(amounts))]
        return Span(mark.ascii if plain else mark.glyph, mark.style)

    def row(self, start: int, stop: int, *, plain: bool) -> list[Span]:
        """Blocks ``start`` to ``stop`` as spans, neighbours of one style joined; ``plain`` is ASCII."""
        spans: list[Span] = []
        for cell in range(start, min(stop, self.cells)):
            span = self._mark(cell, plain)
            if spans and spans[-1].style == span.style:
                spans[-1] = Span(spans[-1].text + span.text, span.style)
            else:
                spans.append(span)
        return spans

    def rows(self, width: int, *, plain: bool) -> Iterator[list[Span]]:
        """The whole picture, ``width`` blocks to the row, each row led by its offset."""
        labels = [human(start * self.block) for start in range(0, self.cells, width)]
        indent = max(map(len, labels), default=0)
        for label, start in zip(labels, range(0, self.cells, width), strict=True):
            yield [Span(f"{label:>{indent}} "), *self.row(start, start + width, plain=plain)]

    def legend(self, *, plain: bool) -> list[Span]:
        """What the characters mean, with the amount of each class, and the size of a block."""
        first = self.palette.marks[0]
        spans: list[Span] = []
        for mark, total in zip(self.palette.marks, self.totals, strict=True):
            glyph = mark.ascii if plain else mark.glyph
            spans += [Span(glyph, mark.style), Span(f" {mark.word} {human(total)}   ")]
            if mark is first:
                spans += [Span(PARTLY[plain], mark.style), Span(f" partly {mark.word}   ")]
        return [*spans, Span(f"one character is {human(self.block)}")]
