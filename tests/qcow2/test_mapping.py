import struct
from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.errors import FormatError
from nbdbm.qcow2 import mapping
from nbdbm.qcow2.constants import COMPRESSED, COPIED, ZERO, IncompatFeature
from nbdbm.qcow2.geometry import Geometry
from nbdbm.qcow2.header import Header
from nbdbm.qcow2.mapping import ABSENT, BLANK, UNKNOWN, Kind, L2Decoder, Mapping, count_used, l2_table_offset
from nbdbm.qcow2.refcount import RefcountBlock
from tests.support.marks import requires

SIZE = 65536
EXTENDED = int(IncompatFeature.EXTENDED_L2)
EXTERNAL = int(IncompatFeature.DATA_FILE)

VARIANTS = {
    "v2": Header(version=2),
    "v3": Header(),
    "external": Header(incompatible_features=EXTERNAL),
    "extended": Header(incompatible_features=EXTENDED),
    "extended-external": Header(incompatible_features=EXTENDED | EXTERNAL),
}
variants = pytest.mark.parametrize("header", list(VARIANTS.values()), ids=list(VARIANTS))


def decoder(variant: str = "v3") -> L2Decoder:
    return L2Decoder(Geometry(VARIANTS[variant]))


def table(*words: int) -> array:
    return array("Q", words)


# -- L1 entries


def test_l1_entry() -> None:
    geometry = Geometry(Header())
    assert l2_table_offset(geometry, 0) == 0
    assert l2_table_offset(geometry, COPIED | 0x50000) == 0x50000
    assert l2_table_offset(geometry, COPIED) == 0


@pytest.mark.parametrize("entry", [1, 0x100, 1 << 56, 1 << 62, 0x50200, 0x58000])
def test_l1_entry_invalid(entry: int) -> None:
    with pytest.raises(FormatError, match="L1 entry"):
        l2_table_offset(Geometry(Header()), entry)


# -- standard entries


def test_each_kind() -> None:
    packed = COMPRESSED | 3 << 54 | 0x1234567
    words = table(0, ZERO, ZERO | COPIED | 0x90000, COPIED | 0x50000, 0x70000, packed, packed, COPIED)
    runs = decoder().runs(words, 0, 8 * SIZE)
    assert runs == [
        (Kind.UNALLOCATED, SIZE, 0),
        (Kind.ZERO, SIZE, 0),
        (Kind.ZERO_ALLOCATED, SIZE, 0x90000),
        (Kind.DATA, SIZE, 0x50000),
        (Kind.DATA, SIZE, 0x70000),
        (Kind.COMPRESSED, SIZE, packed),
        (Kind.COMPRESSED, SIZE, packed),
        (Kind.UNALLOCATED, SIZE, 0),  # offset 0 with bit 63: nothing, except in a data file
    ]
    assert decoder().kinds(words) == b"UZADDCCU"


def test_neighbours_join_where_the_host_clusters_do() -> None:
    words = table(0x50000, 0x60000 | COPIED, 0x70000, 0x90000, 0xA0000)
    assert decoder().runs(words, 100, 5 * SIZE - 300) == [
        (Kind.DATA, 3 * SIZE - 100, 0x50000 + 100),
        (Kind.DATA, 2 * SIZE - 200, 0x90000),
    ]


def test_the_slice_repeats_over_the_disk() -> None:
    words = array("Q", bytes(8 * 8192))
    words[5] = 0x50000
    assert decoder().runs(words, (9 << 29) + 5 * SIZE + 7, 10) == [(Kind.DATA, 10, 0x50007)]


CASES = {
    "reserved 1": ("v3", 0x50002, "reserved"),
    "reserved 8": ("v3", 0x50100, "reserved"),
    "reserved 56": ("v3", 1 << 56 | 0x50000, "reserved"),
    "reserved 61, no offset": ("v3", 1 << 61, "reserved"),
    "unaligned": ("v3", 0x50200, "aligned"),
    "unaligned zero": ("v3", 0x58000 | ZERO, "aligned"),
    "zero in v2": ("v2", ZERO, "version 2"),
    "allocated zero in v2": ("v2", 0x50000 | ZERO, "version 2"),
    "zero in extended": ("extended", ZERO, "extended"),
    "compressed in data file": ("external", COMPRESSED | 1 << 54, "compressed"),
    "elsewhere in data file": ("external", COPIED | 0x50000, "its own"),
    "zero elsewhere in data file": ("external", COPIED | 0x50000 | ZERO, "its own"),
}


