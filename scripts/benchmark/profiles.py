"""Where a server's time goes: in and out of the kernel, and which system calls, per operation.

The kernel's own accounts say the time (/proc/PID/stat), in an undisturbed run. The calls are counted in a
run of its own, since strace makes every one of them slower; a slower server finds more requests waiting
and takes more of them at once, so the counts are a little low.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.benchmark.clients import ClientFailed

if TYPE_CHECKING:
    from scripts.benchmark.servers import Contender
    from scripts.benchmark.works import Bench, Work

ATTACH_TIMEOUT = 10.0
"""Seconds."""

RARE = 0.05
"""Calls per operation below which a system call is not worth a word."""


@dataclass(frozen=True)
class Profile:
    """One server at one work; seconds and calls per operation."""

    work: str
    contender: str
    user: float
    system: float
    calls: dict[str, float]
    """The most frequent first; empty if they could not be counted."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        calls = ", ".join(f"{name} {count:.2f}" for name, count in self.calls.items())
        times = f"{self.user * 1e6:7.2f} us user {self.system * 1e6:7.2f} us system"
        return f"{self.work:16}{self.contender:28}{times}   {calls or 'calls not counted (no strace)'}"


def profile(bench: Bench, counting: Bench, work: Work, contender: Contender) -> Profile:
    """Measure ``work`` twice: for the time, and for the calls (``counting`` is ``bench`` that counts)."""
    timed = work.measure(bench, contender)
    if "user" not in timed.extra:
        raise ClientFailed(f"{work.name} has no load to be profiled")
    calls: dict[str, float] = {}
    if shutil.which("strace"):
        counted = work.measure(counting, contender)
        for key, count in counted.extra.items():
            if key.startswith("call:") and count / counted.ops >= RARE:
                calls[key.removeprefix("call:")] = count / counted.ops
    return Profile(
        work.name,
        contender.name,
        timed.extra["user"] / timed.ops,
        timed.extra["system"] / timed.ops,
        dict(sorted(calls.items(), key=lambda one: -one[1])),
    )


@contextmanager
def counted_calls(pids: Sequence[int]) -> Iterator[dict[str, int]]:
    """Count the system calls of processes, with their threads; the counts are there after the block."""
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="nbdbm-bench-") as place:
        report, said = Path(place, "report"), Path(place, "said")
        words = ["strace", "-f", "-c", "-U", "name,calls", "-o", str(report)]
        for pid in pids:
            words += ["-p", str(pid)]
        with said.open("wb") as out:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            _await_attached(process, said, len(pids))
            yield found
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(ATTACH_TIMEOUT)
        found.update(parse(report.read_text()))


def _await_attached(process: subprocess.Popen[bytes], said: Path, count: int) -> None:
    limit = time.monotonic() + ATTACH_TIMEOUT
    while said.read_text().count(" attached") < count:
        if process.poll() is not None or time.monotonic() > limit:
            raise ClientFailed(f"strace: {said.read_text().strip()[-200:] or 'did not attach'}")
        time.sleep(0.01)


def parse(report: str) -> dict[str, int]:
    """Calls by name, from strace's summary of two columns."""
    found: dict[str, int] = {}
    for line in report.splitlines():
        words = line.split()
        if len(words) == 2 and words[1].isdigit() and words[0] != "total":
            found[words[0]] = int(words[1])
    return found
