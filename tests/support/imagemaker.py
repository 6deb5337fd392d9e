"""Makes one image with qemu-img and qemu-io, with content that tells where it came from.

Content is deterministic: each write has its own bytes, text that names the offset (compressible, and never
right at a wrong place) or random bytes (incompressible).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.qemu import SYSTEM

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB


@dataclass
class Case:
    """A finished image, and what there is to know about it."""

    name: str
    path: Path
    format: str = "qcow2"
    bitmaps: list[str] = field(default_factory=list)
    """The consistent ones: what must be offered, and what qemu-nbd is asked for."""
    refused: list[str] = field(default_factory=list)
    """The inconsistent ones."""
    options: list[str] = field(default_factory=list)
    """For ``nbdbm serve``."""
    qemu_options: list[str] = field(default_factory=list)
    """For ``qemu-nbd``: the same thing said to it."""
    reference: Path | None = None
    """What qemu-img reads instead, where it cannot read the image itself to the last byte."""
    size: int = 0
    """Bytes."""

    @property
    def files(self) -> list[Path]:
        """The image and everything that lies beside it."""
        return sorted(path for path in self.path.parent.rglob("*") if path.is_file())

    def contexts(self) -> list[str]:
        """Every context that is to be offered."""
        names = [f"qemu:dirty-bitmap:{name}" for name in self.bitmaps]
        return ["base:allocation", "qemu:allocation-depth", *names]


def text(seed: int, length: int) -> bytes:
    """Lines that name the seed and their own offset."""
    lines = [b"%08x at %012x %s\n" % (seed, at, b"." * 38) for at in range(0, length, 64)]
    return b"".join(lines)[:length]


def noise(seed: int, length: int) -> bytes:
    """Bytes that do not compress."""
    return random.Random(seed).randbytes(length)


class Maker:
    """Makes one image (and whatever it refers to) in a directory of its own."""

    def __init__(self, name: str, place: Path) -> None:
        self.name = name
        self.place = place
        self.seed = zlib.crc32(name.encode())

    def path(self, name: str = "disk.qcow2") -> Path:
        return self.place / name

    def create(
        self, size: int, path: Path | None = None, image_format: str = "qcow2", **options: Any
    ) -> Path:
        """``qemu-img create -o ...``; underscores and all, the option names are qemu-img's."""
        path = path or self.path()
        words = [f"{key}={value}" for key, value in options.items()]
        given = ["-o", ",".join(words)] if words else []
        SYSTEM.img("create", "-q", "-f", image_format, *given, path, size)
        return path

    def bitmap(self, path: Path, name: str, granularity: int | None = None, *, enabled: bool = True) -> None:
        """``qemu-img bitmap --add``."""
        given = ["-g", str(granularity)] if granularity else []
        state = [] if enabled else ["--disable"]
        SYSTEM.img("bitmap", "--add", *state, *given, path, name)

    def io(self, path: Path, *commands: str, image_format: str = "qcow2") -> None:
        SYSTEM.io(path, *commands, options=("-f", image_format, "-d", "unmap"))

    def write(self, offset: int, data: bytes, *flags: str) -> str:
        """The qemu-io command that writes ``data``."""
        pattern = self.place / f".pattern-{hashlib.sha256(data).hexdigest()[:16]}"
        pattern.write_bytes(data)
        return f"write -q {' '.join(flags)} -s {pattern} {offset} {len(data)}"

    def mixture(
        self, size: int, cluster: int, *, count: int = 24, seed: int = 0, packed: int = 0
    ) -> list[str]:
        """Commands for writes, zeroes and discards all over a disk, aligned and not.

        ``packed`` clusters are written compressed before all else: QEMU compresses only into clusters
        that have never been written.
        """
        rng = random.Random(self.seed + seed)
        commands: list[str] = []
        for index, number in enumerate(rng.sample(range(size // cluster), packed)):
            share = rng.randrange(0, cluster)
            mixed = noise(self.seed + index, share) + text(self.seed + index, cluster - share)
            commands.append(self.write(number * cluster, mixed, "-c"))
        longest = min(size, max(4 * cluster, 64 * KIB), 3 * MIB)
        for index in range(count):
            kind = rng.choice(["text", "text", "noise", "zero", "unmap", "discard"])
            length = rng.randrange(1, longest + 1)
            offset = rng.randrange(0, size - length + 1)
            if kind in ("text", "noise"):
                make = text if kind == "text" else noise
                commands.append(self.write(offset, make(self.seed + 1000 * seed + index, length)))
            else:
                # Zeroes and discards of whole sectors, so that they stay what they are.
                offset, length = offset // 512 * 512, max(512, length // 512 * 512)
                if offset + length > size:
                    continue
                verb = {"zero": "write -q -z", "unmap": "write -q -z -u", "discard": "discard -q"}[kind]
                commands.append(f"{verb} {offset} {length}")
        return commands

    def fill(self, path: Path, size: int, cluster: int = 64 * KIB, **how: Any) -> None:
        self.io(path, *self.mixture(size, cluster, **how))

    def raw(self, size: int, name: str = "disk.raw", *, seed: int = 0) -> Path:
        """A raw file with data and holes, of any size in bytes."""
        path = self.path(name)
        rng = random.Random(self.seed + seed + 1)
        with path.open("wb") as file:
            file.truncate(size)
            for index in range(12):
                # In whole blocks of the host's file system, so that holes stay holes.
                length = min(size, rng.randrange(1, 64) * 4096)
                offset = rng.randrange(0, size - length + 1) // 4096 * 4096
                file.seek(offset)
                file.write(text(self.seed + seed + index, length))
            os.fsync(file.fileno())
        return path

    def case(self, path: Path | None = None, **more: Any) -> Case:
        path = path or self.path()
        case = Case(self.name, path, **more)
        if not case.size:
            shown = json.loads(SYSTEM.img("info", "-U", "--output", "json", "-f", case.format, path))
            case.size = shown["virtual-size"]
        return case
