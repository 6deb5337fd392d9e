"""The exports of one server: which there are, which are open, who uses them, and how they come and go.

An export is known before it is open: by its source. A connection uses it by a lease. While a lease is held
the export stays open; when the last is gone, an export that is opened on demand closes after a grace time.
An export that is withdrawn is taken from the catalog at once, asks its clients to leave, and closes.

    offered --open--> open --last lease, grace over--> closed (and offered still)
                       '---withdraw: leases revoked, then closed, and forgotten
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nbdbm.access import EVERYBODY, Access, Verdict
from nbdbm.errors import NbdbmError, UsageError
from nbdbm.exports import Export
from nbdbm.nbd.catalog import Absent, ExportInfo
from nbdbm.nbd.constants import Rep
from nbdbm.peer import UNKNOWN, Peer

log = logging.getLogger(__name__)

MAX_IDLE = 32
"""Exports that stay open without clients for their grace time. A client that asks about every image of a
directory, one after the other, would otherwise have us hold all of them open."""

CHANGED = "the export was changed by a reload"
REMOVED = "the export was removed by a reload"

RETRY_AFTER = 1.0
"""Seconds for which an export that could not be opened is not tried again: clients may ask as often as they
like, and each try reads the image."""


class Refused(NbdbmError):
    """A client does not get an export; the text is for the client and names no file."""

    def __init__(self, rep: Rep, reason: str) -> None:
        super().__init__(reason)
        self.rep = rep


@dataclass(frozen=True, kw_only=True)
class Source:
    """An export before it is open."""

    name: str
    open: Callable[[], Awaitable[Export]]
    """Raises NbdbmError or OSError."""
    description: str = ""
    access: Access = EVERYBODY
    grace: float | None = None
    """Seconds after the last client before it is closed; None: it stays open."""
    file: str = ""
    """What it keeps open: it waits for another export of the same file that is being closed."""
    key: object = None
    """Sources of equal keys open the same: one may take the other's place without closing."""


Revoke = Callable[[str], None]
"""Told, in one line, why a lease shall be released soon."""


class Lease:
    """One connection's use of an export, until ``release``."""

    __slots__ = ("_slot", "counted", "export", "peer", "revoke")

    def __init__(self, slot: Slot, export: Export, peer: Peer, revoke: Revoke) -> None:
        self._slot: Slot | None = slot
        self.export = export
        self.peer = peer
        self.revoke = revoke
        """Called when the export is withdrawn."""
        self.counted = False
        """Whether it counts towards the export's connections."""

    @property
    def name(self) -> str:
        return self.export.info.name

    def count(self) -> None:
        """The handshake is over: one more connection of the export. Raises Refused if there are enough."""
        slot = self._slot
        assert slot is not None and not self.counted
        limit = slot.source.access.max_connections
        if limit and slot.connections >= limit:
            raise Refused(Rep.ERR_POLICY, f"export {self.name!r} has {limit} connections, which is its limit")
        self.counted = True

    def release(self) -> None:
        """The export is not used any more; idempotent."""
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.left(self)


