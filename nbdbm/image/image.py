"""Image: one virtual disk, open, with everything under it."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from nbdbm.bitmaps.dirty import DirtyBitmap
from nbdbm.bitmaps.tracker import BitmapTracker
from nbdbm.errors import BitmapError, ImageError
from nbdbm.image.backing import ChainOpener, Confinement, FileOpener, Layer
from nbdbm.image.bitmapstore import BitmapStore
from nbdbm.image.cache import TableCache
from nbdbm.image.read import Reader
from nbdbm.image.ring import Told
from nbdbm.image.status import Column, Run, StatusWalker
from nbdbm.metrics import BitmapFigures, CacheFigures
from nbdbm.qcow2.header import Header
from nbdbm.qcow2.snapshots import SnapshotEntry

if TYPE_CHECKING:
    from nbdbm.image.bitmapsave import BitmapSaver
    from nbdbm.image.commit import Metadata

__all__ = ["Image", "LayerInfo", "OpenOptions", "Run"]

RAW_CLUSTER = 64 * 1024


class DetectZeroes(Enum):
    """What to do about writes of zeroes."""

    OFF = "off"
    """Store them like any data."""
    ON = "on"
    """Write them as zeroes that keep their space."""
    UNMAP = "unmap"
    """Write them as zeroes, and give their space back if ``discard`` allows that."""


class WriteSide(Protocol):
    """What changes the active layer: ``write.Writer`` or ``rawwrite.RawWriter``."""

    @property
    def broken(self) -> str | None:
        """Why nothing may be written any more, once a sync has failed."""

    def try_write(self, offset: int, data: memoryview) -> bool:
        """Write at once if that needs no waiting; False: nothing was done."""

    async def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data``."""

    async def write_zeroes(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """Make the range read as zeroes."""

    async def trim(self, offset: int, length: int) -> None:
        """Forget the content of the range, where that gives space back."""

    async def flush(self) -> None:
        """Make everything durable that was finished before this call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """How to open an image; the defaults serve an ordinary qcow2 file for reading."""

    format: str | None = None
    """``qcow2``, ``raw``, or None: qcow2 by its magic, and anything else refused."""
    read_only: bool = True
    snapshot: str | None = None
    """Serve this internal snapshot (its id, else its name) instead of the active disk."""
    no_backing: bool = False
    """Refuse an image that refers to any other file."""
    backing_root: str | None = None
    """Backing and data files must really lie in this directory."""
    force_share: bool = False
    """Read even while somebody writes; what is read may then be torn."""
    discard: bool = True
    """Trimmed and zeroed clusters are given back to the host; without it a trim does nothing."""
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    """What a write of nothing but zeroes becomes."""
    chain: bool = True
    """Open backing and data files too. Without them there are metadata and bitmaps, and no data."""


class LayerInfo(NamedTuple):
    """One file of the chain as ``nbdbm info`` shows it."""

    path: str
    format: str
    size: int
    """Of the virtual disk, bytes."""
    allocated: int
    """Bytes that the host has allocated for the file and its data file."""
    data_file: str | None


class Image:
    """A virtual disk: data, allocation and bitmaps. Made by ``open``; ``close`` it in the end.

    Everything runs in one event loop. Ranges are half-open, in bytes, and lie inside the disk: the
    caller has checked that, here it is asserted. Failures while serving are OSError (with the host's
    errno) or CorruptError (EIO).
    """

    def __init__(
        self,
        layers: list[Layer],
        store: BitmapStore | None,
        cache: TableCache,
        notices: list[str],
        options: OpenOptions,
    ) -> None:
        """Use ``open``."""
        top = layers[0]
        self.path = top.path
        """As given to ``open``."""
        self.size = top.size
        """Of the virtual disk, bytes."""
        self.format = top.format
        """``qcow2`` or ``raw``."""
        self.read_only = True
        self.header: Header | None = top.header
        """None for a raw image."""
        self.cluster_size = RAW_CLUSTER if top.header is None else top.header.cluster_size
        """Bytes; 65536 for raw images. A fair preferred block size."""
        self.tracker: BitmapTracker = BitmapTracker(top.size) if store is None else store.tracker
        """The active layer's bitmaps; empty for raw images and for snapshots."""
        self.notices = notices
        """What the user should hear about although the image is served."""
        self._options = options
        self._layers = layers
        self._store = store
        self._cache = cache
        self._reader = Reader(layers)
        self._status = StatusWalker(layers)
        self._metadata: Metadata | None = None
        self._saver: BitmapSaver | None = None
        self._side: WriteSide | None = None
        """None while the image is read-only."""
        self._discard = False
        self._detect_zeroes = DetectZeroes.OFF

    @classmethod
    async def open(cls, path: str, options: OpenOptions, open_file: FileOpener | None = None) -> Image:
        """Open ``path``, its data file and its backing chain; ``open_file`` stands for the host's files.

        Raises:
            ImageError: and its kin, naming file, field and value.
        """
        writable = not options.read_only
        assert options.chain or not writable
        if writable and options.snapshot is not None:
            raise ImageError(
                path, "a snapshot can be opened for reading only; say --read-only", errno=errno.EROFS
            )
        if writable and options.force_share:
            raise ImageError(path, "--force-share is for reading only; say --read-only", errno=errno.EINVAL)
        notices: list[str] = []
        cache = TableCache()
        confinement = Confinement(
            no_backing=options.no_backing, root=options.backing_root, force_share=options.force_share
        )
        opener = ChainOpener(confinement, cache, notices, open_file)
        layers = await opener.open(
            path, options.format, options.snapshot, writable=writable, chain=options.chain
        )
        try:
            top = layers[0]
            store = None
            if top.header is not None:
                if writable:
                    from nbdbm.image.writable import prepare

                    await prepare(top, notices)
                else:
                    notices += _header_notices(path, top.header)
                if options.snapshot is None:
                    store = await BitmapStore.load(top.file, top.header, top.size, writable=writable)
                    notices += store.notices
            image = cls(layers, store, cache, notices, options)
            if writable:
                await image._begin_writing(options)
            return image
        except OSError as error:
            _close_files(layers)
            raise ImageError(
                path, f"cannot be opened for writing: {error.strerror}", errno=error.errno
            ) from error
        except BaseException:
            _close_files(layers)
            raise

    async def _begin_writing(self, options: OpenOptions) -> None:
        """Become writable: from here on the disk says IN_USE of every bitmap that claims to be true."""
        # Imported when something is to be written: what only reads starts sooner.
        from nbdbm.image.bitmapsave import BitmapSaver
        from nbdbm.image.rawwrite import RawWriter
        from nbdbm.image.writable import load_metadata
        from nbdbm.image.write import Writer

        top = self._layers[0]
        self._discard = options.discard
        self._detect_zeroes = options.detect_zeroes
        if top.header is None:
            self._side = RawWriter(top.file)
        else:
            assert self._store is not None
            metadata = await load_metadata(top, self._cache, punch=options.discard)
            saver = BitmapSaver(self._store, metadata, top.header)
            await saver.arm()
            self._store.record()
            self.header = top.header = saver.header
            self._metadata = metadata
            self._saver = saver
            self._side = Writer(
                metadata,
                self._reader,
                top.size,
                has_backing=len(self._layers) > 1,
                raw_data=top.header.raw_data_file,
            )
        self.read_only = False

    async def reopen(self, *, read_only: bool) -> None:
        """Change between reading and writing. No call may be under way.

        Towards writing: IN_USE is set for the consistent bitmaps, as by ``open``. Towards reading: the
        bitmaps are stored, as by ``close``.

        Raises:
            ImageError, BitmapError: it is refused (a snapshot, somebody else's lock, a changed directory),
                or failed; the image is then as it was, or, if storing failed, read-only.
        """
        if read_only == self.read_only:
            return
        files = [f for f in (self._layers[0].file, self._layers[0].data_file) if f is not None]
        if read_only:
            side, self._side = self._side, None
            assert side is not None
            self.read_only = True
            await self._finish(side)
            self._metadata = self._saver = None
            if self._store is not None:
                self._store.reopen_read_only()
            for file in files:
                file.reopen(writable=False)
            return
        if self._options.snapshot is not None or self._options.force_share:
            raise ImageError(self.path, "was opened in a way that allows reading only", errno=errno.EROFS)
        try:
            for file in files:
                file.reopen(writable=True)
            if self._store is not None:
                from nbdbm.image.writable import prepare

                top = self._layers[0]
                await prepare(top, self.notices)
                assert top.header is not None
                self._store.reopen(await BitmapStore.load(top.file, top.header, top.size, writable=True))
            await self._begin_writing(self._options)
        except BaseException:
            for file in files:
                if file.writable:
                    file.reopen(writable=False)
            raise

    @property
    def chain(self) -> Sequence[LayerInfo]:
        """The files, from the active layer down."""
        return [
            LayerInfo(
                layer.path,
                layer.format,
                layer.size,
                layer.file.allocated() + (layer.data_file.allocated() if layer.data_file else 0),
                layer.data_file.path if layer.data_file else None,
            )
            for layer in self._layers
        ]

    @property
    def snapshots(self) -> Sequence[SnapshotEntry]:
        """The internal snapshots of the active layer, in file order."""
        return self._layers[0].snapshots

    @property
    def bitmaps(self) -> Sequence[BitmapFigures]:
        """The active layer's bitmaps as they are now."""
        return () if self._store is None else self._store.figures()

    @property
    def caches(self) -> Sequence[CacheFigures]:
        """Of L2 tables (those that the short ways look up are not counted) and decompressed clusters."""
        return (self._cache.figures("tables"), self._reader.figures())

    def try_read(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` from ``offset`` now if that needs no waiting: ``read.FILLED``, ``read.ZEROES`` (the
        view is left as it was) or ``read.LATER`` (its content is undefined)."""
        return self._reader.try_read(view, offset)

    def try_send(self, offset: int, length: int) -> tuple[int, int] | None:
        """Where the range can be sent from without copying it, as (descriptor, place); None: ``read`` it.

        What is sent is the page cache itself, until the client has taken it. So never while the image is
        writable: a cluster may have another user by then.
        """
        return self._reader.try_send(offset, length) if self.read_only else None

    def bring(self, offset: int, length: int, told: Told, about: object) -> bool:
        """Have what ``try_read`` would miss in the page cache soon, and ``told(about, what)`` called then,
        never at once, with one of ring.py's FAILED, CAME and CACHED, which are hints. False: it cannot be
        done, and nobody is told.

        Who waits sees to it that the image stays open. Nothing else is kept meanwhile: ``try_read`` looks
        everything up anew.
        """
        return self._reader.bring(offset, length, told, about)

    def try_read_into(self, view: memoryview, offset: int) -> bool:
        """Fill ``view`` from ``offset`` now, from cached tables and the page cache, or return False.

        After False the content of ``view`` is undefined; ``read_into`` does the work then.
        """
        return self._reader.try_read_into(view, offset)

    async def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` (bytes, writable, contiguous) from ``offset``. The view is not used afterwards."""
        assert self._options.chain and offset >= 0 and offset + len(view) <= self.size
        if self._metadata is None:
            await self._reader.read_into(view, offset)
            return
        # Until this ends, no cluster that it may have found gets a new user.
        epoch = self._metadata.epochs.enter()
        try:
            await self._reader.read_into(view, offset)
        finally:
            self._metadata.epochs.leave(epoch)

    async def read_sparse(self, view: memoryview, offset: int) -> list[tuple[int, bool]]:
        """Read like ``read_into``, but leave out what is known to be zero.

        Returns consecutive (length, is_data) that cover ``view``; parts with is_data False read as
        zeroes and are NOT filled.
        """
        assert self._options.chain and offset >= 0 and offset + len(view) <= self.size
        if self._metadata is None:
            return await self._reader.read_sparse(view, offset)
        epoch = self._metadata.epochs.enter()
        try:
            return await self._reader.read_sparse(view, offset)
        finally:
            self._metadata.epochs.leave(epoch)

    async def status(self, offset: int, length: int) -> list[Run]:
        """Describe a non-empty prefix of the range; neighbours differ. Call again for the rest.

        The work per call is bounded, so an answer may end early anywhere.
        """
        assert self._options.chain and offset >= 0 and length > 0 and offset + length <= self.size
        return await self._status.status(offset, length)

    async def fill_status(self, offset: int, length: int, columns: Sequence[Column]) -> int:
        """Describe the start of the range in lists of extents, the short way; return how far it goes.

        ``status`` goes on from there. Each column is a list, and its flags for what is unallocated, zero
        and data.
        """
        assert self._options.chain and offset >= 0 and length > 0 and offset + length <= self.size
        return await self._status.fill(offset, length, columns)

    async def bits(self, name: str) -> DirtyBitmap:
        """Return the bitmap's bits, loading them on first need.

        Raises:
            BitmapError: there is none of this name, or it was refused.
        """
        if self._store is None:
            raise BitmapError(name, f"{self.path} has no bitmaps as it is served")
        return await self._store.bits(name)

    # -- writing -------------------------------------------------------------------------------

    def _writer(self, offset: int, length: int) -> WriteSide:
        """What may change the range, which has been marked in the bitmaps: a write that fails counts too."""
        assert offset >= 0 and offset + length <= self.size
        if self._side is None:
            raise ImageError(self.path, "is open for reading only", errno=errno.EPERM)
        if self._side.broken is not None:
            raise ImageError(self.path, self._side.broken)
        self.tracker.mark(offset, length)
        return self._side

    def try_write(self, offset: int, data: memoryview) -> bool:
        """Write at once if that needs no waiting; False: ``write`` must do it (or fail)."""
        side = self._side
        if side is None or side.broken is not None or self._detect_zeroes is not DetectZeroes.OFF:
            return False
        self.tracker.mark(offset, len(data))
        try:
            return side.try_write(offset, data)
        except OSError:
            return False  # it comes again in ``write``, where there is somebody to raise it to

    async def write(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        """Write all of ``data``, which is not used afterwards; durable on return with ``fua``.

        Raises:
            ImageError: EPERM on a read-only image, EIO after a failed sync.
            OSError, CorruptError: it failed; any part of it may have been written, and the image is sound.
        """
        side = self._writer(offset, len(data))
        if self._detect_zeroes is not DetectZeroes.OFF and _is_zero(data):
            punch = self._discard and self._detect_zeroes is DetectZeroes.UNMAP
            await side.write_zeroes(offset, len(data), punch=punch, fast=False)
        elif len(data) and not side.try_write(offset, data):
            await side.write(offset, data)
        if fua:
            await self.flush()

    async def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool = False, fast: bool = False, fua: bool = False
    ) -> None:
        """Make the range read as zeroes; with ``no_hole`` what is allocated stays so.

        Raises:
            ImageError: as for ``write``; ENOTSUP where ``fast`` was asked for and it would not be.
            OSError, CorruptError: it failed; any part of it may have been done.
        """
        side = self._writer(offset, length)
        if length:
            await side.write_zeroes(offset, length, punch=self._discard and not no_hole, fast=fast)
        if fua:
            await self.flush()

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Forget the content of the range where that gives space back; what is forgotten reads as zeroes
        (raw images: as the host has it).

        Raises:
            ImageError, OSError, CorruptError: as for ``write``.
        """
        side = self._writer(offset, length)
        if length and self._discard:
            await side.trim(offset, length)
        if fua:
            await self.flush()

    async def flush(self) -> None:
        """Return once everything written before the call is on stable storage.

        Raises:
            ImageError: a sync failed, now or before.
            OSError: a write failed; what it was to write is tried again by the next flush.
        """
        if self._side is not None:
            await self._side.flush()

    async def close(self) -> None:
        """Store the bitmaps, release every file and lock; idempotent. No call may be under way or follow.

        Everything is released even if this raises.

        Raises:
            ImageError, OSError: something could not be written; the bitmaps then stay marked as in use.
        """
        side, self._side = self._side, None
        try:
            if side is not None:
                await self._finish(side)
        finally:
            if self._store is not None:
                await self._store.close()
            await self._status.close()
            await self._reader.close()
            await self._cache.close()
            _close_files(self._layers)

    async def _finish(self, side: WriteSide) -> None:
        """Write all that is still only in memory: data and mapping first, then what the bitmaps say."""
        try:
            if self._metadata is None or self._saver is None:
                await side.flush()
            else:
                await self._metadata.write_out()
        except OSError as error:
            bitmaps = "" if self._saver is None else "; the bitmaps stay marked as in use"
            why = error.strerror or error
            raise ImageError(
                self.path,
                f"what was written since the last flush could not be stored: {why}{bitmaps}",
                errno=error.errno,
            ) from error
        if self._metadata is None or self._saver is None:
            return
        await self._metadata.drain()
        try:
            await self._saver.store()
        except OSError as error:
            raise ImageError(
                self.path,
                f"the bitmaps could not be stored: {error.strerror or error}; they stay marked as in use,"
                " the data is safe",
                errno=error.errno,
            ) from error
        finally:
            self.header = self._layers[0].header = self._saver.header
            # Whatever has become of the bitmaps, and nothing if it has gone with one of their barriers.
            await self._metadata.settle()
        if self._metadata.dirty:
            await self._metadata.flush()  # counts of what was freed last


def _close_files(layers: list[Layer]) -> None:
    for layer in layers:
        layer.close()


def _is_zero(data: memoryview) -> bool:
    """Whether all bytes are zero; looks at both ends first."""
    return bool(len(data)) and not data[0] and not data[-1] and not bytes(data).strip(b"\0")


def _header_notices(path: str, header: Header) -> list[str]:
    """What flags of the header the user should know about, though reading is not affected."""
    notices = []
    if header.dirty:
        notices.append(
            f"{path}: was not closed cleanly (dirty bit): its refcounts may be wrong, reading is not affected"
        )
    if header.corrupt:
        notices.append(f"{path}: is marked as corrupt: what is read may be wrong; qemu-img check tells more")
    return notices
