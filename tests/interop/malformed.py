"""Copies of good images, for breaking; and within which bounds what is left of them is served."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from tests.support import images
from tests.support.qcow2edit import patch

ADDRESS_SPACE = 2 << 30
"""Bytes. Far above what serving takes (threads reserve address space), far below a table of lies."""
MEMORY = 160 << 20
"""Bytes resident at the worst moment."""

Edit = Callable[[Path], None]


def put(offset: int, form: str, *values: int) -> Edit:
    """Overwrite big-endian numbers at a fixed place."""
    return lambda path: patch(path, offset, struct.pack(">" + form, *values))


def also(*edits: Edit) -> Edit:
    def edit(path: Path) -> None:
        for one in edits:
            one(path)

    return edit


def truncated(length: int) -> Edit:
    def edit(path: Path) -> None:
        with path.open("r+b") as file:
            file.truncate(length)

    return edit


def file_size(path: Path) -> int:
    return path.stat().st_size


def copy_of(gallery: images.Gallery, name: str, place: Path) -> Path:
    """A copy of one image of the matrix, for breaking."""
    source = gallery.get(name).path
    path = place / source.name
    shutil.copyfile(source, path)
    return path
