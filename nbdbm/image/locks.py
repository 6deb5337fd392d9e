"""QEMU's image locks: who may use an image file at the same time as we do.

Every user of an image takes read locks (open file description locks) on single bytes of the file, which
say what it does and what it does not stand others doing:

    byte 100 + n   permission n is held           n: 0 consistent read, 1 write,
    byte 200 + n   permission n is not shared        2 write unchanged, 3 resize

Each first sets its own bytes, then looks whether somebody else has set an opposite one. All of them are
read locks, so nobody ever waits, and a read-only descriptor is enough. They end with the descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct

from nbdbm.errors import LockedError

READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)
HELD = 100
NOT_SHARED = 200

FLOCK = struct.Struct("hhqqi4x")
"""struct flock on 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid."""

NO_LOCKS = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without such locks answer."""

DOING = {READ: "reading", WRITE: "writing", WRITE_UNCHANGED: "rewriting", RESIZE: "resizing"}


def lock(fd: int, path: str, *, writable: bool, force_share: bool = False) -> str | None:
    """Take the image locks of a reader or a writer; ``force_share`` reads whatever others do.

    Returns:
        None, or a notice when the file system has no locks and the file is used without.

    Raises:
        LockedError: somebody else's use excludes ours.
    """
    assert not (writable and force_share)
    held = (READ, WRITE, RESIZE) if writable else (READ,)
    not_shared = () if force_share else (WRITE, RESIZE)
    try:
        for start in (*(HELD + n for n in held), *(NOT_SHARED + n for n in not_shared)):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, start, 1, 0))
        if force_share:
            return None
        for n in not_shared:
            if pid := _holder(fd, HELD + n):
                raise _conflict(fd, path, f"in use for {DOING[n]} by {{}}", HELD + n, pid, writable)
        for n in held:
            if pid := _holder(fd, NOT_SHARED + n):
                raise _conflict(
                    fd,
                    path,
                    f"in use by {{}}, which excludes {DOING[n]}",
                    NOT_SHARED + n,
                    pid,
                    writable,
                )
    except OSError as error:
        if error.errno in NO_LOCKS:
            return f"{path}: its file system has no locks: make sure that no program writes to it"
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise LockedError(path, "locked as a whole by another program") from error
        raise
    return None


def unlock(fd: int) -> None:
    """Give back all image locks of this descriptor."""
    for start in (HELD, NOT_SHARED):
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, start, RESIZE + 1, 0))


def _holder(fd: int, start: int) -> int:
    """0 if nobody else has locked the byte, else the locker's process id, -1 where it is not known."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0))
    kind, _, _, _, pid = FLOCK.unpack(answer)
    return 0 if kind == fcntl.F_UNLCK else pid or -1


def _conflict(fd: int, path: str, what: str, start: int, pid: int, writable: bool) -> LockedError:
    who = _describe(pid if pid > 0 else _search(fd, start))
    remedy = "" if writable else " (--force-share reads it nevertheless, possibly torn)"
    return LockedError(path, f"{what.format(who)}{remedy}")


def _describe(pid: int | None) -> str:
    if pid is None:
        return "another process"
    if pid == os.getpid():
        return "this process itself (is it served twice?)"
    try:
        with open(f"/proc/{pid}/comm") as file:
            return f"process {pid} ({file.read().strip()})"
    except OSError:
        return f"process {pid}"


def _search(fd: int, start: int) -> int | None:
    """Look through /proc for a process with such a lock on the file, as far as we may look.

    An open file description belongs to no process, so the kernel itself does not name one.
    """
    wanted = os.fstat(fd)
    own = os.getpid()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            for number in os.listdir(f"/proc/{name}/fd"):
                if int(name) == own and int(number) == fd:
                    continue
                status = os.stat(f"/proc/{name}/fd/{number}")
                if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
                    with open(f"/proc/{name}/fdinfo/{number}") as file:
                        if any(_covers(line, start) for line in file):
                            return int(name)
        except OSError:
            continue
    return None


def _covers(line: str, start: int) -> bool:
    """Whether a line of fdinfo (``lock: 1: OFDLCK ADVISORY READ -1 ... 100 101``) is a lock on the byte."""
    words = line.split()
    if len(words) < 4 or words[0] != "lock:" or "OFDLCK" not in words:
        return False
    first, last = words[-2:]
    return int(first) <= start and (last == "EOF" or start <= int(last))
