"""Options as their bytes arrive in the handshake: cut out, let in one by one, and answered.

What one call of ``parse`` finds complete is answered by the handshake, which may want the shell to act. Data
that comes later has a buffer of its own, or is thrown away: ``rest`` says so, and parsing stops.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from nbdbm.nbd.constants import IHAVEOPT, Opt, Rep
from nbdbm.nbd.handshake import Handshake, OptionEvent, ProtocolViolation
from nbdbm.nbd.limits import Limits
from nbdbm.nbd.messages import OPTION, OPTION_REPLY, OptionReply, OptionRequest
from nbdbm.nbd.receiver import SMALL_BODY
from nbdbm.nbd.requests import Body

REPLIES_AT_ONCE = 64
"""Of a long answer to an option, in one turn: a quarter of a millisecond, and 64 KiB of the longest names."""


class Rest(NamedTuple):
    """Data that follows its option, ``option.length`` bytes of it."""

    option: OptionRequest
    fate: memoryview | Rep
    """Where it is received; or how the option is answered once it was thrown away."""


class Options:
    """The options of one connection, from its first byte until it enters transmission.

    Args:
        handshake: judges and answers them; its replies are taken from here.
        view: the scratch that they are parsed from.
        allocate: gives the buffer, of the length asked for or more, that long data is received into. None:
            not now, the option stays where it is.
        in_turns: whether each waits until ``go_on`` is called, as does each part of a long answer.
        trace: logs an option or a reply, by a format and the message.
    """

    __slots__ = (
        "_admitted",
        "_allocate",
        "_data",
        "_in_turns",
        "_limits",
        "_pipelined",
        "_queued",
        "_receiving",
        "_trace",
        "_turn",
        "_view",
        "handshake",
        "rest",
        "unfinished",
    )

    def __init__(
        self,
        handshake: Handshake,
        limits: Limits,
        view: memoryview,
        *,
        allocate: Callable[[int], Body | None],
        in_turns: bool,
        trace: Callable[[str, object], None] | None,
    ) -> None:
        self.handshake = handshake
        self.rest: Rest | None = None
        """What the next bytes are, if they are not an option."""
        self.unfinished = False
        """An option, or part of an answer, waits for ``go_on``; parse nothing until it does not."""
        self._limits = limits
        self._view = view
        self._allocate = allocate
        self._in_turns = in_turns
        self._trace = trace
        self._turn = False
        """The next option may be answered."""
        self._queued = 0
        """Bytes of replies taken since ``sent``."""
        self._pipelined = 0
        """Options answered since then."""
        self._receiving: OptionRequest | None = None
        """The option whose data has a buffer of its own."""
        self._data: memoryview | None = None
        """These data, complete, if the option waits for its turn."""
        self._admitted = False
        """The next option was let in and only lacks a buffer for its data."""

    @property
    def receiving(self) -> bool:
        """Whether an option's data has a buffer, and has not been answered."""
        return self._receiving is not None

    def parse(self, at: int, end: int) -> tuple[int, OptionEvent]:
        """Parse one option at ``at``; return where the next one, or the ``rest``, begins, or ``at`` if it is
        incomplete or waits; and what the shell has to do.

        Raises:
            ProtocolViolation: only closing is left.
        """
        start = at + OPTION.size
        if end < start:
            return at, None
        option = OptionRequest.parse(self._view, at)
        if option.magic != IHAVEOPT:
            raise ProtocolViolation(f"option magic {option.magic:#x}")
        length = option.length
        goodbye = option.option == Opt.ABORT
        if end - start < length <= SMALL_BODY and not goodbye:
            return at, None
        if self._admitted:
            self._admitted = False
            return self._receive(option, at), None
        if self._in_turns and not self._turn:
            self.unfinished = True
            return at, None
        self._turn = False
        self._pipelined += 1
        if self._queued > self._limits.max_queued or self._pipelined > self._limits.max_pipelined:
            raise ProtocolViolation("the client sends options without awaiting their replies")
        verdict = self.handshake.begin(option.option, length)
        if self._trace is not None:
            self._trace("< %s", option)
        if goodbye:
            # Its data is ignored, and nothing may follow: no use in waiting for it.
            return end, self.handshake.option(option.option, b"")
        if verdict is not None:
            self.rest = Rest(option, verdict)
            return start, None
        if end - start < length:
            return self._receive(option, at), None
        return start + length, self.handshake.option(option.option, bytes(self._view[start : start + length]))

    def _receive(self, option: OptionRequest, at: int) -> int:
        """Have its data received into a buffer, if there is one; return where the data begins, or ``at``."""
        buffer = self._allocate(option.length)
        if buffer is None:
            self._admitted = True
            return at
        self._receiving = option
        self.rest = Rest(option, memoryview(buffer)[: option.length])
        return at + OPTION.size

    def received(self, data: memoryview) -> OptionEvent:
        """The data that had a buffer of its own is complete. Returns and raises as ``parse``."""
        if self._in_turns and not self._turn:
            self._data, self.unfinished = data, True
            return None
        option, self._receiving = self._receiving, None
        assert option is not None
        self._turn = False
        return self.handshake.option(option.option, data)

    def go_on(self) -> OptionEvent:
        """Something is ``unfinished``: answer it as far as it is here. What is not, the next ``parse`` may
        answer, once, if it comes before ``end_turn``. Returns and raises as ``parse``."""
        self.unfinished = False
        if self.handshake.more is not None:
            self._gather(REPLIES_AT_ONCE)
            return None
        self._turn = True
        if self._data is None:
            return None
        data, self._data = self._data, None
        return self.received(data)

    def end_turn(self) -> None:
        """What is not answered waits for ``go_on`` again."""
        self._turn = False

    def take_replies(self) -> list[bytes]:
        """What the handshake wants to be sent."""
        handshake = self.handshake
        if handshake.more is not None:
            if self._in_turns:
                self.unfinished = True
            else:
                self._gather(None)
        replies, handshake.out = handshake.out, []
        if self._trace is not None:
            for reply in replies:
                if len(reply) >= OPTION_REPLY.size:  # not the greeting
                    self._trace("> %s", OptionReply.parse(reply))
        self._queued += sum(map(len, replies))
        return replies

    def _gather(self, count: int | None) -> None:
        """Have the next replies of a long answer ready, or all."""
        handshake = self.handshake
        assert handshake.more is not None
        replies = list(islice(handshake.more, count))
        if count is None or len(replies) < count:
            handshake.more = None
        handshake.out += filter(None, replies)

    def sent(self) -> None:
        """The replies that were taken are on their way."""
        self._queued = self._pipelined = 0
