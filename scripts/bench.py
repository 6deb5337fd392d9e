"""nbdbm beside qemu-nbd: the same images and clients, in rounds that alternate, over Unix sockets.

    python -m scripts.bench                      everything (about twenty minutes)
    python -m scripts.bench --quick randread     one work, a few seconds
    python -m scripts.bench --profile randread   where its time goes
    python -m scripts.bench --also "old=/elsewhere/.venv/bin/nbdbm" randread

A benchmark, not a test: its status is 0 whoever wins. Needs qemu-utils, libnbd-bin, python3-libnbd and fio;
a QEMU put beside the system's own by scripts/unpack_peers.sh takes part. Images are made in a temporary
directory that is removed in the end; ``--dir`` keeps them for the next run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.benchmark import images, servers  # noqa: E402
from scripts.benchmark.clients import ClientFailed  # noqa: E402
from scripts.benchmark.profiles import profile  # noqa: E402
from scripts.benchmark.report import Result, machine, number, stamp, table  # noqa: E402
from scripts.benchmark.servers import CannotServe, Contender  # noqa: E402
from scripts.benchmark.works import WORKS, Bench, Work  # noqa: E402

TOOLS = ("qemu-img", "qemu-io", "qemu-nbd", "fio", "nbdcopy", "fincore")

FAILURES = (CannotServe, ClientFailed, images.NotEvicted)
"""What ends one contender's part in one work."""

FRESH_SPACE = 4 * images.GIB
"""Bytes that a work on a fresh image writes at most, at scale 1."""


@dataclass(frozen=True)
class Plan:
    """What is to be done."""

    works: Sequence[Work]
    contenders: Sequence[Contender]
    """Ours first."""
    rounds: int
    seconds: float
    scale: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.list:
        for work in WORKS:
            print(f"{work.name:20}{work.title}")
        return 0
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        print(f"bench: missing programs: {', '.join(missing)} (make peers installs them)", file=sys.stderr)
        return 1
    plan = Plan(
        works=[work for work in WORKS if not options.works or work.name in options.works],
        contenders=_contenders(options),
        rounds=options.rounds or (2 if options.quick else 5),
        seconds=options.seconds or (1.0 if options.quick else 2.0),
        scale=options.scale or (4 if options.quick else 1),
    )
    with contextlib.ExitStack() as stack:
        if options.dir is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdbm-bench-")))
        else:
            place = options.dir.resolve()
            place.mkdir(parents=True, exist_ok=True)
        too_little = shortage(plan, place)
        if too_little is not None:
            print(f"bench: {too_little}", file=sys.stderr)
            return 1
        began = time.time()
        if options.profile:
            document = {"date": stamp(began), "machine": machine(), "profiles": profiles(plan, place)}
        else:
            results = run(plan, place, keep=options.dir is not None)
            document = _document(plan, results, began)
            _show(results, [contender.name for contender in plan.contenders])
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench", description="Measure nbdbm serve beside qemu-nbd.", allow_abbrev=False
    )
    add = parser.add_argument
    add("works", nargs="*", type=_work, metavar="WORK", help="only these works, by name (see --list)")
    add("--list", action="store_true", help="name the works and end")
    add("--quick", action="store_true", help="two rounds of 1 s with a quarter of the data")
    add("--rounds", type=_positive, metavar="N", help="rounds of each work (default: 5)")
    add("--seconds", type=float, metavar="S", help="length of a load without an end (default: 2)")
    add("--scale", type=_positive, metavar="N", help="an Nth of the data, extents and tables")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--dir", type=Path, metavar="DIR", help="keep the images here, and use those that are there")
    add("--peers", default="", metavar="TEXT", help="only the peers whose name has TEXT in it")
    add("--also", action="append", default=[], type=_also, metavar="NAME=CMD", help="another build of nbdbm")
    add(
        "--profile",
        action="store_true",
        help="where the time goes instead: user, kernel, system calls per operation",
    )
    add("--limit", action="store_true", help="nbdkit's memory plugin too: what client and machine allow")
    return parser


def _work(text: str) -> str:
    if text not in {work.name for work in WORKS}:
        raise argparse.ArgumentTypeError(f"no work is named {text!r}; --list names them")
    return text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _also(text: str) -> Contender:
    name, found, command = text.partition("=")
    if not (name and found and command):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COMMAND")
    return servers.nbdbm(name, command)


