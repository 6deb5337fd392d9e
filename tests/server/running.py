"""A server in this process on a Unix socket, for the length of a test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nbdbm.config import ListenConfig, ServerConfig
from nbdbm.exports import Export
from nbdbm.registry import ExportRegistry
from nbdbm.server.listener import bind
from nbdbm.server.server import Server
from tests.server.memimage import MemoryImage
from tests.server.rawclient import RawClient

TIMEOUT = 30


@asynccontextmanager
async def running(
    image: MemoryImage, place: Path, config: ServerConfig | None = None, **options: Any
) -> AsyncIterator[tuple[Server, str]]:
    """A server of ``image``; closed in the end. Yields it and its socket's path."""
    registry = ExportRegistry()
    registry.add(Export.of(image, **options))  # type: ignore[arg-type]
    server = Server(registry, config)
    path = str(place / "s")
    await server.start([bind(ListenConfig(socket=path))])
    try:
        yield server, path
    finally:
        server.hurry()
        if image.gate is not None:
            image.gate.set()
        await server.close()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine, bounded in time."""
    asyncio.run(asyncio.wait_for(main(), TIMEOUT))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the server is about to do."""
    while not condition():  # noqa: ASYNC110  what is waited for has no event
        await asyncio.sleep(0.001)


async def connected(path: str, export: str = "") -> RawClient:
    """A client in transmission, simple replies."""
    client = await RawClient.connect(path)
    assert (await client.go(export))[-1][0] == 1
    return client
