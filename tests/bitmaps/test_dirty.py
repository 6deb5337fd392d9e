import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.bitmaps.dirty import SEGMENT_BITS, DirtyBitmap
from nbdbm.extents import Extent, ExtentList

GRANULARITY = 512
SEGMENT = 1 << 17


class Model:
    """The same, one bool per granule."""

    def __init__(self, size: int, granularity: int) -> None:
        self.size, self.granularity = size, granularity
        self.bits = [False] * -(-size // granularity)

    def granules(self) -> list[tuple[int, int]]:
        g = self.granularity
        return [(i * g, min((i + 1) * g, self.size)) for i in range(len(self.bits))]

    def set(self, offset: int, length: int) -> None:
        for i, (start, end) in enumerate(self.granules()):
            if start < offset + length and offset < end and length:
                self.bits[i] = True

    def reset(self, offset: int, length: int) -> None:
        for i, (start, end) in enumerate(self.granules()):
            if offset <= start and end <= offset + length:
                self.bits[i] = False

    def runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        found: list[tuple[int, bool]] = []
        for position in range(offset, offset + length):
            dirty = self.bits[position // self.granularity]
            if found and found[-1][1] == dirty:
                found[-1] = (found[-1][0] + 1, dirty)
            else:
                found.append((1, dirty))
        return found

    def raw(self) -> bytes:
        number = sum(1 << i for i, bit in enumerate(self.bits) if bit)
        return number.to_bytes(-(-len(self.bits) // 8), "little")


def extents_of(bitmap: DirtyBitmap, offset: int, length: int, limit: int = 1 << 30) -> ExtentList:
    extents = ExtentList(offset, length, limit)
    bitmap.extents(extents)
    return extents


def check(bitmap: DirtyBitmap, model: Model) -> None:
    assert list(bitmap.runs(0, bitmap.size)) == model.runs(0, model.size)
    assert list(extents_of(bitmap, 0, bitmap.size)) == model.runs(0, model.size)
    assert bitmap.count() == sum(model.bits)
    assert bitmap.any() is any(model.bits)
    assert bitmap.dirty_bytes() == sum(n for n, dirty in model.runs(0, model.size) if dirty)


@given(
    st.integers(1, 40 * GRANULARITY),
    st.integers(0, 40 * GRANULARITY),
    st.lists(st.tuples(st.integers(0, 40 * GRANULARITY), st.integers(0, 20 * GRANULARITY)), max_size=4),
)
def test_grown(size: int, more: int, ranges: list[tuple[int, int]]) -> None:
    bitmap, model = DirtyBitmap(size, GRANULARITY, segment_bits=8), Model(size, GRANULARITY)
    for offset, length in ranges:
        offset, length = min(offset, size), min(length, size - min(offset, size))
        bitmap.set(offset, length)
        model.set(offset, length)
    before = bitmap.copy()
    larger = Model(size + more, GRANULARITY)
    larger.bits[: len(model.bits)] = model.bits
    grown = bitmap.grown(size + more)
    check(grown, larger)
    grown.set(0, size + more)
    check(bitmap, model)
    assert list(before.runs(0, size)) == list(bitmap.runs(0, size))


# -- by hand ----------------------------------------------------------------------------------


def test_clean() -> None:
    bitmap = DirtyBitmap(1 << 46, 65536)
    assert bitmap.bit_count == 1 << 30
    assert list(bitmap.runs(0, 1 << 46)) == [(1 << 46, False)]
    assert not bitmap.any()
    assert bitmap.count() == bitmap.dirty_bytes() == bitmap.memory() == 0
    assert repr(bitmap) == "<DirtyBitmap 0 of 1073741824 granules of 65536 bytes>"


def test_empty_disk() -> None:
    bitmap = DirtyBitmap(0, 512)
    assert list(bitmap.runs(0, 0)) == []
    assert bitmap.dirty_bytes() == bitmap.byte_count == 0
    bitmap.set(0, 0)
    bitmap.reset(0, 0)
    bitmap.extents(ExtentList(0, 0, 1))
    assert bitmap.dump(0, 512) is False


def test_set_widens_and_reset_shrinks() -> None:
    bitmap = DirtyBitmap(10 * 512, 512)
    bitmap.set(1023, 2)
    assert list(bitmap.runs(0, 5120)) == [(512, False), (1024, True), (3584, False)]
    bitmap.reset(1, 1535)
    assert list(bitmap.runs(0, 5120)) == [(5120, False)]
    bitmap.set(0, 5120)
    bitmap.reset(1, 1023)
    assert list(bitmap.runs(0, 5120)) == [(512, True), (512, False), (4096, True)]
    bitmap.reset(1025, 510)
    assert bitmap.count() == 9


def test_last_granule_is_cut_off_by_the_disk() -> None:
    bitmap = DirtyBitmap(1000, 512)
    bitmap.set(999, 1)
    assert list(bitmap.runs(0, 1000)) == [(512, False), (488, True)]
    assert bitmap.dirty_bytes() == 488
    bitmap.reset(512, 487)
    assert bitmap.count() == 1
    bitmap.reset(512, 488)
    assert bitmap.count() == 0


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, 5121), (5120, 1)])
def test_outside_the_disk(offset: int, length: int) -> None:
    bitmap = DirtyBitmap(5120, 512)
    with pytest.raises(AssertionError):
        bitmap.set(offset, length)
    with pytest.raises(AssertionError):
        bitmap.reset(offset, length)
    with pytest.raises(AssertionError):
        list(bitmap.runs(offset, length))
    with pytest.raises(AssertionError):
        bitmap.get(5120)


def test_whole_segments_cost_nothing() -> None:
    bitmap = DirtyBitmap(1 << 46, 65536)
    bitmap.set(0, 1 << 46)
    assert bitmap.memory() < 1 << 20
    assert bitmap.count() == 1 << 30
    assert bitmap.get(12345)
    bitmap.reset(65536, 65536)
    assert not bitmap.get(65536)
    assert list(bitmap.runs(0, 1 << 46)) == [(65536, True), (65536, False), ((1 << 46) - 131072, True)]
    bitmap.clear()
    assert bitmap.memory() == 0


def test_copy_is_independent() -> None:
    bitmap = DirtyBitmap(1 << 20, 512, segment_bits=256)
    bitmap.set(0, 1 << 19)
    bitmap.set(1 << 19, 1)
    twin = bitmap.copy()
    bitmap.set(900000, 1)
    bitmap.reset(0, 1 << 18)
    assert twin.count() == 1025
    assert twin.get(0) and not twin.get(900000)


# -- against the model ---------------------------------------------------------------------------

RANGES = st.tuples(st.integers(0, 40 * GRANULARITY), st.integers(0, 40 * GRANULARITY))


@given(
    size=st.integers(1, 40 * GRANULARITY),
    granularity=st.sampled_from([GRANULARITY, 2 * GRANULARITY]),
    segment_bits=st.sampled_from([8, 16, 64]),
    steps=st.lists(st.tuples(st.booleans(), RANGES), max_size=8),
    ask=RANGES,
    limit=st.integers(1, 12),
)
def test_changes_and_questions(
    size: int,
    granularity: int,
    segment_bits: int,
    steps: list[tuple[bool, tuple[int, int]]],
    ask: tuple[int, int],
    limit: int,
) -> None:
    bitmap = DirtyBitmap(size, granularity, segment_bits=segment_bits)
    model = Model(size, granularity)
    for setting, (offset, length) in steps:
        offset = min(offset, size)
        length = min(length, size - offset)
        if setting:
            bitmap.set(offset, length)
            model.set(offset, length)
        else:
            bitmap.reset(offset, length)
            model.reset(offset, length)
    check(bitmap, model)

    offset = min(ask[0], size)
    length = min(ask[1], size - offset)
    wanted = model.runs(offset, length)
    assert list(bitmap.runs(offset, length)) == wanted
    capped = extents_of(bitmap, offset, length, limit)
    assert list(capped) == wanted[:limit]
    if offset < size:
        assert bitmap.get(offset) is model.bits[offset // granularity]


@given(
    bits=st.lists(st.booleans(), min_size=1, max_size=200),
    segment_bits=st.sampled_from([8, 32, 128]),
    cluster=st.sampled_from([1, 2, 4, 16]),
    cut=st.integers(0, GRANULARITY - 1),
    junk=st.binary(max_size=3),
)
def test_load_and_dump(bits: list[bool], segment_bits: int, cluster: int, cut: int, junk: bytes) -> None:
    model = Model(len(bits) * GRANULARITY - cut, GRANULARITY)
    model.bits = bits
    raw = model.raw()
    bitmap = DirtyBitmap(model.size, GRANULARITY, segment_bits=segment_bits)
    assert bitmap.byte_count == len(raw)
    stored: dict[int, bytes | bool] = {}
    starts = range(0, len(raw), cluster)
    for at in starts:
        data = raw[at : at + cluster]
        bitmap.load(at, data + junk if at + cluster >= len(raw) else data)
    check(bitmap, model)
    for at in starts:
        stored[at] = bitmap.dump(at, cluster)
    named = list(bitmap.pieces(cluster))
    assert named == sorted(set(named))
    assert {n * cluster for n in named} >= {at for at in starts if stored[at] is not False}
    assert {n * cluster for n in named} <= set(starts)
    # What was dumped, loaded again in any order, is the same.
    again = DirtyBitmap(model.size, GRANULARITY, segment_bits=64)
    for at, data_or_flag in reversed(stored.items()):
        in_disk = bits[8 * at : 8 * (at + cluster)]
        if data_or_flag is True:
            assert all(in_disk)
            again.load_ones(at, cluster)
        elif data_or_flag is False:
            assert not any(in_disk)
        else:
            assert data_or_flag == raw[at : at + cluster]
            again.load(at, data_or_flag)
    check(again, model)


def test_absorbing_is_merging() -> None:
    ours, theirs = DirtyBitmap(1 << 20, 512, segment_bits=64), DirtyBitmap(1 << 20, 512, segment_bits=64)
    for bitmap, ranges in (
        (ours, [(0, 1), (40960, 70000)]),
        (theirs, [(512, 1), (100000, 4), (1 << 19, 99999)]),
    ):
        for offset, length in ranges:
            bitmap.set(offset, length)
    wanted = ours.copy()
    wanted.merge(theirs)
    ours.absorb(theirs)
    assert list(ours.runs(0, 1 << 20)) == list(wanted.runs(0, 1 << 20))


def test_clean_pieces_are_passed_over() -> None:
    bitmap = DirtyBitmap(1 << 46, 65536)
    assert list(bitmap.pieces(4096)) == []
    for bit in (0, SEGMENT_BITS * 5 + 3, (1 << 30) - 1):
        bitmap.set(bit * 65536, 1)
    assert list(bitmap.pieces(SEGMENT_BITS // 8)) == [0, 5, 2047]
    assert list(bitmap.pieces(SEGMENT_BITS // 4)) == [0, 2, 1023]
    assert list(bitmap.pieces(SEGMENT_BITS // 16)) == [0, 1, 10, 11, 4094, 4095]


def test_bits_past_the_end_are_ignored() -> None:
    bitmap = DirtyBitmap(10 * 512, 512)
    bitmap.load(0, b"\xff\xff" + b"\xff" * 100)
    assert bitmap.count() == 10
    assert bitmap.dump(0, 4096) is True
    bitmap.reset(0, 512)
    assert bitmap.dump(0, 4096) == b"\xfe\x03"
    ones = DirtyBitmap(10 * 512, 512)
    ones.load_ones(1, 4096)
    assert ones.dump(0, 1) is False
    assert ones.dump(1, 1) is True
    assert ones.count() == 2


def test_loading_replaces() -> None:
    """Loading zeroes over what is there makes it clean, in part of a segment and as a whole."""
    bitmap = DirtyBitmap(64 * 512, 512, segment_bits=32)
    bitmap.load_ones(0, 8)
    bitmap.load(1, b"\0")
    assert bitmap.dump(0, 4) == b"\xff\0\xff\xff"
    bitmap.load(4, bytes(4))
    assert bitmap.dump(4, 4) is False
    assert bitmap.count() == 24


@given(
    size=st.integers(1, 5000),
    ours=st.lists(st.tuples(st.integers(0, 4999), st.integers(1, 900)), max_size=5),
    theirs=st.lists(st.tuples(st.integers(0, 4999), st.integers(1, 900)), max_size=5),
    granularities=st.tuples(st.sampled_from([16, 64, 256]), st.sampled_from([16, 64, 256])),
    segments=st.tuples(st.sampled_from([8, 16]), st.sampled_from([8, 16])),
)
def test_merge_loses_nothing(
    size: int,
    ours: list[tuple[int, int]],
    theirs: list[tuple[int, int]],
    granularities: tuple[int, int],
    segments: tuple[int, int],
) -> None:
    target = DirtyBitmap(size, granularities[0], segment_bits=segments[0])
    source = DirtyBitmap(size, granularities[1], segment_bits=segments[1])
    model = Model(size, granularities[0])
    for ranges, bitmap in ((ours, target), (theirs, source)):
        for offset, length in ranges:
            if offset < size:
                bitmap.set(offset, min(length, size - offset))
    before = list(source.runs(0, size))
    for bitmap in (target, source):
        position = 0
        for length, dirty in bitmap.runs(0, size):
            if dirty:
                model.set(position, length)
            position += length
    target.merge(source)
    check(target, model)
    assert list(source.runs(0, size)) == before
    # No bits are shared: changing the target leaves the source alone.
    target.reset(0, size)
    assert list(source.runs(0, size)) == before


# -- the fast way and the slow one ------------------------------------------------------------------


def pattern(kind: str, count: int) -> bytes:
    rng = random.Random(1)
    if kind == "random":
        return rng.randbytes(count // 8)
    if kind == "alternating":
        return b"\x55" * (count // 8)
    bits = bytearray(count // 8)
    for _ in range(count // 768 if kind == "sparse" else 3):
        bits[rng.randrange(len(bits))] = 1 << rng.randrange(8)
    return bytes(bits)


@pytest.mark.parametrize("kind", ["random", "alternating", "sparse", "few"])
@pytest.mark.parametrize("limit", [1, 2, 3, 100, 5000, 1 << 20])
def test_extents_as_runs(kind: str, limit: int) -> None:
    """Over segments: every limit, aligned and not."""
    count = 5 * SEGMENT // 4
    bitmap = DirtyBitmap(count * 512 - 100, 512, segment_bits=SEGMENT)
    bitmap.load(0, pattern(kind, count))
    end = bitmap.size
    for offset, length in (
        (0, end),
        (512 * 1000 + 7, end - 512 * 1000 - 7),
        (3, 256 * SEGMENT),
        (end - 5, 5),
    ):
        fast = extents_of(bitmap, offset, length, limit)
        slow = ExtentList(offset, length, limit)
        for run, dirty in bitmap.runs(offset, length):
            if not slow.add(run, dirty):
                break
        assert fast.flat == slow.flat
        assert fast.position == slow.position
        assert all(a.flags != b.flags for a, b in pairwise(fast))


def test_extents_go_on_where_the_list_is() -> None:
    bitmap = DirtyBitmap(100 * 512, 512)
    bitmap.set(50 * 512, 512)
    extents = ExtentList(0, 100 * 512, 10)
    extents.add(10 * 512, 0)
    bitmap.extents(extents)
    assert list(extents) == [Extent(50 * 512, 0), Extent(512, 1), Extent(49 * 512, 0)]
    bitmap.extents(extents)
    assert len(extents) == 3
