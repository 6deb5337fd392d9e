"""What a handshake may know of the exports: values and one seam, no engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from nbdbm.nbd.constants import MAX_PAYLOAD, TransmissionFlag


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """One export as a client may see it."""

    name: str
    size: int
    """Bytes."""
    flags: TransmissionFlag
    description: str = ""
    minimum_block: int = 1
    """Bytes; requests need no coarser alignment than this."""
    preferred_block: int = 65536
    """Bytes."""
    maximum_payload: int = MAX_PAYLOAD
    """Bytes; NBD_INFO_BLOCK_SIZE's maximum."""
    contexts: tuple[str, ...] = ()
    """Every metadata context that may be selected, full names, in listing order."""


class Absent(Enum):
    """Why nothing can be told of an export that exists."""

    UNOPENED = auto()
    """It is opened when a client asks for it: the shell does so now (ExportWanted)."""
    NEEDS_TLS = auto()
    """Only for clients that use TLS, which this one does not yet."""


class Catalog(Protocol):
    """The exports there are for one client. Synchronous: the handshake asks in mid-parse."""

    def listing(self) -> Iterable[tuple[str, str] | None]:
        """Name and description of each export to list, in listing order; it may be gone through slowly.

        None is an export that is not listed: finding that out took time, and there may be many.
        """

    def info(self, name: str) -> ExportInfo | Absent | None:
        """The export of exactly this name, why it cannot be told of now, or None: there is none."""
