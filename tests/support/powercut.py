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
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Literal

SECTOR = 512
"""Bytes; a disk writes one whole or not at all."""
NEVER = 1 << 62
"""The tick of what did not happen."""
GARBAGE = bytes(range(0x80, 0x100)) * (SECTOR // 128)
"""What a discarded sector may read as: nothing that any run writes."""

Kind = Literal["write", "zero", "discard", "truncate", "sync"]


@dataclass(slots=True)
class Op:
    """One operation on one file; ``begun`` and ``ended`` are ticks."""

    file: int
    kind: Kind
    offset: int
    """For a truncate: the new size."""
    length: int
    data: bytes
    begun: int
    ended: int = NEVER

    def sectors(self) -> int:
        """How many sectors it touches; a truncate counts as one."""
        if not self.length:
            return int(self.kind == "truncate")
        return (self.offset + self.length - 1) // SECTOR - self.offset // SECTOR + 1

    def __str__(self) -> str:
        return f"{self.kind} file {self.file} @{self.offset:#x}+{self.length:#x} [{self.begun}, {self.ended}]"


class _Unlocked:
    """What a HostFile has beyond a BlockFile, for files that nobody else can see."""

    path: str

    @property
    def identity(self) -> tuple[int, int]:
        return (0, id(self))

    def real_path(self) -> str:
        return os.path.realpath(self.path)

    def lock(self, *, writable: bool, force_share: bool) -> str | None:
        return None


class CrashFile(_Unlocked):
    """A HostFile: a shared base and the sectors that differ from it. Writing changes only this one."""

    def __init__(self, base: Base, path: str) -> None:
        self.base = base
        self.path = path
        self.writable = True
        self.size = len(base.data)
        self.closed = False
        self.sectors: dict[int, bytes] = {}
        """By number; in full, zeroes past the end of the file."""
        self._cut = self.size
        """The base counts only up to here: what was cut off does not come back."""

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes; past the end they are zeroes."""
        stop = min(offset + length, self._cut)
        buf = bytearray(self.base.data[offset:stop] if stop > offset else b"")
        buf.extend(bytes(length - len(buf)))
        first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
        numbers: Iterable[int] = range(first, last)
        if len(self.sectors) < last - first:
            numbers = (n for n in self.sectors if first <= n < last)
        for number in numbers:
            content = self.sectors.get(number)
            if content is not None:
                at = number * SECTOR - offset
                skip = max(0, -at)
                content = content[skip : length - at]
                buf[at + skip : at + skip + len(content)] = content
        return bytes(buf)

    def put(self, offset: int, data: bytes | memoryview) -> None:
        """Overwrite, extending the file."""
        end = offset + len(data)
        at = offset
        while at < end:
            number, skip = divmod(at, SECTOR)
            piece = bytes(data[at - offset : at - offset + SECTOR - skip])
            if len(piece) < SECTOR:
                old = self.read(number * SECTOR, SECTOR)
                piece_end = skip + len(piece)
                self.sectors[number] = old[:skip] + piece + old[piece_end:]
                at += piece_end - skip
            else:
                self.sectors[number] = piece
                at += SECTOR
        self.size = max(self.size, end)

    def resize(self, size: int) -> None:
        """Set the length; what is cut off reads as zeroes should the file grow again."""
        if size < self.size:
            partial = size % SECTOR
            kept = self.read(size - partial, partial) if partial else b""
            self._cut = min(self._cut, size)
            for number in [n for n in self.sectors if n * SECTOR >= size - partial]:
                del self.sectors[number]
            if partial:
                self.sectors[size // SECTOR] = kept + bytes(SECTOR - partial)
        self.size = size

    @property
    def visible(self) -> int:
        """How many bytes of the base count."""
        return self._cut

    def to_bytes(self) -> bytes:
        """The whole file, copied."""
        return self.read(0, self.size)

    # -- BlockFile -----------------------------------------------------------------------------

    async def _turn(self) -> None:
        assert not self.closed
        await asyncio.sleep(0)

    async def pread(self, offset: int, length: int) -> bytes:
        await self._turn()
        return self.read(offset, length)

    async def pread_into(self, view: memoryview, offset: int) -> None:
        view[:] = await self.pread(offset, len(view))

    def try_pread_into(self, view: memoryview, offset: int) -> bool:
        view[:] = self.read(offset, len(view))
        return True

    async def data_runs(self, offset: int, length: int, limit: int) -> list[tuple[bool, int]]:
        return _data_runs(self.size, offset, length, limit)

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        await self._turn()
        self.put(offset, memoryview(data))

    def try_pwrite(self, offset: int, data: memoryview) -> bool:
        self.put(offset, data)
        return True

    async def zero(self, offset: int, length: int, *, punch: bool, fallback: bool = True) -> None:
        await self._turn()
        self.put(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        await self._turn()
        self.put(offset, self.base.discarded(offset, min(offset + length, self.size)))

    async def truncate(self, size: int) -> None:
        await self._turn()
        self.resize(size)

    async def sync(self) -> None:
        await self._turn()

    def allocated(self) -> int:
        return self.size

    def close(self) -> None:
        self.closed = True


class Base:
    """What is certain of one file by now. ``changes`` logs the ranges in which it was ever changed."""

    def __init__(self, data: bytes, *, garbage: bool) -> None:
        self.data = bytearray(data)
        self.changes: list[tuple[int, int]] = []
        self.garbage = garbage

    def discarded(self, offset: int, end: int) -> bytes:
        """The worst that a discarded range may read as."""
        return _garbage(offset, end) if self.garbage else bytes(max(0, end - offset))

    def apply(self, op: Op) -> None:
        """Let ``op`` take place in full."""
        if op.kind == "truncate":
            old = len(self.data)
            del self.data[op.offset :]
            self.data.extend(bytes(op.offset - len(self.data)))
            low, high = sorted((old, op.offset))
            self.changes.append((low, high - low))
            return
        end = op.offset + op.length
        data = op.data
        if op.kind == "zero":
            data = bytes(op.length)
        elif op.kind == "discard":
            end = max(op.offset, min(end, len(self.data)))
            data = self.discarded(op.offset, end)
        self.data.extend(bytes(max(0, end - len(self.data))))
        self.data[op.offset : end] = data
        self.changes.append((op.offset, op.length))


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
            limit: an exhaustive search of more states at one point is refused: it would never end.
        """
        assert exhaustive != bool(random)
        durable = self._durable(dropped)
        if exhaustive:
            yield from self._every(durable, tear, limit)
        else:
            yield from self._some(durable, random, random_module.Random(seed))

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

    def _some(self, durable: list[int], count: int, rng: random_module.Random) -> Iterator[CrashState]:
        telling = self._points(durable)
        points = sorted(rng.choice(telling) if n % 2 else rng.randint(0, self.now) for n in range(count))
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
    for first, stop in _runs(part):
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


def _garbage(offset: int, end: int) -> bytes:
    return (GARBAGE * (max(0, end - offset) // SECTOR + 2))[offset % SECTOR :][: max(0, end - offset)]


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as half-open runs."""
    at = 0
    while at < len(numbers):
        stop = at + 1
        while stop < len(numbers) and numbers[stop] == numbers[stop - 1] + 1:
            stop += 1
        yield numbers[at], numbers[stop - 1] + 1
        at = stop


def _data_runs(size: int, offset: int, length: int, limit: int) -> list[tuple[bool, int]]:
    """As of a host that cannot tell: all is data up to the end of the file."""
    data = max(0, min(length, size - offset))
    runs = [(True, data), (False, length - data)]
    return [run for run in runs if run[1]][:limit]


def _spans(numbers: Sequence[int]) -> str:
    return ",".join(f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in _runs(numbers))


class PowerCutFile(_Unlocked):
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
                data = _garbage(op.offset, end) if self.timeline.garbage else bytes(end - op.offset)
            self.data.extend(bytes(max(0, end - len(self.data))))
            self.data[op.offset : end] = data
        op.ended = self.timeline.tick()

    async def _do(self, kind: Kind, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        op = self._begin(kind, offset, length, data)
        await self._turns()
        self._end(op)
        await self._turns()

    async def pread(self, offset: int, length: int) -> bytes:
        await self._turns()
        return bytes(self.data[offset : offset + length]).ljust(length, b"\0")

    async def pread_into(self, view: memoryview, offset: int) -> None:
        view[:] = await self.pread(offset, len(view))

    def try_pread_into(self, view: memoryview, offset: int) -> bool:
        view[:] = bytes(self.data[offset : offset + len(view)]).ljust(len(view), b"\0")
        return True

    async def data_runs(self, offset: int, length: int, limit: int) -> list[tuple[bool, int]]:
        return _data_runs(self.size, offset, length, limit)

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
        await self._do("sync")

    def allocated(self) -> int:
        return len(self.data)

    def close(self) -> None:
        self.closed = True


@dataclass
class Scratch:
    """A real file that takes on one crash state after the other, for outside judges.

    Only what differs from the state before is written.
    """

    path: Path
    _base: Base | None = None
    _changes: int = 0
    """How many of the base's changes the file has."""
    _odd: set[int] = field(default_factory=set)
    """Sectors in which the file is not the base."""

    def show(self, state: CrashFile) -> Path:
        """Make the file equal to ``state`` as it is now, later writes to it included; return its path."""
        stale: set[int] = set(self._odd)
        if self._base is not state.base:
            self.path.write_bytes(state.base.data)
            self._base, stale = state.base, set()
            self._changes = len(state.base.changes)
        for offset, length in state.base.changes[self._changes :]:
            stale.update(range(offset // SECTOR, -(-(offset + length) // SECTOR)))
        self._changes = len(state.base.changes)
        stale.update(state.sectors)
        with self.path.open("r+b") as file:
            file.truncate(min(os.path.getsize(self.path), state.visible))
            file.truncate(state.size)
            for first, stop in _runs(sorted(stale)):
                low, high = first * SECTOR, min(stop * SECTOR, state.size)
                if low < high:
                    file.seek(low)
                    file.write(state.read(low, high - low))
        # What a cut hid of the base must come back should the next state not have it.
        hidden = range(state.visible // SECTOR, -(-len(state.base.data) // SECTOR))
        self._odd = set(state.sectors) | set(hidden)
        return self.path
