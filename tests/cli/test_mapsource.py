"""Where a map comes from: naming contexts, joining extents, and both sources giving the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.cli.mapsource import ImageSource, ServerSource, choose, merged
from nbdbm.errors import UsageError
from nbdbm.extents import Extent
from nbdbm.image.image import OpenOptions
from tests.support.diskserver import DIRTY, SIZE, DiskServer, serving
from tests.support.sample import EXPECTED, unpack


class Refusing:
    """A source as far as ``choose`` asks one."""

    size = 0

    def refusal(self, bitmap: str) -> str | None:
        return "it is broken" if bitmap == "bad" else None

    async def contexts(self) -> Sequence[str]:
        raise AssertionError

    async def select(self, contexts: Sequence[str]) -> None:
        raise AssertionError

    def extents(self, context: str) -> AsyncIterator[Extent]:
        raise AssertionError

    async def close(self) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("base:allocation", "base:allocation"),
        ("b", "qemu:dirty-bitmap:b"),
        ("qemu:dirty-bitmap:b", "qemu:dirty-bitmap:b"),
        # A bitmap may have any name; a full context's goes first, the other can be written in full.
        ("x:y", "x:y"),
        ("qemu:dirty-bitmap:x:y", "qemu:dirty-bitmap:x:y"),
    ],
)
def test_choose(name: str, chosen: str) -> None:
    available = ["base:allocation", "qemu:dirty-bitmap:b", "x:y", "qemu:dirty-bitmap:x:y"]
    assert choose(name, available, Refusing(), "disk") == chosen


@pytest.mark.parametrize(
    ("name", "available", "says"),
    [
        ("bad", ["base:allocation"], "disk: bitmap 'bad': it is broken"),
        ("qemu:dirty-bitmap:bad", [], "disk: bitmap 'bad': it is broken"),
        ("none", [], "disk: no context 'none'; there are: none"),
        ("c99", [f"c{i}" for i in range(30)], ", c19, ..."),
    ],
)
def test_choose_refuses(name: str, available: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose(name, available, Refusing(), "disk")
    assert says in str(caught.value)


@given(st.lists(st.builds(Extent, st.integers(1, 9), st.integers(0, 1)), max_size=20))
def test_merged(extents: list[Extent]) -> None:
    async def stream() -> AsyncIterator[Extent]:
        for extent in extents:
            yield extent

    async def collect() -> list[tuple[int, int, int]]:
        return [piece async for piece in merged(stream())]

    pieces = asyncio.run(collect())
    flat = [flags for length, flags in extents for _ in range(length)]
    assert [flags for _, length, flags in pieces for _ in range(length)] == flat
    assert [offset for offset, _, _ in pieces] == [
        sum(length for _, length, _ in pieces[:i]) for i in range(len(pieces))
    ]
    assert all(a[2] != b[2] for a, b in pairwise(pieces))


def test_an_image(tmp_path: Path) -> None:
    async def main() -> None:
        source = await ImageSource.open(str(unpack(tmp_path)), OpenOptions())
        try:
            names = list(EXPECTED["dirty"])
            context = f"qemu:dirty-bitmap:{names[-1]}"
            assert source.size == EXPECTED["size"]
            assert context in await source.contexts()
            assert source.refusal("sunday") and source.refusal("monday") is None
            assert source.refusal("there is none of this name") is None
            await source.select([context])
            extents = [extent async for extent in source.extents(context)]
            assert sum(e.length for e in extents if e.flags) == sum(
                length for _, length in EXPECTED["dirty"][names[-1]]
            )
        finally:
            await source.close()

    asyncio.run(main())


def test_a_server_is_connected_to_once(tmp_path: Path) -> None:
    async def main() -> None:
        server = DiskServer()
        async with serving(tmp_path, server) as uri:
            source = await ServerSource.open(str(uri))
            assert await source.contexts() == ("base:allocation", DIRTY)
            assert source.refusal("b") is None
            await source.select([DIRTY])
            assert source.size == SIZE
            assert len([extent async for extent in source.extents(DIRTY)]) == SIZE // 65536
            await source.close()
        assert server.goodbyes == 1

    asyncio.run(main())
