"""BitmapStore: the bitmaps of one qcow2 file, found and judged at open, loaded on first need.

What is wrong costs as little service as it can:

    autoclear bit 0 unset             the extension is stale: a notice, no bitmaps
    extension or directory broken     where bitmaps are cannot be known: a notice, no bitmaps
    one entry or its table broken     that bitmap is refused with its reason; its neighbours are served
    IN_USE                            that bitmap is inconsistent; its table and bits are never looked at
    bits that cannot be read          BitmapError for who asks for them; asked again, tried again

The image's data is served in every case. (QEMU opens no image whose directory, or any entry of it, is
broken.) Entries are kept verbatim, so that rewriting the directory keeps those we do not understand.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, overload

from nbdbm.bitmaps.dirty import DirtyBitmap
from nbdbm.bitmaps.tracker import (
    INCONSISTENT_REASON,
    BitmapState,
    BitmapTracker,
    Step,
    TrackedBitmap,
)
from nbdbm.errors import BitmapError, FormatError, ImageError
from nbdbm.image.blockfile import BlockFile
from nbdbm.metrics import BitmapFigures
from nbdbm.qcow2.bitmapdir import (
    BitmapsExtension,
    DirectoryEntry,
    bitmap_bytes,
    data_runs,
    duplicate_names,
    parse_directory,
    table_refusal,
)
from nbdbm.qcow2.constants import OFFSET_MASK, AutoclearFeature, ExtensionType
from nbdbm.qcow2.header import Header

log = logging.getLogger(__name__)

JUDGED_TABLES = 1024
JUDGED_TABLE_BYTES = 16 * 1024 * 1024
"""How many bitmap tables are judged while the image is opened, in directory order; the others on first
need. A bitmap that is advertised and then fails is poor service, but a directory may ask for 65535 reads,
or for the same 8 MiB table 65535 times over, before the first client is served."""

READ_SIZE = 1024 * 1024
"""Bytes of bits read at a time, where clusters are adjacent: bounds what a load needs beside its result."""

LOADED_LIMIT = 1024 * 1024 * 1024
"""Bytes of read-only bitmaps that stay in memory: beyond it the least recently used are dropped, to be
loaded again when they are asked for. It holds two bitmaps of the greatest size there is; without a limit,
a small file with thousands of those (they may share their clusters) would take all memory."""


class StoredBitmap(NamedTuple):
    """A bitmap, and what the directory says of it."""

    tracked: TrackedBitmap
    entry: DirectoryEntry
    offset: int
    """Of the entry in the file, bytes."""


class BitmapStore:
    """Made by ``load``. Runs in one event loop; ``close`` it before the file is closed."""

    tracker: BitmapTracker
    notices: list[str]
    """What the user should hear of bitmaps that are missing as a whole; refused ones tell themselves."""
    extension: BitmapsExtension | None
    """Where the directory is; None when there is none that can be trusted."""

    def __init__(self, file: BlockFile, header: Header, size: int, *, writable: bool) -> None:
        self.tracker = BitmapTracker(size)
        self.notices = []
        self.extension = None
        self.stored: list[StoredBitmap] = []
        """Every entry of the directory, in order."""
        self.places: set[int] = set()
        """Host clusters of the tables and bits that were judged when the image was opened for writing: they
        are read later, when the guest's data must not be there."""
        self._file = file
        self._cluster_size = header.cluster_size
        self._size = size
        self._writable = writable
        self._entries: dict[TrackedBitmap, DirectoryEntry] = {}
        self._loads: dict[TrackedBitmap, asyncio.Task[DirtyBitmap]] = {}
        self._load_lock = asyncio.Lock()
        self._partial: dict[TrackedBitmap, None] = {}
        """Bitmaps whose bits in memory are what was marked since ``record``, without what the disk has."""
        self._background: asyncio.Task[None] | None = None
        self._recent: OrderedDict[TrackedBitmap, int] = OrderedDict()
        """Loaded bitmaps that may be dropped -> bytes in memory; the least recently used first."""

    @classmethod
    async def load(cls, file: BlockFile, header: Header, size: int, *, writable: bool) -> BitmapStore:
        """Read and judge the directory and the tables of a disk of ``size`` bytes; the bits are not read.

        Never fails for what the file says: what cannot be used is in ``notices`` or refused.
        """
        store = cls(file, header, size, writable=writable)
        try:
            await store._load_directory(header)
        except FormatError as error:
            store.notices.append(f"no bitmap can be used: {error}")
        except OSError as error:
            if writable:
                raise  # written past, they would be lost for good; a second try may find them
            log.warning("%s: reading the bitmap directory: %s", file.path, error)
            store.notices.append(f"no bitmap can be used: reading the bitmap directory failed: {error}")
        return store

    async def _load_directory(self, header: Header) -> None:
        found = [e for e in header.extensions if e.type == ExtensionType.BITMAPS]
        trusted = bool(header.autoclear_features & AutoclearFeature.BITMAPS)
        if not found:
            if trusted:
                self.notices.append(
                    "autoclear feature bit 0 (bitmaps) is set, but there is no bitmaps extension"
                )
            return
        if not trusted:
            self.notices.append(
                "the bitmaps extension is stale and was ignored: the image was written by a program that"
                " does not know bitmaps"
            )
            return
        if len(found) > 1:
            raise FormatError("bitmaps extension", None, "appears more than once")
        extension = BitmapsExtension.parse(found[0].data)
        extension.validate(self._cluster_size, self._file.size)
        directory = await self._file.pread(extension.directory_offset, extension.directory_size)
        entries = parse_directory(directory, extension.nb_bitmaps)
        self.extension = extension
        await self._judge(entries, extension.directory_offset)

    async def _judge(self, entries: list[DirectoryEntry], offset: int) -> None:
        duplicates = duplicate_names(entries)
        tables, table_bytes = 0, 0
        for entry in entries:
            refusal = entry.refusal(self._size, self._cluster_size, self._file.size)
            if refusal is None and entry.raw_name in duplicates:
                refusal = "there is more than one bitmap of this name"
            if entry.in_use:
                state, refusal = BitmapState.INCONSISTENT, refusal or INCONSISTENT_REASON
            else:
                if refusal is None and tables < JUDGED_TABLES and table_bytes < JUDGED_TABLE_BYTES:
                    tables += 1
                    table_bytes += 8 * entry.table_size
                    try:
                        table, refusal = await self._read_table(entry)
                        if refusal is None and self._writable:
                            self.places.update(self._places(entry, table))
                    except OSError as error:
                        if self._writable:
                            raise  # written past, it would be lost for good; a second try may find it
                        log.warning("%s: reading a bitmap table: %s", self._file.path, error)
                        refusal = f"reading its table failed: {error}"
                usable = BitmapState.VALID if self._writable else BitmapState.READ_ONLY
                state = usable if refusal is None else BitmapState.REFUSED
            tracked = TrackedBitmap(
                entry.name, entry.granularity, enabled=entry.auto, state=state, refusal=refusal
            )
            self.stored.append(StoredBitmap(tracked, entry, offset))
            self._entries[tracked] = entry
            offset += entry.packed_size
        self.tracker.attach(*(stored.tracked for stored in self.stored))

    def reopen(self, fresh: BitmapStore) -> None:
        """Become writable, given what the disk says now.

        No bitmap keeps a mark of having been read-only, inconsistent ones have none to begin with.

        Raises:
            BitmapError: the directory has changed since it was loaded: somebody else has been writing, so
                nothing that is in memory can be relied on.
        """
        for now, then in zip(fresh.stored, self.stored, strict=False):
            if now.entry.in_use and then.tracked.usable:
                raise BitmapError(
                    then.tracked.name,
                    "is in use on disk, but was consistent when it was opened read-only: somebody else has"
                    " been writing to the image; open it anew",
                )
        if [s.entry for s in fresh.stored] != [s.entry for s in self.stored]:
            raise ImageError(
                self._file.path,
                "the bitmap directory has changed since it was opened read-only: somebody else has been"
                " writing to the image; open it anew",
            )
        self.tracker.apply(Step.REOPEN_WRITABLE, *self.tracker)
        self.extension, self.places = fresh.extension, fresh.places
        self.replace(
            [s._replace(offset=now.offset) for s, now in zip(self.stored, fresh.stored, strict=True)]
        )
        self._recent.clear()  # what records changes must not be dropped

    def reopen_read_only(self) -> None:
        """Become read-only; every bitmap has been stored."""
        for bitmap in self._partial:
            bitmap.bits = None  # nothing was marked, or it would have been loaded to be stored
        self._partial.clear()
        self.tracker.apply(Step.REOPEN_READ_ONLY, *self.tracker)

    def replace(self, stored: list[StoredBitmap]) -> None:
        """Take note of what the directory on disk says now."""
        self.stored = stored
        self._entries = {s.tracked: s.entry for s in stored}

    async def _read_table(self, entry: DirectoryEntry) -> tuple[tuple[int, ...], str | None]:
        """The bitmap table, and why it cannot be used if so. The entry itself was judged before."""
        raw = await self._file.pread(entry.table_offset, 8 * entry.table_size)
        table: tuple[int, ...] = struct.unpack(f">{entry.table_size}Q", raw)
        total = bitmap_bytes(self._size, entry.granularity)
        return table, table_refusal(table, self._cluster_size, total, self._file.size)

    def _places(self, entry: DirectoryEntry, table: tuple[int, ...]) -> Iterator[int]:
        size = self._cluster_size
        for offset in range(entry.table_offset, entry.table_offset + 8 * entry.table_size, size):
            yield offset // size
        for place in table:
            if place & OFFSET_MASK:
                yield (place & OFFSET_MASK) // size

    # -- the bits ------------------------------------------------------------------------------

    def record(self) -> None:
        """Let all enabled bitmaps record from now on, and load in the background what the disk has of them.

        Serving waits for none of it: writes are marked in bits of their own, which the loaded ones are
        merged with. Until then ``bits`` waits; what cannot be loaded is neither shown nor stored.
        """
        beginning = [b for b in self.tracker if b.enabled and b.usable and b.bits is None]
        self.tracker.begin(*beginning)
        self._partial.update(dict.fromkeys(beginning))
        if beginning:
            self._background = asyncio.create_task(self._load_all(beginning), name="load bitmaps")

    async def _load_all(self, bitmaps: list[TrackedBitmap]) -> None:
        for bitmap in bitmaps:
            with suppress(BitmapError):  # whoever needs the bits tries again, and is told
                await self.bits(bitmap.name)

    def complete(self, bitmap: TrackedBitmap) -> bool:
        """Whether the bits in memory, if any, are all of them."""
        return bitmap not in self._partial

    def figures(self) -> Sequence[BitmapFigures]:
        """Every bitmap as it is when it is looked at: there may be 65535. Nothing is loaded for it."""
        return _Figures(self)

    async def bits(self, name: str) -> DirtyBitmap:
        """The bits of this bitmap, loaded on first need; concurrent callers share one load.

        Raises:
            BitmapError: there is none of this name, it was refused, or its bits cannot be read.
        """
        bitmap = self.tracker.find(name)
        if bitmap.bits is not None and bitmap not in self._partial:
            if bitmap in self._recent:
                self._recent.move_to_end(bitmap)
            return bitmap.bits
        task = self._loads.get(bitmap)
        if task is None:
            task = self._loads[bitmap] = asyncio.create_task(self._load(bitmap), name=f"load bitmap {name!r}")
            task.add_done_callback(lambda done: self._load_done(bitmap, done))
        try:
            # Shielded: one caller may give up while others wait for the same bits.
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if task.cancelled() and not (current and current.cancelling()):
                raise BitmapError(name, "the image is being closed") from None
            raise

    def _load_done(self, bitmap: TrackedBitmap, task: asyncio.Task[DirtyBitmap]) -> None:
        del self._loads[bitmap]
        if not task.cancelled():
            task.exception()  # seen, even if every caller has gone

    async def _load(self, bitmap: TrackedBitmap) -> DirtyBitmap:
        # One at a time: what is being loaded counts in no limit until it is there.
        async with self._load_lock:
            entry = self._entries[bitmap]
            try:
                table, refusal = await self._read_table(entry)
                if refusal is not None:
                    if bitmap not in self._partial:  # those are lost when they cannot be stored
                        self.tracker.apply(Step.LOSE, bitmap, reason=refusal)
                    raise BitmapError(bitmap.name, refusal)
                bits = await self._read_bits(entry, table)
            except OSError as error:
                log.warning("%s: reading bitmap %r: %s", self._file.path, bitmap.name, error)
                failure = BitmapError(bitmap.name, f"reading it failed: {error}")
                failure.errno = error.errno or failure.errno
                raise failure from error
            if bitmap in self._partial:
                # Nothing is awaited here: no mark can fall between the two.
                assert bitmap.bits is not None
                bitmap.bits.absorb(bits)
                del self._partial[bitmap]
                return bitmap.bits
            bitmap.bits = bits
            if bitmap.state is BitmapState.READ_ONLY:
                self._recent[bitmap] = bits.memory()
                self._shrink()
            return bits

    async def _read_bits(self, entry: DirectoryEntry, table: tuple[int, ...]) -> DirtyBitmap:
        bits = DirtyBitmap(self._size, entry.granularity)
        total = bitmap_bytes(self._size, entry.granularity)
        # One buffer for all: fresh ones cost more in page faults than the reading.
        scratch = memoryview(bytearray(min(max(READ_SIZE, self._cluster_size), total)))
        for at, length, host in data_runs(table, self._cluster_size, total, READ_SIZE):
            if host is None:
                bits.load_ones(at, length)
            else:
                await self._file.pread_into(scratch[:length], host)
                bits.load(at, scratch[:length])
                await asyncio.sleep(0)  # what the page cache has waits for nothing: others get their turn
        return bits

    def _shrink(self) -> None:
        """Drop the least recently used bits beyond the limit; who holds them goes on holding them."""
        total = sum(self._recent.values())
        while total > LOADED_LIMIT and len(self._recent) > 1:
            bitmap, cost = self._recent.popitem(last=False)
            total -= cost
            bitmap.bits = None

    async def close(self) -> None:
        """Stop whatever is being loaded; those who wait for it get a BitmapError."""
        tasks: list[asyncio.Task[Any]] = list(self._loads.values())
        if self._background is not None:
            tasks.append(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Figures(Sequence[BitmapFigures]):
    """What is said of each bitmap, made when it is asked for."""

    def __init__(self, store: BitmapStore) -> None:
        self._store = store
        self._bitmaps = list(store.tracker)

    def __len__(self) -> int:
        return len(self._bitmaps)

    @overload
    def __getitem__(self, index: int) -> BitmapFigures: ...

    @overload
    def __getitem__(self, index: slice) -> list[BitmapFigures]: ...

    def __getitem__(self, index: int | slice) -> BitmapFigures | list[BitmapFigures]:
        if isinstance(index, slice):
            return [self._of(bitmap) for bitmap in self._bitmaps[index]]
        return self._of(self._bitmaps[index])

    def _of(self, bitmap: TrackedBitmap) -> BitmapFigures:
        bits = bitmap.bits if self._store.complete(bitmap) else None
        return BitmapFigures(
            bitmap.name,
            bitmap.state.value,
            bitmap.enabled and bitmap.usable,
            bitmap.granularity,
            None if bits is None else bits.dirty_bytes(),
        )
