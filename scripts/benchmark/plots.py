"""Line charts as SVG: some panels side by side, one legend for all. No dependency, and no style but ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from scripts.benchmark.report import number

WIDTH, HEIGHT = 360, 250
"""Of one panel with its margins; units of the drawing, about pixels."""

LEFT, RIGHT, TOP, BOTTOM = 58, 18, 44, 46
"""Margins of a panel: scale, nothing, title, labels."""

LEGEND = 30
"""Height of the legend, above the panels."""

LETTER = 6.2
"""Width of a letter of the labels at most, for those that would overlap."""

DECADE = 10.0
"""An axis covers a decade at least: noise must not look like growth."""

STYLE = """
  .paper { fill: #ffffff } .text { fill: #24292f } .dim { fill: #57606a } .grid { stroke: #d0d7de }
  .s0 { stroke: #0969da; fill: #0969da } .s1 { stroke: #bc4c00; fill: #bc4c00 }
  .s2 { stroke: #8250df; fill: #8250df } .s3 { stroke: #1a7f37; fill: #1a7f37 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .text { fill: #e6edf3 } .dim { fill: #9198a1 } .grid { stroke: #30363d }
    .s0 { stroke: #58a6ff; fill: #58a6ff } .s1 { stroke: #f0883e; fill: #f0883e }
    .s2 { stroke: #bc8cff; fill: #bc8cff } .s3 { stroke: #3fb950; fill: #3fb950 }
  }
  text { font-family: sans-serif; font-size: 11px }
  .title { font-size: 13px; font-weight: bold }
  .line { fill: none; stroke-width: 2 }
"""
"""The drawing brings its own paper, so that it can be read whatever the page around it is like."""

DASHES = ("", "7 4", "2 3", "8 3 2 3")
"""By series: they can be told apart without colours."""


@dataclass(frozen=True)
class Panel:
    """One chart: the same marks below as its neighbours, a scale of its own."""

    title: str
    unit: str
    series: Mapping[str, Sequence[float | None]]
    """A value per mark; None where there is none. All series of a drawing have the same names."""


def draw(panels: Sequence[Panel], marks: Sequence[str], axis: str, columns: int = 2) -> str:
    """An SVG document. ``marks`` are the labels of the horizontal axis, evenly spaced.

    The marks are meant to be a geometric sequence, so even spaces make a logarithmic axis; a zero, which
    has no logarithm, takes the place in front.
    """
    names = list(panels[0].series)
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = columns * WIDTH, LEGEND + rows * HEIGHT
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        *_legend(names),
    ]
    for at, panel in enumerate(panels):
        left, top = at % columns * WIDTH, LEGEND + at // columns * HEIGHT
        out.append(f'<g transform="translate({left} {top})">')
        out += _panel(panel, names, marks, axis)
        out.append("</g>")
    return "\n".join([*out, "</svg>"]) + "\n"


def scale(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a logarithmic axis for positive ``values``: 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    steps = [digit * 10.0**power for power in range(-12, 13) for digit in (1, 2, 5)]
    bottom = max(step for step in steps if step <= low * 1.0001)
    top = min(step for step in steps if step >= high * 0.9999)
    while top / bottom < DECADE * 0.9999:
        # Room on the side that has less of it.
        if low / bottom < top / high:
            bottom = max(step for step in steps if step < bottom * 0.9999)
        else:
            top = min(step for step in steps if step > top * 1.0001)
    return bottom, top


def _panel(panel: Panel, names: Sequence[str], marks: Sequence[str], axis: str) -> list[str]:
    positive = [value for name in names for value in panel.series[name] if value is not None and value > 0]
    bottom, top = scale(positive or [1.0])
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(at: int) -> float:
        return LEFT + (right - LEFT) * (at + 0.5) / len(marks)

    def up(value: float) -> float:
        part = math.log(max(value, bottom) / bottom) / math.log(top / bottom)
        return floor - (floor - TOP) * part

    out = [_text(LEFT, TOP - 22, panel.title, "text title"), _text(LEFT, TOP - 8, panel.unit, "dim")]
    for value in _ticks(bottom, top):
        y = up(value)
        out.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        out.append(_text(LEFT - 6, y + 4, number(value), "dim", "end"))
    # Every second or third label where they would touch.
    each = math.ceil((max(map(len, marks)) + 1) * LETTER / ((right - LEFT) / len(marks)))
    for at, mark in enumerate(marks):
        if (len(marks) - 1 - at) % each == 0:
            out.append(_text(across(at), floor + 16, mark, "dim", "middle"))
    out.append(_text((LEFT + right) / 2, floor + 34, axis, "dim", "middle"))
    for number_of, name in enumerate(names):
        points = [(across(at), up(v)) for at, v in enumerate(panel.series[name]) if v is not None]
        out += _line(points, number_of)
    return out


def _ticks(bottom: float, top: float) -> list[float]:
    """The powers of ten, with 2 and 5 between them where there are few."""
    digits = (1, 2, 5) if top / bottom <= 1000.1 else (1,)
    found = []
    for power in range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1):
        found += [digit * 10.0**power for digit in digits]
    return [value for value in found if bottom * 0.9999 <= value <= top * 1.0001]


def _line(points: Sequence[tuple[float, float]], number_of: int) -> list[str]:
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style, dashes = f"s{number_of % len(DASHES)}", DASHES[number_of % len(DASHES)]
    out = [
        f'<polyline class="{style} line" style="fill: none" stroke-dasharray="{dashes}" points="{corners}"/>'
    ]
    for x, y in points:
        if number_of % 2:
            out.append(f'<rect class="{style}" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>')
        else:
            out.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>')
    return out


def _legend(names: Sequence[str]) -> list[str]:
    out: list[str] = []
    left = float(LEFT)
    for number_of, name in enumerate(names):
        out += _line([(left, 20.0), (left + 26, 20.0)], number_of)
        out.append(_text(left + 34, 24, name, "text"))
        left += 34 + (len(name) + 3) * LETTER + 14
    return out


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'
