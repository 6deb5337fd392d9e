"""Short conversations beside NBD: a responder with strict limits, and as much HTTP as a scraper needs.

Whoever comes has a few seconds and a few kilobytes for what it wants, and there are few places. Nothing here
can hold up the clients of the exports, and nothing is kept of who was here.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from nbdbm.server.listener import Listener

log = logging.getLogger(__name__)

MAX_CALLERS = 16
"""Conversations at once; who comes beyond is hung up on. A scraper needs one."""

MAX_REQUEST = 8192
"""Bytes of a request's header, or of one line."""

MAX_SECONDS = 5.0
"""For a conversation, from the first byte to the last: those who send or read slowly lose their place."""

SKIPPED = 64 * 1024
"""Bytes after a request that are read and thrown away, so that the answer is not lost to a reset."""

PIECE = 256 * 1024
"""Bytes of a page that are sent in one turn of the event loop."""

PAUSE = 1.0
"""Seconds without accepting after the system ran out of descriptors or memory."""

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Responder:
    """Holds conversations with those who come to ``listener``: ``start``, then ``close`` (idempotent)."""

    def __init__(self, listener: Listener, talk: Talk) -> None:
        self.listener = listener
        self._talk = talk
        self._accepting = False
        self._pause: asyncio.TimerHandle | None = None
        self._callers: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to listen; on failure the listener is closed."""
        try:
            for sock in self.listener.sockets:
                sock.setblocking(False)
            self.listener.listen()
        except BaseException:
            self.listener.close()
            raise
        self._watch()

    async def close(self) -> None:
        """Let nobody else in, and hang up on those who are here."""
        self._unwatch()
        if self._pause is not None:
            self._pause.cancel()
        self.listener.close()
        for task in self._callers:
            task.cancel()
        if self._callers:
            await asyncio.wait(self._callers)

    def _watch(self) -> None:
        self._accepting, self._pause = True, None
        for sock in self.listener.sockets:
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def _unwatch(self) -> None:
        if self._accepting:
            self._accepting = False
            for sock in self.listener.sockets:
                asyncio.get_running_loop().remove_reader(sock)

    def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock, _ = listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.debug("nobody is let in for %g s: %s", PAUSE, error)
            self._unwatch()
            self._pause = loop.call_later(PAUSE, self._watch)
            return
        if len(self._callers) >= MAX_CALLERS:
            sock.close()
            return
        task = loop.create_task(self._converse(sock))
        self._callers.add(task)
        task.add_done_callback(partial(self._parted, sock))

    def _parted(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        sock.close()
        self._callers.discard(task)

    async def _converse(self, sock: socket.socket) -> None:
        transport: asyncio.WriteTransport | None = None
        try:
            async with asyncio.timeout(MAX_SECONDS):
                sock.setblocking(False)
                reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_REQUEST)
                transport = writer.transport
                # 0: drain() returns when the system has everything.
                transport.set_write_buffer_limits(high=0)
                await self._talk(reader, writer)
                await writer.drain()
                writer.write_eof()
                skipped = 0
                while skipped < SKIPPED and (some := await reader.read(MAX_REQUEST)):
                    skipped += len(some)
        except (OSError, TimeoutError, EOFError, ValueError) as error:
            log.debug("a conversation was broken off: %s", error or type(error).__name__)
        except asyncio.CancelledError:
            pass  # by close()
        except Exception:
            log.exception("a conversation failed")  # a bug; the server goes on
        finally:
            if transport is not None:
                transport.abort()


class Page(NamedTuple):
    """What a path answers."""

    status: int
    content: bytes
    kind: str = "text/plain; charset=utf-8"


Pages = dict[str, Callable[[], Awaitable[Page]]]
"""By path."""

REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


def http(pages: Pages) -> Talk:
    """A conversation of one request and one answer: HTTP/1.0 or 1.1, GET and HEAD, no bodies."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):  # nobody is left to be answered
            method, page = await _answer(pages, reader)
            writer.write(_head(page))
            content = memoryview(page.content if method != "HEAD" else b"")
            for start in range(0, len(content), PIECE):
                writer.write(content[start : start + PIECE])
                await writer.drain()  # what is not taken at once would be copied

    return talk


async def _answer(pages: Pages, reader: asyncio.StreamReader) -> tuple[str, Page]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        return "", _error(431)
    words = head.partition(b"\r\n")[0].split(b" ")
    if len(words) != 3 or not words[1].startswith(b"/") or not words[2].startswith(b"HTTP/"):
        return "", _error(400)
    if words[2] not in (b"HTTP/1.0", b"HTTP/1.1"):
        return "", _error(505)
    method = words[0].decode("latin-1")
    made = pages.get(words[1].partition(b"?")[0].decode("latin-1"))
    if made is None:
        return method, _error(404)
    if method not in ("GET", "HEAD"):
        return method, _error(405)
    try:
        return method, await made()
    except Exception:
        log.exception("a page could not be made")
        return method, _error(500)


def _error(status: int) -> Page:
    return Page(status, f"{REASONS[status]}\n".encode())


def _head(page: Page) -> bytes:
    lines = [
        f"HTTP/1.1 {page.status} {REASONS[page.status]}",
        f"Content-Type: {page.kind}",
        f"Content-Length: {len(page.content)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if page.status == 405:
        lines.append("Allow: GET, HEAD")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
