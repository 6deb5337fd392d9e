"""An asyncio NBD client: one export of one server, as reads, writes and extents.

::

    async with await NbdClient.connect("nbd://localhost", contexts=["base:allocation"]) as client:
        first, second = await asyncio.gather(client.read(0, 4096), client.read(4096, 4096))
        extents = await client.block_status(0, client.size)

Requests may be in flight in any number: start them from several tasks. After an error of the connection
(as opposed to the server's refusal of one request) every call fails with that same error.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from types import TracebackType

from nbdbm import uri as uris
from nbdbm.clientlink import Link
from nbdbm.errors import NbdError
from nbdbm.extents import Extent, ExtentList
from nbdbm.nbd.catalog import ExportInfo
from nbdbm.nbd.client import (
    ClientProtocol,
    ContextsListed,
    ContextsSelected,
    ExportsListed,
    InfoReceived,
    ListedExport,
    Ready,
    Reply,
)
from nbdbm.nbd.constants import MAX_PAYLOAD, CmdFlag
from nbdbm.uri import NbdUri

DEFAULT_TIMEOUT = 60.0
"""Seconds one option or one request may take; a full payload then still passes a link of 0.5 MB/s."""

MAX_COMPACT_LENGTH = (1 << 32) - (1 << 21)
"""Bytes in one request without payload under 32-bit headers; a multiple of every qcow2 cluster size, so
that splitting a long request breaks no alignment the server asks for."""

MAX_EXTENDED_LENGTH = 1 << 62
"""The same under 64-bit headers: as much as any disk has."""

MAX_EXTENTS = 4 << 20
"""Extents of one context that ``block_status`` collects, about 400 MiB: a server may invent any number.
``extents`` streams them instead."""


class NbdClient:
    """One connection to one export of an NBD server. Made by ``connect``, or by ``open`` and ``go``.

    Offsets and lengths are bytes. Every method raises NbdError: with the server's errno if it refused
    this one request, with the connection's if that is lost.
    """

    def __init__(self, core: ClientProtocol, link: Link) -> None:
        """Internal: see ``connect``."""
        self.uri = link.uri
        self._core = core
        self._link = link

    # lifetime

    @classmethod
    async def connect(
        cls,
        uri: NbdUri | str,
        *,
        contexts: Sequence[str] = (),
        structured: bool = True,
        extended: bool = True,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> NbdClient:
        """Connect and enter transmission on the export that ``uri`` names, with all of ``contexts``.

        Args:
            structured: ask for structured replies; False leaves simple ones and no contexts.
            extended: ask for 64-bit headers, falling back to structured replies.
            timeout: seconds that any one option or request may take.

        Raises:
            NbdError: also when the server lacks one of ``contexts``.
            UsageError: ``uri`` is no NBD URI.
        """
        client = await cls.open(uri, structured=structured, extended=extended, timeout=timeout)
        try:
            await client.go(contexts)
        except NbdError:
            await client.close()
            raise
        except BaseException:
            client._link.abort()
            raise
        return client

    @classmethod
    async def open(
        cls,
        uri: NbdUri | str,
        *,
        structured: bool = True,
        extended: bool = True,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> NbdClient:
        """Connect and stop in the handshake: ``list_*`` and ``info`` may be asked, and in the end ``go``."""
        if isinstance(uri, str):
            uri = uris.parse(uri)
        core = ClientProtocol(structured=structured, extended=extended, tls=uri.encrypted)
        return cls(core, await Link.connect(uri, core, timeout))

    async def close(self) -> None:
        """Say goodbye and close; idempotent. Requests in flight fail."""
        await self._link.close()

    async def __aenter__(self) -> NbdClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # handshake

    async def list_exports(self) -> tuple[ListedExport, ...]:
        """The exports that the server admits to."""
        return (await self._link.ask(ExportsListed, "listing the exports", self._core.list_exports)).exports

    async def info(self) -> ExportInfo:
        """What the server tells about the export of our URI before ``go``; without contexts."""
        name = self.uri.export
        return (await self._link.ask(InfoReceived, f"export {name!r}", partial(self._core.info, name))).info

    async def list_contexts(self, queries: Sequence[str] = ()) -> tuple[str, ...]:
        """The metadata contexts that match ``queries``, or all that there are."""
        self._need_contexts()
        name = self.uri.export
        option = partial(self._core.list_contexts, name, queries)
        return (await self._link.ask(ContextsListed, f"contexts of export {name!r}", option)).names

    async def go(self, contexts: Sequence[str] = ()) -> ExportInfo:
        """Select all of ``contexts``, or raise, and enter transmission: requests may follow."""
        name = self.uri.export
        if contexts:
            self._need_contexts()
            option = partial(self._core.set_contexts, name, contexts)
            selected = await self._link.ask(ContextsSelected, f"contexts of export {name!r}", option)
            granted = {context for _, context in selected.contexts}
            for context in contexts:
                if context not in granted:
                    raise NbdError(f"{self.uri}: no metadata context {context!r}", errno.ENOENT)
        return (await self._link.ask(Ready, f"export {name!r}", partial(self._core.go, name))).info

    def _need_contexts(self) -> None:
        if not self._core.structured:
            raise NbdError(
                f"{self.uri}: the server has no structured replies and so no metadata contexts",
                errno.ENOTSUP,
            )

    # what was agreed upon

    @property
    def export(self) -> ExportInfo:
        """The export, once ``go`` is done; its contexts are those selected."""
        assert self._core.export is not None, "go() comes first"
        return self._core.export

    @property
    def size(self) -> int:
        """Of the export, bytes."""
        return self.export.size

    @property
    def contexts(self) -> tuple[str, ...]:
        """Names of the selected metadata contexts."""
        return tuple(self._core.contexts)

    @property
    def structured(self) -> bool:
        return self._core.structured

    @property
    def extended(self) -> bool:
        return self._core.extended

    # requests

    async def read(self, offset: int, length: int) -> memoryview:
        """Return ``length`` bytes; longer ranges than the server answers at once are read in turn."""
        if 0 < length <= self._max_payload:
            self._check_range(offset, length)
            return await self._read(offset, length)
        data = memoryview(bytearray(length))
        await self.read_into(data, offset)
        return data

    async def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` (bytes, writable) from ``offset``."""
        for at, length in self._pieces(offset, len(view), self._max_payload):
            view[at - offset : at - offset + length] = await self._read(at, length)

    async def _read(self, offset: int, length: int) -> memoryview:
        reply = await self._request(offset, length, partial(self._core.read, offset, length))
        assert reply.data is not None and len(reply.data) == length, "the core gives all data or an error"
        return reply.data

    async def write(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        """Write ``data``; with ``fua`` it is on stable storage on return. Leave ``data`` alone meanwhile."""
        view = memoryview(data)
        for at, length in self._pieces(offset, len(view), self._max_payload):
            piece = view[at - offset : at - offset + length]
            await self._request(at, length, partial(self._core.write, at, piece, _fua(fua)))

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> None:
        """Make the range read as zeroes; ``no_hole`` keeps it allocated, ``fast`` fails if that is slow."""
        flags = _fua(fua)
        if no_hole:
            flags |= CmdFlag.NO_HOLE
        if fast:
            flags |= CmdFlag.FAST_ZERO
        await self._long_request(self._core.write_zeroes, offset, length, flags)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Tell the server that the range is no longer needed; its content is undefined afterwards."""
        await self._long_request(self._core.trim, offset, length, _fua(fua))

    async def cache(self, offset: int, length: int) -> None:
        """Hint that the range will be read soon."""
        # It has no payload, but servers limit it as if it had, for they read that much at once.
        for start, step in self._pieces(offset, length, self._max_payload):
            await self._request(start, step, partial(self._core.cache, start, step))

    async def flush(self) -> None:
        """Return once every write that was answered before is on stable storage."""
        await self._link.request("flush", self._core.flush)

    async def status(
        self, offset: int, length: int, contexts: Sequence[str] | None = None
    ) -> dict[str, ExtentList]:
        """Ask once about the range: by context, extents of a non-empty prefix of it.

        The prefixes may differ in length. ``block_status`` and ``extents`` ask on for the rest.
        """
        wanted = self.contexts if contexts is None else tuple(contexts)
        for name in wanted:
            if name not in self._core.contexts:
                raise NbdError(f"{self.uri}: metadata context {name!r} was not selected", errno.EINVAL)
        self._check_range(offset, length)
        length = min(length, self._max_length)
        narrowed = None if set(wanted) == set(self._core.contexts) else wanted
        build = partial(self._core.block_status, offset, length, CmdFlag(0), narrowed)
        reply = await self._request(offset, length, build)
        found = reply.extents or {}
        for name in wanted:
            if name not in found or not found[name].covered:
                raise self._link.give_up(f"the server's block status says nothing about {name!r} at {offset}")
        return {name: found[name] for name in wanted}

    async def block_status(
        self, offset: int, length: int, contexts: Sequence[str] | None = None
    ) -> dict[str, list[Extent]]:
        """The extents of the whole range, by context: those named, or all that were selected.

        Neighbours differ, and the lengths of each list add up to ``length``.
        """
        wanted = self.contexts if contexts is None else tuple(contexts)
        answer: dict[str, list[Extent]] = {name: [] for name in wanted}
        position, end = offset, offset + length
        while position < end and wanted:
            found = await self.status(position, end - position, wanted)
            # Contexts may be described to different lengths: keep what is known of all, ask for the rest.
            common = min(extents.covered for extents in found.values())
            for name, extents in found.items():
                _append(answer[name], extents, common)
                if len(answer[name]) > MAX_EXTENTS:
                    raise self._link.give_up(f"{name}: more than {MAX_EXTENTS} extents in {length} bytes")
            position += common
        return answer

    async def extents(
        self, context: str, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[Extent]:
        """Stream the extents of one context over the range (the whole disk), in bounded memory.

        Their lengths add up to the range; neighbours may be alike where one answer ends.
        """
        end = self.size if length is None else offset + length
        while offset < end:
            found = (await self.status(offset, end - offset, (context,)))[context]
            for extent in found:
                yield extent
            offset += found.covered

    # inside

    @property
    def _max_payload(self) -> int:
        # 0xffffffff is legal and says that there is no limit; we have one.
        return min(self.export.maximum_payload, MAX_PAYLOAD)

    @property
    def _max_length(self) -> int:
        return MAX_EXTENDED_LENGTH if self._core.extended else MAX_COMPACT_LENGTH

    async def _long_request(
        self, build: Callable[..., int], offset: int, length: int, *flags: CmdFlag
    ) -> None:
        """Send requests without payload, as many as the headers' width makes necessary."""
        for at, step in self._pieces(offset, length, self._max_length):
            await self._request(at, step, partial(build, at, step, *flags))

    async def _request(self, offset: int, length: int, build: Callable[[], int]) -> Reply:
        return await self._link.request(f"{offset}+{length}", build)

    def _pieces(self, offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
        """Cut a range of the disk into (offset, length) of at most ``most`` bytes each."""
        self._check_range(offset, length)
        end = offset + length
        while offset < end:
            step = min(most, end - offset)
            yield offset, step
            offset += step

    def _check_range(self, offset: int, length: int) -> None:
        if not 0 <= offset <= offset + length <= self.size:
            raise NbdError(
                f"{self.uri}: {offset}+{length} lies outside the disk of {self.size} bytes", errno.EINVAL
            )


def _fua(fua: bool) -> CmdFlag:
    return CmdFlag.FUA if fua else CmdFlag(0)


def _append(into: list[Extent], extents: ExtentList, length: int) -> None:
    """Add the first ``length`` bytes' extents, joining the first with its like."""
    for extent in extents:
        step = min(extent.length, length)
        if step == 0:
            return
        if into and into[-1].flags == extent.flags:
            into[-1] = Extent(into[-1].length + step, extent.flags)
        else:
            into.append(Extent(step, extent.flags))
        length -= step
