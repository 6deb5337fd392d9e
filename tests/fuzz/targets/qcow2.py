"""The qcow2 opener: a damaged image, opened read-only or for writing, read, described, written, closed.

What must hold: nothing but documented errors; reading changes nothing; the ways to read agree with one
another and with the status; a bitmap that was inconsistent stays so; and where the image was sound to begin
with, what was written is read again, and no bitmap that claims to be true has missed it.
"""

from __future__ import annotations

from collections.abc import Iterable

from nbdbm.exports import Export
from nbdbm.image.image import DetectZeroes, Image, OpenOptions
from tests.fuzz import disk
from tests.fuzz.script import Script
from tests.fuzz.seeds import damaged, seeds


def starts() -> Iterable[bytes]:
    """Scripts to begin with."""
    for number in range(len(seeds())):
        for mode in (0, 1, 2, 3):
            yield bytes([number, mode, 0]) + bytes(range(1, 60))
            yield bytes([number, mode, 2, 0, 1, 1, 1, 9, 3, 2, 2, 5, 40]) + bytes(range(100, 160))


def run(data: bytes) -> None:
    script = Script(data)
    seed = script.pick(seeds())
    mode = script.byte()
    image = bytes(damaged(seed, script))
    files = disk.Files(seed, image, cached=not mode & 2)
    if mode & 1:
        disk.run(_write(files, script, mode))
    else:
        disk.run(_look(files, script, mode))
        assert not files.changes and files.image == image, "reading changed the file"
    files.assert_closed()
    disk.run(_judge_bitmaps(image, files.image))


async def _look(files: disk.Files, script: Script, mode: int) -> None:
    options = OpenOptions(
        snapshot=script.pick(("1", "first", "")) if mode & 4 else None,
        no_backing=bool(mode & 8),
        chain=not mode & 16,
    )
    try:
        image = await Image.open(files.path, options, files.open)
    except disk.OPENING as error:
        assert files.path in str(error) or any(name in str(error) for name in ("base", "data"))
        return
    try:
        export = Export.of(image)
        assert image.chain
        if options.chain:
            content = await disk.read_all(image)
            await disk.look_at_status(image, export, content)
        await disk.look_at_bitmaps(image)
    finally:
        await image.close()


async def _write(files: disk.Files, script: Script, mode: int) -> None:
    before = files.image
    sound = await disk.is_sound(before)
    claimed = disk.claims(before)
    options = OpenOptions(
        read_only=False,
        discard=not mode & 4,
        detect_zeroes=tuple(DetectZeroes)[mode >> 3 & 3 if mode >> 3 & 3 < 3 else 0],
    )
    try:
        image = await Image.open(files.path, options, files.open)
    except disk.OPENING:
        return
    written: dict[int, bytes] = {}
    failed = False
    content: list[bytes | None] = []
    try:
        content = await disk.read_all(image)
        while script.more:
            failed |= not await _one(image, script, written)
            if sound and not failed:
                for offset, expected in written.items():
                    assert await disk.read(image, offset, len(expected)) == expected, f"lost at {offset}"
        after = await disk.read_all(image)
    finally:
        try:
            await image.close()
        except disk.SERVING:
            failed = True
    if sound and not failed:
        await _judge_writes(files, claimed, content, after)


async def _one(image: Image, script: Script, written: dict[int, bytes]) -> bool:
    """One operation; whether it succeeded. ``written`` becomes what was written last, range by range."""
    kind = script.byte() % 7
    offset, length = script.number(3) * 64, script.number(2) + 1
    offset %= max(1, image.size)
    length = min(length, image.size - offset)
    if length <= 0 and kind < 4:
        return True
    written_here: bytes | None = None
    try:
        if kind == 0:
            written_here = (script.bytes(2) or b"\0") * length
            written_here = written_here[:length]
            view = memoryview(written_here)
            if not image.try_write(offset, view):
                await image.write(offset, view, fua=bool(length & 1))
        elif kind == 1:
            written_here = bytes(length)
            await image.write_zeroes(offset, length, no_hole=bool(offset & 64), fast=bool(offset & 128))
        elif kind == 2:
            _forget(written, offset, length)
            await image.trim(offset, length)
        elif kind == 3:
            await disk.read(image, offset, length)
        elif kind == 4:
            await image.flush()
        elif kind == 5:
            await disk.look_at_bitmaps(image)
        else:
            await image.reopen(read_only=True)
            await image.reopen(read_only=False)
    except disk.SERVING:
        if image.read_only:
            return False
        _forget(written, offset, length)
        return kind in (1, 3)
    if written_here is not None:
        _forget(written, offset, length)
        written[offset] = written_here
    return True


def _forget(written: dict[int, bytes], offset: int, length: int) -> None:
    for start in [at for at, data in written.items() if at < offset + length and at + len(data) > offset]:
        del written[start]


async def _judge_writes(
    files: disk.Files, claimed: dict[bytes, int], before: list[bytes | None], after: list[bytes | None]
) -> None:
    """Opened anew, the disk is what it was, and the bitmaps know what changed."""
    assert await disk.is_sound(files.image), "writing to a sound image left an unsound one"
    image = await Image.open(files.path, OpenOptions(), files.open)
    try:
        assert await disk.read_all(image) == after, "closed and opened, the disk is another"
        bits = await disk.look_at_bitmaps(image)
        now = disk.claims(files.image)
        for name, flags in claimed.items():
            # Only those that recorded, and that still claim to be true.
            if flags & 2 and name in now and (shown := name.decode("utf-8", "surrogateescape")) in bits:
                missed = disk.changed_granules_missed(before, after, image.size, bits[shown])
                assert not missed, f"bitmap {shown} has missed changes at {missed}"
    finally:
        await image.close()


async def _judge_bitmaps(before: bytes, after: bytes) -> None:
    """A bitmap that was inconsistent may not claim otherwise now."""
    if before == after or not await disk.is_sound(before):
        return
    flags = disk.flags_of_bitmaps(before) or {}
    broken = {name for name, value in flags.items() if value & 1}
    again = broken & disk.claims(after).keys()
    assert not again, f"inconsistent bitmaps became consistent: {again}"
