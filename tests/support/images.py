"""The images that all tests share: made by their recipes on first use, read-only from then on.

Tests find here what they say about images: a ``Case``, its content, sizes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from tests.support.imagemaker import GIB, KIB, MIB, TIB, Case, Maker, noise, text
from tests.support.qemu import SYSTEM
from tests.support.recipes import DENSE, LARGE, RECIPES

__all__ = [
    "GIB",
    "KIB",
    "LARGE",
    "MIB",
    "RECIPES",
    "TIB",
    "Case",
    "Gallery",
    "Maker",
    "noise",
    "text",
]

BLOCK = 4096
"""Bytes; of the host's file system."""


def settle(path: Path, *, dense: bool) -> None:
    """Rewrite a file such that where the host sees holes in it does not change by being read.

    QEMU leaves space that is allocated but never written; Linux calls that a hole until somebody reads
    it, and data while it is in the page cache. Afterwards blocks of zeroes are holes, or (``dense``) there
    are no holes at all.
    """
    new = path.with_name(path.name + ".new")
    with path.open("rb") as source, new.open("wb") as target:
        while piece := source.read(BLOCK):
            if dense or piece.strip(b"\0"):
                target.write(piece)
            else:
                target.seek(len(piece), os.SEEK_CUR)
        target.truncate()
        os.fsync(target.fileno())
    new.replace(path)


class Gallery:
    """The images made so far, in one directory that all test processes share."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> Case:
        """The image called ``name``, made now if it was not yet."""
        place = self.place / name
        with self._locked(name):
            record = self.place / f"{name}.json"
            if not record.exists():
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                case = RECIPES[name](Maker(name, place))
                for pattern in place.glob(".pattern-*"):
                    pattern.unlink()
                # A server that is to change nothing is given nothing that it may change; root may
                # anyway, so digests are taken before and after.
                for path in case.files:
                    settle(path, dense=name in DENSE)
                    path.chmod(stat.S_IRUSR)
                values = dict(
                    vars(case), path=str(case.path), reference=case.reference and str(case.reference)
                )
                record.write_text(json.dumps(values))
                return case
            values = json.loads(record.read_text())
            values["path"] = Path(values["path"])
            values["reference"] = values["reference"] and Path(values["reference"])
            return Case(**values)

    def expected(self, case: Case) -> str:
        """SHA-256 of the disk, by ``qemu-img convert``."""
        with self._locked(case.name):
            kept = self.place / f"{case.name}.sha256"
            if not kept.exists():
                kept.write_text(hashlib.sha256(self.content(case)).hexdigest())
            return kept.read_text()

    def content(self, case: Case) -> bytes:
        """The whole disk, by ``qemu-img convert``."""
        raw = self.place / f"{case.name}.{os.getpid()}.raw"
        how = ["-l", f"snapshot.name={case.options[1]}"] if "--load-snapshot" in case.options else []
        try:
            SYSTEM.img("convert", "-f", case.format, *how, "-O", "raw", case.reference or case.path, raw)
            data = raw.read_bytes()
        finally:
            raw.unlink(missing_ok=True)
        # QEMU counts in sectors, and fills the last one of a raw file with zeroes.
        return data[: case.size].ljust(case.size, b"\0")

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.place / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
