"""Two cores back to back: a ServerProtocol and a ClientProtocol, and in between nothing but a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nbdbm.extents import ExtentList
from nbdbm.nbd.catalog import ExportInfo
from nbdbm.nbd.client import (
    ClientEvent,
    ClientProtocol,
    ContextsSelected,
    HandshakeReady,
    Ready,
    Reply,
)
from nbdbm.nbd.constants import NbdErrno, Rep, TransmissionFlag
from nbdbm.nbd.events import (
    BlockStatus,
    Disconnected,
    Event,
    GoRequested,
    Read,
    Write,
)
from nbdbm.nbd.limits import DEFAULT_LIMITS, Limits
from nbdbm.nbd.protocol import ServerProtocol

READ_ONLY = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.READ_ONLY
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.CAN_MULTI_CONN
)
WRITABLE = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
)

CONTEXTS = (
    "base:allocation",
    "qemu:allocation-depth",
    "qemu:dirty-bitmap:daily",
    "qemu:dirty-bitmap:base:",
)

DISK = ExportInfo("disk", 1 << 20, READ_ONLY, "a disk", contexts=CONTEXTS)
SCRATCH = ExportInfo("scratch", 1 << 20, WRITABLE, contexts=CONTEXTS[:1])
HUGE = ExportInfo("huge", 1 << 46, WRITABLE, contexts=CONTEXTS)
COARSE = ExportInfo("coarse", 1 << 20, WRITABLE, minimum_block=512, contexts=CONTEXTS[:1])


class ListCatalog:
    """Exports in a list; the first is the default one."""

    def __init__(self, *exports: ExportInfo) -> None:
        self.exports = list(exports or (DISK, SCRATCH, HUGE, COARSE))

    def listing(self) -> Sequence[tuple[str, str]]:
        return [(export.name, export.description) for export in self.exports]

    def info(self, name: str) -> ExportInfo | None:
        if not name:
            return self.exports[0]
        return next((export for export in self.exports if export.name == name), None)


def content(offset: int, length: int) -> bytes:
    """What the disk of a Pair holds: a pattern that no shift maps onto itself within 64 KiB."""
    first = offset // 4
    words = range(first, (offset + length + 3) // 4)
    data = b"".join((word * 2654435761 % (1 << 32)).to_bytes(4, "big") for word in words)
    return data[offset % 4 : offset % 4 + length]


class Pair:
    """A client and a server core; ``run`` moves bytes and answers requests until both are quiet.

    Requests are answered by ``answer``, a method to override or replace: reads give ``content``, writes
    succeed and are kept in ``requests`` like everything else.
    """

    def __init__(
        self,
        *,
        structured: bool = True,
        extended: bool = True,
        catalog: ListCatalog | None = None,
        limits: Limits = DEFAULT_LIMITS,
        cut: int = 1 << 20,
    ) -> None:
        self.catalog = catalog or ListCatalog()
        self.client = ClientProtocol(structured=structured, extended=extended)
        self.server = ServerProtocol(self.catalog, limits=limits)
        self.cut = cut
        """Bytes that are moved at a time."""
        self.requests: list[Event] = []
        self.answer: Callable[[Event], None] = self.serve
        self.run(HandshakeReady)

    def serve(self, event: Event) -> None:
        if isinstance(event, Read):
            data = content(event.offset, event.length)
            self.server.reply_read(event.cookie, event.offset, [(event.length, data)])
        elif isinstance(event, BlockStatus):
            limit = self.server.extent_limit(event)
            lists = []
            for number, _ in event.contexts:
                extents = ExtentList(event.offset, event.length, limit)
                step = 65536 + number * 512
                flag = 0
                while extents.add(step, flag):
                    flag ^= 1
                lists.append((number, extents))
            self.server.reply_block_status(event.cookie, lists)
        elif not isinstance(event, Disconnected):
            self.server.reply(event.cookie)

    def run(self, *kinds: type) -> list[ClientEvent]:
        """Until nothing moves; returns the client's events, which must be of ``kinds`` if any are given."""
        seen: list[ClientEvent] = []
        moved = True
        while moved:
            moved = False
            for piece in self._cut(self.server.data_to_send()):
                seen += self.client.receive_data(piece)
                moved = True
            for piece in self._cut(self.client.data_to_send()):
                self._act(self.server.receive_data(piece))
                moved = True
        if kinds:
            assert [type(event) for event in seen] == list(kinds), seen
        return seen

    def _cut(self, buffers: Sequence[bytes | memoryview]) -> list[bytes]:
        data = b"".join(buffers)
        return [data[i : i + self.cut] for i in range(0, len(data), self.cut)]

    def _act(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, GoRequested):
                info = self.catalog.info(event.name)
                if info is None:
                    self._act(self.server.refuse(Rep.ERR_UNKNOWN, "gone"))
                else:
                    self._act(self.server.accept(info))
            else:
                self.requests.append(event)
                self.answer(event)

    # sessions in one line

    def go(self, name: str = "disk", contexts: Sequence[str] = ()) -> ExportInfo:
        """Enter transmission with all of ``contexts``."""
        if contexts:
            self.client.set_contexts(name, contexts)
            self.run(ContextsSelected)
        self.client.go(name)
        (ready,) = self.run(Ready)
        assert isinstance(ready, Ready)
        return ready.info

    def reply(self) -> Reply:
        """Run, and return the one reply that comes."""
        (reply,) = self.run(Reply)
        assert isinstance(reply, Reply)
        return reply

    def errno(self) -> NbdErrno:
        """Run, and return the error of the one reply that comes."""
        reply = self.reply()
        assert reply.error
        return NbdErrno(reply.error)


def events_without_data(events: Sequence[Event]) -> list[Event]:
    """Events that compare: a payload as bytes, whatever buffer owns it."""
    return [
        event._replace(data=memoryview(bytes(event.data))) if isinstance(event, Write) else event
        for event in events
    ]
