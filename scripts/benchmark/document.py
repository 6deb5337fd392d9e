"""The figures in docs/performance.md: put there from the last results, between its own words.

    python -m scripts.benchmark.document            renew it from docs/performance/*.json

A figure lives between ``<!-- figures: NAME -->`` and ``<!-- end -->``; everything else is written by
hand and stays. The drawings beside the results are renewed too.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.benchmark.images import GIB, MIB
from scripts.benchmark.plots import Panel, draw
from scripts.benchmark.report import number

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "performance.md"

BLOCK = re.compile(r"(<!-- figures: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)

OURS = "nbdbm"

MOST_CALLS = 6
"""System calls shown of each server, the most frequent ones."""


def main() -> int:
    place = DOCUMENT.with_suffix("")
    found = {path.stem: json.loads(path.read_text()) for path in sorted(place.glob("*.json"))}
    try:
        text = renewed(DOCUMENT.read_text(), found)
        made = drawings(found)
    except KeyError as error:
        print(f"document: docs/performance.md wants {error}, which is not there", file=sys.stderr)
        return 1
    for name, drawing in made.items():
        (place / name).write_text(drawing)
    DOCUMENT.write_text(text)
    return 0


def drawings(found: Mapping[str, Any]) -> dict[str, str]:
    """An SVG for each kind of growth, by file name."""
    made = {}
    for figure in found["growth"]["figures"]:
        panels = [Panel(one["title"], one["unit"], one["series"]) for one in figure["panels"]]
        made[f"{figure['name']}.svg"] = draw(panels, figure["marks"], figure["axis"])
    return made


def renewed(text: str, found: Mapping[str, Any]) -> str:
    """``text`` with every figure made anew. Raises KeyError for a figure or a result that is not known."""
    return BLOCK.sub(lambda block: block[1] + BLOCKS[block[2]](found) + block[3], text)


def _shape(found: Mapping[str, Any]) -> str:
    """When, where, what."""
    run = found["bench"]
    names = dict.fromkeys(name for work in run["works"] for name in work["contenders"])
    peers = ", ".join(name for name in names if name != OURS)
    machine = run["machine"]
    lines = [
        f"- {run['date'][:10]}, {run['seconds_taken'] / 60:.0f} minutes, {run['rounds']} rounds of "
        f"{run['seconds']:g} s" + (f", 1/{run['scale']} of the data" if run["scale"] > 1 else ""),
        f"- {machine['cpus']} processors ({machine['cpu'] or 'of unknown make'}), "
        f"{machine['memory'] / GIB:.0f} GiB of memory, Linux {machine['kernel']}",
        f"- nbdbm on Python {machine['python']}, beside {peers}",
    ]
    return "\n".join(lines) + "\n"


def _table(found: Mapping[str, Any]) -> str:
    """A row per work: ours, the peer that is hardest to beat, and the goal."""
    rows = []
    for work in found["bench"]["works"]:
        every, best = work["contenders"], work["best_peer"]
        title = f"`{work['name']}`: {work['title']}"
        if OURS not in every:
            rows.append([title, work["unit"], "skipped", "", "", "", "", "", ""])
            continue
        ours, theirs = every[OURS], every.get(best)
        rows.append([
            title, work["unit"], _value(ours), f"{_value(theirs)}, {best}" if theirs else "",
            f"{work['ratio']:.2f}" if work["ratio"] else "", _goal(work),
            {True: "yes", False: "**no**", None: ""}[work["met"]],
            _both(ours, theirs, "cpu_per_op", 1e6), _both(ours, theirs, "peak", 1 / MIB),
        ])  # fmt: skip
    heads = ["work", "unit", "nbdbm", "best peer", "ratio", "goal", "met", "CPU µs/op", "peak MiB"]
    return _markdown(heads, rows)


def _peers(found: Mapping[str, Any]) -> str:
    """A row per work: how far we are ahead of each peer, none left out."""
    works = found["bench"]["works"]
    names = [
        name
        for name in dict.fromkeys(name for work in works for name in work["contenders"])
        if name != OURS and not any(name in work["limits"] for work in works)
    ]
    rows = []
    for work in works:
        row = [f"`{work['name']}`"]
        for name in names:
            found_ratio = work["contenders"].get(name, {}).get("ratio")
            row.append(f"{found_ratio:.2f}" if found_ratio else work["skipped"].get(name, ""))
        rows.append(row)
    return _markdown(["work", *names], rows)


def _limit(found: Mapping[str, Any]) -> str:
    """A row per work that a server of memory can do: how near to it we are, in percent."""
    rows = []
    for work in found["bench"]["works"]:
        for name in work["limits"]:
            ours, most = work["contenders"].get(OURS), work["contenders"].get(name)
            if ours and most and most["median"]:
                share = ours["median"] / most["median"]
                rows.append([
                    f"`{work['name']}`", work["unit"], number(ours["median"]), number(most["median"]),
                    f"{share:.0%}", _both(ours, most, "cpu_per_op", 1e6),
                ])  # fmt: skip
    if not rows:
        raise KeyError("a run with --limit")
    return _markdown(["work", "unit", "nbdbm", "the limit", "share", "CPU µs/op"], rows)


def _profile(found: Mapping[str, Any]) -> str:
    """A row per work and server: processor time in and out of the kernel, system calls."""
    rows = []
    for one in found["profile"]["profiles"]:
        calls = one["calls"]
        most = list(calls.items())[:MOST_CALLS]
        shown = ", ".join(f"{name} {count:.2f}" for name, count in most) or "not counted"
        times = [number(one[kind] * 1e6) for kind in ("user", "system")]
        rows.append([f"`{one['work']}`", one["contender"], *times, shown])
    return _markdown(["work", "server", "user µs/op", "system µs/op", "system calls per operation"], rows)


def _growth(found: Mapping[str, Any]) -> str:
    """The drawings, with their figures in words for those who cannot see them."""
    out = []
    for figure in found["growth"]["figures"]:
        points = "".join(f"- {_ends(panel, figure['marks'])}\n" for panel in figure["panels"])
        out.append(f"![cost by {figure['axis']}](performance/{figure['name']}.svg)\n\n{points}")
    return "\n".join(out)


def _ends(panel: Mapping[str, Any], marks: Sequence[str]) -> str:
    """The ends of each line."""
    parts = []
    for name, values in panel["series"].items():
        ends = [(mark, value) for mark, value in zip(marks, values, strict=True) if value is not None]
        if ends:
            (first, low), (last, high) = ends[0], ends[-1]
            parts.append(f"{name} {number(low)} ({first}) to {number(high)} ({last})")
    return f"{panel['title']}, {panel['unit']}: {', '.join(parts)}"


BLOCKS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "shape": _shape,
    "table": _table,
    "peers": _peers,
    "limit": _limit,
    "profile": _profile,
    "growth": _growth,
}


def _value(one: Mapping[str, Any]) -> str:
    return f"{number(one['median'])} ±{one['spread']:.0%}"


def _goal(work: Mapping[str, Any]) -> str:
    if work["goal"] is not None:
        return f"{work['goal']:g}"
    return f"≤ {work['bound']:g} {work['unit']}" if work["bound"] is not None else ""


def _both(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None, key: str, factor: float) -> str:
    """Ours, and theirs in parentheses; nothing where nothing was counted."""
    shown = [number(one[key] * factor) if one and one[key] else "" for one in (ours, theirs)]
    return f"{shown[0]} ({shown[1]})" if shown[1] else shown[0]


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
