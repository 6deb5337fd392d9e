"""The table of work: what is measured, on which image, in which unit, and the goal."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from scripts.benchmark import clients
from scripts.benchmark.clients import Load
from scripts.benchmark.images import GIB, KIB, MIB, SPECKLES, STOPPING, TIB, Images
from scripts.benchmark.profiles import counted_calls
from scripts.benchmark.servers import Contender, Running, Serving, serve
from scripts.benchmark.stats import Better, Sample

STARTS = 5
"""Starts of a server per round; one takes a fraction of a second."""

IDLE = 256
"""Connections that do nothing."""

STALLED = 16
"""Connections that take no replies."""

COLD_AMOUNT = 192 * MIB
"""Bytes that a cold read takes of its 2 GiB: few enough that hardly any page is met twice."""


@dataclass(frozen=True)
class Bench:
    """What a round is measured with."""

    images: Images
    seconds: float
    """How long fio puts on its load."""
    count_calls: bool = False
    """Whether to count the server's system calls, which makes it slower."""

    @property
    def scale(self) -> int:
        return self.images.scale


@dataclass(frozen=True)
class Work:
    """One line of the table."""

    name: str
    title: str
    unit: str
    better: Better
    measure: Callable[[Bench, Contender], Sample]
    image: str | None = None
    """Its image in ``images.MAKERS``; None: a fresh one each round."""
    goal: float | None = None
    """As a ratio against the best peer."""
    bound: float | None = None
    """A goal in the work's own unit."""
    fio: bool = False
    """Only the load matters: servers of memory can take part."""


def _client(bench: Bench, running: Running, run: Callable[[], Sample]) -> Sample:
    """Run a client and add what it cost the server."""
    watching: AbstractContextManager[dict[str, int]] = nullcontext({})
    if bench.count_calls:
        watching = counted_calls(running.pids())
    with watching as calls:
        before = running.cpu()
        sample = run()
        after = running.cpu()
    extra = {"user": after.user - before.user, "system": after.system - before.system}
    extra |= {f"call:{name}": count for name, count in calls.items()}
    cpu = after.total - before.total
    return Sample(sample.value, cpu, sample.ops, running.peak(), {**sample.extra, **extra})


def _fio(
    name: str,
    title: str,
    goal: float,
    load: Load,
    image: str | None = "data",
    *,
    writable: bool = False,
    fresh: int = 64 * GIB,
    reread: bool = False,
) -> Work:
    """A load of fio's: operations per second for small blocks, MB per second for large ones.

    ``reread``: the image has just been read in sequence, before each run. Otherwise it is in the page cache
    as it was made, or as another server has left it.
    """
    small = load.block < 64 * KIB

    def measure(bench: Bench, contender: Contender) -> Sample:
        amount = load.amount // bench.scale if load.amount else None
        scaled = Load(load.rw, load.block, load.depth, load.jobs, load.mix, amount)
        if reread and image is not None:
            bench.images.cold(image)
        path = bench.images.fresh(fresh) if image is None else bench.images.warm(image)
        os.sync()

        def run(running: Running) -> Sample:
            result = clients.fio(running.uri, scaled, bench.seconds)
            value = result.iops if small else result.bandwidth / 1e6
            return Sample(value, ops=result.ops, extra={"p99": result.p99})

        with serve(contender, Serving(path, writable, size=2 * GIB)) as running:
            return _client(bench, running, lambda: run(running))

    return Work(name, title, "IOPS" if small else "MB/s", Better.HIGHER, measure, image, goal, fio=True)


