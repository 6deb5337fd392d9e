"""One client: bytes in, commands out to dispatch, replies back, never more in memory than the limits allow.

    transport -> get_buffer/buffer_updated -> core -> events -> waiting -> (limits) -> dispatch.answer
    transport <- one write per batch       <- core <- reply_*                      <-'

Reading pauses while commands wait for the limits, and no command starts while the transport still has
bytes to send. So a client that never reads its replies holds what the limits say and no more.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, cast

from nbdbm.errors import NbdError
from nbdbm.inline import run_inline
from nbdbm.metrics import Ending
from nbdbm.nbd.constants import NbdErrno
from nbdbm.nbd.events import Command, Disconnected, Event, ExportWanted, GoRequested, StartTls, Write
from nbdbm.nbd.handshake import TlsMode
from nbdbm.nbd.protocol import ServerProtocol
from nbdbm.peer import UNKNOWN, Peer
from nbdbm.registry import Lease, Refused
from nbdbm.server.account import Account
from nbdbm.server.ahead import StatusAhead
from nbdbm.server.budget import SMALL
from nbdbm.server.buffers import Buffer
from nbdbm.server.busypoll import BusyPoll
from nbdbm.server.dispatch import NAMES, Context, answer, cost
from nbdbm.server.fastpath import FastPath
from nbdbm.tunnel import Tunnel

if TYPE_CHECKING:
    from nbdbm.server.server import Server

log = logging.getLogger(__name__)

MAX_REQUESTS = 128
"""Commands in progress per connection: twice what nbdcopy and fio ask for, and few enough threads' work."""

MAX_BYTES = 64 * 1024 * 1024
"""Memory of one connection's commands and unsent replies, bytes: two of the largest requests there are, so
that one can be carried out while the other's reply is sent. A single command always may start."""

BATCH_BYTES = 256 * 1024
"""Replies gathered before they are sent, bytes: further commands start when these are on their way, so the
client works on the one while we work on the other, and other connections get their turn. Of 1 MiB, four
reads of 256 KiB were served at half the rate, since client and server took turns."""

BEGIN_AT_ONCE = 2
"""Commands that are begun the general way in one turn of the event loop while there are other clients. One
that misses the page cache takes ten times as long as one that does not: with whole batches begun at once, a
client whose reads hit got 2 000 of them a second beside one whose reads miss; with two at a time, 7 000."""

JOIN_BELOW = 32 * 1024
"""Pieces of replies below this size are joined to one write, in bytes; copying larger ones costs more than
the call saved."""

HANDOVER = 16 * 1024
"""Bytes given to the transport when the client does not take more at once: it copies them and waits. Given
everything, forty clients that read nothing cost 2.4 GB instead of half of it."""

MAX_PIECES = 1024
"""Pieces that one system call sends: IOV_MAX."""

HANDSHAKE_AGAIN = 1.0
"""Seconds that a handshake gets anew whose time is over while we open an image for it."""

LINGER = 30.0
"""Seconds without progress after which a client is cut off that has said goodbye, whose requests all are
answered, and that does not take the last replies."""


