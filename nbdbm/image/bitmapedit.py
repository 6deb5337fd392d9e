"""Changing the bitmaps of an image that nobody uses: several operations, one atomic step.

Operations are applied in RAM, in order. Then the result is written beside what there is:

    stage     bits, tables and a directory to fresh clusters; refcounts; sync      disk: the old bitmaps
    switch    the header leads to the new directory: one sector; sync              disk: the new bitmaps
    free      what only the old directory led to

A crash before the switch leaks the new clusters, one after it the old ones. Nothing needs IN_USE: the
disk's data does not change. Entries that no operation names stay as they are, byte for byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from nbdbm.bitmaps.dirty import DirtyBitmap
from nbdbm.bitmaps.tracker import BitmapState, BitmapTracker, Step, TrackedBitmap
from nbdbm.errors import BitmapError, ImageError, UnsupportedError
from nbdbm.image.backing import ChainOpener, Confinement, FileOpener, Layer
from nbdbm.image.bitmapsave import BitmapSaver, Staged
from nbdbm.image.bitmapstore import BitmapStore
from nbdbm.image.cache import TableCache
from nbdbm.image.image import Image, OpenOptions
from nbdbm.image.writable import load_metadata, prepare, rewrite_header
from nbdbm.qcow2.bitmapdir import ENTRY, bitmap_bytes
from nbdbm.qcow2.constants import (
    MAX_BITMAP_DATA,
    MAX_BITMAP_DIRECTORY,
    MAX_BITMAP_NAME,
    MAX_BITMAPS,
    MAX_GRANULARITY_BITS,
    MIN_GRANULARITY_BITS,
    AutoclearFeature,
    ExtensionType,
)

DEFAULT_GRANULARITY = (4096, 65536)
"""Bytes: a new bitmap has the image's cluster size, but no less and no more than these, as in QEMU."""


class Add(NamedTuple):
    """Begin a clean bitmap; granularity in bytes, None: see DEFAULT_GRANULARITY."""

    name: str
    granularity: int | None = None
    enabled: bool = True


class Remove(NamedTuple):
    """Drop a bitmap, whatever its state."""

    name: str


class RemoveInconsistent(NamedTuple):
    """Drop every bitmap that is inconsistent, and a directory as a whole if it cannot be read."""


class Clear(NamedTuple):
    """Make all of a bitmap clean."""

    name: str


class Enable(NamedTuple):
    """Have a bitmap record from now on."""

    name: str


class Disable(NamedTuple):
    """Have a bitmap stay as it is from now on."""

    name: str


class Merge(NamedTuple):
    """Add what is dirty in ``source`` to a bitmap; ``source`` is of this image, or of ``file``."""

    name: str
    source: str
    file: str | None = None
    format: str | None = None


class Rename(NamedTuple):
    """Give a bitmap another name."""

    name: str
    new: str


Operation = Add | Remove | RemoveInconsistent | Clear | Enable | Disable | Merge | Rename


async def edit_bitmaps(
    path: str, operations: Iterable[Operation], open_file: FileOpener | None = None
) -> Edited:
    """Apply the operations to the bitmaps of the image at ``path``: all of them, or none.

    Raises:
        ImageError, BitmapError: it cannot be done; nothing has changed, but that refcounts may have been
            corrected in an image that was not closed cleanly.
        OSError: a write or sync failed; the image has the old bitmaps or the new ones.
    """
    editor = await BitmapEditor.open(path, open_file=open_file)
    try:
        for operation in operations:
            await editor.apply(operation)
        await editor.commit()
        return Edited(editor.changed, list(editor.notices))
    finally:
        await editor.close()


@dataclass(frozen=True, slots=True)
class Edited:
    """What came of it."""

    changed: bool
    """Whether anything on disk is another than before."""
    notices: list[str]
    """What the user should hear of."""


