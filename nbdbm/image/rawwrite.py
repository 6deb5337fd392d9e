"""Writing to a raw image: the file is the disk."""

from __future__ import annotations

import logging

from nbdbm.errors import ImageError
from nbdbm.image.blockfile import BlockFile

log = logging.getLogger(__name__)


class RawWriter:
    """Changes a raw image; the raw twin of ``write.Writer`` and ``commit.Metadata`` together."""

    def __init__(self, file: BlockFile) -> None:
        self._file = file
        self.broken: str | None = None
        """Why nothing may be written any more, once a sync has failed."""

    def try_write(self, offset: int, data: memoryview) -> bool:
        """Write at once if that needs no waiting."""
        return self._file.try_pwrite(offset, data)

    async def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data``."""
        await self._file.pwrite(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """Make the range read as zeroes; ``fast``: ENOTSUP where the host would have to write them."""
        await self._file.zero(offset, length, punch=punch, fallback=not fast)

    async def trim(self, offset: int, length: int) -> None:
        """Give the range's space back where the host can."""
        await self._file.discard(offset, length)

    async def flush(self) -> None:
        """Make everything durable that was finished before this call.

        Raises:
            ImageError: the sync failed, now or before.
        """
        if self.broken is not None:
            raise ImageError(self._file.path, self.broken)
        try:
            await self._file.sync()
        except OSError as error:
            reason = (
                f"a sync failed ({error.strerror or error}): what was written since the last flush may be"
                " lost; the image accepts no more writes"
            )
            if self.broken is None:  # flushes under way together fail together: one message
                self.broken = reason
                log.error("%s: %s", self._file.path, reason)
            raise ImageError(self._file.path, reason, errno=error.errno) from error
