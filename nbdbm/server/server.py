"""The server: accepts clients up to a limit, knows its connections, and ends in order."""

from __future__ import annotations

import asyncio
import errno
import logging
import select
import socket
from collections import Counter
from collections.abc import Iterable, Sequence

from nbdbm.config import ServerConfig
from nbdbm.metrics import Ending, Metrics
from nbdbm.peer import Peer
from nbdbm.registry import ExportRegistry
from nbdbm.server.budget import Budget
from nbdbm.server.buffers import BufferPool
from nbdbm.server.busypoll import processors
from nbdbm.server.connection import NbdConnection
from nbdbm.server.listener import SILENCE, Listener, peer_of, prepare
from nbdbm.server.misses import Calm
from nbdbm.server.tls import Credentials
from nbdbm.server.turns import Rota

log = logging.getLogger(__name__)

ACCEPT_AT_ONCE = 16
"""Clients accepted in one turn of the event loop, so that those already here get theirs."""

ACCEPT_PAUSE = 1.0
"""Seconds without accepting after the system ran out of descriptors or memory."""

CROWDED = 1.0
"""Seconds between two looks for room while all places are taken."""

EVICT_NEXT = 0.05
"""Seconds after which it is looked again once a client was sent away: one after the other, as long as
somebody waits. At one a second, a thousand clients that say nothing keep all others out for minutes."""

EVICT_AFTER = 5.0
"""Seconds that a client may take for its handshake while others wait for its place; honest ones take
milliseconds, over a slow line and with a password typed in a second or two."""

LOOK_AROUND = 30.0
"""Seconds between two looks for clients that have vanished."""

