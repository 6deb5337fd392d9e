"""Random work on every kind of image, in sessions of nbdbm and of QEMU by turns, against a model.

The model knows the disk's bytes and every bitmap's dirty granules. At the end of an example QEMU is asked
what it makes of the file: ``qemu-img check``, the content, the snapshots' contents, the dirty bits.
``NBDBM_TEST_SLOW=n`` runs n times as many examples.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nbdbm.client import NbdClient
from nbdbm.image.image import DetectZeroes, Image, OpenOptions
from tests.support.engine import read, walk
from tests.support.jitter import jittery
from tests.support.qcow2build import bitmap_entries
from tests.support.qemu import SYSTEM
from tests.support.servers import qemu_nbd
from tests.support.writekinds import INCONSISTENT, KINDS, WriteKind

pytestmark = pytest.mark.requires("qemu-img", "qemu-io", "qemu-nbd")

T = TypeVar("T")

SLOW = int(os.environ.get("NBDBM_TEST_SLOW", "1"))
SECTOR = 512
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where the images are: QEMU's tools sync after every step."""


@cache
def _kept() -> Path:
    """Where the images are kept that examples begin with."""
    place = Path(tempfile.mkdtemp(prefix="nbdbm-kinds-", dir=MEMORY))
    atexit.register(shutil.rmtree, place, True)
    return place


# -- requests ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request of a guest; offset and length in bytes."""

    kind: str
    offset: int
    length: int
    seed: int = 0
    fua: bool = False
    no_hole: bool = False
    fast: bool = False

    @property
    def data(self) -> bytes:
        """What a write writes: zeroes for every fifth seed."""
        if self.seed % 5 == 0:
            return bytes(self.length)
        return random.Random(self.seed).randbytes(self.length)


