"""Where received bytes go before they are parsed: one scratch for headers, own buffers for long bodies.

Either side of the protocol is a ``Receiver`` with a ``_parse``. The bytes of a message that is not yet
complete are kept by the connection, so the scratch itself belongs to nobody between two calls and can be
shared by every connection of the process: ``get_buffer``, the receive, and ``buffer_updated`` run back
to back. A body of some length gets a buffer of its own which ``get_buffer`` hands out, so that it is
received in place.
"""

from __future__ import annotations

import mmap

SCRATCH_SIZE = 256 * 1024
"""Bytes received at once: about sixty 4 KiB writes, and still in a second-level cache."""

SMALL_BODY = 64 * 1024
"""Bodies up to this are parsed from the scratch, bytes; copying them is cheaper than a receive for each."""

_shared = memoryview(mmap.mmap(-1, SCRATCH_SIZE + 64))[64:]
"""Begins 64 bytes into a page: to 1 to 31 bytes into one, where a bytearray would begin, kernels copy slowly
(receiving 64 KiB took 27 us instead of 9)."""


class Receiver:
    """The receiving half of a connection.

    Args:
        scratch: a buffer to use instead of the shared one, if connections live in several threads;
            more than SMALL_BODY and a few headers.
    """

    __slots__ = ("_body", "_filled", "_most", "_partial", "_room", "_scratch", "_skip", "_view")

    def __init__(self, scratch: bytearray | None = None) -> None:
        self._scratch: bytearray | memoryview = _shared if scratch is None else scratch
        assert len(self._scratch) >= 2 * SMALL_BODY
        self._view = memoryview(self._scratch)
        self._most = len(self._scratch)
        """Bytes that are received into the scratch at once, beside the incomplete message."""
        self._room = len(self._scratch)
        """How much of it is used, and so what may be kept of an incomplete message, in bytes."""
        self._partial = b""
        """Bytes of an incomplete message; they are at the scratch's front while it is being filled."""
        self._body: memoryview | None = None
        """A body under way, and how much of it is here."""
        self._filled = 0
        self._skip = 0
        """Bytes still to be thrown away."""

    def get_buffer(self) -> memoryview:
        """Where the next bytes belong; never empty. Receive into it, then call ``buffer_updated``."""
        if self._body is not None:
            return self._body[self._filled :]
        held = len(self._partial)
        if held:
            self._scratch[:held] = self._partial
        return self._view[held : min(held + self._most, self._room)]

    def _received(self, count: int) -> int:
        """Note ``count`` received bytes; return where the unparsed bytes in the scratch end.

        While a body is under way nothing is in the scratch; it is complete when ``_body_complete``.
        """
        if self._body is not None:
            self._filled += count
            return 0
        end = len(self._partial) + count
        self._partial = b""
        return end

    def _begin_body(self, body: memoryview, at: int, end: int) -> None:
        """Receive a body into its own buffer, beginning with what the scratch has from ``at`` to ``end``."""
        self._filled = end - at
        body[: self._filled] = self._view[at:end]
        self._body = body

    def _take_body(self) -> memoryview | None:
        """The body, if it is complete; it is then the caller's."""
        body = self._body
        if body is None or self._filled < len(body):
            return None
        self._body = None
        return body

    def _keep(self, at: int, end: int) -> None:
        """Keep what is left in the scratch for the next time."""
        if at < end:
            self._partial = bytes(self._view[at:end])

    def _skipped(self, at: int, end: int) -> int:
        """Throw bytes away that are due to be; return where the rest begins."""
        count = min(self._skip, end - at)
        self._skip -= count
        return at + count
