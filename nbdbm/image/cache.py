"""Caches of the engine: L2 table slices, and decompressed clusters. Bounded in bytes.

Loading is shared: whoever misses while somebody else is loading waits for the same read. There are no
locks; everything here lives in the event loop's thread.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from nbdbm.metrics import CacheFigures

TABLE_LIMIT = 32 * 1024 * 1024
"""Bytes of L2 tables kept per image with its whole backing chain. With 64 KiB clusters they map 256 GiB;
beyond, tables are read again."""

CLUSTER_LIMIT = 8 * 1024 * 1024
"""Bytes of decompressed clusters kept per image: small reads of one cluster come in series, and a
cluster is used up soon."""

V = TypeVar("V")


class LoadingCache(Generic[V]):
    """Values by integer key, the least recently used dropped beyond ``limit``.

    ``weigh`` gives a value's bytes, which must not change while it is cached.
    """

    def __init__(self, limit: int, weigh: Callable[[V], int]) -> None:
        self.limit = limit
        self.weight = 0
        """Bytes held now."""
        self.values: OrderedDict[int, V] = OrderedDict()
        """For reading only; look up with ``move_to_end`` to keep the order."""
        self.hits = 0
        self.misses = 0
        """Of ``get`` and ``load``; who looks into ``values`` counts for himself."""
        self._weigh = weigh
        self._loading: dict[int, asyncio.Task[V]] = {}

    def get(self, key: int) -> V | None:
        """The value if it is here."""
        value = self.values.get(key)
        if value is not None:
            self.values.move_to_end(key)
            self.hits += 1
        return value

    async def load(self, key: int, loader: Callable[[], Awaitable[V]]) -> V:
        """The value, from ``loader`` if it is not here. What it raises goes to everyone waiting.

        One caller's cancellation does not stop the load: others may be waiting.
        """
        value = self.get(key)
        if value is not None:
            return value
        task = self._loading.get(key)
        if task is None:
            task = asyncio.ensure_future(self._load(key, loader))
            self._loading[key] = task
            task.add_done_callback(lambda done: self._loaded(key, done))
            self.misses += 1
        return await asyncio.shield(task)

    async def _load(self, key: int, loader: Callable[[], Awaitable[V]]) -> V:
        value = await loader()
        self.put(key, value)
        return value

    def _loaded(self, key: int, task: asyncio.Task[V]) -> None:
        del self._loading[key]
        if not task.cancelled():
            task.exception()  # seen here, in case that nobody waits any more

    def put(self, key: int, value: V) -> None:
        """Keep ``value`` as the most recently used."""
        self.drop(key)
        self.values[key] = value
        self.weight += self._weigh(value)
        if self.weight > self.limit:
            self._shrink(key)

    def _shrink(self, newest: int) -> None:
        """Drop the least recently used values beyond the limit, but not the newest."""
        while self.weight > self.limit and len(self.values) > 1:
            _, old = self.values.popitem(last=False)
            self.weight -= self._weigh(old)

    def drop(self, key: int) -> None:
        """Forget the value, if it is here."""
        old = self.values.pop(key, None)
        if old is not None:
            self.weight -= self._weigh(old)

    def figures(self, name: str) -> CacheFigures:
        """What it has been good for, under this name."""
        return CacheFigures(name, self.hits, self.misses, self.weight)

    async def close(self) -> None:
        """Wait until nothing is loading (files may then be closed) and forget everything."""
        while self._loading:
            await asyncio.wait(list(self._loading.values()))
            await asyncio.sleep(0)  # lets the done callbacks run
        self.values.clear()
        self.weight = 0


class Table:
    """One slice of an L2 table."""

    __slots__ = ("dirty", "kinds", "pinned", "words")

    def __init__(self, words: array[int]) -> None:
        self.words = words
        """The entries in native byte order, as ``L2Decoder`` takes them."""
        self.kinds: bytes | None = None
        """``L2Decoder.kinds`` of the words, made when block status first asks."""
        self.dirty = 0
        """One bit per page (commit.PAGE_WORDS) that differs from the file."""
        self.pinned = False
        """The file has not got all of it yet: must stay in the cache."""


class TableCache(LoadingCache[Table]):
    """L2 slices of a whole chain. A key is the layer's tag plus the number of the slice on the disk."""

    def __init__(self, limit: int = TABLE_LIMIT) -> None:
        # An eighth more for the kinds, whether they have been made or not.
        super().__init__(limit, lambda table: len(table.words) * 9)

    def _shrink(self, newest: int) -> None:
        """Drop the least recently used slices beyond the limit, but none that the file has not got yet:
        a commit sees to it that those do not become many."""
        for key in list(self.values):
            if self.weight <= self.limit:
                break
            if key != newest and not self.values[key].pinned:
                self.drop(key)


class ClusterCache(LoadingCache[bytes]):
    """Decompressed clusters. A key is the layer's tag plus the guest offset's cluster number."""

    def __init__(self, limit: int = CLUSTER_LIMIT) -> None:
        super().__init__(limit, len)


TAG_SHIFT = 60
"""A layer's tag is its place in the chain, shifted by this: no slice or cluster number reaches it."""
