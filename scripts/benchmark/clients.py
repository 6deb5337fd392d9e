"""The programs that put the load on: fio's nbd engine, nbdcopy, libnbd's Python binding."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import qemu

SCRIPT = Path(__file__).resolve().parent / "libnbd_client.py"
TIMEOUT = 600.0
"""Seconds for one run of a client."""

MOST_PROCESSES = 16
"""fio's jobs are threads where there are more: starting hundreds of processes is work of its own."""


class ClientFailed(Exception):
    """A client ended with an error; the text says which and why."""


@dataclass(frozen=True)
class Load:
    """What fio is to do: its own words for it."""

    rw: str
    block: int
    """Bytes."""
    depth: int
    jobs: int = 1
    """Connections, each with ``depth`` requests."""
    mix: int | None = None
    """Percentage of reads where ``rw`` is both."""
    amount: int | None = None
    """Bytes per job after which it ends, whatever the time is."""
    offset: int = 0
    """Where on the disk it begins, bytes."""
    size: int | None = None
    """How much of the disk it uses, bytes; None for all that follows."""


@dataclass(frozen=True)
class FioResult:
    """Reads and writes of all jobs together."""

    iops: float
    bandwidth: float
    """Bytes per second."""
    ops: int
    p99: float
    """The slowest percent's completion time, seconds; the worse of reads and writes."""

    @classmethod
    def parse(cls, output: str) -> FioResult:
        """From ``--output-format=json --group_reporting``; raises ClientFailed if a job failed.

        fio prints warnings before the JSON.
        """
        at = output.find("{")
        if at < 0:
            raise ClientFailed(f"fio: no result: {output.strip()[-200:]}")
        jobs = json.loads(output[at:])["jobs"]
        for job in jobs:
            if job["error"]:
                raise ClientFailed(f"fio: job {job['jobname']} failed with error {job['error']}")
        sides = [job[side] for job in jobs for side in ("read", "write", "trim")]
        done = [side for side in sides if side["total_ios"]]
        if not done:
            raise ClientFailed("fio: nothing was read or written")
        p99 = max(side["clat_ns"].get("percentile", {}).get("99.000000", 0) for side in done)
        return cls(
            iops=sum(side["iops"] for side in done),
            bandwidth=sum(side["bw_bytes"] for side in done),
            ops=sum(side["total_ios"] for side in done),
            p99=p99 / 1e9,
        )


def fio(uri: str, load: Load, seconds: float) -> FioResult:
    """Run fio for ``seconds``, or until the amount is done."""
    words = [
        "fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", f"--rw={load.rw}", f"--bs={load.block}",
        f"--iodepth={load.depth}", f"--numjobs={load.jobs}", "--group_reporting", "--norandommap",
        f"--runtime={max(1, round(seconds * 1000))}ms", "--output-format=json", "--eta=never",
    ]  # fmt: skip
    if load.mix is not None:
        words.append(f"--rwmixread={load.mix}")
    if load.offset:
        words.append(f"--offset={load.offset}")
    if load.size is not None:
        words.append(f"--size={load.size}")
    if load.jobs > MOST_PROCESSES:
        words.append("--thread")
    words.append("--time_based" if load.amount is None else f"--io_size={load.amount}")
    return FioResult.parse(_run(words))


def nbdcopy(uri: str) -> float:
    """Copy the whole disk to nowhere; return seconds."""
    begin = time.perf_counter()
    _run(["nbdcopy", uri, "null:"])
    return time.perf_counter() - begin


def block_status(uri: str, context: str) -> dict[str, float]:
    """The whole disk's block status in one context: seconds, extents, requests."""
    answer: dict[str, float] = json.loads(_run(_script("status", uri, context)))
    return answer


def write_once(uri: str, offset: int) -> float:
    """One write of 4 KiB and a flush; return seconds."""
    return float(json.loads(_run(_script("write", uri, str(offset))))["seconds"])


def idle_connections(uri: str, count: int) -> AbstractContextManager[None]:
    """``count`` connections that have negotiated and say nothing more, until the block ends."""
    return _held("idle", uri, count)


def stalled_connections(uri: str, count: int) -> AbstractContextManager[None]:
    """``count`` connections that have asked for 16 MiB each and take no reply, until the block ends."""
    return _held("stall", uri, count)


@contextmanager
def _held(what: str, uri: str, count: int) -> Iterator[None]:
    with subprocess.Popen(
        _script(what, uri, str(count)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=qemu.environment(),
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            if not process.stdout.readline():
                raise ClientFailed(f"libnbd: {process.stderr.read().strip()[-200:]}")
            yield
            process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ClientFailed(f"libnbd: does not end {TIMEOUT:g} s after it was told to") from None
        finally:
            if process.poll() is None:
                process.kill()


def _script(*words: str) -> list[str]:
    return ["/usr/bin/python3", str(SCRIPT), *words]


def _run(argv: list[str]) -> str:
    try:
        done: subprocess.CompletedProcess[Any] = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            env=qemu.environment(),
        )
    except subprocess.TimeoutExpired:
        raise ClientFailed(f"{argv[0]}: not done in {TIMEOUT:g} s") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ClientFailed(f"{argv[0]}: {said[-1] if said else f'status {done.returncode}'}")
    return str(done.stdout)
