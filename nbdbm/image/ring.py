"""Data that misses the page cache, fetched by the kernel, which says when it has come (io_uring, Linux 6.1).

    fetch, fetch, fetch | one call for all of them | the disk works | eventfd | one call | told, told, told

No thread waits, so nobody has to be woken for a result and no one else wants the interpreter. What is read
here is thrown away: whoever is told reads from the page cache then, as if he asked for the first time. So
nothing that may change meanwhile (where a cluster lies, whose buffer it is) has to be kept until the disk has
answered, and what is told is a hint, right or wrong. Where the kernel does not let us (older ones, containers
that forbid it) ``Ring.of`` says so, and threads do the work (readahead.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import mmap
import os
import struct
from collections.abc import Callable
from typing import Any, ClassVar

SETUP, ENTER, REGISTER = 425, 426, 427
"""Numbers of the system calls, the same on every architecture that we know of."""

FLAGS = 1 << 9 | 1 << 12 | 1 << 13
"""IORING_SETUP_ TASKRUN_FLAG, SINGLE_ISSUER and DEFER_TASKRUN: the kernel completes reads when we ask for it
only, many at a time, and interrupts nothing. So the queues change in our own system calls alone, and need no
memory barriers."""

TASKRUN = 1 << 2
"""Set in the queue's flags: more has come than the last call has completed."""

GETEVENTS = 1
REGISTER_EVENTFD = 4
OP_READ = 22
PARAMS = struct.Struct("=120x")
OFFSETS = struct.Struct("=10I")
SQE = struct.Struct("=BBHiQQIIQ24x")
"""opcode, flags, ioprio, fd, offset, address, length, rw_flags, user_data."""
CQE = struct.Struct("=Qi4x")
"""user_data, result."""
SQES = 0x10000000
"""Where the requests are mapped."""

ENTRIES = 256
"""Reads told to the kernel in one call. Twice as many may be under way: so many results have a place."""

LARGEST = 64 * 1024
"""Bytes of the largest read."""

PAGE_MASK = mmap.PAGESIZE - 1

FAILED, CAME, CACHED = range(3)
"""What is told of a read: nothing is known (an error, the end of the file), its data has come, or it was in
the page cache already."""

NEVER = (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL)
"""What a kernel says that will not have it: others may pass."""

Told = Callable[[Any, int], None]

_scratch = mmap.mmap(-1, LARGEST)
"""Where the kernel puts what is read. It outlives every ring."""


@functools.cache
def _syscall() -> Callable[..., int]:
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return call


class Ring:
    """Reads under way for one event loop. Each of its users calls ``leave`` once."""

    _rings: ClassVar[dict[asyncio.AbstractEventLoop, Ring]] = {}
    _refused = False
    """The kernel will never let us."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Raises OSError where the kernel has no such thing, or does not let us."""
        import ctypes

        self._loop = loop
        self._users = 0
        params = bytearray(PARAMS.size)
        struct.pack_into("=I", params, 8, FLAGS)
        with contextlib.ExitStack() as undo:
            self._fd = _checked(_syscall()(SETUP, ENTRIES, (ctypes.c_char * len(params)).from_buffer(params)))
            undo.callback(os.close, self._fd)
            entries, results = struct.unpack_from("=2I", params)
            requests, completions = OFFSETS.unpack_from(params, 40), OFFSETS.unpack_from(params, 80)
            size = max(requests[6] + 4 * entries, completions[5] + CQE.size * results)
            self._map = mmap.mmap(self._fd, (size + 3) & ~3)
            undo.callback(self._map.close)
            self._sqes = mmap.mmap(self._fd, SQE.size * entries, offset=SQES)
            undo.callback(self._sqes.close)
            self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            undo.callback(os.close, self._event)
            event = (ctypes.c_int * 1)(self._event)
            _checked(_syscall()(REGISTER, self._fd, REGISTER_EVENTFD, event, 1))
            undo.pop_all()
        self._words = memoryview(self._map).cast("I")
        self._sq_tail, self._sq_flags = requests[1] // 4, requests[4] // 4
        self._cq_head, self._cq_tail, self._cqes = completions[0] // 4, completions[1] // 4, completions[5]
        self._mask, self._cq_mask = entries - 1, results - 1
        array = requests[6] // 4
        for number in range(entries):
            self._words[array + number] = number
        self._limit = results
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(_scratch))
        self._tail = 0
        """Reads since the beginning, and the next one's number."""
        self._queued = 0
        """The last of them, which the kernel has not been told of."""
        self._waiting: dict[int, tuple[Told, object, int]] = {}
        """By number: who is told, about what, and the result that is expected."""
        self._scheduled = False
        loop.add_reader(self._event, self._woken)

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Ring | None:
        """The ring of this loop, with one user more; None: there is none to be had."""
        if cls._refused:
            return None
        ring = cls._rings.get(loop)
        if ring is None:
            try:
                ring = cls._rings[loop] = cls(loop)
            except OSError as error:
                cls._refused = error.errno in NEVER
                return None
        ring._users += 1
        return ring

    def leave(self) -> None:
        """A user less; with the last one the ring ends. Who waits for anything still is not told."""
        self._users -= 1
        if self._users:
            return
        del self._rings[self._loop]
        self._waiting.clear()
        if not self._loop.is_closed():
            self._loop.remove_reader(self._event)
        self._words.release()
        self._map.close()
        self._sqes.close()
        os.close(self._fd)
        os.close(self._event)

    def fetch(self, fd: int, offset: int, length: int, told: Told, about: object) -> bool:
        """Have a range of a file, at most LARGEST bytes, in the page cache soon, and ``told(about, what)``
        called then, never at once. False: too many are under way."""
        if self._queued > self._mask or len(self._waiting) >= self._limit:
            return False
        if (offset & PAGE_MASK) + length <= mmap.PAGESIZE:
            length = 1  # brings the page as well
        number = self._tail
        at = (number & self._mask) * SQE.size
        SQE.pack_into(self._sqes, at, OP_READ, 0, 0, fd, offset, self._address, length, 0, number)
        self._tail += 1
        self._queued += 1
        self._waiting[number] = (told, about, length)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._enter)
        return True

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        self._enter()

    def _enter(self) -> None:
        """Tell the kernel of what is queued, and learn what has come."""
        self._scheduled = False
        if not self._users:
            return
        words, queued = self._words, self._queued
        words[self._sq_tail] = self._tail & 0xFFFFFFFF
        taken = max(0, _syscall()(ENTER, self._fd, queued, 0, GETEVENTS, None, 0))
        new, refused = self._tail - queued, queued - taken
        if refused:
            # It has no memory, say. Threads do these.
            self._tail -= refused
            words[self._sq_tail] = self._tail & 0xFFFFFFFF
        self._queued = 0
        outcomes = []
        head, tail = words[self._cq_head], words[self._cq_tail]
        while head != tail:
            number, result = CQE.unpack_from(self._map, self._cqes + (head & self._cq_mask) * CQE.size)
            head = (head + 1) & 0xFFFFFFFF
            told, about, length = self._waiting.pop(number)
            outcomes.append((told, about, FAILED if result != length else CAME if number < new else CACHED))
        words[self._cq_head] = head
        for number in range(self._tail, self._tail + refused):
            told, about, _ = self._waiting.pop(number)
            outcomes.append((told, about, FAILED))
        if words[self._sq_flags] & TASKRUN and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._enter)
        # The queues are in order before anybody is told, whatever he does then: even leave.
        for told, about, what in outcomes:
            told(about, what)


def _checked(result: int) -> int:
    if result < 0:
        import ctypes

        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
