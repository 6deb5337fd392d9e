"""What is under way: requests that hold host offsets, and clusters that are being allocated.

Both live in the event loop's thread and need no lock of their own.
"""

from __future__ import annotations

import asyncio


class Epochs:
    """Tells when every request that was under way at some moment has ended.

    A request that keeps a host offset across an await enters and leaves. A freed cluster may get a new
    user only when all requests are gone that may have looked it up before it was unlinked:

        read A --------------------|            enters epoch 0
               unlink A -> turn() = 0           A may be reused when passed(0)
                      read B ------------|      enters epoch 1: cannot have seen A
    """

    __slots__ = ("_counts", "current")

    def __init__(self) -> None:
        self.current = 0
        self._counts: dict[int, int] = {}

    def enter(self) -> int:
        """Begin a request; give the answer to ``leave``."""
        epoch = self.current
        self._counts[epoch] = self._counts.get(epoch, 0) + 1
        return epoch

    def leave(self, epoch: int) -> None:
        """End a request."""
        left = self._counts[epoch] - 1
        if left:
            self._counts[epoch] = left
        else:
            del self._counts[epoch]

    def turn(self) -> int:
        """Close the current epoch and return its number; requests that enter later are not in it."""
        self.current += 1
        return self.current - 1

    def passed(self, epoch: int) -> bool:
        """Whether no request of this epoch or an earlier one is left."""
        return not self._counts or min(self._counts) > epoch


class ClusterLocks:
    """Exclusive use of ranges of guest clusters, for requests that change the mapping.

    A request takes all its clusters at once or waits holding none, so there is no deadlock. Few are
    under way at a time: a list is searched faster than a tree is kept.
    """

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held: list[tuple[int, int, asyncio.Future[None]]] = []
        """(first, end, what ends with it) of each; for a look at whether there are any."""

    def holder(self, first: int, end: int) -> asyncio.Future[None] | None:
        """The first request that holds one of the clusters [first, end), as what ends with it."""
        for begin, stop, future in self.held:
            if first < stop and begin < end:
                return future
        return None

    async def acquire(self, first: int, end: int) -> tuple[int, int, asyncio.Future[None]]:
        """Take the clusters [first, end) when nobody holds any of them; give the answer to ``release``."""
        while (future := self.holder(first, end)) is not None:
            # Many may wait for one future, and a waiter may be cancelled: it must not take the future along.
            await asyncio.shield(future)
        lock = (first, end, asyncio.get_running_loop().create_future())
        self.held.append(lock)
        return lock

    def release(self, lock: tuple[int, int, asyncio.Future[None]]) -> None:
        """Give the clusters back and wake whoever waits for them."""
        self.held.remove(lock)
        lock[2].set_result(None)
