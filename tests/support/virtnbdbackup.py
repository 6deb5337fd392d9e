"""virtnbdbackup's NBD client and extent handling, without the libvirt that the rest of it needs.

In a process of the system's Python, which has libnbd's binding (tests/support/virtcopy.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.support import libnbd, qemu, servers

PROGRAM = Path(__file__).with_name("virtcopy.py")


@dataclass(frozen=True)
class Extent:
    """As virtnbdbackup has it: whether there is something to copy, and where (bytes)."""

    data: bool
    offset: int
    length: int


@dataclass(frozen=True)
class Copy:
    """What one session has found and read."""

    extents: list[Extent]
    stored: bytes
    """The content of the extents with data, one after the other."""

    def restore(self, onto: bytearray) -> None:
        """Put the data where it came from."""
        taken = 0
        for extent in self.extents:
            if extent.data:
                piece = self.stored[taken : taken + extent.length]
                assert len(piece) == extent.length
                onto[extent.offset : extent.offset + extent.length] = piece
                taken += extent.length
        assert taken == len(self.stored)


@cache
def packages() -> Path:
    """Where scripts/unpack_virtnbdbackup.sh puts its Python packages."""
    done = qemu.run([str(qemu.ROOT / "scripts/unpack_virtnbdbackup.sh"), "--where"])
    return Path(done.stdout.strip()) / "usr/lib/python3/dist-packages"


def missing() -> str | None:
    """Why it cannot be used, or None if it can."""
    if not (packages() / "libvirtnbdbackup/extenthandler").exists():
        return f"virtnbdbackup is not at {packages()} (scripts/unpack_virtnbdbackup.sh puts it there)"
    if not (libnbd.DIST_PACKAGES / "nbd.py").exists():
        return "the package python3-libnbd, which virtnbdbackup uses, is not installed"
    return None


def copy(server: servers.Server, place: Path, bitmap: str = "") -> Copy:
    """Its extents of ``base:allocation`` (a full backup) or of a dirty bitmap, and their data.

    ``place`` is a directory for the data.
    """
    context = f"qemu:dirty-bitmap:{bitmap}" if bitmap else ""
    file = place / "copied"
    environment = f"PYTHONPATH={packages()}"
    argv = [*qemu.SYSTEM.python(), str(PROGRAM), server.socket, server.export, context, str(file)]
    done = qemu.run(["/usr/bin/env", environment, *argv])
    return Copy([Extent(*fields) for fields in json.loads(done.stdout)], file.read_bytes())
