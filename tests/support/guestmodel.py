"""GuestModel: what a guest did to its disk, and what it may find there after a power failure.

By sectors of 512 bytes: the content at the last flush that was acknowledged, or that which any write
begun since may have given it, sector by sector; a trimmed sector is the old one or zeroes. Bitmaps: a
granule that any request touched must be dirty in every bitmap that claims to be consistent.

    op = model.begin("write", offset, data=data)      # before the request goes to the engine
    ... await image.write(offset, data) ...
    model.end(op)                                     # not called for a request that failed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

from tests.support.powercut import NEVER, SECTOR, Timeline

GuestKind = Literal["write", "zeroes", "trim", "flush"]


@dataclass(slots=True, eq=False)
class GuestOp:
    """One request; ``begun`` and ``ended`` are ticks of the timeline."""

    kind: GuestKind
    offset: int
    length: int
    data: bytes
    fua: bool
    begun: int
    ended: int = NEVER
    """NEVER: not answered, or answered with an error: its effect may come or not."""

    def apply(self, start: int, content: bytes) -> list[bytes]:
        """What ``content``, found at ``start``, may be once this request is done."""
        low = max(start, self.offset) - start
        high = min(start + len(content), self.offset + self.length) - start
        if low >= high:
            return [content]
        new = bytes(high - low)
        if self.kind == "write":
            new = self.data[start + low - self.offset : start + high - self.offset]
        done = content[:low] + new + content[high:]
        return [done, content] if self.kind == "trim" else [done]

    def __str__(self) -> str:
        fua = ", FUA" if self.fua else ""
        return f"{self.kind} @{self.offset:#x}+{self.length:#x}{fua} [{self.begun}, {self.ended}]"


class Runs(Protocol):
    """The part of a DirtyBitmap that is needed here."""

    size: int
    granularity: int

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Consecutive (length in bytes, dirty)."""


@dataclass(slots=True)
class _Stretch:
    """Sectors that the same requests touched."""

    start: int
    end: int
    ops: list[GuestOp] = field(default_factory=list)


