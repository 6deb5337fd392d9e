"""Writing to raw images."""

from __future__ import annotations

import asyncio
import errno
import logging
from pathlib import Path

import pytest

from nbdbm.errors import ImageError
from nbdbm.image.image import Image
from nbdbm.image.rawwrite import RawWriter
from tests.support.engine import read, use
from tests.support.memfile import MemoryFile, Operation

MIB = 1 << 20


def test_the_file_is_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    model = bytearray(b"A" * (3 * MIB + 17))
    path.write_bytes(model)

    async def work(image: Image) -> None:
        async def compare() -> None:
            assert await read(image, 0, image.size) == model

        for offset, length in ((0, 1), (5, 70_000), (MIB, MIB + 5), (3 * MIB, 17), (3 * MIB + 16, 1)):
            await image.write(offset, memoryview(b"w" * length), fua=length == 17)
            model[offset : offset + length] = b"w" * length
        await compare()
        for offset, length, no_hole in ((7, 100, False), (MIB + 3, MIB, True), (3 * MIB + 1, 16, False)):
            await image.write_zeroes(offset, length, no_hole=no_hole)
            model[offset : offset + length] = bytes(length)
        await compare()
        await image.trim(0, 8192)
        model[:8192] = await read(image, 0, 8192)
        await image.flush()
        await compare()

    use(path, work, read_only=False, format="raw")
    assert path.read_bytes() == model


def test_a_failed_request_is_that_requests_failure() -> None:
    async def run() -> None:
        file = MemoryFile(bytes(8192))
        writer = RawWriter(file)

        def before(operation: Operation) -> None:
            if operation.offset == 4096:
                raise OSError(errno.ENOSPC, "full")

        file.before = before
        for failing in (
            writer.write(4096, memoryview(b"x")),
            writer.write_zeroes(4096, 512, punch=True, fast=False),
            writer.trim(4096, 512),
        ):
            with pytest.raises(OSError, match="full"):
                await failing
        await writer.write(0, memoryview(b"x"))
        await writer.flush()
        assert writer.broken is None and file.data[0] == ord("x")

    asyncio.run(run())


def test_a_failed_sync_ends_writing_with_one_message(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        file = MemoryFile(bytes(8192))
        writer = RawWriter(file)

        def before(operation: Operation) -> None:
            raise OSError(errno.EDQUOT, "over quota")

        file.before = before
        results = await asyncio.gather(*(writer.flush() for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, ImageError) for result in results)
        file.before = None
        with pytest.raises(ImageError, match="accepts no more writes"):
            await writer.flush()
        assert file.count("sync") == 0

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert len(caplog.records) == 1


def test_fast_zeroes_are_refused_where_the_host_would_have_to_write_them() -> None:
    async def run() -> None:
        asked: list[bool] = []
        file = MemoryFile(bytes(8192))
        real = file.zero

        async def zero(offset: int, length: int, *, punch: bool, fallback: bool = True) -> None:
            asked.append(fallback)
            await real(offset, length, punch=punch, fallback=fallback)

        file.zero = zero  # type: ignore[method-assign]
        await RawWriter(file).write_zeroes(0, 512, punch=True, fast=True)
        await RawWriter(file).write_zeroes(0, 512, punch=True, fast=False)
        assert asked == [False, True]

    asyncio.run(run())