_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Server:
    """Serves the exports of ``registry`` to the clients of some listeners.

    ``start``, then ``close`` (which is idempotent and may be called at any time); both from the loop.
    """

    def __init__(
        self,
        registry: ExportRegistry,
        config: ServerConfig | None = None,
        tls: Credentials | None = None,
    ) -> None:
        self.registry = registry
        self.config = config or ServerConfig()
        self.tls = tls
        """What TLS is begun with; None: clients get none."""
        self.buffers = BufferPool()
        self.metrics = Metrics()
        self.budget = Budget(lambda: self._connections)
        """What the connections hold in memory together; they keep the account."""
        self.rota = Rota()
        """Whose handshake goes on next."""
        self.calm = Calm()
        """Whether reads that have waited for the disk may be answered before others."""
        self.busy_poll = self.config.busy_poll if processors() > 1 else 0.0
        """Seconds for which a connection awaits the next request awake; 0: never."""
        self.closing = False
        self._listeners: list[Listener] = []
        self._accepting = False
        self._pause: asyncio.TimerHandle | None = None
        self._connecting: set[asyncio.Task[None]] = set()
        self._connections: set[NbdConnection] = set()
        self._networks: Counter[str] = Counter()
        """Clients by where they come from."""
        self._crowded: asyncio.TimerHandle | None = None
        """While all places are taken: when to look for those that do not use theirs."""
        self._around: asyncio.TimerHandle | None = None
        """When to look for clients that have vanished."""
        self._hurry = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._closed: asyncio.Task[None] | None = None

    def reconfigure(self, config: ServerConfig) -> None:
        """Let other limits hold from now on; nobody is sent away."""
        self.config = config
        self.busy_poll = config.busy_poll if processors() > 1 else 0.0
        if self._listeners:
            self._watch()

    @property
    def connections(self) -> int:
        """Clients being served."""
        return len(self._connections)

    @property
    def serving(self) -> bool:
        """Whether clients are let in, or would be if there were room."""
        return bool(self._listeners) and not self.closing

    @property
    def clients(self) -> Iterable[NbdConnection]:
        """Their connections."""
        return self._connections

    @property
    def alone(self) -> bool:
        """Whether there is only one client: nobody else waits while it has all the attention."""
        return len(self._connections) == 1

    async def start(self, listeners: Sequence[Listener]) -> None:
        """Begin to listen and to accept. On failure everything is closed but the registry."""
        self._listeners = list(listeners)
        try:
            for listener in self._listeners:
                for sock in listener.sockets:
                    sock.setblocking(False)
                listener.listen()
        except BaseException:
            for listener in self._listeners:
                listener.close()
            raise
        self._watch()
        self._around = asyncio.get_running_loop().call_later(LOOK_AROUND, self._look_around)

    def _look_around(self) -> None:
        """Cut off the clients that have vanished."""
        for each in list(self._connections):
            if each.silence > SILENCE:
                each.cut_off(f"its machine has not been heard of for {SILENCE} s")
        self._around = asyncio.get_running_loop().call_later(LOOK_AROUND, self._look_around)

    # -- accepting

    def _watch(self) -> None:
        """Accept, or leave clients waiting, as the limit says."""
        limit = self.config.max_connections
        # One being connected may be in both for a moment; that only makes us accept a little later.
        occupied = len(self._connections) + len(self._connecting)
        full = bool(limit and occupied >= limit)
        if full and self._crowded is None and not self.closing:
            self._crowded = asyncio.get_running_loop().call_later(CROWDED, self._make_room)
        wanted = not self.closing and self._pause is None and not full
        if wanted == self._accepting:
            return
        self._accepting = wanted
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            for sock in listener.sockets:
                if wanted:
                    loop.add_reader(sock.fileno(), self._accept, sock)
                else:
                    loop.remove_reader(sock.fileno())

    def _make_room(self) -> None:
        """All places were taken a while ago: if somebody waits, the longest handshake must end."""
        self._crowded = None
        if self._accepting or self.closing:
            return
        again = CROWDED
        now = asyncio.get_running_loop().time()
        idle = [each for each in self._connections if each.handshaking and now - each.begun > EVICT_AFTER]
        if idle and self._somebody_waits():
            longest = min(idle, key=lambda each: each.begun)
            log.warning("%s: handshake cut off, others wait for its place", longest.peer)
            longest.account.end(Ending.TIME_OUT, "others waited for its place during the handshake")
            longest.cut_off("others wait for its place")
            again = EVICT_NEXT
        self._crowded = asyncio.get_running_loop().call_later(again, self._make_room)

    def _somebody_waits(self) -> bool:
        poll = select.poll()
        for listener in self._listeners:
            for sock in listener.sockets:
                poll.register(sock, select.POLLIN)
        return bool(poll.poll(0))

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            if not self._accepting:
                return
            try:
                sock, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    raise
                log.warning("cannot accept clients for %g s: %s", ACCEPT_PAUSE, error.strerror)
                self._pause = asyncio.get_running_loop().call_later(ACCEPT_PAUSE, self._resume)
                self._watch()
                return
            peer = peer_of(sock, address)
            if (network := self._crowds(peer)) is not None:
                self.metrics.refused += 1
                log.warning("%s: refused, %s has %d connections", peer, network, self._networks[network])
                sock.close()
                continue
            task = asyncio.get_running_loop().create_task(self._connect(sock, peer))
            self._connecting.add(task)
            task.add_done_callback(self._connected)
            self._watch()

    def _crowds(self, peer: Peer) -> str | None:
        """The network that the client comes from if it has its share of the places already."""
        limit, network = self.config.max_connections_per_address, peer.network
        return network if limit and network is not None and self._networks[network] >= limit else None

    def _resume(self) -> None:
        self._pause = None
        self._watch()

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting.discard(task)
        self._watch()

    async def _connect(self, sock: socket.socket, peer: Peer) -> None:
        try:
            prepare(sock)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: self.adopt(sock, peer), sock)
        except OSError as error:
            log.debug("a client was gone before it was served: %s", error)
            sock.close()

    def adopt(self, sock: socket.socket | None, peer: Peer) -> NbdConnection:
        """The protocol for a client that is there already; ``sock`` as NbdConnection has it."""
        connection = NbdConnection(self, sock, peer)
        self.metrics.accepted += 1
        self._connections.add(connection)
        if peer.network is not None:
            self._networks[peer.network] += 1
        self._empty.clear()
        return connection

    def forget(self, connection: NbdConnection) -> None:
        """Called by a connection of which nothing is left."""
        if connection in self._connections:
            self._connections.discard(connection)
            network = connection.peer.network
            if network is not None:
                self._networks[network] -= 1
                if not self._networks[network]:
                    del self._networks[network]
        if not self._connections:
            self._empty.set()
        self._watch()

    # -- closing

    async def close(self) -> None:
        """Stop listening, answer what is in progress, close the connections, close the exports.

        Requests get ``drain_timeout`` seconds to finish, fewer after ``hurry``. Raises what closing the
        exports raises. Idempotent: every caller waits for the one closing and learns its outcome.
        """
        if self._closed is None:
            self._closed = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closed)

    def hurry(self) -> None:
        """Do not wait for clients any longer: drop connections with replies unsent. Exports still close."""
        self._hurry.set()

    async def _close(self) -> None:
        self.closing = True
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        for timer in (self._crowded, self._around):
            if timer is not None:
                timer.cancel()
        self._watch()
        for listener in self._listeners:
            listener.close()
        if self._connecting:
            await asyncio.wait(self._connecting)
        for connection in list(self._connections):
            connection.drain()
        await self._wait_for_connections()
        await self.registry.close()

    async def _wait_for_connections(self) -> None:
        """Until all connections are over; those that take too long are cut off.

        A request in progress is waited for even then: the image must not close under it.
        """
        empty = asyncio.ensure_future(self._empty.wait())
        hurry = asyncio.ensure_future(self._hurry.wait())
        try:
            await asyncio.wait(
                (empty, hurry), timeout=self.config.drain_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if not empty.done():
                log.warning("closing %d connections before their replies were taken", self.connections)
                for connection in list(self._connections):
                    connection.abort()
            await empty
        finally:
            hurry.cancel()
