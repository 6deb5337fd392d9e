"""BlockFile: the seam between the engine and the files under it; ThreadedFile, a real host file."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import stat
from collections.abc import Callable
from typing import Protocol, TypeVar

from nbdbm.errors import ImageError
from nbdbm.image.folios import SMALL, Folios
from nbdbm.image.locks import lock, unlock
from nbdbm.image.pagecache import cached
from nbdbm.image.readahead import LARGEST, ReadAhead
from nbdbm.image.ring import LARGEST as RING_LARGEST
from nbdbm.image.ring import Ring, Told
from nbdbm.image.threads import in_thread

T = TypeVar("T")

INLINE_WRITE = 256 * 1024
"""Bytes; a write of no more than this only copies to the page cache, in less time than a thread takes to
be woken. (Under memory pressure the kernel makes writers wait, in a thread or not.)"""

ZEROES = bytes(1024 * 1024)

RWF_NOWAIT = os.RWF_NOWAIT
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16
CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)
"""What a host answers that has no such operation."""
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What it answers about a file that it may let us read, but not write."""


class BlockFile(Protocol):
    """A host file (or block device, or memory) as the engine sees it. Offsets and lengths in bytes.

    Every method may be awaited concurrently. Failures are OSError with the host's errno.
    """

    path: str
    """How messages name it."""
    size: int
    """Length, as far as we know: it grows by what we write. Bytes past it read as zeroes; if the file ends
    before it, somebody else has cut it, and reading what is gone is an error (EIO)."""
    writable: bool

    async def pread(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes; those past the end of the file are zeroes."""

    async def pread_into(self, view: memoryview, offset: int, *, hot: bool = True) -> None:
        """Fill ``view`` from ``offset``; bytes past the end of the file are zeroes.

        Not ``hot``: ``try_pread_into`` has just failed, so that it need not be tried again.
        """

    def try_pread_into(self, view: memoryview, offset: int) -> bool:
        """Fill ``view`` now if that needs no waiting (page cache); return False otherwise."""

    def cached_fd(self, offset: int, length: int) -> int:
        """A descriptor to send the range from if all of it is in the page cache; -1 otherwise."""

    def bring(self, offset: int, length: int, told: Told, about: object) -> bool:
        """Have the range in the page cache soon, and ``told(about, what)`` called then, never at once:
        FAILED, CAME or CACHED of ring.py, all of them hints. False: it cannot be done, nobody is told.

        Who waits keeps the file open until it is told.
        """

    async def data_runs(self, offset: int, length: int, limit: int) -> list[tuple[bool, int]]:
        """What the range holds, as consecutive (data or hole, length), at most ``limit`` of them.

        They cover a non-empty prefix of the range (all of it if fewer than ``limit``) and alternate.
        Past the end of the file is a hole. Where the host cannot tell, everything is data.
        """

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data``, extending the file where needed."""

    def try_pwrite(self, offset: int, data: memoryview) -> bool:
        """Write all of ``data`` now if it is little enough to be copied to the page cache; else False."""

    async def zero(self, offset: int, length: int, *, punch: bool, fallback: bool = True) -> None:
        """Make the range read as zeroes; ``punch`` allows giving its space back.

        A host that cannot do it by itself gets zeroes written, or without ``fallback`` it is an OSError
        (ENOTSUP) and nothing was done.
        """

    async def discard(self, offset: int, length: int) -> None:
        """Give the range's space back where the host can; its content is undefined afterwards."""

    async def truncate(self, size: int) -> None:
        """Set the length; growth reads as zeroes."""

    async def sync(self) -> None:
        """Return once everything written before the call is on stable storage."""

    def allocated(self) -> int:
        """Bytes that the host has allocated for the file (st_blocks)."""

    def close(self) -> None:
        """Release the file and its locks; idempotent."""


class HostFile(BlockFile, Protocol):
    """A BlockFile with a place in the host's file system, as images refer to it."""

    identity: tuple[int, int]
    """The same for two paths to one file."""

    def real_path(self) -> str:
        """Where the open file really lies, whatever links led to it."""

    def lock(self, *, writable: bool, force_share: bool) -> str | None:
        """Take the image locks, see ``locks.lock``."""

    def reopen(self, *, writable: bool) -> None:
        """Open the same file anew for reading, or for writing too, and take the image locks for that.

        No call may be under way. Raises ImageError, and nothing has changed then.
        """


# -- a real file -------------------------------------------------------------------------------


def fill_zeroes(view: memoryview) -> None:
    """Overwrite all of ``view`` with zeroes."""
    length = len(view)
    step = len(ZEROES)
    if length <= step:
        view[:] = ZEROES[:length]
        return
    for at in range(0, length, step):
        part = min(step, length - at)
        view[at : at + part] = ZEROES[:part]


KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
)


