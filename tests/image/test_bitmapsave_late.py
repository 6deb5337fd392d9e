"""Writes that are noted before the stored bits are there: nobody waits for these, and nothing is missed."""

from __future__ import annotations

import asyncio
import errno
import logging

import pytest

from nbdbm.bitmaps.dirty import DirtyBitmap
from nbdbm.bitmaps.tracker import BitmapState
from nbdbm.errors import BitmapError, ImageError
from nbdbm.image.image import Image
from tests.image.bitmapbench import BITMAPS, WRITING, Bench, built
from tests.support.bitmapjudge import Seen, sound
from tests.support.faults import FaultFile, FaultPlan


class LateFile(FaultFile):
    """Reads that begin at ``at`` wait for ``gate``, and fail while ``failing``."""

    def __init__(self, bench: Bench, at: int) -> None:
        super().__init__(bench.file, FaultPlan())  # type: ignore[arg-type]
        self.at = at
        self.gate = asyncio.Event()
        self.failing = False
        self.reads = 0

    async def pread(self, offset: int, length: int) -> bytes:
        await self._late(offset)
        return await super().pread(offset, length)

    async def pread_into(self, view: memoryview, offset: int, *, hot: bool = True) -> None:
        await self._late(offset)
        await super().pread_into(view, offset, hot=hot)

    async def _late(self, offset: int) -> None:
        if offset == self.at:
            self.reads += 1
            await self.gate.wait()
            if self.failing:
                raise OSError(errno.EIO, "no luck", self.path)


async def late(bench: Bench) -> tuple[Image, LateFile]:
    """The image open for writing, and the file in which the bits of ``recording`` are hard to get."""
    file = LateFile(bench, bench.table(b"recording")[0])
    return await Image.open(bench.file.path, WRITING, lambda path, writable: file), file  # type: ignore[return-value, arg-type]


async def seen_again(bench: Bench) -> dict[str, Seen]:
    bench.file.closed = False
    return await sound(bench.file)


def dirty(bits: DirtyBitmap) -> list[tuple[int, int]]:
    found, position = [], 0
    for length, is_dirty in bits.runs(0, bits.size):
        if is_dirty:
            found.append((position, length))
        position += length
    return found


def test_opening_and_writing_wait_for_no_bits() -> None:
    """What is written while they are loaded is not lost, to clients or on disk."""

    async def main() -> None:
        bench = Bench(built(*BITMAPS))
        image, file = await late(bench)
        assert file.reads == 0
        await image.write(20480, memoryview(b"x"))
        asking = asyncio.ensure_future(image.bits("recording"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert file.reads == 1 and not asking.done()
        await image.write(40960, memoryview(b"x"))
        file.gate.set()
        assert dirty(await asking) == [(0, 8192), (20480, 4096), (40960, 4096)]
        await image.write(61440, memoryview(b"x"))
        expected = [(0, 8192), (20480, 4096), (40960, 4096), (61440, 4096)]
        assert dirty(await image.bits("recording")) == expected
        await image.close()
        assert file.reads == 2  # once to load, once to compare
        found = (await seen_again(bench))["recording"]
        assert (found.dirty, found.flags) == (expected, ("auto",))

    asyncio.run(main())


def test_closing_waits_for_bits_that_are_being_loaded() -> None:
    async def main() -> None:
        bench = Bench(built(*BITMAPS))
        image, file = await late(bench)
        await image.write(20480, memoryview(b"x"))
        closing = asyncio.ensure_future(image.close())
        for _ in range(100):
            await asyncio.sleep(0)
        assert file.reads == 1 and not closing.done()
        file.gate.set()
        await closing
        found = (await seen_again(bench))["recording"]
        assert (found.dirty, found.flags) == ([(0, 8192), (20480, 4096)], ("auto",))

    asyncio.run(main())


def test_bits_that_nothing_was_added_to_are_not_waited_for() -> None:
    async def main(go_on: bool) -> None:
        bench = Bench(built(*BITMAPS))
        image, file = await late(bench)
        for _ in range(20):
            await asyncio.sleep(0)
        assert file.reads == 1
        if go_on:
            await image.reopen(read_only=True)
            file.gate.set()
            assert dirty(await image.bits("recording")) == [(0, 8192)]
        await image.close()
        assert set(bench.changed()) == set()

    asyncio.run(main(False))
    asyncio.run(main(True))


def test_bits_that_cannot_be_loaded_cost_that_bitmap_only(caplog: pytest.LogCaptureFixture) -> None:
    """It is neither shown nor stored, and says IN_USE for good if something was written meanwhile."""

    async def main() -> None:
        bench = Bench(built(*BITMAPS))
        image, file = await late(bench)
        file.failing = True
        file.gate.set()
        await image.write(20480, memoryview(b"x"))
        for _ in range(2):
            with pytest.raises(BitmapError, match="no luck"):
                await image.bits("recording")
        assert dirty(await image.bits("coarse")) == [(0, 65536)]
        with pytest.raises(ImageError, match=r"'recording'.*no luck.*marked as in use, the data is safe"):
            await image.close()
        found = await seen_again(bench)
        assert "in-use" in found["recording"].flags
        assert (found["coarse"].dirty, found["coarse"].flags) == ([(0, 65536)], ("auto",))
        view = bytearray(1)
        image = await bench.open()
        await image.read_into(memoryview(view), 20480)
        assert view == b"x"
        assert image.tracker.get("recording").state is BitmapState.INCONSISTENT  # type: ignore[union-attr]
        await image.close()

        # Without a write it misses nothing. With one, another try may succeed.
        for write in (False, True):
            bench = Bench(built(*BITMAPS))
            image, file = await late(bench)
            file.failing = True
            file.gate.set()
            if write:
                await image.write(20480, memoryview(b"x"))
            with pytest.raises(BitmapError, match="no luck"):
                await image.bits("recording")
            file.failing = not write
            await image.close()
            seen = (await seen_again(bench))["recording"]
            assert seen.flags == ("auto",)
            assert seen.dirty == [(0, 8192), (20480, 4096)][: 2 if write else 1]

    caplog.set_level(logging.CRITICAL)
    asyncio.run(main())
