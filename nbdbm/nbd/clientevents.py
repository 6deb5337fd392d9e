"""What the client's core reports: one event answers each option, one Reply each request."""

from __future__ import annotations

from typing import NamedTuple

from nbdbm.extents import ExtentList
from nbdbm.nbd.catalog import ExportInfo


class HandshakeReady(NamedTuple):
    """Options may be asked now. What was agreed upon: extended implies structured."""

    structured: bool
    extended: bool


class StartTls(NamedTuple):
    """The server agreed to TLS: begin it, and call ``tls_started`` when its handshake is done."""


class ListedExport(NamedTuple):
    name: str
    description: str


class ExportsListed(NamedTuple):
    """Answer to ``list_exports``."""

    exports: tuple[ListedExport, ...]


class InfoReceived(NamedTuple):
    """Answer to ``info``. ``info.contexts`` is empty: ask ``list_contexts``."""

    info: ExportInfo


class ContextsListed(NamedTuple):
    """Answer to ``list_contexts``: what the server has."""

    names: tuple[str, ...]


class ContextsSelected(NamedTuple):
    """Answer to ``set_contexts``: what the server agreed to; may be fewer than asked for."""

    contexts: tuple[tuple[int, str], ...]


class Ready(NamedTuple):
    """Answer to ``go``: transmission has begun. ``info.contexts`` are the names selected for it."""

    info: ExportInfo


class OptionRefused(NamedTuple):
    """The server answered an option with an error; the session goes on."""

    option: int
    error: int
    """A Rep error, possibly unknown to us."""
    text: str
    """The server's words, or the error's name."""


class Reply(NamedTuple):
    """The whole answer to one request.

    ``error`` is 0 or the NBD errno (unknown ones are kept); ``text`` what the server said about it.
    """

    cookie: int
    error: int
    text: str
    data: memoryview | None = None
    """A successful read's bytes, holes filled with zeroes; the caller owns it."""
    holes: tuple[tuple[int, int], ...] = ()
    """(offset, length) of each hole chunk of a read, ascending."""
    extents: dict[str, ExtentList] | None = None
    """A successful block status: by context name, from the request's offset, clipped to its range."""


ClientEvent = (
    HandshakeReady
    | StartTls
    | ExportsListed
    | InfoReceived
    | ContextsListed
    | ContextsSelected
    | Ready
    | OptionRefused
    | Reply
)
