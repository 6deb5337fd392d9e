"""L2 entries changed by hand-made words, and against the decoder."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.qcow2.geometry import Geometry
from nbdbm.qcow2.header import Header
from nbdbm.qcow2.l2edit import L2Editor
from nbdbm.qcow2.mapping import Kind, L2Decoder
from tests.support.qcow2build import Image as Built

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
KIB = 1024


class Setup(NamedTuple):
    geometry: Geometry
    editor: L2Editor
    decoder: L2Decoder


def setup(cluster_bits: int = 16, *, extended: bool = False, external: bool = False) -> Setup:
    incompatible = (0x10 if extended else 0) | (0x4 if external else 0)
    data = Built(size=1 << 24, cluster_bits=cluster_bits, incompatible=incompatible).build()
    geometry = Geometry(Header.parse(data[: 1 << cluster_bits]))
    return Setup(geometry, L2Editor(geometry), L2Decoder(geometry))


STANDARD = setup()
EXTENDED = setup(extended=True)
EXTERNAL = setup(external=True)
EXTERNAL_EXTENDED = setup(extended=True, external=True)
C = 64 * KIB
S = C // 32
"""Of a subcluster."""


def words(*entries: int, count: int = 16) -> array[int]:
    return array("Q", [*entries, *([0] * (count - len(entries)))])


# -- where entries are -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "offset", "slot"),
    [
        (STANDARD, 0, 0),
        (STANDARD, C - 1, 0),
        (STANDARD, 3 * C, 3),
        (STANDARD, 8192 * C + 5 * C, 5),  # the next slice
        (EXTENDED, 3 * C + 1, 6),
        (EXTENDED, 4096 * C + C, 2),
    ],
)
def test_slot(what: Setup, offset: int, slot: int) -> None:
    assert what.editor.slot(offset) == slot


# -- in place ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "usable"),
    [
        (COPIED | 5 * C, True),
        (5 * C, False),  # shared
        (COPIED, False),  # no cluster
        (0, False),
        (COPIED | 5 * C | ZERO, False),
        (COMPRESSED | 5 * C, False),
        (COPIED | COMPRESSED | 5 * C, False),
        (COPIED | 5 * C | 2, False),  # reserved bits
        (COPIED | 5 * C | 1 << 56, False),
        (COPIED | 5 * C | 512, False),  # misaligned
    ],
)
def test_in_place_takes_plain_data_of_our_own(entry: int, usable: bool) -> None:
    found = STANDARD.editor.in_place(words(entry), 100, 50)
    assert found == ((5 * C + 100, 50) if usable else (0, 0))


@pytest.mark.parametrize(
    ("entries", "offset", "length", "expected"),
    [
        ((5, 6, 7), 0, 3 * C, (5 * C, 3 * C)),
        ((5, 6, 7), 10, 3 * C - 20, (5 * C + 10, 3 * C - 20)),
        ((5, 6, 8), 10, 3 * C - 10, (5 * C + 10, 2 * C - 10)),  # the third lies elsewhere
        ((5, 0, 7), 10, 3 * C - 10, (5 * C + 10, C - 10)),  # the second lies nowhere
        ((5, 4), 0, 2 * C, (5 * C, C)),
        ((0, 6), 0, 2 * C, (0, 0)),
    ],
)
def test_in_place_goes_as_far_as_it_is_one_piece(
    entries: tuple[int, ...], offset: int, length: int, expected: tuple[int, int]
) -> None:
    table = words(*(COPIED | entry * C if entry else 0 for entry in entries))
    assert STANDARD.editor.in_place(table, offset, length) == expected


def test_in_place_in_a_data_file_is_at_the_guests_own_offset() -> None:
    editor = EXTERNAL.editor
    assert editor.in_place(words(COPIED, COPIED | C), 7, 2 * C - 7) == (7, 2 * C - 7)
    assert editor.in_place(words(COPIED | C), 0, C) == (0, 0)
    assert editor.in_place(words(0), 0, C) == (0, 0)


@pytest.mark.parametrize(
    ("bitmap", "within", "length", "usable"),
    [
        (0xFFFF_FFFF, 0, C, C),
        (0, 0, C, 0),
        (0b1, 0, C, S),
        (0b1, 5, C - 5, S - 5),
        (0b110, S + 1, 5 * S, 2 * S - 1),
        (0b110, 0, C, 0),
        (1 << 31, 31 * S, S, S),
        (1 << 31, 31 * S + 5, 10, 10),
        (0xFFFF_FFFF ^ 1 << 5, 0, C, 5 * S),
        (0xFFFF_FFFF ^ 1 << 5, 0, 3 * S, 3 * S),
        (0b10 | 0b1 << 32, 0, 2 * S, 0),
        (0b11 | 0b10 << 32, 0, S, 0),  # one of them is both, so reading refuses all of it
        (0xFFFF_FFFF_FFFF_FFFF, 0, C, 0),
    ],
)
def test_in_place_with_subclusters(bitmap: int, within: int, length: int, usable: int) -> None:
    found = EXTENDED.editor.in_place(words(COPIED | 9 * C, bitmap), within, length)
    assert found[1] == usable
    if usable:
        assert found[0] == 9 * C + within


def test_in_place_goes_on_through_full_clusters_only() -> None:
    full = 0xFFFF_FFFF
    editor = EXTENDED.editor
    table = words(COPIED | 9 * C, full, COPIED | 10 * C, 0b11, COPIED | 11 * C, full)
    assert editor.in_place(table, 10, 3 * C - 10) == (9 * C + 10, C - 10 + 2 * S)
    table[3] = 0
    assert editor.in_place(table, 10, 3 * C - 10) == (9 * C + 10, C - 10)
    table[3] = full
    assert editor.in_place(table, 10, 3 * C - 10) == (9 * C + 10, 3 * C - 10)


# -- who owns what -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "entry", "expected"),
    [
        (STANDARD, COPIED | 5 * C, 5 * C),
        (STANDARD, COPIED | 5 * C | ZERO, 5 * C),
        (STANDARD, 5 * C, None),
        (STANDARD, ZERO, None),
        (STANDARD, COPIED, None),
        (STANDARD, COMPRESSED | 5 * C, None),
        (EXTERNAL, COPIED, 0),
        (EXTERNAL, 0, None),
        (EXTENDED, COPIED | 5 * C, 5 * C),
    ],
)
def test_owned(what: Setup, entry: int, expected: int | None) -> None:
    assert what.editor.owned(words(entry), 0) == expected


def _packed(offset: int, sectors: int) -> int:
    """A compressed entry: its data begin at ``offset`` and touch so many sectors."""
    return COMPRESSED | (sectors - 1) << 62 - (16 - 8) | offset


@pytest.mark.parametrize(
    ("what", "entry", "expected"),
    [
        (STANDARD, COPIED | 5 * C, [5]),
        (STANDARD, 5 * C | ZERO, [5]),
        (STANDARD, 0, []),
        (STANDARD, ZERO, []),
        (STANDARD, _packed(5 * C, 1), [5]),
        (STANDARD, _packed(5 * C + 100, 128), [5]),
        (STANDARD, _packed(5 * C + 512, 128), [5, 6]),
        (STANDARD, _packed(6 * C - 1, 2), [5, 6]),
        (STANDARD, _packed(6 * C - 512, 1), [5]),
        (STANDARD, _packed(6 * C - 100, 1), [5]),
        (EXTERNAL, COPIED | 5 * C, []),
    ],
)
def test_references(what: Setup, entry: int, expected: list[int]) -> None:
    assert list(what.editor.references(words(entry), 0)) == expected


@pytest.mark.parametrize(
    ("what", "entry", "bitmap", "expected"),
    [
        (EXTENDED, 0, 0, True),
        (EXTENDED, 0, 0b11 << 32, True),
        (EXTENDED, 5 * C, 0b11 << 32, True),  # set aside, and shared
        (EXTENDED, 5 * C, 0b1, False),
        (EXTENDED, COMPRESSED | 5 * C, 0, False),
        (STANDARD, 0, 0, False),
    ],
)
def test_keeps_subclusters(what: Setup, entry: int, bitmap: int, expected: bool) -> None:
    assert what.editor.keeps_subclusters(words(entry, bitmap), 0) is expected


# -- changes -----------------------------------------------------------------------------------


def test_changes_of_standard_entries() -> None:
    editor = STANDARD.editor
    table = words(1, 2, 3, 4)
    editor.link(table, C, 7 * C, 0, C)
    assert table[:4].tolist() == [1, COPIED | 7 * C, 3, 4]
    editor.zero(table, C, None)
    assert table[:4].tolist() == [1, ZERO, 3, 4]
    editor.zero(table, C, 8 * C)
    assert table[:4].tolist() == [1, COPIED | 8 * C | ZERO, 3, 4]
    editor.unallocate(table, C)
    assert table[:4].tolist() == [1, 0, 3, 4]


def test_changes_of_extended_entries() -> None:
    editor = EXTENDED.editor
    table = words(1, 2, 0, 0b1111 << 32, 5, 6)
    editor.link(table, C, 7 * C, S, 2 * S)
    assert table[2:4].tolist() == [COPIED | 7 * C, 0b110 | 0b1001 << 32]
    editor.link(table, C, 7 * C, 31 * S, S)
    assert table[3] == 0b110 | 1 << 31 | 0b1001 << 32
    editor.zero_subclusters(table, C, 0, 2 * S)
    assert table[3] == 0b100 | 1 << 31 | 0b1011 << 32
    editor.zero(table, C, 8 * C)
    assert table[2:4].tolist() == [COPIED | 8 * C, 0xFFFF_FFFF << 32]
    editor.zero(table, C, None)
    assert table[2:4].tolist() == [0, 0xFFFF_FFFF << 32]
    editor.unallocate(table, C)
    assert table[:6].tolist() == [1, 2, 0, 0, 5, 6]


def test_a_compressed_entry_has_no_bitmap_worth_keeping() -> None:
    table = words(COMPRESSED | 5 * C, 0xFFFF_FFFF_FFFF_FFFF)
    EXTENDED.editor.link(table, 0, 7 * C, 0, C)
    assert table[:2].tolist() == [COPIED | 7 * C, 0xFFFF_FFFF]


# -- against the decoder -----------------------------------------------------------------------


@st.composite
def tables(draw: st.DrawFn, what: Setup) -> array[int]:
    """Four entries, valid ones, of every sort."""
    table = array("Q", bytes(8 * what.geometry.slice_entries * what.geometry.words_per_entry))
    extended, external = what.geometry.extended_l2, what.geometry.external_data
    sorts = ["none", "zero", "aside", "data", "shared"] + ([] if external else ["packed"])
    for index in range(4):
        sort = draw(st.sampled_from(sorts))
        host = index * C if external else draw(st.sampled_from((8, 9, 10, 11))) * C
        at = index * what.geometry.words_per_entry
        if sort == "packed":
            table[at] = _packed(host + 512, 3)
            continue
        present = sort in ("aside", "data", "shared")
        if external and sort == "shared":
            sort = "data"
        entry = (host | (0 if sort == "shared" else COPIED)) if present else 0
        if extended:
            data = draw(st.sampled_from((0, 0xFFFF_FFFF, 0b110, 0xFFFF_0000))) if present else 0
            zero = draw(st.sampled_from((0, 0xFFFF_FFFF, 0xFF))) & ~data
            table[at + 1] = data | zero << 32
        elif sort in ("zero", "aside"):
            entry |= ZERO
        table[at] = entry
    return table


def kinds(what: Setup, table: array[int]) -> list[tuple[Kind, int]]:
    """For each subcluster of the four clusters: its kind, and where it is."""
    step = what.geometry.subcluster_size
    found = []
    for at in range(0, 4 * C, step):
        ((kind, _, host),) = what.decoder.runs(table, at, step)
        found.append((kind, host))
    return found


@pytest.mark.parametrize("what", (STANDARD, EXTENDED, EXTERNAL, EXTERNAL_EXTENDED))
@given(data=st.data())
def test_in_place_says_what_the_decoder_says(what: Setup, data: st.DataObject) -> None:
    table = data.draw(tables(what))
    offset = data.draw(st.integers(0, 4 * C - 1))
    length = data.draw(st.integers(1, 4 * C - offset))
    host, part = what.editor.in_place(table, offset, length)
    assert 0 <= part <= length
    before = bytes(table)
    if part:
        ((kind, covered, place),) = what.decoder.runs(table, offset, part)
        assert (kind, covered, place) == (Kind.DATA, part, host)
        for cluster in range(offset // C * C, offset + part, C):
            assert table[what.editor.slot(cluster)] & COPIED
    if part < length:
        ((kind, _, place),) = what.decoder.runs(table, offset + part, 1)
        own = table[what.editor.slot(offset + part)] & COPIED and kind is Kind.DATA
        assert not own or (part and place != host + part)
    assert bytes(table) == before


@pytest.mark.parametrize("what", (STANDARD, EXTENDED, EXTERNAL, EXTERNAL_EXTENDED))
@given(data=st.data())
def test_changes_change_what_they_say_and_nothing_else(what: Setup, data: st.DataObject) -> None:
    table = data.draw(tables(what))
    editor, step = what.editor, what.geometry.subcluster_size
    per_cluster = C // step
    before = kinds(what, table)
    index = data.draw(st.integers(0, 3))
    cluster, mine = index * C, range(index * per_cluster, (index + 1) * per_cluster)
    packed = before[mine.start][0] is Kind.COMPRESSED
    first = data.draw(st.integers(0, per_cluster - 1))
    count = data.draw(st.integers(1, per_cluster - first))
    host = cluster if what.geometry.external_data else 20 * C
    changes = ["zero", "aside", "unallocate"]
    if not packed and editor.owned(table, cluster) is not None:
        changes.append("link here")
    if packed or not what.geometry.extended_l2:
        first, count = 0, per_cluster
    if (first == 0 and count == per_cluster) or editor.keeps_subclusters(table, cluster):
        changes.append("link")
    if what.geometry.extended_l2 and not packed:
        changes.append("zero some")
    change = data.draw(st.sampled_from(changes))
    if change == "link here":
        owned = editor.owned(table, cluster)
        assert owned is not None
        host = owned
    if change.startswith("link"):
        editor.link(table, cluster, host, first * step, count * step)
        expected = (Kind.DATA, host)
    elif change == "zero some":
        editor.zero_subclusters(table, cluster, first * step, count * step)
        expected = (Kind.ZERO, 0)
    else:
        first, count = 0, per_cluster
        if change == "unallocate":
            editor.unallocate(table, cluster)
            expected = (Kind.UNALLOCATED, 0)
        else:
            editor.zero(table, cluster, host if change == "aside" else None)
            # A data file's first cluster, at offset 0, cannot be told from none, as far as zeroes go.
            aside = change == "aside" and (host or what.geometry.extended_l2)
            expected = (Kind.ZERO_ALLOCATED, host) if aside else (Kind.ZERO, 0)
    after = kinds(what, table)
    zeroes = (Kind.ZERO, Kind.ZERO_ALLOCATED)
    for number, (was, now) in enumerate(zip(before, after, strict=True)):
        at = number - mine.start
        if number not in mine:
            assert now == was
        elif first <= at < first + count:
            if change == "zero some":
                assert now[0] in zeroes
            elif now[0] in (Kind.DATA, Kind.ZERO_ALLOCATED):
                assert now == (expected[0], expected[1] + at * step)
            else:
                assert now == expected
        elif was[0] in zeroes:  # with or without a place, they read the same
            assert now[0] in zeroes
        else:
            assert now == was


@pytest.mark.parametrize(
    ("entries", "offset", "length", "count"),
    [
        ((), 0, 1, 1),
        ((), C - 1, 2, 2),
        ((), 8192 * C - 5, 5, 1),
        ((COPIED | C,), 0, C, 0),
        ((COPIED | C,), C, 3 * C, 3),
        ((0, 0, ZERO), 0, 5 * C, 2),
        ((0, 0, 1 << 56), 0, 5 * C, 2),
        ((0, 0, COPIED), C + 7, C, 1),
    ],
)
def test_blank(entries: tuple[int, ...], offset: int, length: int, count: int) -> None:
    table = words(*entries, count=8192)
    assert STANDARD.editor.blank(table, offset, length) == count


def test_nothing_is_blank_that_has_subclusters() -> None:
    assert EXTENDED.editor.blank(words(count=8192), 0, 5 * C) == 0


@pytest.mark.parametrize("what", (STANDARD, setup(9)))
@pytest.mark.parametrize(("first", "count"), [(0, 1), (3, 1), (3, 4), (0, 8)])
def test_link_blank_links_each(what: Setup, first: int, count: int) -> None:
    size = what.geometry.cluster_size
    at_once, singly = words(count=8), words(count=8)
    what.editor.link_blank(at_once, first * size, 9 * size, count)
    for number in range(count):
        what.editor.link(singly, (first + number) * size, (9 + number) * size, 0, size)
    assert at_once == singly
