"""TLS over a connection that is there already: between its transport and its protocol.

    transport -> get_buffer/buffer_updated -> decrypt -> the protocol's get_buffer/buffer_updated
    transport <- write, 64 KiB at a time   <- encrypt <- write, send

asyncio's own (``loop.start_tls``) hands data to the protocol before it tells that TLS has begun, encrypts
whatever it is given however little the peer takes, and cannot send without waiting. Here ``ready`` comes
first, no more than one piece is encrypted ahead of what the transport has sent, and what waits is the
writer's own memory, so that backpressure and limits are what they are without TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, cast

log = logging.getLogger(__name__)

PIECE = 64 * 1024
"""Bytes encrypted at a time: one system call for four records. What the peer does not take of it is kept."""

RECEIVE = 128 * 1024
"""Bytes received at a time; the connection keeps what the protocol, having paused, does not want yet."""

MAX_OWN = 64 * 1024
"""Bytes that TLS itself may want to send to a peer that takes nothing (answers to requests for new keys):
one that goes on asking would have us keep all of them."""

_received = memoryview(mmap.mmap(-1, RECEIVE))
"""Shared by all connections: receiving and passing on to TLS run back to back."""

Bytes = bytes | bytearray | memoryview


class Tunnel(asyncio.Transport, asyncio.BufferedProtocol):
    """One TLS connection. Made, then ``start``; what it is given until ``ready`` was called waits.

    Args:
        transport: connected; it is told of nobody else from ``start`` on.
        protocol: its protocol until now, whose transport this is from now on. It learns of the end by
            ``connection_lost``, as always.
        ready: called once TLS's handshake is done, before anything is received.
        failed: called with the reason if that is not to be; the connection is then closed.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        protocol: asyncio.BufferedProtocol,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        hostname: str | None = None,
        ready: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._transport = transport
        self._protocol = protocol
        self._ready = ready
        self._failed = failed
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side, hostname)
        """What was agreed upon, and with whom."""
        self.fault = ""
        """Why TLS ended after its handshake, if it was at fault."""
        self._established = False
        self._over = False
        """The handshake failed, or the connection is lost."""
        self._waiting: deque[memoryview] = deque()
        """What is to be encrypted when the transport has sent what it has."""
        self._blocked = False
        """The transport holds bytes that the peer has not taken."""
        self._paused = False
        self._eof = False
        """The peer will send nothing more: its connection has ended."""
        self._ended = False
        """The protocol knows."""
        self._closing = False

    def start(self) -> None:
        """Begin the handshake, which ends in ``ready`` or ``failed``."""
        self._transport.set_protocol(self)
        self._shake()

    def _shake(self) -> None:
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as error:
            self._flush()  # TLS's own words about it
            self._fail(explain(error))
            return
        self._established = True
        self._flush()
        self._ready()
        while self._waiting and not self._blocked:
            self._write_on()
        self._decrypt()

    def _fail(self, reason: str) -> None:
        if self._over:
            return
        self._over = True
        self._waiting.clear()
        self._transport.close()
        self._failed(reason)

    # -- sending: a transport to the protocol

    def send(self, data: Bytes) -> int:
        """Send what the peer takes without waiting; return how many bytes that were, like a socket."""
        if self._waiting or self._closing or not self._established:
            return 0
        count = self._encrypt(memoryview(data))
        self._flush()
        return count

    def write(self, data: Bytes) -> None:
        """Send, or keep the view (not a copy) until the peer takes it."""
        self.writelines((data,))

    def writelines(self, list_of_data: Iterable[Bytes]) -> None:
        """The same for several, which share system calls."""
        if self._closing or self._over:
            return
        for data in list_of_data:
            view = memoryview(data)
            count = 0 if self._waiting or not self._established else self._encrypt(view)
            if count < len(view):
                self._waiting.append(view[count:])
        self._flush()

    def _encrypt(self, view: memoryview) -> int:
        """Encrypt as long as the peer takes it; return how many bytes that were. ``_flush`` follows."""
        at = 0
        while at < len(view) and not self._blocked:
            try:
                at += self.tls.write(view[at : at + PIECE])
            except ssl.SSLError as error:
                self._broken(error)
                return len(view)
            if self._outgoing.pending >= PIECE:
                self._flush()
        return at

    def _flush(self) -> None:
        """Give the transport what is encrypted; it says at once if the peer does not take it all."""
        if not self._outgoing.pending:
            return
        if not self._blocked:
            self._transport.write(self._outgoing.read())
        elif self._outgoing.pending > MAX_OWN:
            log.debug("a peer asks for answers of TLS itself and takes none")
            self.abort()

    def _write_on(self) -> None:
        view = self._waiting.popleft()
        count = self._encrypt(view)
        if count < len(view):
            self._waiting.appendleft(view[count:])
        self._flush()

    def get_write_buffer_size(self) -> int:
        held = self._transport.get_write_buffer_size() + self._outgoing.pending
        return held + sum(map(len, self._waiting))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._transport.set_write_buffer_limits(high, low)

    def close(self) -> None:
        """Close once everything is sent, TLS first."""
        if not self._closing:
            self._closing = True
            if not self._waiting:
                self._finish()

    def _finish(self) -> None:
        # Our half of the goodbye. The peer's is not waited for: NBD has said goodbye, or nothing helps.
        with contextlib.suppress(ssl.SSLError, ValueError):
            self.tls.unwrap()
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._closing = True
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._paused = True
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
            # Never from here: the protocol may be in the middle of something.
            asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        try:
            self._decrypt()
        except BaseException:
            # A bug: this connection ends, as it does where the transport has called us.
            self.abort()
            raise

    # -- receiving: the transport's protocol

    def get_buffer(self, sizehint: int) -> memoryview:
        return _received

    def buffer_updated(self, nbytes: int) -> None:
        if self._over or self._ended or self._closing:
            return
        self._incoming.write(_received[:nbytes])
        if self._established:
            self._decrypt()
        else:
            self._shake()

    def _decrypt(self) -> None:
        """Pass on what has been received, as long as the protocol wants it."""
        fault: ssl.SSLError | None = None
        while not (self._paused or self._ended or self._closing or self._over) and self._anything:
            buffer = memoryview(self._protocol.get_buffer(-1))
            count = 0
            try:
                while count < len(buffer) and self._anything:
                    got = cast(int, self.tls.read(len(buffer) - count, buffer[count:]))
                    if not got:
                        self._eof = True  # TLS's goodbye; what follows it is not TLS
                        self._incoming.read()
                        break
                    count += got
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                fault = error
            if count:
                self._protocol.buffer_updated(count)
            if fault is not None or not count:
                break
        self._flush()  # answers of TLS itself
        if fault is not None:
            self._broken(fault)
        elif self._eof and not (self._ended or self._paused or self._anything or self._over):
            self._ended = True
            if not self._protocol.eof_received():
                self.close()

    @property
    def _anything(self) -> bool:
        """Whether there is something to decrypt, if perhaps not all of it."""
        return bool(self._incoming.pending or self.tls.pending())

    def _broken(self, error: ssl.SSLError) -> None:
        self.fault = explain(error)
        log.debug("TLS broke: %s", self.fault)
        self._flush()
        self.abort()

    def eof_received(self) -> bool:
        self._eof = True
        if not self._established:
            self._fail("the peer closed the connection during TLS's handshake")
            return False
        self._decrypt()
        # Not closed by the transport: the protocol decides, it may have something to send.
        return True

    def pause_writing(self) -> None:
        self._blocked = True
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._blocked = False
        self._flush()
        while self._waiting and not self._blocked:
            if not self._established:
                return
            self._write_on()
        if self._blocked:
            return
        if self._closing:
            self._finish()
        else:
            self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.clear()
        if not self._established:
            self._fail("the connection was lost during TLS's handshake")
        self._over = True
        self._protocol.connection_lost(exc)


def explain(error: ssl.SSLError) -> str:
    """What went wrong, for people: ``certificate verify failed: certificate has expired``."""
    reason = (error.reason or error.strerror or str(error)).replace("_", " ").lower()
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{reason}: {error.verify_message}"
    return reason
