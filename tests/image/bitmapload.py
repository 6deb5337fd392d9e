"""The bitmaps of an image in memory, loaded as the engine would."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Coroutine
from typing import Any, TypeVar

from nbdbm.bitmaps.dirty import DirtyBitmap
from nbdbm.image.bitmapstore import BitmapStore
from nbdbm.qcow2.header import Header
from tests.support.memfile import MemoryFile
from tests.support.qcow2build import Bitmap, Image

MIB = 1 << 20
DISK = 64 * MIB
"""1024 granules of 64 KiB: 128 bytes of bits."""

EIO = OSError(errno.EIO, os.strerror(errno.EIO))


T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(main)


async def load(
    image: Image | bytes | MemoryFile, *, size: int | None = None, writable: bool = False
) -> BitmapStore:
    """Load the bitmaps as the engine would."""
    if isinstance(image, Image):
        image = image.build()
    file = image if isinstance(image, MemoryFile) else MemoryFile(image)
    cluster_size = Header.peek_cluster_size(bytes(file.data[:104]))
    header = Header.parse(bytes(file.data[:cluster_size]))
    header.validate(file.size)
    return await BitmapStore.load(file, header, header.size if size is None else size, writable=writable)


def dirty(bits: DirtyBitmap) -> list[tuple[int, bool]]:
    return list(bits.runs(0, bits.size))


def names(store: BitmapStore) -> dict[str, str]:
    return {b.name: b.state.value for b in store.tracker}


GOOD = Bitmap(b"good", b"\x05")