def _contenders(options: argparse.Namespace) -> list[Contender]:
    found = [servers.nbdbm(), *options.also]
    found += [peer for peer in servers.peers() if options.peers in peer.name]
    if options.limit:
        found.append(servers.nbdkit_memory())
    return found


def shortage(plan: Plan, place: Path) -> str | None:
    """What is said if the images may not fit into ``place``, None if they will."""
    largest = max([images.SPACE[work.image] for work in plan.works if work.image] or [0])
    needed = (largest + FRESH_SPACE + 2 * images.GIB) // plan.scale
    free = shutil.disk_usage(place).free
    if free >= needed:
        return None
    return (
        f"{place}: {free / images.GIB:.1f} GiB are free and {needed / images.GIB:.1f} may be needed; "
        "name another place (--dir) or take less (--scale)"
    )


def run(plan: Plan, place: Path, *, keep: bool) -> list[Result]:
    """Measure everything; what cannot be measured is skipped by name."""
    made = images.Images(place, plan.scale)
    bench = Bench(made, plan.seconds)
    results: list[Result] = []
    for number_of, work in enumerate(plan.works):
        result = Result(
            work,
            [contender.name for contender in plan.contenders],
            frozenset(contender.name for contender in plan.contenders if contender.limit),
            frozenset(contender.name for contender in plan.contenders[1:] if contender.ours),
        )
        results.append(result)
        if work.image is not None:
            _say(f"{work.name}: preparing the image")
            made.warm(work.image)
        for count in range(plan.rounds):
            for contender in plan.contenders:
                _say(f"{work.name}: round {count + 1} of {plan.rounds}, {contender.name}")
                _measure(bench, result, contender)
            if plan.contenders[0].name in result.skipped:
                break
        if not keep and work.image not in {later.image for later in plan.works[number_of + 1 :]}:
            made.drop(work.image or "fresh")
        _say("")
        _report(result)
    return results


def profiles(plan: Plan, place: Path) -> list[dict[str, Any]]:
    """Profile every work; what cannot be is named."""
    bench = Bench(images.Images(place, plan.scale), plan.seconds)
    found: list[dict[str, Any]] = []
    for work in plan.works:
        for contender in plan.contenders:
            if contender.limit and not work.fio:
                continue
            try:
                one = profile(bench, replace(bench, count_calls=True), work, contender)
            except FAILURES as error:
                print(f"{work.name:16}{contender.name}: {error}", flush=True)
                continue
            print(one, flush=True)
            found.append(one.as_dict())
    return found


def _measure(bench: Bench, result: Result, contender: Contender) -> None:
    """One round of one contender; the first failure ends its part in this work."""
    if contender.limit and not result.work.fio:
        result.skipped[contender.name] = "serves no images"
    if contender.name in result.skipped or result.order[0] in result.skipped:
        return
    try:
        result.add(contender.name, result.work.measure(bench, contender))
    except FAILURES as error:
        result.skipped[contender.name] = str(error)
        result.samples.pop(contender.name, None)


def _say(text: str) -> None:
    """What is going on, on a line that is written over; for people only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _report(result: Result) -> None:
    """One line as soon as a work is done: the table comes in the end."""
    found = result.verdict()
    if found is not None:
        print(f"{result.work.name:20}{found.ratio:6.2f}x {found.best}", flush=True)
    elif result.ours:
        middle = sorted(sample.value for sample in result.ours)[len(result.ours) // 2]
        print(f"{result.work.name:20}{number(middle):>6} {result.work.unit}", flush=True)
    for name, reason in result.skipped.items():
        print(f"{result.work.name:20}skipped for {name}: {reason}", flush=True)


def _show(results: Sequence[Result], order: Sequence[str]) -> None:
    from rich.console import Console

    # Wide enough for every column where the output is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 80 + 20 * len(order))
    console.print(table([result for result in results if result.samples], order))


def _document(plan: Plan, results: Sequence[Result], began: float) -> dict[str, Any]:
    return {
        "date": stamp(began),
        "seconds_taken": round(time.time() - began, 1),
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        "scale": plan.scale,
        "works": [result.as_dict() for result in results],
    }


if __name__ == "__main__":
    sys.exit(main())
