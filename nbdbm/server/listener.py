"""Where clients come in: TCP, Unix sockets, sockets handed over by a service manager; and telling it so.

A listener is bound first (so that an address in use is refused before the image is touched) and listens
only once there is something to serve. A Unix socket's path appears at that moment, complete.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import MutableMapping
from contextlib import suppress
from ipaddress import ip_address

from nbdbm.config import DEFAULT_HOST, DEFAULT_PORT, MAX_SOCKET_PATH, ListenConfig
from nbdbm.errors import UsageError
from nbdbm.peer import Peer
from nbdbm.uri import NbdUri

log = logging.getLogger(__name__)

KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 120, 30, 6
"""A silent TCP client is asked after 120 seconds whether it is still there, and is gone after 6 questions
without an answer, 30 seconds apart: five minutes, where the system's own settings take more than two hours.
An outage of the network that is over sooner harms nobody."""

SILENCE = KEEPALIVE_IDLE + KEEPALIVE_INTERVAL * KEEPALIVE_COUNT
"""Seconds after which a TCP client of which nothing is heard has vanished. While replies are on their way to
it the kernel asks nothing, but sends them again, for 15 minutes and more; so we have to look (``silence``).
TCP_USER_TIMEOUT would end those, too, that are there and only take nothing: a stopped backup."""

BACKLOG = 4096
"""Clients that may wait to be accepted; the system's own limit (net.core.somaxconn) may be lower. With 128,
a client that opened 256 connections at once to a Unix socket was refused some of them (EAGAIN)."""

SOCKET_BUFFER = 4 * 1024 * 1024
"""Send and receive buffer asked of the system, bytes: took reads of 1 MiB from 1.0 to 2.6 GB/s."""

FIRST_INHERITED = 3
"""The first file descriptor a service manager passes (sd_listen_fds(3))."""

FREE_PORTS = range(49152, 65536)
"""Of these a vsock port is chosen that nobody asked for."""

EVERY_ADDRESS = {"*", "0.0.0.0", "::"}

_NO_SUCH_FAMILY = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)


class Listener:
    """One address with its sockets (a host name may stand for several addresses)."""

    def __init__(self, sockets: list[socket.socket], uri: NbdUri) -> None:
        self.sockets = sockets
        self._uri = uri

    def uri(self, export: str) -> NbdUri:
        """The URI by which a client on this machine reaches ``export``."""
        return NbdUri(self._uri.scheme, self._uri.host, self._uri.port, self._uri.socket, export)

    @property
    def exposed(self) -> bool:
        """Whether other machines may reach it: TCP on an address that is not this machine's own loop."""
        tcp = (sock for sock in self.sockets if sock.family in (socket.AF_INET, socket.AF_INET6))
        return any(not ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback for sock in tcp)

    def listen(self) -> None:
        """Let clients connect."""
        for sock in self.sockets:
            sock.listen(BACKLOG)

    def close(self) -> None:
        """Let no more clients connect; idempotent."""
        for sock in self.sockets:
            sock.close()