@pytest.mark.parametrize("variant", ["v3", "extended"])
def test_locate_beside_compressed_clusters(variant: str) -> None:
    walker = decoder(variant)
    step = walker.geometry.words_per_entry
    words = array("Q", bytes(walker.geometry.slice_bytes))
    words[step] = COMPRESSED | 0x50000
    words[2 * step] = COPIED | 0x60000
    if step == 2:
        words[2 * step + 1] = (1 << 32) - 1  # all of its subclusters are allocated
    assert walker.locate(words, SIZE, 2 * SIZE) == UNKNOWN
    assert walker.locate(words, SIZE + 5, 7) == UNKNOWN
    assert walker.locate(words, 2 * SIZE + 5, 7) == 0x60005


@pytest.mark.parametrize("variant, entry, text", list(CASES.values()), ids=list(CASES))
def test_invalid(variant: str, entry: int, text: str) -> None:
    walker = decoder(variant)
    words = array("Q", bytes(walker.geometry.slice_bytes))
    words[3 * walker.geometry.words_per_entry] = entry
    with pytest.raises(FormatError, match=text):
        walker.runs(words, 0, 8 * SIZE)
    assert walker.runs(words, 0, 3 * SIZE) == [(Kind.UNALLOCATED, 3 * SIZE, 0)]
    assert walker.locate(words, 3 * SIZE, 512) == UNKNOWN


def test_data_file() -> None:
    words = table(COPIED, 0, COPIED | 2 * SIZE, 3 * SIZE | ZERO, ZERO)
    walker = decoder("external")
    assert walker.runs(words, 0, 5 * SIZE) == [
        (Kind.DATA, SIZE, 0),
        (Kind.UNALLOCATED, SIZE, 0),
        (Kind.DATA, SIZE, 2 * SIZE),
        (Kind.ZERO_ALLOCATED, SIZE, 3 * SIZE),
        (Kind.ZERO, SIZE, 0),
    ]
    assert walker.kinds(words) == b"DUDAZ"
    assert walker.locate(words, 100, 100) == 100


# -- extended entries


def test_subclusters() -> None:
    sub = SIZE // 32
    # data 0-1, zero 2, nothing 3-30, data 31; the next cluster continues with data on the host.
    words = table(COPIED | 0x50000, 1 << 34 | 1 << 31 | 3, COPIED | 0x60000, 1)
    runs = decoder("extended").runs(words, 10, 2 * SIZE - 10)
    assert runs == [
        (Kind.DATA, 2 * sub - 10, 0x50000 + 10),
        (Kind.ZERO_ALLOCATED, sub, 0x50000 + 2 * sub),
        (Kind.UNALLOCATED, 28 * sub, 0),
        (Kind.DATA, 2 * sub, 0x60000 - sub),
        (Kind.UNALLOCATED, 31 * sub, 0),
    ]
    assert decoder("extended").kinds(words) == b"MM"
    assert decoder("extended").locate(words, 31 * sub, sub) == 0x60000 - sub
    assert decoder("extended").locate(words, 5 * sub, sub) == ABSENT
    assert decoder("extended").locate(words, 30 * sub, 2 * sub) == UNKNOWN


def test_extended_whole_clusters() -> None:
    ones = 0xFFFFFFFF
    packed = COMPRESSED | 5
    words = table(0, 0, 0x50000, ones, 0, ones << 32, 0x50000, ones << 32, packed, 0, 0x50000, 0)
    assert decoder("extended").kinds(words) == b"UDZACU"
    assert [run.kind for run in decoder("extended").runs(words, 0, 6 * SIZE)] == [
        Kind.UNALLOCATED,
        Kind.DATA,
        Kind.ZERO,
        Kind.ZERO_ALLOCATED,
        Kind.COMPRESSED,
        Kind.UNALLOCATED,
    ]


@pytest.mark.parametrize(
    "entry, bitmap, text",
    [
        (0x50000, 1 << 32 | 1, "both"),
        (0, 1, "without"),
        (0, 0xFFFFFFFF, "without"),
        (0x50000, 2**64 - 1, "both"),
    ],
)
def test_extended_invalid(entry: int, bitmap: int, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        decoder("extended").runs(table(entry, bitmap), 0, SIZE)


# -- all of them


def entries() -> st.SearchStrategy[int]:
    """Mostly plausible entries, some of anything."""
    flags = st.sampled_from([0, COPIED, ZERO, COPIED | ZERO, COMPRESSED])
    offset = st.integers(0, 40).map(lambda n: n * SIZE)
    return st.one_of(
        st.just(0), st.builds(int.__or__, flags, offset), st.integers(0, 63).map(lambda n: 1 << n), WORD
    )


WORD = st.integers(0, 2**64 - 1)
HALF = st.sampled_from([0, 1, 0x80000000, 0xFFFFFFFF, 0xFF00, 0x0000FFFF])
BITMAP = st.one_of(st.builds(lambda a, b: a << 32 | b, HALF, HALF), WORD)


@requires("compiled")
@variants
@given(data=st.data())
def test_kinds_compiled_and_in_python(header: Header, data: st.DataObject) -> None:
    walker = L2Decoder(Geometry(header))
    count = walker.geometry.words_per_entry * data.draw(st.integers(1, 40))
    words = array("Q", data.draw(st.lists(entries(), min_size=count, max_size=count)))
    letters = walker.kinds(words)
    raw = struct.pack(f">{count}Q", *words)
    assert walker.kinds_of(raw, "big") == letters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "classify", None)
        assert walker.kinds(words) == letters
        assert walker.kinds_of(raw, "big") == letters


