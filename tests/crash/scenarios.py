"""What the power-failure tests run: kinds of images, and guests' workloads.

A workload is a list of groups; the actions of one group are under way at the same time, the next group
starts when all of them have ended. Everything follows from names and seeds. Sizes are in units, which
are clusters: the same workload meets clusters of every kind of image.

Each kind's disk at first, in sixteenths: data is ``tagged`` text, so every sector says where it belongs.

    0        4        8        12       16
    | data   | hole   | data   | hole   |      holes show the backing file where there is one
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tests.support.qemu import SYSTEM

SECTOR = 512
IMAGE = "disk.qcow2"
RAW = "disk.raw"
DATA_FILE = "disk.data"
BACKING = "base.raw"
RECORDING = "recording"
DISABLED = "disabled"
SNAPSHOT = "before"
GRANULARITY = 4096
"""Bytes; of the bitmaps that every kind of image has."""


def tagged(seed: int, offset: int, length: int) -> bytes:
    """Content for a range: every 32 bytes name the seed and their own place on the disk."""
    first = offset // 32
    last = -(-(offset + length) // 32)
    lines = b"".join(b"%08x at %016x ==\n" % (seed, 32 * n) for n in range(first, last))
    return lines[offset - 32 * first :][:length]


# -- kinds of images ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One kind of image, as qemu-img makes it."""

    name: str
    cluster_size: int = 4096
    options: tuple[str, ...] = ()
    clusters: int = 64
    compressed: bool = False
    snapshot: bool = False
    backing: bool = False
    data_file: bool = False
    bitmaps: bool = True
    preallocated_zeroes: bool = False
    """The holes are zero clusters that have host clusters."""
    granularities: tuple[int, ...] = ()
    """Of more recording bitmaps, bytes."""
    format: str = "qcow2"

    def __str__(self) -> str:
        return self.name

    @property
    def file_name(self) -> str:
        """Of the image."""
        return IMAGE if self.format == "qcow2" else RAW

    @property
    def size(self) -> int:
        """Of the disk, bytes."""
        return self.cluster_size * self.clusters

    def content(self) -> bytes:
        """The disk at first."""
        quarter = self.size // 4
        hole = tagged(0xBACC, quarter, quarter) if self.backing else bytes(quarter)
        last = tagged(0xBACC, 3 * quarter, quarter) if self.backing else bytes(quarter)
        return tagged(0, 0, quarter) + hole + tagged(0, 2 * quarter, quarter) + last

    def make(self, place: Path) -> Path:
        """Make the image in ``place`` with all that belongs to it; return its path."""
        if self.format == "raw":
            path = place / RAW
            path.write_bytes(self.content())
            return path
        raw, path = place / "content.raw", place / IMAGE
        quarter = self.size // 4
        if self.backing:
            (place / BACKING).write_bytes(tagged(0xBACC, 0, self.size))
        raw.write_bytes(self.content())
        options = [f"cluster_size={self.cluster_size}", *self.options]
        if self.data_file:
            options.append(f"data_file={place / DATA_FILE}")
        arguments = ["-b", BACKING, "-F", "raw"] if self.backing else []
        SYSTEM.img("create", "-q", "-f", "qcow2", "-o", ",".join(options), *arguments, path, self.size)
        if self.compressed:
            SYSTEM.img("convert", "-n", "-c", "-f", "raw", "-O", "qcow2", raw, path)
        else:
            self._fill(place, path, quarter)
        if self.preallocated_zeroes:
            for start in (quarter, 3 * quarter):
                SYSTEM.io(path, f"write {start} {quarter}", f"write -z {start} {quarter}")
        if self.snapshot:
            SYSTEM.img("snapshot", "-c", SNAPSHOT, path)
        if self.bitmaps:
            granularity = ("-g", GRANULARITY)
            SYSTEM.img("bitmap", "--add", *granularity, path, RECORDING)
            SYSTEM.img("bitmap", "--add", "--disable", *granularity, path, DISABLED)
            for more in self.granularities:
                SYSTEM.img("bitmap", "--add", "-g", str(more), path, f"{RECORDING}-{more}")
        raw.unlink()
        return path

    def _fill(self, place: Path, path: Path, quarter: int) -> None:
        for start in (0, 2 * quarter):
            part = place / f"part{start}"
            part.write_bytes(tagged(0, start, quarter))
            SYSTEM.io(path, f"write -s {part} {start} {quarter}")
            part.unlink()


