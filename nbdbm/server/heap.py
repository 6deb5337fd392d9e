"""What becomes of memory that is freed: a part of it is kept, since every page taken anew is a fault."""

from __future__ import annotations

KEEP = 32 * 1024 * 1024
"""Bytes at the heap's end that are not given back to the system. By default all but 128 KiB are, so that
what a write's payload or a decompressor takes is mapped and zeroed anew each time: of 1 MiB read from zstd
clusters, or written to new ones, this was the half."""

LARGE = 16 * 1024 * 1024
"""Bytes from which on a buffer is mapped by itself and returned at once."""

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Set up the allocator of the whole process; nothing happens where the C library has no mallopt(3)."""
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_TRIM_THRESHOLD, KEEP)
    mallopt(_M_MMAP_THRESHOLD, LARGE)
