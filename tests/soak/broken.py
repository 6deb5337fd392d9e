"""``nbdbm`` with one mistake in it, for the soak test to find: ``tests/soak/broken.py MISTAKE serve ...``"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nbdbm import configfile
from nbdbm.bitmaps.tracker import BitmapTracker
from nbdbm.cli import program
from nbdbm.config import ServeConfig, TlsConfig
from nbdbm.image.bitmapsave import BitmapSaver
from nbdbm.image.image import Image
from nbdbm.server.tls import Credentials


def forgetful() -> None:
    """One write in five is not marked in the bitmaps."""
    mark, writes = BitmapTracker.mark, 0

    def mark_most(self: BitmapTracker, offset: int, length: int) -> None:
        nonlocal writes
        writes += 1
        if writes % 5:
            mark(self, offset, length)

    BitmapTracker.mark = mark_most  # type: ignore[method-assign]


def idle_flush() -> None:
    """A flush does nothing."""

    async def flush(self: Image) -> None:
        return None

    Image.flush = flush  # type: ignore[method-assign]


def unarmed() -> None:
    """The disk is not told that the bitmaps are in use."""
    arm, rewrite = BitmapSaver.arm, BitmapSaver._rewrite_flags

    async def arm_in_memory(self: BitmapSaver) -> None:
        async def nothing(*_: object) -> None:
            return None

        BitmapSaver._rewrite_flags = nothing  # type: ignore[assignment, method-assign]
        try:
            await arm(self)
        finally:
            BitmapSaver._rewrite_flags = rewrite  # type: ignore[method-assign]

    BitmapSaver.arm = arm_in_memory  # type: ignore[method-assign]


def leaky() -> None:
    """Each reload leaves a descriptor open."""
    load = configfile.load

    def load_and_leak(path: str, tls: TlsConfig | None = None) -> ServeConfig:
        os.open(path, os.O_RDONLY)
        return load(path, tls)

    configfile.load = load_and_leak


def old_certificate() -> None:
    """A reload does not read the certificates again."""
    reload = Credentials.reload

    def reload_once(self: Credentials, config: TlsConfig) -> None:
        if self._context is None:
            reload(self, config)

    Credentials.reload = reload_once  # type: ignore[method-assign]


MISTAKES = {each.__name__: each for each in (forgetful, idle_flush, unarmed, leaky, old_certificate)}

if __name__ == "__main__":
    MISTAKES[sys.argv.pop(1)]()
    program()
