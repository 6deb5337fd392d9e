"""The fast path: small reads and writes that need no waiting, answered in the turn that received them.

A coroutine, an account and a buffer for each request cost more than the request where its data is in the
page cache. Here a whole batch of requests is carried out synchronously, the replies are gathered in one
arena, header and payload behind each other, and one system call sends them:

    received   | READ | READ | FLUSH | WRITE | READ |          events, in order
    arena      | head data | head data | head | head data |    one send
    left over          FLUSH                                    the general way (dispatch.py)

A read that misses the page cache waits in misses.py, as cheaply, and is done here once its data has come.
Whatever else cannot be done now (several pieces, large, with flags, what must be copied) is left to the
general way; NBD allows replies in any order. The two ways answer alike: tests/server/test_fastpath.py has
every request go through both.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import socket
from time import perf_counter_ns

from nbdbm.exports import CACHED, FILLED, ZEROES, Export
from nbdbm.metrics import Tally
from nbdbm.nbd.events import BlockStatus, Event, Read, Write
from nbdbm.nbd.protocol import ServerProtocol
from nbdbm.nbd.receiver import SMALL_BODY
from nbdbm.nbd.transmission import HEAD
from nbdbm.server.ahead import StatusAhead
from nbdbm.server.buffers import BufferPool
from nbdbm.server.misses import Asker, Misses
from nbdbm.tunnel import Tunnel

log = logging.getLogger(__name__)

LARGEST = 1024 * 1024
"""Bytes of the largest read that is carried out here; larger ones would keep the others waiting."""

SEND_FROM = 64 * 1024
SEND_LARGEST = 4 * 1024 * 1024
"""Bytes of the reads that are sent from the page cache itself where the image is read-only: the kernel passes
its pages on, which takes a third of the time of copying them twice (Linux 6.18, Unix socket: 20 GB/s instead
of 8). Smaller ones are not worth a call each."""

CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What sendfile(2) says of a file system that cannot do it; it is then not asked again."""

ARENA = LARGEST + 64 * 1024
"""Bytes that replies are gathered in. Shared by all connections: it is in use within one turn of the event
loop only. One place for all, and not a buffer for each reply, stays in the processor's caches: eight buffers
of 1 MiB in turn took a fifth more time than one."""

SEND_AT = 128 * 1024
"""Bytes of replies that are sent before more are gathered: the client works on these meanwhile."""

CHEAPER = 16
"""Reads that miss, or that have their data, in place of one event of the general way."""

TURN_BYTES = 4 * 1024 * 1024
"""Bytes of replies in one turn of the event loop; then other connections get theirs."""

_arena = _view = memoryview(mmap.mmap(-1, ARENA + mmap.PAGESIZE))[64 : 64 + ARENA]
"""Begins 64 bytes into a page: where a payload, behind its header, began 1 to 28 bytes into one, the kernel
copied three times more slowly from its cache (measured: 1 MiB 620 us, elsewhere 180 us)."""
_ZEROES = memoryview(bytes(LARGEST))


