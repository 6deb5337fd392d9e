"""L2 tables under a check: both ways through them, and what neither QEMU nor we may get wrong.

tests/image/test_check.py compares whole images with qemu-img.
"""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.image.check import Survey
from nbdbm.qcow2.header import Header
from tests.support.memfile import MemoryFile
from tests.support.qcow2build import COPIED, Image

KIB = 1024


def test_conflicting_subclusters_keep_their_cluster() -> None:
    data = bytearray(Image(incompatible=16, clusters={}, size=1 << 20).build())
    words = array("Q", bytes(64 * KIB))
    words[0], words[1] = 5 << 16 | COPIED, 1 << 32 | 1
    words[3] = 1
    found = Survey(MemoryFile(bytes(data) + bytes(64 * KIB * 4)), Header.parse(bytes(data)))
    words.byteswap()
    found.tables.check("a table", words.tobytes(), 0, False)
    assert found.counted[5] == 1 and found.report.corruptions == 2


ENTRY = st.one_of(
    st.just(0),
    st.integers(1, 60).map(lambda n: n << 16 | COPIED),
    st.integers(1, 60).map(lambda n: n << 16),
    st.integers(1, 60).map(lambda n: n << 16 | COPIED | 1),
    st.just(1),
    st.just(COPIED),
    st.integers(60, 70).map(lambda n: n << 16 | COPIED),
)


@given(st.lists(ENTRY, max_size=40), st.lists(st.integers(0, 2), min_size=64, max_size=64), st.booleans())
def test_fast_like_slow(entries: list[int], refcounts: list[int], run: bool) -> None:
    """The table's short way counts and judges as the long one does."""
    if run:
        first = entries[0] & 0x3F0000 if entries else 0
        entries = [(first + (n << 16)) | COPIED for n in range(len(entries))]
    words = array("Q", entries + [0] * (8192 - len(entries)))
    header = Header.parse(Image(cluster_bits=16).build())
    surveys = [Survey(MemoryFile(bytes(64 << 16)), header) for _ in range(2)]
    for one in surveys:
        for cluster, value in enumerate(refcounts):
            one.stored[cluster] = value
    raw = words[:]
    raw.byteswap()
    fast, slow = surveys
    for active in (True, False):
        wrong = fast.tables.check("t", raw.tobytes(), 0, active)
        assert wrong == slow.tables.entries("t", words, None, 0, active)
    assert fast.counted == slow.counted
    assert fast.report == slow.report


@pytest.mark.parametrize("flags", [COPIED, 0, COPIED | 1])
@pytest.mark.parametrize("refcount", [1, 2])
@pytest.mark.parametrize("first", [1, 40])
def test_full_table(flags: int, refcount: int, first: int) -> None:
    """Contiguous from the first entry to the last, inside the file or over its end."""
    header = Header.parse(Image(cluster_bits=9).build())
    words = array("Q", range(first << 9 | flags, (first + 64 << 9) | flags, 512))
    raw = words[:]
    raw.byteswap()
    surveys = [Survey(MemoryFile(bytes(80 << 9)), header) for _ in range(2)]
    for one in surveys:
        for cluster in range(80):
            one.stored[cluster] = refcount
    fast, slow = surveys
    wrong = fast.tables.check("t", raw.tobytes(), 0, True)
    assert wrong == slow.tables.entries("t", words, None, 0, True)
    assert fast.counted == slow.counted and fast.report == slow.report
