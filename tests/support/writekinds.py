"""Every kind of image that can be written, each made once per run and copied for every use."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.support.qcow2build import IN_USE, get_field, patch, patch_bitmap_flags
from tests.support.qemu import SYSTEM

KIB = 1024
MIB = 1024 * 1024
IMAGE = "disk.qcow2"
DATA_FILE = "disk.data"
BACKING = "base"
INCONSISTENT = "inconsistent"
DIRTY_BIT = 1


@dataclass(frozen=True)
class Bitmap:
    """A bitmap that the image has; granularity in bytes."""

    name: str
    granularity: int
    recording: bool = True


BITMAPS = (
    Bitmap("fine", 512),
    Bitmap("middle", 64 * KIB),
    Bitmap("coarse", MIB),
    Bitmap("disabled", 4 * KIB, recording=False),
)
"""Beside ``INCONSISTENT``, of which nobody can tell the content."""


@dataclass(frozen=True)
class WriteKind:
    """One kind of image; sizes in bytes."""

    name: str
    cluster: int = 64 * KIB
    size: int = 2 * MIB
    options: tuple[str, ...] = ()
    content: str = "data"
    """``data`` in half of the clusters, ``compressed``, or ``none``."""
    backing: str | None = None
    """Format of the backing file."""
    backing_size: int = 0
    data_file: bool = False
    snapshot: bool = False
    """There is one from the beginning."""
    snapshots: bool = True
    """More of them can be taken."""
    dirty_bit: bool = False

    @property
    def version(self) -> int:
        return 2 if "compat=0.10" in self.options else 3

    @property
    def raw_data(self) -> bool:
        return "data_file_raw=on" in self.options

    @property
    def bitmaps(self) -> tuple[Bitmap, ...]:
        return BITMAPS if self.version > 2 else ()

    def initial(self) -> bytes:
        """The disk's content at first."""
        disk = bytearray(self.size)
        if self.backing is not None:
            seen = min(self.size, self.backing_size)
            disk[:seen] = random.Random(self.name + "backing").randbytes(seen)
        for start, data in self._written():
            disk[start : start + len(data)] = data
        return bytes(disk)

    def _written(self) -> list[tuple[int, bytes]]:
        """What is written to the layer itself: random text, that can be compressed, at every other place."""
        rng = random.Random(self.name)
        if self.content == "none":
            return []
        parts = []
        for start in range(0, self.size, 2 * self.cluster):
            length = min(self.cluster, self.size - start)
            parts.append((start, rng.randbytes(-(-length // 16)).hex().encode()[:length]))
        return parts

    def make(self, place: Path) -> None:
        """Make the image in ``place``, with all that belongs to it."""
        path = place / IMAGE
        if self.backing is not None:
            base = random.Random(self.name + "backing").randbytes(self.backing_size)
            (place / "base.raw").write_bytes(base)
            if self.backing == "raw":
                (place / "base.raw").rename(place / BACKING)
            else:
                SYSTEM.img(
                    "convert", "-q", "-f", "raw", "-O", self.backing, place / "base.raw", place / BACKING
                )
                (place / "base.raw").unlink()
        options = [f"cluster_size={self.cluster}", *self.options]
        if self.data_file:
            options.append(f"data_file={place / DATA_FILE}")
        arguments = [] if self.backing is None else ["-b", BACKING, "-F", self.backing]
        SYSTEM.img("create", "-q", "-f", "qcow2", "-o", ",".join(options), *arguments, path, self.size)
        commands = []
        for number, (start, data) in enumerate(self._written()):
            part = place / f"part{number}"
            part.write_bytes(data)
            packed = self.content == "compressed" and len(data) == self.cluster
            commands.append(f"write {'-c ' if packed else ''}-s {part} {start} {len(data)}")
        if commands:
            SYSTEM.io(path, *commands)
            for part in place.glob("part*"):
                part.unlink()
        if self.snapshot:
            SYSTEM.img("snapshot", "-c", "first", path)
        for bitmap in self.bitmaps:
            state = ["--enable" if bitmap.recording else "--disable"]
            SYSTEM.img("bitmap", "--add", *state, "-g", bitmap.granularity, path, bitmap.name)
        if self.bitmaps:
            SYSTEM.img("bitmap", "--add", "-g", 512, path, INCONSISTENT)
            patch_bitmap_flags(path, INCONSISTENT, set=IN_USE)
        if self.dirty_bit:
            now = get_field(path.read_bytes()[:512], "incompatible_features")
            patch(path, incompatible_features=now | DIRTY_BIT)

    def copy(self, cache: Path, place: Path) -> Path:
        """A fresh copy in ``place`` of the image that is kept in ``cache``; the path of it."""
        if self.data_file:  # whose name in the image is absolute
            self.make(place)
            return place / IMAGE
        kept = cache / self.name
        if not kept.exists():
            kept.mkdir()
            self.make(kept)
        shutil.copytree(kept, place, dirs_exist_ok=True)
        return place / IMAGE


KINDS = {
    kind.name: kind
    for kind in (
        WriteKind("v3"),
        WriteKind("v3-empty", content="none"),
        WriteKind("v3-odd", size=1_234_567 // 512 * 512),
        WriteKind("v2", options=("compat=0.10",)),
        WriteKind("v2-backing", options=("compat=0.10",), backing="raw", backing_size=2 * MIB),
        WriteKind("v2-512", 512, 300 * KIB, options=("compat=0.10",), content="compressed"),
        WriteKind("512", 512, 200 * KIB),
        WriteKind("512-growing", 512, 5 * MIB, options=("refcount_bits=64",), content="none"),
        WriteKind("1k-compressed", 1024, 300 * KIB, content="compressed"),
        WriteKind("4k-backing-short", 4096, 500 * KIB, backing="qcow2", backing_size=300 * KIB),
        WriteKind("4k-backing-long", 4096, 300 * KIB + 512, backing="raw", backing_size=700 * KIB),
        WriteKind("2m", 2 * MIB, 9 * MIB + 512),
        WriteKind("refcounts-1", 4096, 400 * KIB, ("refcount_bits=1",), snapshots=False),
        WriteKind("refcounts-2", 4096, 400 * KIB, ("refcount_bits=2",), snapshots=False),
        WriteKind("refcounts-4-snapshot", 4096, 400 * KIB, ("refcount_bits=4",), snapshot=True),
        WriteKind("refcounts-8-compressed", 4096, 400 * KIB, ("refcount_bits=8",), "compressed"),
        WriteKind("refcounts-32", 4096, 400 * KIB, ("refcount_bits=32",)),
        WriteKind("refcounts-64", 4096, 400 * KIB, ("refcount_bits=64",), snapshot=True),
        WriteKind("compressed-zstd", options=("compression_type=zstd",), content="compressed"),
        WriteKind("compressed-snapshot", 4096, 400 * KIB, content="compressed", snapshot=True),
        WriteKind("compressed-odd", 16 * KIB, 777 * KIB + 512, content="compressed"),
        WriteKind("extended-16k", 16 * KIB, 700 * KIB, ("extended_l2=on",)),
        WriteKind("extended-16k-empty", 16 * KIB, 700 * KIB, ("extended_l2=on",), "none"),
        WriteKind("extended-16k-odd", 16 * KIB, 345 * KIB + 512, ("extended_l2=on",), snapshot=True),
        WriteKind("extended-64k", 64 * KIB, 2 * MIB, ("extended_l2=on",), "compressed", snapshot=True),
        WriteKind("extended-backing", 16 * KIB, 600 * KIB, ("extended_l2=on",), "data", "raw", 400 * KIB),
        WriteKind("snapshot", 4096, 400 * KIB, snapshot=True),
        WriteKind("snapshot-backing", 4096, 400 * KIB, (), "data", "raw", 300 * KIB, snapshot=True),
        WriteKind("preallocated", 4096, 400 * KIB, ("preallocation=metadata",), "none"),
        WriteKind("preallocated-falloc", 4096, 400 * KIB, ("preallocation=falloc",), "none"),
        WriteKind("data-file", 16 * KIB, 500 * KIB, data_file=True, snapshots=False),
        WriteKind(
            "data-file-raw", 16 * KIB, 500 * KIB, ("data_file_raw=on",), data_file=True, snapshots=False
        ),
        WriteKind(
            "data-file-extended",
            16 * KIB,
            500 * KIB,
            ("extended_l2=on",),
            "data",
            None,
            0,
            True,
            snapshots=False,
        ),
        WriteKind("lazy", 4096, 400 * KIB, ("lazy_refcounts=on",)),
        WriteKind("lazy-dirty", 4096, 400 * KIB, ("lazy_refcounts=on",), dirty_bit=True),
    )
}
