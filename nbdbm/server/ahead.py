"""Block status answered ahead: the next range of a client that asks for one after the other.

Such a client takes twice as long to digest an answer as we to make one. So the next is made while it does,
before it asks. Only where nothing can change: read-only exports, and bitmaps that are in memory.
"""

from __future__ import annotations

from nbdbm.exports import Export
from nbdbm.extents import ExtentList
from nbdbm.nbd.constants import CONTEXT_BITMAP, TransmissionFlag
from nbdbm.nbd.events import BlockStatus
from nbdbm.nbd.messages import U64
from nbdbm.nbd.protocol import ServerProtocol

MAX_CONTEXTS = 4
"""Contexts of a request that is answered ahead."""

MAX_EXTENTS = 16 * 1024
"""Extents in all of a reply that is kept, 8 or 16 bytes each: a connection may be idle for long."""

Answers = list[tuple[int, ExtentList]]


class StatusAhead:
    """One connection's next answer."""

    __slots__ = ("_end", "_expected", "_export", "_next", "_places", "_protocol", "_reply")

    def __init__(self, export: Export, protocol: ServerProtocol) -> None:
        self._export = export
        self._protocol = protocol
        self._expected = 0
        """Where the client goes on, if it asks for one range after the other."""
        self._next: BlockStatus | None = None
        """The request to come, with any cookie, or None: it is not to be answered ahead."""
        self._reply: bytearray | None = None
        """The whole reply to it."""
        self._places: list[int] = []
        """Where in it the cookie goes."""
        self._end = -1
        """Where the client goes on then; -1: that is not to be answered ahead."""

    @classmethod
    def of(cls, export: Export, protocol: ServerProtocol) -> StatusAhead | None:
        """For this connection; None where answers may change."""
        return cls(export, protocol) if export.info.flags & TransmissionFlag.READ_ONLY else None

    @property
    def wanted(self) -> bool:
        """Whether there is something to do for ``work``."""
        return self._next is not None and self._reply is None

    def reply(self, event: BlockStatus) -> bytearray | None:
        """The reply to ``event`` if it was made ahead; once."""
        following, reply = self._next, self._reply
        self._next = self._reply = None
        if reply is None or following is None or event[1:] != following[1:]:
            return None
        for at in self._places:
            U64.pack_into(reply, at, event.cookie)
        self._expected = self._end
        if self._end >= 0:
            self._next = self._follow(event, self._end)
        return reply

    def note(self, event: BlockStatus, answers: Answers) -> None:
        """``event``, which has no flags, is answered so; see whether what comes next can be told."""
        in_order = event.offset == self._expected
        self._expected = answers[0][1].position
        end = self._goes_on(answers) if in_order else -1
        names = [name for _, name in event.contexts]
        if end >= 0 and len(names) <= MAX_CONTEXTS and all(name.startswith(CONTEXT_BITMAP) for name in names):
            self._next = self._follow(event, end)

    def _goes_on(self, answers: Answers) -> int:
        """Where the client goes on after this answer; -1 if that is not to be answered ahead."""
        end = answers[0][1].position
        small = sum(len(extents) for _, extents in answers) <= MAX_EXTENTS
        level = all(extents.position == end for _, extents in answers)
        return end if small and level and end < self._export.info.size else -1

    def _follow(self, event: BlockStatus, end: int) -> BlockStatus:
        """The next request of a client that asked for ``event`` and goes on at ``end``."""
        return event._replace(offset=end, length=min(event.length, self._export.info.size - end))

    def work(self) -> None:
        """Make the reply, unless that would have to wait for anything."""
        following = self._next
        assert following is not None
        making = self._export.block_status(
            following.contexts,
            following.offset,
            following.length,
            limit=self._protocol.extent_limit(following),
        )
        try:
            making.send(None)
        except StopIteration as done:
            answers: Answers = done.value
            if sum(len(extents) for _, extents in answers) <= MAX_EXTENTS:
                self._reply, self._places = self._protocol.replies.pack_status(following.offset, answers)
                self._end = self._goes_on(answers)
                return
        except Exception:  # it is met again, and told, when the client asks
            pass
        else:
            making.close()
        self._next = None
