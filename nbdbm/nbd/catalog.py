"""What a handshake may know of the exports: values and one seam, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


class Catalog(Protocol):
    """The exports there are. Synchronous and in memory: the handshake asks in mid-parse."""

    def names(self) -> Sequence[str]:
        """Names of the exports to list, in listing order."""

    def info(self, name: str) -> ExportInfo | None:
        """The export of exactly this name, or None."""