def _refuse_kind(path: str, mode: int) -> None:
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return
    kind = next((name for test, name in KINDS if test(mode)), f"of an unknown type ({mode:#o})")
    raise ImageError(path, f"is {kind}; only regular files and block devices can be served")


class ThreadedFile:
    """A regular file or block device. What the page cache cannot answer at once goes to an I/O thread.

    Opened read-only it changes nothing of the file; the access time follows the mount's options.
    """

    def __init__(self, path: str, fd: int, *, writable: bool) -> None:
        self.path = path
        self.fd = fd
        self.writable = writable
        self.identity = _identity(os.fstat(fd))
        """The same for two paths to one file."""
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self._unsynced = True
        """Something may not be on stable storage: we wrote since the last sync, or others before us."""
        self._syncing = 0
        self._misses = ReadAhead(self)
        self._writing = asyncio.Lock()
        """Held by the one thread that writes. File systems let one at a time write to a file, and a second
        one spins for its turn: a sixth of all processor time with eight writes of 1 MiB under way."""
        self._thread_writes = False
        self._ring: Ring | None = None
        """What brings data to the page cache, once something has missed it and if there is such a thing."""
        self._folios = Folios()
        """What is known of how small writes fare."""
        self._nowait = True
        """False once the file system has said that it knows no RWF_NOWAIT."""

    @classmethod
    def open(cls, path: str, *, writable: bool = False) -> ThreadedFile:
        """Open ``path``.

        Raises:
            ImageError: it is missing, not permitted, or neither regular file nor block device.
        """
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            # Looked at before it is opened: opening alone makes some devices act, and blocks on some.
            _refuse_kind(path, os.stat(path).st_mode)
            fd = os.open(path, flags)
        except OSError as error:
            what = " for writing" if writable and error.errno in READ_ONLY else ""
            raise ImageError(path, f"cannot be opened{what}: {error.strerror}", errno=error.errno) from error
        except ValueError as error:
            raise ImageError(path, f"cannot be opened: {error}", errno=errno.EINVAL) from error
        try:
            _refuse_kind(path, os.fstat(fd).st_mode)
            return cls(path, fd, writable=writable)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):  # it has no size, as some files of the kernel
                raise ImageError(path, f"cannot be opened: {error.strerror}", errno=error.errno) from error
            raise

    def real_path(self) -> str:
        """Where the open file really lies, whatever links led to it."""
        return os.readlink(f"/proc/self/fd/{self.fd}")

    def lock(self, *, writable: bool, force_share: bool) -> str | None:
        """Take the image locks, see ``locks.lock``."""
        return lock(self.fd, self.path, writable=writable, force_share=force_share)

    def reopen(self, *, writable: bool) -> None:
        """Open the same file anew, see HostFile."""
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            new = os.open(f"/proc/self/fd/{self.fd}", flags)
        except OSError as error:
            raise ImageError(
                self.path, f"cannot be opened anew: {error.strerror}", errno=error.errno
            ) from error
        try:
            # Our own locks stand in the way of the new ones; they end with the old descriptor otherwise.
            unlock(self.fd)
            try:
                lock(new, self.path, writable=writable)
            except BaseException:
                lock(self.fd, self.path, writable=self.writable)
                raise
            os.dup2(new, self.fd, inheritable=False)
        finally:
            os.close(new)
        self.writable = writable

    # -- reading -------------------------------------------------------------------------------

    def try_pread_into(self, view: memoryview, offset: int) -> bool:
        """Fill ``view`` now if that needs no waiting (page cache); return False otherwise."""
        return self._nowait and self.read_now(view, offset) == len(view)

    def read_now(self, view: memoryview, offset: int) -> int:
        """Bytes filled at once, from the start of ``view``. Not to be called once RWF_NOWAIT has failed."""
        try:
            done = os.preadv(self.fd, (view,), offset, RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno in CANNOT:
                self._nowait = False
            # Any other error comes again from the thread, where there is somebody to raise it to.
            return 0
        if done < len(view) and offset + done >= self.size:
            fill_zeroes(view[done:])
            return len(view)
        return done

    async def pread_into(self, view: memoryview, offset: int, *, hot: bool = True) -> None:
        """Fill ``view`` from ``offset``; bytes past the end of the file are zeroes."""
        done = self.read_now(view, offset) if hot and self._nowait else 0
        if done == len(view):
            return
        if self._nowait and len(view) <= LARGEST:
            await self._misses.read(view, offset)
        else:
            await in_thread(self.read_waiting, view[done:], offset + done)

    def cached_fd(self, offset: int, length: int) -> int:
        """A descriptor to send the range from, see BlockFile."""
        return self.fd if offset + length <= self.size and cached(self.fd, offset, length) else -1

    def bring(self, offset: int, length: int, told: Told, about: object) -> bool:
        """Have the range in the page cache soon, see BlockFile."""
        if not self._nowait or length > RING_LARGEST or offset + length > self.size:
            return False
        if self._ring is None:
            self._ring = Ring.of(asyncio.get_running_loop())
            if self._ring is None:
                return False
        return self._ring.fetch(self.fd, offset, length, told, about)

    def fetch(self, offset: int, length: int) -> None:
        """Tell the kernel to have the range in the page cache soon."""
        with contextlib.suppress(OSError):  # a hint
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def read_waiting(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.fd, (view[done:],), offset + done)
            except OSError as error:
                raise self._named(error) from error
            if not count:
                if offset + done < self.size:
                    raise self._cut()
                fill_zeroes(view[done:])
                return
            done += count

    def _named(self, error: OSError) -> OSError:
        """The host's error with the file's name: there may be a chain of files, and many images."""
        return OSError(error.errno, error.strerror, self.path)

    def _cut(self) -> OSError:
        """Bytes that were there are gone: zeroes in their place would be wrong data, and a table of zeroes a
        disk that seems empty."""
        return OSError(errno.EIO, "has become shorter while it is in use", self.path)

    async def pread(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes; those past the end of the file are zeroes."""
        buffer = bytearray(length)
        await self.pread_into(memoryview(buffer), offset)
        return bytes(buffer)

    async def data_runs(self, offset: int, length: int, limit: int) -> list[tuple[bool, int]]:
        """What the range holds, see BlockFile."""
        return await in_thread(self._data_runs, offset, length, limit)

    def _data_runs(self, offset: int, length: int, limit: int) -> list[tuple[bool, int]]:
        end = offset + length
        runs: list[tuple[bool, int]] = []
        while offset < end and len(runs) < limit:
            try:
                data = min(os.lseek(self.fd, offset, os.SEEK_DATA), end)
                if data > offset:
                    runs.append((False, data - offset))
                    offset = data
                    continue
                hole = min(os.lseek(self.fd, offset, os.SEEK_HOLE), end)
            except OSError as error:
                # ENXIO: no data from here to the end of the file. Others: the host cannot tell.
                data_left = error.errno != errno.ENXIO
                if not data_left and offset < self.size and os.lseek(self.fd, 0, os.SEEK_END) < self.size:
                    raise self._cut() from error
                if data_left and offset < self.size < end:
                    runs.append((True, self.size - offset))
                    offset = self.size
                    data_left = False
                if runs and runs[-1][0] == data_left:
                    offset -= runs.pop()[1]
                runs.append((data_left, end - offset))
                break
            if hole <= offset:
                break
            runs.append((True, hole - offset))
            offset = hole
        # Somebody else may be changing the file between the two calls: say data, and get on.
        return runs or [(True, length)]

    # -- writing -------------------------------------------------------------------------------

    def try_pwrite(self, offset: int, data: memoryview) -> bool:
        """Write all of ``data`` now if it is little enough to be copied to the page cache; else False."""
        if len(data) > SMALL:
            return self._write_now(offset, data)
        folios = self._folios
        folios.countdown -= 1
        if folios.countdown > 0:
            return self._write_now(offset, data)
        folios.before(self.fd, offset, self.size)
        done = self._write_now(offset, data)
        folios.after()
        return done

    def _write_now(self, offset: int, data: memoryview) -> bool:
        length = len(data)
        if length > INLINE_WRITE or self._thread_writes:
            return False  # another write would only wait for the file's lock
        try:
            done = os.pwrite(self.fd, data, offset)
        except OSError as error:
            raise self._named(error) from error
        if done < length:
            self._pwrite(offset + done, data[done:])
        self._unsynced = True
        if offset + length > self.size:
            self.size = offset + length
        return True

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data``, extending the file where needed."""
        if self._write_now(offset, memoryview(data)):
            return
        async with self._writing:
            self._thread_writes = True
            try:
                await in_thread(self._pwrite, offset, memoryview(data))
            finally:
                self._thread_writes = False
        self.size = max(self.size, offset + len(data))

    def _pwrite(self, offset: int, view: memoryview) -> None:
        try:
            done = os.pwrite(self.fd, view, offset)
            while done < len(view):
                count = os.pwrite(self.fd, view[done:], offset + done)
                if not count:
                    raise OSError(errno.EIO, "nothing could be written")
                done += count
        except OSError as error:
            raise self._named(error) from error
        self._unsynced = True

    async def zero(self, offset: int, length: int, *, punch: bool, fallback: bool = True) -> None:
        """Make the range read as zeroes, see BlockFile."""
        if length <= 0:
            return
        await in_thread(self._zero, offset, length, punch, fallback)
        self.size = max(self.size, offset + length)

    def _zero(self, offset: int, length: int, punch: bool, fallback: bool) -> None:
        # Past the end of the file there is nothing to punch: growing it reads as zeroes.
        inside = min(length, max(0, self.size - offset))
        modes = [FALLOC_FL_ZERO_RANGE]
        if punch and inside == length:
            modes.insert(0, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
        for mode in modes:
            if self._fallocate(mode, offset, length):
                self._unsynced = True
                return
        if not fallback:
            raise OSError(errno.ENOTSUP, "zeroes are not faster than data here", self.path)
        at, end = offset, offset + length
        while at < end:
            # Cut at round places: two requests at the same time may not leave parts of both in one sector.
            part = min(len(ZEROES) - at % len(ZEROES), end - at)
            self._pwrite(at, memoryview(ZEROES)[:part])
            at += part

    async def discard(self, offset: int, length: int) -> None:
        """Give the range's space back where the host can; its content is undefined afterwards."""
        if length > 0:
            await in_thread(self._fallocate, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
            self._unsynced = True

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        try:
            return _fallocate(self.fd, mode, offset, length)
        except OSError as error:
            raise self._named(error) from error

    async def truncate(self, size: int) -> None:
        """Set the length; growth reads as zeroes."""
        # First, where it becomes shorter: who reads meanwhile what is going away gets zeroes, not an error.
        self.size = min(self.size, size)
        try:
            await in_thread(os.ftruncate, self.fd, size)
        except OSError as error:
            raise self._named(error) from error
        self.size = size
        self._unsynced = True

    async def sync(self) -> None:
        """Return once everything written before the call is on stable storage; at once if it is."""
        if not self._unsynced and not self._syncing:
            return
        # Writes set it again when they end; what ends during the sync may have missed it.
        self._unsynced = False
        self._syncing += 1
        try:
            await in_thread(os.fdatasync, self.fd)
        except BaseException as error:
            self._unsynced = True
            if isinstance(error, OSError):
                raise self._named(error) from error
            raise
        finally:
            self._syncing -= 1
        self._folios.synced()

    # -- the file itself -----------------------------------------------------------------------

    def allocated(self) -> int:
        """Bytes that the host has allocated for the file (st_blocks); all of a block device."""
        status = os.fstat(self.fd)
        return self.size if stat.S_ISBLK(status.st_mode) else status.st_blocks * 512

    def close(self) -> None:
        """Release the file and its locks; idempotent."""
        if self._ring is not None:
            self._ring.leave()
            self._ring = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _identity(status: os.stat_result) -> tuple[int, int]:
    if stat.S_ISBLK(status.st_mode):
        return (-1, status.st_rdev)
    return (status.st_dev, status.st_ino)


@functools.cache
def _libc_fallocate() -> Callable[[int, int, int, int], int]:
    import ctypes

    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int

    def call(fd: int, mode: int, offset: int, length: int) -> int:
        return ctypes.get_errno() if function(fd, mode, offset, length) else 0

    return call


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """fallocate(2), which the standard library lacks; False where the host cannot do it."""
    while True:
        failure = _libc_fallocate()(fd, mode, offset, length)
        if failure == errno.EINTR:
            continue
        if failure and failure not in CANNOT:
            raise OSError(failure, os.strerror(failure))
        return not failure
