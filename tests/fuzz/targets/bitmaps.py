"""Bitmaps from the disk and back: damaged directories, tables and bits, loaded, written past, stored, again.

What must hold: what is offered is what an independent reader (tests/fuzz/bitmapmodel.py) finds in order, bit
for bit, and never one that is in use. Whatever the moment at which the file is looked at, no bitmap that
claims to be consistent and records has missed a change; and after an orderly end, each that was offered
before is there again, with what it had, and what was written since, and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from nbdbm.exports import Export
from nbdbm.image.image import Image, OpenOptions
from tests.fuzz import disk
from tests.fuzz.bitmapmodel import Stored, granules, stored
from tests.fuzz.script import Script
from tests.fuzz.seeds import Seed, seeds
from tests.support import qcow2build
from tests.support.qcow2build import IN_USE, get_field

CONTEXT = "qemu:dirty-bitmap:"
SEEDS = [seed for seed in seeds() if get_field(seed.data, "version") > 2]
FLAGS = (0, IN_USE, 2, 3, 4, 6, 7, 8, 1 << 31)


def starts() -> Iterable[bytes]:
    """Scripts to begin with."""
    for number in range(len(SEEDS)):
        yield bytes([number, 0]) + bytes([0, 9, 40, 3, 0, 1, 30, 2, 1, 2, 8, 9, 9, 0, 3, 60, 1, 9, 0])
        yield bytes([number, 2, 0, 0, 0, 5, 0, 0, 7, 1, 0, 8, 0, 2, 8, 9, 4, 0, 3, 60, 1, 9, 0])
        yield bytes([number, 1, 1, 0, 9, 2])
        yield bytes([number, 1, 1, 0, 9, 3])
        yield bytes([number, 2, 1, 0, 0, 3, 2, 1, 7, 0, 5, 0, 4, 1, 2, 1, 1, 9, 9, 6, 0, 3, 60, 1, 9, 0])


def run(data: bytes) -> None:
    script = Script(data)
    seed = script.pick(SEEDS)
    files = disk.Files(seed, bytes(_damaged(seed, script)))
    sound = disk.run(disk.is_sound(files.image))
    disk.run(_look(files))
    changed: set[tuple[int, int]] = set()
    for _ in range(4):
        if not script.more:
            break
        disk.run(_session(files, script, sound, changed))
        disk.run(_look(files))
    files.assert_closed()


def _damaged(seed: Seed, script: Script) -> bytearray:
    """The seed with some of what describes its bitmaps changed."""
    data = bytearray(seed.data)
    entries = list(qcow2build.bitmap_entries(data).values())
    extension = next(at for kind, at, _ in qcow2build.extensions(data) if kind == qcow2build.EXT_BITMAPS)
    for _ in range(script.byte() % 8):
        at = script.pick(entries)
        table, count, _ = struct.unpack_from(">QII", seed.data, at)
        slot = table + 8 * (script.byte() % max(1, count))
        kind = script.byte() % 10
        if kind == 0:
            struct.pack_into(">I", data, at + 12, script.pick(FLAGS))
        elif kind == 1:
            struct.pack_into(">Q", data, slot, script.pick((0, 1, 2, 3, 1 << 62, len(data), table, 512)))
        elif kind == 2:
            _overwrite(data, slot, ">Q", script.value(0, seed.places))
        elif kind == 3:
            host = struct.unpack_from(">Q", seed.data, slot)[0]
            place = host + script.byte()
            if host > 1:
                data[place] = script.byte()
        elif kind == 4:
            skip, form = script.pick(((0, ">Q"), (8, ">I"), (16, ">B"), (17, ">B"), (18, ">H"), (20, ">I")))
            before = struct.unpack_from(form, data, at + skip)[0]
            _overwrite(data, at + skip, form, script.value(before, seed.places))
        elif kind == 5:
            data[at + 24 + script.byte() % 8] = script.byte()
        elif kind == 6:
            skip, form = script.pick(((0, ">I"), (8, ">Q"), (16, ">Q")))
            before = struct.unpack_from(form, data, extension + skip)[0]
            _overwrite(data, extension + skip, form, script.value(before, seed.places))
        elif kind == 7:
            data[at + 17] = 9 + script.byte() % 8  # another granularity, perhaps with as many entries
        elif kind == 8:
            data[95] ^= 1
        else:
            # The name of another, if there is room.
            other = script.pick(entries)
            length = struct.unpack_from(">H", seed.data, other + 18)[0]
            if length <= 8:
                struct.pack_into(">H", data, at + 18, length)
                data[at + 24 : at + 32] = seed.data[other + 24 : other + 24 + length].ljust(8, b"\0")
    return data


def _overwrite(data: bytearray, at: int, form: str, value: int) -> None:
    struct.pack_into(form, data, at, value & (1 << 8 * struct.calcsize(form)) - 1)


async def _look(files: disk.Files) -> None:
    """Opened to be read: the bitmaps are those of the model, neither more nor fewer, and bit for bit."""
    before = files.image
    try:
        image = await Image.open(files.path, OpenOptions(), files.open)
    except disk.OPENING:
        return
    try:
        found = await _offered(image)
        wanted = {one.name.decode(): one.dirty for one in stored(before) or () if one.offered}
        assert found == wanted, f"{sorted(found)} are offered, {sorted(wanted)} are in order"
    finally:
        await image.close()
    assert files.image == before


async def _offered(image: Image) -> dict[str, frozenset[int]]:
    """What clients can have: dirty granules by name."""
    export = Export.of(image)
    contexts = [name for name in export.info.contexts if name.startswith(CONTEXT)]
    found = {}
    for context in contexts:
        name = context.removeprefix(CONTEXT)
        granularity = next(one.granularity for one in image.tracker if one.name == name and one.usable)
        dirty: set[int] = set()
        at = 0
        while at < image.size:
            ((_, extents),) = await export.block_status([(0, context)], at, image.size - at)
            assert len(extents)
            for length, flags in extents:
                assert flags in (0, 1)
                if flags:
                    assert at % granularity == 0
                    dirty |= granules(at, length, granularity)
                at += length
        found[name] = frozenset(dirty)
    return found


async def _session(files: disk.Files, script: Script, sound: bool, changed: set[tuple[int, int]]) -> None:
    """Open for writing, write, and close or be killed. ``changed``: what has been written ever since."""
    killed = script.byte() & 3 == 3
    before = stored(files.image)
    try:
        image = await Image.open(files.path, OpenOptions(read_only=False), files.open)
    except disk.OPENING:
        return
    asked: set[tuple[int, int]] = set()
    failed = False
    for _ in range(script.byte() % 6):
        try:
            asked.add(await _write(image, script))
        except disk.SERVING:
            failed = True
        changed |= asked
        if sound:
            _honest(files.image, changed)
    at_its_death = files.image
    try:
        await image.close()
    except disk.SERVING:
        failed = True
    if sound:
        assert failed or await disk.is_sound(files.image), "an unsound image was left"
        _honest(files.image, changed)
        if not failed:
            _same_and_more(before or [], stored(files.image) or [], asked)
    if killed:
        files.replace(at_its_death)


async def _write(image: Image, script: Script) -> tuple[int, int]:
    """One request; the range that it may have changed."""
    kind, offset, length = script.byte(), script.number(2) * 16, script.number(2) % 5000 + 1
    offset %= max(1, image.size)
    length = min(length, image.size - offset)
    match kind % 6:
        case 0 | 1:
            data = memoryview(bytes([kind]) * length)
            if kind & 8 or not image.try_write(offset, data):
                await image.write(offset, data)
        case 2:
            await image.write_zeroes(offset, length)
        case 3:
            await image.trim(offset, length)
        case 4:
            await image.flush()
            return 0, 0
        case _:
            await image.reopen(read_only=True)
            await image.reopen(read_only=False)
            return 0, 0
    return offset, length


def _honest(image: bytes, changed: set[tuple[int, int]]) -> None:
    """Every bitmap that records and claims to be consistent has what was written."""
    for one in stored(image) or ():
        if one.in_use or not one.records:
            continue
        missed = {granule for range_ in changed for granule in granules(*range_, one.granularity)}
        missed -= one.dirty or set()
        assert not missed, f"{one.name!r} claims to be consistent and has missed {sorted(missed)[:9]}"


def _same_and_more(before: list[Stored], after: list[Stored], asked: set[tuple[int, int]]) -> None:
    """All bitmaps are there; those that were offered have what they had and what they recorded."""
    now = {one.name: one for one in after}
    for one in before:
        assert one.name in now, f"{one.name!r} is gone"
        found = now[one.name]
        if one.in_use:
            assert found.in_use, f"{one.name!r} is consistent again"
        if not one.offered:
            continue
        assert found.offered, f"{one.name!r} was not stored"
        assert one.dirty is not None and found.dirty is not None
        written = {granule for range_ in asked for granule in granules(*range_, one.granularity)}
        wanted = one.dirty | written if one.records else one.dirty
        assert found.dirty == wanted, f"{one.name!r} has other bits"
        assert found.flags == one.flags and found.granularity == one.granularity
