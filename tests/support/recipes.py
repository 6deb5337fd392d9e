"""The image matrix: a recipe for every kind of image that the tests serve, by name."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.imagemaker import GIB, KIB, MIB, TIB, Case, Maker, noise, text
from tests.support.qcow2edit import (
    DATA_FILE_EXTENSION,
    bitmap_entries,
    extensions,
    patch,
    peek,
    set_bitmap_flags,
    set_size,
)
from tests.support.qemu import SYSTEM

Recipe = Callable[[Maker], Case]
RECIPES: dict[str, Recipe] = {}


def recipe(name: str) -> Callable[[Recipe], Recipe]:
    def register(function: Recipe) -> Recipe:
        assert name not in RECIPES
        RECIPES[name] = function
        return function

    return register


def _plain(maker: Maker, *, size: int = 8 * MIB, fill: dict[str, Any] | None = None, **options: Any) -> Case:
    path = maker.create(size, **options)
    maker.fill(path, size, int(options.get("cluster_size", 64 * KIB)), **(fill or {}))
    return maker.case(path)


def _compressed(maker: Maker, *, size: int = 4 * MIB, **options: Any) -> Case:
    """Every cluster compressed, by ``convert -c``."""
    source = maker.raw(size, "source.raw")
    with source.open("r+b") as file:
        file.seek(size // 2)
        file.write(noise(maker.seed, size // 8))
    words = ",".join(f"{key}={value}" for key, value in options.items())
    SYSTEM.img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", words, source, maker.path())
    source.unlink()
    return maker.case()


def _prealloc(maker: Maker, *, size: int = 8 * MIB, writes: int = 6, **options: Any) -> Case:
    path = maker.create(size, **options)
    maker.fill(path, size, count=writes)
    return maker.case(path)


RECIPES |= {
    "v2": partial(_plain, compat="0.10"),
    "v2-512": partial(_plain, size=1 * MIB, compat="0.10", cluster_size=512),
    "v3": _plain,
    "v3-packed": partial(_plain, fill={"packed": 60, "count": 30}),
    **{
        f"cluster-{cluster}": partial(_plain, size=size, cluster_size=cluster, fill={"packed": packed})
        for cluster, size, packed in [
            (512, 2 * MIB, 400),
            (1024, 2 * MIB, 400),
            (4096, 8 * MIB, 200),
            (256 * KIB, 16 * MIB, 20),
            (2 * MIB, 32 * MIB, 5),
        ]
    },
    "zlib": partial(_compressed, cluster_size=64 * KIB),
    "zlib-v2": partial(_compressed, compat="0.10", size=2 * MIB),
    "zlib-512": partial(_compressed, cluster_size=512, size=1 * MIB),
    "zlib-2m": partial(_compressed, cluster_size=2 * MIB, size=16 * MIB),
    "zstd": partial(_compressed, compression_type="zstd"),
    "zstd-4k": partial(_compressed, compression_type="zstd", cluster_size=4096, size=2 * MIB),
    "zstd-2m": partial(_compressed, compression_type="zstd", cluster_size=2 * MIB, size=16 * MIB),
    "zstd-mixed": partial(_plain, compression_type="zstd", fill={"packed": 60, "count": 30}),
    "extl2": partial(_plain, extended_l2="on", fill={"count": 80}),
    "extl2-16k": partial(_plain, extended_l2="on", cluster_size=16 * KIB, fill={"count": 80}),
    "extl2-2m": partial(_plain, size=32 * MIB, extended_l2="on", cluster_size=2 * MIB, fill={"count": 40}),
    "extl2-packed": partial(_plain, extended_l2="on", fill={"packed": 60, "count": 60}),
    **{f"refcount-{bits}": partial(_plain, refcount_bits=bits) for bits in (1, 2, 4, 8, 32, 64)},
    "prealloc-metadata": partial(_prealloc, preallocation="metadata"),
    "prealloc-falloc": partial(_prealloc, preallocation="falloc"),
    "prealloc-full": partial(_prealloc, preallocation="full", size=2 * MIB),
    "prealloc-metadata-extl2": partial(_prealloc, preallocation="metadata", extended_l2="on"),
    "lazy": partial(_plain, lazy_refcounts="on"),
}


@recipe("empty")
def _empty(maker: Maker) -> Case:
    return maker.case(maker.create(0))


@recipe("untouched")
def _untouched(maker: Maker) -> Case:
    return maker.case(maker.create(64 * MIB))


@recipe("dirty-bit")
def _dirty_bit(maker: Maker) -> Case:
    """A writer with lazy refcounts that was killed: incompatible feature bit 0 is set."""
    path = maker.create(8 * MIB, lazy_refcounts="on")
    # Same content as a clean one: flush, then abort.
    commands = [*maker.mixture(8 * MIB, 64 * KIB), "flush"]
    maker.io(path, *commands)
    patch(path, 72, struct.pack(">Q", peek(path, 72, "Q") | 1))
    return maker.case(path)


@recipe("corrupt-bit")
def _corrupt_bit(maker: Maker) -> Case:
    case = _plain(maker)
    patch(case.path, 72, struct.pack(">Q", peek(case.path, 72, "Q") | 2))
    return case


@recipe("unknown-optional")
def _unknown_optional(maker: Maker) -> Case:
    """Unknown compatible and autoclear bits, and an unknown header extension: all to be left alone."""
    case = _plain(maker)
    patch(case.path, 80, struct.pack(">QQ", 1 << 40, 1 << 41))
    end = max(at + (length + 7) // 8 * 8 for at, length in extensions(case.path).values())
    patch(case.path, end, struct.pack(">II", 0x12345678, 5) + b"hello".ljust(8, b"\0") + bytes(8))
    return case


def _odd(maker: Maker, size: int, cluster: int) -> Case:
    """A disk that ends in the middle of a sector: QEMU can make none, but the format allows it."""
    rounded = (size + 511) // 512 * 512
    path = maker.create(rounded, cluster_size=cluster)
    maker.fill(path, rounded, cluster)
    maker.io(path, maker.write(rounded - 512, text(maker.seed, 512)))
    reference = maker.path("reference.qcow2")
    shutil.copy(path, reference)
    set_size(path, size)
    return maker.case(path, reference=reference, size=size)


RECIPES |= {
    f"odd-{size}-{cluster}": partial(_odd, size=size, cluster=cluster)
    for size, cluster in [
        (1, 64 * KIB),
        (511, 512),
        (513, 512),
        (65535, 64 * KIB),
        (65537, 64 * KIB),
        (3 * MIB + 777, 4096),
    ]
}
RECIPES |= {
    # Whole sectors, but not whole clusters: this much QEMU does itself.
    f"sectors-{count}": partial(_plain, size=count * 512)
    for count in (1, 3, 129, 4097)
}


DENSE = {"prealloc-falloc", "prealloc-full"}
"""Images whose file has no holes."""

LARGE = {"huge", "huge-full"}
"""Disks that nobody reads from end to end."""


@recipe("huge")
def _huge(maker: Maker) -> Case:
    """64 TiB with a little data at both ends and in the middle."""
    size = 64 * TIB
    path = maker.create(size, cluster_size=2 * MIB)
    maker.bitmap(path, "b", 64 * MIB)
    commands = [
        maker.write(offset, text(offset & 0xFFFF, 5000))
        for offset in (0, 7 * TIB + 12345, 32 * TIB, size - 5000)
    ]
    maker.io(path, *commands)
    return maker.case(path, bitmaps=["b"])


@recipe("huge-full")
def _huge_full(maker: Maker) -> Case:
    """16 TiB with an L2 table for every part: 2 GiB of tables at 64 KiB clusters, if they were kept.

    The tables are all the same one, which no writer would do but a reader cannot tell.
    """
    size = 16 * TIB
    path = maker.create(size)
    maker.io(path, maker.write(0, text(maker.seed, 512 * KIB)))
    l1, count = peek(path, 40, "Q"), peek(path, 36, "I")
    patch(path, l1, struct.pack(">Q", peek(path, l1, "Q")) * count)
    return maker.case(path)


# -- external data files


def _external(maker: Maker, **options: Any) -> Case:
    path = maker.create(8 * MIB, data_file=maker.path("disk.data"), **options)
    maker.bitmap(path, "b", 4096)
    maker.fill(path, 8 * MIB)
    return maker.case(path, bitmaps=["b"])


RECIPES |= {
    "data-file": _external,
    "data-file-raw": partial(_external, data_file_raw="on"),
    "data-file-extl2": partial(_external, extended_l2="on"),
}


@recipe("data-file-relative")
def _data_file_relative(maker: Maker) -> Case:
    """A data file named relative to the image; QEMU looks for it under its current directory instead."""
    case = _external(maker)
    reference = maker.path("reference.qcow2")
    shutil.copy(case.path, reference)
    at, length = extensions(case.path)[DATA_FILE_EXTENSION]
    # The name keeps its length, so that nothing else in the header moves.
    name = "disk.data"
    padding = length - len(name)
    patch(case.path, at, ("./" * (padding // 2) + "/" * (padding % 2) + name).encode())
    case.reference = reference
    return case


# -- snapshots


def _with_snapshots(maker: Maker, **options: Any) -> Path:
    size = 8 * MIB
    path = maker.create(size, **options)
    maker.fill(path, size, seed=1)
    SYSTEM.img("snapshot", "-c", "first", path)
    maker.fill(path, size, seed=2)
    SYSTEM.img("snapshot", "-c", "second", path)
    maker.fill(path, size, seed=3)
    return path


@recipe("snapshots")
def _snapshots(maker: Maker) -> Case:
    return maker.case(_with_snapshots(maker))


@recipe("snapshots-v2")
def _snapshots_v2(maker: Maker) -> Case:
    return maker.case(_with_snapshots(maker, compat="0.10", cluster_size=4096))


def _load_snapshot(maker: Maker, wanted: str, **options: Any) -> Case:
    path = _with_snapshots(maker, **options)
    return maker.case(
        path, options=["--load-snapshot", wanted], qemu_options=["-l", f"snapshot.name={wanted}"]
    )


@recipe("load-first")
def _load_first(maker: Maker) -> Case:
    return _load_snapshot(maker, "first")


@recipe("load-second-extl2")
def _load_second(maker: Maker) -> Case:
    return _load_snapshot(maker, "second", extended_l2="on")


# -- backing chains


def _overlay(maker: Maker, size: int, path: Path, backing: str, backing_format: str, **how: Any) -> Path:
    how = {"cluster_size": 64 * KIB} | how
    options = ",".join(f"{key}={value}" for key, value in how.items())
    SYSTEM.img(
        "create", "-q", "-u", "-f", "qcow2", "-o", options, "-b", backing, "-F", backing_format, path, size
    )
    return path


@recipe("chain-5")
def _chain(maker: Maker) -> Case:
    """Five layers over each other, names relative to the referring file, one in another directory."""
    size = 8 * MIB
    (maker.place / "base").mkdir()
    path = maker.create(size, maker.path("base/0.qcow2"))
    maker.fill(path, size, seed=0, count=12)
    below = "base/0.qcow2"
    for depth in range(1, 5):
        path = _overlay(maker, size, maker.path(f"{depth}.qcow2"), below, "qcow2")
        maker.fill(path, size, seed=depth, count=10)
        below = path.name
    return maker.case(path)


@recipe("chain-mixed-clusters")
def _chain_mixed(maker: Maker) -> Case:
    """Layers of different cluster sizes and kinds: depth changes in the middle of a cluster."""
    size = 8 * MIB
    below = maker.raw(size, "0.raw")
    below_format = "raw"
    kinds: list[dict[str, Any]] = [
        {"cluster_size": 512},
        {"extended_l2": "on"},
        {"cluster_size": 2 * MIB},
        {"cluster_size": 4096},
    ]
    for depth, how in enumerate(kinds, 1):
        path = _overlay(maker, size, maker.path(f"{depth}.qcow2"), below.name, below_format, **how)
        maker.fill(path, size, seed=depth, count=10)
        below, below_format = path, "qcow2"
    return maker.case(below)


@recipe("over-raw")
def _over_raw(maker: Maker) -> Case:
    base = maker.raw(8 * MIB, "base.raw")
    path = _overlay(maker, 8 * MIB, maker.path(), base.name, "raw")
    maker.fill(path, 8 * MIB)
    return maker.case(path)


@recipe("over-raw-odd")
def _over_raw_odd(maker: Maker) -> Case:
    """A raw base that ends in the middle of a sector, shorter than the disk above."""
    base = maker.raw(3 * MIB + 1111, "base.raw")
    path = _overlay(maker, 8 * MIB, maker.path(), base.name, "raw")
    maker.fill(path, 8 * MIB, count=8)
    return maker.case(path)


@recipe("short-backing")
def _short_backing(maker: Maker) -> Case:
    maker.fill(maker.create(2 * MIB + 512, maker.path("base.qcow2")), 2 * MIB)
    path = _overlay(maker, 8 * MIB, maker.path(), "base.qcow2", "qcow2")
    maker.fill(path, 8 * MIB, count=10)
    return maker.case(path)


@recipe("long-backing")
def _long_backing(maker: Maker) -> Case:
    maker.fill(maker.create(16 * MIB, maker.path("base.qcow2")), 16 * MIB)
    path = _overlay(maker, 5 * MIB + 512, maker.path(), "base.qcow2", "qcow2")
    maker.fill(path, 5 * MIB, count=10)
    return maker.case(path)


@recipe("middle-shorter")
def _middle_shorter(maker: Maker) -> Case:
    """What lies under a short middle layer, past its end, must not show through it."""
    maker.fill(maker.create(8 * MIB, maker.path("0.qcow2")), 8 * MIB, seed=0, count=40)
    maker.fill(_overlay(maker, 3 * MIB, maker.path("1.qcow2"), "0.qcow2", "qcow2"), 3 * MIB, seed=1)
    path = _overlay(maker, 8 * MIB, maker.path(), "1.qcow2", "qcow2")
    maker.fill(path, 8 * MIB, seed=2, count=6)
    return maker.case(path)


def _backing_named(maker: Maker, backing: str) -> Case:
    maker.fill(maker.create(8 * MIB, maker.path("base.qcow2")), 8 * MIB)
    path = _overlay(maker, 8 * MIB, maker.path(), backing.format(place=maker.place), "qcow2")
    maker.fill(path, 8 * MIB, count=8)
    return maker.case(path)


RECIPES |= {
    "backing-absolute": partial(_backing_named, backing="{place}/base.qcow2"),
    "backing-file-prefix": partial(_backing_named, backing="file:{place}/base.qcow2"),
    "backing-json": partial(
        _backing_named,
        backing='json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{place}/base.qcow2"}}}}',
    ),
    "backing-json-flat": partial(
        _backing_named,
        backing='json:{{"driver":"qcow2","file.driver":"file","file.filename":"{place}/base.qcow2"}}',
    ),
}


@recipe("over-snapshot-v2")
def _over_v2(maker: Maker) -> Case:
    maker.fill(maker.create(4 * MIB, maker.path("base.qcow2"), compat="0.10"), 4 * MIB)
    path = _overlay(maker, 4 * MIB, maker.path(), "base.qcow2", "qcow2", compat="0.10")
    maker.fill(path, 4 * MIB, count=8)
    return maker.case(path)


@recipe("over-compressed")
def _over_compressed(maker: Maker) -> Case:
    base = _compressed(maker, cluster_size=64 * KIB).path.rename(maker.path("base.qcow2"))
    path = _overlay(maker, 4 * MIB, maker.path(), base.name, "qcow2", extended_l2="on")
    maker.fill(path, 4 * MIB, count=20)
    return maker.case(path)


# -- raw images


@recipe("raw")
def _raw(maker: Maker) -> Case:
    return maker.case(maker.raw(8 * MIB), format="raw", options=["--format", "raw"])


@recipe("raw-odd")
def _raw_odd(maker: Maker) -> Case:
    size = 2 * MIB + 777
    return maker.case(maker.raw(size), format="raw", options=["--format", "raw"], size=size)


@recipe("raw-that-says-qcow2")
def _raw_qcow2(maker: Maker) -> Case:
    """A raw disk whose guest wrote a qcow2 header into it."""
    inner = maker.create(1 * MIB, maker.path("inner.qcow2"))
    path = maker.raw(4 * MIB)
    patch(path, 0, inner.read_bytes()[: 64 * KIB])
    inner.unlink()
    return maker.case(path, format="raw", options=["--format", "raw"])


# -- bitmaps


@recipe("bitmaps")
def _bitmaps(maker: Maker) -> Case:
    """Several, of different granularities and ages, one disabled, one never touched, one full."""
    size = 16 * MIB
    path = maker.create(size)
    maker.bitmap(path, "full", 64 * KIB)
    maker.io(path, maker.write(0, text(maker.seed, size)))
    SYSTEM.img("bitmap", "--disable", path, "full")
    names = {"fine": 512, "default": None, "coarse": 2 * MIB, "middle": 32 * KIB}
    for index, (name, granularity) in enumerate(names.items()):
        maker.bitmap(path, name, granularity)
        maker.fill(path, size, seed=2 + index, count=3)
    SYSTEM.img("bitmap", "--disable", path, "default")
    maker.fill(path, size, seed=9, count=4)
    maker.bitmap(path, "untouched")
    maker.bitmap(path, "disabled", enabled=False)
    return maker.case(path, bitmaps=["full", *names, "untouched", "disabled"])


@recipe("bitmaps-three")
def _three(maker: Maker) -> Case:
    """Three alike, each with a table of eight entries, for breaking the middle one."""
    size = 16 * MIB
    path = maker.create(size, cluster_size=512)
    names = ["first", "middle", "third"]
    for index, name in enumerate(names):
        maker.bitmap(path, name, 512)
        maker.fill(path, size, seed=index, count=6)
    return maker.case(path, bitmaps=names)


@recipe("bitmaps-inconsistent")
def _inconsistent(maker: Maker) -> Case:
    """Two of four were left IN_USE."""
    size = 8 * MIB
    path = maker.create(size)
    for index, name in enumerate(["good", "broken", "fair", "torn"]):
        maker.bitmap(path, name)
        maker.fill(path, size, seed=index, count=5)
    for name in ("broken", "torn"):
        set_bitmap_flags(path, name, 1)
    return maker.case(path, bitmaps=["good", "fair"], refused=["broken", "torn"])


@recipe("bitmaps-all-inconsistent")
def _all_inconsistent(maker: Maker) -> Case:
    path = maker.create(4 * MIB)
    maker.bitmap(path, "one")
    maker.fill(path, 4 * MIB)
    set_bitmap_flags(path, "one", 1)
    return maker.case(path, refused=["one"])


@recipe("bitmaps-stale")
def _stale(maker: Maker) -> Case:
    """Written by something that knows no bitmaps: autoclear bit 0 is unset, none is to be trusted."""
    path = maker.create(4 * MIB)
    maker.bitmap(path, "old")
    maker.fill(path, 4 * MIB)
    patch(path, 88, bytes(8))
    return maker.case(path)


@recipe("bitmaps-small-clusters")
def _bitmaps_small(maker: Maker) -> Case:
    """Bitmap tables of several clusters: 512-byte clusters hold 4096 bits, 64 table entries."""
    size = 64 * MIB
    path = maker.create(size, cluster_size=512)
    maker.bitmap(path, "fine", 512)
    maker.bitmap(path, "coarse", 1 * MIB)
    maker.fill(path, size, 512, count=30)
    return maker.case(path, bitmaps=["fine", "coarse"])


@recipe("bitmaps-all-ones")
def _all_ones(maker: Maker) -> Case:
    """Table entries that say "all ones" without a cluster: QEMU reads but never writes them."""
    size = 16 * MIB
    path = maker.create(size, cluster_size=4096)
    maker.bitmap(path, "b", 512)
    maker.io(path, maker.write(100, text(1, 5000)), maker.write(9 * MIB, text(2, 70000)))
    entry = bitmap_entries(path)["b"]
    # 4096 bytes of bits for 512 bytes each: one entry per 16 MiB, so make it many first.
    assert entry.table_size == 1
    patch(path, entry.table, struct.pack(">Q", 1))
    return maker.case(path, bitmaps=["b"])


@recipe("bitmaps-mixed-entries")
def _mixed_entries(maker: Maker) -> Case:
    """One table with zero, one and cluster entries side by side."""
    size = 16 * MIB
    path = maker.create(size, cluster_size=512)
    maker.bitmap(path, "b", 512)
    maker.io(path, maker.write(100, text(1, 5000)), maker.write(9 * MIB, text(2, 70000)))
    entry = bitmap_entries(path)["b"]
    assert entry.table_size == 8
    for index in (1, 2, 7):
        patch(path, entry.table + 8 * index, struct.pack(">Q", 1))
    return maker.case(path, bitmaps=["b"])


@recipe("bitmaps-names")
def _names(maker: Maker) -> Case:
    path = maker.create(4 * MIB)
    names = ["with space", "sla/sh", "col:on", "grün-✓", "x" * 1023, "com,ma"]
    for index, name in enumerate(names):
        maker.bitmap(path, name)
        maker.fill(path, 4 * MIB, seed=index, count=3)
    # qemu-nbd's -B takes each of these verbatim.
    return maker.case(path, bitmaps=names)


@recipe("bitmaps-odd-size")
def _bitmaps_odd(maker: Maker) -> Case:
    """The last granule reaches past the end of the disk."""
    size = 5 * MIB + 512
    path = maker.create(size)
    maker.bitmap(path, "b", 256 * KIB)
    maker.bitmap(path, "whole", 2 * GIB)
    maker.io(path, maker.write(size - 100, text(3, 100)), maker.write(70000, text(4, 9)))
    return maker.case(path, bitmaps=["b", "whole"])


@recipe("bitmaps-many")
def _bitmaps_many(maker: Maker) -> Case:
    path = maker.create(1 * MIB, cluster_size=4096)
    names = [f"bitmap-{index:02}" for index in range(24)]
    for index, name in enumerate(names):
        maker.bitmap(path, name, 512 << index % 8)
        if index % 8 == 7:
            maker.fill(path, 1 * MIB, 4096, seed=index, count=3)
    return maker.case(path, bitmaps=names)


@recipe("bitmaps-backing")
def _bitmaps_backing(maker: Maker) -> Case:
    """The active layer's bitmaps are offered, a backing file's are not."""
    base = maker.create(4 * MIB, maker.path("base.qcow2"))
    maker.bitmap(base, "below")
    maker.fill(base, 4 * MIB)
    path = _overlay(maker, 4 * MIB, maker.path(), base.name, "qcow2")
    maker.bitmap(path, "above")
    maker.fill(path, 4 * MIB, seed=1, count=8)
    return maker.case(path, bitmaps=["above"])


@recipe("bitmaps-snapshots")
def _bitmaps_snapshots(maker: Maker) -> Case:
    path = maker.create(4 * MIB)
    maker.bitmap(path, "b")
    maker.fill(path, 4 * MIB, count=6)
    SYSTEM.img("snapshot", "-c", "first", path)
    maker.bitmap(path, "c")
    maker.fill(path, 4 * MIB, seed=1, count=6)
    return maker.case(path, bitmaps=["b", "c"])