TABLE_GROWTH = Kind("table-growth", 512, ("refcount_bits=64",), 4480)
"""Its refcount table is full before its disk is."""

LAZY = Kind("lazy-growth", 512, ("lazy_refcounts=on", "refcount_bits=64"), 256)
"""New data soon needs new refcount blocks."""

KINDS = {
    kind.name: kind
    for kind in (
        Kind("v3"),
        Kind("small-clusters", cluster_size=512, clusters=256),
        Kind("v2", options=("compat=0.10",), bitmaps=False),
        Kind("extended-l2", cluster_size=16384, clusters=32, options=("extended_l2=on",)),
        Kind("refcounts-1", options=("refcount_bits=1",)),
        Kind("refcounts-64", options=("refcount_bits=64",)),
        Kind("lazy-refcounts", options=("lazy_refcounts=on",)),
        Kind("compressed", compressed=True),
        Kind("zstd", compressed=True, options=("compression_type=zstd",)),
        Kind("snapshot", snapshot=True),
        Kind("backing", backing=True),
        Kind("v2-backing", backing=True, options=("compat=0.10",), bitmaps=False),
        Kind("extended-l2-backing", 16384, ("extended_l2=on",), 32, backing=True),
        Kind("data-file", data_file=True),
        Kind("data-file-raw", data_file=True, options=("data_file_raw=on",)),
        Kind("zeroes-in-place", preallocated_zeroes=True),
        Kind("preallocated", options=("preallocation=metadata",)),
        Kind("bitmaps", granularities=(512, 65536)),
        Kind("snapshot-small", cluster_size=1024, clusters=256, snapshot=True),
        Kind("snapshot-extended-l2", 16384, ("extended_l2=on",), 32, snapshot=True),
        Kind("data-file-backing", data_file=True, backing=True),
        Kind("compressed-backing", compressed=True, backing=True),
        Kind("raw", format="raw", bitmaps=False),
    )
}


# -- workloads ---------------------------------------------------------------------------------

ActionKind = Literal["write", "zeroes", "trim", "flush", "reopen"]


class Action(NamedTuple):
    """One request; offset and length in bytes. ``seed`` decides the content of a write."""

    kind: ActionKind
    offset: int = 0
    length: int = 0
    seed: int = 0
    fua: bool = False
    no_hole: bool = False

    @property
    def data(self) -> bytes:
        """What a write writes."""
        return tagged(self.seed, self.offset, self.length)


Group = tuple[Action, ...]
FLUSH: Group = (Action("flush"),)
REOPEN: Group = (Action("reopen"),)
"""The image is closed and opened again; alone in its group."""


@dataclass(frozen=True)
class Workload:
    """What a guest does, group by group."""

    name: str
    groups: tuple[Group, ...]

    @property
    def actions(self) -> int:
        """How many requests there are."""
        return sum(len(group) for group in self.groups)


class Disk:
    """Makes actions for one disk: places in units, distinct content for every write."""

    def __init__(self, unit: int, units: int) -> None:
        self.unit = unit
        self.units = units
        self._seed = 0

    def _range(self, at: float, count: float) -> tuple[int, int]:
        offset = int(at * self.unit)
        return offset, min(int(count * self.unit), self.unit * self.units - offset)

    def write(self, at: float, count: float = 1, *, fua: bool = False) -> Action:
        """Write ``count`` units at unit ``at``; fractions give unaligned edges."""
        self._seed += 1
        return Action("write", *self._range(at, count), self._seed, fua)

    def zeroes(self, at: float, count: float = 1, *, fua: bool = False, no_hole: bool = False) -> Action:
        """Write zeroes."""
        return Action("zeroes", *self._range(at, count), 0, fua, no_hole)

    def trim(self, at: float, count: float = 1, *, fua: bool = False) -> Action:
        """Trim."""
        return Action("trim", *self._range(at, count), 0, fua)


def one(*actions: Action) -> tuple[Group, ...]:
    """One after the other."""
    return tuple((action,) for action in actions)


def in_place(disk: Disk) -> tuple[Group, ...]:
    """Overwrite data that is durable already."""
    return (*one(disk.write(0), disk.write(1, 0.5)), FLUSH, *one(disk.write(0.25, 1)), FLUSH)


