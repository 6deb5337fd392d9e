import asyncio
from array import array

import pytest

from nbdbm.image.cache import LoadingCache, Table, TableCache


def test_least_recently_used_goes_first() -> None:
    cache: LoadingCache[bytes] = LoadingCache(10, len)
    for key in range(5):
        cache.put(key, b"xx")
    assert cache.weight == 10
    assert cache.get(0) == b"xx"
    cache.put(5, b"yy")
    assert list(cache.values) == [2, 3, 4, 0, 5]
    cache.put(6, b"z" * 6)
    assert list(cache.values) == [0, 5, 6]
    cache.drop(5)
    cache.drop(99)
    assert cache.weight == 8


def test_a_value_over_the_limit_is_kept_alone() -> None:
    cache: LoadingCache[bytes] = LoadingCache(10, len)
    cache.put(1, b"x")
    cache.put(2, b"y" * 50)
    assert list(cache.values) == [2]
    assert cache.weight == 50


def test_putting_again_replaces() -> None:
    cache: LoadingCache[bytes] = LoadingCache(10, len)
    cache.put(1, b"xxx")
    cache.put(1, b"y")
    assert cache.get(1) == b"y"
    assert cache.weight == 1


def test_concurrent_misses_share_one_load() -> None:
    calls = []

    async def run() -> None:
        cache: LoadingCache[bytes] = LoadingCache(100, len)

        async def loader() -> bytes:
            calls.append(1)
            await asyncio.sleep(0.01)
            return b"value"

        assert await asyncio.gather(*(cache.load(7, loader) for _ in range(5))) == [b"value"] * 5
        assert await cache.load(7, loader) == b"value"
        figures = cache.figures("some")
        assert (figures.name, figures.hits, figures.misses, figures.bytes) == ("some", 1, 1, 5)

    asyncio.run(run())
    assert calls == [1]


def test_one_callers_cancellation_is_not_the_others() -> None:
    async def run() -> None:
        cache: LoadingCache[bytes] = LoadingCache(100, len)

        async def loader() -> bytes:
            await asyncio.sleep(0.02)
            return b"value"

        first = asyncio.ensure_future(cache.load(7, loader))
        second = asyncio.ensure_future(cache.load(7, loader))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == b"value"
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(run())


def test_failures_go_to_everyone_and_are_not_kept() -> None:
    async def run() -> None:
        cache: LoadingCache[bytes] = LoadingCache(100, len)

        async def broken() -> bytes:
            await asyncio.sleep(0)
            raise OSError(5, "broken")

        results = await asyncio.gather(*(cache.load(1, broken) for _ in range(2)), return_exceptions=True)
        assert [type(result) for result in results] == [OSError, OSError]

        async def good() -> bytes:
            return b"good"

        assert await cache.load(1, good) == b"good"

    asyncio.run(run())


def test_close_waits_for_loads() -> None:
    ended = []

    async def run() -> None:
        cache: LoadingCache[bytes] = LoadingCache(100, len)

        async def loader() -> bytes:
            await asyncio.sleep(0.02)
            ended.append(1)
            raise OSError(5, "nobody waits for this")

        waiter = asyncio.ensure_future(cache.load(1, loader))
        await asyncio.sleep(0)
        waiter.cancel()
        await cache.close()
        assert ended == [1]
        assert not cache.values and not cache.weight

    asyncio.run(run())


def test_tables_stay_within_their_limit() -> None:
    cache = TableCache(limit=1 << 20)
    for key in range(100):
        cache.put(key, Table(array("Q", bytes(65536))))
    assert cache.weight <= 1 << 20
    assert 10 < len(cache.values) < 16
