"""The client's socket: moves bytes between a ClientProtocol and a server, and matches answers to waiters.

The core judges every byte of the server's. This shell adds what takes a clock and a socket: a time limit
on each answer, a limit on how much one answer of the handshake may bring, and one end to everything: after
the first failure of the connection every waiting and every later call fails with that same error.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from nbdbm.errors import NbdError
from nbdbm.nbd.client import ClientEvent, ClientProtocol, HandshakeReady, OptionRefused, Reply, StartTls
from nbdbm.nbd.constants import NbdErrno
from nbdbm.uri import SCHEME_UNIX, NbdUri

if TYPE_CHECKING:
    from nbdbm.clienttls import ClientTls
    from nbdbm.tunnel import Tunnel

CLOSE_TIMEOUT = 5.0
"""Seconds to wait for the goodbye to be sent; nothing is lost without it."""

MAX_ANSWER = 128 * 1024 * 1024
"""Bytes that the answer to one option may bring: a server may go on listing names, or sending pieces of
information that nobody asked for, until memory or patience ends. QEMU's 65535 bitmaps with the longest
names there are take 70 MB."""

JOIN_BELOW = 64 * 1024
"""Bytes; a payload shorter than this goes out in one piece with its header."""

T = TypeVar("T")


class Link(asyncio.BufferedProtocol):
    """One connection, from its handshake to its end. Made by ``connect``; ``close`` it in the end.

    Every error is an NbdError that begins with the URI.
    """

    def __init__(self, uri: NbdUri, core: ClientProtocol, timeout: float) -> None:
        """Internal: see ``connect``."""
        self.uri = uri
        self._core = core
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._tls: ClientTls | None = None
        self._tunnel: Tunnel | None = None
        """TLS; the transport from the moment when it begins."""
        self._greeting: asyncio.Future[ClientEvent] = self._loop.create_future()
        self._option: asyncio.Future[ClientEvent] | None = self._greeting
        """Who waits for the handshake's next answer."""
        self._answered = 0
        """Bytes that came while it waits."""
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        """Who waits for which cookie. Futures of cancelled callers stay until their reply has come."""
        self._writable = asyncio.Event()
        self._lost = asyncio.Event()
        self._failure: NbdError | None = None
        self._closing = False

    @classmethod
    async def connect(cls, uri: NbdUri, core: ClientProtocol, timeout: float) -> Link:
        """Connect, and return once the server's greeting and the kind of headers are settled.

        Args:
            core: asks for TLS if ``uri`` does.
            timeout: seconds for connecting, and for every answer from then on.

        Raises:
            NbdError: nobody is there, or does not answer as it should.
            UsageError: the certificates or keys that ``uri`` names are of no use.
        """
        link = cls(uri, core, timeout)
        if uri.encrypted:
            from nbdbm.clienttls import ClientTls

            link._tls = ClientTls(uri)
        try:
            async with asyncio.timeout(timeout):
                await link._connect()
        except TimeoutError as error:
            raise NbdError(f"{uri}: cannot connect within {timeout:g} s", errno.ETIMEDOUT) from error
        except OSError as error:
            text = error.strerror or str(error)
            raise NbdError(f"{uri}: cannot connect: {text}", error.errno or errno.EIO) from error
        try:
            await link._answer(link._greeting, HandshakeReady, "handshake")
        except BaseException:
            link.abort()
            raise
        assert link._tunnel is not None or not uri.encrypted, "never in plain text what is to be encrypted"
        return link

    async def _connect(self) -> None:
        loop, uri = self._loop, self.uri
        if uri.plain_scheme == SCHEME_UNIX:
            await loop.create_unix_connection(lambda: self, uri.socket)
            return
        # create_connection tries the addresses too, but tells of several failures in one unreadable line.
        failure: OSError | None = None
        addresses = await loop.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
        for *_, address in addresses:
            try:
                await loop.create_connection(lambda: self, str(address[0]), uri.port)
                return
            except OSError as error:
                failure = error
        assert failure is not None, "getaddrinfo returns an address or raises"
        number = failure.errno or errno.EIO
        raise OSError(number, os.strerror(number)) from failure

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
        self.abort()

    def abort(self) -> None:
        """Close without a goodbye; idempotent."""
        self._fail(NbdError(f"{self.uri}: the connection is closed", errno.ENOTCONN))

    # asking

    async def ask(self, kind: type[T], about: str, option: Callable[[], None]) -> T:
        """Send the option that ``option`` queues in the core, and await its answer, which is of ``kind``.

        Args:
            about: what a refusal's message says it concerns.
        """
        self.check_alive()
        assert self._option is None, "one option at a time"
        option()
        self._answered = 0
        waiter = self._option = self._loop.create_future()
        self._send()
        return await self._answer(waiter, kind, about)

    async def _answer(self, waiter: asyncio.Future[ClientEvent], kind: type[T], about: str) -> T:
        event = await self._await(waiter, about)
        if isinstance(event, OptionRefused):
            raise NbdError(f"{self.uri}: {about}: the server refuses: {event.text}", errno.ENOENT)
        assert isinstance(event, kind), "the core answers each option with its own event"
        return event

    async def request(self, about: str, build: Callable[[], int]) -> Reply:
        """Send the request that ``build`` queues in the core, and await its successful reply.

        Raises:
            NbdError: the server refused it (with the errno it gave), or the connection failed.
        """
        self.check_alive()
        await self._writable.wait()
        self.check_alive()
        waiter: asyncio.Future[Reply] = self._loop.create_future()
        self._replies[build()] = waiter
        self._send()
        reply = await self._await(waiter, about)
        if reply.error:
            raise NbdError(f"{self.uri}: {about}: {_error_text(reply)}", reply.error)
        return reply

    async def _await(self, waiter: asyncio.Future[T], about: str) -> T:
        """Await an answer; a server that is too slow has lost us."""
        try:
            async with asyncio.timeout(self._timeout):
                return await waiter
        except TimeoutError as error:
            text = f"{about}: no answer within {self._timeout:g} s"
            raise self.give_up(text, errno.ETIMEDOUT) from error

    def check_alive(self) -> None:
        """Raise what the connection failed with, if it has."""
        if self._failure is not None:
            raise NbdError(str(self._failure), self._failure.errno) from self._failure
        if self._closing:
            raise NbdError(f"{self.uri}: the connection is being closed", errno.ENOTCONN)

    def give_up(self, what: str, number: int = errno.EPROTO) -> NbdError:
        """Fail the connection for this reason; returns the error for the caller to raise."""
        error = NbdError(f"{self.uri}: {what}", number)
        self._fail(error)
        return error

    # inside

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

    def _start_tls(self) -> None:
        """The transport is the tunnel from now on. The time limit for the greeting runs on."""
        from nbdbm.tunnel import Tunnel

        assert self._transport is not None and self._tls is not None, "the core wants TLS if the URI does"
        tls = self._tls

        def ready() -> None:
            for event in self._core.tls_started():
                self._deliver(event)
            self._send()

        def failed(reason: str) -> None:
            self.give_up(tls.explain(reason))

        tunnel = Tunnel(
            self._transport,
            self,
            tls.context,
            server_side=False,
            hostname=tls.hostname,
            ready=ready,
            failed=failed,
        )
        self._transport = self._tunnel = tunnel
        tunnel.start()

    def _deliver(self, event: ClientEvent) -> None:
        if isinstance(event, StartTls):
            self._start_tls()
        elif isinstance(event, Reply):
            waiter = self._replies.pop(event.cookie)
            if not waiter.done():
                waiter.set_result(event)
        else:
            assert self._option is not None, "the core accepts no answer that was not asked for"
            option, self._option = self._option, None
            if not option.done():
                option.set_result(event)

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
        if self._option is not None:
            self._answered += nbytes
            if self._answered > MAX_ANSWER:
                self.give_up(f"more than {MAX_ANSWER} bytes in answer to one option")
                return
        try:
            events = self._core.buffer_updated(nbytes)
        except NbdError as error:
            self._send()  # the goodbye, if there is one
            self.give_up(str(error), error.errno)
            return
        for event in events:
            self._deliver(event)
        self._send()  # the core may have gone on with the handshake by itself

    def eof_received(self) -> None:
        try:
            self._core.receive_eof()
        except NbdError as error:
            self.give_up(str(error) + self._guess(), error.errno)

    def connection_lost(self, exc: Exception | None) -> None:
        number = (exc.errno if isinstance(exc, OSError) else None) or errno.ECONNRESET
        if self._tunnel is not None and self._tunnel.fault:
            text = f"TLS: {self._tunnel.fault}"
        else:
            text = os.strerror(number) if exc is not None else "the server closed the connection"
            text += self._guess()
        self.give_up(text, number)
        self._lost.set()

    def _guess(self) -> str:
        """What may be the matter if the connection ends now."""
        if self._tunnel is None or self._greeting.done():
            return ""
        # TLS 1.3: our part of the handshake ends before the server has judged our certificate.
        return ", right after TLS's; it may want a client's certificate, or another one"

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()


def _error_text(reply: Reply) -> str:
    """The error's name, and the server's words where there are any."""
    try:
        name = NbdErrno(reply.error).name
    except ValueError:
        name = f"error {reply.error}"
    return f"{name}: {reply.text}" if reply.text not in ("", name) else name