def allocating(disk: Disk) -> tuple[Group, ...]:
    """Write into holes: whole clusters, parts of clusters, across the edge of data."""
    quarter = disk.units // 4
    return (
        *one(disk.write(quarter), disk.write(quarter + 2.5, 1)),
        FLUSH,
        *one(disk.write(quarter - 0.5, 1), disk.write(quarter + 2.25, 0.25)),
        FLUSH,
    )


def forced(disk: Disk) -> tuple[Group, ...]:
    """FUA instead of flushes, with and without allocation, beside what nobody flushes."""
    quarter = disk.units // 4
    return one(
        disk.write(quarter + 1),
        disk.write(quarter + 3, fua=True),
        disk.write(1, fua=True),
        disk.zeroes(2, fua=True),
        disk.write(quarter + 5, 0.5),
        disk.trim(3, fua=True),
    )


def reuse_after_zeroes(disk: Disk) -> tuple[Group, ...]:
    """Clusters freed by write-zeroes must not serve others before their unlinking is durable."""
    quarter = disk.units // 4
    freed = disk.zeroes(0, 2)
    taken = [disk.write(quarter + n) for n in range(4)]
    return (*one(freed, *taken), FLUSH, *one(disk.zeroes(2, 2), disk.write(quarter + 5, 2)), FLUSH)


def reuse_after_trim(disk: Disk) -> tuple[Group, ...]:
    """The same with trim."""
    quarter = disk.units // 4
    return (
        *one(disk.trim(0, 2), *(disk.write(quarter + n) for n in range(4))),
        FLUSH,
        *one(disk.trim(2), disk.write(quarter + 5)),
        FLUSH,
        *one(disk.write(quarter + 6), disk.write(2)),
    )


def freeing_last(disk: Disk) -> tuple[Group, ...]:
    """Nobody flushes what frees clusters in the end, and the bitmaps that are stored then find them."""
    return one(disk.trim(0, 2), disk.zeroes(4), disk.trim(6))


def reuse_after_rewrite(disk: Disk) -> tuple[Group, ...]:
    """The same where writes replace clusters: compressed ones, ones that snapshots share."""
    quarter = disk.units // 4
    return (
        *one(disk.write(0), disk.write(1), disk.write(2, 0.5), disk.write(quarter, 2)),
        FLUSH,
        *one(disk.write(3), disk.write(quarter + 3)),
        FLUSH,
    )


def rewriting(disk: Disk) -> tuple[Group, ...]:
    """Rewrite all that shares host clusters (compressed data lies many to one), then allocate."""
    quarter = disk.units // 4
    rewrites = [disk.write(n, 4) for n in range(0, quarter, 4)]
    return (*one(*rewrites, disk.write(quarter, 8)), FLUSH, *one(disk.write(quarter + 8, 8)))


def subclusters(disk: Disk) -> tuple[Group, ...]:
    """Parts of one cluster, each durable before the next is written."""
    at = disk.units // 4 + 1
    return one(*(disk.write(at + n / 8, 1 / 16, fua=True) for n in (0, 3, 1, 7)), disk.write(at + 0.2, 0.3))


def tables_anew(disk: Disk) -> tuple[Group, ...]:
    """Tables of holes are made where data has been (where a table covers no more than a quarter)."""
    quarter = disk.units // 4
    return (
        *one(disk.trim(1, 6)),
        FLUSH,
        *one(disk.write(quarter + 1)),
        FLUSH,
        *one(disk.write(3 * quarter + 2, 2), disk.trim(quarter + 1)),
        FLUSH,
    )


def zeroes_over_durable(disk: Disk) -> tuple[Group, ...]:
    """Durable data must not vanish on the way to new data that does not cover it."""
    quarter = disk.units // 4
    return (
        *one(disk.write(quarter + 0.5, 1, fua=True)),
        *one(disk.zeroes(quarter + 0.75, 0.5), disk.write(quarter + 0.25, 0.5)),
        *one(disk.zeroes(1.5, 2), disk.write(1.75, 0.5), disk.zeroes(5, no_hole=True)),
        FLUSH,
        *one(disk.write(5.25, 0.25)),
    )


def growing(disk: Disk) -> tuple[Group, ...]:
    """Many allocations, so that tables and the file grow, with few flushes."""
    quarter = disk.units // 4
    groups: list[Group] = []
    for n in range(quarter):
        groups += one(disk.write(quarter + n))
        if n % 5 == 4:
            groups.append(FLUSH)
    return (*groups, FLUSH, *one(disk.write(4 * quarter - 1)))


