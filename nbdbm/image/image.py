"""Image: one virtual disk, open, with everything under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nbdbm.bitmaps.dirty import DirtyBitmap
from nbdbm.bitmaps.tracker import BitmapTracker
from nbdbm.errors import BitmapError, UnsupportedError
from nbdbm.image.backing import ChainOpener, Confinement, Layer
from nbdbm.image.bitmapstore import BitmapStore
from nbdbm.image.cache import TableCache
from nbdbm.image.read import Reader
from nbdbm.image.status import Run, StatusWalker
from nbdbm.qcow2.header import Header
from nbdbm.qcow2.snapshots import SnapshotEntry

__all__ = ["Image", "LayerInfo", "OpenOptions", "Run"]

RAW_CLUSTER = 64 * 1024


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
        self, layers: list[Layer], store: BitmapStore | None, cache: TableCache, notices: list[str]
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
        self._layers = layers
        self._store = store
        self._cache = cache
        self._reader = Reader(layers)
        self._status = StatusWalker(layers)

    @classmethod
    async def open(cls, path: str, options: OpenOptions) -> Image:
        """Open ``path``, its data file and its backing chain.

        Raises:
            ImageError: and its kin, naming file, field and value.
        """
        if not options.read_only:
            raise UnsupportedError(path, "can be opened for reading only; say --read-only")
        notices: list[str] = []
        cache = TableCache()
        confinement = Confinement(
            no_backing=options.no_backing, root=options.backing_root, force_share=options.force_share
        )
        opener = ChainOpener(confinement, cache, notices)
        layers = await opener.open(path, options.format, options.snapshot)
        try:
            top = layers[0]
            store = None
            if top.header is not None:
                notices += _header_notices(path, top.header)
                if options.snapshot is None:
                    store = await BitmapStore.load(top.file, top.header, top.size, writable=False)
                    notices += store.notices
            return cls(layers, store, cache, notices)
        except BaseException:
            for layer in layers:
                layer.close()
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

    def try_read_into(self, view: memoryview, offset: int) -> bool:
        """Fill ``view`` from ``offset`` now, from cached tables and the page cache, or return False.

        After False the content of ``view`` is undefined; ``read_into`` does the work then.
        """
        return self._reader.try_read_into(view, offset)

    async def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` (bytes, writable, contiguous) from ``offset``. The view is not used afterwards."""
        assert offset >= 0 and offset + len(view) <= self.size
        await self._reader.read_into(view, offset)

    async def read_sparse(self, view: memoryview, offset: int) -> list[tuple[int, bool]]:
        """Read like ``read_into``, but leave out what is known to be zero.

        Returns consecutive (length, is_data) that cover ``view``; parts with is_data False read as
        zeroes and are NOT filled.
        """
        return await self._reader.read_sparse(view, offset)

    async def status(self, offset: int, length: int) -> list[Run]:
        """Describe a non-empty prefix of the range; neighbours differ. Call again for the rest.

        The work per call is bounded, so an answer may end early anywhere.
        """
        assert offset >= 0 and length > 0 and offset + length <= self.size
        return await self._status.status(offset, length)

    async def bits(self, name: str) -> DirtyBitmap:
        """Return the bitmap's bits, loading them on first need.

        Raises:
            BitmapError: there is none of this name, or it was refused.
        """
        if self._store is None:
            raise BitmapError(name, f"{self.path} has no bitmaps as it is served")
        return await self._store.bits(name)

    async def flush(self) -> None:
        """Return once everything written before the call is on stable storage: nothing to do read-only."""

    async def close(self) -> None:
        """Release every file and lock; idempotent. No call may be under way or follow."""
        if self._store is not None:
            await self._store.close()
        await self._status.close()
        await self._reader.close()
        await self._cache.close()
        for layer in self._layers:
            layer.close()


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
