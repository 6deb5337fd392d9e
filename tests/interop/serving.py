"""Serve an image of the matrix with the server under test, and tell what is on the disk before and after."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.support import servers
from tests.support.images import Case

UNDER_TEST = os.environ.get("NBDBM_TEST_SERVER", "nbdbm")
"""``qemu-nbd`` here turns the tests on the one whose answers are taken for right: it must pass too."""


@contextlib.contextmanager
def serving(case: Case, *options: object, export: str = "") -> Iterator[servers.Server]:
    """The server under test on ``case``, through its command line."""
    if UNDER_TEST == "qemu-nbd":
        path = case.reference or case.path
        with servers.qemu_nbd(
            path, *case.qemu_options, bitmaps=case.bitmaps, image_format=case.format, export=export
        ) as server:
            yield server
    else:
        with servers.nbdbm(case.path, *case.options, *options, export=export) as server:
            yield server


def fingerprint(files: list[Path]) -> dict[str, tuple[str, int, int]]:
    """Digest, modification time and length of each file: a read-only server changes none of them."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            total = hashlib.file_digest(file, "sha256").hexdigest()
        status = path.stat()
        found[path.name] = (total, status.st_mtime_ns, status.st_size)
    return found


def digest(path: Path, size: int | None = None) -> str:
    """SHA-256 of a file, cut or zero-filled to ``size`` where given."""
    data = path.read_bytes()
    if size is not None:
        data = data[:size].ljust(size, b"\0")
    return hashlib.sha256(data).hexdigest()


def clip(extents: list[list[int]], size: int) -> list[list[int]]:
    """The extents of the first ``size`` bytes."""
    found: list[list[int]] = []
    for length, flags in extents:
        take = min(length, size)
        if take:
            found.append([take, flags])
        size -= take
    return found
