"""Which host clusters hold metadata: whatever an entry or a refcount says, the guest's data never goes there.

The tables of a broken image may lead a guest's write to the L1 table, or call the refcount table free. Asked
before every write in place and every allocation, so most of it is one set; what an image may hold millions
of, and long ranges, are kept compactly beside it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterable
from itertools import chain

FEW = 1 << 18
"""Clusters that are kept in a set, 70 bytes each: with 64 KiB clusters, the L2 tables of 128 TiB."""

SHORT = 64
"""Clusters of a range that are put into the set one by one."""


class Occupied:
    """Clusters by number, counted from the start of the file; ranges are half-open."""

    __slots__ = ("_ends", "_many", "_ranges", "_starts", "crowded", "single")

    def __init__(self) -> None:
        self.single: set[int] = set()
        """For a quick look: ``hit`` for one cluster, unless ``crowded``."""
        self.crowded = False
        """Whether there is more than ``single``."""
        self._ranges: dict[int, int] = {}
        """What ``protect`` was told: first -> end."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        """The long ranges, ascending, those that touch as one."""
        self._many = array("Q")
        """Single clusters that are too many for the set, ascending."""

    def hit(self, first: int, end: int) -> bool:
        """Whether one of the clusters holds metadata."""
        if end - first == 1:
            if first in self.single:
                return True
        elif end - first > len(self.single):
            if any(first <= cluster < end for cluster in self.single):
                return True
        elif not self.single.isdisjoint(range(first, end)):
            return True
        if not self.crowded:
            return False
        at = bisect_left(self._many, first)
        if at < len(self._many) and self._many[at] < end:
            return True
        at = bisect_right(self._starts, end - 1)
        return at > 0 and self._ends[at - 1] > first

    def among(self, clusters: Collection[int]) -> set[int]:
        """Those of the clusters that hold metadata."""
        found = self.single.intersection(clusters)
        if self.crowded:
            found |= {cluster for cluster in clusters if self.hit(cluster, cluster + 1)}
        return found

    def add(self, clusters: Collection[int]) -> None:
        """These hold metadata, each by itself."""
        if len(self.single) + len(clusters) <= FEW:
            self.single.update(clusters)
        elif len(clusters) < SHORT:
            for cluster in clusters:
                insort(self._many, cluster)
        else:
            self._many = array("Q", sorted(chain(clusters, self._many)))
        self.crowded = bool(self._starts or self._many)

    def discard(self, clusters: Iterable[int]) -> None:
        """These, which ``add`` was told of, do not any more."""
        for cluster in clusters:
            self.single.discard(cluster)
            at = bisect_left(self._many, cluster)
            if at < len(self._many) and self._many[at] == cluster:
                del self._many[at]

    def protect(self, *ranges: tuple[int, int]) -> None:
        """Each range (first, end) holds one piece of metadata."""
        for first, end in ranges:
            self._ranges[first] = max(end, self._ranges.get(first, first))
            if end - first <= SHORT:
                self.single.update(range(first, end))
        self._sort()

    def unprotect(self, first: int) -> None:
        """The range that ``protect`` was told to begin here does not any more."""
        end = self._ranges.pop(first, first)
        if end - first <= SHORT:
            self.single.difference_update(range(first, end))
        else:
            self._sort()

    def _sort(self) -> None:
        self._starts, self._ends = [], []
        for first, end in sorted(r for r in self._ranges.items() if r[1] - r[0] > SHORT):
            if self._ends and first <= self._ends[-1]:
                self._ends[-1] = max(end, self._ends[-1])
            else:
                self._starts.append(first)
                self._ends.append(end)
        self.crowded = bool(self._starts or self._many)
