"""Whether a range of a file is in the page cache, asked of the kernel (cachestat(2), Linux 6.5)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

CACHESTAT = 451
"""Number of the system call, the same on every architecture."""

PAGE = os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _cachestat() -> Callable[[int, int, int], int]:
    """(fd, offset, length) -> pages of the range that are cached, or less than 0."""
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).syscall
    words = ctypes.c_uint64 * 5
    range_, found = (ctypes.c_uint64 * 2)(), words()
    here, there = ctypes.byref(range_), ctypes.byref(found)
    number, flags = ctypes.c_long(CACHESTAT), ctypes.c_uint(0)

    def cachestat(fd: int, offset: int, length: int) -> int:
        range_[0], range_[1] = offset, length
        if call(number, ctypes.c_int(fd), here, there, flags):
            return -1
        return int(found[0])

    return cachestat


def cached(fd: int, offset: int, length: int) -> bool:
    """Whether all of the range is in the page cache now; False also where the kernel cannot say.

    For the event loop's thread only. A page that is being read counts, and may be dropped again at once: who
    relies on the answer may wait for the disk, rarely and for short.
    """
    first, last = offset // PAGE, (offset + length - 1) // PAGE
    return _cachestat()(fd, offset, length) > last - first


def supported() -> bool:
    """Whether the kernel has the call."""
    fd = os.memfd_create("nbdbm", os.MFD_CLOEXEC)
    try:
        return _cachestat()(fd, 0, 1) >= 0
    finally:
        os.close(fd)
