"""The images of a directory: which files may be served, by name."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from nbdbm.qcow2.constants import MAGIC

BEGINNING = MAGIC.to_bytes(4, "big")

MAX_FILES = 16384
"""Files that are looked at. Each becomes an entry of every list that a client asks for."""


def images(
    directory: str,
    *,
    any_format: bool,
    skipped: Callable[[str], None] = lambda text: None,
    seen: dict[str, int] | None = None,
) -> list[str]:
    """Names of the regular files in ``directory`` that begin as qcow2 images do, or of all; sorted.

    Hidden files, symbolic links and names that are not UTF-8 are passed over: an export's name goes over
    the wire, and a link could lead anywhere. ``skipped`` is told in one line of what is passed over.
    ``seen`` is kept from one look to the next: what was found to be an image, and is the same file, is not
    read again, which of many images is nearly all of the time.
    Raises OSError if the directory cannot be read.
    """
    found: list[str] = []
    before = {} if seen is None else dict(seen)
    inodes: dict[str, int] = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if len(found) == MAX_FILES:
                skipped(f"{directory}: has more than {MAX_FILES} images; the others are not served")
                break
            try:
                entry.name.encode()
                if entry.is_symlink():
                    skipped(f"{entry.path}: a symbolic link, not served")
                elif entry.is_file() and (
                    any_format or before.get(entry.name) == entry.inode() or _is_qcow2(entry.path)
                ):
                    found.append(entry.name)
                    inodes[entry.name] = entry.inode()
            except UnicodeEncodeError:
                skipped(f"{directory}: the name {entry.name!r} is not UTF-8, not served")
            except OSError as error:
                skipped(f"{entry.path}: {error.strerror}, not served")
    if seen is not None:
        seen.clear()
        seen.update(inodes)
    found.sort()
    return found


def _is_qcow2(path: str) -> bool:
    # Not waiting for anybody: it may have become a fifo meanwhile.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and os.pread(fd, len(BEGINNING), 0) == BEGINNING
    finally:
        os.close(fd)
