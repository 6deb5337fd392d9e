"""What the bitmaps of an image file say, to QEMU and to us; and what a failure left of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

from nbdbm.image.check import check
from nbdbm.image.image import Image, OpenOptions
from tests.support import libnbd, servers
from tests.support.powercut import CrashFile, CrashState, PowerCutFile
from tests.support.qemu import SYSTEM

Extents = list[tuple[int, int]]
"""Dirty (offset, length), neighbours merged, ascending."""


class Seen(NamedTuple):
    """One bitmap."""

    granularity: int
    flags: tuple[str, ...]
    """As qemu-img info shows them, sorted."""
    dirty: Extents | None
    """None: it cannot be used, or was not looked at."""


def qemu_list(path: Path) -> dict[str, Seen]:
    """The bitmaps as qemu-img lists them, in its order."""
    listed = SYSTEM.img_json("info", path)["format-specific"]["data"].get("bitmaps", [])
    return {b["name"]: Seen(b["granularity"], tuple(sorted(b["flags"])), None) for b in listed}


def qemu_dirty(path: Path, *names: str) -> dict[str, Extents]:
    """What of each bitmap qemu-nbd exports as dirty."""
    contexts = {f"qemu:dirty-bitmap:{name}": name for name in names}
    with servers.qemu_nbd(path, bitmaps=names) as server:
        maps = libnbd.probe(server.uri, contexts=list(contexts), digest=False)["maps"]
    found: dict[str, Extents] = {}
    for context, name in contexts.items():
        found[name] = []
        at = 0
        for length, flags in maps[context]:
            if flags & 1:
                found[name].append((at, length))
            at += length
    return found


def qemu_sees(path: Path) -> dict[str, Seen]:
    """All of it, as QEMU has it."""
    found = qemu_list(path)
    usable = [name for name, seen in found.items() if "in-use" not in seen.flags]
    if usable:
        for name, dirty in qemu_dirty(path, *usable).items():
            found[name] = found[name]._replace(dirty=dirty)
    return found


async def seen_in(image: Image) -> dict[str, Seen]:
    """All of it, as the engine has it."""
    found = {}
    for bitmap in image.tracker:
        dirty: Extents | None = None
        if bitmap.usable:
            dirty, at = [], 0
            for length, is_dirty in (await image.bits(bitmap.name)).runs(0, image.size):
                if is_dirty:
                    dirty.append((at, length))
                at += length
        flags = ["auto"] * bitmap.enabled + ["in-use"] * (bitmap.state.name == "INCONSISTENT")
        found[bitmap.name] = Seen(bitmap.granularity, tuple(flags), dirty)
    return found


def we_see(path: Path) -> dict[str, Seen]:
    """All of it, as we have it."""

    async def look() -> dict[str, Seen]:
        image = await Image.open(str(path), OpenOptions(chain=False))
        try:
            return await seen_in(image)
        finally:
            await image.close()

    return asyncio.run(look())


def assert_clean(path: Path) -> None:
    """qemu-img check finds nothing, not even a leak."""
    SYSTEM.img("check", "-q", "-f", "qcow2", path)


def agreed(path: Path) -> dict[str, Seen]:
    """What the bitmaps say; asserts that QEMU and we see the same, and that the image is clean."""
    assert_clean(path)
    ours = we_see(path)
    theirs = qemu_sees(path)
    assert list(ours) == list(theirs) and ours == theirs
    return ours


async def after_failure(state: CrashState, number: int = 0) -> dict[str, Seen]:
    """What the bitmaps of one file of a crash state say; asserts that it is sound but for leaks."""
    file = state.files[number]
    return await sound(file)


async def sound(file: CrashFile | PowerCutFile) -> dict[str, Seen]:
    """What the bitmaps in this file say; asserts that it is sound but for leaks."""
    file.closed = False
    image = await Image.open(file.path, OpenOptions(chain=False), lambda path, writable: file)
    try:
        assert image.header is not None
        report = await check(file, image.header)
        assert not report.corruptions and not report.check_errors, report.problems
        return await seen_in(image)
    finally:
        await image.close()
        file.closed = False
