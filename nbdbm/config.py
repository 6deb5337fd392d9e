"""What the program was asked to do, as values: built from the command line, checked here, once.

Everything here is plain data; nothing opens a file or a socket. A value that exists has been checked:
``__post_init__`` raises UsageError with one line saying what is wrong and what would work.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

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

DEFAULT_BUSY_POLL = 100
MAX_BUSY_POLL = 1000
"""Microseconds: what a client on this machine takes for its next request, and what a vain wait may cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """Where to listen: a Unix socket, or a TCP host and port, or (all None) the default.

    The default is what the service manager passed in, else a private socket for ``--run``, else
    localhost:10809.
    """

    socket: str | None = None
    """Path of a Unix socket."""
    host: str | None = None
    """Name or address; ``*`` for every address."""
    port: int | None = None
    """0 lets the system pick a free one."""

    def __post_init__(self) -> None:
        if self.socket is not None:
            if self.host is not None or self.port is not None:
                raise UsageError("--socket excludes --bind and --port: listen either on a path or on TCP")
            check_socket_path(self.socket)
        if self.port is not None and not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port}: a port is a number from 0 to 65535")
        if self.host == "":
            raise UsageError("--bind: the address is empty; '*' means every address")

    @property
    def given(self) -> bool:
        """Whether an address was asked for."""
        return not (self.socket is None and self.host is None and self.port is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the server treats its clients."""

    max_connections: int = DEFAULT_MAX_CONNECTIONS
    """Clients served at once; further ones wait to be accepted. 0 means no limit."""
    handshake_timeout: float = 30.0
    """Seconds a client may take from connecting to its first request: a connection that never gets to
    ask for anything must not hold one of the places for good."""
    drain_timeout: float = 30.0
    """Seconds that requests in progress get to finish when the server ends."""
    busy_poll: float = DEFAULT_BUSY_POLL / 1e6
    """Seconds that the next request of a lone client is awaited without sleeping, see server/busypoll.py."""

    def __post_init__(self) -> None:
        if not 0 <= self.busy_poll <= MAX_BUSY_POLL / 1e6:
            raise UsageError(
                f"--busy-poll {self.busy_poll * 1e6:g}: must be 0 to {MAX_BUSY_POLL} microseconds"
            )
        if self.max_connections < 0:
            raise UsageError(
                f"--max-connections {self.max_connections}: must be 1 or more, or 0 for no limit"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """One run of ``nbdbm serve``."""

    image: str
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
    export_name: str = ""
    description: str = ""
    bitmaps: tuple[str, ...] | None = None
    """Names of the only bitmaps to serve, or None for every one that is usable."""
    allocation_depth: bool = True
    pid_file: str | None = None
    run: str | None = None
    """Shell command to run while serving."""
    listen: ListenConfig = field(default_factory=ListenConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        _check_text("--export-name", self.export_name)
        _check_text("--description", self.description)
        if self.format is not None and self.format not in FORMATS:
            raise UsageError(f"--format {self.format}: formats are {', '.join(FORMATS)}")
        if self.discard not in DISCARD:
            raise UsageError(f"--discard {self.discard}: must be one of {', '.join(DISCARD)}")
        if self.detect_zeroes not in DETECT_ZEROES:
            raise UsageError(
                f"--detect-zeroes {self.detect_zeroes}: must be one of {', '.join(DETECT_ZEROES)}"
            )
        if self.detect_zeroes == "unmap" and self.discard == "ignore":
            raise UsageError("--detect-zeroes unmap excludes --discard ignore: it gives space back")
        if self.no_backing and self.backing_root is not None:
            raise UsageError("--no-backing excludes --backing-root: there would be nothing to confine")
        if self.run is not None and not self.run.strip():
            raise UsageError("--run: the command is empty")


def check_socket_path(path: str) -> None:
    """Refuse a path that no Unix socket can have."""
    if not path:
        raise UsageError("--socket: the path is empty")
    if "\0" in path:
        raise UsageError("--socket: the path holds a zero byte")
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        raise UsageError(
            f"--socket {path}: the path has {length} bytes, a Unix socket's has at most {MAX_SOCKET_PATH}"
        )


def _check_text(option: str, text: str) -> None:
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{option} {text!r}: must be UTF-8") from None
    if length > MAX_NAME:
        raise UsageError(f"{option}: has {length} bytes, NBD allows {MAX_NAME}")
    if "\0" in text:
        raise UsageError(f"{option}: holds a zero byte, which NBD does not allow")
