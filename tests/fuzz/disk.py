"""What the targets that open images have in common."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import Coroutine
from typing import Any, TypeVar

from nbdbm.errors import BitmapError, ImageError, NbdbmError
from nbdbm.exports import FILLED, ZEROES, Export
from nbdbm.extents import ExtentList
from nbdbm.image.check import check
from nbdbm.image.image import Image
from nbdbm.qcow2.header import Header
from tests.fuzz.seeds import Seed
from tests.fuzz.sparsefile import Content, SparseFile
from tests.support import qcow2build

T = TypeVar("T")

OPENING = (ImageError, BitmapError)
"""What may come of opening a file: one line that names it."""

SERVING = (NbdbmError, OSError)
"""What a request may fail with."""

STEP = 8192
"""Bytes of the disk that are looked at in one go."""

LOOKED_AT = 64 * STEP
"""Bytes of the disk that are looked at in all: a damaged header may claim any size."""

_loop: asyncio.AbstractEventLoop | None = None


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run to the end, in an event loop that is made once."""
    global _loop
    if _loop is None:
        _loop = asyncio.new_event_loop()
        _loop.set_debug(False)
    return _loop.run_until_complete(main)


class Files:
    """A directory in memory: the image and what it may name. ``open`` is a FileOpener."""

    def __init__(self, seed: Seed, data: bytes, *, cached: bool = True) -> None:
        self.path = "disk.qcow2"
        self._cached = cached
        self._content = {self.path: Content(data)}
        self._opened: list[SparseFile] = []
        for name, other in seed.others.items():
            self._content[name] = Content(other)

    def open(self, path: str, writable: bool) -> SparseFile:
        content = self._content.get(path)
        if content is None:
            raise ImageError(path, "cannot be opened: " + os.strerror(errno.ENOENT), errno=errno.ENOENT)
        self._opened.append(SparseFile(content, path, writable=writable, cached=self._cached))
        return self._opened[-1]

    @property
    def image(self) -> bytes:
        """The image as it is now."""
        return self._content[self.path].whole()

    def replace(self, data: bytes) -> None:
        """Another image is in its place; nobody has the old one open."""
        self.assert_closed()
        self._content[self.path] = Content(data)

    @property
    def changes(self) -> int:
        """Operations that changed any of the files."""
        return sum(content.changes for content in self._content.values())

    def assert_closed(self) -> None:
        """Nothing is left open."""
        assert all(file.closed for file in self._opened), "a file was left open"


async def is_sound(data: bytes) -> bool:
    """Whether the checker has nothing but leaks to complain about: then more is promised."""
    file = SparseFile(Content(data), "disk.qcow2", writable=False)
    try:
        header = Header.parse(await file.pread(0, Header.peek_cluster_size(data[:104])))
        header.validate(len(data))
        report = await check(file, header)
    except NbdbmError:
        return False
    return not report.corruptions and not report.check_errors


def flags_of_bitmaps(data: bytes) -> dict[bytes, int] | None:
    """The flags of each bitmap by an independent reader; None if it cannot find them."""
    try:
        if qcow2build.get_field(data, "version") < 3:
            return {}
        if all(kind != qcow2build.EXT_BITMAPS for kind, _, _ in qcow2build.extensions(data)):
            return {}
        found = qcow2build.bitmap_entries(data)
        return {name: struct.unpack_from(">I", data, at + 12)[0] for name, at in found.items()}
    except (struct.error, StopIteration, OverflowError):
        return None


def claims(data: bytes) -> dict[bytes, int]:
    """The bitmaps that say of themselves to be true, with their flags; {} if that cannot be found out."""
    flags = flags_of_bitmaps(data)
    if not flags or not qcow2build.get_field(data, "autoclear_features") & 1:
        return {}
    return {name: value for name, value in flags.items() if not value & qcow2build.IN_USE}


def steps(size: int) -> list[tuple[int, int]]:
    """(offset, length) of the parts of a disk that are looked at: its beginning, and its end."""
    found = [(at, min(STEP, size - at)) for at in range(0, min(size, LOOKED_AT), STEP)]
    if size > LOOKED_AT:
        found.append((size - STEP, STEP))
    return found


async def read(image: Image, offset: int, length: int) -> bytes | None:
    """The range, read in each way there is; None if it cannot be read."""
    buffer = bytearray(b"\xaa" * length)
    try:
        await image.read_into(memoryview(buffer), offset)
    except SERVING:
        return None
    content = bytes(buffer)
    sparse = bytearray(b"\xaa" * length)
    at = 0
    for part, is_data in await image.read_sparse(memoryview(sparse), offset):
        assert part > 0
        if not is_data:
            sparse[at : at + part] = bytes(part)
        at += part
    assert at == length and sparse == content, "two ways to read differ"
    quick = bytearray(b"\xaa" * length)
    done = image.try_read(memoryview(quick), offset)
    if done == FILLED:
        assert quick == content, "the quick way to read differs"
    elif done == ZEROES:
        assert not any(content), "the quick way says that data are zeroes"
    return content


async def read_all(image: Image) -> list[bytes | None]:
    """What ``steps`` says, each part as it reads or None."""
    return [await read(image, offset, length) for offset, length in steps(image.size)]


async def look_at_status(image: Image, export: Export, content: list[bytes | None]) -> None:
    """Every context, over the parts that ``content`` was read from."""
    contexts = list(enumerate(export.info.contexts))
    for (offset, length), data in zip(steps(image.size), content, strict=True):
        for one_by_one in (False, True):
            try:
                await export.block_status(contexts, offset, length, req_one=one_by_one)
            except SERVING:
                continue
        at = offset
        while at < offset + length:
            try:
                runs = await image.status(at, offset + length - at)
            except SERVING:
                break
            assert runs
            for run_ in runs:
                assert run_.length > 0 and at + run_.length <= offset + length
                if run_.zero and data is not None:
                    assert not any(data[at - offset : at - offset + run_.length]), "zero, but it is not"
                at += run_.length


async def look_at_bitmaps(image: Image) -> dict[str, list[tuple[int, int]]]:
    """The dirty ranges of each bitmap that can be read, as far as the disk is looked at."""
    found: dict[str, list[tuple[int, int]]] = {}
    for bitmap in list(image.tracker):
        try:
            bits = await image.bits(bitmap.name)
        except SERVING:
            continue
        assert bitmap.usable
        extents = ExtentList(0, image.size, 4096)
        if image.size:
            bits.extents(extents)
        at, dirty = 0, []
        for length, flag in extents:
            if flag:
                dirty.append((at, length))
            at += length
        found[bitmap.name] = dirty
    return found


def changed_granules_missed(
    before: list[bytes | None], after: list[bytes | None], size: int, dirty: list[tuple[int, int]]
) -> list[int]:
    """Offsets at which the disk changed and the bitmap says that it did not."""
    missed = []
    for (offset, _), old, new in zip(steps(size), before, after, strict=True):
        if old is None or new is None or old == new:
            continue
        for at in range(0, len(old), 512):
            if old[at : at + 512] != new[at : at + 512] and not any(
                start <= offset + at < start + length for start, length in dirty
            ):
                missed.append(offset + at)
    return missed
