"""qcow2 files as qemu-img made them: where their parts lie, and other bytes in their place."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

BITMAPS_EXTENSION = 0x23852875
DATA_FILE_EXTENSION = 0x44415441


def patch(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def peek(path: Path, offset: int, form: str) -> int:
    """One big-endian number of a file; ``form`` is struct's letter."""
    with path.open("rb") as file:
        file.seek(offset)
        (value,) = struct.unpack(">" + form, file.read(struct.calcsize(form)))
    assert isinstance(value, int)
    return value


def extensions(path: Path) -> dict[int, tuple[int, int]]:
    """Header extensions: type to (offset of the data, length)."""
    found: dict[int, tuple[int, int]] = {}
    at = peek(path, 100, "I") if peek(path, 4, "I") >= 3 else 72
    while True:
        kind, length = peek(path, at, "I"), peek(path, at + 4, "I")
        if kind == 0:
            return found
        found[kind] = (at + 8, length)
        at += 8 + (length + 7) // 8 * 8


@dataclass
class BitmapEntry:
    """Where the parts of one bitmap directory entry lie in the file."""

    name: str
    at: int
    table: int
    table_size: int

    @property
    def flags_at(self) -> int:
        return self.at + 12


def bitmap_entries(path: Path) -> dict[str, BitmapEntry]:
    """The bitmap directory of a well-formed image."""
    at, _ = extensions(path)[BITMAPS_EXTENSION]
    count, directory = peek(path, at, "I"), peek(path, at + 16, "Q")
    found = {}
    for _ in range(count):
        name_length, extra = peek(path, directory + 18, "H"), peek(path, directory + 20, "I")
        with path.open("rb") as file:
            file.seek(directory + 24 + extra)
            name = file.read(name_length).decode()
        found[name] = BitmapEntry(name, directory, peek(path, directory, "Q"), peek(path, directory + 8, "I"))
        directory += (24 + extra + name_length + 7) // 8 * 8
    return found


def set_bitmap_flags(path: Path, name: str, flags: int) -> None:
    """Add flags (1: IN_USE, 2: AUTO) to a bitmap's directory entry."""
    at = bitmap_entries(path)[name].flags_at
    patch(path, at, struct.pack(">I", peek(path, at, "I") | flags))


def set_size(path: Path, size: int) -> None:
    """Change the disk size in a qcow2 header to any number of bytes."""
    patch(path, 24, struct.pack(">Q", size))