def places(kind: WriteKind) -> st.SearchStrategy[tuple[int, int]]:
    """(offset, length) on the kind's disk: near the edges of clusters, and mostly in few of them."""
    unit = max(SECTOR, kind.cluster // 8)
    last = kind.size // kind.cluster

    def place(cluster: int, part: int, shift: int, length: int, more: int) -> tuple[int, int]:
        offset = min(kind.size - 1, max(0, cluster * kind.cluster + part * unit + shift))
        return offset, max(1, min(kind.size - offset, length * unit + more))

    return st.builds(
        place,
        st.one_of(st.integers(0, min(7, last)), st.integers(0, last), st.just(last)),
        st.sampled_from((0, 0, 0, 1, 2, 4, 7)),
        st.sampled_from((0, 0, 0, 0, -1, 1, 13)),
        st.sampled_from((8, 8, 1, 2, 3, 16, 24, 40, 0)),
        st.sampled_from((0, 0, 0, 1, -1, 100)),
    )


def requests(kind: WriteKind) -> st.SearchStrategy[Request]:
    """Whatever changes the disk."""

    def build(what: str, place: tuple[int, int], seed: int, flags: int) -> Request:
        return Request(what, *place, seed, flags in (0, 1), flags in (1, 2), flags in (2, 3))

    return st.builds(
        build,
        st.sampled_from(("write", "write", "write", "zeroes", "trim")),
        places(kind),
        st.integers(1, 10_000),
        st.integers(0, 12),
    )


# -- the model ---------------------------------------------------------------------------------


@dataclass
class Model:
    """What the disk holds and what is dirty."""

    kind: WriteKind
    disk: bytearray
    dirty: dict[str, set[int]]
    snapshots: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: WriteKind) -> Model:
        """Of a fresh image."""
        disk = kind.initial()
        model = cls(kind, bytearray(disk), {bitmap.name: set() for bitmap in kind.bitmaps})
        if kind.snapshot:
            model.snapshots["first"] = disk
        return model

    def mark(self, offset: int, length: int) -> None:
        """Something touched the range."""
        for bitmap in self.kind.bitmaps:
            if bitmap.recording and length:
                last = (offset + length - 1) // bitmap.granularity
                self.dirty[bitmap.name].update(range(offset // bitmap.granularity, last + 1))

    def effect(self, request: Request, discard: bool) -> tuple[int, bytes]:
        """(offset, new content) of what the request changes."""
        offset, end = request.offset, request.offset + request.length
        if request.kind == "write":
            return offset, request.data
        if request.kind == "zeroes":
            return offset, bytes(request.length)
        size = self.kind.cluster
        first = -(-offset // size) * size
        last = end if end == self.kind.size else end // size * size
        if not discard or first >= last or (self.kind.version < 3 and self.kind.backing is not None):
            return offset, b""
        return first, bytes(last - first)

    def apply(self, request: Request, discard: bool) -> None:
        """The request has been carried out."""
        self.mark(request.offset, request.length)
        at, content = self.effect(request, discard)
        self.disk[at : at + len(content)] = content

    def settle(self, batch: list[Request], discard: bool, found: bytes) -> None:
        """The requests were under way together, and ``found`` is what came of it: possible, then true.

        Sector by sector the last one may have been any of those that change it.
        """
        effects = [self.effect(request, discard) for request in batch]
        for low, high in self._stretches(effects):
            got = found[low:high]
            possible = [c[low - at : high - at] for at, c in effects if at <= low and high <= at + len(c)]
            possible = possible or [bytes(self.disk[low:high])]
            assert got in possible, f"{low:#x}..{high:#x} is none of the {len(possible)} possible contents"
        for request in batch:
            self.mark(request.offset, request.length)
        self.disk[:] = found

    def permits(self, batch: list[Request], discard: bool, offset: int, got: bytes) -> None:
        """A read that was under way together with the batch may find ``got`` at ``offset``."""
        effects = [self.effect(request, discard) for request in batch]
        end = offset + len(got)
        for low, high in self._stretches([*effects, (offset, got)]):
            if not offset <= low < end:
                continue
            possible = [c[low - at : high - at] for at, c in effects if at <= low and high <= at + len(c)]
            possible.append(bytes(self.disk[low:high]))
            assert got[low - offset : high - offset] in possible, f"{low:#x}..{high:#x} was never like that"

    def _stretches(self, effects: list[tuple[int, bytes]]) -> Iterator[tuple[int, int]]:
        """The disk, cut at the edges of effects and, where there are some, at the edges of sectors."""
        edges = {0, self.kind.size}
        for at, content in effects:
            end = at + len(content)
            edges |= {at, end, *range(-(-at // SECTOR) * SECTOR, end, SECTOR)}
        return pairwise(sorted(edges))


# -- the machine -------------------------------------------------------------------------------


class Sessions(RuleBasedStateMachine):
    """Work on one image."""

    kinds: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.place = Path(tempfile.mkdtemp(prefix="nbdbm-model-", dir=MEMORY))
        self.image: Image | None = None
        self.count = 0
        self.sound = False
        """There is an image to judge."""

    def run(self, work: Awaitable[T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(30):
                return await work

        return self.runner.run(bounded())

    @initialize(data=st.data(), seed=st.integers(0, 1 << 30))
    def begin(self, data: st.DataObject, seed: int) -> None:
        self.kind = KINDS[data.draw(st.sampled_from(self.kinds), "kind")]
        self.path = self.kind.copy(_kept(), self.place)
        self.model = Model.of(self.kind)
        self.entry = self._inconsistent()
        self.seed = seed
        self.open(data)
        self.sound = True

    def _inconsistent(self) -> bytes:
        """The directory entry of the inconsistent bitmap."""
        if not self.kind.bitmaps:
            return b""
        data = self.path.read_bytes()
        at = bitmap_entries(data)[INCONSISTENT.encode()]
        name, extra = struct.unpack_from(">HI", data, at + 18)
        return data[at : at + 24 + extra + name]

    def open(self, data: st.DataObject) -> None:
        self.discard = data.draw(st.sampled_from((True, True, False)), "discard")
        options = OpenOptions(
            read_only=False,
            discard=self.discard,
            detect_zeroes=data.draw(st.sampled_from(DetectZeroes), "detect_zeroes"),
        )
        self.seed += 1
        patience = data.draw(st.sampled_from((0, 2, 5)), "patience")
        self.image = self.run(Image.open(str(self.path), options, jittery(self.seed, patience=patience)))

    def close(self) -> None:
        if self.image is not None:
            image, self.image = self.image, None
            self.run(image.close())

    async def perform(self, request: Request) -> None:
        assert self.image is not None
        match request.kind:
            case "write":
                await self.image.write(request.offset, memoryview(request.data), fua=request.fua)
            case "zeroes":
                await self.image.write_zeroes(
                    request.offset, request.length, no_hole=request.no_hole, fua=request.fua
                )
            case "trim":
                await self.image.trim(request.offset, request.length, fua=request.fua)

    @rule(data=st.data())
    def one(self, data: st.DataObject) -> None:
        request = data.draw(requests(self.kind), "request")
        self.run(self.perform(request))
        self.model.apply(request, self.discard)
        low = max(0, request.offset - SECTOR)
        high = min(self.kind.size, request.offset + request.length + SECTOR)
        assert self.image is not None
        assert self.run(read(self.image, low, high - low)) == self.model.disk[low:high]

    @rule(data=st.data())
    def fast_zeroes(self, data: st.DataObject) -> None:
        offset, length = data.draw(places(self.kind), "place")
        assert self.image is not None
        try:
            self.run(self.image.write_zeroes(offset, length, fast=True, no_hole=data.draw(st.booleans())))
        except Exception as error:
            assert getattr(error, "errno", None) == 95, error
            self.model.mark(offset, length)
        else:
            self.model.apply(Request("zeroes", offset, length), self.discard)

    @rule(data=st.data())
    def together(self, data: st.DataObject) -> None:
        batch = data.draw(st.lists(requests(self.kind), min_size=2, max_size=6), "batch")
        reads = data.draw(st.lists(places(self.kind), max_size=2), "reads")
        flushes = data.draw(st.integers(0, 2), "flushes")
        image = self.image
        assert image is not None

        async def work() -> tuple[list[bytes], bytes]:
            async with asyncio.TaskGroup() as group:
                found = [group.create_task(read(image, *place)) for place in reads]
                for number, request in enumerate(batch):
                    group.create_task(self.perform(request))
                    if number < flushes:
                        group.create_task(image.flush())
            return [task.result() for task in found], await read(image, 0, self.kind.size)

        found, disk = self.run(work())
        for (offset, _), got in zip(reads, found, strict=True):
            self.model.permits(batch, self.discard, offset, got)
        self.model.settle(batch, self.discard, disk)

    @rule(data=st.data())
    def part(self, data: st.DataObject) -> None:
        """Read a part, and the status of all."""
        assert self.image is not None
        offset, length = data.draw(places(self.kind), "place")
        assert self.run(read(self.image, offset, length)) == self.model.disk[offset : offset + length]
        at = 0
        for run in self.run(walk(self.image)):
            assert not run.zero or not any(self.model.disk[at : at + run.length])
            assert run.data or run.zero
            at += run.length

    @rule()
    def flush(self) -> None:
        assert self.image is not None
        self.run(self.image.flush())

    @rule(data=st.data())
    def reopen(self, data: st.DataObject) -> None:
        """Become read-only and writable again, or close and open."""
        assert self.image is not None
        if data.draw(st.booleans(), "close"):
            self.close()
            self.open(data)
            return
        self.run(self.image.reopen(read_only=True))
        self.run(self._whole())
        self.run(self.image.reopen(read_only=False))

    async def _whole(self) -> None:
        assert self.image is not None
        assert await read(self.image, 0, self.kind.size) == self.model.disk
        for bitmap in self.kind.bitmaps:
            bits = await self.image.bits(bitmap.name)
            assert bits.count() == len(self.model.dirty[bitmap.name])

    @rule(data=st.data())
    def qemu(self, data: st.DataObject) -> None:
        """A session of QEMU."""
        self.close()
        commands = []
        unit = self.kind.cluster
        clusters = self.kind.size // unit
        for _ in range(data.draw(st.integers(1, 4), "commands")):
            what = data.draw(st.sampled_from(("write", "zeroes", "unmap", "trim", "packed")), "command")
            if what in ("write", "zeroes", "unmap"):
                offset, length = data.draw(places(self.kind), "place")
            else:  # for whole clusters only
                first = data.draw(st.integers(0, min(9, clusters - 1)), "cluster")
                offset = first * unit
                length = unit if what == "packed" else unit * min(clusters - first, 2)
            value = data.draw(st.integers(1, 255), "value")
            if self.kind.data_file and what in ("packed", "trim"):
                continue
            if what == "packed" and any("-c" in command for command in commands):
                # QEMU 7.2 goes on packing in a cluster that was freed and has got another user since.
                continue
            if self.kind.name == "v2-backing" and what == "packed":
                continue  # nothing becomes unallocated there
            done: Request | None = Request("zeroes", offset, length)
            match what:
                case "write" | "packed":
                    if what == "packed":  # QEMU compresses into what is not allocated only
                        commands.append(f"write -z -u {offset} {length}")
                    packed = "-c " if what == "packed" else ""
                    commands.append(f"write {packed}-P {value} {offset} {length}")
                    self.model.disk[offset : offset + length] = bytes((value,)) * length
                    self.model.mark(offset, length)
                    done = None
                case "zeroes":
                    commands.append(f"write -z {offset} {length}")
                case "unmap":
                    commands.append(f"write -z -u {offset} {length}")
                case "trim":
                    commands.append(f"discard {offset} {length}")
                    done = Request("trim", offset, length)
            if done is not None:
                self.model.apply(done, True)
        if commands:
            note(f"qemu-io {commands}")
            SYSTEM.io(self.path, *commands, options=("-f", "qcow2", "-d", "unmap", "-t", "unsafe"))
        self.open(data)

    @precondition(lambda self: self.kind.snapshots)
    @rule(data=st.data())
    def snapshot(self, data: st.DataObject) -> None:
        """Take or delete one."""
        self.close()
        if len(self.model.snapshots) < 2:
            self.count += 1
            name = f"number {self.count}"
            SYSTEM.img("snapshot", "-c", name, self.path)
            self.model.snapshots[name] = bytes(self.model.disk)
        else:
            name = data.draw(st.sampled_from(sorted(self.model.snapshots)), "delete")
            SYSTEM.img("snapshot", "-d", name, self.path)
            del self.model.snapshots[name]
        self.open(data)

    # -- the end -------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if self.sound and sys.exception() is None:
                self.close()
                self.judge()
        finally:
            self.runner.close()
            shutil.rmtree(self.place)

    def judge(self) -> None:
        """Ask QEMU."""
        SYSTEM.img("check", "-q", self.path)
        assert self._content(()) == self.model.disk
        for name, content in self.model.snapshots.items():
            assert self._content(("-l", f"snapshot.name={name}")) == content, name
        if self.kind.raw_data:
            assert (self.place / "disk.data").read_bytes()[: self.kind.size] == self.model.disk
        if self.kind.bitmaps:
            assert self._inconsistent() == self.entry
            dirty = self.run(self._dirty())
            assert dirty == self.model.dirty

    def _content(self, arguments: tuple[str, ...]) -> bytes:
        out = self.place / "out.raw"
        SYSTEM.img("convert", "-q", "-f", "qcow2", "-O", "raw", *arguments, self.path, out)
        content = out.read_bytes()
        out.unlink()
        return content

    async def _dirty(self) -> dict[str, set[int]]:
        """The granules of each bitmap that qemu-nbd calls dirty."""
        names = [bitmap.name for bitmap in self.kind.bitmaps]
        contexts = [f"qemu:dirty-bitmap:{name}" for name in names]
        found = {}
        with qemu_nbd(self.path, bitmaps=names) as server:
            async with await NbdClient.connect(server.uri, contexts=contexts) as client:
                status = await client.block_status(0, self.kind.size)
        for bitmap, context in zip(self.kind.bitmaps, contexts, strict=True):
            at, dirty = 0, set()
            for length, flags in status[context]:
                if flags:
                    last = (at + length - 1) // bitmap.granularity
                    dirty.update(range(at // bitmap.granularity, last + 1))
                at += length
            found[bitmap.name] = dirty
        return found


GROUPS = {
    "plain": ("v3", "v3-empty", "v3-odd", "2m", "refcounts-32", "lazy", "lazy-dirty"),
    "v2": ("v2", "v2-backing", "v2-512"),
    "small": ("512", "512-growing", "1k-compressed"),
    "backing": ("4k-backing-short", "4k-backing-long", "extended-backing", "snapshot-backing"),
    "refcounts": ("refcounts-1", "refcounts-2", "refcounts-4-snapshot", "refcounts-64"),
    "compressed": ("compressed-zstd", "compressed-snapshot", "compressed-odd", "refcounts-8-compressed"),
    "extended": ("extended-16k", "extended-16k-empty", "extended-16k-odd", "extended-64k"),
    "places": ("snapshot", "preallocated", "preallocated-falloc"),
    "data-file": ("data-file", "data-file-raw", "data-file-extended"),
}


def test_every_kind_is_in_a_group() -> None:
    assert sorted(name for group in GROUPS.values() for name in group) == sorted(KINDS)


@pytest.mark.timeout(60 * max(1, SLOW))
@pytest.mark.parametrize("group", GROUPS)
def test_sessions(group: str) -> None:
    machine = type("Sessions", (Sessions,), {"kinds": GROUPS[group]})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=3 * SLOW, stateful_step_count=12, suppress_health_check=list(HealthCheck)
        ),
    )
