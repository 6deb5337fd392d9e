import struct
from itertools import chain, pairwise

from hypothesis import given
from hypothesis import strategies as st

from nbdbm.extents import Extent, ExtentList


def packed(*pairs: tuple[int, int]) -> bytes:
    return struct.pack(f"{2 * len(pairs)}Q", *chain(*pairs))


def test_empty_range_is_full() -> None:
    extents = ExtentList(512, 0, 10)
    assert extents.full
    assert not extents.add(1, 1)
    assert not extents.add_packed(packed((1, 0)), 512, 513)
    assert list(extents.flat) == []


def test_coalesces_neighbours() -> None:
    extents = ExtentList(0, 100, 10)
    assert extents.add(10, 1)
    assert extents.add(5, 1)
    assert extents.add(0, 0)
    assert extents.add(5, 0)
    assert list(extents) == [Extent(15, 1), Extent(5, 0)]
    assert len(extents) == 2
    assert extents.covered == extents.position == 20


def test_clips_to_range() -> None:
    extents = ExtentList(1000, 100, 10)
    assert extents.add(99, 0)
    assert not extents.add(50, 1)
    assert extents.full
    assert list(extents) == [Extent(99, 0), Extent(1, 1)]
    assert extents.position == 1100
    assert not extents.add(1, 0)
    assert extents.covered == 100


def test_cap_drops_what_comes_after() -> None:
    extents = ExtentList(0, 100, 1)
    assert extents.add(10, 0)
    assert extents.add(10, 0)
    assert not extents.add(10, 1)
    assert not extents.add(10, 0)
    assert list(extents) == [Extent(20, 0)]


def test_repr_is_short() -> None:
    extents = ExtentList(0, 100, 10)
    assert repr(extents) == "<ExtentList @0+100 []>"
    extents.add_packed(packed((1, 0), (2, 1), (3, 0), (4, 1), (5, 0)), 0, 15)
    assert repr(extents) == "<ExtentList @0+100 [1:0, 2:1, 3:0, 4:1, ...]>"


@given(
    start=st.integers(0, 10),
    length=st.integers(0, 60),
    limit=st.integers(1, 12),
    before=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 2)), max_size=3),
    skip=st.integers(0, 5),
    pairs=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 2)), max_size=12),
    beyond=st.integers(0, 9),
    after=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 2)), max_size=3),
)
def test_many_at_once_as_one_by_one(
    start: int,
    length: int,
    limit: int,
    before: list[tuple[int, int]],
    skip: int,
    pairs: list[tuple[int, int]],
    beyond: int,
    after: list[tuple[int, int]],
) -> None:
    fast = ExtentList(start, length, limit)
    slow = ExtentList(start, length, limit)
    for extents in (fast, slow):
        for extent in before:
            extents.add(*extent)
    # Neighbours differ; only the last may reach past the range.
    many: list[tuple[int, int]] = []
    room = start + length - fast.position
    for n, flags in pairs:
        if room > 0 and not (many and many[-1][1] == flags):
            many.append((n, flags))
            room -= n
    if many:
        many[-1] = (many[-1][0] + beyond, many[-1][1])
        first = [(many[0][0] + skip, many[0][1]), *many[1:]]
        end = fast.position + sum(n for n, _ in many)
        assert fast.add_packed(packed(*first), fast.position - skip, end) is not fast.full
    for each in many:
        slow.add(*each)
    for extents in (fast, slow):
        for extent in after:
            extents.add(*extent)
    assert (fast.flat, fast.position, fast.full) == (slow.flat, slow.position, slow.full)


@given(
    length=st.integers(0, 100),
    limit=st.integers(1, 6),
    parts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), max_size=12),
)
def test_invariants(length: int, limit: int, parts: list[tuple[int, int]]) -> None:
    extents = ExtentList(7, length, limit)
    for part in parts:
        extents.add(*part)
    found = list(extents)
    assert len(found) <= limit
    assert all(extent.length > 0 for extent in found)
    assert all(a.flags != b.flags for a, b in pairwise(found))
    assert sum(extent.length for extent in found) == extents.covered <= length
    # Byte by byte the same as the parts, as far as it goes.
    wanted = [flags for n, flags in parts for _ in range(n)]
    got = [extent.flags for extent in found for _ in range(extent.length)]
    assert got == wanted[: len(got)]
    assert extents.covered == min(length, len(wanted)) or len(found) == limit
