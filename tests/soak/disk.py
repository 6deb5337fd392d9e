"""One disk of the soak test: what each byte may be, and which granules its bitmaps must and may have.

The disk is cut into lanes (tests/crash/killing.py). The last lane belongs to tools of others, which write to
it one after the other. Behind the lanes lies the wild part, where hostile clients write nobody knows what.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from nbdbm.client import NbdClient
from nbdbm.errors import NbdError
from nbdbm.nbd.constants import CONTEXT_ALLOCATION, CONTEXT_BITMAP, CONTEXT_DEPTH
from tests.crash.killing import Lane, Load, Op
from tests.interop import writing
from tests.interop.writing import Dirty, granules
from tests.support import qemu, servers
from tests.support.images import KIB, MIB, Case
from tests.support.qcow2build import IN_USE, patch_bitmap_flags

SIZE = 4 * MIB
WILD = 256 * KIB
LANES = 6
BROKEN = "broken"
"""A bitmap that was in use when a server was killed, before the test began; it stays like that."""

FAULT = re.compile(r": (EPERM|EIO|ENOMEM|EINVAL|ENOSPC|EOVERFLOW|ENOTSUP)\b")
"""In the text of an error: the server failed a request that it should carry out."""


@dataclass
class Bitmap:
    """What a recording bitmap must have, and what it may have, since it began. Sets of granules."""

    granularity: int
    must: set[int] = field(default_factory=set)
    may: set[int] = field(default_factory=set)

    def judge(self, name: str, bits: set[int], must: set[int] | None = None) -> None:
        missed = (self.must if must is None else must) - bits
        assert not missed, f"{name} claims to be consistent and misses {sorted(missed)[:9]}"
        extra = bits - self.may
        assert not extra, f"{name} has {sorted(extra)[:9]}, which nobody asked to be written"


class Disk(Load):
    """A writable image with recording bitmaps."""

    def __init__(
        self,
        name: str,
        path: Path,
        granularities: dict[str, int],
        rng: random.Random,
        *,
        lanes: int = LANES,
        pause: float = 0.02,
        broken: bool = False,
    ) -> None:
        self.case = Case(name, path, size=SIZE)
        content = writing.content_by_qemu(self.case)
        super().__init__(content[: SIZE - WILD], lanes, rng)
        self.size = SIZE
        self.name = name
        """Of the export, as it is now."""
        self.path = path
        self.broken = broken
        self.bitmaps = {bitmap: Bitmap(g) for bitmap, g in granularities.items()}
        self.pause = pause
        self.tool_lane = self.lanes.pop()
        """Not written by the clients here."""
        self.live = False
        """A session is under way, which keeps the export open."""
        self.wrote: int | None = None
        """Something was written and answered in it, when there had been so many changes; None: nothing."""
        self.quiet = asyncio.Lock()
        """Held while the tool lane is written to, or must not be."""
        self.offered = True
        """It is in the configuration that is in force."""
        self.window = False
        """A change that sends its clients away is under way."""
        self.changes = 0
        """Such changes so far, each counted when it begins and when it is over."""
        self.clean = True
        """The image was closed in order, or is open still: whatever was answered must be there."""
        self.sessions = 0
        for bitmap in self.bitmaps.values():
            self._begin(bitmap)

    @property
    def everything(self) -> list[Lane]:
        return [*self.lanes, self.tool_lane]

    @property
    def contexts(self) -> list[str]:
        return [CONTEXT_ALLOCATION, CONTEXT_DEPTH, *(CONTEXT_BITMAP + name for name in self.bitmaps)]

    # -- what was written

    def _begin(self, bitmap: Bitmap) -> None:
        bitmap.must.clear()
        bitmap.may = granules(SIZE - WILD, WILD, bitmap.granularity)

    def asked(self, offset: int, length: int) -> None:
        for bitmap in self.bitmaps.values():
            bitmap.may |= granules(offset, length, bitmap.granularity)

    def answered(self, offset: int, length: int) -> None:
        if self.live and not self.window:
            self.wrote = self.changes
        for bitmap in self.bitmaps.values():
            bitmap.must |= granules(offset, length, bitmap.granularity)

    def excused(self, changes: int) -> bool:
        """Whether a client that came when there had been so many changes may have lost its connection."""
        return self.window or self.changes != changes

    @property
    def written_to(self) -> bool:
        """Whether something has been written since the export was opened, and it is open still."""
        return self.live and not self.window and self.wrote == self.changes

    def settle(self, content: bytes) -> None:
        """This is on the disk, which nobody writes to just now: judge it, and go on from here."""
        for lane in self.everything:
            if self.clean:
                lane.flushed(lane.done)
            width = len(lane.durable)
            found = content[lane.start : lane.start + width]
            lost = lane.lost(found)
            assert not lost, f"{self.name}: {len(lost)} sectors lost, from {lost[0]:#x}"
            if self.clean and lane.ops:
                (op,) = lane.ops  # never answered; it was carried out if it changed anything
                for at in range(op.offset, op.offset + len(op.data)):
                    if lane.durable[at] != found[at]:
                        self.answered(lane.start + at, 1)
            lane.ops.clear()
            lane.durable[:] = found
        self.clean = True

    # -- clients

    async def session(self, uri: str, rest_after: float, connections: int = 2) -> None:
        """Write over several connections for some time; raises NbdError when they are lost."""
        async with await NbdClient.connect(uri) as client:
            async with self.quiet:
                await client.flush()
                self.settle(bytes(await client.read(0, self.size)))
                self.live, self.wrote, self.resting = True, None, False
            self.sessions += 1
            timer = asyncio.get_running_loop().call_later(rest_after, self._rest)
            try:
                await self.run(uri, connections)
            finally:
                timer.cancel()
                rested, self.live, self.wrote = self.resting, False, None
            # Those who write end in silence when their connection is lost.
            if not rested:
                raise NbdError("a connection was lost")
            await client.flush()

    def _rest(self) -> None:
        self.resting = True

    async def _request(self, client: NbdClient, lane: Lane, number: int) -> None:
        if self.pause:
            await asyncio.sleep(self.rng.random() * self.pause)
        try:
            await super()._request(client, lane, number)
        except NbdError as error:
            assert not FAULT.search(str(error)), f"{self.name}: {error}"
            raise

    async def by_tool(self, write: Callable[[int, int, int], Awaitable[bool]]) -> None:
        """Have somebody else write: ``write(offset, length, byte)`` tells whether it succeeded."""
        async with self.quiet:
            if self.live:
                await self._by_tool(write)

    async def _by_tool(self, write: Callable[[int, int, int], Awaitable[bool]]) -> None:
        lane = self.tool_lane
        if lane.ops and not lane.ops[-1].answered:
            return  # nobody knows yet what became of the last one
        width = len(lane.durable) // 512 * 512
        offset = self.rng.randrange(0, width, 512)
        length = min(self.rng.randrange(1, 129) * 512, width - offset)
        byte = self.rng.randrange(1, 256)
        op = Op(offset, bytes([byte]) * length)
        lane.ops.append(op)
        self.asked(lane.start + offset, length)
        if await write(lane.start + offset, length, byte):
            self.answered(lane.start + offset, length)
            op.answered = True

    async def look(self, uri: str) -> None:
        """Block status of everything, in every context; the bitmaps while they are being written."""
        async with await NbdClient.connect(uri, contexts=self.contexts) as client:
            must = {name: set(bitmap.must) for name, bitmap in self.bitmaps.items()}
            answer = await client.block_status(0, self.size)
            for context, extents in answer.items():
                assert sum(extent.length for extent in extents) == self.size, context
            for name, bitmap in self.bitmaps.items():
                at, bits = 0, set()
                for extent in answer[CONTEXT_BITMAP + name]:
                    if extent.flags & 1:
                        bits |= granules(at, extent.length, bitmap.granularity)
                    at += extent.length
                bitmap.judge(f"{self.name}: {name}, as it is served,", bits, must[name])

    # -- between two servers

    def judge(self, *, killed: bool, wrote: bool) -> None:
        """No server has the image: see what QEMU makes of it, and begin anew what cannot be trusted.

        ``killed``: since the last look a server was killed. ``wrote``: it had carried out writes since it
        had opened the image.
        """
        status, said = writing.check(self.path)
        assert status in ((0, 3) if killed else (0,)), f"{self.name}: {said}"
        if status:
            if self.rng.random() < 0.5:
                qemu.run(qemu.SYSTEM.argv("qemu-img", "check", "-q", "-r", "leaks", self.path))
            else:
                nbdbm("check", "--repair", "leaks", self.path)
            status, said = writing.check(self.path)
            assert not status, f"{self.name}: {said}"
        if killed:
            self.clean = False
        self.settle(writing.content_by_qemu(self.case))
        known = writing.bitmaps(self.path)
        assert known.keys() == self.bitmaps.keys() | ({BROKEN} if self.broken else set()), known
        in_use = {name for name, (_, flags) in known.items() if "in-use" in flags}
        assert not self.broken or BROKEN in in_use
        in_use.discard(BROKEN)
        if not killed:
            assert not in_use, f"{self.name}: {in_use} were not stored"
        elif wrote:
            assert in_use == self.bitmaps.keys(), f"{self.name}: {in_use} should be all, after a kill"
        self.case.bitmaps = sorted(self.bitmaps.keys() - in_use)
        found: Dirty = writing.dirty_by_qemu(self.case)
        for name, bits in found.items():
            self.bitmaps[name].judge(f"{self.name}: {name}", bits)
        for name in sorted(in_use):
            self.renew(name)
        self.wrote = None

    def renew(self, name: str) -> None:
        """As an operator would: remove the bitmap, begin a new one."""
        bitmap = self.bitmaps[name]
        if self.rng.random() < 0.7:
            qemu.SYSTEM.img("bitmap", "--remove", self.path, name)
            qemu.SYSTEM.img("bitmap", "--add", "-g", bitmap.granularity, self.path, name)
        else:
            nbdbm("bitmap", "remove", self.path, name)
            nbdbm("bitmap", "add", "--granularity", bitmap.granularity, self.path, name)
        self._begin(bitmap)


def nbdbm(*words: object) -> str:
    return servers.nbdbm_run(*words, check=True, timeout=qemu.TIMEOUT).stdout


def create(path: Path, granularities: dict[str, int], *options: object, broken: bool = False) -> None:
    """A new image with some content and recording bitmaps."""
    qemu.SYSTEM.img("create", "-q", "-f", "qcow2", *options, path, SIZE)
    qemu.SYSTEM.io(path, f"write -P 7 0 {SIZE // 2}", f"write -z {SIZE // 4} 100k")
    for name, granularity in granularities.items():
        qemu.SYSTEM.img("bitmap", "--add", "-g", granularity, path, name)
    if broken:
        qemu.SYSTEM.img("bitmap", "--add", path, BROKEN)
        patch_bitmap_flags(path, BROKEN, set=IN_USE)
