"""Block status answered ahead: the next range of a client that asks for one after the other.

Such a client takes twice as long to digest an answer as we to make one. So the next is made while it does,
before it asks. Only where nothing can change: read-only exports, and bitmaps that are in memory.
"""

from __future__ import annotations

from nbdbm.exports import Export
from nbdbm.extents import ExtentList
from nbdbm.nbd.constants import CONTEXT_BITMAP, TransmissionFlag
from nbdbm.nbd.events import BlockStatus
from nbdbm.nbd.protocol import ServerProtocol

MAX_CONTEXTS = 4
"""Contexts of a request that is answered ahead."""

MAX_EXTENTS = 16 * 1024
"""Extents in all of an answer that is kept, 16 bytes each: a connection may be idle for long."""

Answers = list[tuple[int, ExtentList]]


class StatusAhead:
    """One connection's next answer."""

    __slots__ = ("_answers", "_expected", "_export", "_next", "_protocol")

    def __init__(self, export: Export, protocol: ServerProtocol) -> None:
        self._export = export
        self._protocol = protocol
        self._expected = 0
        """Where the client goes on, if it asks for one range after the other."""
        self._next: BlockStatus | None = None
        """The request to come, with any cookie, or None: it is not to be answered ahead."""
        self._answers: Answers | None = None

    @classmethod
    def of(cls, export: Export, protocol: ServerProtocol) -> StatusAhead | None:
        """For this connection; None where answers may change."""
        return cls(export, protocol) if export.info.flags & TransmissionFlag.READ_ONLY else None

    @property
    def wanted(self) -> bool:
        """Whether there is something to do for ``work``."""
        return self._next is not None and self._answers is None

    def take(self, event: BlockStatus) -> Answers | None:
        """The answer to ``event`` if it was made ahead."""
        following, answers = self._next, self._answers
        self._next = self._answers = None
        if answers is None or following is None or event[1:] != following[1:]:
            return None
        return answers

    def note(self, event: BlockStatus, answers: Answers) -> None:
        """``event`` is answered so; see whether what comes next can be told."""
        end = answers[0][1].position
        in_order, self._expected = event.offset == self._expected, end
        size = self._export.info.size
        if (
            in_order
            and end < size
            and len(answers) <= MAX_CONTEXTS
            and all(extents.position == end for _, extents in answers)
            and sum(len(extents) for _, extents in answers) <= MAX_EXTENTS
            and all(name.startswith(CONTEXT_BITMAP) for _, name in event.contexts)
        ):
            length = min(event.length, size - end)
            self._next = BlockStatus(0, end, length, event.flags, event.contexts)

    def work(self) -> None:
        """Make the answer, unless that would have to wait for anything."""
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
                self._answers = answers
                return
        except Exception:  # it is met again, and told, when the client asks
            pass
        else:
            making.close()
        self._next = None
