"""What the wire asks of the shell: plain values, one type per thing to do.

An event owns its payload. The cookie comes back in the reply and is opaque otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

from nbdbm.nbd.constants import CmdFlag


class GoRequested(NamedTuple):
    """The client wants to enter transmission on this export: call ``accept`` or ``refuse``.

    Until one of them is called the protocol parses no further input.
    """

    name: str


class ExportWanted(NamedTuple):
    """An option concerns this export, which is not open: open it, then call ``opened`` or ``refuse``.

    Until one of them is called the protocol parses no further input.
    """

    name: str


class StartTls(NamedTuple):
    """The client wants TLS, and is told yes by what is queued: send that, begin TLS as its server, and call
    ``tls_started`` when its handshake is done.

    Until then nothing that is received may come here.
    """


class Read(NamedTuple):
    cookie: int
    offset: int
    length: int
    flags: CmdFlag


class Write(NamedTuple):
    cookie: int
    offset: int
    data: memoryview
    flags: CmdFlag


class WriteZeroes(NamedTuple):
    cookie: int
    offset: int
    length: int
    flags: CmdFlag


class Trim(NamedTuple):
    cookie: int
    offset: int
    length: int
    flags: CmdFlag


class Cache(NamedTuple):
    cookie: int
    offset: int
    length: int
    flags: CmdFlag


class Flush(NamedTuple):
    cookie: int
    flags: CmdFlag


class BlockStatus(NamedTuple):
    cookie: int
    offset: int
    length: int
    flags: CmdFlag
    contexts: tuple[tuple[int, str], ...]
    """(id, name) of each context to report, ascending by id: those negotiated, or the request's choice."""


class Disconnected(NamedTuple):
    """Nothing more will come. ``clean`` if the client said goodbye (NBD_CMD_DISC, NBD_OPT_ABORT)."""

    clean: bool
    reason: str


Command = Read | Write | WriteZeroes | Trim | Cache | Flush | BlockStatus
Event = GoRequested | ExportWanted | StartTls | Command | Disconnected
