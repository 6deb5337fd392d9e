"""File systems of a test's own, mounted for real: small, full, or read-only.

Only root may mount, and in many containers not even root: where it is refused, the test is skipped with what
mount said.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import qemu

BLOCK = 4096
"""Bytes that the file systems give away at once."""


class Mounted:
    """A file system in memory that is mounted at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, spare: int = 0) -> None:
        """Take all space but ``spare`` bytes."""
        file = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            with contextlib.suppress(OSError):
                while True:
                    os.write(file, b"x" * BLOCK)
            os.ftruncate(file, os.fstat(file).st_size - spare)
        finally:
            os.close(file)
        assert os.statvfs(self.path).f_bavail * BLOCK == spare

    def make_room(self) -> None:
        """Undo ``fill``."""
        self._ballast.unlink()

    def read_only(self) -> None:
        """From now on nothing can be changed in it."""
        qemu.run(["mount", "-o", "remount,ro", str(self.path)])

    def abort(self) -> None:
        """What ext4 does when its disk has an error: from one moment to the next, nothing can be written."""
        qemu.run(["mount", "-o", "remount,abort", str(self.path)])


def memory(place: Path, size: int) -> contextlib.AbstractContextManager[Mounted]:
    """A tmpfs of ``size`` bytes at ``place``, which is made; gone at the end of the block."""
    return _mounted(place, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


def ext4(place: Path, size: int) -> contextlib.AbstractContextManager[Mounted]:
    """An ext4 file system of ``size`` bytes at ``place``, which is made; in a file beside it."""
    disk = place.with_suffix(".ext4")
    qemu.newer().run("mkfs.ext4", "-q", disk, f"{size >> 10}k")
    return _mounted(place, "-t", "ext4", "-o", "loop,errors=remount-ro", str(disk))


@contextlib.contextmanager
def _mounted(place: Path, *words: str) -> Iterator[Mounted]:
    place.mkdir()
    done = qemu.run(["mount", *words, str(place)], check=False)
    if done.returncode != 0:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
    try:
        yield Mounted(place)
    finally:
        # Lazily: after a test that failed something may still be open.
        qemu.run(["umount", "--lazy", str(place)])
