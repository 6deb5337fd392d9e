"""Requests as their bytes arrive in the transmission phase: parsed, judged, and made into events.

What one call of ``parse`` finds complete becomes events, or is answered if it is refused or about nothing.
A payload that comes later has a buffer of its own, or is thrown away: ``rest`` says so, and parsing stops.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from struct import Struct
from typing import NamedTuple

from nbdbm.nbd.constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Cmd,
    CmdFlag,
    NbdErrno,
    TransmissionFlag,
)
from nbdbm.nbd.events import BlockStatus, Cache, Event, Flush, Read, Trim, Write, WriteZeroes
from nbdbm.nbd.handshake import Negotiated, ProtocolViolation
from nbdbm.nbd.limits import Limits
from nbdbm.nbd.messages import EXTENDED_REQUEST, REQUEST, U64, Request
from nbdbm.nbd.receiver import SMALL_BODY
from nbdbm.nbd.transmission import Judge, Origins, Refusal

Body = bytearray | mmap.mmap

FLAGS = tuple(CmdFlag(value) for value in range(CmdFlag.PAYLOAD_LEN << 1))
"""Every combination of known flags: looking one up costs a tenth of building it."""

_NO_FLAGS = FLAGS[0]
_new = tuple.__new__
"""Makes an event at half the cost of calling its class; for the hot loop only."""

_READ, _WRITE, _BLOCK_STATUS = int(Cmd.READ), int(Cmd.WRITE), int(Cmd.BLOCK_STATUS)
_PAYLOAD_LEN = int(CmdFlag.PAYLOAD_LEN)

_INCOMPLETE = -1
"""Returned instead of a position when a message must stay in the scratch until more of it is there."""


class Goodbye(Exception):
    """NBD_CMD_DISC: the client asks for nothing more."""


class Rest(NamedTuple):
    """A payload that follows its request, ``request.length`` bytes of it."""

    request: Request
    fate: memoryview | Refusal
    """Where it is received (a WRITE's); or how the request is answered once it was thrown away."""


def owned(event: Event) -> Event:
    """The event, without anything that lies in the scratch."""
    if type(event) is Write and len(event.data) <= SMALL_BODY and type(event.data.obj) is not bytes:
        return event._replace(data=memoryview(bytes(event.data)))
    return event


class Requests:
    """The requests of one connection.

    Args:
        view: the scratch that they are parsed from.
        origins: is told of each request that is handed out; None where nobody needs to know.
        allocate: gives the buffer, of the length asked for or more, that a long payload of a WRITE is
            received into. None: not now, the request stays where it is.
        refuse: answers a request with an error.
        answer_empty: answers one that is about no bytes with success.
        trace: logs a request.
        lend: the data of small WRITEs stays in the scratch: whoever keeps such an event beyond the next
            receive keeps ``owned`` of it.
    """

    __slots__ = (
        "_allocate",
        "_answer_empty",
        "_inline",
        "_judge",
        "_lend",
        "_limits",
        "_magic",
        "_negotiated",
        "_origins",
        "_refuse",
        "_trace",
        "_view",
        "rest",
    )

    def __init__(
        self,
        negotiated: Negotiated,
        limits: Limits,
        view: memoryview,
        *,
        origins: Origins | None,
        allocate: Callable[[int], Body | None],
        refuse: Callable[[Request, Refusal], None],
        answer_empty: Callable[[Request], None],
        trace: Callable[[Request], None] | None,
        lend: bool = False,
    ) -> None:
        self.rest: Rest | None = None
        """What the next bytes are, if they are not a request."""
        self._negotiated = negotiated
        self._limits = limits
        self._view = view
        self._origins = origins
        self._allocate = allocate
        self._refuse = refuse
        self._answer_empty = answer_empty
        self._trace = trace
        self._lend = lend
        self._judge = Judge(negotiated)
        self._magic = EXTENDED_REQUEST_MAGIC if negotiated.extended else REQUEST_MAGIC
        head = EXTENDED_REQUEST if negotiated.extended else REQUEST
        info = negotiated.info
        plain = info.minimum_block == 1 and trace is None
        writable = not info.flags & TransmissionFlag.READ_ONLY
        self._inline = (
            head.unpack_from,
            head.size,
            info.size if plain else -1,
            negotiated.maximum_payload,
            min(negotiated.maximum_payload, SMALL_BODY) if writable else 0,
            _PAYLOAD_LEN if negotiated.extended else 0,
        )
        """What ``parse`` judges the common requests by: how a header is unpacked, its size; the disk's size
        (-1: none is common), the longest read, the longest write, and the flags it may have."""

    def parse(self, at: int, end: int, events: list[Event]) -> int:
        """Parse requests from ``at`` on; return where the first incomplete one, or the ``rest``, begins."""
        # The common requests are judged in line, by the rules that Judge has for them; whatever is
        # not plain goes the general way.
        unpack, head, size, maximum, small, payload_len = self._inline
        view, origins, contexts, lend = self._view, self._origins, self._negotiated.contexts, self._lend
        while end - at >= head:
            magic, flags, command, cookie, offset, length = unpack(view, at)
            if magic != self._magic:
                raise ProtocolViolation(f"request magic {magic:#x}")
            if offset + length <= size:
                if command == _READ:
                    if not flags and 0 < length <= maximum:
                        at += head
                        if origins is not None:
                            origins.note(cookie, offset)
                        events.append(_new(Read, (cookie, offset, length, _NO_FLAGS)))
                        continue
                elif command == _WRITE and 0 < length <= small and not flags & ~payload_len:
                    start = at + head
                    if end - start < length:
                        break
                    at = start + length
                    if origins is not None:
                        origins.note(cookie, offset)
                    data = view[start:at] if lend else memoryview(bytes(view[start:at]))
                    events.append(_new(Write, (cookie, offset, data, _NO_FLAGS)))
                    continue
                elif command == _BLOCK_STATUS and length and contexts and not flags:
                    at += head
                    if origins is not None:
                        origins.note(cookie, offset)
                    events.append(_new(BlockStatus, (cookie, offset, length, _NO_FLAGS, contexts)))
                    continue
            request = Request(magic, flags, command, cookie, offset, length)
            after = self._request(request, at + head, end, events)
            if after == _INCOMPLETE:
                break
            at = after
            if self._trace is not None:
                self._trace(request)
            if self.rest is not None:
                break
        return at

    def received(self, request: Request, payload: memoryview) -> Write:
        """The event of a WRITE whose payload is there."""
        if self._origins is not None:
            self._origins.note(request.cookie, request.offset)
        return Write(request.cookie, request.offset, payload, FLAGS[request.flags & ~_PAYLOAD_LEN])

    def _request(self, request: Request, at: int, end: int, events: list[Event]) -> int:
        """Act on one request whose payload, if any, begins at ``at``; return where the next begins."""
        negotiated = self._negotiated
        command, length = request.type, request.length
        if command == Cmd.DISC:
            if self._trace is not None:
                self._trace(request)
            raise Goodbye
        if command != Cmd.WRITE and not (negotiated.extended and request.flags & CmdFlag.PAYLOAD_LEN):
            self._emit(request, negotiated.contexts, events)
            return at
        if length > negotiated.maximum_payload:
            limit = negotiated.maximum_payload
            refusal = Refusal(NbdErrno.EINVAL, f"payload of {length} bytes, the limit is {limit}")
            # "A server SHOULD initiate hard disconnect" with extended headers; else as long as it is
            # reasonable the payload is thrown away.
            if negotiated.extended or length > self._limits.max_drained:
                self._refuse(request, refusal)
                raise ProtocolViolation(refusal.text)
            # Who may not write at all, or not there, is told that rather than to cut it up.
            self._drain(request, self._judge.check(request) or refusal)
            return at
        if command == Cmd.WRITE:
            return self._write_request(request, at, end, events)
        if command == Cmd.BLOCK_STATUS:
            return self._status_request(request, at, end, events)
        self._drain(request, Refusal(NbdErrno.EINVAL, f"command {command} takes no payload"))
        return at

    def _drain(self, request: Request, refusal: Refusal) -> None:
        """Have the request's payload thrown away, then refuse it."""
        if request.length:
            self.rest = Rest(request, refusal)
        else:
            self._refuse(request, refusal)

    def _write_request(self, request: Request, at: int, end: int, events: list[Event]) -> int:
        length = request.length
        refusal = self._judge.check(request)
        if refusal is not None:
            self._drain(request, refusal)
            return at
        if not length:
            self._answer_empty(request)
            return at
        if end - at < length:
            if length <= SMALL_BODY:
                return _INCOMPLETE
            buffer = self._allocate(length)
            if buffer is None:
                return _INCOMPLETE
            self.rest = Rest(request, memoryview(buffer)[:length])
            return at
        events.append(self.received(request, memoryview(bytes(self._view[at : at + length]))))
        return at + length

    def _status_request(self, request: Request, at: int, end: int, events: list[Event]) -> int:
        """BLOCK_STATUS with a payload: 64 bits of effect length, 32 bits for each context id wanted."""
        contexts, length = self._negotiated.contexts, request.length
        count, odd = divmod(length - U64.size, 4)
        if odd or not 1 <= count <= len(contexts) or length > SMALL_BODY:
            text = f"BLOCK_STATUS: a payload of {length} bytes does not select contexts"
            self._drain(request, Refusal(NbdErrno.EINVAL, text))
            return at
        if end - at < length:
            return _INCOMPLETE
        effect, *wanted = Struct(f">Q{count}I").unpack_from(self._view, at)
        ids = set(wanted)
        chosen = tuple(context for context in contexts if context.id in ids)
        if len(chosen) != count:
            text = "BLOCK_STATUS: the payload names a context twice, or one that was not selected"
            self._refuse(request, Refusal(NbdErrno.EINVAL, text))
        else:
            self._emit(request._replace(length=effect), chosen, events)
        return at + length

    def _emit(self, request: Request, contexts: tuple[tuple[int, str], ...], events: list[Event]) -> None:
        """Refuse a request, answer it if it is about nothing, or hand it out."""
        refusal = self._judge.check(request)
        if refusal is not None:
            self._refuse(request, refusal)
            return
        command, cookie, offset, length = request.type, request.cookie, request.offset, request.length
        if not length and command != Cmd.FLUSH:
            # "The client SHOULD NOT"; done with nothing to do, as in qemu-nbd.
            self._answer_empty(request)
            return
        if self._origins is not None:
            self._origins.note(cookie, offset)
        flags = FLAGS[request.flags & ~_PAYLOAD_LEN]
        if command == Cmd.BLOCK_STATUS:
            events.append(BlockStatus(cookie, offset, length, flags, contexts))
        elif command == Cmd.FLUSH:
            events.append(Flush(cookie, flags))
        else:
            events.append(_RANGED[command](cookie, offset, length, flags))


_RANGED: dict[int, type[Read] | type[Cache] | type[Trim] | type[WriteZeroes]] = {
    Cmd.READ: Read,
    Cmd.CACHE: Cache,
    Cmd.TRIM: Trim,
    Cmd.WRITE_ZEROES: WriteZeroes,
}
"""Commands whose event is (cookie, offset, length, flags)."""
