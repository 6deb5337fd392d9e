"""An asyncio NBD client: the socket around ``nbdbm.nbd.client.ClientProtocol``.

The protocol core judges every byte of the server's; this shell moves bytes, matches replies to the
requests that wait for them, and turns whatever goes wrong into one NbdError that names the server.

::

    async with await NbdClient.connect("nbd://localhost", contexts=["base:allocation"]) as client:
        first, second = await asyncio.gather(client.read(0, 4096), client.read(4096, 4096))
        extents = await client.block_status(0, client.size)

Requests may be in flight in any number: start them from several tasks. After an error of the connection
(as opposed to the server's refusal of one request) every call fails with that same error.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from nbdbm import uri as uris
from nbdbm.errors import NbdError
from nbdbm.extents import Extent, ExtentList
from nbdbm.nbd.catalog import ExportInfo
from nbdbm.nbd.client import (
    ClientEvent,
    ClientProtocol,
    ContextsListed,
    ContextsSelected,
    ExportsListed,
    HandshakeReady,
    InfoReceived,
    ListedExport,
    OptionRefused,
    Ready,
    Reply,
)
from nbdbm.nbd.constants import CmdFlag, NbdErrno
from nbdbm.uri import NbdUri

DEFAULT_TIMEOUT = 60.0
"""Seconds one option or one request may take; a full payload then still passes a link of 0.5 MB/s."""

CLOSE_TIMEOUT = 5.0
"""Seconds to wait for the goodbye to be sent; nothing is lost without it."""

MAX_COMPACT_LENGTH = (1 << 32) - (1 << 21)
"""Bytes in one request without payload under 32-bit headers; a multiple of every qcow2 cluster size, so
that splitting a long request breaks no alignment the server asks for."""

MAX_EXTENDED_LENGTH = 1 << 62
"""The same under 64-bit headers: as much as any disk has."""

MAX_EXTENTS = 4 << 20
"""Extents of one context that ``block_status`` collects, about 400 MiB: a server may invent any number.
``extents`` streams them instead."""

JOIN_BELOW = 64 * 1024
"""Bytes; a payload shorter than this goes out in one piece with its header."""

T = TypeVar("T")


class NbdClient(asyncio.BufferedProtocol):
    """One connection to one export of an NBD server. Made by ``connect``, or by ``open`` and ``go``.

    Offsets and lengths are bytes. Every method raises NbdError: with the server's errno if it refused
    this one request, with the connection's if that is lost.
    """

    def __init__(self, uri: NbdUri, core: ClientProtocol, timeout: float) -> None:
        """Internal: see ``connect``."""
        self.uri = uri
        self._core = core
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._option: asyncio.Future[ClientEvent] | None = None
        """Who waits for the handshake's next answer: at first for the greeting."""
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        """Who waits for which cookie. Futures of cancelled callers stay until their reply has come."""
        self._writable = asyncio.Event()
        self._lost = asyncio.Event()
        self._failure: NbdError | None = None
        self._closing = False

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
        except BaseException:
            client._abort()
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
        core = ClientProtocol(structured=structured, extended=extended)
        client = cls(uri, core, timeout)
        greeting = client._option = client._loop.create_future()
        try:
            async with asyncio.timeout(timeout):
                await client._connect_transport()
        except TimeoutError as error:
            raise NbdError(f"{uri}: cannot connect within {timeout:g} s", errno.ETIMEDOUT) from error
        except OSError as error:
            text = error.strerror or str(error)
            raise NbdError(f"{uri}: cannot connect: {text}", error.errno or errno.EIO) from error
        try:
            await client._answer(greeting, HandshakeReady, "handshake")
        except BaseException:
            client._abort()
            raise
        return client

    async def _connect_transport(self) -> None:
        loop, uri = self._loop, self.uri
        if uri.scheme == uris.SCHEME_UNIX:
            await loop.create_unix_connection(lambda: self, uri.socket)
            return
        # create_connection tries the addresses too, but tells of several failures in one unreadable line.
        failure: OSError | None = None
        addresses = await loop.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
        for address in addresses:
            try:
                await loop.create_connection(lambda: self, str(address[4][0]), uri.port)
                return
            except OSError as error:
                failure = error
        assert failure is not None, "getaddrinfo returns an address or raises"
        raise OSError(failure.errno, os.strerror(failure.errno or errno.EIO)) from failure

    async def close(self) -> None:
        """Say goodbye and close; idempotent. Requests in flight fail."""
        if not self._closing and self._failure is None and self._transport is not None:
            self._closing = True
            if self._core.export is None:
                self._core.abort()
            else:
                self._core.disc()
            self._send()
            self._transport.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._timeout, CLOSE_TIMEOUT)):
                    await self._lost.wait()
        self._abort()

    def _abort(self) -> None:
        self._fail(NbdError(f"{self.uri}: the connection is closed", errno.ENOTCONN))

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
        return (await self._ask(ExportsListed, "listing the exports", self._core.list_exports)).exports

    async def info(self) -> ExportInfo:
        """What the server tells about the export of our URI before ``go``; without contexts."""
        name = self.uri.export
        return (await self._ask(InfoReceived, f"export {name!r}", partial(self._core.info, name))).info

    async def list_contexts(self, queries: Sequence[str] = ()) -> tuple[str, ...]:
        """The metadata contexts that match ``queries``, or all that there are."""
        self._need_contexts()
        name = self.uri.export
        option = partial(self._core.list_contexts, name, queries)
        return (await self._ask(ContextsListed, f"contexts of export {name!r}", option)).names

    async def go(self, contexts: Sequence[str] = ()) -> ExportInfo:
        """Select all of ``contexts``, or raise, and enter transmission: requests may follow."""
        name = self.uri.export
        if contexts:
            self._need_contexts()
            option = partial(self._core.set_contexts, name, contexts)
            selected = await self._ask(ContextsSelected, f"contexts of export {name!r}", option)
            granted = {context for _, context in selected.contexts}
            for context in contexts:
                if context not in granted:
                    raise NbdError(f"{self.uri}: no metadata context {context!r}", errno.ENOENT)
        return (await self._ask(Ready, f"export {name!r}", partial(self._core.go, name))).info

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
        if length <= self._max_payload:
            return await self._read(offset, length)
        data = memoryview(bytearray(length))
        await self.read_into(data, offset)
        return data

    async def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` (bytes, writable) from ``offset``."""
        for start, length in _pieces(0, len(view), self._max_payload):
            view[start : start + length] = await self._read(offset + start, length)

    async def _read(self, offset: int, length: int) -> memoryview:
        if length == 0:
            return memoryview(b"")
        reply = await self._request(offset, length, partial(self._core.read, offset, length))
        assert reply.data is not None and len(reply.data) == length, "the core gives all data or an error"
        return reply.data

    async def write(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        """Write ``data``; with ``fua`` it is on stable storage on return. Leave ``data`` alone meanwhile."""
        view = memoryview(data)
        for start, length in _pieces(0, len(view), self._max_payload):
            piece = view[start : start + length]
            await self._request(
                offset + start, length, partial(self._core.write, offset + start, piece, _fua(fua))
            )

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
        await self._long_request(self._core.cache, offset, length)

    async def flush(self) -> None:
        """Return once every write that was answered before is on stable storage."""
        await self._request(0, 0, self._core.flush)

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
        length = min(length, self._max_length)
        narrowed = None if set(wanted) == set(self._core.contexts) else wanted
        build = partial(self._core.block_status, offset, length, CmdFlag(0), narrowed)
        reply = await self._request(offset, length, build)
        found = reply.extents or {}
        for name in wanted:
            if name not in found or not found[name].covered:
                raise self._break(f"the server's block status says nothing about {name!r} at {offset}")
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
                    raise self._break(f"{name}: more than {MAX_EXTENTS} extents in {length} bytes")
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
        return self.export.maximum_payload

    @property
    def _max_length(self) -> int:
        return MAX_EXTENDED_LENGTH if self._core.extended else MAX_COMPACT_LENGTH

    async def _ask(self, kind: type[T], about: str, option: Callable[[], None]) -> T:
        """Send the option that ``option`` queues in the core, and await its answer, of this kind."""
        self._check_alive()
        assert self._option is None, "one option at a time"
        option()
        waiter = self._option = self._loop.create_future()
        self._send()
        return await self._answer(waiter, kind, about)

    async def _answer(self, waiter: asyncio.Future[ClientEvent], kind: type[T], about: str) -> T:
        event = await self._await(waiter, about)
        if isinstance(event, OptionRefused):
            raise NbdError(f"{self.uri}: {about}: the server refuses: {event.text}", errno.ENOENT)
        assert isinstance(event, kind), "the core answers each option with its own event"
        return event

    async def _long_request(
        self, build: Callable[..., int], offset: int, length: int, *flags: CmdFlag
    ) -> None:
        """Send requests without payload, as many as the headers' width makes necessary."""
        for start, step in _pieces(offset, length, self._max_length):
            await self._request(start, step, partial(build, start, step, *flags))

    async def _request(self, offset: int, length: int, build: Callable[[], int]) -> Reply:
        """Send the request that ``build`` queues in the core, and await its successful reply."""
        self._check_alive()
        if offset < 0 or length < 0 or offset + length > self.size:
            raise NbdError(
                f"{self.uri}: {offset}+{length} lies outside the disk of {self.size} bytes", errno.EINVAL
            )
        await self._writable.wait()
        self._check_alive()
        waiter: asyncio.Future[Reply] = self._loop.create_future()
        self._replies[build()] = waiter
        self._send()
        reply = await self._await(waiter, f"request {offset}+{length}")
        if reply.error:
            raise NbdError(f"{self.uri}: {offset}+{length}: {_error_text(reply)}", reply.error)
        return reply

    async def _await(self, waiter: asyncio.Future[T], about: str) -> T:
        """Await an answer; a server that is too slow has lost us."""
        try:
            async with asyncio.timeout(self._timeout):
                return await waiter
        except TimeoutError as error:
            text = f"{about}: no answer within {self._timeout:g} s"
            raise self._break(text, errno.ETIMEDOUT) from error

    def _send(self) -> None:
        """Hand everything that the core has queued to the transport."""
        assert self._transport is not None
        small: list[bytes | memoryview] = []
        for part in self._core.data_to_send():
            if len(part) < JOIN_BELOW:
                small.append(part)
                continue
            if small:
                self._transport.write(b"".join(small))
                small = []
            self._transport.write(part)
        if small:
            self._transport.write(b"".join(small))

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise NbdError(str(self._failure), self._failure.errno) from self._failure
        assert self._transport is not None and not self._closing

    def _break(self, what: str, number: int = errno.EPROTO) -> NbdError:
        """Give the connection up for this reason; returns the error to raise."""
        error = NbdError(f"{self.uri}: {what}", number)
        self._fail(error)
        return error

    def _fail(self, error: NbdError) -> None:
        """Every waiting and every later call fails with ``error``; the first one stays."""
        if self._failure is not None:
            return
        self._failure = error
        if self._transport is not None:
            self._transport.abort()
        waiters: list[asyncio.Future[Any] | None] = [self._option, *self._replies.values()]
        for waiter in waiters:
            if waiter is not None and not waiter.done():
                waiter.set_exception(NbdError(str(error), error.errno))
                waiter.exception()  # marks it as seen: its caller may have given up waiting
        self._option = None
        self._replies.clear()
        self._writable.set()

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._core.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self._failure is not None or self._closing:
            return
        try:
            events = self._core.buffer_updated(nbytes)
        except NbdError as error:
            self._break(str(error), error.errno)
            return
        for event in events:
            self._deliver(event)
        self._send()  # the core may have gone on with the handshake by itself

    def _deliver(self, event: ClientEvent) -> None:
        if isinstance(event, Reply):
            waiter = self._replies.pop(event.cookie)
            if not waiter.done():
                waiter.set_result(event)
        else:
            assert self._option is not None, "the core accepts no answer that was not asked for"
            option, self._option = self._option, None
            if not option.done():
                option.set_result(event)

    def eof_received(self) -> None:
        try:
            self._core.receive_eof()
        except NbdError as error:
            self._break(str(error), error.errno)

    def connection_lost(self, exc: Exception | None) -> None:
        number = (exc.errno if isinstance(exc, OSError) else None) or errno.ECONNRESET
        text = os.strerror(number) if exc is not None else "the server closed the connection"
        self._break(text, number)
        self._lost.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()


def _fua(fua: bool) -> CmdFlag:
    return CmdFlag.FUA if fua else CmdFlag(0)


def _pieces(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut a range into (offset, length) of at most ``most`` bytes each."""
    end = offset + length
    while offset < end:
        step = min(most, end - offset)
        yield offset, step
        offset += step


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


def _error_text(reply: Reply) -> str:
    """The error's name, and the server's words where there are any."""
    try:
        name = NbdErrno(reply.error).name
    except ValueError:
        name = f"error {reply.error}"
    return f"{name}: {reply.text}" if reply.text else name
