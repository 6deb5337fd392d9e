"""Fuzz what untrusted bytes reach, with atheris: ``make fuzz``, or one target for longer.

    scripts/fuzz.py [--seconds N] [TARGET...]       look for inputs that break what the targets assert
    scripts/fuzz.py --run TARGET FILE...            run inputs as they are, without atheris
    scripts/fuzz.py --keep [TARGET...]              renew the inputs that tests/fuzz replays

What is learned stays in .fuzz/TARGET, so that the next run goes on from there. A finding ends the run with
its traceback; its input is then .fuzz/TARGET/crash-*, timeout-* or oom-*. Once it is mended, add it to
tests/fuzz/inputs/TARGET.txt.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import logging
import os
import pkgutil
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nbdbm  # noqa: E402
from tests.fuzz.targets import TARGETS  # noqa: E402

WORK = ROOT / ".fuzz"
INPUTS = ROOT / "tests" / "fuzz" / "inputs"

LONGEST = 400
"""Bytes of an input: a script of some dozens of decisions."""

TIMEOUT = 20
"""Seconds for one input, after which it counts as a hang; the slowest good ones take a tenth of one."""

MEMORY = 768 << 20
"""Bytes of address space beyond what the empty process has: more is a MemoryError, and that a finding. What
one image may claim by right (tables, bitmaps, a file of 8 MiB) stays below."""

RSS = 700
"""MiB resident after any number of inputs: more is growth."""

NOT_IMPORTED = ("__main__", "_speed", "nbdbm_plugin")
"""Modules that are no place to look at: what runs when imported, is compiled, or loads in nbdkit only."""


def modules() -> list[str]:
    """The modules in which the fuzzer sees where an input leads to."""
    found = pkgutil.walk_packages(nbdbm.__path__, "nbdbm.")
    return [module.name for module in found if not module.name.endswith(NOT_IMPORTED)]


def kept(target: str) -> Iterator[bytes]:
    """The inputs in the repository."""
    path = INPUTS / f"{target}.txt"
    for line in path.read_text().splitlines() if path.exists() else []:
        if line and not line.startswith("#"):
            yield base64.b64decode(line.split()[0])


def quiet() -> None:
    """Warnings about damaged images are not what is looked for."""
    logging.disable(logging.WARNING)
    logging.getLogger("nbdbm").addHandler(logging.NullHandler())
    logging.getLogger("nbdbm").propagate = False


def prepare(target: str, module: ModuleType) -> Path:
    """The directory of the target's inputs, with those to begin with in it."""
    corpus = WORK / target / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for prefix, inputs in (("start", module.starts()), ("kept", kept(target))):
        for number, data in enumerate(inputs):
            (corpus / f"{prefix}-{number}").write_bytes(data)
    return corpus


def fuzz_one(target: str, options: list[str]) -> None:
    """In a process of its own: never returns."""
    import atheris

    with atheris.instrument_imports(include=["nbdbm"]):
        for name in modules():
            importlib.import_module(name)
    module = importlib.import_module(f"tests.fuzz.targets.{target}")
    corpus = prepare(target, module)
    quiet()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    fixed = [f"-timeout={TIMEOUT}", f"-rss_limit_mb={RSS}", f"-max_len={LONGEST}", "-print_final_stats=1"]
    places = [f"-artifact_prefix={WORK / target}/", str(corpus)]
    atheris.Setup([sys.argv[0], *fixed, *options, *places], module.run)
    atheris.Fuzz()


def fuzz(targets: list[str], seconds: int) -> int:
    """Each target in turn; the number of those with findings."""
    findings = 0
    for target in targets:
        print(f"== {target}: {seconds} s", flush=True)
        done = subprocess.run([sys.executable, __file__, "--one", target, f"-max_total_time={seconds}"])
        if done.returncode:
            print(f"== {target}: a finding, its input is in {WORK / target}", flush=True)
            findings += 1
    return findings


def run(target: str, files: list[str]) -> None:
    """Run inputs without atheris."""
    module = importlib.import_module(f"tests.fuzz.targets.{target}")
    quiet()
    for name in files:
        path = Path(name)
        for one in sorted(path.iterdir()) if path.is_dir() else [path]:
            try:
                module.run(one.read_bytes())
            except BaseException:
                print(f"failed: {one}", file=sys.stderr)
                raise


def reached(module: ModuleType, data: bytes) -> set[tuple[object, int, int]]:
    """The steps from line to line, in the package's code, that an input leads to."""
    found: set[tuple[object, int, int]] = set()
    package = str(ROOT / "nbdbm")

    def enter(frame: FrameType, event: str, argument: object) -> Callable[..., object] | None:
        if not frame.f_code.co_filename.startswith(package):
            return None
        code, before = frame.f_code, 0

        def step(frame: FrameType, event: str, argument: object) -> Callable[..., object]:
            nonlocal before
            if event == "line":
                found.add((code, before, frame.f_lineno))
                before = frame.f_lineno
            return step

        return step

    sys.settrace(enter)
    try:
        module.run(data)
    finally:
        sys.settrace(None)
    return found


def keep(targets: list[str]) -> None:
    """Choose inputs that together reach what all do, the shortest first, and write them down."""
    quiet()
    for target in targets:
        module = importlib.import_module(f"tests.fuzz.targets.{target}")
        inputs = {path.read_bytes() for path in prepare(target, module).iterdir()}
        path = INPUTS / f"{target}.txt"
        old = path.read_text().splitlines() if path.exists() else []
        # A line with a word behind the input is a finding, and is kept for good.
        lines = [line for line in old if line.startswith("#") or " " in line]
        seen: set[tuple[object, int, int]] = set()
        for data in sorted(inputs, key=lambda data: (len(data), data)):
            steps = reached(module, data)
            if data and not steps <= seen:
                seen |= steps
                lines.append(base64.b64encode(data).decode())
        path.write_text("\n".join(lines) + "\n")
        print(f"{target}: {len(lines)} lines, {path.stat().st_size} bytes, {len(seen)} steps")


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        fuzz_one(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=int(os.environ.get("FUZZ_SECONDS", "60")))
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("arguments", nargs="*", metavar="TARGET", help=f"one of {', '.join(TARGETS)}")
    options = parser.parse_args()
    targets = options.arguments[:1] if options.run else options.arguments or list(TARGETS)
    if not targets:
        parser.error("--run: of which target?")
    if wrong := set(targets) - set(TARGETS):
        parser.error(f"no target: {', '.join(sorted(wrong))}")
    if options.run:
        run(targets[0], options.arguments[1:])
        return 0
    if options.keep:
        keep(targets)
        return 0
    return 1 if fuzz(targets, options.seconds) else 0


if __name__ == "__main__":
    sys.exit(main())