@variants
@given(data=st.data())
def test_kinds_say_what_runs_say(header: Header, data: st.DataObject) -> None:
    """Entry by entry; and a range's runs are those of its clusters, joined."""
    geometry = Geometry(header)
    walker = L2Decoder(geometry)
    count = data.draw(st.integers(1, 12))
    words = array("Q", bytes(count * geometry.l2_entry_size))
    for index in range(count):
        at = index * geometry.words_per_entry
        words[at] = data.draw(entries())
        if geometry.extended_l2:
            words[at + 1] = data.draw(BITMAP)
        elif geometry.external_data and words[at] and data.draw(st.booleans()):
            words[at] = COPIED | index * SIZE
    letters = walker.kinds(words)
    assert len(letters) == count
    single: list[list[Mapping] | None] = []
    for index in range(count):
        try:
            single.append(walker.runs(words, index * SIZE, SIZE))
        except FormatError as error:
            single.append(None)
            # M leaves it to ``runs``, and the place in a data file is not the letters' concern.
            assert letters[index : index + 1] in (b"X", b"M") or "its own" in error.rule
            continue
        kinds = {run.kind for run in single[-1] or []}
        expected = {
            frozenset([Kind.UNALLOCATED]): b"U",
            frozenset([Kind.ZERO]): b"Z",
            frozenset([Kind.ZERO_ALLOCATED]): b"A",
            frozenset([Kind.DATA]): b"D",
            frozenset([Kind.COMPRESSED]): b"C",
        }.get(frozenset(kinds), b"M")
        assert letters[index : index + 1] == expected
    if None in single:
        with pytest.raises(FormatError):
            walker.runs(words, 0, count * SIZE)
        return
    runs = walker.runs(words, 0, count * SIZE)
    assert sum(run.length for run in runs) == count * SIZE
    for one, two in pairwise(runs):
        if one.kind == two.kind != Kind.COMPRESSED:
            assert one.kind in (Kind.DATA, Kind.ZERO_ALLOCATED) and one.host + one.length != two.host
    # Any range, byte by byte as it were: the same answer as cutting the long one.
    start = data.draw(st.integers(0, count * SIZE - 1))
    length = data.draw(st.integers(1, count * SIZE - start))
    assert list(flat(walker.runs(words, start, length), start)) == list(cut(runs, start, length))
    where = walker.locate(words, start, length)
    part = walker.runs(words, start, length)
    if len(part) == 1 and part[0].kind is Kind.DATA:
        assert where == part[0].host
    elif len(part) == 1 and part[0].kind is Kind.UNALLOCATED:
        assert where == ABSENT or length > SIZE - start % SIZE
    elif len(part) == 1 and part[0].kind in (Kind.ZERO, Kind.ZERO_ALLOCATED):
        assert where == BLANK
    else:
        assert where == UNKNOWN


def flat(runs: list[Mapping], start: int) -> list[tuple[int, int, Kind, int]]:
    found = []
    for run in runs:
        found.append((start, run.length, run.kind, run.host))
        start += run.length
    return found


def cut(runs: list[Mapping], start: int, length: int) -> list[tuple[int, int, Kind, int]]:
    found = []
    for at, size, kind, host in flat(runs, 0):
        first, last = max(at, start), min(at + size, start + length)
        if first < last:
            moves = kind in (Kind.DATA, Kind.ZERO_ALLOCATED)
            found.append((first, last - first, kind, host + first - at if moves else host))
    return found


# -- refcount blocks


@given(st.integers(0, 6), st.binary(max_size=64))
def test_count_used(order: int, content: bytes) -> None:
    block = content + bytes(-len(content) % 8)
    assert count_used(block, order) == sum(1 for count in RefcountBlock(block, order) if count)