def filling(disk: Disk) -> tuple[Group, ...]:
    """Fill all holes with few large requests, side by side, so that the refcount table must grow."""
    quarter = disk.units // 4
    eighth = quarter // 2
    return (
        (disk.write(quarter, eighth), disk.write(quarter + eighth, eighth), Action("flush")),
        (disk.write(3 * quarter, eighth), disk.zeroes(4, eighth)),
        (Action("flush"), disk.write(3 * quarter + eighth, eighth)),
        FLUSH,
        *one(disk.write(5, eighth), disk.write(quarter + 1, 2)),
    )


def reopening(disk: Disk) -> tuple[Group, ...]:
    """Sessions on end, with and without writes: bitmaps are stored, armed and stored again."""
    quarter = disk.units // 4
    return (
        *one(disk.write(quarter), disk.trim(1)),
        REOPEN,
        REOPEN,
        *one(disk.write(1.5, 1), disk.write(quarter + 2)),
        FLUSH,
        *one(disk.zeroes(4, 2)),
        REOPEN,
        *one(disk.write(quarter + 3, 3), disk.write(4, fua=True)),
    )


def overlapping(disk: Disk) -> tuple[Group, ...]:
    """Requests of every sort under way on the same clusters."""
    quarter = disk.units // 4
    return (
        (disk.write(quarter, 2), disk.write(quarter + 1, 2), disk.zeroes(quarter + 0.5, 1)),
        (disk.trim(quarter, 2), disk.write(quarter + 0.5, 1), Action("flush")),
        (disk.write(0.5, 1), disk.zeroes(0, 2), disk.trim(1)),
        FLUSH,
        (disk.write(quarter + 4, 0.25), disk.write(quarter + 4.5, 0.25), disk.write(quarter + 4.25, 0.25)),
        FLUSH,
    )


def many_flushes(disk: Disk) -> tuple[Group, ...]:
    """Flushes that meet commits under way."""
    quarter = disk.units // 4
    flush = Action("flush")
    return tuple(
        (disk.write(quarter + 2 * n), flush, disk.write(quarter + 2 * n + 1, fua=True), flush)
        for n in range(4)
    )


WORKLOADS: dict[str, Callable[[Disk], tuple[Group, ...]]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        in_place,
        allocating,
        forced,
        reuse_after_zeroes,
        reuse_after_trim,
        freeing_last,
        reuse_after_rewrite,
        rewriting,
        subclusters,
        tables_anew,
        zeroes_over_durable,
        growing,
        reopening,
        overlapping,
        many_flushes,
    )
}


def workload(name: str, kind: Kind) -> Workload:
    """The workload of this name on a disk of this kind."""
    make = filling if name == "filling" else WORKLOADS[name]
    return Workload(name, make(Disk(kind.cluster_size, kind.clusters)))


def random_workload(kind: Kind, seed: int, actions: int, *, together: int = 3) -> Workload:
    """Requests at random places, up to ``together`` at a time, aligned to nothing in particular."""
    rng = random.Random(seed)
    disk = Disk(kind.cluster_size, kind.clusters)
    groups: list[Group] = []
    left = actions
    while left > 0:
        group: list[Action] = []
        for _ in range(min(left, rng.randint(1, together))):
            grain = rng.choice((1, 1, 2, 8))
            # Few places, so that requests meet.
            at = rng.randrange(disk.units * grain) / grain
            if rng.random() < 0.5:
                at = rng.randrange(8 * grain) / grain + rng.choice((0, disk.units // 4))
            count = rng.choice((1, 1, 2, 3)) / rng.choice((1, grain))
            fua = rng.random() < 0.1
            match rng.choices(("write", "zeroes", "trim", "flush", "reopen"), (12, 4, 4, 4, 1))[0]:
                case "reopen" if not group:
                    group.append(Action("reopen"))
                    break
                case "write":
                    group.append(disk.write(at, count, fua=fua))
                case "zeroes":
                    group.append(disk.zeroes(at, count, fua=fua, no_hole=rng.random() < 0.3))
                case "trim":
                    group.append(disk.trim(at, count, fua=fua))
                case _:
                    group.append(Action("flush"))
        left -= len(group)
        groups.append(
            tuple(action for action in group if action.length or action.kind in ("flush", "reopen"))
        )
    return Workload(f"random-{seed}", tuple(group for group in groups if group))
