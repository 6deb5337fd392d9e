"""Whether a range of a file is in the page cache, asked of the kernel (cachestat(2), Linux 6.5)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

CACHESTAT = 451
"""Number of the system call, the same on every architecture."""

PAGE = os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _cachestat() -> Callable[[int, int, int], tuple[int, int]]:
    """(fd, offset, length) -> pages of the range that are cached, and those of them that are not on the disk
    yet; (-1, 0) where the kernel cannot say."""
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).syscall
    words = ctypes.c_uint64 * 5
    range_, found = (ctypes.c_uint64 * 2)(), words()
    here, there = ctypes.byref(range_), ctypes.byref(found)
    number, flags = ctypes.c_long(CACHESTAT), ctypes.c_uint(0)

    def cachestat(fd: int, offset: int, length: int) -> tuple[int, int]:
        range_[0], range_[1] = offset, length
        if call(number, ctypes.c_int(fd), here, there, flags):
            return -1, 0
        return found[0], found[1] + found[2]

    return cachestat


def cached(fd: int, offset: int, length: int) -> bool:
    """Whether all of the range is in the page cache now; False also where the kernel cannot say.

    For the event loop's thread only. A page that is being read counts, and may be dropped again at once: who
    relies on the answer may wait for the disk, rarely and for short.
    """
    first, last = offset // PAGE, (offset + length - 1) // PAGE
    return _cachestat()(fd, offset, length)[0] > last - first


def page(fd: int, offset: int) -> tuple[bool, bool]:
    """Whether the page at ``offset`` is in the page cache, and whether it is not on the disk yet.

    For the event loop's thread only. Where the kernel cannot say, it is not cached.
    """
    there, dirty = _cachestat()(fd, offset, 1)
    return there > 0, dirty > 0


def supported() -> bool:
    """Whether the kernel has the call."""
    fd = os.memfd_create("nbdbm", os.MFD_CLOEXEC)
    try:
        return _cachestat()(fd, 0, 1)[0] >= 0
    finally:
        os.close(fd)
