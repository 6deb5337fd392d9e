"""Which clusters hold metadata, few and many, against a plain set."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdbm.image import occupied
from nbdbm.image.occupied import FEW, SHORT, Occupied

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sets(st.integers(0, 400), max_size=90)),
        st.tuples(st.just("discard"), st.sets(st.integers(0, 400), max_size=20)),
    ),
    max_size=8,
)


def found(places: Occupied, end: int) -> set[int]:
    return {cluster for cluster in range(end) if places.hit(cluster, cluster + 1)}


@settings(max_examples=60)
@given(STEPS, st.sampled_from((0, 40, FEW)))
def test_single_clusters(steps: list[tuple[str, set[int]]], few: int) -> None:
    """Whether they fit the set or not, one by one and as ranges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(occupied, "FEW", few)
        places, plain = Occupied(), set[int]()
        for step, clusters in steps:
            if step == "add":
                places.add(clusters - plain)
                plain |= clusters
            else:
                places.discard(clusters)
                plain -= clusters
            assert found(places, 402) == plain
            assert places.among(set(range(402))) == plain
            for first in range(0, 400, 7):
                assert places.hit(first, first + 5) == (not plain.isdisjoint(range(first, first + 5)))
            assert places.crowded or places.single == plain


@pytest.mark.parametrize("length", (1, SHORT, SHORT + 1, 1 << 40))
def test_ranges(length: int) -> None:
    places = Occupied()
    places.protect((10, 10 + length), (5, 7))
    assert not places.hit(7, 10) and not places.hit(10 + length, 20 + length)
    assert places.hit(9, 11) and places.hit(9 + length, 10 + length) and places.hit(0, 1 << 50)
    assert places.crowded is (length > SHORT)
    places.add({3})
    places.unprotect(10)
    assert not places.hit(10, 10 + length) and places.hit(3, 4) and places.hit(6, 7)
    places.unprotect(11)  # nothing begins there
    assert found(places, 20) == {3, 5, 6}


def test_long_ranges_that_touch_or_overlap() -> None:
    places = Occupied()
    places.protect((1000, 1100), (1100, 1200), (1150, 1170), (2000, 2100), (2050, 2300), (1010, 1080))
    for cluster in (999, 1200, 1999, 2300):
        assert not places.hit(cluster, cluster + 1)
    for cluster in (1000, 1099, 1100, 1199, 2000, 2099, 2100, 2299):
        assert places.hit(cluster, cluster + 1)
    assert not places.hit(1200, 2000) and places.hit(1200, 2001) and places.hit(1199, 2000)
