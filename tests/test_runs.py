"""Runs, compiled and in Python: both beside a plain model, and with arguments that nobody should give."""

from __future__ import annotations

import importlib.util
import struct
import sys
from array import array
from itertools import groupby
from types import ModuleType

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from nbdbm import runs
from tests.support.marks import requires


class Pure:
    """The functions as they are where nothing was compiled."""

    bit_runs = staticmethod(runs.pure_bit_runs)
    byte_runs = staticmethod(runs.pure_byte_runs)
    pack = staticmethod(runs.pure_pack)


@pytest.fixture(scope="module", params=["pure", pytest.param("compiled", marks=requires("compiled"))])
def way(request: pytest.FixtureRequest) -> type[Pure] | ModuleType:
    if request.param == "pure":
        return Pure
    from nbdbm import _speed

    return _speed  # type: ignore[return-value]


Way = type[Pure]


def pairs_of(told: bytes) -> list[tuple[int, int]]:
    return list(struct.iter_unpack("QQ", told))


def model(
    values: list[int], start: int, stop: int, shift: int, limit: int
) -> tuple[list[tuple[int, int]], int]:
    """What both ways must say."""
    told = [(len(list(same)), value) for value, same in groupby(values[start:stop])][:limit]
    return [(n << shift, value) for n, value in told], start + sum(n for n, _ in told)


@requires("compiled")
def test_the_compiled_way_is_taken() -> None:
    from nbdbm import _speed

    assert runs.COMPILED
    assert (runs.bit_runs, runs.byte_runs, runs.pack) == (_speed.bit_runs, _speed.byte_runs, _speed.pack)
    assert runs.classify is _speed.classify