class Slot:
    """One name of the registry."""

    def __init__(self, source: Source, registry: ExportRegistry) -> None:
        self.source = source
        self.export: Export | None = None
        self.leases: set[Lease] = set()
        self._registry = registry
        self.predecessors: list[Slot] = []
        """They may hold the image until they are closed."""
        self._change = asyncio.Lock()
        self._unused = asyncio.Event()
        self._unused.set()
        self._failure: tuple[float, str] | None = None
        """Until when it is not tried again, on the loop's clock, and what clients are told."""
        self._grace: asyncio.TimerHandle | None = None
        self._awaited = 0
        """Clients that wait for it to be opened."""
        self.withdrawn = False

    @property
    def changing(self) -> bool:
        """Whether it is being opened or closed, or about to be (a lock that changes hands is not locked)."""
        return self._awaited > 0 or self._change.locked()

    @property
    def connections(self) -> int:
        """Clients past their handshake."""
        return sum(lease.counted for lease in self.leases)

    async def lease(self, peer: Peer, revoke: Revoke) -> Lease:
        """Use the export, which is opened if it is not; raises Refused."""
        while not self.withdrawn:
            if (lease := self.lease_now(peer, revoke)) is not None:
                return lease
            self._awaited += 1
            try:
                await self.ensure_open()
            except asyncio.CancelledError:
                asyncio.get_running_loop().call_soon(self._registry.forget, self)
                raise
            finally:
                self._awaited -= 1
        raise Refused(Rep.ERR_UNKNOWN, f"export {self.source.name!r} is not offered any more")

    async def ensure_open(self) -> None:
        """Open the export if it is not; a failure is logged, and raised as Refused."""
        loop = asyncio.get_running_loop()
        async with self._change:
            if self.export is not None or self.withdrawn:
                return
            if self._failure is not None and loop.time() < self._failure[0]:
                raise Refused(Rep.ERR_UNKNOWN, self._failure[1])
            try:
                await self.open()
            except (NbdbmError, OSError) as error:
                log.error("export %r cannot be opened: %s", self.source.name, _explained(error))
                told = f"export {self.source.name!r} cannot be opened"
                self._failure = (loop.time() + RETRY_AFTER, told)
                loop.call_later(RETRY_AFTER, self._registry.forget, self)
                raise Refused(Rep.ERR_UNKNOWN, told) from error

    def lease_now(self, peer: Peer, revoke: Revoke) -> Lease | None:
        """Use the export if it is open."""
        if self.export is None or self.withdrawn:
            return None
        lease = Lease(self, self.export, peer, revoke)
        self.leases.add(lease)
        self._unused.clear()
        self._registry.in_use(self)
        self._end_grace()
        return lease

    async def open(self) -> None:
        """Open the image, once its predecessors have let go of it. Raises what the source raises."""
        while self.predecessors:
            await self.predecessors[-1].closed()
            self.predecessors.pop()
        self.export = await self.source.open()
        self._failure = None
        if not self.leases:
            self._idle()

    def left(self, lease: Lease) -> None:
        self.leases.discard(lease)
        if not self.leases:
            self._unused.set()
            self._idle()

    def _idle(self) -> None:
        grace = self.source.grace
        if grace is None or self.withdrawn or self.export is None or self._grace is not None:
            return
        self._grace = asyncio.get_running_loop().call_later(grace, self.close_soon)
        self._registry.idle(self)

    def _end_grace(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def close_soon(self) -> None:
        """Close unless somebody uses it."""
        self._end_grace()
        self._registry.background(self._close_if_unused())

    async def _close_if_unused(self) -> None:
        try:
            async with self._change:
                if not self.leases:
                    await self._close()
        except (NbdbmError, OSError) as error:
            self._closing_failed(error)
        finally:
            asyncio.get_running_loop().call_soon(self._registry.forget, self)

    def _closing_failed(self, error: NbdbmError | OSError) -> None:
        log.error("export %r: closing failed: %s", self.source.name, _explained(error))

    async def _close(self) -> None:
        export, self.export = self.export, None
        self._registry.in_use(self)  # it is no longer one of those that stay open
        if export is not None:
            await export.close()

    async def closed(self) -> None:
        """Once nobody uses it, close it; returns when that is done. Errors are logged."""
        self.withdrawn = True
        self._end_grace()
        await self._unused.wait()
        try:
            async with self._change:
                await self._close()
        except (NbdbmError, OSError) as error:
            self._closing_failed(error)

    async def close(self) -> None:
        """Close it, now that nobody uses any export any more. Raises what closing raises."""
        self.withdrawn = True
        self._end_grace()
        async with self._change:
            await self._close()

    def withdraw(self, why: str) -> None:
        """Offer it no more and ask its clients to leave; ``why`` is for them and the log."""
        self.withdrawn = True
        for lease in list(self.leases):
            lease.revoke(why)


class ExportRegistry:
    """The exports of this server, by name."""

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}
        self._found: dict[str, Slot] = {}
        """Of the directory, those open or being opened."""
        self._idle: dict[Slot, None] = {}
        """Open without clients, the longest first."""
        self._closing: set[Slot] = set()
        """Withdrawn, and not closed yet."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.directory: Callable[[], dict[str, Source]] | None = None
        """What is found in the directory now, by name; remembered by the function itself if it is slow."""

    # -- what there is

    def add(self, export: Export, access: Access = EVERYBODY) -> None:
        """Offer an open export; raises UsageError if its name is taken."""

        async def opened() -> Export:
            return export

        source = Source(
            name=export.info.name, description=export.info.description, open=opened, access=access
        )
        self.offer(source).export = export

    def offer(self, source: Source) -> Slot:
        """Offer an export that is not open; raises UsageError if its name is taken."""
        if source.name in self._slots:
            raise UsageError(f"export name {source.name!r} is used twice")
        slot = self._slots[source.name] = Slot(source, self)
        return slot

    def slots(self) -> Iterator[Slot]:
        """All that are offered, and of a directory those that are open."""
        yield from self._slots.values()
        yield from self._found.values()

    def get(self, name: str) -> Export | None:
        """The open export of exactly this name, or None."""
        slot = self._slot(name)
        return None if slot is None else slot.export

    def view(self, peer: Callable[[], Peer], missing: Callable[[], None] | None = None) -> View:
        """The catalog for one client; ``peer`` tells who it is by then, ``missing`` is told each time when it
        asks for an export that does not exist for it."""
        return View(self, peer, missing)

    def listing(self) -> Sequence[tuple[str, str]]:
        """Names and descriptions of all, in the order in which they were added."""
        return tuple(export for export in self.view(lambda: UNKNOWN).listing() if export is not None)

    def info(self, name: str) -> ExportInfo | Absent | None:
        """What a client that nobody knows may learn of the export."""
        return self.view(lambda: UNKNOWN).info(name)

    def sources(self) -> Iterator[Source]:
        """Everything that is offered."""
        for slot in self._slots.values():
            yield slot.source
        if self.directory is not None:
            yield from (source for name, source in self.directory().items() if name not in self._slots)

    def source(self, name: str) -> Source | None:
        """What is offered under exactly this name."""
        if name in self._slots:
            return self._slots[name].source
        if name in self._found:
            return self._found[name].source
        return self.directory().get(name) if self.directory is not None else None

    # -- using them

    async def lease(self, name: str, peer: Peer, revoke: Revoke) -> Lease:
        """Use the export of this name, opening it if need be; raises Refused."""
        source = self.source(name)
        if source is None or source.access.judge(peer) is not Verdict.ALLOWED:
            raise _unknown(name)
        slot = self._slot(name)
        if slot is None:
            slot = self._found[name] = Slot(source, self)
        return await slot.lease(peer, revoke)

    def lease_now(self, name: str, peer: Peer, revoke: Revoke) -> Lease:
        """The same for an export that is open; raises Refused if it is not."""
        slot = self._slot(name)
        if slot is None or slot.source.access.judge(peer) is not Verdict.ALLOWED:
            raise _unknown(name)
        lease = slot.lease_now(peer, revoke)
        if lease is None:
            raise _unknown(name)
        return lease

    def _slot(self, name: str) -> Slot | None:
        return self._slots.get(name) or self._found.get(name)

    # -- coming and going

    def update(self, sources: Iterable[Source]) -> list[Slot]:
        """Offer these and no others. Those that open the same stay open; returns the new and the changed.

        Only the exports that go or change are touched: their clients are asked to leave, and they close.
        """
        wanted = {source.name: source for source in sources}
        new: list[Slot] = []
        slots: dict[str, Slot] = {}
        for name, source in wanted.items():
            slot = self._slots.get(name)
            if slot is not None and slot.source.key == source.key:
                slot.source = source
                for lease in list(slot.leases):
                    if source.access.judge(lease.peer) is not Verdict.ALLOWED:
                        lease.revoke("the export's rules have changed, and do not let the client in")
            else:
                slot = Slot(source, self)
                new.append(slot)
            slots[name] = slot
        old, self._slots = self._slots, slots
        for name, slot in old.items():
            if slots.get(name) is not slot:
                self._send_away(slot, CHANGED if name in slots else REMOVED)
        files: dict[str, list[Slot]] = {}
        for slot in self._closing:
            files.setdefault(slot.source.file, []).append(slot)
        for slot in new:
            slot.predecessors = files.get(slot.source.file, [])[:]
        return new

    def _send_away(self, slot: Slot, why: str) -> None:
        slot.withdraw(why)
        self._closing.add(slot)
        self.background(self._see_out(slot))

    async def _see_out(self, slot: Slot) -> None:
        await slot.closed()
        self._closing.discard(slot)

    def withdraw_found(self) -> None:
        """The directory is another one now, or none: close what is open of it."""
        found, self._found = list(self._found.values()), {}
        for slot in found:
            self._send_away(slot, REMOVED)

    async def close(self) -> None:
        """Close every export, each even if another fails; raises the first failure. Idempotent.

        Nobody may use one any more.
        """
        slots = [*self._slots.values(), *self._found.values()]
        self._slots, self._found, self.directory = {}, {}, None
        failure: Exception | None = None
        for slot in slots:
            try:
                await slot.close()
            except Exception as error:
                failure = failure or error
        while self._tasks:
            await asyncio.wait(self._tasks)
        if failure is not None:
            raise failure

    # -- called by the slots

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work`` now; ``close`` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def in_use(self, slot: Slot) -> None:
        self._idle.pop(slot, None)

    def idle(self, slot: Slot) -> None:
        self._idle[slot] = None
        while len(self._idle) > MAX_IDLE:
            longest = next(iter(self._idle))
            del self._idle[longest]
            longest.close_soon()

    def forget(self, slot: Slot) -> None:
        """A file of the directory need not be remembered unless it is open or being opened."""
        if slot.export is None and not slot.changing and self._found.get(slot.source.name) is slot:
            del self._found[slot.source.name]


class View:
    """The exports as one client may see them: a Catalog for its handshake.

    What it may not use does not exist for it.
    """

    def __init__(
        self, registry: ExportRegistry, peer: Callable[[], Peer], missing: Callable[[], None] | None = None
    ) -> None:
        self._registry = registry
        self._peer = peer
        self._missing = missing

    def listing(self) -> Iterator[tuple[str, str] | None]:
        """Names and descriptions of those it may use, or could with TLS; None for each of the others.

        A list that is gone through while exports come and go is the one of before or after.
        """
        for source in self._registry.sources():
            allowed = source.access.judge(self._peer()) is not Verdict.DENIED
            yield (source.name, source.description) if allowed else None

    def info(self, name: str) -> ExportInfo | Absent | None:
        """The export of exactly this name, why it cannot be told of now, or None."""
        found = self._info(name)
        if found is None and self._missing is not None:
            self._missing()
        return found

    def _info(self, name: str) -> ExportInfo | Absent | None:
        source = self._registry.source(name)
        if source is None:
            return None
        verdict = source.access.judge(self._peer())
        if verdict is Verdict.DENIED:
            log.info("%s may not use export %r", self._peer(), name)
            return None
        if verdict is Verdict.NEEDS_TLS:
            return Absent.NEEDS_TLS
        export = self._registry.get(name)
        if export is None:
            return Absent.UNOPENED
        if export.info.description == source.description:
            return export.info
        return replace(export.info, description=source.description)  # reloaded meanwhile


def _explained(error: NbdbmError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _unknown(name: str) -> Refused:
    return Refused(Rep.ERR_UNKNOWN, f"no export {name if len(name) <= 80 else name[:80] + '...'!r}")
