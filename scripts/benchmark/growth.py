"""How costs grow: in the size of the disk, and in the number of bitmaps, extents and connections.

    python -m scripts.benchmark.growth              everything, about four minutes
    python -m scripts.benchmark.growth extents      one of them

nbdbm and the newest qemu-nbd in turn, as in scripts/bench.py, with a load of a second at each point.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchmark import clients, servers
from scripts.benchmark.clients import ClientFailed, Load
from scripts.benchmark.images import GIB, KIB, MIB, TIB, Images, add_bitmap, create, qemu_io
from scripts.benchmark.report import machine, number, stamp
from scripts.benchmark.servers import CannotServe, Contender, Serving, serve

SECONDS = 1.0
"""Length of a load without an end."""

BITMAP = "growing"


@dataclass(frozen=True)
class Growth:
    """Something that grows, and what is measured while it does."""

    name: str
    axis: str
    values: Sequence[int]
    label: Callable[[int], str]
    panels: Sequence[tuple[str, str]]
    """Title and unit of each figure."""
    measure: Callable[[Path, Contender, int], Sequence[float]]
    """One round at one value: a number per panel. The path is a directory for images, which stay."""
    rounds: int = 1


def disk(place: Path, contender: Contender, size: int) -> Sequence[float]:
    """An empty disk with a bitmap that records; the first write is 4 KiB in its middle, and a flush."""
    path = place / "disk.qcow2"
    path.unlink(missing_ok=True)
    create(path, size)
    add_bitmap(path, BITMAP)
    with serve(contender, Serving(path, writable=True, bitmaps=(BITMAP,))) as running:
        written = clients.write_once(running.uri, size // 2)
        peak = running.peak()
        return running.start_time, written, running.stop(), peak / MIB


def bitmaps(place: Path, contender: Contender, count: int) -> Sequence[float]:
    """A full disk of 256 MiB (a quarter of what the table's work on writing has)."""
    path = place / f"bitmaps-{count}.qcow2"
    if not path.exists():
        Images(place, 4).filled(path, GIB // 4)
        for at in range(count):
            add_bitmap(path, f"bitmap{at:02}")
    with serve(contender, Serving(path, writable=True)) as running:
        result = clients.fio(running.uri, Load("randwrite", 4 * KIB, 16), SECONDS)
        # With a flush: stopping is to be about the bitmaps, and not about the data.
        clients.write_once(running.uri, 0)
        return result.iops, running.start_time, running.stop()


def extents(place: Path, contender: Contender, count: int) -> Sequence[float]:
    """Every other cluster of 4 KiB has data and is dirty: as many extents in either context."""
    path = place / f"extents-{count}.qcow2"
    if not path.exists():
        create(path, count * 4 * KIB, "-o", "cluster_size=4096")
        add_bitmap(path, BITMAP)
        qemu_io(path, (f"write -q -P 7 {at * 8 * KIB} {4 * KIB}" for at in range(count // 2)))
    contexts = (f"qemu:dirty-bitmap:{BITMAP}", "base:allocation")
    with serve(contender, Serving(path, bitmaps=(BITMAP,))) as running:
        found = [clients.block_status(running.uri, context) for context in contexts]
        return [one["seconds"] / one["extents"] * 1e6 for one in found]


def connections(place: Path, contender: Contender, count: int) -> Sequence[float]:
    """One request at a time on each; the memory is the server's while they do nothing."""
    path = Images(place, 4).warm("data")
    with serve(contender, Serving(path, connections=count + 8)) as running:
        with clients.idle_connections(running.uri, count):
            memory = running.rss()
        result = clients.fio(running.uri, Load("randread", 4 * KIB, 1, jobs=count), SECONDS)
        return result.iops, memory / MIB


def _bytes(value: int) -> str:
    return f"{value // TIB} TiB" if value >= TIB else f"{value // GIB} GiB"


def _count(value: int) -> str:
    return number(value) if value >= 1000 else str(value)


GROWTHS: tuple[Growth, ...] = (
    Growth(
        "disk", "size of the disk", [GIB * 4**power for power in range(8)], _bytes,
        [("start to the first connection", "seconds"), ("first write", "seconds"), ("clean stop", "seconds"),
         ("peak memory", "MiB")],
        disk, rounds=3,
    ),
    Growth(
        "bitmaps", "bitmaps that record", [0, *(2**power for power in range(7))], _count,
        [("4 KiB random write, depth 16", "operations per second"),
         ("start to the first connection", "seconds"), ("clean stop after the writes", "seconds")],
        bitmaps, rounds=3,
    ),
    Growth(
        "extents", "extents", [1000, 10_000, 100_000, 1_000_000], _count,
        [("block status of a bitmap", "microseconds per extent"),
         ("block status of base:allocation", "microseconds per extent")],
        extents, rounds=3,
    ),
    Growth(
        "connections", "connections", [4**power for power in range(5)], _count,
        [("4 KiB random read, depth 1 on each", "operations per second"),
         ("memory while all of them idle", "MiB")],
        connections, rounds=3,
    ),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="growth", description="Measure how costs grow.", allow_abbrev=False)
    parser.add_argument(
        "names", nargs="*", choices=[[], *(growth.name for growth in GROWTHS)], metavar="NAME"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    options = parser.parse_args(arguments)
    chosen = [growth for growth in GROWTHS if not options.names or growth.name in options.names]
    peer = servers.newest_peer()
    contenders = [servers.nbdbm(), *([peer] if peer else [])]
    began = time.time()
    figures = []
    for growth in chosen:
        with tempfile.TemporaryDirectory(prefix="nbdbm-growth-") as place:
            figures.append(grow(growth, contenders, Path(place)))
    if options.json is not None:
        document = {"date": stamp(began), "machine": machine(), "figures": figures}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def grow(growth: Growth, contenders: Sequence[Contender], place: Path) -> dict[str, Any]:
    """Measure it at all values, in rounds that alternate; print a line for each value."""
    series: list[dict[str, list[float | None]]] = [
        {contender.name: [] for contender in contenders} for _ in growth.panels
    ]
    for value in growth.values:
        samples: dict[str, list[Sequence[float]]] = {contender.name: [] for contender in contenders}
        for _ in range(growth.rounds):
            for contender in contenders:
                try:
                    samples[contender.name].append(growth.measure(place, contender, value))
                except (CannotServe, ClientFailed) as error:
                    print(f"{growth.name}: {growth.label(value)}: {contender.name}: {error}", file=sys.stderr)
        for at, by_name in enumerate(series):
            for name, rounds in samples.items():
                by_name[name].append(statistics.median(one[at] for one in rounds) if rounds else None)
        shown = (f"{name} {_last(series, name)}" for name in samples)
        print(f"{growth.name:12}{growth.label(value):>8}   {'   '.join(shown)}", flush=True)
    return {
        "name": growth.name,
        "axis": growth.axis,
        "marks": [growth.label(value) for value in growth.values],
        "panels": [
            {"title": title, "unit": unit, "series": by_name}
            for (title, unit), by_name in zip(growth.panels, series, strict=True)
        ],
    }


def _last(series: Sequence[dict[str, list[float | None]]], name: str) -> str:
    found = (by_name[name][-1] for by_name in series)
    return " ".join("-" if value is None else number(value) for value in found)


if __name__ == "__main__":
    sys.exit(main())