class FastPath:
    """Carries out requests of one connection on one export.

    Args:
        protocol: in transmission.
        sock: where replies go: the socket, non-blocking, or TLS, which must not be given the page cache's.
        buffers: where those of large payloads go back to.
        tally: where what was done is counted.
        misses: where reads wait that miss the page cache.
        status: block status that is answered ahead, if any is.
        asker: stays awake for the client.
    """

    __slots__ = (
        "_asker",
        "_calm",
        "_cold",
        "_give",
        "_misses",
        "_reads",
        "_replies",
        "_settle",
        "_sock",
        "_status",
        "_statuses",
        "_tally",
        "_try_read",
        "_try_send",
        "_try_write",
        "_writes",
    )

    def __init__(
        self,
        export: Export,
        protocol: ServerProtocol,
        sock: socket.socket | Tunnel,
        buffers: BufferPool,
        tally: Tally,
        misses: Misses,
        status: StatusAhead | None,
        asker: Asker | None,
    ) -> None:
        self._status = status
        self._tally = tally
        self._misses = misses
        self._asker = asker
        self._calm = misses.calm
        self._cold = False
        """Reads missed of late: the next are not even tried, but the kernel told of all in one call."""
        self._reads, self._writes = tally.commands["read"], tally.commands["write"]
        self._statuses = tally.commands["status"]
        self._try_read, self._try_write = export.try_read, export.try_write
        self._try_send = export.try_send if isinstance(sock, socket.socket) else None
        self._replies, self._settle = protocol.replies, protocol.settle
        self._sock = sock
        self._give = buffers.give

    def serve(self, events: list[Event], most: int) -> tuple[list[Event], list[Event], bytes]:
        """Carry out what can be done now: (events for the general way, those not looked at, replies unsent).

        Nothing waits to be sent when this is called. Once something could not be sent, ``most`` events were
        left to the general way or CHEAPER times as many have missed, or the turn has been long enough, no
        further event is looked at. Those that have missed wait in ``misses``, and are in none of these.
        """
        began = perf_counter_ns()
        left: list[Event] = []
        ahead: list[Event] = []
        unsent = b""
        written = writes = read = missed = statuses = 0
        begin, cold = self._misses.begin, self._cold
        budget = TURN_BYTES
        try_read, pack_read, settle = self._try_read, self._replies.pack_read, self._settle
        try_send, try_write, pack_done = self._try_send, self._try_write, self._replies.pack_done
        at = 0
        for number, event in enumerate(events):
            if type(event) is Read:
                cookie, offset, length, flags = event
                if try_send is not None and SEND_FROM <= length <= SEND_LARGEST and not flags:
                    if at >= SEND_AT:
                        unsent = self._send(at)
                        at = 0
                        if unsent:
                            ahead = events[number:]
                            break
                    place = try_send(offset, length)
                    if place is not None:
                        at += pack_read(_arena, at, cookie, offset, length)
                        if settle is not None:
                            settle(cookie, offset)
                        unsent = self._send_with_file(at, *place, length)
                        read += length
                        budget -= at + length
                        at = 0
                        if unsent or budget < LARGEST:
                            ahead = events[number + 1 :]
                            break
                        continue
                if flags or length > LARGEST:
                    left.append(event)
                    continue
                if cold and begin(event):
                    missed += 1
                    if missed >= CHEAPER * most or len(left) >= most:
                        ahead = events[number + 1 :]
                        break
                    continue
                if at >= SEND_AT or at + HEAD + length > ARENA:
                    budget -= at
                    unsent = self._send(at)
                    at = 0
                    if unsent or budget < LARGEST:
                        ahead = events[number:]
                        break
                start = at + pack_read(_arena, at, cookie, offset, length)
                done = try_read(_view[start : start + length], offset)
                if done == FILLED:
                    at = start + length
                elif done == ZEROES:
                    at = self._zeroes(at, start, event)
                else:
                    if begin(event):
                        missed += 1
                        self._cold = cold = True
                    else:
                        left.append(event)
                    if missed >= CHEAPER * most or len(left) >= most:
                        ahead = events[number + 1 :]
                        break
                    continue
                read += length
                if settle is not None:
                    settle(cookie, offset)
            elif type(event) is Write:
                cookie, offset, data, flags = event
                if at >= SEND_AT:
                    unsent = self._send(at)
                    at = 0
                    if unsent:
                        ahead = events[number:]
                        break
                if flags or not try_write(offset, data):
                    left.append(event)
                    continue
                at += pack_done(_arena, at, cookie, offset)
                writes += 1
                length = len(data)
                written += length
                if length > SMALL_BODY:
                    self._give(data.obj)
                if settle is not None:
                    settle(cookie, offset)
            elif type(event) is BlockStatus and self._status is not None:
                unsent = self._send(at)
                at = 0
                if unsent:
                    ahead = events[number:]
                    break
                reply = self._status.reply(event)
                if reply is None:
                    left.append(event)
                    continue
                statuses += 1
                if settle is not None:
                    settle(event.cookie, event.offset)
                unsent = self._send_packed(reply)
                if unsent:
                    ahead = events[number + 1 :]
                    break
            else:
                left.append(event)
        if at:
            unsent = self._send(at)
        # Counted by the batch, and each request took as long as the batch did.
        took = perf_counter_ns() - began
        reads = len(events) - writes - missed - statuses
        if left or ahead:
            reads -= len(left) + len(ahead)
        if reads:
            # ``record`` by hand: a call would be half of what counting a lone request costs.
            figures = self._reads
            figures.operations += reads
            figures.bytes += read
            figures.nanoseconds += took * reads
            figures.buckets[took.bit_length()] += reads
        if writes:
            self._writes.record(writes, written, took)
        if statuses:
            self._statuses.record(statuses, 0, took)
        if reads or writes:
            self._calm.answered(self._asker, began + took)
        return left, ahead, unsent

    def serve_arrived(self, most: int) -> tuple[list[Read], bytes]:
        """Answer reads whose data has come: (those for the general way, replies unsent).

        Nothing waits to be sent when this is called. CHEAPER times ``most`` are answered at most.
        """
        left: list[Read] = []
        unsent = b""
        at = 0
        arrived, finish = self._misses.arrived, self._misses.finish
        figures, tally = self._reads, self._tally
        try_read, pack_read, settle = self._try_read, self._replies.pack_read, self._settle
        now = perf_counter_ns()
        for _ in range(min(CHEAPER * most, len(arrived))):
            if at >= SEND_AT:
                unsent = self._send(at)
                at = 0
                if unsent:
                    break
            event, began, what = arrived.popleft()
            finish()
            if what == CACHED:
                self._cold = False
            cookie, offset, length, _ = event
            start = at + pack_read(_arena, at, cookie, offset, length)
            done = try_read(_view[start : start + length], offset)
            if done == FILLED:
                at = start + length
            elif done == ZEROES:  # somebody has discarded it meanwhile
                at = self._zeroes(at, start, event)
            else:
                left.append(event)
                continue
            figures.record(1, length, now - began)
            tally.general += 1
            if settle is not None:
                settle(cookie, offset)
        if at:
            unsent = self._send(at)
        return left, unsent

    def _zeroes(self, at: int, start: int, event: Read) -> int:
        """Answer a read of nothing but zeroes, as a hole or zeroes at ``start``; return where it ends."""
        size = self._replies.pack_hole(_arena, at, event.cookie, event.offset, event.length)
        if size:
            return at + size
        _view[start : start + event.length] = _ZEROES[: event.length]
        return start + event.length

    def _send_with_file(self, at: int, fd: int, place: int, length: int) -> bytes:
        """Send the arena's first ``at`` bytes and then ``length`` from a file; return what was not taken."""
        assert isinstance(self._sock, socket.socket)
        unsent = self._send(at)
        sent = 0
        try:
            while not unsent and sent < length:
                count = os.sendfile(self._sock.fileno(), fd, place + sent, length - sent)
                if not count:
                    break  # somebody has cut the file: an error, as everywhere
                sent += count
        except OSError as error:
            # Mostly it takes no more. Real errors are left to the transport, which meets them with the rest.
            if error.errno in CANNOT:
                self._try_send = None
        if sent == length:
            return b""
        rest = bytearray(length - sent)
        try:
            _read(fd, memoryview(rest), place + sent)
        except OSError as error:
            # The reply's header has gone: all that can be said is nothing more.
            path = os.readlink(f"/proc/self/fd/{fd}")
            log.error(
                "%s: reading %d bytes at %d failed after the reply had begun, so the connection ends: %s",
                path,
                len(rest),
                place + sent,
                error.strerror,
            )
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            return b""
        return unsent + rest

    def _send_packed(self, reply: bytearray) -> bytes:
        """Send a reply that is not in the arena; as ``_send``."""
        try:
            sent = self._sock.send(reply)
        except OSError:
            sent = 0
        return bytes(reply[sent:])

    def _send(self, length: int) -> bytes:
        """Send the arena's first ``length`` bytes; return what the socket did not take. Errors are left to
        the transport, which meets them with the rest."""
        if not length:
            return b""
        try:
            sent = self._sock.send(_view[:length])
        except OSError:
            sent = 0
        return bytes(_view[sent:length]) if sent < length else b""


def _read(fd: int, view: memoryview, offset: int) -> None:
    """Fill ``view`` from a file that had it all a moment ago."""
    while view:
        count = os.preadv(fd, (view,), offset)
        if not count:
            raise OSError(errno.EIO, "the file has become shorter while it is in use")
        view, offset = view[count:], offset + count
