"""Where ``nbdbm map`` gets extents from: an image file through the engine, or a server through NBD."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Protocol

from nbdbm.errors import UsageError
from nbdbm.extents import Extent
from nbdbm.nbd.constants import CONTEXT_BITMAP

if TYPE_CHECKING:
    from nbdbm.client import NbdClient
    from nbdbm.image.image import Image, OpenOptions


class MapSource(Protocol):
    """A disk that can be described. ``select`` comes first; ``close`` in the end."""

    @property
    def size(self) -> int:
        """Bytes."""

    async def contexts(self) -> Sequence[str]:
        """Every metadata context there is."""

    def refusal(self, bitmap: str) -> str | None:
        """Why this bitmap is there but makes no context, where that is known."""

    async def select(self, contexts: Sequence[str]) -> None:
        """Say which of them will be asked for."""

    def extents(self, context: str) -> AsyncIterator[Extent]:
        """The whole disk in one selected context, front to back, in bounded memory."""

    async def close(self) -> None:
        """Let go of file or connection."""


class ImageSource:
    """An image file, read by the engine itself."""

    def __init__(self, image: Image) -> None:
        from nbdbm.exports import Export

        self._image = image
        self._export = Export.of(image)

    @classmethod
    async def open(cls, path: str, options: OpenOptions) -> ImageSource:
        """Open the image; raises ImageError and its kin."""
        from nbdbm.image.image import Image

        return cls(await Image.open(path, options))

    @property
    def size(self) -> int:
        return self._export.info.size

    async def contexts(self) -> Sequence[str]:
        return self._export.info.contexts

    def refusal(self, bitmap: str) -> str | None:
        found = self._image.tracker.get(bitmap)
        return None if found is None else found.refusal

    async def select(self, contexts: Sequence[str]) -> None:
        """Nothing to prepare: the engine answers any of its contexts at any time."""

    async def extents(self, context: str) -> AsyncIterator[Extent]:
        offset, end = 0, self.size
        while offset < end:
            [(_, extents)] = await self._export.block_status([(0, context)], offset, end - offset)
            for extent in extents:
                yield extent
            offset += extents.covered

    async def close(self) -> None:
        await self._export.close()


class ServerSource:
    """An export of an NBD server. One connection: some servers accept no second one."""

    def __init__(self, client: NbdClient) -> None:
        self._client = client

    @classmethod
    async def open(cls, uri: str) -> ServerSource:
        """Connect and stop in the handshake; raises NbdError."""
        from nbdbm.client import NbdClient

        return cls(await NbdClient.open(uri))

    @property
    def size(self) -> int:
        return self._client.size

    async def contexts(self) -> Sequence[str]:
        return await self._client.list_contexts()

    def refusal(self, bitmap: str) -> str | None:
        """A server tells only what it has."""
        return None

    async def select(self, contexts: Sequence[str]) -> None:
        await self._client.go(contexts)

    def extents(self, context: str) -> AsyncIterator[Extent]:
        return self._client.extents(context)

    async def close(self) -> None:
        await self._client.close()


def choose(name: str, available: Sequence[str], source: MapSource, where: str) -> str:
    """The context that ``name`` means: a context's full name, or the bare name of a bitmap."""
    for candidate in (name, CONTEXT_BITMAP + name):
        if candidate in available:
            return candidate
    bitmap = name.removeprefix(CONTEXT_BITMAP)
    if (refusal := source.refusal(bitmap)) is not None:
        raise UsageError(f"{where}: bitmap {bitmap!r}: {refusal}")
    shown = ", ".join(available[:20]) + (", ..." if len(available) > 20 else "")
    raise UsageError(f"{where}: no context {name!r}; there are: {shown or 'none'}")


async def merged(extents: AsyncIterator[Extent]) -> AsyncIterator[tuple[int, int, int]]:
    """(offset, length, flags) with equal neighbours joined, from extents that begin at offset 0."""
    offset = length = flags = 0
    async for extent in extents:
        if length and extent.flags == flags:
            length += extent.length
            continue
        if length:
            yield offset, length, flags
            offset += length
        length, flags = extent
    if length:
        yield offset, length, flags