def _cold(bench: Bench, contender: Contender) -> Sample:
    """The same reads for everyone, none of them in the page cache; a scaled image is used as far."""
    load = Load("randread", 4 * KIB, 32, amount=COLD_AMOUNT // bench.scale)
    path = bench.images.cold("data")
    with serve(contender, Serving(path)) as running:

        def run() -> Sample:
            result = clients.fio(running.uri, load, 4 * bench.seconds)
            return Sample(result.iops, ops=result.ops, extra={"p99": result.p99})

        return _client(bench, running, run)


def _cold_hits(bench: Bench, contender: Contender) -> Sample:
    """What one connection gets of the warm first eighth while another reads the cold rest."""
    size = 2 * GIB // bench.scale // 8
    hits = Load("randread", 4 * KIB, 1, size=size)
    misses = Load("randread", 4 * KIB, 32, offset=size)
    path = bench.images.cold("data")
    with serve(contender, Serving(path)) as running, ThreadPoolExecutor(1) as beside:
        clients.fio(running.uri, Load("read", MIB, 4, amount=size, size=size), 60)

        def run() -> Sample:
            other = beside.submit(clients.fio, running.uri, misses, bench.seconds)
            result = clients.fio(running.uri, hits, bench.seconds)
            missed = other.result()
            extra = {"p99": result.p99, "cold": missed.iops}
            return Sample(result.iops, ops=result.ops + missed.ops, extra=extra)

        return _client(bench, running, run)


def _slow_clients(bench: Bench, contender: Contender) -> Sample:
    path = bench.images.warm("data")
    with (
        serve(contender, Serving(path, connections=STALLED + 8)) as running,
        clients.stalled_connections(running.uri, STALLED),
    ):

        def run() -> Sample:
            result = clients.fio(running.uri, Load("randread", 4 * KIB, 16), bench.seconds)
            return Sample(result.iops, ops=result.ops, extra={"p99": result.p99})

        return _client(bench, running, run)


def _copy(name: str, title: str, image: str) -> Work:
    def measure(bench: Bench, contender: Contender) -> Sample:
        path = bench.images.warm(image)
        os.sync()
        with serve(contender, Serving(path)) as running:
            return _client(bench, running, lambda: Sample(clients.nbdcopy(running.uri)))

    return Work(name, title, "s", Better.LOWER, measure, image, goal=1.3)


def _status(name: str, title: str, image: str, context: str, bitmaps: tuple[str, ...] = ()) -> Work:
    def measure(bench: Bench, contender: Contender) -> Sample:
        path = bench.images.get(image)
        os.sync()

        def run(running: Running) -> Sample:
            found = clients.block_status(running.uri, context)
            return Sample(found["seconds"], ops=int(found["extents"]), extra=found)

        with serve(contender, Serving(path, bitmaps=bitmaps)) as running:
            return _client(bench, running, lambda: run(running))

    return Work(name, title, "s", Better.LOWER, measure, image, goal=1.2)


def _stop(bench: Bench, contender: Contender) -> Sample:
    # A fresh copy: the write changes all bitmaps, and where nothing is changed nothing needs to be stored.
    image = bench.images.get("stopping")
    path = image.with_suffix(".copy")
    try:
        shutil.copyfile(image, path)
        os.sync()
        with serve(contender, Serving(path, writable=True)) as running:
            clients.write_once(running.uri, TIB)
            peak = running.peak()
            return Sample(running.stop(), peak=peak)
    finally:
        path.unlink(missing_ok=True)


def _start(bench: Bench, contender: Contender) -> Sample:
    path = bench.images.get("stopping")
    os.sync()
    times: list[float] = []
    for _ in range(STARTS):
        with serve(contender, Serving(path, bitmaps=STOPPING)) as running:
            times.append(running.start_time)
            cpu, peak = running.cpu().total, running.peak()
    return Sample(statistics.median(times), cpu, 1, peak)


def _memory(bench: Bench, contender: Contender) -> Sample:
    path = bench.images.get("huge")
    with serve(contender, Serving(path)) as running:
        clients.fio(running.uri, Load("randread", 4 * KIB, 16), bench.seconds)
        clients.fio(running.uri, Load("read", MIB, 8), bench.seconds)
        return Sample(running.peak() / MIB, peak=running.peak())


def _idle(bench: Bench, contender: Contender) -> Sample:
    path = bench.images.get("sparse")
    with serve(contender, Serving(path, connections=IDLE + 8)) as running:
        with clients.idle_connections(running.uri, 1):
            before = running.rss()
        with clients.idle_connections(running.uri, IDLE):
            return Sample(max(0, running.rss() - before) / IDLE / KIB, peak=running.peak())


WORKS: tuple[Work, ...] = (
    _fio("randread", "4 KiB random read, depth 16", 1.5, Load("randread", 4 * KIB, 16)),
    _fio("latency", "4 KiB random read, depth 1", 1.1, Load("randread", 4 * KIB, 1)),
    _fio("read-1m", "1 MiB sequential read, depth 8", 2.0, Load("read", MIB, 8)),
    _fio("read-256k", "256 KiB sequential read, depth 4", 1.1, Load("read", 256 * KIB, 4)),
    _copy("copy", "nbdcopy of 2 GiB data", "data"),
    Work("slow-clients", f"4 KiB random read, depth 16, beside {STALLED} that take no replies", "IOPS",
         Better.HIGHER, _slow_clients, "data", goal=1.0),
    Work("cold", "4 KiB random read, depth 32, not in the page cache", "IOPS", Better.HIGHER, _cold,
         "data", goal=1.0),
    Work("cold-hits", "4 KiB random read in the page cache, depth 1, beside cold at depth 32", "IOPS",
         Better.HIGHER, _cold_hits, "data", goal=1.0),
    _fio(
        "randwrite", "4 KiB random write in place, depth 16, three bitmaps", 2.0,
        Load("randwrite", 4 * KIB, 16), "recording", writable=True,
    ),
    _fio(
        "randwrite-read", "the same, of an image that has just been read in sequence", 2.0,
        Load("randwrite", 4 * KIB, 16), "recording", writable=True, reread=True,
    ),
    _fio(
        "mixed", "70/30 4 KiB random, four connections, depth 32", 1.3,
        Load("randrw", 4 * KIB, 32, jobs=4, mix=70), "recording", writable=True,
    ),
    _fio(
        "randwrite-new", "4 KiB random write, allocating, depth 16", 1.2,
        Load("randwrite", 4 * KIB, 16, amount=128 * MIB), None, writable=True,
    ),
    _fio(
        "write-new-1m", "1 MiB sequential write, allocating, depth 8", 1.2,
        Load("write", MIB, 8, amount=2 * GIB), None, writable=True,
    ),
    _copy("copy-sparse", "nbdcopy of 64 GiB with 1 GiB data", "sparse"),
    Work(
        "idle", f"memory per idle connection, {IDLE} of them", "KiB", Better.LOWER, _idle, "sparse", bound=64
    ),
    _status(
        "status-bitmap", "block status of a bitmap, 524 288 extents", "speckled",
        f"qemu:dirty-bitmap:{SPECKLES}", (SPECKLES,),
    ),
    _status("status-allocation", "block status of base:allocation, 200 000 extents", "scattered",
            "base:allocation"),
    _fio("read-zlib", "1 MiB sequential read, zlib", 1.5, Load("read", MIB, 8), "zlib"),
    _fio("read-zstd", "1 MiB sequential read, zstd", 1.5, Load("read", MIB, 8), "zstd"),
    _fio("chain", "4 KiB random read, depth 16, chain of five", 1.2, Load("randread", 4 * KIB, 16), "chain"),
    Work("stop", f"clean stop, {len(STOPPING)} bitmaps of 4 TiB, one write", "s", Better.LOWER, _stop,
         "stopping", goal=1.0),
    Work("start", f"start to first connection, 4 TiB, {len(STOPPING)} bitmaps", "s", Better.LOWER, _start,
         "stopping", bound=0.2),
    Work("memory", "peak memory, 16 TiB, one connection", "MiB", Better.LOWER, _memory, "huge", bound=120),
)  # fmt: skip
"""In an order in which few images are there at once."""

assert len({work.name for work in WORKS}) == len(WORKS)
