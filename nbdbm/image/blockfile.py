"""BlockFile: the seam between the engine and the files under it."""

from __future__ import annotations

from typing import Protocol


class BlockFile(Protocol):
    """A host file (or block device, or memory) as the engine sees it. Offsets and lengths in bytes.

    Every method may be awaited concurrently. Failures are OSError with the host's errno.
    """

    path: str
    """How messages name it."""
    size: int
    """Current length; bytes past it read as zeroes."""
    writable: bool

    async def pread(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes; those past the end of the file are zeroes."""

    async def pread_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset``; bytes past the end of the file are zeroes."""

    def try_pread_into(self, view: memoryview, offset: int) -> bool:
        """Fill ``view`` now if that needs no waiting (page cache); return False otherwise."""

    async def data_run(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether data (True) or a hole (False) begins at ``offset``, and for how many bytes (<= length).

        Where the host cannot tell, everything is data.
        """

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data``, extending the file where needed."""

    async def zero(self, offset: int, length: int, *, punch: bool) -> None:
        """Make the range read as zeroes; ``punch`` allows giving its space back."""

    async def discard(self, offset: int, length: int) -> None:
        """Give the range's space back where the host can; its content is undefined afterwards."""

    async def truncate(self, size: int) -> None:
        """Set the length; growth reads as zeroes."""

    async def sync(self) -> None:
        """Return once everything written before the call is on stable storage."""

    def allocated(self) -> int:
        """Bytes that the host has allocated for the file (st_blocks)."""

    def close(self) -> None:
        """Release the file and its locks; idempotent."""
