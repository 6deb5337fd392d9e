"""The images that are served: made by qemu-img and qemu-io when first asked for.

Every contender gets the same ones, and all contents come from fixed seeds. ``scale`` divides the amounts
of data, and the counts of extents and tables with them; the disks that are not full keep their size.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.support.qemu import SYSTEM, environment

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

CLUSTER = 64 * KIB
"""QEMU's default, bytes; all images have it."""

TIMEOUT = 600.0
"""Seconds for one run of a tool."""

RECORDING = ("daily", "weekly", "monthly")
STOPPING = tuple(f"bitmap{number:02}" for number in range(20))
SPECKLES = "speckles"


class NotEvicted(Exception):
    """A file stays in the page cache, so nothing can be said of reads that miss it."""


class Images:
    """A directory with images in it.

    Args:
        place: the directory; what it holds already is used as it is.
        scale: 1 for the real amounts, n for an nth of them.
    """

    def __init__(self, place: Path, scale: int = 1) -> None:
        self.place = place
        self.scale = scale

    def get(self, name: str) -> Path:
        """The image of this name in MAKERS, made now if it is not there."""
        path = self.place / f"{name}-{self.scale}.qcow2"
        if not path.exists():
            # Under its name only once it is whole: the directory may be used again.
            part = path.with_suffix(".part")
            MAKERS[name](self, part)
            part.rename(path)
        return path

    def warm(self, name: str) -> Path:
        """The image of this name, with all its files in the page cache if they are to be read."""
        path = self.get(name)
        if name in READ:
            for file in self._files(name):
                warm(file)
        return path

    def cold(self, name: str) -> Path:
        """The image of this name, with none of its files in the page cache. Raises NotEvicted."""
        path = self.get(name)
        for file in self._files(name):
            evict(file)
        return path

    def _files(self, name: str) -> list[Path]:
        layers = (self.place / f"{name}-{self.scale}").glob("*") if name == "chain" else ()
        return [self.place / f"{name}-{self.scale}.qcow2", *layers]

    def fresh(self, size: int) -> Path:
        """An empty image for a work that allocates; the one before is gone."""
        path = self.place / "fresh.qcow2"
        path.unlink(missing_ok=True)
        create(path, size)
        return path

    def drop(self, name: str) -> None:
        """Give its space back."""
        for path in (self.place / f"{name}-{self.scale}.qcow2", self.place / "fresh.qcow2"):
            path.unlink(missing_ok=True)
        if name == "chain":
            shutil.rmtree(self.place / f"chain-{self.scale}", ignore_errors=True)

    # -- one method per image

    def data(self, path: Path) -> None:
        """2 GiB, every cluster of it in the file."""
        self.filled(path, 2 * GIB // self.scale)

    def recording(self, path: Path) -> None:
        """1 GiB, every cluster of it in the file, three bitmaps that record."""
        self.filled(path, GIB // self.scale)
        for name in RECORDING:
            add_bitmap(path, name)

    def sparse(self, path: Path) -> None:
        """64 GiB with 1 GiB of data, in pieces of 1 MiB."""
        create(path, 64 * GIB)
        count = 1024 // self.scale
        qemu_io(path, (f"write -q -P {1 + i % 255} {i * (64 * GIB // count)} {MIB}" for i in range(count)))

    def zlib(self, path: Path) -> None:
        """512 MiB, compressed to about a half."""
        self.filled(path, GIB // 2 // self.scale, "-c", "-o", "compression_type=zlib")

    def zstd(self, path: Path) -> None:
        """The same with the other method."""
        self.filled(path, GIB // 2 // self.scale, "-c", "-o", "compression_type=zstd")

    def chain(self, path: Path) -> None:
        """1 GiB in five layers: a full base, and each other one with a fifth of the clusters."""
        size = GIB // self.scale
        layers = self.place / f"chain-{self.scale}"
        layers.mkdir(exist_ok=True)
        below = layers / "layer0.qcow2"
        self.filled(below, size)
        for number in range(1, 5):
            layer = path if number == 4 else layers / f"layer{number}.qcow2"
            SYSTEM.img("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", layer)
            chosen = random.Random(number).sample(range(size // CLUSTER), size // CLUSTER // 5)
            qemu_io(layer, (f"write -q -P {number} {at * CLUSTER} {CLUSTER}" for at in sorted(chosen)))
            below = layer

    def speckled(self, path: Path) -> None:
        """1 TiB, a bitmap with 262144 dirty granules, each alone: 524288 extents."""
        create(path, TIB)
        add_bitmap(path, SPECKLES)
        count = 262144 // self.scale
        step = TIB // count
        # Zeroes without space: a bitmap records them like data.
        qemu_io(path, (f"write -q -z -u {i * step} {CLUSTER}" for i in range(count)))

    def scattered(self, path: Path) -> None:
        """64 GiB, 100 000 clusters of data, each alone: 200 000 extents."""
        create(path, 64 * GIB)
        count = 100_000 // self.scale
        step = 64 * GIB // CLUSTER // count * CLUSTER
        qemu_io(path, (f"write -q -P 7 {i * step} 4096" for i in range(count)))

    def stopping(self, path: Path) -> None:
        """4 TiB, twenty bitmaps that record."""
        create(path, 4 * TIB)
        for name in STOPPING:
            add_bitmap(path, name)

    def huge(self, path: Path) -> None:
        """16 TiB, data in every other gigabyte: 8192 L2 tables, 512 MiB of them."""
        create(path, 16 * TIB)
        count = 8192 // self.scale
        qemu_io(path, (f"write -q -P 9 {i * (16 * TIB // count)} {CLUSTER}" for i in range(count)))

    def filled(self, path: Path, size: int, *options: str) -> None:
        """``size`` bytes that compress to about a half, by qemu-img convert."""
        raw = path.with_suffix(".raw")
        rng = random.Random(size)
        # A few distinct mebibytes do: nobody on the way compares one cluster with another.
        blocks = [b"".join(_page(rng) for _ in range(MIB // 4096)) for _ in range(16)]
        try:
            with raw.open("wb") as out:
                for number in range(size // MIB):
                    out.write(blocks[number % len(blocks)])
            form = ["-f", "raw", "-O", "qcow2", "-m", "8", "-W", *options]
            subprocess.run(
                SYSTEM.argv("qemu-img", "convert", "-q", *form, raw, path),
                check=True,
                timeout=TIMEOUT,
                env=environment(),
            )
        finally:
            raw.unlink(missing_ok=True)


MAKERS: dict[str, Callable[[Images, Path], None]] = {
    "data": Images.data,
    "recording": Images.recording,
    "sparse": Images.sparse,
    "zlib": Images.zlib,
    "zstd": Images.zstd,
    "chain": Images.chain,
    "speckled": Images.speckled,
    "scattered": Images.scattered,
    "stopping": Images.stopping,
    "huge": Images.huge,
}

READ = {"data", "recording", "zlib", "zstd", "chain"}
"""Those whose data is read. Warming another one would fill the page cache with what nobody asks for."""

SPACE: dict[str, int] = {
    "data": 4 * GIB,
    "recording": 2 * GIB,
    "sparse": GIB + GIB // 8,
    "zlib": GIB,
    "zstd": GIB,
    "chain": 3 * GIB,
    "speckled": GIB // 4,
    "scattered": 7 * GIB,
    "stopping": GIB // 8,
    "huge": 2 * GIB,
}
"""Bytes of the host's disk that making an image takes at most, at scale 1."""


def create(path: Path, size: int, *options: str) -> None:
    """An empty image."""
    SYSTEM.img("create", "-q", "-f", "qcow2", *options, path, size)


def add_bitmap(path: Path, name: str) -> None:
    """A persistent bitmap that records, of QEMU's default granularity."""
    SYSTEM.img("bitmap", "--add", path, name)


def qemu_io(path: Path, commands: Iterable[str]) -> None:
    """Let one qemu-io carry out any number of commands."""
    done = subprocess.run(
        SYSTEM.argv("qemu-io", "-t", "unsafe", "-f", "qcow2", path),
        input="\n".join(commands) + "\n",
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env=environment(),
    )
    # It ends with 0 whatever has failed, and prompts on the way.
    said = done.stdout.replace("qemu-io>", "").strip() + done.stderr.strip()
    if said or done.returncode != 0:
        raise RuntimeError(f"qemu-io {path}: {said[-200:]}")


def warm(path: Path) -> None:
    """Have a file in the page cache."""
    buffer = bytearray(MIB)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def evict(path: Path) -> None:
    """Have a file out of the page cache. Raises NotEvicted if more than a hundredth of it stays."""
    with path.open("rb") as file:
        # Only what is on the disk can be dropped.
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    words = ["fincore", "--noheadings", "--bytes", "--output", "RES", str(path)]
    stays = int(subprocess.run(words, check=True, capture_output=True, timeout=TIMEOUT).stdout)
    if stays > path.stat().st_size // 100:
        raise NotEvicted(f"{stays / MIB:.0f} MiB of {path.name} stay in the page cache")


def _page(rng: random.Random) -> bytes:
    return rng.randbytes(1792) + (b"%016x " % rng.getrandbits(64)) * 135 + bytes(9)
