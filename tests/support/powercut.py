"""Power failures: record what a run does to its files, and rebuild what a failure may have left of it.

A ``Timeline`` numbers everything that happens, over all files of a run: a write's start, its end, a
guest's flush being acknowledged. A ``PowerCutFile`` is a BlockFile in memory that records on it. Then
``Timeline.states`` rebuilds crash states. After a failure at tick t, of each file there is

- what a sync of that file guarantees: every operation that had ended before the sync began, if the sync
  ended by t;
- of every other operation that had begun by t: any part. Writes, zeroes and discards are torn at sectors
  of 512 bytes, each on its own; a truncate happened or did not.

No order holds among those but that of operations on the same sector. A discard's content is undefined:
old, zeroes, or garbage.

    timeline = Timeline()
    file = PowerCutFile(timeline, image_bytes)
    ... run the engine on it ...
    for state in timeline.states(random=1000, seed=7):
        check(state.files[0], state.tick)         # a BlockFile; writing to it changes this state only

States share what they have in common (a base that only moves forward, and the sectors that differ), so
a state is used up before the next one is taken.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random as random_module
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from tests.support.crashfile import (
    GARBAGE,
    NEVER,
    SECTOR,
    Base,
    CrashFile,
    Kind,
    Op,
    Scratch,
    garbage_of,
    runs_of,
)
from tests.support.files import Unlocked

__all__ = ["GARBAGE", "NEVER", "SECTOR", "CrashFile", "CrashState", "PowerCutFile", "Scratch", "Timeline"]


@dataclass(slots=True)
class CrashState:
    """What one power failure left. Valid until the next state is taken."""

    tick: int
    """Everything up to here had happened: operations begun, requests acknowledged."""
    files: list[CrashFile]
    """In the order in which the PowerCutFiles were made."""
    pending: list[Op]
    """Operations of which anything may be missing."""
    parts: list[tuple[int, ...]]
    """Of each of those, the sectors that arrived, counted from its first."""

    def __str__(self) -> str:
        lines = [f"power failed at tick {self.tick}"]
        for op, part in zip(self.pending, self.parts, strict=True):
            lost = (
                "arrived" if len(part) == op.sectors() else "lost" if not part else f"sectors {_spans(part)}"
            )
            lines.append(f"  {op}: {lost}")
        return "\n".join(lines)


class Timeline:
    """The clock and the record of one run, over all its files.

    Args:
        garbage: discarded ranges may read as anything, as on a block device; else as old or zeroes, as
            of a file with a hole punched into it.
    """

    def __init__(self, *, garbage: bool = True) -> None:
        self.now = 0
        self.garbage = garbage
        self.ops: list[Op] = []
        self.marks: set[int] = set()
        self.acks: set[int] = set()
        self.initial: list[bytes] = []
        self.paths: list[str] = []

    def tick(self) -> int:
        """Something happened; return its number."""
        self.now += 1
        return self.now

    def mark(self) -> int:
        """Like ``tick``, for what widens the set of permitted outcomes: a guest's request begins.

        Exhaustive search looks at the moment just before.
        """
        tick = self.tick()
        self.marks.add(tick)
        return tick

    def ack(self) -> int:
        """Like ``tick``, for what narrows the set of permitted outcomes: a guest learns of a result."""
        tick = self.tick()
        self.acks.add(tick)
        return tick

    @property
    def syncs(self) -> list[Op]:
        """Every sync, in the order in which they began."""
        return [op for op in self.ops if op.kind == "sync"]

    # -- crash states --------------------------------------------------------------------------

    def states(
        self,
        *,
        exhaustive: bool = False,
        random: int = 0,
        seed: int = 0,
        dropped: Collection[int] = (),
        window: tuple[int, int] = (0, NEVER),
        tear: int = 3,
        limit: int = 1 << 16,
    ) -> Iterator[CrashState]:
        """Crash states of the run so far: all, or ``random`` many.

        Args:
            exhaustive: every subset at every point. Each operation is cut into at most ``tear`` parts
                then: its first sector, its last, what is between; more if ``tear`` is more.
            random: how many states to draw; operations are then torn at any sectors.
            seed: of the draw.
            dropped: syncs (counted as in ``syncs``) that are taken to have done nothing. A run does
                not see what its syncs do, so one recording serves for every mutation.
            window: random states are of ticks from the one to the other.
            limit: an exhaustive search of more states at one point is refused: it would never end.
        """
        assert exhaustive != bool(random)
        durable = self._durable(dropped)
        if exhaustive:
            yield from self._every(durable, tear, limit)
        else:
            yield from self._some(durable, random, random_module.Random(seed), window)

    def _durable(self, dropped: Collection[int]) -> list[int]:
        """By operation: the tick from which it is certain."""
        syncs = [s for i, s in enumerate(self.syncs) if i not in dropped]
        certain = [NEVER] * len(self.ops)
        for file in range(len(self.initial)):
            mine = sorted((s for s in syncs if s.file == file), key=lambda s: s.begun)
            # From the last sync to the first: the earliest end among those that begin later.
            soonest = NEVER
            order = sorted(
                (i for i, op in enumerate(self.ops) if op.file == file and op.kind != "sync"),
                key=lambda i: self.ops[i].ended,
                reverse=True,
            )
            for index in order:
                while mine and mine[-1].begun > self.ops[index].ended:
                    soonest = min(soonest, mine.pop().ended)
                certain[index] = soonest
        return certain

    def _walk(self, points: Iterable[int], durable: list[int]) -> Iterator[tuple[int, list[Base], list[Op]]]:
        """By ascending point: the bases as of then, and what is pending, in order of taking effect."""
        bases = [Base(data, garbage=self.garbage) for data in self.initial]
        waiting = [(op, when) for op, when in zip(self.ops, durable, strict=True) if op.kind != "sync"]
        for point in points:
            settled = [op for op, when in waiting if when <= point]
            waiting = [(op, when) for op, when in waiting if when > point]
            for op in sorted(settled, key=lambda op: op.ended):
                bases[op.file].apply(op)
            pending = [op for op, _ in waiting if op.begun <= point]
            yield point, bases, sorted(pending, key=lambda op: (op.ended, op.begun))

    def _every(self, durable: list[int], tear: int, limit: int) -> Iterator[CrashState]:
        points = self._points(durable)
        narrowing = {*durable, *self.acks}
        seen: set[int] = set()
        before = -1
        for point, bases, pending in self._walk(points, durable):
            cuts = [_parts(op, tear) for op in pending]
            count = 1
            for parts in cuts:
                count *= 1 << len(parts)
            if count > limit:
                raise ValueError(f"{count} states at tick {point}: {[str(op) for op in pending]}")
            # Without anything of an operation that is new here, a state was had at the point before,
            # where less was permitted; unless something became certain or was promised in between.
            new = [id(op) not in seen for op in pending]
            fresh = before < 0 or any(before < tick <= point for tick in narrowing)
            seen.update(id(op) for op in pending)
            before = point
            for choice in product(*(product((0, 1), repeat=len(parts)) for parts in cuts)):
                if not fresh and not any(any(c) for c, is_new in zip(choice, new, strict=True) if is_new):
                    continue
                chosen = [
                    tuple(n for part, taken in zip(parts, c, strict=True) if taken for n in part)
                    for parts, c in zip(cuts, choice, strict=True)
                ]
                yield self._state(point, bases, pending, chosen, None)

    def _points(self, durable: list[int]) -> list[int]:
        """Between these more and more may be lost while the same is permitted: the last moment of each
        stretch has all the states of the stretch."""
        ends = {*durable, *self.marks} - {NEVER}
        return sorted({end - 1 for end in ends} | {self.now})

    def _some(
        self, durable: list[int], count: int, rng: random_module.Random, window: tuple[int, int]
    ) -> Iterator[CrashState]:
        first, last = max(window[0], 0), min(window[1], self.now)
        telling = [point for point in self._points(durable) if first <= point <= last] or [last]
        points = sorted(rng.choice(telling) if n % 2 else rng.randint(first, last) for n in range(count))
        for point, bases, pending in self._walk(points, durable):
            yield self._state(point, bases, pending, _draw(pending, rng), rng)

    def _state(
        self,
        point: int,
        bases: list[Base],
        pending: list[Op],
        parts: list[tuple[int, ...]],
        rng: random_module.Random | None,
    ) -> CrashState:
        files = [CrashFile(base, path) for base, path in zip(bases, self.paths, strict=True)]
        for op, part in zip(pending, parts, strict=True):
            _apply(files[op.file], op, part, rng)
        return CrashState(point, files, pending, parts)


def _parts(op: Op, tear: int) -> list[range]:
    """The operation's sectors in at most ``tear`` parts: its ends by themselves, the rest evenly."""
    count = op.sectors()
    if count <= tear:
        return [range(i, i + 1) for i in range(count)]
    if tear < 3:
        cuts = [0, *([1] if tear == 2 else []), count]
    else:
        inner = tear - 2
        cuts = [0, *(1 + (count - 2) * i // inner for i in range(inner)), count - 1, count]
    return [range(a, b) for a, b in pairwise(cuts)]


def _draw(pending: list[Op], rng: random_module.Random) -> list[tuple[int, ...]]:
    """Which sectors arrived, drawn so that the telling cases are frequent."""
    way = rng.randrange(6)
    odd = rng.randrange(len(pending)) if pending else 0
    parts = []
    for index, op in enumerate(pending):
        count = op.sectors()
        if way == 0:  # all but one operation
            share = 0.0 if index == odd else 1.0
        elif way == 1:  # only one operation
            share = 1.0 if index == odd else 0.0
        elif way == 2:  # whole operations
            share = float(rng.random() < 0.5)
        elif way == 3:  # one is torn, the others are whole
            share = rng.random() if index == odd else float(rng.random() < 0.7)
        elif way == 4:  # in order, up to some moment
            share = 1.0 if index < odd else 0.0
        else:  # anything
            share = rng.choice((0.0, 1.0, rng.random()))
        if share in (0.0, 1.0):
            parts.append(tuple(range(count)) if share else ())
        elif rng.random() < 0.5:
            keep = round(share * count)
            parts.append(tuple(range(keep)) if rng.random() < 0.5 else tuple(range(count - keep, count)))
        else:
            parts.append(tuple(n for n in range(count) if rng.random() < share))
    return parts


def _apply(file: CrashFile, op: Op, part: tuple[int, ...], rng: random_module.Random | None) -> None:
    """Let the sectors ``part`` of ``op`` arrive."""
    if op.kind == "truncate":
        if part:
            file.resize(op.offset)
        return
    end = op.offset + op.length
    if op.kind != "discard" and rng is not None and file.size < end and rng.random() < 0.2:
        # The length arrived without the data.
        file.resize(end)
    start = op.offset - op.offset % SECTOR
    for first, stop in runs_of(part):
        low, high = max(op.offset, start + first * SECTOR), min(end, start + stop * SECTOR)
        if op.kind == "write":
            file.put(low, memoryview(op.data)[low - op.offset : high - op.offset])
        elif op.kind == "zero":
            file.put(low, bytes(high - low))
        elif low < file.size:
            high = min(high, file.size)
            content = bytes(high - low)
            if rng is None or rng.random() < 0.5:
                content = file.base.discarded(low, high)
            file.put(low, content)


def _spans(numbers: Sequence[int]) -> str:
    return ",".join(f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in runs_of(numbers))


class PowerCutFile(Unlocked):
    """A HostFile in memory that records on ``timeline`` whatever could be lost.

    Args:
        data: what the file holds, durably, when the record begins.
        rng: how many turns of the event loop each operation takes, before and after its effect; one
            each without it. Concurrent requests interleave differently with every seed. It also decides
        whether ``try_pwrite`` writes at once.
    """

    def __init__(
        self,
        timeline: Timeline,
        data: bytes = b"",
        *,
        path: str = "powercut.qcow2",
        rng: random_module.Random | None = None,
    ) -> None:
        self.timeline = timeline
        self.data = bytearray(data)
        self.path = path
        self.writable = True
        self.closed = False
        self.number = len(timeline.initial)
        timeline.initial.append(bytes(data))
        timeline.paths.append(path)
        self._rng = rng
        self._unsynced = False
        """Something was written since the last sync; without that one does nothing, as of a real file."""
        self._syncing = 0

    @property
    def size(self) -> int:
        return len(self.data)

    async def _turns(self) -> None:
        assert not self.closed
        for _ in range(self._rng.randrange(4) if self._rng else 1):
            await asyncio.sleep(0)

    def _begin(self, kind: Kind, offset: int, length: int, data: bytes) -> Op:
        assert not self.closed
        if not self.writable and kind != "sync":
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        op = Op(self.number, kind, offset, length, data, self.timeline.tick())
        self.timeline.ops.append(op)
        return op

    def _end(self, op: Op) -> None:
        """The effect, as far as whoever reads the file now is concerned."""
        if op.kind == "truncate":
            del self.data[op.offset :]
            self.data.extend(bytes(op.offset - len(self.data)))
        elif op.kind != "sync":
            end = op.offset + op.length
            data = op.data
            if op.kind == "zero":
                data = bytes(op.length)
            elif op.kind == "discard":
                end = max(op.offset, min(end, len(self.data)))
                data = garbage_of(op.offset, end) if self.timeline.garbage else bytes(end - op.offset)
            self.data.extend(bytes(max(0, end - len(self.data))))
            self.data[op.offset : end] = data
        self._unsynced |= op.kind != "sync"
        op.ended = self.timeline.tick()

    async def _do(self, kind: Kind, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        op = self._begin(kind, offset, length, data)
        await self._turns()
        self._end(op)
        await self._turns()

    async def pread(self, offset: int, length: int) -> bytes:
        await self._turns()
        return bytes(self.data[offset : offset + length]).ljust(length, b"\0")

    def try_pread_into(self, view: memoryview, offset: int) -> bool:
        view[:] = bytes(self.data[offset : offset + len(view)]).ljust(len(view), b"\0")
        return True

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        await self._do("write", offset, len(data), bytes(data))

    def try_pwrite(self, offset: int, data: memoryview) -> bool:
        if self._rng is not None and self._rng.random() < 0.5:
            return False
        self._end(self._begin("write", offset, len(data), bytes(data)))
        return True

    async def zero(self, offset: int, length: int, *, punch: bool, fallback: bool = True) -> None:
        await self._do("zero", offset, length)

    async def discard(self, offset: int, length: int) -> None:
        await self._do("discard", offset, length)

    async def truncate(self, size: int) -> None:
        await self._do("truncate", size)

    async def sync(self) -> None:
        if self._unsynced or self._syncing:
            self._unsynced = False
            self._syncing += 1
            await self._do("sync")
            self._syncing -= 1

    def allocated(self) -> int:
        return len(self.data)

    def close(self) -> None:
        self.closed = True
