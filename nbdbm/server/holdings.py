"""What one connection holds in memory: its commands, a payload, replies unsent; its part of the budget.

    payload  ->  command   ->  answered  ->  released
    reserve      begin         finish        release         each in bytes, and in the account of all

The connection says what happens; here it is counted, and said what the limits allow.
"""

from __future__ import annotations

import asyncio

from nbdbm.nbd.events import Command, Write
from nbdbm.server.budget import SMALL, Budget, Claimant
from nbdbm.server.buffers import Buffer, BufferPool

MAX_REQUESTS = 128
"""Commands in progress per connection: twice what nbdcopy and fio ask for, and few enough threads' work."""

MAX_BYTES = 64 * 1024 * 1024
"""Memory of one connection's commands and unsent replies, bytes: two of the largest requests there are, so
that one can be carried out while the other's reply is sent. A single command always may start."""


class Holdings:
    """An account in bytes, and which buffers go back to the pool.

    Args:
        budget: the account of all connections.
        buffers: where those of payloads and replies come from and go back to.
        claimant: the connection; told to proceed when there is room for what it has asked for.
    """

    __slots__ = (
        "_answered",
        "_awaits_room",
        "_behind",
        "_budget",
        "_buffers",
        "_claimant",
        "_loop",
        "_payload",
        "bytes",
        "running",
        "sent",
    )

    def __init__(self, budget: Budget, buffers: BufferPool, claimant: Claimant) -> None:
        self.running = 0
        """Commands begun and not answered."""
        self.bytes = 0
        """Cost of commands begun, until their replies have left."""
        self.sent: list[Buffer] = []
        """Buffers of replies that are queued or being sent."""
        self._answered = 0
        """The part of ``bytes`` whose replies are queued or being sent."""
        self._payload = 0
        """Bytes taken for the payload of a large write, which is coming in or waits to be carried out."""
        self._awaits_room = False
        """Something waits for the memory that all connections share."""
        self._behind: float | None = None
        """Since when replies or a payload have been waiting for the client, on the loop's clock."""
        self._budget = budget
        self._buffers = buffers
        self._claimant = claimant
        self._loop = asyncio.get_running_loop()

    # -- what may be taken

    @property
    def full(self) -> bool:
        """Whether this connection has all that it may have."""
        return self.running >= MAX_REQUESTS or self.bytes >= MAX_BYTES

    @property
    def answered(self) -> int:
        """Bytes of commands that are answered and whose replies have not left."""
        return self._answered

    @property
    def behind_since(self) -> float | None:
        """Since when something has been waiting for the client, on the loop's clock; None: nothing is."""
        return self._behind

    def may_begin(self, price: int, command: Command, receiving: bool) -> bool:
        """Whether a command of this cost may begin; if all connections together hold too much, the
        connection proceeds when they hold less. ``receiving``: the payload taken for is still coming in."""
        if self.bytes and (self.running >= MAX_REQUESTS or self.bytes + price > MAX_BYTES):
            return False
        more = price - self._reserved(command, receiving)
        if self._budget.has(more) or (price <= SMALL and not self.bytes):
            return True
        self.await_room(more)
        return False

    def has_room(self, count: int) -> bool:
        """Whether all connections together leave room for ``count`` bytes."""
        return self._budget.has(count)

    def await_room(self, count: int) -> None:
        """Let the connection proceed when there is room for ``count`` bytes."""
        self._awaits_room = True
        self._budget.wait(self._claimant, count)

    def await_nothing(self) -> None:
        """What waited for room does not any more."""
        if self._awaits_room:
            self._awaits_room = False
            self._budget.forget(self._claimant)

    # -- commands

    def begin(self, price: int, command: Command, receiving: bool) -> None:
        """A command begins; what its payload took is part of the price."""
        self.running += 1
        self.bytes += price
        self._budget.take(price)
        if self._reserved(command, receiving):
            self.drop_payload()

    def finish(self, price: int) -> None:
        """It is answered; its reply has still to leave."""
        self.running -= 1
        self._answered += price

    def queue(self, count: int) -> None:
        """Replies of ``count`` bytes are left over of commands that never began the general way."""
        self.bytes += count
        self._budget.take(count)
        self._answered += count
        self.fall_behind()

    def release(self) -> None:
        """Everything answered has left: its buffers and its share of the limits are free again."""
        self.bytes -= self._answered
        count, self._answered = self._answered, 0
        if count:
            self._budget.give(count)
        if not self._payload:
            self._behind = None
        for buffer in self.sent:
            self._buffers.give(buffer)
        self.sent.clear()

    def fall_behind(self) -> None:
        """The client has something to do from now on."""
        if self._behind is None:
            self._behind = self._loop.time()

    # -- the payload of a large write

    @property
    def payload(self) -> bool:
        """Whether one is counted apart from its command."""
        return self._payload > 0

    def payload_buffer(self, length: int) -> Buffer | None:
        """Where one is received; None: there is no memory for it now."""
        self.drop_payload()  # of a write that has been answered
        if not self._budget.has(length):
            return None
        self._budget.take(length)
        self._payload = length
        self.fall_behind()
        return self._buffers.take(length)

    def drop_payload(self) -> None:
        """It is not counted apart any more."""
        count, self._payload = self._payload, 0
        if count:
            self._budget.give(count)

    def _reserved(self, command: Command, receiving: bool) -> int:
        """The part of the command's cost that was taken when its payload came in."""
        if not self._payload or type(command) is not Write or receiving:
            return 0
        return self._payload if len(command.data) == self._payload else 0
