"""The commands that look at, edit, check, repair and grow an image, on damaged ones, one after the other.

What must hold: nothing but documented errors; a check changes nothing; a bitmap that was inconsistent is so
until it is removed; a sound image stays sound; and a repair that reports success has led to a sound image, in
which every part of the disk that could be read reads the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from unittest import mock

from nbdbm.errors import NbdbmError
from nbdbm.image import bitmapedit, check
from nbdbm.image.bitmapedit import edit_bitmaps
from nbdbm.image.image import Image, OpenOptions
from nbdbm.image.repair import repair
from nbdbm.image.resize import resize
from tests.fuzz import disk
from tests.fuzz.script import Script
from tests.fuzz.seeds import damaged, seeds

NAMES = ("recording", "stopped", "broken", "full", "new", "other", "", "x" * 1023, "y" * 1024)
REMOVING = (bitmapedit.Remove, bitmapedit.RemoveInconsistent, bitmapedit.Rename)


def starts() -> Iterable[bytes]:
    """Scripts to begin with: each operation alone, on each image, whole and damaged."""
    for number in range(len(seeds())):
        for kind in range(12):
            yield bytes([number, 0, kind, 0, 1, 2, 3, kind + 1, 2, 1, 0])
            yield bytes([number, 1, 3, 0x44, 1, 5, 7, kind, 0, 1, 2, 3, kind + 1, 2, 1, 0])


def run(data: bytes) -> None:
    script = Script(data)
    seed = script.pick(seeds())
    files = disk.Files(seed, bytes(damaged(seed, script)))
    for _ in range(8):
        if not script.more:
            break
        disk.run(_one(files, script))
        files.assert_closed()


async def _one(files: disk.Files, script: Script) -> None:
    kind = script.byte() % 12
    before = files.image
    sound = await disk.is_sound(before)
    broken = {name for name, flags in (disk.flags_of_bitmaps(before) or {}).items() if flags & 1}
    if kind < 8:
        removes = await _edit(files, script, kind)
    elif kind == 11:
        removes = False
        with contextlib.suppress(*disk.SERVING):
            await resize(files.path, script.number(3) * 512, relative=script.flag(), open_file=files.open)
    else:
        removes = False
        await _check(files, kind, sound)
    after = files.image
    if sound:
        assert await disk.is_sound(after), "a sound image became unsound"
        if not removes and broken:
            again = broken & disk.claims(after).keys()
            assert not again, f"inconsistent bitmaps became consistent: {again}"


async def _edit(files: disk.Files, script: Script, kind: int) -> bool:
    """Up to three operations as one step; whether a bitmap may be gone or have another name."""
    operations: list[bitmapedit.Operation] = []
    for number in range(1 + (script.byte() & 3)):
        name = script.pick(NAMES)
        match kind if not number else script.byte() & 7:
            case 0:
                granularity = (None, 512, 4096, 65536, 100, 1 << 31, 1 << 32)[script.byte() % 7]
                operations.append(bitmapedit.Add(name, granularity, script.flag()))
            case 1:
                operations.append(bitmapedit.Remove(name))
            case 2:
                operations.append(bitmapedit.RemoveInconsistent())
            case 3:
                operations.append(bitmapedit.Clear(name))
            case 4:
                operations.append(bitmapedit.Enable(name))
            case 5:
                operations.append(bitmapedit.Disable(name))
            case 6:
                operations.append(bitmapedit.Rename(name, script.pick(NAMES)))
            case _:
                operations.append(bitmapedit.Merge(name, script.pick(NAMES)))
    before = files.image
    try:
        await edit_bitmaps(files.path, operations, files.open)
    except NbdbmError:
        # The refcounts of an image that was not closed cleanly may have been made true before.
        assert files.image == before or before[79] & 1, "it failed, and the file has changed"
    except OSError:
        pass
    return any(isinstance(operation, REMOVING) for operation in operations)


async def _check(files: disk.Files, kind: int, sound: bool) -> None:
    """Check (8), repair leaks (9) or all (10)."""
    before = files.image
    content = await _content(files)
    with mock.patch.object(check.ThreadedFile, "open", lambda path, writable: files.open(path, writable)):
        try:
            file, header, _ = await check.open_locked(files.path, writable=kind > 8)
        except disk.OPENING:
            return
    try:
        if kind == 8:
            await check.check(file, header)
            assert files.image == before, "a check changed the file"
            return
        _, report = await repair(file, header, errors=kind == 10)
    except disk.SERVING:
        return
    finally:
        file.close()
    if not report.corruptions and not report.check_errors:
        assert await disk.is_sound(files.image), "the repair says that all is well, the check does not"
    if content is not None:
        again = await _content(files)
        assert again is not None, "it could be opened before"
        for old, new in zip(content, again, strict=True):
            assert old is None or old == new, "the repair changed what the disk holds"


async def _content(files: disk.Files) -> list[bytes | None] | None:
    try:
        image = await Image.open(files.path, OpenOptions(), files.open)
    except disk.OPENING:
        return None
    try:
        return await disk.read_all(image)
    finally:
        await image.close()
