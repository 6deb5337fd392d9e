"""Engines that are careless, each in one way that would lose data, or a bitmap's truth.

Each takes a MonkeyPatch. The power-failure tests must notice every one: a test that lets one of them pass
would let the same mistake pass in the engine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from pytest import MonkeyPatch

from nbdbm.bitmaps.tracker import BitmapTracker
from nbdbm.image import repair
from nbdbm.image.allocator import Allocator
from nbdbm.image.bitmapsave import BitmapSaver
from nbdbm.image.cache import Table
from nbdbm.image.commit import Metadata
from nbdbm.image.counts import Counts
from nbdbm.image.image import Image
from nbdbm.image.inflight import ClusterLocks, Epochs
from nbdbm.image.write import Writer

Mutant = Callable[[MonkeyPatch], None]

FEATURES_AT = 72
"""Where the header has incompatible_features; the dirty bit is its lowest."""


class StandIn:
    """``real`` with some attributes replaced."""

    def __init__(self, real: object, **instead: object) -> None:
        self._real = real
        self.__dict__.update(instead)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _free_now(allocator: Allocator, clusters: Iterable[int]) -> None:
    for cluster in clusters:
        number, index = divmod(cluster, allocator.per_block)
        block = allocator._blocks[number]
        block.counts[index] -= 1
        allocator._touch(number, block, index, 1)
        if not block.counts[index]:
            block.used[index] = False
            allocator._hint = min(allocator._hint, cluster)


# -- freeing -----------------------------------------------------------------------------------


def freed_at_once(patch: MonkeyPatch) -> None:
    """Clusters are free as soon as RAM has unlinked them, long before the disk has."""
    table, changed = Metadata.table, Metadata.changed

    async def load_counts_too(self: Metadata, offset: int) -> Table:
        for cluster in range(0, self.file.size // self.allocator.cluster_size, self.allocator.per_block):
            await self.allocator.count(cluster)
        return await table(self, offset)

    def free_now(
        self: Metadata, offset: int, where: Table, unlinked: Iterable[int] = (), *, count: int = 1
    ) -> None:
        changed(self, offset, where, count=count)
        _free_now(self.allocator, unlinked)

    patch.setattr(Metadata, "table", load_counts_too)
    patch.setattr(Metadata, "changed", free_now)


def counted_down_early(patch: MonkeyPatch) -> None:
    """Refcounts fall with the commit that unlinks, not with the one after it."""
    commit = Metadata._commit

    async def decrement_first(self: Metadata, **how: bool) -> None:
        unlinked, self._unlinked = self._unlinked, []
        await self.allocator.decrement(unlinked)
        await commit(self, **how)

    patch.setattr(Metadata, "_commit", decrement_first)


def freed_before_unlinked_at_the_end(patch: MonkeyPatch) -> None:
    """In closing, what was unlinked is free before the mapping without it is durable."""
    write_out, sync = Metadata.write_out, Metadata._sync
    closing: set[Metadata] = set()

    async def write_out_carelessly(self: Metadata) -> None:
        closing.add(self)
        await write_out(self)
        closing.remove(self)

    async def first_sync_only(self: Metadata, *files: Any) -> None:
        if self not in closing or len(files) > 1:
            await sync(self, *files)

    patch.setattr(Metadata, "write_out", write_out_carelessly)
    patch.setattr(Metadata, "_sync", first_sync_only)


def nobody_is_waited_for(patch: MonkeyPatch) -> None:
    """Neither requests on the same clusters wait for each other, nor freed clusters for requests."""

    async def take(self: ClusterLocks, first: int, end: int) -> None:
        return None

    patch.setattr(ClusterLocks, "acquire", take)
    patch.setattr(ClusterLocks, "release", lambda self, lock: None)
    patch.setattr(Epochs, "passed", lambda self, epoch: True)


# -- data --------------------------------------------------------------------------------------


def _everything_the_long_way(patch: MonkeyPatch) -> None:
    patch.setattr(Writer, "try_write", lambda self, offset, data: False)


def zeroed_before_written(patch: MonkeyPatch) -> None:
    """Data that is overwritten in place is zeroed first."""
    write_some = Writer._write_some

    async def zero_first(self: Writer, offset: int, data: memoryview) -> int:
        table = await self._lookup(offset)
        if table is not None:
            host, part = self._editor.in_place(table.words, offset, len(data))
            if part:
                await self._metadata.data.zero(host, part, punch=False)
        return await write_some(self, offset, data)

    _everything_the_long_way(patch)
    patch.setattr(Writer, "_write_some", zero_first)


def cluster_zeroed_before_filled(patch: MonkeyPatch) -> None:
    """What surrounds a write in a cluster that is owned already is read, zeroed and written again."""
    fill = Writer._fill

    async def zero_first(self: Writer, offset: int, data: memoryview, host: int, *, fresh: bool) -> None:
        if not fresh:
            size = self._geometry.cluster_size
            length = -(-(offset % size + len(data)) // size) * size
            before = await self._metadata.data.pread(host, length)
            await self._metadata.data.zero(host, length, punch=False)
            await self._metadata.data.pwrite(host, before)
        await fill(self, offset, data, host, fresh=fresh)

    patch.setattr(Writer, "_fill", zero_first)


def linked_before_written(patch: MonkeyPatch) -> None:
    """The mapping changes before the data that it leads to has been written."""
    fill = Writer._fill

    async def link_first(self: Writer, offset: int, data: memoryview, host: int, *, fresh: bool) -> None:
        late: list[tuple[int, bytes]] = []

        async def pwrite(at: int, content: bytes | memoryview) -> None:
            late.append((at, bytes(content)))

        real = self._metadata.data
        metadata = StandIn(self._metadata, data=StandIn(real, pwrite=pwrite))
        await fill(StandIn(self, _metadata=metadata), offset, data, host, fresh=fresh)  # type: ignore[arg-type]
        for at, content in late:
            await real.pwrite(at, content)

    patch.setattr(Writer, "_fill", link_first)


def data_file_synced_last(patch: MonkeyPatch) -> None:
    """The image file has the new mapping before the data file is synced."""
    commit, sync = Metadata._commit, Metadata._sync

    async def commit_then_sync(self: Metadata, **how: bool) -> None:
        await commit(self, **how)
        await sync(self, self.data)

    async def sync_image(self: Metadata, *files: Any) -> None:
        await sync(self, *(file for file in files if file is not self.data))

    patch.setattr(Metadata, "_commit", commit_then_sync)
    patch.setattr(Metadata, "_sync", sync_image)


# -- metadata ----------------------------------------------------------------------------------


def mapping_before_counts(patch: MonkeyPatch) -> None:
    """The mapping is durable before the refcounts that it needs."""
    commit, write_dirty, write_new = Metadata._commit, Allocator.write_dirty, Allocator.write_new_blocks

    async def nothing(self: Allocator) -> bool:
        return False

    async def counts_last(self: Metadata, **how: bool) -> None:
        await commit(self, **how)
        await write_new(self.allocator)
        await write_dirty(self.allocator)
        await self.sync()

    patch.setattr(Allocator, "write_dirty", nothing)
    patch.setattr(Allocator, "write_new_blocks", nothing)
    patch.setattr(Metadata, "_commit", counts_last)


def mapping_before_data(patch: MonkeyPatch) -> None:
    """Nothing holds the mapping back until data and refcounts are durable."""
    commit, sync = Metadata._commit, Metadata._sync
    skipping: set[int] = set()

    async def skip_one_sync(self: Metadata, **how: bool) -> None:
        if self._tables or self._l1:
            skipping.add(id(self))
        await commit(self, **how)

    async def sync_or_not(self: Metadata, *files: Any) -> None:
        if id(self) in skipping:
            skipping.remove(id(self))
        else:
            await sync(self, *files)

    patch.setattr(Metadata, "_commit", skip_one_sync)
    patch.setattr(Metadata, "_sync", sync_or_not)


def tables_not_blanked(patch: MonkeyPatch) -> None:
    """A new L2 table is linked without having been written in full."""
    own_table = Metadata._own_table

    async def only_claim(self: Metadata, index: int) -> None:
        async def pwrite(at: int, content: bytes) -> None:
            return None

        real = self.file
        self.file = StandIn(real, pwrite=pwrite)  # type: ignore[assignment]
        try:
            await own_table(self, index)
        finally:
            self.file = real

    patch.setattr(Metadata, "_own_table", only_claim)


def lazy_refcounts(patch: MonkeyPatch) -> None:
    """No carelessness by itself: the dirty bit is set, and refcounts are written at the clean close only."""
    begin, finish = Image._begin_writing, Image._finish
    write_dirty, write_new = Allocator.write_dirty, Allocator.write_new_blocks
    closing: set[Allocator] = set()

    async def set_dirty(metadata: Metadata, bit: int) -> None:
        await metadata.file.pwrite(FEATURES_AT + 7, bytes([bit]))
        await metadata.sync()

    async def begin_dirty(self: Image, options: Any) -> None:
        await begin(self, options)
        assert self._metadata is not None
        await set_dirty(self._metadata, 1)

    async def finish_clean(self: Image, side: Any) -> None:
        metadata = self._metadata
        assert metadata is not None
        closing.add(metadata.allocator)
        await finish(self, side)
        if metadata.dirty:
            await metadata.flush()
        await set_dirty(metadata, 0)

    async def write_dirty_if(self: Allocator) -> None:
        if self in closing:
            await write_dirty(self)

    async def write_new_if(self: Allocator) -> bool:
        return self in closing and await write_new(self)

    patch.setattr(Image, "_begin_writing", begin_dirty)
    patch.setattr(Image, "_finish", finish_clean)
    patch.setattr(Allocator, "write_dirty", write_dirty_if)
    patch.setattr(Allocator, "write_new_blocks", write_new_if)


def lazy_and_mapping_before_data(patch: MonkeyPatch) -> None:
    """Lazy refcounts without order between data and mapping."""
    lazy_refcounts(patch)
    mapping_before_data(patch)


def repaired_by_old_counts(patch: MonkeyPatch) -> None:
    """The repair of an image with the dirty bit puts its new refcounts where the old ones say is room."""
    rebuild = repair._rebuild

    class Forgetful(Counts):
        __slots__ = ()

        def end(self) -> int:
            return 0

    async def trust_old_counts(walk: Any) -> Any:
        walk.counted.__class__ = Forgetful
        return await rebuild(walk)

    patch.setattr(repair, "_rebuild", trust_old_counts)


# -- bitmaps -----------------------------------------------------------------------------------


def marked_after_written(patch: MonkeyPatch) -> None:
    """The bits of a write are set when it has succeeded."""
    mark, write = BitmapTracker.mark, Image.write

    async def mark_last(self: Image, offset: int, data: memoryview, *, fua: bool = False) -> None:
        await write(self, offset, data, fua=fua)
        mark(self.tracker, offset, len(data))

    patch.setattr(BitmapTracker, "mark", lambda self, offset, length: None)
    patch.setattr(Image, "write", mark_last)


def armed_after_first_write(patch: MonkeyPatch) -> None:
    """IN_USE reaches the disk only when something has been written."""
    rewrite, write = BitmapSaver._rewrite_flags, Image.write
    waiting: list[Callable[[], Awaitable[None]]] = []

    async def later(self: BitmapSaver, which: Any, change: Any) -> None:
        waiting.append(lambda: rewrite(self, which, change))

    async def arm_last(self: Image, offset: int, data: memoryview, *, fua: bool = False) -> None:
        await write(self, offset, data, fua=fua)
        while waiting:
            await waiting.pop()()

    patch.setattr(BitmapSaver, "_rewrite_flags", later)
    patch.setattr(Image, "write", arm_last)


def switched_before_durable(patch: MonkeyPatch) -> None:
    """The header leads to the new bitmap directory before that is durable."""
    directory = BitmapSaver._directory

    async def without_flush(self: BitmapSaver, *arguments: Any) -> Any:
        async def later() -> None:
            return None

        real = self._metadata
        self._metadata = StandIn(real, flush=later)  # type: ignore[assignment]
        try:
            return await directory(self, *arguments)
        finally:
            self._metadata = real

    patch.setattr(BitmapSaver, "_directory", without_flush)


def freed_before_switched(patch: MonkeyPatch) -> None:
    """The clusters of the old bitmap directory are counted down before the header leaves it."""
    switch = BitmapSaver.switch

    async def free_first(self: BitmapSaver, staged: Any, header: Any = None) -> None:
        await self._metadata.allocator.decrement(staged.old)
        staged.old.clear()
        await self._metadata.flush()
        await switch(self, staged, header)

    patch.setattr(BitmapSaver, "switch", free_first)


def failed_commit_forgotten(patch: MonkeyPatch) -> None:
    """What a commit could not write is not written by the next one either."""
    commit = Metadata._commit

    async def careless(self: Metadata, **how: bool) -> None:
        try:
            await commit(self, **how)
        except BaseException:
            for table in self._tables.values():
                table.dirty = 0
            self._tables.clear()
            self._l1.clear()
            raise

    patch.setattr(Metadata, "_commit", careless)
