"""The picture: blocks, classes, rows and legend, with and without anything but ASCII."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.cli.picture import Picture, Span, human, palette

DATA, HOLE, ZERO, HOLE_ZERO = 0, 1, 2, 3
BITMAP = "qemu:dirty-bitmap:b"


def drawn(picture: Picture, width: int = 100, *, plain: bool = True) -> str:
    return "".join(span.text for span in picture.row(0, width, plain=plain))


def text(spans: list[Span]) -> str:
    return "".join(span.text for span in spans)


def test_each_class_has_its_character() -> None:
    picture = Picture(4 * 512, 4, palette("base:allocation"))
    for index, flags in enumerate((DATA, ZERO, HOLE_ZERO, HOLE)):
        picture.add(index * 512, 512, flags)
    assert picture.block == 512
    # A hole that does not read as zero is no zero: a backup must read it.
    assert drawn(picture) == "#o.#"
    assert drawn(picture, plain=False) == "█o·█"
    assert picture.totals == [1024, 512, 512]


def test_a_little_data_in_a_block_shows() -> None:
    picture = Picture(1 << 46, 100, palette("base:allocation"))
    picture.add(0, 1 << 46, HOLE_ZERO)
    assert set(drawn(picture)) == {"."}
    picture = Picture(1 << 46, 64, palette("base:allocation"))
    picture.add(0, 1 << 45, HOLE_ZERO)
    picture.add(1 << 45, 512, DATA)
    picture.add((1 << 45) + 512, (1 << 45) - 512, HOLE_ZERO)
    assert picture.block == 1 << 40
    assert drawn(picture) == "." * 32 + "+" + "." * 31
    assert drawn(picture, plain=False)[32] == "▒"


def test_dirty_and_depth() -> None:
    picture = Picture(1536, 3, palette(BITMAP))
    picture.add(0, 512, 0)
    picture.add(512, 1024, 1)
    assert drawn(picture) == ".##"
    picture = Picture(2048, 4, palette("qemu:allocation-depth"))
    for index, depth in enumerate((0, 1, 2, 7)):
        picture.add(index * 512, 512, depth)
    assert drawn(picture) == ".#=="
    picture = Picture(1024, 2, palette("x:unknown"))
    picture.add(0, 512, 5)
    picture.add(512, 512, 0)
    assert drawn(picture) == "#."


def test_rows_are_led_by_offsets_and_joined_by_style() -> None:
    picture = Picture(10 * 1024 * 1024, 40, palette("base:allocation"))
    picture.add(0, 5 * 1024 * 1024, DATA)
    picture.add(5 * 1024 * 1024, 5 * 1024 * 1024, HOLE_ZERO)
    assert picture.block == 256 * 1024
    rows = list(picture.rows(20, plain=True))
    assert [text(row) for row in rows] == ["  0 B " + "#" * 20, "5 MiB " + "." * 20]
    assert rows[0] == [Span("  0 B "), Span("#" * 20, "blue")]


def test_legend() -> None:
    picture = Picture(1000, 10, palette(BITMAP))
    picture.add(0, 1000, 1)
    assert text(picture.legend(plain=True)) == (
        "# dirty 0.977 KiB   + partly dirty   . clean 0 B   one character is 512 B"
    )


def test_an_empty_disk() -> None:
    picture = Picture(0, 10, palette("base:allocation"))
    assert list(picture.rows(10, plain=True)) == []


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 3)), min_size=1, max_size=30),
    st.integers(1, 50),
)
def test_the_picture_covers_the_disk(extents: list[tuple[int, int]], cells: int) -> None:
    size = sum(length for length, _ in extents)
    picture = Picture(size, cells, palette("base:allocation"))
    # What each block must show, counted byte by byte.
    flat: list[int] = []
    offset = 0
    for length, flags in extents:
        picture.add(offset, length, flags)
        flat += [0 if not flags & ZERO else 2 if flags & HOLE else 1] * length
        offset += length
    shown = drawn(picture)
    assert len(shown) == picture.cells <= cells
    for cell, char in enumerate(shown):
        classes = flat[cell * picture.block : (cell + 1) * picture.block]
        if 0 in classes:
            assert char == ("#" if set(classes) == {0} else "+")
        else:
            assert classes.count("#o.".index(char)) * 2 >= len(classes)
    assert sum(picture.totals) == size


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (65536, "64 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (1 << 46, "64 TiB"),
        ((1 << 63) - 1, "8 EiB"),
    ],
)
def test_human(count: int, shown: str) -> None:
    assert human(count) == shown