class BitmapEditor:
    """The bitmaps of one image, held against others. Made by ``open``; ``close`` it in the end.

    ``apply`` changes memory only, ``commit`` the disk; ``stage``, ``switch`` and ``free`` (or ``abandon``,
    or ``revert``) are its parts, for who has several images to change together. One commit, then close.
    """

    def __init__(
        self,
        layer: Layer,
        store: BitmapStore,
        cache: TableCache,
        notices: list[str],
        open_file: FileOpener | None,
    ) -> None:
        """Use ``open``."""
        self.path = layer.path
        self.notices = notices
        """What the user should hear of; grows with what is done."""
        self.changed = False
        """Whether the disk has other bitmaps than before."""
        self._layer = layer
        self._store = store
        self._cache = cache
        self._open_file = open_file
        self._touched: set[TrackedBitmap] = set()
        self._drop_directory = False
        self._saver: BitmapSaver | None = None
        self._staged: Staged | None = None

    @classmethod
    async def open(
        cls, path: str, *, format: str = "qcow2", open_file: FileOpener | None = None
    ) -> BitmapEditor:
        """Open and lock the image, and judge its bitmaps; nothing is written. Its backing and data files
        are not needed.

        Raises:
            ImageError: and its kin; it cannot have bitmaps, or somebody uses it.
        """
        cache = TableCache()
        notices: list[str] = []
        opener = ChainOpener(Confinement(), cache, notices, open_file)
        (layer,) = await opener.open(path, format, None, writable=True, chain=False)
        try:
            header = layer.header
            if header is None:
                raise UnsupportedError(path, "is a raw image, which has no place for bitmaps")
            if header.version < 3:
                raise UnsupportedError(
                    path,
                    "is of qcow2 version 2 (compat 0.10), which has no bitmaps; to make it version 3: "
                    f"qemu-img amend -f qcow2 -o compat=1.1 {path}",
                )
            if header.corrupt:
                raise ImageError(
                    path,
                    "incompatible_features: the corrupt bit is set; repair it with: nbdbm check --repair all",
                )
            store = await BitmapStore.load(layer.file, header, layer.size, writable=True)
            notices += store.notices
            return cls(layer, store, cache, notices, open_file)
        except OSError as error:
            layer.close()
            raise ImageError(path, f"cannot be read: {error.strerror}", errno=error.errno) from error
        except BaseException:
            layer.close()
            raise

    async def close(self) -> None:
        """Release the file and its locks; idempotent."""
        await self._store.close()
        await self._cache.close()
        self._layer.close()

    def is_file(self, path: str) -> bool:
        """Whether ``path`` leads to this image."""
        return _same_file(path, self.path)

    @property
    def tracker(self) -> BitmapTracker:
        """The bitmaps as the operations so far have made them."""
        return self._store.tracker

    @property
    def default_granularity(self) -> int:
        """Bytes; of bitmaps that are added without saying it."""
        assert self._layer.header is not None
        low, high = DEFAULT_GRANULARITY
        return min(max(self._layer.header.cluster_size, low), high)

    async def bits(self, name: str) -> DirtyBitmap:
        """The bits of a bitmap.

        Raises:
            BitmapError: there is none of this name, or it cannot be used.
        """
        return await self._store.bits(name)

    # -- operations ----------------------------------------------------------------------------

    async def apply(self, operation: Operation) -> None:
        """Carry out one operation in memory.

        Raises:
            BitmapError, ImageError: it cannot be done. Those before it still can be committed.
        """
        tracker = self.tracker
        if not isinstance(operation, RemoveInconsistent):
            self._refuse_unreadable()
        match operation:
            case Add(name, granularity, enabled):
                self._add(name, granularity, enabled)
            case Remove(name):
                self._touched.discard(tracker.remove(name))
            case RemoveInconsistent():
                for bitmap in [b for b in tracker if b.state is BitmapState.INCONSISTENT]:
                    tracker.drop(bitmap)
                self._drop_directory = self._unreadable
            case Clear(name):
                tracker.clear(name)
            case Enable(name):
                tracker.enable(name)
            case Disable(name):
                tracker.disable(name)
            case Merge():
                await self._merge(operation)
            case Rename(name, new):
                judge_name(new)
                tracker.rename(name, new)
                self._touched.add(tracker.find(new))
        if isinstance(operation, Clear | Enable | Disable | Merge):
            self._touched.add(tracker.find(operation.name))

    @property
    def _unreadable(self) -> bool:
        """Whether there are bitmaps that claim to be valid, but nobody can tell which."""
        header = self._layer.header
        assert header is not None
        claimed = header.autoclear_features & AutoclearFeature.BITMAPS
        return bool(
            claimed and self._store.extension is None and header.extension(ExtensionType.BITMAPS) is not None
        )

    def _refuse_unreadable(self) -> None:
        if self._unreadable and not self._drop_directory:
            raise ImageError(
                self.path,
                f"{'; '.join(self._store.notices)}; to drop all its bitmaps: "
                f"nbdbm bitmap remove --inconsistent {self.path}",
            )

    def _add(self, name: str, granularity: int | None, enabled: bool) -> None:
        judge_name(name)
        if granularity is None:
            granularity = self.default_granularity
        judge_granularity(name, granularity)
        size = self.tracker.size
        if not size:
            # No program could open the image with it: a bitmap's table must not be empty.
            raise BitmapError(name, "the disk has no bytes, so there is nothing to record")
        if bitmap_bytes(size, granularity) > MAX_BITMAP_DATA:
            better = granularity
            while bitmap_bytes(size, better) > MAX_BITMAP_DATA:
                better *= 2
            raise BitmapError(
                name,
                f"its bits would take more than {MAX_BITMAP_DATA >> 20} MiB with a granularity of"
                f" {granularity} bytes; with {better} they do not",
            )
        if len(self.tracker) >= MAX_BITMAPS:
            raise BitmapError(name, f"the image has {MAX_BITMAPS} bitmaps already, and no more are possible")
        self.tracker.add(name, granularity, enabled=enabled)

    async def _merge(self, operation: Merge) -> None:
        target = self.tracker.find(operation.name)
        await self._store.bits(operation.name)
        if operation.file is None or _same_file(operation.file, self.path):
            source = await self._store.bits(operation.source)
        else:
            source = await self._foreign(operation.file, operation.format, operation.source)
        if source is not target.bits:
            self.tracker.merge(operation.name, source)

    async def _foreign(self, path: str, format: str | None, name: str) -> DirtyBitmap:
        """The bits of a bitmap of another image, which is opened for reading meanwhile."""
        image = await Image.open(path, OpenOptions(format=format or "qcow2", chain=False), self._open_file)
        try:
            return await image.bits(name)
        except BitmapError as error:
            raise ImageError(path, str(error), errno=error.errno) from error
        finally:
            await image.close()

    # -- the disk ------------------------------------------------------------------------------

    async def commit(self) -> None:
        """Have the disk say what memory says; writes nothing if it does.

        Raises:
            ImageError, BitmapError: it cannot be done; the old bitmaps are there.
            OSError: a write or sync failed; the old bitmaps or the new ones are there.
        """
        if await self.stage():
            try:
                await self.switch()
            except UnsupportedError:
                await self.abandon()
                raise
            await self.free()

    async def stage(self) -> bool:
        """Write all that the new bitmaps need, durably, beside the old ones; False: nothing is to be changed.

        Raises:
            ImageError, OSError: it failed; the old bitmaps are there.
        """
        layer = self._layer
        self._judge_directory()
        if self._drop_directory and not len(self.tracker):
            return True
        if not self._touched and [s.tracked for s in self._store.stored] == list(self.tracker):
            return False
        await prepare(layer, self.notices)
        assert layer.header is not None
        metadata = await load_metadata(layer, self._cache, punch=False)
        self._saver = BitmapSaver(self._store, metadata, layer.header)
        try:
            self._staged = await self._saver.stage(self._touched)
        except BaseException:
            if metadata.dirty and metadata.broken is None:
                await metadata.flush()  # counts of what was given back
            raise
        return self._staged is not None

    def _judge_directory(self) -> None:
        size = 0
        for bitmap in self.tracker:
            length = ENTRY.size + len(bitmap.name.encode("utf-8", "surrogateescape"))
            size += length + -length % 8
        if size > MAX_BITMAP_DIRECTORY:
            raise ImageError(
                self.path,
                f"its bitmap directory would take {size} bytes; {MAX_BITMAP_DIRECTORY} are possible",
            )

    async def switch(self) -> None:
        """Have the header lead to what was staged.

        Raises:
            UnsupportedError: the header has no room; nothing has changed, ``abandon`` is to follow.
            OSError: the old bitmaps or the new ones are there; ``revert`` may follow.
        """
        if self._drop_directory:
            header = self._layer.header
            assert header is not None
            header = replace(
                header.without_extension(ExtensionType.BITMAPS),
                autoclear_features=header.autoclear_features & ~int(AutoclearFeature.BITMAPS),
            )
            header = self._layer.header = await rewrite_header(self._layer.file, header)
            # Disk: no bitmaps. Where those are that there had been nobody knows: leaked.
            if self._saver is not None:
                self._saver.header = header
        if self._staged is not None:
            assert self._saver is not None
            await self._saver.switch(self._staged)
            self._layer.header = self._saver.header
            self.tracker.apply(Step.STORE, *(b for b in self.tracker if b.state is BitmapState.NEW))
        self.changed = True

    async def free(self) -> None:
        """After ``switch``: give back what only the old bitmaps needed. What fails is logged, and leaked."""
        if self._saver is not None and self._staged is not None:
            await self._saver.free(self._staged)

    async def abandon(self) -> None:
        """Instead of ``switch``: give back what was staged. What fails is logged, and leaked."""
        if self._saver is not None and self._staged is not None:
            await self._saver.abandon(self._staged)

    async def revert(self) -> None:
        """After ``switch``, even one that failed: have the header lead to the old bitmaps again.

        Raises:
            ImageError, OSError: it failed; the old bitmaps or the new ones are there.
        """
        if self._saver is not None and self._staged is not None:
            await self._saver.revert(self._staged)
            self._layer.header = self._saver.header
        self.changed = False


def judge_name(name: str) -> None:
    """Refuse a name that QEMU or an NBD client could not use.

    Raises:
        BitmapError: it is empty, too long, not UTF-8, or has a NUL byte.
    """
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise BitmapError(name, "its name is not UTF-8") from error
    if not 1 <= length <= MAX_BITMAP_NAME:
        shown = name if length < 80 else f"{name[:60]}..."
        raise BitmapError(shown, f"its name is {length} bytes long (1 to {MAX_BITMAP_NAME} are allowed)")
    if "\0" in name:
        raise BitmapError(name, "its name contains a NUL byte")


def judge_granularity(name: str, granularity: int) -> None:
    """Refuse a granularity that the format does not have.

    Raises:
        BitmapError: it is no power of two, or out of range.
    """
    low, high = 1 << MIN_GRANULARITY_BITS, 1 << MAX_GRANULARITY_BITS
    if not low <= granularity <= high or granularity & (granularity - 1):
        raise BitmapError(
            name, f"its granularity is {granularity}, not a power of two from {low} to {high} bytes (2 GiB)"
        )


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
