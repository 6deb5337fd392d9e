"""Draw the layers of the package, and check that the drawing in docs/ is the one of the code as it is.

Layers are the first parts of module names, as in check_layers.py; an arrow says that some module of one
imports some module of the other. Boxes are in rows so that all arrows point down; what everybody may use has
no arrows and stands at the bottom. The drawing changes when a module comes, goes or changes its name, and
when a first import between two layers comes or the last one goes; nothing else is in it.

Run by ``make lint`` and by tests/test_layers.py; ``make picture`` (``--write``) draws it anew.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from scripts.check_layers import ALLOWED, LEAVES, PACKAGE, PURE, ROOT, imports

PICTURE = "docs/architecture.svg"

LEFT_OUT = {"__init__", "__main__"}
"""No layers worth a box: a version number, and a call of the command line."""

# Sizes in pixels. Letters of one width, so that the size of a box is known without a font.
LETTER, BOLD, LINE, PAD, TITLE = 6.7, 7.9, 15, 10, 22
GAP, ROW_GAP, LANE, MARGIN = 28, 64, 14, 20
LONGEST_COLUMN = 7
"""Modules below one another in a box, before there is another column."""

STYLE = """
  .paper { fill: #ffffff } .box { fill: #f6f8fa; stroke: #8c959f } .pure { fill: #ddf4ff; stroke: #54aeff }
  text { font: 11px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #57606a }
  .name { font-size: 13px; font-weight: bold; fill: #24292f }
  .arrow { fill: none; stroke-width: 1.5 } .few { stroke-dasharray: 5 4 }
  .a0 { stroke: #0969da; color: #0969da } .a1 { stroke: #bc4c00; color: #bc4c00 }
  .a2 { stroke: #8250df; color: #8250df } .a3 { stroke: #1a7f37; color: #1a7f37 }
  .a4 { stroke: #9a6700; color: #9a6700 } .a5 { stroke: #bf3989; color: #bf3989 }
  .a6 { stroke: #1b7c83; color: #1b7c83 } .a7 { stroke: #57606a; color: #57606a }
  .head { stroke: none; fill: currentColor }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .box { fill: #161b22; stroke: #6e7681 } .pure { fill: #10243e; stroke: #388bfd }
    text { fill: #9198a1 } .name { fill: #e6edf3 }
    .a0 { stroke: #58a6ff; color: #58a6ff } .a1 { stroke: #f0883e; color: #f0883e }
    .a2 { stroke: #bc8cff; color: #bc8cff } .a3 { stroke: #3fb950; color: #3fb950 }
    .a4 { stroke: #d29922; color: #d29922 } .a5 { stroke: #f778ba; color: #f778ba }
    .a6 { stroke: #39c5cf; color: #39c5cf } .a7 { stroke: #9198a1; color: #9198a1 }
  }
"""
COLOURS = 8


@dataclass(eq=False)
class Box:
    """A layer; or, without a name, the place where an arrow passes through a row. Measures in pixels."""

    name: str = ""
    modules: list[str] = field(default_factory=list)
    width: float = LANE
    height: float = 0
    x: float = 0
    """Of its middle."""
    y: float = 0
    """Of its top."""
    above: list[Box] = field(default_factory=list)
    below: list[Box] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.name:
            return
        self.columns = -(-len(self.modules) // LONGEST_COLUMN) or 1
        self.column = max(map(len, self.modules), default=0) * LETTER + PAD
        self.width = max(self.columns * self.column, len(self.title) * BOLD + PAD) + PAD
        lines = -(-len(self.modules) // self.columns)
        self.height = TITLE + lines * LINE + PAD / 2

    @property
    def title(self) -> str:
        """The name in the tree of files."""
        return f"{self.name}/" if self.modules else f"{self.name}.py"


# -- what the code says ------------------------------------------------------------------------


def modules(root: Path) -> dict[str, list[str]]:
    """The modules of each layer, by their file names; none for a layer that is one module."""
    found: dict[str, list[str]] = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        layer, *rest = path.relative_to(root / PACKAGE).with_suffix("").parts
        if layer not in LEFT_OUT:
            found.setdefault(layer, []).extend(name for name in rest if name != "__init__")
    declared = list(ALLOWED)
    order = {name: declared.index(name) if name in declared else len(declared) for name in found}
    return {name: found[name] for name in sorted(found, key=lambda name: (order[name], name))}


def arrows(root: Path, layers: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Which layer imports which, leaves left out."""
    found = set()
    for path in (root / PACKAGE).rglob("*.py"):
        layer = path.relative_to(root / PACKAGE).with_suffix("").parts[0]
        for _, name in imports(ast.parse(path.read_text())):
            head, *rest = name.split(".")
            if head == PACKAGE and rest and rest[0] != layer:
                found.add((layer, rest[0]))
    drawn = set(layers) - LEAVES
    return sorted((a, b) for a, b in found if a in drawn and b in drawn)


# -- where things go ---------------------------------------------------------------------------


def ranks(names: list[str], edges: list[tuple[str, str]]) -> dict[str, int]:
    """The row of each layer, 0 at the bottom: above all that it imports.

    The pure cores are as low as can be, all others as high.
    """
    rank = dict.fromkeys(names, 0)
    for _ in names:  # as many times as the longest path may be long; a cycle ends here as well
        for upper, lower in edges:
            rank[upper] = max(rank[upper], rank[lower] + 1)
    for name in sorted(names, key=lambda name: -rank[name]):
        importers = [rank[upper] for upper, lower in edges if lower == name]
        if importers and name not in PURE:
            rank[name] = min(importers) - 1
    return rank


def rows_of(boxes: dict[str, Box], edges: list[tuple[str, str]]) -> tuple[list[list[Box]], list[list[Box]]]:
    """The rows from the top, in a good order; and each arrow's way from box to box through them."""
    rank = ranks(list(boxes), edges)
    top = max(rank.values())
    rows: list[list[Box]] = [[] for _ in range(top + 1)]
    for name, box in boxes.items():
        rows[top - rank[name]].append(box)
    ways = []
    for upper, lower in edges:
        way = [boxes[upper]]
        for row in range(top - rank[upper] + 1, top - rank[lower]):
            rows[row].append(Box())
            way.append(rows[row][-1])
        way.append(boxes[lower])
        for one, other in pairwise(way):
            one.below.append(other)
            other.above.append(one)
        ways.append(way)
    best = [list(row) for row in rows]
    for turn in range(24):
        for row in rows[1:] if turn % 2 == 0 else rows[-2::-1]:
            place = {box: number for other in rows for number, box in enumerate(other)}
            row.sort(key=lambda box: _middle(box, place, turn % 2 == 0))
        if crossings(rows) < crossings(best):
            best = [list(row) for row in rows]
    return best, ways


def _middle(box: Box, place: dict[Box, int], downwards: bool) -> float:
    neighbours = box.above if downwards else box.below
    return sum(place[b] for b in neighbours) / len(neighbours) if neighbours else place[box]


def crossings(rows: list[list[Box]]) -> int:
    """How often arrows cross between one row and the next."""
    count = 0
    for upper, lower in pairwise(rows):
        place = {box: number for number, box in enumerate(lower)}
        ends = [(number, place[end]) for number, box in enumerate(upper) for end in box.below]
        count += sum(a < c and b > d for a, b in ends for c, d in ends)
    return count


def place(rows: list[list[Box]]) -> None:
    """Give every box its x, near what it is joined with, and its y."""
    for row in rows:
        _spread(row, [0.0] * len(row))
    for turn in range(40):
        for row in rows if turn % 2 == 0 else reversed(rows):
            _spread(row, [_mean([n.x for n in box.above + box.below], box.x) for box in row])
    y: float = MARGIN
    for row in rows:
        height = max(box.height for box in row)
        for box in row:
            if not box.name:
                box.height = height
            box.y = y + (height - box.height) / 2
        y += height + ROW_GAP


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _spread(row: list[Box], wanted: list[float]) -> None:
    """As near to where they are wanted as can be, in their order and without touching one another.

    With the least distances subtracted, positions must only not descend: neighbours that do are put together
    at their mean.
    """
    offsets = [0.0]
    for left, right in pairwise(row):
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + GAP)
    groups: list[tuple[float, int]] = []
    for want, offset in zip(wanted, offsets, strict=True):
        mean, count = want - offset, 1
        while groups and groups[-1][0] > mean:
            other, others = groups.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        groups.append((mean, count))
    means = [mean for mean, count in groups for _ in range(count)]
    for box, mean, offset in zip(row, means, offsets, strict=True):
        box.x = mean + offset


# -- drawing -----------------------------------------------------------------------------------


def draw(root: Path = ROOT) -> str:
    """The picture, as SVG."""
    layers = modules(root)
    edges = arrows(root, layers)
    boxes = {name: Box(name, found) for name, found in layers.items() if name not in LEAVES}
    rows, ways = rows_of(boxes, edges)
    place(rows)
    leaves = [name for name in layers if name in LEAVES]
    everything = [box for row in rows for box in row]
    left = min(box.x - box.width / 2 for box in everything) - MARGIN
    right = max(box.x + box.width / 2 for box in everything) + MARGIN
    for box in everything:
        box.x -= left
    width = right - left
    foot = max(box.y + box.height for box in everything) + ROW_GAP / 2

    importers = sorted({upper for upper, _ in edges})
    body = [part for way in ways for part in _arrow(way, rows, importers.index(way[0].name))]
    body += [part for box in boxes.values() for part in _box(box)]
    body.append(_rect("box", MARGIN, foot, width - 2 * MARGIN, TITLE + LINE + PAD / 2))
    body.append(_text("name", MARGIN + PAD, foot + 16, "for all of them"))
    body.append(_text("", MARGIN + PAD, foot + TITLE + 11, "   ".join(leaves)))
    note = foot + TITLE + LINE + PAD / 2 + 22
    body.append(
        _text("", MARGIN, note, "arrow: imports.  dashed: some modules only.  blue box: pure, no I/O.")
    )
    height = note + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}"'
            f' width="{width:.0f}" height="{height:.0f}">',
            "<title>The layers of nbdbm, drawn from its imports by make picture</title>",
            f"<style>{STYLE}</style>",
            _rect("paper", 0, 0, width, height),
            *body,
            "</svg>\n",
        ]
    )


def _rect(style: str, x: float, y: float, width: float, height: float) -> str:
    corner = ' rx="5"' if style != "paper" else ""
    return (
        f'<rect class="{style}" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}"{corner}/>'
    )


def _text(style: str, x: float, y: float, words: str) -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.0f}" y="{y:.0f}" xml:space="preserve">{words}</text>'


def _box(box: Box) -> list[str]:
    left = box.x - box.width / 2
    out = [_rect("pure" if box.name in PURE else "box", left, box.y, box.width, box.height)]
    out.append(_text("name", left + PAD, box.y + 16, box.title))
    lines = -(-len(box.modules) // box.columns)
    for number, module in enumerate(box.modules):
        column, line = divmod(number, lines)
        out.append(_text("", left + PAD + column * box.column, box.y + TITLE + 11 + line * LINE, module))
    return out


def _arrow(way: list[Box], rows: list[list[Box]], colour: int) -> list[str]:
    """From the lower edge of the first box to the upper edge of the last one, straight through rows."""
    bounds = {
        id(box): (min(b.y for b in row), max(b.y + b.height for b in row)) for row in rows for box in row
    }
    x, y = _port(way[0], way[1], down=True), way[0].y + way[0].height
    path = [f"M{x:.0f},{y:.0f}"]
    for box, after in pairwise(way):
        floor, ceiling = bounds[id(box)][1], bounds[id(after)][0]
        goal = _port(after, box, down=False) if after.name else after.x
        middle = (floor + ceiling) / 2
        path.append(f"V{floor:.0f}C{x:.0f},{middle:.0f} {goal:.0f},{middle:.0f} {goal:.0f},{ceiling:.0f}")
        x = goal
    end = way[-1].y
    path.append(f"V{end - 6:.0f}")
    few = " few" if way[-1].name not in ALLOWED.get(way[0].name, ()) else ""
    style = f"a{colour % COLOURS}"
    return [
        f'<path class="arrow {style}{few}" d="{"".join(path)}"/>',
        f'<path class="{style} head" d="M{x:.0f},{end:.0f}l-4,-8h8z"/>',
    ]


def _port(box: Box, other: Box, *, down: bool) -> float:
    """Where the arrow to or from ``other`` touches ``box``: evenly spaced, in an order without crossings."""
    others = sorted(box.below if down else box.above, key=lambda b: b.x)
    number = next(n for n, b in enumerate(others) if b is other)
    return box.x - box.width / 2 + box.width * (number + 1) / (len(others) + 1)


# -- the file ----------------------------------------------------------------------------------


def complaints(root: Path = ROOT) -> list[str]:
    """One line if the file is not what would be drawn now."""
    path = root / PICTURE
    if path.exists() and path.read_text() == draw(root):
        return []
    return [f"{PICTURE}: modules or imports between layers have changed; `make picture` draws it anew"]


def write(root: Path = ROOT) -> None:
    """Draw the file anew."""
    (root / PICTURE).write_text(draw(root))


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    problems = complaints()
    print("\n".join(problems) or "picture: ok")
    sys.exit(bool(problems))
