"""What was measured: as a table for people, as JSON for programs."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.benchmark.images import MIB
from scripts.benchmark.stats import Sample, Summary, Verdict, ratio, verdict
from scripts.benchmark.works import Work

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Result:
    """One work's samples, by contender; ours is the first of ``order``."""

    work: Work
    order: Sequence[str]
    limits: frozenset[str] = frozenset()
    """Those of ``order`` that are not to be beaten."""
    others: frozenset[str] = frozenset()
    """Those of ``order`` that are other builds of ours."""
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Why there are none, by contender."""

    def add(self, contender: str, sample: Sample) -> None:
        self.samples.setdefault(contender, []).append(sample)

    @property
    def ours(self) -> list[Sample]:
        return self.samples.get(self.order[0], [])

    def verdict(self) -> Verdict | None:
        """Ours against the best peer, None if either is missing."""
        peers = {
            name: samples
            for name, samples in self.samples.items()
            if name != self.order[0] and name not in self.limits and name not in self.others
        }
        return verdict(self.ours, peers, self.work.better) if self.ours else None

    def met(self) -> bool | None:
        """Whether the goal is reached; None if that cannot be said."""
        if not self.ours:
            return None
        if self.work.bound is not None:
            return Summary.of(self.ours).median <= self.work.bound
        found = self.verdict()
        return None if found is None or self.work.goal is None else found.ratio >= self.work.goal

    def as_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        found = self.verdict()
        return {
            "name": self.work.name,
            "title": self.work.title,
            "unit": self.work.unit,
            "better": self.work.better.value,
            "goal": self.work.goal,
            "bound": self.work.bound,
            "met": self.met(),
            "best_peer": found and found.best,
            "ratio": found and found.ratio,
            "contenders": {
                name: {
                    **Summary.of(samples).as_dict(),
                    "ratio": ratio(self.ours, samples, self.work.better) if self.ours else None,
                    "samples": [asdict(sample) for sample in samples],
                }
                for name, samples in self.samples.items()
            },
            "skipped": self.skipped,
            "limits": sorted(self.limits),
        }


def stamp(moment: float) -> str:
    """A time since the epoch, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def machine() -> dict[str, Any]:
    """The shape of the machine, since figures mean nothing without it."""
    model, memory = "", 0
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            memory = int(line.split()[1]) * 1024
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": model,
        "memory": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def table(results: Sequence[Result], order: Sequence[str]) -> Table:
    """A row per work; a column per contender, with the median, the spread and how far we are ahead."""
    from rich.table import Table

    made = Table(title="nbdbm beside its peers: median ±spread, ratio above 1 where nbdbm is ahead")
    made.add_column("work")
    made.add_column("unit")
    for name in order:
        made.add_column(name, justify="right")
    made.add_column("ratio to best", justify="right")
    made.add_column("goal", justify="right")
    made.add_column("CPU µs/op\n(best peer)", justify="right")
    made.add_column("peak MiB\n(best peer)", justify="right")
    for result in results:
        made.add_row(*_row(result, order))
    return made


def _row(result: Result, order: Sequence[str]) -> list[str]:
    work = result.work
    found = result.verdict()
    cells = [f"{work.name}\n[dim]{work.title}[/dim]", work.unit]
    for name in order:
        cells.append(_cell(result, name))
    cells.append(f"[bold]{found.ratio:.2f}x[/bold]\n{found.best}" if found else "")
    cells.append(_goal(result))
    pair = [_summary(result.samples, order[0]), _summary(result.samples, found.best if found else "")]
    cells.append(_pair(pair, lambda one: number(one.cpu_per_op * 1e6) if one.cpu_per_op else "-"))
    cells.append(_pair(pair, lambda one: f"{one.peak / MIB:.0f}" if one.peak else "-"))
    return cells


def _cell(result: Result, name: str) -> str:
    summary = _summary(result.samples, name)
    if summary is None:
        return "[dim]skipped[/dim]" if name in result.skipped else ""
    text = f"{number(summary.median)} ±{summary.spread:.0%}"
    if name == result.order[0]:
        return text
    found = ratio(result.ours, result.samples[name], result.work.better)
    return text if found is None else f"{text}\n[dim]{found:.2f}x[/dim]"


def _goal(result: Result) -> str:
    work, met = result.work, result.met()
    goal = f"{work.goal:g}x" if work.goal is not None else f"≤{work.bound:g} {work.unit}"
    colour = {True: "green", False: "red", None: "dim"}[met]
    return f"[{colour}]{goal}[/{colour}]"


def _summary(samples: Mapping[str, Sequence[Sample]], name: str) -> Summary | None:
    return Summary.of(samples[name]) if samples.get(name) else None


def _pair(pair: Sequence[Summary | None], show: Any) -> str:
    ours, theirs = (show(one) if one is not None else "-" for one in pair)
    return f"{ours}\n[dim]({theirs})[/dim]"


def number(value: float) -> str:
    """Three digits that mean something: 174k, 3.32k, 641, 0.0123."""
    if value >= 1e6:
        return f"{value / 1e6:.3g}M"
    if value >= 1e3:
        return f"{value / 1e3:.3g}k"
    return f"{value:.3g}"