class GuestModel:
    """The guest's requests on one disk of ``size`` bytes, on ``timeline``.

    Args:
        initial: the disk's content before the first request: bytes, or a function of offset and length.
    """

    def __init__(
        self,
        timeline: Timeline,
        size: int,
        initial: bytes | Callable[[int, int], bytes] = b"",
    ) -> None:
        self.timeline = timeline
        self.size = size
        if isinstance(initial, bytes):
            whole = initial.ljust(size, b"\0") if len(initial) < size else initial
            self.initial: Callable[[int, int], bytes] = lambda offset, length: whole[offset : offset + length]
        else:
            self.initial = initial
        self.ops: list[GuestOp] = []
        self._permitted: tuple[int, int, list[tuple[int, int, list[bytes]]]] | None = None

    # -- bookkeeping ---------------------------------------------------------------------------

    def begin(
        self,
        kind: GuestKind,
        offset: int = 0,
        length: int = 0,
        *,
        data: bytes = b"",
        fua: bool = False,
    ) -> GuestOp:
        """Record that a request is about to go to the engine."""
        length = len(data) if kind == "write" else length
        assert offset + length <= self.size
        op = GuestOp(kind, offset, length, bytes(data), fua, self.timeline.mark())
        self.ops.append(op)
        return op

    def end(self, op: GuestOp) -> None:
        """Record that the request was answered with success."""
        op.ended = self.timeline.ack()

    # -- content -------------------------------------------------------------------------------

    def durable(self, op: GuestOp, tick: int) -> bool:
        """Whether the guest knows by ``tick`` that ``op`` is on stable storage."""
        if op.ended > tick:
            return False
        return op.fua or any(
            flush.kind == "flush" and flush.begun > op.ended and flush.ended <= tick for flush in self.ops
        )

    def _stretches(self, tick: int) -> list[_Stretch]:
        """The touched part of the disk, cut wherever a request begins or ends."""
        ops = [op for op in self.ops if op.length and op.begun <= tick]
        edges = {op.offset // SECTOR * SECTOR for op in ops}
        edges |= {min(self.size, -(-(op.offset + op.length) // SECTOR) * SECTOR) for op in ops}
        # The sectors that a request covers in part stand alone.
        for op in ops:
            for edge in (op.offset, op.offset + op.length):
                if edge % SECTOR:
                    low = edge // SECTOR * SECTOR
                    edges |= {low, min(self.size, low + SECTOR)}
        marks = sorted(edges)
        found = [_Stretch(a, b) for a, b in pairwise(marks)]
        for stretch in found:
            stretch.ops = [
                op for op in ops if op.offset < stretch.end and stretch.start < op.offset + op.length
            ]
        return [stretch for stretch in found if stretch.ops]

    def permitted(self, tick: int) -> list[tuple[int, int, list[bytes]]]:
        """(start, end, contents): each sector in there must equal the same sector of one of the contents."""
        key = (tick, len(self.ops))
        if self._permitted is None or self._permitted[:2] != key:
            found = [(s.start, s.end, self._contents(s, tick)) for s in self._stretches(tick)]
            self._permitted = (*key, found)
        return self._permitted[2]

    def _contents(self, stretch: _Stretch, tick: int) -> list[bytes]:
        start = stretch.start
        contents = [self.initial(start, stretch.end - start)]
        earlier: list[GuestOp] = []
        for op in sorted(stretch.ops, key=lambda op: op.begun):
            before, contents = contents, _each(op, start, contents)
            if not self.durable(op, tick):
                contents += before
            # What it overlapped in time may have come after it nevertheless, in any order.
            together = [other for other in earlier if other.ended > op.begun]
            contents = list(dict.fromkeys(contents))
            for content in contents:  # which grows meanwhile
                new = (after for other in together for after in other.apply(start, content))
                contents += [after for after in dict.fromkeys(new) if after not in contents]
            earlier.append(op)
        return contents

    def content_violations(self, tick: int, read: Callable[[int, int], bytes]) -> list[str]:
        """What is wrong with the disk found after a power failure at ``tick``; empty if nothing."""
        problems = []
        at = 0
        for start, end, contents in self.permitted(tick):
            problems += self._untouched(at, start, read)
            found = read(start, end - start)
            at = end
            if found in contents:
                continue
            bad = [
                low
                for low in range(0, end - start, SECTOR)
                if not any(found[low : low + SECTOR] == c[low : low + SECTOR] for c in contents)
            ]
            if bad:
                problems.append(
                    f"sector at {start + bad[0]:#x} (of {len(bad)} bad ones there) is "
                    f"{found[bad[0] : bad[0] + 16].hex()}..., permitted are "
                    + " or ".join(sorted({c[bad[0] : bad[0] + 16].hex() + "..." for c in contents}))
                    + "; "
                    + "; ".join(str(op) for op in self.ops if op.begun <= tick)[:2000]
                )
        return problems + self._untouched(at, self.size, read)

    def _untouched(self, start: int, end: int, read: Callable[[int, int], bytes]) -> list[str]:
        """The part of the disk that no request touched must be as it was."""
        step = 1 << 20
        for low in range(start, end, step):
            length = min(step, end - low)
            found, expected = read(low, length), self.initial(low, length)
            if found != expected:
                first = next(i for i in range(length) if found[i] != expected[i])
                return [f"byte {low + first:#x} was never written to and changed"]
        return []

    # -- bitmaps -------------------------------------------------------------------------------

    def touched(self, tick: int, since: int = 0) -> list[tuple[int, int]]:
        """Ranges (start, end), ascending and merged, that requests begun in (since, tick] cover."""
        ranges = sorted(
            (op.offset, op.offset + op.length) for op in self.ops if op.length and since < op.begun <= tick
        )
        merged: list[tuple[int, int]] = []
        for start, end in ranges:
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((start, end))
        return merged

    def false_clean(self, tick: int, bitmap: Runs, since: int = 0) -> list[int]:
        """Offsets of granules that requests touched since ``since`` but that ``bitmap`` calls clean.

        For every bitmap that claims consistency in the state of ``tick`` this must be empty.
        """
        missed: set[int] = set()
        for start, end in self.touched(tick, since):
            at = start
            for length, dirty in bitmap.runs(start, end - start):
                if not dirty:
                    first, last = at // bitmap.granularity, -(-(at + length) // bitmap.granularity)
                    missed.update(range(first, last))
                at += length
            assert at == end
        return [index * bitmap.granularity for index in sorted(missed)]

    def expected_dirty(self, tick: int, granularity: int, since: int = 0) -> set[int]:
        """Numbers of the granules that requests touched: what a clean close has to leave, exactly."""
        return {
            index
            for start, end in self.touched(tick, since)
            for index in range(start // granularity, -(-end // granularity))
        }


def _each(op: GuestOp, start: int, contents: Iterable[bytes]) -> list[bytes]:
    return [after for content in contents for after in op.apply(start, content)]
