"""A disk that tests write to: a copy of an image, what it must hold, and what its bitmaps must say.

Requests go through ``Guest`` to any client library; ``judge`` then compares with what QEMU finds in the
file: content, consistency, and every granule of every bitmap.
"""

from __future__ import annotations

import json
import random
import shutil
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.support import images, libnbd, qcow2edit, qemu, servers
from tests.support.images import Case

CONTEXT = "qemu:dirty-bitmap:"
SECTOR = 512

LEAKY = {"bitmaps-all-ones", "bitmaps-stale"}
"""Images that have leaked clusters from the beginning: those of what was patched away."""
LEAKING = 3
"""Status of ``qemu-img check`` that found leaks and nothing worse."""

Dirty = dict[str, set[int]]
"""Bitmap name to the numbers of the dirty granules."""


def writable_copy(name: str, gallery: images.Gallery, place: Path) -> Case:
    """An image of the matrix, alone in ``place``, that may be changed."""
    if name.startswith("data-file"):
        # Refers to its data file by an absolute name: made anew.
        return images.RECIPES[name](images.Maker(name, place))
    case = gallery.get(name)
    subprocess.run(["cp", "-r", "--sparse=always", f"{case.path.parent}/.", place], check=True)
    for path in place.rglob("*"):
        if path.is_file():
            path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    case.path = place / case.path.relative_to(gallery.place / name)
    return case


def bitmaps(path: Path) -> dict[str, tuple[int, list[str]]]:
    """Granularity and flags of each bitmap, by qemu-img."""
    shown = json.loads(qemu.SYSTEM.img("info", "-U", "--output", "json", "-f", "qcow2", path))
    found = shown["format-specific"]["data"].get("bitmaps", [])
    return {bitmap["name"]: (bitmap["granularity"], bitmap["flags"]) for bitmap in found}


def dirty_by_qemu(case: Case, tools: qemu.Tools = qemu.SYSTEM) -> Dirty:
    """What qemu-nbd says about every bitmap of the file that it will serve."""
    if not case.bitmaps:
        return {}
    with servers.qemu_nbd(case.path, bitmaps=case.bitmaps, tools=tools) as server:
        return dirty_as_served(server, case, tools)


def dirty_as_served(server: servers.Server, case: Case, tools: qemu.Tools = qemu.SYSTEM) -> Dirty:
    """What a running server says about every bitmap."""
    if not case.bitmaps:
        return {}
    known = bitmaps(case.path)
    contexts = [CONTEXT + name for name in case.bitmaps]
    answer = libnbd.probe(server.uri, tools, contexts=contexts, digest=False)
    assert answer["contexts"] == contexts
    found: Dirty = {}
    for name in case.bitmaps:
        granularity = known[name][0]
        found[name] = set()
        at = 0
        for length, flags in answer["maps"][CONTEXT + name]:
            if flags & 1:
                found[name] |= granules(at, length, granularity)
            at += length
    return found


