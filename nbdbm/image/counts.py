"""Counts: one number per host cluster, compactly; nearly all of them are 0 or 1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nbdbm.qcow2.refcount import unpack_counts

TOP = 255
"""A byte of ``low`` with this value stands for 255 and what ``more`` adds to it."""
_UP = bytes((*range(1, 256), 0))
"""Translation table: every count but the top one, plus one."""
CHUNK = 1 << 16
"""Clusters that are compared at a time."""


class Counts:
    """A count for each of ``len(self)`` clusters: one byte each, and a dictionary for the rare large ones.

    ``low`` may be read directly where only "is it n", with n below 255, is asked.
    """

    __slots__ = ("low", "more")

    def __init__(self, clusters: int) -> None:
        self.low = bytearray(clusters)
        self.more: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.low)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Counts):
            return NotImplemented
        return self.low == other.low and self.more == other.more

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, cluster: int) -> int:
        value = self.low[cluster]
        return value if value < TOP else TOP + self.more.get(cluster, 0)

    def __setitem__(self, cluster: int, value: int) -> None:
        self.low[cluster] = min(value, TOP)
        if value > TOP:
            self.more[cluster] = value - TOP
        else:
            self.more.pop(cluster, None)

    def add(self, clusters: Iterable[int]) -> None:
        """Count each of ``clusters`` once more; a cluster may come up several times."""
        low = self.low
        for cluster in clusters:
            try:
                low[cluster] += 1
            except ValueError:
                self.more[cluster] = self.more.get(cluster, 0) + 1

    def add_run(self, first: int, end: int) -> None:
        """Count the clusters from ``first`` up to, not including, ``end`` once more."""
        run = self.low[first:end]
        if TOP in run:
            self.add(range(first, end))
        else:
            self.low[first:end] = run.translate(_UP)

    def load(self, first: int, block: bytes, order: int) -> None:
        """Take the counts from ``first`` on from (a part of) a refcount block, up to the last cluster."""
        count = min((len(block) * 8) >> order, len(self.low) - first)
        if count <= 0:
            return
        if order == 3:
            self.low[first : first + count] = block[:count]
            return
        if order > 3:
            width = 1 << (order - 3)
            # All bytes but the last of each count: the strips compare at C speed.
            if not any(any(block[at::width]) for at in range(width - 1)):
                self.low[first : first + count] = block[width - 1 :: width][:count]
                return
        for cluster, value in enumerate(unpack_counts(block, order)[:count], first):
            if value:
                self[cluster] = value

    def slice(self, first: int, end: int) -> list[int]:
        """The counts from ``first`` up to ``end``, zeroes past the last cluster."""
        values = list(self.low[first:end])
        values += [0] * (end - first - len(values))
        if TOP in values:
            values = [v if v < TOP else self[first + at] for at, v in enumerate(values)]
        return values

    def grow(self, clusters: int) -> None:
        """Make room for ``clusters``; new ones count 0."""
        if clusters > len(self.low):
            self.low.extend(bytes(clusters - len(self.low)))

    def end(self) -> int:
        """One more than the last cluster whose count is not 0; 0 if there is none."""
        at = len(self.low)
        while at > 0:
            kept = self.low[max(0, at - CHUNK) : at].rstrip(b"\0")
            if kept:
                return max(0, at - CHUNK) + len(kept)
            at -= CHUNK
        return 0

    def differences(self, other: Counts) -> Iterator[int]:
        """The clusters whose counts differ, ascending; both have the same length."""
        assert len(self.low) == len(other.low)
        for start in range(0, len(self.low), CHUNK):
            mine, theirs = self.low[start : start + CHUNK], other.low[start : start + CHUNK]
            if mine == theirs and TOP not in mine:
                continue
            for cluster, (a, b) in enumerate(zip(mine, theirs, strict=True), start):
                if a != b or (a == TOP and self.more.get(cluster, 0) != other.more.get(cluster, 0)):
                    yield cluster