def test_without_the_compiled_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an installation without a compiler: a module of its own, so that nobody else sees it."""
    monkeypatch.setitem(sys.modules, "nbdbm._speed", None)
    spec = importlib.util.spec_from_file_location("alone", runs.__file__)
    assert spec is not None and spec.loader is not None
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert not alone.COMPILED
    assert alone.bit_runs is alone.pure_bit_runs
    assert alone.bit_runs(b"\x06", 0, 8, 0, 9) == (struct.pack("6Q", 1, 0, 2, 1, 5, 0), 8)


# Long runs, short ones, and none: the patterns repeat a few bytes, or are random.
BYTES = st.one_of(
    st.binary(min_size=1, max_size=80),
    st.lists(
        st.tuples(st.sampled_from([0, 1, 3, 0x80, 0xFF]), st.integers(1, 40)), min_size=1, max_size=12
    ).map(lambda parts: b"".join(bytes((value,)) * count for value, count in parts)),
)
LIMITS = st.sampled_from([1, 2, runs.FEW, runs.FEW + 1, 20, 1 << 40])


@given(data=st.data(), raw=BYTES, shift=st.integers(0, 50), limit=LIMITS)
def test_bits(way: Way, data: st.DataObject, raw: bytes, shift: int, limit: int) -> None:
    start = data.draw(st.integers(0, 8 * len(raw) - 1))
    stop = data.draw(st.integers(start + 1, 8 * len(raw)))
    bits = [byte >> bit & 1 for byte in raw for bit in range(8)]
    wanted = model(bits, start, stop, shift, limit)
    for buffer in (raw, bytearray(raw), bitarray(buffer=raw, endian="little")):
        told, end = way.bit_runs(buffer, start, stop, shift, limit)
        assert (pairs_of(told), end) == wanted


@given(data=st.data(), raw=BYTES, shift=st.integers(0, 50), limit=LIMITS)
def test_bytes(way: Way, data: st.DataObject, raw: bytes, shift: int, limit: int) -> None:
    start = data.draw(st.integers(0, len(raw) - 1))
    stop = data.draw(st.integers(start + 1, len(raw)))
    told, end = way.byte_runs(raw, start, stop, shift, limit)
    assert (pairs_of(told), end) == model(list(raw), start, stop, shift, limit)


@pytest.mark.parametrize("every", [1, 2, 3, 64, 4097])
def test_many(way: Way, every: int) -> None:
    """A whole segment of a bitmap, as large as they are used."""
    count = 1 << 19
    bits = bitarray(count, endian="little")
    bits.setall(0)
    bits[every // 2 :: every] = 1
    told, end = way.bit_runs(bits, 5, count - 3, 16, 1 << 20)
    assert (pairs_of(told), end) == model(bits.tolist(), 5, count - 3, 16, 1 << 20)
    values = bits.unpack()
    told, end = way.byte_runs(values, 5, count - 3, 16, 1 << 20)
    assert (pairs_of(told), end) == model(list(values), 5, count - 3, 16, 1 << 20)


WORD = st.one_of(st.integers(0, 5), st.integers(0, 1 << 33), st.sampled_from([(1 << 32) - 1, (1 << 64) - 1]))


@given(
    pairs=st.lists(st.tuples(WORD, st.integers(0, (1 << 32) - 1)), max_size=20),
    longest=st.sampled_from([0, 3, 1 << 20, (1 << 32) - 1]),
    width=st.sampled_from([4, 8]),
)
def test_pack(way: Way, pairs: list[tuple[int, int]], longest: int, width: int) -> None:
    flat: list[int] = []
    for length, flags in pairs:
        flat += (min(length, longest), flags)
        if length > longest:
            break
    given = array("Q", [word for pair in pairs for word in pair])
    assert way.pack(given, width, longest) == b"".join(word.to_bytes(width, "big") for word in flat)
    assert given.tolist() == [word for pair in pairs for word in pair]


def test_pack_of_any_64_bit_words(way: Way) -> None:
    flat = [1 << 63, (1 << 64) - 1, (1 << 64) - 1, 5]
    assert way.pack(array("Q", flat), 8, (1 << 64) - 1) == struct.pack(">4Q", *flat)


# -- arguments that nobody should give

RANGES = [
    (0, 0, 0, 1),
    (3, 2, 0, 1),
    (-1, 2, 0, 1),
    (0, 33, 0, 1),
    (0, sys.maxsize, 0, 1),
    (-sys.maxsize, sys.maxsize, 0, 1),
    (0, 4, -1, 1),
    (0, 4, 61, 1),
    (0, 4, 63, 1),
    (0, 4, 64, 1),
    (0, 4, 1000, 1),
    (0, 4, 0, 0),
    (0, 4, 0, -5),
]


@pytest.mark.parametrize(("start", "stop", "shift", "limit"), RANGES)
def test_bad_ranges(way: Way, start: int, stop: int, shift: int, limit: int) -> None:
    with pytest.raises(ValueError, match=r"range|lengths|limit"):
        way.bit_runs(bytes(4), start, stop, shift, limit)
    with pytest.raises(ValueError, match=r"range|lengths|limit"):
        way.byte_runs(bytes(32), start, stop, shift, limit)


def test_the_greatest_shift(way: Way) -> None:
    assert way.bit_runs(b"\1", 0, 1, 62, 1) == (struct.pack("QQ", 1 << 62, 1), 1)
    assert way.byte_runs(b"\7", 0, 1, 62, 1) == (struct.pack("QQ", 1 << 62, 7), 1)


@pytest.mark.parametrize(
    ("pairs", "width", "longest"),
    [
        (bytes(8), 4, 1),
        (bytes(17), 4, 1),
        (bytes(16), 2, 1),
        (bytes(16), -4, 1),
        (bytes(16), 4, 1 << 32),
        (struct.pack("QQ", 1, 1 << 32), 4, 1),
    ],
)
def test_what_cannot_be_packed(way: Way, pairs: bytes, width: int, longest: int) -> None:
    with pytest.raises(ValueError, match=r"pairs|lengths|flags"):
        way.pack(pairs, width, longest)


@requires("compiled")
def test_classify() -> None:
    from nbdbm._speed import classify

    letters = bytes(range(32))
    words = [0, 1, 2, 4, 8, 16, 31, 32, 1 << 63 | 5, 0]
    wanted = [0, 1, 2, 4, 8, 16, 31, 0, 5, 0]
    assert list(classify(array("Q", words), False, (1, 2, 4, 8, 16), letters)) == wanted
    swapped = [int.from_bytes(word.to_bytes(8, "big"), "little") for word in words]
    assert list(classify(array("Q", swapped), True, (1, 2, 4, 8, 16), letters)) == wanted
    assert classify(b"", True, (1, 2, 4, 8, 16), letters) == b""
    for bad in (bytes(7), bytes(9)):
        with pytest.raises(ValueError, match="words"):
            classify(bad, False, (1, 2, 4, 8, 16), letters)
    for bad in (b"", bytes(31), bytes(33)):
        with pytest.raises(ValueError, match="letters"):
            classify(bytes(8), False, (1, 2, 4, 8, 16), bad)


ANY = st.one_of(st.integers(-3, 40), st.integers(-(1 << 63), (1 << 63) - 1))


@given(raw=st.binary(max_size=20), start=ANY, stop=ANY, shift=st.integers(-70, 70), limit=ANY)
def test_any_arguments_get_the_same(raw: bytes, start: int, stop: int, shift: int, limit: int) -> None:
    """Both ways, whatever is asked: the same answer, or the same refusal."""
    for name in ("bit_runs", "byte_runs"):
        answers = []
        for function in (getattr(runs, name), getattr(runs, f"pure_{name}")):
            try:
                answers.append(function(raw, start, stop, shift, limit))
            except ValueError as error:
                answers.append(str(error))
        assert answers[0] == answers[1]