class UnixListener(Listener):
    """A Unix socket at a path of the file system; removed on close if it is still this one."""

    def __init__(self, path: str, mode: int | None = None, owner: tuple[int, int] = (-1, -1)) -> None:
        """Bind, replacing nothing yet; raises UsageError or OSError if the path cannot be used.

        ``mode``: its permissions, None for what the umask leaves; ``owner``: user and group, -1 as it is.
        Both are there before anybody can connect.
        """
        path = os.path.abspath(path)
        self.path = path
        self._replace = _judge_existing(path)
        self._temporary = os.path.join(os.path.dirname(path), f".nbdbm-{os.getpid():x}-{id(self):x}")
        if len(os.fsencode(self._temporary)) > MAX_SOCKET_PATH:
            # No room for a longer name: the path shall exist a moment before it can be connected to.
            self._temporary = path
            if self._replace:
                os.unlink(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _bind(sock, self._temporary, path)
            try:
                if mode is not None:
                    os.chmod(self._temporary, mode)
                if owner != (-1, -1):
                    os.chown(self._temporary, *owner)
            except OSError as error:
                os.unlink(self._temporary)
                raise OSError(error.errno, error.strerror, path) from error
            found = os.lstat(self._temporary)
        except BaseException:
            sock.close()
            raise
        self._identity = (found.st_dev, found.st_ino)
        super().__init__([sock], NbdUri.unix(path))

    def listen(self) -> None:
        super().listen()
        if self._temporary == self.path:
            return
        if self._replace:
            os.rename(self._temporary, self.path)
        else:
            try:
                os.link(self._temporary, self.path)
            except FileExistsError:
                raise UsageError(f"{self.path}: somebody else began to listen there just now") from None
            except OSError:
                # A file system without hard links.
                os.rename(self._temporary, self.path)
            else:
                os.unlink(self._temporary)
        self._temporary = self.path

    def close(self) -> None:
        # The path goes first: a client shall find nothing rather than a socket that refuses.
        with suppress(OSError):
            found = os.lstat(self._temporary)
            if (found.st_dev, found.st_ino) == self._identity:
                os.unlink(self._temporary)
        super().close()


def _judge_existing(path: str) -> bool:
    """Whether a stale socket is to be replaced; raises UsageError if what is there must stay."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path}: exists and is not a socket; choose another path or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except FileNotFoundError:
            return False
        except BlockingIOError:
            pass  # its backlog is full: alive
        except OSError as error:
            raise UsageError(f"{path}: a socket of somebody else's: {error.strerror}") from error
    raise UsageError(f"{path}: another process is listening there; stop it or choose another path")


def bind(config: ListenConfig) -> Listener:
    """Bind where the configuration says, by default to TCP localhost:10809."""
    if config.socket is not None:
        return UnixListener(config.socket, config.socket_mode, owner_ids(config.socket_owner))
    if config.vsock is not None:
        return bind_vsock(config.vsock)
    return bind_tcp(
        DEFAULT_HOST if config.host is None else config.host,
        DEFAULT_PORT if config.port is None else config.port,
    )


def owner_ids(owner: str | None) -> tuple[int, int]:
    """User and group id of ``USER[:GROUP]`` or ``:GROUP``, -1 for what is not given; raises UsageError."""
    if owner is None:
        return -1, -1
    import grp
    import pwd

    user, _, group = owner.partition(":")
    try:
        uid = -1 if not user else int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise UsageError(f"--socket-owner {owner}: no user {user!r}") from None
    try:
        gid = -1 if not group else int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise UsageError(f"--socket-owner {owner}: no group {group!r}") from None
    return uid, gid


def bind_vsock(port: int) -> Listener:
    """Bind a port for virtual machines and their host (vsock(7)); 0 takes one that is free.

    The kernel would take any of 32 bits; libnbd's URIs have no room for half of them.
    """
    from random import sample

    family = getattr(socket, "AF_VSOCK", None)
    if family is None:
        raise UsageError("--vsock: this Python was built without vsock")
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"--vsock {port}: this kernel has no vsock: {error.strerror}") from error
    try:
        candidates = [port] if port else sample(FREE_PORTS, 100)
        for number in candidates:
            try:
                _bind(sock, (socket.VMADDR_CID_ANY, number), f"vsock:{port}")
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or number == candidates[-1]:
                    raise
        return Listener([sock], NbdUri.vsock(sock.getsockname()[1]))
    except BaseException:
        sock.close()
        raise


def bind_tcp(host: str, port: int) -> Listener:
    """Bind every address of ``host``, all to one port; 0 takes one that is free.

    Addresses of a family this machine does not have are passed over as long as one is left.
    """
    try:
        found = socket.getaddrinfo(
            None if host == "*" else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "not a host name"
        raise UsageError(f"{host}: {reason}") from error
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, kind, proto, _, address in dict.fromkeys(found):
            if port == 0 and sockets:
                # The second address takes the port that the first one got.
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sock = socket.socket(family, kind, proto)
            except OSError as error:
                missing = error
                continue
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # 0.0.0.0 has a socket of its own where it is wanted.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                _bind(sock, address, f"{host}:{port}")
            except OSError as error:
                if error.errno not in _NO_SUCH_FAMILY:
                    raise
                missing = error
                sockets.pop().close()
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    if not sockets:
        assert missing is not None
        raise OSError(missing.errno, missing.strerror, f"{host}:{port}") from missing
    shown = DEFAULT_HOST if host in EVERY_ADDRESS else host
    return Listener(sockets, NbdUri.tcp(shown, sockets[0].getsockname()[1]))


def _bind(sock: socket.socket, address: object, shown: str) -> None:
    try:
        sock.bind(address)  # type: ignore[arg-type]
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), shown) from error


def inherited(environ: MutableMapping[str, str], first: int = FIRST_INHERITED) -> list[Listener]:
    """The listening sockets that a service manager passed to this process, if any (sd_listen_fds(3)).

    The variables are removed, so that no child takes the sockets for its own. Raises UsageError for a
    descriptor that is not a listening stream socket.
    """
    pid, count = environ.get("LISTEN_PID"), environ.get("LISTEN_FDS")
    if pid != str(os.getpid()) or not count:
        return []
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environ.pop(name, None)
    if not count.isascii() or not count.isdigit():
        raise UsageError(f"LISTEN_FDS={count}: not a number")
    return [_inherit(fd) for fd in range(first, first + int(count))]


def _inherit(fd: int) -> Listener:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(f"inherited file descriptor {fd}: {error.strerror}") from error
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.detach()
        raise UsageError(f"inherited file descriptor {fd}: not a listening stream socket")
    os.set_inheritable(fd, False)
    return Listener([sock], _uri_of(sock))


def _uri_of(sock: socket.socket) -> NbdUri:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return NbdUri.unix(os.fsdecode(name))
    if sock.family == getattr(socket, "AF_VSOCK", None):
        return NbdUri.vsock(name[1])
    host = DEFAULT_HOST if name[0] in EVERY_ADDRESS else name[0]
    return NbdUri.tcp(host, name[1])


def prepare(sock: socket.socket) -> None:
    """Set up an accepted connection."""
    sock.setblocking(False)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        # Granted up to net.core.[rw]mem_max; less is slower, not wrong.
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A client whose machine vanished must not keep its place for ever.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)


_HEARD = struct.Struct("II")
_HEARD_AT = 52
"""tcpi_last_data_recv and tcpi_last_ack_recv, milliseconds ago, in ``struct tcp_info`` (linux/tcp.h)."""


def silence(sock: socket.socket) -> float:
    """Seconds since the client's machine was last heard of; 0 where that is unknown, or no TCP."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return 0.0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _HEARD_AT + _HEARD.size)
    except OSError:
        return 0.0  # closed already
    return min(_HEARD.unpack_from(info, _HEARD_AT)) / 1000 if len(info) == _HEARD_AT + _HEARD.size else 0.0


_CREDENTIALS = struct.Struct("3i")
"""``struct ucred``: process, user and group (unix(7))."""


def peer_of(sock: socket.socket, address: object) -> Peer:
    """Who connected: ``sock`` is the accepted socket, ``address`` what accept() said."""
    if sock.family == socket.AF_UNIX:
        try:
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return Peer(address="unix")
        pid, uid, gid = _CREDENTIALS.unpack(raw)
        return Peer(address="unix", pid=pid, uid=uid, gid=gid)
    if not isinstance(address, tuple) or not isinstance(address[0], str):
        return Peer(address=f"vsock:{address[0]}:{address[1]}" if isinstance(address, tuple) else "unknown")
    host = address[0].partition("%")[0]
    shown = f"[{address[0]}]" if sock.family == socket.AF_INET6 else host
    return Peer(address=f"{shown}:{address[1]}", host=host)


def notify(address: str | None, message: str) -> None:
    """Tell the service manager listening at ``address`` ($NOTIFY_SOCKET), if there is one (sd_notify(3))."""
    if not address:
        return
    target = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(message.encode(), target)
    except OSError as error:
        log.warning("NOTIFY_SOCKET %s: %s", address, error.strerror or error)