def granules(offset: int, length: int, granularity: int) -> set[int]:
    """The granules that a range touches."""
    return set(range(offset // granularity, -(-(offset + length) // granularity))) if length else set()


def read_all(h: Any, size: int) -> bytes:
    """The whole disk through an open libnbd connection."""
    step = 16 << 20
    return b"".join(bytes(h.pread(min(step, size - at), at)) for at in range(0, size, step))


class Guest:
    """What a guest knows of its disk: the content, and where it wrote."""

    def __init__(self, content: bytes, seed: int) -> None:
        self.content = bytearray(content)
        self.size = len(content)
        self.touched: list[tuple[int, int]] = []
        self.rng = random.Random(seed)

    def piece(self, longest: int) -> tuple[int, int]:
        """A range of the disk; often it begins or ends on a sector or a cluster."""
        unit = self.rng.choice([1, 1, SECTOR, 4096, 65536])
        length = self.rng.randrange(1, min(longest, self.size) + 1)
        offset = self.rng.randrange(0, self.size - length + 1)
        offset = offset // unit * unit
        return offset, min(max(length // unit * unit, 1), self.size - offset)

    def wrote(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        self.touched.append((offset, len(data)))

    def trimmed(self, offset: int, found: bytes) -> None:
        """A trimmed range reads as ``found``: each sector is what it was, or zeroes."""
        was = self.content[offset : offset + len(found)]
        for at in range(0, len(found), SECTOR):
            new, old = found[at : at + SECTOR], was[at : at + SECTOR]
            if new != old and any(new):
                mixed = all(n in (o, 0) for n, o in zip(new, old, strict=True))
                assert mixed, f"rubbish at {offset + at}"
        self.wrote(offset, found)

    # -- through libnbd, one request after another

    def play(self, handles: list[Any], count: int, longest: int, *, fast: bool = True) -> None:
        """``count`` requests of all kinds over ``handles``, each connection now and then."""
        nbd = libnbd.module()
        for number in range(count):
            h = self.rng.choice(handles)
            offset, length = self.piece(longest)
            kind = self.rng.choice(["write", "write", "write", "zero", "zero", "fast", "trim", "flush"])
            fua = nbd.CMD_FLAG_FUA if self.rng.random() < 0.2 else 0
            if kind == "write":
                data = images.text(number, length) if number % 3 else bytes([number % 251 + 1]) * length
                h.pwrite(data, offset, fua)
                self.wrote(offset, data)
            elif kind == "zero":
                h.zero(length, offset, fua | self.rng.choice([0, nbd.CMD_FLAG_NO_HOLE]))
                self.wrote(offset, bytes(length))
            elif kind == "fast" and fast:
                try:
                    h.zero(
                        length, offset, nbd.CMD_FLAG_FAST_ZERO | self.rng.choice([0, nbd.CMD_FLAG_NO_HOLE])
                    )
                    self.wrote(offset, bytes(length))
                except nbd.Error as error:
                    assert error.errno in ("ENOTSUP", "EOPNOTSUPP"), error
                    # Whatever was begun counts as written, but nothing may have changed.
                    self.touched.append((offset, length))
                    assert h.pread(length, offset) == self.content[offset : offset + length]
            elif kind == "trim":
                h.trim(length, offset, fua)
                self.trimmed(offset, bytes(h.pread(length, offset)))
            else:
                h.flush()
            if number % 8 == 0:
                offset, length = self.piece(longest)
                assert h.pread(length, offset) == self.content[offset : offset + length], (number, offset)

    def storm(self, handles: list[Any], count: int, step: int) -> None:
        """``count`` writes side by side, all in flight at once over all connections; none overlap."""
        nbd = libnbd.module()
        count = min(count, self.size // step)
        start = self.rng.randrange(0, self.size - count * step + 1)
        order = list(range(count))
        self.rng.shuffle(order)
        pending = []
        for number in order:
            h = handles[number % len(handles)]
            data = bytes([number % 255 + 1]) * step
            offset = start + number * step
            if number % 5 == 4:
                pending.append((h, h.aio_zero(step, offset)))
                data = bytes(step)
            else:
                flags = nbd.CMD_FLAG_FUA if number % 7 == 0 else 0
                pending.append(
                    (h, h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset, flags=flags))
                )
            self.wrote(offset, data)
        for h, cookie in pending:
            while not h.aio_command_completed(cookie):
                h.poll(30000)

    def dirty(self, before: Dirty, path: Path) -> Dirty:
        """What the bitmaps must say now."""
        known = bitmaps(path) if before else {}
        now: Dirty = {}
        for name, was in before.items():
            granularity, flags = known[name]
            now[name] = set(was)
            if "auto" in flags:
                for offset, length in self.touched:
                    now[name] |= granules(offset, length, granularity)
        return now


def connect(uri: str, *, structured: bool = True) -> Any:
    """An open libnbd connection."""
    h = libnbd.module().NBD()
    h.set_request_structured_replies(structured)
    h.set_uri_allow_local_file(True)  # certificates
    h.connect_uri(uri)
    return h


def content_by_qemu(case: Case, tools: qemu.Tools = qemu.SYSTEM) -> bytes:
    """The whole disk, by ``qemu-img convert``."""
    place = case.path.parent
    image = case.path
    if case.size % SECTOR and case.format == "qcow2":
        # QEMU reads whole sectors only: the last one is shown to it whole.
        image = place / f"whole-{case.path.name}"
        shutil.copy(case.path, image)
        qcow2edit.set_size(image, -(-case.size // SECTOR) * SECTOR)
    raw = place / "converted.raw"
    tools.img("convert", "-f", case.format, "-O", "raw", image, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data[: case.size].ljust(case.size, b"\0")


def check(path: Path, tools: qemu.Tools = qemu.SYSTEM) -> tuple[int, str]:
    """Status and output of ``qemu-img check``."""
    done = qemu.run(tools.argv("qemu-img", "check", "-f", "qcow2", path), check=False)
    return done.returncode, done.stdout + done.stderr


def judge(case: Case, guest: Guest, before: Dirty, tools: Iterable[qemu.Tools] = (qemu.SYSTEM,)) -> None:
    """The image after a clean end, in QEMU's eyes: sound, the right content, the right bits."""
    expected = guest.dirty(before, case.path)
    for tool in tools:
        if case.format == "qcow2":
            status, said = check(case.path, tool)
            assert status == (LEAKING if case.name in LEAKY else 0), said
        found = content_by_qemu(case, tool)
        if found != guest.content:
            at = next(i for i, (a, b) in enumerate(zip(found, guest.content, strict=True)) if a != b)
            raise AssertionError(
                f"byte {at:#x} is {found[at : at + 16]!r}, not {guest.content[at : at + 16]!r}"
            )
        bits = dirty_by_qemu(case, tool)
        for name in expected:
            missing = sorted(expected[name] - bits[name])
            extra = sorted(bits[name] - expected[name])
            assert not missing and not extra, f"{name}: missing {missing[:9]}, too many {extra[:9]}"


def blank(place: Path, size: int, *bitmaps: tuple[str, int], **options: object) -> images.Case:
    """A new image with enabled bitmaps (name, granularity)."""
    maker = images.Maker(place.name, place)
    path = maker.create(size, **options)
    for name, granularity in bitmaps:
        maker.bitmap(path, name, granularity)
    return maker.case(path, bitmaps=[name for name, _ in bitmaps])
