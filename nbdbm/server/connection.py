"""One client: bytes in, commands out to dispatch, replies back, never more in memory than the limits allow.

    transport -> get_buffer/buffer_updated -> core -> events -> backlog -> (holdings) -> dispatch.answer
    transport <- outbox                    <- core <- reply_*                        <-'

Reading pauses while commands wait for the limits, and no command starts while the transport still has
bytes to send. So a client that never reads its replies holds what the limits say and no more.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, cast

from nbdbm.errors import NbdError
from nbdbm.metrics import Ending
from nbdbm.nbd.constants import NbdErrno
from nbdbm.nbd.events import Command, Disconnected, Event, ExportWanted, GoRequested, StartTls
from nbdbm.nbd.handshake import TlsMode
from nbdbm.nbd.protocol import ServerProtocol
from nbdbm.nbd.requests import owned
from nbdbm.peer import UNKNOWN, Peer
from nbdbm.registry import Lease, Refused
from nbdbm.server.account import Account
from nbdbm.server.ahead import StatusAhead
from nbdbm.server.backlog import Backlog
from nbdbm.server.busypoll import Awake, BusyPoll
from nbdbm.server.dispatch import NAMES, Context
from nbdbm.server.farewell import part
from nbdbm.server.fastpath import FastPath
from nbdbm.server.holdings import MAX_REQUESTS, Holdings
from nbdbm.server.listener import silence
from nbdbm.server.misses import Misses
from nbdbm.server.outbox import Outbox
from nbdbm.server.turns import Place
from nbdbm.tunnel import Tunnel

if TYPE_CHECKING:
    from nbdbm.server.server import Server

log = logging.getLogger(__name__)

BEGIN_AT_ONCE = 2
"""Commands that are begun the general way in one turn of the event loop while there are other clients. One
that misses the page cache takes ten times as long as one that does not: with whole batches begun at once, a
client whose reads hit got 2 000 of them a second beside one whose reads miss; with two at a time, 7 000."""

HANDSHAKE_AGAIN = 1.0
"""Seconds that a handshake gets anew whose time is over while we open an image for it."""

LINGER = 30.0
"""Seconds without progress after which a client is cut off that has said goodbye, whose requests all are
answered, and that does not take the last replies."""


class NbdConnection(asyncio.BufferedProtocol):
    """The server's end of one connection.

    The server is told by ``forget`` once nothing of it is left, which is when all commands that have begun
    have ended.
    """

    def __init__(self, server: Server, sock: socket.socket | None = None, peer: Peer = UNKNOWN) -> None:
        """``sock``: the transport's own socket, if what is written to it goes out as it is (no TLS)."""
        self.begun = asyncio.get_running_loop().time()
        """When the client came, in seconds of the event loop's clock."""
        self.peer = peer
        """The client; TLS replaces it with what it knows better."""
        self._server = server
        self._wire = sock
        """The socket below TLS, too."""
        self._loop = asyncio.get_running_loop()
        self._credentials = server.tls
        self._outbox = Outbox(sock)
        self._holdings = Holdings(server.budget, server.buffers, self)
        self.account = Account(server.metrics)
        self._protocol = ServerProtocol(
            server.registry.view(lambda: self.peer, self.account.turn_away),
            allocate=self._holdings.payload_buffer,
            refused=self.account.refused,
            tls=TlsMode.OFF if server.tls is None else server.tls.mode,
            in_turns=True,
            lend=True,
        )
        self._transport: asyncio.Transport | None = None
        self._lease: Lease | None = None
        """Of the export last asked about, or the one that is used; kept until nothing of us is left."""
        self._opening: asyncio.Task[None] | None = None
        """The handshake waits for an export to be opened."""
        self._backlog = Backlog(self._holdings, self._outbox, self._command_finished, self._fail)
        """What the below leaves to the general way."""
        self._fast: FastPath | None = None
        """Answers what it can before anything of the below begins; needs the socket itself."""
        self._misses: Misses | None = None
        """Reads that it will answer once their data has come."""
        self._awake: Awake | None = None
        self._status_ahead: StatusAhead | None = None
        self._ahead: list[Event] = []
        """What it has not looked at yet, because the client does not take replies or its turn was over."""
        self._handshake: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._paused = False
        self._ended = False
        """Nothing more is read."""
        self._lost = False
        self._pump_scheduled = False
        self._place = Place(server.rota, self._go_on)
        """Where its handshake waits for its turn."""

    # -- callbacks of the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._outbox.attach(self._transport)
        self._handshake = self._loop.call_later(
            self._server.config.handshake_timeout, self._handshake_expired
        )
        self._send()
        if self._server.closing:
            self.drain()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._protocol.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        served = self._serve(nbytes)
        if served > 0 and self._awake is not None:
            self._awake.go_on(served)

    def _serve(self, nbytes: int) -> int:
        """Act on what was received: how many events that were, or -1 if something is left to be done."""
        events = self._protocol.buffer_updated(nbytes)
        if not self._act_on(events):
            return -1
        if (ahead := self._status_ahead) is not None and ahead.wanted:
            ahead.work()
        return len(events)

    def _act_on(self, events: list[Event]) -> bool:
        """Act on events; whether all is answered and sent already, and nothing else to be done."""
        if self._answered_now(events):
            if self._holdings.payload and not self._protocol.receiving:
                self._holdings.drop_payload()
            return not self._holdings.running
        self._pump(served=True)
        left = self._ahead or self._backlog.waiting or self._holdings.running or self._outbox.full
        return not (left or self._ended)

    def _answered_now(self, events: list[Event]) -> bool:
        """Let the fast path do what it can; whether nothing is left but what waits for its data."""
        if self._fast is None or not events or self._ended:
            self._take(events)
            return False
        if type(events[-1]) is Disconnected:
            self._take([events.pop()])
        self._ahead = self._ahead + events if self._ahead else events
        self._serve_ahead(self._fast)
        if self._ahead:
            self._ahead = [owned(event) for event in self._ahead]
        left = self._ahead or self._backlog.waiting or self._outbox.unsent or self._ended
        return not (left or self._protocol.queued or self._protocol.starved)

    def _may_stay_awake(self, beside_others: bool) -> bool:
        """See ``Awake``."""
        if not (beside_others or self._server.alone):
            return False
        return not (self._holdings.running or self._paused or self._ended or self._lost)

    @property
    def _begin_at_once(self) -> int:
        """How many commands may begin the general way in this turn."""
        return MAX_REQUESTS if self._server.alone else BEGIN_AT_ONCE

    def _serve_ahead(self, fast: FastPath) -> None:
        """Let the fast path answer what it can, as long as the client takes it."""
        if self._outbox.full:
            return
        if not self._server.budget.exhausted:
            left, self._ahead, unsent = fast.serve(self._ahead, self._begin_at_once)
        else:
            # Too many clients that take nothing: one command at a time.
            left, self._ahead, unsent = self._ahead, [], b""
        for event in left:
            self._backlog.add(cast(Command, owned(event)))
        if unsent:
            self._outbox.unsent.append(unsent)
            self._holdings.queue(len(unsent))

    def _serve_arrived(self, fast: FastPath) -> None:
        """Answer reads whose data has come, as long as the client takes it."""
        if self._outbox.full:
            return
        left, unsent = fast.serve_arrived(self._begin_at_once)
        for read in left:
            self._backlog.add(read)
        if unsent:
            self._outbox.unsent.append(unsent)
            self._holdings.queue(len(unsent))

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
        self._outbox.blocked = True

    def resume_writing(self) -> None:
        self._outbox.blocked = False
        # First what waits to be sent, then commands that would add to it.
        self._send()
        self._pump()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            log.debug("connection lost: %s", exc)
        self.account.end(Ending.DISCONNECTED, "" if exc is None else str(exc))
        self._lost = self._ended = True
        part(self._wire)
        self._protocol.receive_eof()
        self._backlog.take_back()
        self._ahead.clear()
        self._holdings.await_nothing()
        self._holdings.drop_payload()
        if self._outbox.blocked:
            # The transport may hold views of these until it is gone; they are dropped with it.
            self._holdings.sent.clear()
        self._outbox.unsent.clear()
        if self._misses is not None:
            self._misses.drop()
        if self._awake is not None:
            self._server.calm.left(self._awake)
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
        return self._holdings.running + len(self._backlog.waiting) + len(self._ahead)

    @property
    def held(self) -> int:
        """Bytes of memory that commands in progress and unsent replies take, roughly and from above."""
        return self._holdings.bytes

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
        commands = self._backlog.take_back() + [cast(Command, each) for each in self._ahead]
        self._ahead.clear()
        self._holdings.await_nothing()
        self._holdings.drop_payload()
        for command in commands:
            assert self._backlog.context is not None
            self._backlog.context.tally.commands[NAMES[type(command)]].refuse(NbdErrno.ESHUTDOWN.name)
            self._protocol.reply_error(command.cookie, NbdErrno.ESHUTDOWN, text)
        self._pump()

    @property
    def behind_since(self) -> float | None:
        """Since when the client has let us hold memory that it could relieve us of; None: it does not."""
        return self._holdings.behind_since if self._outbox.full or self._protocol.receiving else None

    @property
    def silence(self) -> float:
        """Seconds since the client's machine was last heard of, if that says anything; see ``listener``."""
        return 0.0 if self._wire is None else silence(self._wire)

    def proceed(self) -> None:
        """There may be room now for what waited."""
        self._schedule_pump()

    def cut_off(self, why: str) -> None:
        """Close now: the client has taken too long, and others wait."""
        self.account.end(Ending.TIME_OUT, why)
        self.abort()

    def _fail(self) -> None:
        """A bug: this connection ends, as it does where the transport has called us."""
        self.account.end(Ending.FAILED)
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
                    self._backlog.add(cast(Command, owned(event)))
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
        sock = self._outbox.socket
        outlet = None if self._protocol.traced else sock or self._outbox.tunnel
        ahead = None if outlet is None else StatusAhead.of(export, self._protocol)
        self._backlog.context = Context(
            export, self._protocol, self._server.buffers, self._holdings.sent, tally, ahead, self.peer
        )
        events = self._protocol.accept(export.info)
        if (negotiated := self._protocol.negotiated) is not None:
            self.account.contexts = [context.name for context in negotiated.contexts]
        if outlet is not None:
            self._misses = Misses(export, self._holdings, self._server.calm, self._arrived)
            self._status_ahead = ahead
            if self._server.busy_poll and sock is not None:
                self._awake = Awake(
                    BusyPoll(sock, self._server.busy_poll),
                    self._protocol.get_buffer,
                    self._serve,
                    self._may_stay_awake,
                    self._fail,
                )
            self._fast = FastPath(
                export, self._protocol, outlet, self._server.buffers, tally, self._misses, ahead, self._awake
            )
        return events

    def _start_tls(self) -> None:
        """Answer in plain text; from then on the transport is the tunnel. The handshake's time runs on."""
        assert self._credentials is not None, "TLS is not offered without"
        self._send()
        if self._outbox.unsent:
            self.account.end(Ending.PROTOCOL, "it wants TLS before it took the answers to earlier options")
            self.abort()
            return
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
        self._read_on()  # paused while the option waited for its turn: from here on the tunnel reads
        self._transport = tunnel
        self._outbox.encrypt(tunnel)
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

    def _pump(self, *, served: bool = False) -> None:
        """``served``: the fast path has had its turn."""
        self._pump_scheduled = False
        if self._lost:
            return
        starved = self._protocol.starved
        if starved and not self._backlog.waiting and self._holdings.has_room(starved):
            self._take(self._protocol.feed())
        if self._fast is not None:
            if self._misses is not None and self._misses.arrived and not self._misses.awaited_since:
                self._serve_arrived(self._fast)
            if self._ahead and not served:
                self._serve_ahead(self._fast)
        self._backlog.begin(self._begin_at_once, self._protocol.receiving)
        self._send()
        if self._ahead or self._backlog.waiting:
            if self._may_go_on():
                self._schedule_pump()
            self._pause()
        elif self._ended:
            self._pause()
            self._close_if_answered()
        elif self._protocol.unfinished:
            self._pause()
            if not self._outbox.full:
                self._place.ask()
        elif self._protocol.starved:
            self._pause()
            self._holdings.await_room(self._protocol.starved)
        elif self._outbox.blocked or self._holdings.full:
            self._pause()
        else:
            self._read_on()
        if not (self._backlog.waiting or self._ahead):
            if self._holdings.payload and not self._protocol.receiving and self._opening is None:
                self._holdings.drop_payload()  # the fast path has answered it, or it was an option's
            if not self._protocol.starved:
                self._holdings.await_nothing()
        if self._misses is not None and self._misses.arrived and not self._outbox.full:
            self._arrived()

    def _arrived(self) -> None:
        """The data of a read has come."""
        misses = cast(Misses, self._misses)
        if self._lost:
            misses.drop()
            self._forget_if_over()
        elif self._server.alone:
            self._schedule_pump()  # more may have come in the same turn of the loop
        else:
            misses.await_calm(self._loop, self._pump)

    def _go_on(self) -> None:
        """The handshake goes on by one step."""
        if self._lost or self._ended or self._outbox.full:
            return  # once the client takes what there is, it is asked for anew
        try:
            self._take(self._protocol.go_on())
            self._pump()
        except BaseException:
            self._fail()
            raise

    def _may_go_on(self) -> bool:
        """Whether something waits for nothing but its turn."""
        if self._ahead and not self._outbox.full:
            return True
        return self._backlog.may_begin(self._protocol.receiving)

    def _schedule_pump(self) -> None:
        if not self._pump_scheduled:
            self._pump_scheduled = True
            self._loop.call_soon(self._pump)

    def _command_finished(self) -> None:
        if self._lost:
            self._forget_if_over()
        else:
            # Other tasks may finish in the same turn of the loop: one send for all of them.
            self._schedule_pump()

    def _send(self) -> None:
        outbox = self._outbox
        if outbox.blocked or self._lost:
            return
        outbox.send(self._protocol.data_to_send())
        if outbox.full:
            self._holdings.fall_behind()
        else:
            self._holdings.release()

    # -- the end

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            cast(asyncio.Transport, self._transport).pause_reading()

    def _read_on(self) -> None:
        if self._paused:
            self._paused = False
            cast(asyncio.Transport, self._transport).resume_reading()

    def _close_if_answered(self) -> None:
        if self._holdings.running or self._opening is not None:
            return
        self._outbox.unsent += self._protocol.data_to_send()
        if self._linger is None:
            self._linger = self._loop.call_later(LINGER, self._linger_expired, self._outbox.left)
        if not self._outbox.unsent:
            # Closes once the transport has sent what it holds.
            cast(asyncio.Transport, self._transport).close()

    def _linger_expired(self, before: int) -> None:
        left = self._outbox.left
        if left >= before:
            log.debug("client does not take the last %d bytes", left)
            self.account.end(Ending.TIME_OUT, f"the last {left} bytes were not taken")
            self.abort()
        else:
            self._linger = self._loop.call_later(LINGER, self._linger_expired, left)

    def _forget_if_over(self) -> None:
        if not self._holdings.running and self._opening is None:
            self._holdings.release()
            self._hold(None)
            self.account.close(self.peer)
            self._server.forget(self)
