"""What the program was asked to do, as values: built from the command line or a file, checked here, once.

Everything here is plain data; nothing opens a file or a socket. A value that exists has been checked:
``__post_init__`` raises BadValue with one line saying what is wrong and what would work. Options have the
same names on the command line and as keys of the configuration file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from nbdbm.access import EVERYBODY, Access
from nbdbm.errors import UsageError

DEFAULT_HOST = "localhost"
DEFAULT_PORT = 10809

MAX_SOCKET_PATH = 107
"""Longest path of a Unix socket, bytes: ``sun_path`` holds 108 with the closing zero (unix(7))."""

MAX_NAME = 4096
"""Longest export name or description, bytes of UTF-8: NBD knows no longer strings ("Strings")."""

DEFAULT_MAX_CONNECTIONS = 100
"""Clients served at once unless told otherwise: room for several parallel copies (nbdcopy opens four
connections each), while what all of them may hold in memory together stays within reason."""

FORMATS = ("qcow2", "raw")
DISCARD = ("unmap", "ignore")
DETECT_ZEROES = ("off", "on", "unmap")

TLS = ("off", "on", "require")

DEFAULT_BUSY_POLL = 100
MAX_BUSY_POLL = 1000
"""Microseconds: what a client on this machine takes for its next request, and what a vain wait may cost."""


DEFAULT_GRACE = 10.0
"""Seconds that an export opened on demand stays open without clients: backup programs connect several times
for one job, and each opening writes to the image twice (its bitmaps are marked, and stored)."""

MAX_VSOCK_PORT = 0xFFFF_FFFE
"""``VMADDR_PORT_ANY`` is one more (vsock(7))."""


class BadValue(UsageError):
    """A value that an option or a key of the configuration file cannot have."""

    def __init__(self, option: str, reason: str) -> None:
        """``option``: without dashes. ``reason``: continues a sentence that begins with the option."""
        super().__init__(f"--{option}{reason}")
        self.option = option
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """Where to listen: a Unix socket, TCP host and port, a vsock port, or (all None) the default.

    The default is what the service manager passed in, else a private socket for ``--run``, else
    localhost:10809.
    """

    socket: str | None = None
    """Path of a Unix socket."""
    socket_mode: int | None = None
    """Permissions of the Unix socket; None: what the umask leaves."""
    socket_owner: str | None = None
    """``USER``, ``USER:GROUP`` or ``:GROUP``, names or numbers."""
    host: str | None = None
    """Name or address; ``*`` for every address."""
    port: int | None = None
    """0 lets the system pick a free one."""
    vsock: int | None = None
    """Port for virtual machines on this host, or for the host of this one (vsock(7))."""

    def __post_init__(self) -> None:
        tcp = self.host is not None or self.port is not None
        if self.socket is not None:
            if tcp or self.vsock is not None:
                raise BadValue("socket", " excludes --bind, --port and --vsock: listen in one place")
            check_socket_path(self.socket)
        elif self.socket_mode is not None or self.socket_owner is not None:
            option = "socket-mode" if self.socket_mode is not None else "socket-owner"
            raise BadValue(option, " is for a Unix socket: give --socket")
        if self.socket_mode is not None and not 0 <= self.socket_mode <= 0o777:
            raise BadValue("socket-mode", f" {self.socket_mode:o}: permissions are 000 to 777, in octal")
        if self.socket_owner is not None and self.socket_owner.strip(":") == "":
            raise BadValue("socket-owner", f" {self.socket_owner!r}: must be USER, USER:GROUP or :GROUP")
        if self.vsock is not None:
            if tcp:
                raise BadValue("vsock", " excludes --bind and --port: listen in one place")
            if not 0 <= self.vsock <= MAX_VSOCK_PORT:
                raise BadValue("vsock", f" {self.vsock}: a port is a number from 0 to {MAX_VSOCK_PORT}")
        if self.port is not None and not 0 <= self.port <= 65535:
            raise BadValue("port", f" {self.port}: a port is a number from 0 to 65535")
        if self.host == "":
            raise BadValue("bind", ": the address is empty; '*' means every address")

    @property
    def given(self) -> bool:
        """Whether an address was asked for."""
        return any(value is not None for value in (self.socket, self.host, self.port, self.vsock))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the server treats its clients."""

    max_connections: int = DEFAULT_MAX_CONNECTIONS
    """Clients served at once; further ones wait to be accepted. 0 means no limit."""
    max_connections_per_address: int = 0
    """Of these, from one address (one /64 network of IPv6); further ones are closed. 0 means no limit."""
    handshake_timeout: float = 30.0
    """Seconds a client may take from connecting to its first request: a connection that never gets to
    ask for anything must not hold one of the places for good."""
    drain_timeout: float = 30.0
    """Seconds that requests in progress get to finish when the server ends."""
    busy_poll: float = DEFAULT_BUSY_POLL / 1e6
    """Seconds that the next request of a lone client is awaited without sleeping, see server/busypoll.py."""
    metrics: str | None = None
    """``ADDR:PORT``, ``:PORT`` or ``PORT`` where Prometheus is answered."""
    control: str | None = None
    """Path of a Unix socket that answers ``nbdbm status``."""

    def __post_init__(self) -> None:
        if not 0 <= self.busy_poll <= MAX_BUSY_POLL / 1e6:
            raise BadValue(
                "busy-poll", f" {self.busy_poll * 1e6:g}: must be 0 to {MAX_BUSY_POLL} microseconds"
            )
        for option, value in (
            ("max-connections", self.max_connections),
            ("max-connections-per-address", self.max_connections_per_address),
        ):
            if value < 0:
                raise BadValue(option, f" {value}: must be 1 or more, or 0 for no limit")
        if not 0 < self.handshake_timeout <= 3600:
            raise BadValue(
                "handshake-timeout", f" {self.handshake_timeout:g}: must be more than 0, up to 3600 s"
            )
        if self.metrics is not None:
            host_and_port("metrics", self.metrics)
        if self.control is not None:
            check_socket_path(self.control, "control")


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """Whether clients get TLS, and what proves who is who: a directory of certificates, or a file of keys."""

    mode: str = "off"
    """``on``: clients may have it; ``require``: there is nothing for them without it."""
    certificates: str | None = None
    """Directory with server-cert.pem and server-key.pem; to verify clients also ca-cert.pem, and ca-crl.pem
    if there is one."""
    verify_peer: bool = False
    """Only clients with a certificate that ca-cert.pem vouches for."""
    psk: str | None = None
    """File of pre-shared keys, a line ``NAME:HEX`` for each client."""

    def __post_init__(self) -> None:
        if self.mode not in TLS:
            raise BadValue("tls", f" {self.mode}: must be one of {', '.join(TLS)}")
        if self.certificates is not None and self.psk is not None:
            raise BadValue(
                "tls-psk", " excludes --tls-certificates: clients prove either to know a key or a name"
            )
        for option, value in (("tls-certificates", self.certificates), ("tls-psk", self.psk)):
            if value is not None and (not value or "\0" in value):
                raise BadValue(option, f" {value!r}: not a path")
        if self.verify_peer and self.certificates is None:
            raise BadValue(
                "tls-verify-peer", ": needs --tls-certificates DIR, with the ca-cert.pem of the clients"
            )
        given = self.certificates is not None or self.psk is not None
        if self.enabled and not given:
            raise BadValue("tls", f" {self.mode}: needs --tls-certificates DIR or --tls-psk FILE")
        if given and not self.enabled:
            raise BadValue("tls", " off: excludes --tls-certificates and --tls-psk")

    @classmethod
    def of(
        cls, mode: str | None, certificates: str | None, verify_peer: bool | None, psk: str | None
    ) -> TlsConfig:
        """With ``mode`` None: who gives certificates or keys wants them used, always."""
        if mode is None:
            mode = "off" if certificates is None and psk is None else "require"
        return cls(mode=mode, certificates=certificates, verify_peer=bool(verify_peer), psk=psk)

    @property
    def enabled(self) -> bool:
        return self.mode != "off"

    @property
    def required(self) -> bool:
        return self.mode == "require"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """One image to export, or (``image`` a directory's) how each image there is exported."""

    image: str
    name: str = ""
    description: str = ""
    format: str | None = None
    """None: qcow2, by its magic; a raw image must be named as one."""
    read_only: bool = False
    snapshot: str | None = None
    no_backing: bool = False
    backing_root: str | None = None
    force_share: bool = False
    discard: str = "unmap"
    """``ignore``: trims do nothing, and zeroes keep their space."""
    detect_zeroes: str = "off"
    """What a write of nothing but zeroes becomes."""
    bitmaps: tuple[str, ...] | None = None
    """Names of the only bitmaps to serve, or None for every one that is usable."""
    allocation_depth: bool = True
    on_demand: bool = False
    """Opened when a client asks for it, closed when the last one has left for ``grace`` seconds."""
    grace: float = DEFAULT_GRACE
    access: Access = EVERYBODY
    """Who may use it."""

    def __post_init__(self) -> None:
        _check_text("export-name", self.name)
        _check_text("description", self.description)
        if not self.image or "\0" in self.image:
            raise BadValue("image", f" {self.image!r}: not a path")
        if self.format is not None and self.format not in FORMATS:
            raise BadValue("format", f" {self.format}: formats are {', '.join(FORMATS)}")
        if self.discard not in DISCARD:
            raise BadValue("discard", f" {self.discard}: must be one of {', '.join(DISCARD)}")
        if self.detect_zeroes not in DETECT_ZEROES:
            raise BadValue(
                "detect-zeroes", f" {self.detect_zeroes}: must be one of {', '.join(DETECT_ZEROES)}"
            )
        if self.detect_zeroes == "unmap" and self.discard == "ignore":
            raise BadValue("detect-zeroes", " unmap excludes --discard ignore: it gives space back")
        if self.no_backing and self.backing_root is not None:
            raise BadValue("no-backing", " excludes --backing-root: there would be nothing to confine")
        if not 0 <= self.grace <= 86400:
            raise BadValue("grace", f" {self.grace:g}: must be 0 to 86400 seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """One run of ``nbdbm serve``."""

    exports: tuple[ExportConfig, ...] = ()
    directory: ExportConfig | None = None
    """Its ``image`` is a directory, each image in which is an export of the file's name."""
    file: str | None = None
    """The configuration file that all of this is from; read again on SIGHUP."""
    pid_file: str | None = None
    run: str | None = None
    """Shell command to run while serving."""
    listen: ListenConfig = field(default_factory=ListenConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        if not self.exports and self.directory is None and self.file is None:
            raise UsageError("nothing to serve: give an IMAGE, --directory or --config")
        names = set()
        for export in self.exports:
            if export.name in names:
                raise UsageError(f"export name {export.name!r} is used twice; NAME=IMAGE gives another one")
            names.add(export.name)
        if self.run is not None and not self.run.strip():
            raise BadValue("run", ": the command is empty")


def host_and_port(option: str, text: str) -> tuple[str, int]:
    """The two of ``ADDR:PORT``; without an address it is this machine's own loop."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= 65535):
        raise BadValue(option, f" {text}: must be ADDR:PORT or PORT, and a port is a number from 0 to 65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise BadValue(option, f" {text}: an IPv6 address is written in brackets, as [::1]:{port}")
    return host or DEFAULT_HOST, int(port)


def check_socket_path(path: str, option: str = "socket") -> None:
    """Refuse a path that no Unix socket can have."""
    if not path:
        raise BadValue(option, ": the path is empty")
    if path.startswith("@"):
        raise BadValue(
            option,
            f" {path}: abstract sockets are not supported, they have neither owner nor mode; "
            f"a file of that name is ./{path}",
        )
    if "\0" in path:
        raise BadValue(option, ": the path holds a zero byte")
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        raise BadValue(
            option, f" {path}: the path has {length} bytes, a Unix socket's has at most {MAX_SOCKET_PATH}"
        )


def _check_text(option: str, text: str) -> None:
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise BadValue(option, f" {text!r}: must be UTF-8") from None
    if length > MAX_NAME:
        raise BadValue(option, f": has {length} bytes, NBD allows {MAX_NAME}")
    if "\0" in text:
        raise BadValue(option, ": holds a zero byte, which NBD does not allow")
