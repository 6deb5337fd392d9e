"""Small writes in place where the page cache is made of large folios.

A file that was read or written in sequence lies in the page cache in folios of up to 2 MiB. ext4 keeps a
list of the blocks of each, and goes over all of it for every write, whatever its length: 4 KiB take 10 to 45
us instead of 1.6 (Linux 6.18). A clean folio of which a part is said not to be needed soon (MADV_COLD) is
split into pages by the kernel, in 140 us; its data stays in the cache. So where small writes are slow, the
folios of a region are split before the first write to it makes them dirty:

    small writes are     fast: every 16th is measured     slow: each of them
    before one           -                                the region's clean folios are split, once

That is advice and nothing else: no byte depends on it, and where the kernel will not, writes are as slow as
they were. Reads of 1 MiB from pages take a fifth more time than from large folios.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from time import perf_counter_ns

from nbdbm.image.pagecache import PAGE, page

SMALL = 32 * 1024
"""Bytes; beside writing more than these the folio costs little."""

SLOW = 6_000
"""Nanoseconds; two small writes in turn that take longer are slow. One alone may have lost the processor."""

ATTENTION = 4096
"""Small writes for which that is remembered. Not all are slow: some meet in a region that was split."""

FIRST = 64
"""Small writes that are measured at the beginning."""

EVERY = 16
"""Of this many small writes one is measured while they are fast."""

REGION = 2 * 1024 * 1024
"""Bytes of the largest folio. They are aligned to their size."""

PIECE = 128 * 1024
"""Bytes of the smallest folio that is worth splitting."""

CREDIT = 4096
"""Regions that may be split at once. Beyond these there is one more for every PRICE small writes, so that
splitting takes little of the time even where hardly two writes meet in one region."""

PRICE = 16
NEVER = -(1 << 62)
"""No credit, and so much less that writes do not earn any."""

MOST_KNOWN = 65536
"""Regions that are remembered."""

MADV_COLD, MADV_POPULATE_READ = 20, 22
"""Linux 5.4 and 5.14; not in the standard library."""


def split(fd: int, start: int, length: int) -> bool:
    """Split those folios of a region that are known to be cached and clean; False: others are dirty.

    For the event loop's thread only. ``start`` is a multiple of PIECE, ``length`` one of the page.

    Raises:
        OSError, ValueError: the kernel does not know how, or the file is no longer that long.
    """
    clean = True
    # The mapping has a descriptor of its own until it is closed. The image locks stay: they belong to
    # what both share, and do not end with any one of them.
    with mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=start) as region:
        for at in range(0, length, PIECE):
            cached, dirty = page(fd, start + at)
            clean &= not dirty
            if cached and not dirty:
                # Mapped alone, one page is a part of its folio, and advice about it splits that. Nothing is
                # touched through the mapping: a file that is cut meanwhile is an error here and no signal.
                region.madvise(MADV_POPULATE_READ, at, PAGE)
                region.madvise(MADV_COLD, at, PAGE)
    return clean


class Folios:
    """What is known of the folios of one file, which is open for writing.

    Around each write of at most SMALL bytes::

        folios.countdown -= 1
        if folios.countdown <= 0:
            folios.before(fd, offset, size)
        write
        if folios.countdown <= 0:
            folios.after()

    Args:
        split: see there.
        clock: in nanoseconds.
    """

    __slots__ = (
        "_attention",
        "_began",
        "_clock",
        "_credit",
        "_first",
        "_known",
        "_slow",
        "_split",
        "_stale",
        "countdown",
    )

    def __init__(
        self,
        *,
        split: Callable[[int, int, int], bool] = split,
        clock: Callable[[], int] = perf_counter_ns,
    ) -> None:
        self.countdown = 1
        """Small writes up to the next one that is of interest."""
        self._split = split
        self._clock = clock
        self._began = 0
        self._first = FIRST
        """Of these, how many are left."""
        self._slow = False
        """The last one was."""
        self._attention = 0
        """Small writes up to when it is forgotten that they are slow."""
        self._credit = CREDIT * PRICE
        self._known: set[int] = set()
        """Regions, by number, that have been split as far as they can be."""
        self._stale = False
        """Some of these had folios that were dirty."""

    def before(self, fd: int, offset: int, size: int) -> None:
        """A small write at ``offset`` of a file of ``size`` bytes is about to begin."""
        if self._attention and self._credit >= PRICE and offset // REGION not in self._known:
            self._begin_region(fd, offset & -REGION, size)
        self._began = self._clock()

    def _begin_region(self, fd: int, start: int, size: int) -> None:
        self._credit -= PRICE
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known.add(start // REGION)
        length = min(REGION, size - start) & -PAGE
        if length <= 0:
            return
        try:
            self._stale |= not self._split(fd, start, length)
        except (OSError, ValueError):
            self._credit = NEVER

    def after(self) -> None:
        """It has ended."""
        slow = self._clock() - self._began > SLOW
        if slow and self._slow:
            self._attention = ATTENTION
        elif self._attention:
            self._attention -= 1
        self._slow = slow
        self._first -= 1
        self.countdown = passed = 1 if slow or self._attention or self._first > 0 else EVERY
        self._credit = min(self._credit + passed, CREDIT * PRICE)

    def synced(self) -> None:
        """What was dirty is clean."""
        if self._stale:
            self._stale = False
            self._known.clear()
