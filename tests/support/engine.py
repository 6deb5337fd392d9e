"""Using the engine from a plain test: open, read all, walk the status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from nbdbm.image.image import Image, OpenOptions, Run

T = TypeVar("T")


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[Image]:
    """The image at ``path``, closed in the end."""
    image = await Image.open(str(path), OpenOptions(**options))
    try:
        yield image
    finally:
        await image.close()


def use(path: Path, function: Callable[[Image], Awaitable[T]], **options: Any) -> T:
    """Open the image, await ``function`` with it, and close it."""

    async def run() -> T:
        async with opened(path, **options) as image:
            return await function(image)

    return asyncio.run(run())


async def read(image: Image, offset: int, length: int) -> bytes:
    """The range, into a buffer that held something else."""
    buffer = bytearray(b"\xaa" * length)
    await image.read_into(memoryview(buffer), offset)
    return bytes(buffer)


async def read_all(image: Image, step: int = 1 << 20) -> bytes:
    """The whole disk."""
    return b"".join([await read(image, at, min(step, image.size - at)) for at in range(0, image.size, step)])


async def walk(image: Image) -> list[Run]:
    """The status of the whole disk, merged."""
    runs: list[Run] = []
    offset = 0
    while offset < image.size:
        more = await image.status(offset, image.size - offset)
        assert more and all(run.length > 0 for run in more)
        for run in more:
            offset += run.length
            if runs and runs[-1][1:] == run[1:]:
                run = run._replace(length=runs.pop().length + run.length)
            runs.append(run)
    assert offset == image.size
    return runs
