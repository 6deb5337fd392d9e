"""Counts against a plain list of numbers."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.image.counts import CHUNK, Counts
from nbdbm.qcow2.refcount import pack_counts, unpack_counts

SIZE = 40

STEP = st.one_of(
    st.tuples(st.just("add"), st.lists(st.integers(0, SIZE - 1), max_size=20)),
    st.tuples(st.just("run"), st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))),
    st.tuples(
        st.just("set"),
        st.tuples(st.integers(0, SIZE - 1), st.sampled_from([0, 1, 253, 254, 255, 256, 70000])),
    ),
)


@given(st.lists(STEP, max_size=30))
def test_model(steps: list[tuple[str, object]]) -> None:
    counts, model = Counts(SIZE), [0] * SIZE
    for kind, argument in steps:
        if kind == "add":
            assert isinstance(argument, list)
            counts.add(argument)
            for cluster in argument:
                model[cluster] += 1
        else:
            assert isinstance(argument, tuple)
            first, second = argument
            if kind == "run":
                first, second = sorted((first, second))
                counts.add_run(first, second)
                for cluster in range(first, second):
                    model[cluster] += 1
            else:
                counts[first] = second
                model[first] = second
        assert [counts[n] for n in range(SIZE)] == model
    assert counts.slice(3, SIZE + 2) == [*model[3:], 0, 0]
    assert counts.end() == max((n + 1 for n in range(SIZE) if model[n]), default=0)
    same, other = Counts(SIZE), Counts(SIZE)
    for cluster, value in enumerate(model):
        same[cluster] = value
    assert counts == same and not list(counts.differences(same))
    assert list(counts.differences(other)) == [n for n in range(SIZE) if model[n]]


@pytest.mark.parametrize("order", range(7))
def test_load(order: int) -> None:
    """Every width, from the first cluster on, behind it, and over the end."""
    top = (1 << (1 << order)) - 1
    values = [min(v, top) for v in (1, 0, 2, 255, 256, 1, 70000, 3)]
    typecode = unpack_counts(b"", order).typecode
    block = pack_counts(array(typecode, values), order)
    counts = Counts(21)
    for first in (0, 8, 16, 24):
        counts.load(first, block, order)
    assert [counts[n] for n in range(21)] == (values * 3)[:21]


@pytest.mark.parametrize("order", (4, 5, 6))
def test_load_small(order: int) -> None:
    """Counts below 256 take the short way."""
    typecode = unpack_counts(b"", order).typecode
    counts = Counts(5)
    counts.load(1, pack_counts(array(typecode, [1, 255, 0, 7]), order), order)
    assert counts.slice(0, 5) == [0, 1, 255, 0, 7]
    assert not counts.more


def test_across_chunks() -> None:
    one, other = Counts(3 * CHUNK), Counts(3 * CHUNK)
    assert one.end() == 0
    one[CHUNK] = 1
    one[3 * CHUNK - 1] = 300
    other[3 * CHUNK - 1] = 301
    assert list(one.differences(other)) == [CHUNK, 3 * CHUNK - 1]
    one[3 * CHUNK - 1] = 0
    assert one.end() == CHUNK + 1


def test_grow() -> None:
    counts = Counts(2)
    counts.add_run(0, 2)
    counts.grow(4)
    counts.grow(1)
    assert len(counts) == 4 and counts.slice(0, 4) == [1, 1, 0, 0]
    assert counts != [1, 1, 0, 0]