class NbdConnection(asyncio.BufferedProtocol):
    """The server's end of one connection.

    Owns the tasks of its commands; they are never cancelled while the loop lives, since a command that
    has started may be changing metadata. The server is told by ``forget`` once nothing of it is left.
    """

    def __init__(self, server: Server, sock: socket.socket | None = None, peer: Peer = UNKNOWN) -> None:
        """``sock``: the transport's own socket, if what is written to it goes out as it is (no TLS)."""
        self.begun = asyncio.get_running_loop().time()
        """When the client came, in seconds of the event loop's clock."""
        self.peer = peer
        """The client; TLS replaces it with what it knows better."""
        self._server = server
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._credentials = server.tls
        self._tunnel: Tunnel | None = None
        """TLS, once it is asked for; then the transport too."""
        self.account = Account(server.metrics)
        self._protocol = ServerProtocol(
            server.registry.view(lambda: self.peer, self.account.turn_away),
            allocate=self._payload_buffer,
            refused=self.account.refused,
            tls=TlsMode.OFF if server.tls is None else server.tls.mode,
        )
        self._transport: asyncio.Transport | None = None
        self._lease: Lease | None = None
        """Of the export last asked about, or the one that is used; kept until nothing of us is left."""
        self._opening: asyncio.Task[None] | None = None
        """The handshake waits for an export to be opened."""
        self._context: Context | None = None
        self._fast: FastPath | None = None
        """Answers what it can before anything of the below begins; needs the socket itself."""
        self._poll: BusyPoll | None = None
        self._status_ahead: StatusAhead | None = None
        self._ahead: list[Event] = []
        """What it has not looked at yet, because the client does not take replies or its turn was over."""
        self._handshake: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._waiting: deque[tuple[int, Command]] = deque()
        """Commands not started yet, each with its cost: what one receive brought beyond the limits."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = 0
        """Commands started and not answered."""
        self._bytes = 0
        """Cost of commands started, until their replies have left."""
        self._answered = 0
        """The part of it whose replies are queued or being sent."""
        self._payload = 0
        """Bytes taken for the payload of a large write, which is coming in or waits to be carried out."""
        self._awaits_room = False
        """Something waits for the memory that all connections share."""
        self._behind: float | None = None
        """Since when replies or a payload have been waiting for the client, on the loop's clock."""
        self._sent: list[Buffer] = []
        """Buffers of these replies."""
        self._unsent: list[bytes | memoryview] = []
        """Replies beyond what the transport holds, when it holds any."""
        self._blocked = False
        """The transport holds bytes that the client has not taken."""
        self._paused = False
        self._ended = False
        """Nothing more is read."""
        self._lost = False
        self._pump_scheduled = False

    # -- callbacks of the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # 0: told as soon as anything is left over, and again when nothing is; buffers are reusable then.
        self._transport.set_write_buffer_limits(high=0)
        self._handshake = self._loop.call_later(
            self._server.config.handshake_timeout, self._handshake_expired
        )
        self._send()
        if self._server.closing:
            self.drain()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._protocol.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        events = self._protocol.buffer_updated(nbytes)
        idle = self._act_on(events)
        if idle and (ahead := self._status_ahead) is not None and ahead.wanted:
            ahead.work()
        if idle and (poll := self._poll) and len(events) == 1 and self._may_stay_awake and poll.begin():
            self._stay_awake(poll)

    def _act_on(self, events: list[Event]) -> bool:
        """Act on events; whether all is answered and sent already, and nothing else to be done."""
        if self._answered_now(events):
            if self._payload and not self._protocol.receiving:
                self._drop_payload()
            return True
        self._pump()
        left = self._ahead or self._waiting or self._running or self._unsent or self._blocked
        return not (left or self._ended)

    def _answered_now(self, events: list[Event]) -> bool:
        """Let the fast path do what it can; whether all is answered and sent, and nothing else to be done."""
        if self._fast is None or not events or self._ended:
            self._take(events)
            return False
        if type(events[-1]) is Disconnected:
            self._take([events.pop()])
        self._ahead = self._ahead + events if self._ahead else events
        self._serve_ahead(self._fast)
        left = self._ahead or self._waiting or self._unsent or self._ended
        return not (left or self._protocol.queued or self._protocol.starved)

    @property
    def _may_stay_awake(self) -> bool:
        """Whether nobody else has to wait for the event loop meanwhile."""
        return self._server.alone and not (self._running or self._paused or self._ended or self._lost)

    @property
    def _begin_at_once(self) -> int:
        """How many commands may begin the general way in this turn."""
        return MAX_REQUESTS if self._server.alone else BEGIN_AT_ONCE

    def _stay_awake(self, poll: BusyPoll) -> None:
        """Answer requests that come one by one without going back to the event loop for each."""
        while count := poll.receive(self._protocol.get_buffer):
            events = self._protocol.buffer_updated(count)
            if not self._act_on(events) or len(events) > 1:
                # It waits for something, or several came at once: this client need not be waited for.
                poll.stop()
                return
            if (ahead := self._status_ahead) is not None and ahead.wanted:
                ahead.work()
        if poll.going_on:
            self._loop.call_soon(self._stay_awake_again, poll)

    def _stay_awake_again(self, poll: BusyPoll) -> None:
        """The event loop has looked after everybody else, without sleeping."""
        if not self._may_stay_awake:
            poll.stop()
            return
        poll.resume()
        try:
            self._stay_awake(poll)
        except BaseException:
            # A bug: this connection ends, as it does where the transport has called us.
            self.account.end(Ending.FAILED)
            self.abort()
            raise

    def _serve_ahead(self, fast: FastPath) -> None:
        """Let the fast path answer what it can, as long as the client takes it."""
        if self._unsent or self._blocked:
            return
        if not self._server.budget.exhausted:
            left, self._ahead, unsent = fast.serve(self._ahead, self._begin_at_once)
        else:
            # Too many clients that take nothing: one command at a time.
            left, self._ahead, unsent = self._ahead, [], b""
        for event in left:
            command = cast(Command, event)
            self._waiting.append((cost(command), command))
        if unsent:
            self._unsent.append(unsent)
            self._bytes += len(unsent)
            self._server.budget.take(len(unsent))
            self._answered += len(unsent)
            self._is_behind()

    def eof_received(self) -> bool:
        events = self._protocol.receive_eof()
        for event in events:
            if isinstance(event, Disconnected):
                self.account.end(Ending.DISCONNECTED, event.reason)
        self._take(events)
        self._ended = True
        self._pump()
        # The client may have closed its sending half only: what it asked for is still answered.
        return True

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        # First what waits to be sent, then commands that would add to it.
        self._send()
        self._pump()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            log.debug("connection lost: %s", exc)
        self.account.end(Ending.DISCONNECTED, "" if exc is None else str(exc))
        self._lost = self._ended = True
        self._protocol.receive_eof()
        self._waiting.clear()
        self._ahead.clear()
        self._server.budget.forget(self)
        self._drop_payload()
        if self._blocked:
            # The transport may hold views of these until it is gone; they are dropped with it.
            self._sent.clear()
        self._unsent.clear()
        for timer in (self._handshake, self._linger):
            if timer is not None:
                timer.cancel()
        self._forget_if_over()

    # -- called by the server and the registry

    @property
    def handshaking(self) -> bool:
        """Whether it has not asked for an export, and does not wait for us to open one."""
        return self._handshake is not None and self._opening is None

    @property
    def running(self) -> int:
        """Commands begun, or waiting to be, and not answered."""
        return self._running + len(self._waiting) + len(self._ahead)

    @property
    def held(self) -> int:
        """Bytes of memory that commands in progress and unsent replies take, roughly and from above."""
        return self._bytes

    def leave(self, why: str) -> None:
        """The export is withdrawn."""
        self.drain(Ending.WITHDRAWN, why)

    def drain(self, ending: Ending = Ending.SHUTDOWN, why: str = "") -> None:
        """Take no more commands, answer those in progress, then close."""
        if self._ended:
            return
        self.account.end(ending, why)
        text = why or "the server is shutting down"
        self._ended = True
        commands = [command for _, command in self._waiting] + [cast(Command, each) for each in self._ahead]
        self._waiting.clear()
        self._ahead.clear()
        self._server.budget.forget(self)
        self._drop_payload()
        for command in commands:
            assert self._context is not None
            self._context.tally.commands[NAMES[type(command)]].refuse(NbdErrno.ESHUTDOWN.name)
            self._protocol.reply_error(command.cookie, NbdErrno.ESHUTDOWN, text)
        self._pump()

    @property
    def behind_since(self) -> float | None:
        """Since when the client has let us hold memory that it could relieve us of; None: it does not."""
        return self._behind if self._unsent or self._blocked or self._protocol.receiving else None

    def proceed(self) -> None:
        """There may be room now for what waited."""
        self._schedule_pump()

    def cut_off(self, why: str) -> None:
        """Close now: the client has taken too long, and others wait."""
        self.account.end(Ending.TIME_OUT, why)
        self.abort()

    def abort(self) -> None:
        """Close now, whatever is unsent."""
        if self._transport is not None:
            self._transport.abort()

    # -- events

    def _take(self, events: list[Event]) -> None:
        while events:
            following: list[Event] = []
            for event in events:
                if isinstance(event, GoRequested):
                    following = self._go(event.name)
                elif isinstance(event, ExportWanted):
                    self._opening = self._loop.create_task(self._open(event.name))
                elif isinstance(event, StartTls):
                    self._start_tls()
                elif isinstance(event, Disconnected):
                    log.debug("client left%s: %s", "" if event.clean else " badly", event.reason)
                    self.account.end(
                        Ending.GOODBYE if event.clean else Ending.PROTOCOL,
                        "" if event.clean else event.reason,
                    )
                    self._ended = True
                elif not self._ended:
                    self._waiting.append((cost(event), event))
            events = following

    async def _open(self, name: str) -> None:
        """Open the export that the handshake waits for, and go on with that."""
        events: list[Event] = []
        try:
            self._hold(await self._server.registry.lease(name, self.peer, self.leave))
            events = self._protocol.opened()
        except Refused as refused:
            self.account.turn_away()
            events = self._protocol.refuse(refused.rep, str(refused))
        except Exception:
            log.exception("opening export %r", name)  # a bug: this connection ends
            self.account.end(Ending.FAILED)
            self.abort()
        finally:
            self._opening = None
            if self._lost:
                self._forget_if_over()
        self._take(events)
        self._pump()

    def _hold(self, lease: Lease | None) -> None:
        """Use this export and none before it."""
        if self._lease is not None:
            self._lease.release()
        self._lease = lease

    def _go(self, name: str) -> list[Event]:
        try:
            if self._lease is None or self._lease.name != name:
                self._hold(self._server.registry.lease_now(name, self.peer, self.leave))
            lease = cast(Lease, self._lease)
            lease.count()
        except Refused as refused:
            self.account.turn_away()
            return self._protocol.refuse(refused.rep, str(refused))
        export = lease.export
        if self._handshake is not None:
            self._handshake.cancel()
            self._handshake = None
        tally = self.account.enter(export.info.name)
        self._status_ahead = StatusAhead.of(export, self._protocol)
        self._context = Context(
            export, self._protocol, self._server.buffers, self._sent, tally, self._status_ahead, self.peer
        )
        events = self._protocol.accept(export.info)
        if (negotiated := self._protocol.negotiated) is not None:
            self.account.contexts = [context.name for context in negotiated.contexts]
        outlet = self._socket or self._tunnel
        if outlet is not None and not self._protocol.traced:
            self._fast = FastPath(export, self._protocol, outlet, self._server.buffers, tally)
            if self._server.busy_poll and self._socket is not None:
                self._poll = BusyPoll(self._socket, self._server.busy_poll)
        return events

    def _start_tls(self) -> None:
        """Answer in plain text; from then on the transport is the tunnel. The handshake's time runs on."""
        assert self._credentials is not None, "TLS is not offered without"
        self._send()
        if self._unsent:
            self.account.end(Ending.PROTOCOL, "it wants TLS before it took the answers to earlier options")
            self.abort()
            return
        self._socket = None
        upgrade = self._credentials.begin()

        def ready() -> None:
            try:
                self.peer = upgrade.peer(self.peer, tunnel.tls)
            except NbdError as error:
                failed(str(error))
                self.abort()
                return
            # What it asked for in plain text, somebody else may have asked for; and it was judged as nobody.
            self._hold(None)
            self._protocol.tls_started()

        def failed(reason: str) -> None:
            self.account.end(Ending.TLS, f"no TLS: {reason}")

        tunnel = Tunnel(
            cast(asyncio.Transport, self._transport),
            self,
            upgrade.context,
            server_side=True,
            ready=ready,
            failed=failed,
        )
        self._transport = self._tunnel = tunnel
        tunnel.start()

    def _handshake_expired(self) -> None:
        if self._opening is not None:
            # It is we who take long.
            self._handshake = self._loop.call_later(HANDSHAKE_AGAIN, self._handshake_expired)
            return
        self.account.end(
            Ending.TIME_OUT, f"no export asked for in {self._server.config.handshake_timeout:g} s"
        )
        self.abort()

    # -- the pump: start what the limits allow, send what is answered, read on if there is room

    def _pump(self) -> None:
        self._pump_scheduled = False
        if self._lost:
            return
        if self._protocol.starved and not self._waiting and self._server.budget.has(self._protocol.starved):
            self._take(self._protocol.feed())
        if self._ahead and self._fast is not None:
            self._serve_ahead(self._fast)
        self._start_waiting()
        self._send()
        if self._ahead or self._waiting:
            if self._may_go_on():
                self._schedule_pump()
            self._pause()
        elif self._ended:
            self._pause()
            self._close_if_answered()
        elif self._protocol.starved:
            self._pause()
            self._await_room(self._protocol.starved)
        elif self._blocked or self._running >= MAX_REQUESTS or self._bytes >= MAX_BYTES:
            self._pause()
        elif self._paused:
            self._paused = False
            cast(asyncio.Transport, self._transport).resume_reading()
        if not (self._waiting or self._ahead):
            if self._payload and not self._protocol.receiving:
                self._drop_payload()  # the fast path has answered it
            if self._awaits_room and not self._protocol.starved:
                self._awaits_room = False
                self._server.budget.forget(self)

    def _may_go_on(self) -> bool:
        """Whether something waits for nothing but its turn."""
        if self._ahead and not (self._unsent or self._blocked):
            return True
        return bool(self._waiting) and self._may_start(*self._waiting[0])

    def _schedule_pump(self) -> None:
        if not self._pump_scheduled:
            self._pump_scheduled = True
            self._loop.call_soon(self._pump)

    def _start_waiting(self) -> None:
        waiting = self._waiting
        context = self._context
        queued = self._answered
        begun, most = 0, self._begin_at_once
        while (
            waiting
            and begun < most
            and self._answered - queued < BATCH_BYTES
            and self._may_start(*waiting[0])
        ):
            assert context is not None  # commands follow a GO
            price, command = waiting.popleft()
            begun += 1
            self._running += 1
            self._bytes += price
            self._server.budget.take(price)
            if self._reserved(command):
                self._drop_payload()  # it is part of the price
            try:
                task = run_inline(answer(command, context), self._loop)
            except BaseException:
                # A bug: this connection ends, its accounts must not keep it alive.
                self._running -= 1
                self._answered += price
                raise
            if task is None:
                self._running -= 1
                self._answered += price
            else:
                self._tasks.add(task)
                task.add_done_callback(partial(self._finished, price))

    def _may_start(self, price: int, command: Command) -> bool:
        if self._blocked:
            return False
        if self._bytes and (self._running >= MAX_REQUESTS or self._bytes + price > MAX_BYTES):
            return False
        more = price - self._reserved(command)
        if self._server.budget.has(more) or (price <= SMALL and not self._bytes):
            return True
        self._await_room(more)
        return False

    def _await_room(self, count: int) -> None:
        self._awaits_room = True
        self._server.budget.wait(self, count)

    def _reserved(self, command: Command) -> int:
        """The part of the command's cost that was taken when its payload came in."""
        if not self._payload or type(command) is not Write or self._protocol.receiving:
            return 0
        return self._payload if len(command.data) == self._payload else 0

    def _payload_buffer(self, length: int) -> Buffer | None:
        """Where the payload of a large write is received; None: there is no memory for it now."""
        self._drop_payload()  # of a write that has been answered
        if not self._server.budget.has(length):
            return None
        self._server.budget.take(length)
        self._payload = length
        self._is_behind()
        return self._server.buffers.take(length)

    def _drop_payload(self) -> None:
        """The payload is not counted apart any more."""
        count, self._payload = self._payload, 0
        if count:
            self._server.budget.give(count)

    def _is_behind(self) -> None:
        """The client has something to do from now on."""
        if self._behind is None:
            self._behind = self._loop.time()

    def _finished(self, price: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._running -= 1
        self._answered += price
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a request's task failed", exc_info=error)
            self.account.end(Ending.FAILED)
            self.abort()
        if self._lost:
            self._forget_if_over()
        else:
            # Other tasks may finish in the same turn of the loop: one send for all of them.
            self._schedule_pump()

    # -- sending

    def _send(self) -> None:
        if self._blocked or self._lost:
            return
        self._unsent += self._protocol.data_to_send()
        if self._unsent:
            if self._socket is None:
                self._write(self._unsent)
                self._unsent = []
            else:
                self._send_directly(self._socket)
        if self._blocked or self._unsent:
            self._is_behind()
        else:
            self._release()

    def _send_directly(self, sock: socket.socket) -> None:
        """One system call for all that is queued, past the transport, while that holds nothing back.

        What the socket does not take stays here; the transport gets only as much as makes it say when
        the client reads again, because it would copy everything.
        """
        transport = cast(asyncio.Transport, self._transport)
        while self._unsent and not self._blocked and not transport.is_closing():
            self._unsent = send_now(sock, self._unsent)
            if self._unsent:
                first = memoryview(self._unsent[0])
                if len(first) > HANDOVER:
                    self._unsent[0] = first[HANDOVER:]
                else:
                    del self._unsent[0]
                transport.write(first[:HANDOVER])

    def _write(self, pieces: list[bytes | memoryview]) -> None:
        transport = cast(asyncio.Transport, self._transport)
        if self._tunnel is not None:
            transport.writelines(pieces)
            return
        small: list[bytes | memoryview] = []
        for piece in pieces:
            if len(piece) < JOIN_BELOW:
                small.append(piece)
                continue
            if small:
                transport.write(b"".join(small))
                small.clear()
            transport.write(piece)
        if small:
            transport.write(b"".join(small) if len(small) > 1 else small[0])

    def _release(self) -> None:
        """Everything answered has left: its buffers and its share of the limits are free again."""
        self._bytes -= self._answered
        count, self._answered = self._answered, 0
        if count:
            self._server.budget.give(count)
        if not self._payload:
            self._behind = None
        for buffer in self._sent:
            self._server.buffers.give(buffer)
        self._sent.clear()

    # -- the end

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            cast(asyncio.Transport, self._transport).pause_reading()

    def _close_if_answered(self) -> None:
        if self._running or self._opening is not None:
            return
        self._unsent += self._protocol.data_to_send()
        if self._linger is None:
            self._linger = self._loop.call_later(LINGER, self._linger_expired, self._left())
        if not self._unsent:
            # Closes once the transport has sent what it holds.
            cast(asyncio.Transport, self._transport).close()

    def _left(self) -> int:
        """Bytes that the client has not taken yet."""
        return cast(asyncio.Transport, self._transport).get_write_buffer_size() + sum(map(len, self._unsent))

    def _linger_expired(self, before: int) -> None:
        left = self._left()
        if left >= before:
            log.debug("client does not take the last %d bytes", left)
            self.account.end(Ending.TIME_OUT, f"the last {left} bytes were not taken")
            self.abort()
        else:
            self._linger = self._loop.call_later(LINGER, self._linger_expired, left)

    def _forget_if_over(self) -> None:
        if not self._running and self._opening is None:
            self._release()
            self._hold(None)
            self.account.close(self.peer)
            self._server.forget(self)


def send_now(sock: socket.socket, pieces: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """Send what the socket takes without waiting; return the rest.

    Errors are left to the transport: it meets them with the rest, and closes.
    """
    at = 0
    while at < len(pieces):
        batch = pieces[at : at + MAX_PIECES]
        try:
            sent = sock.sendmsg(batch)
        except OSError:
            break
        at += len(batch)
        if sent < sum(map(len, batch)):
            for index, piece in enumerate(batch):
                if sent < len(piece):
                    return [memoryview(piece)[sent:], *batch[index + 1 :], *pieces[at:]]
                sent -= len(piece)
    return pieces[at:]
