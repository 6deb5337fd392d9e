"""What a reply may bring, and what a hostile server tries."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.errors import NbdError
from nbdbm.extents import Extent
from nbdbm.nbd.constants import Cmd, CmdFlag
from nbdbm.nbd.replies import MAX_GAPS, Covered, InFlight, errno_text, readable

NONE = CmdFlag(0)
WANTED = {0: "base:allocation", 5: "qemu:dirty-bitmap:daily"}


def reading(flags: CmdFlag = NONE) -> InFlight:
    return InFlight(1, Cmd.READ, 1000, 100, flags)


def asking(flags: CmdFlag = NONE) -> InFlight:
    return InFlight(1, Cmd.BLOCK_STATUS, 1000, 1024, flags, WANTED)


def status(number: int, *words: int) -> bytes:
    return struct.pack(f">I{len(words)}I", number, *words)


def status_ext(number: int, count: int, *words: int) -> bytes:
    return struct.pack(f">II{len(words)}Q", number, count, *words)


def error(number: int, text: bytes, rest: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack(">IH", number, len(text) if length is None else length) + text + rest


REQ_ONE, DF = CmdFlag.REQ_ONE, CmdFlag.DF

BAD: dict[str, tuple[Callable[[], InFlight], Callable[[InFlight], object], str]] = {
    "content_before": (reading, lambda r: r.content(999, 2), "outside"),
    "content_after": (reading, lambda r: r.content(1099, 2), "outside"),
    "content_far": (reading, lambda r: r.content(1 << 63, 2), "outside"),
    "content_empty": (reading, lambda r: r.content(1000, 0), "empty"),
    "content_twice": (reading, lambda r: [r.content(1010, 5) for _ in range(2)], "overlaps"),
    "content_overlap": (reading, lambda r: [r.content(at, 5) for at in (1010, 1014)], "overlaps"),
    "content_around": (reading, lambda r: [r.content(1010, 5), r.content(1000, 50)], "overlaps"),
    "hole_over_content": (reading, lambda r: [r.content(1010, 5), r.hole(1012, 1)], "overlaps"),
    "content_for_status": (asking, lambda r: r.content(1000, 1), "data in reply"),
    "fragments_despite_df": (
        lambda: reading(DF),
        lambda r: [r.content(1000, 50), r.content(1050, 50)],
        "fragments",
    ),
    "hole_despite_df": (lambda: reading(DF), lambda r: r.hole(1000, 100), "hole"),
    "incomplete": (reading, lambda r: [r.content(1000, 99), r.finish()], "99 of 100"),
    "nothing": (reading, lambda r: r.finish(), "0 of 100"),
    "status_for_read": (reading, lambda r: r.status(status(0, 512, 1)), "id 0"),
    "status_unknown_id": (asking, lambda r: r.status(status(1, 512, 1)), "id 1"),
    "status_twice": (asking, lambda r: [r.status(status(0, 512, 1)) for _ in range(2)], "twice"),
    "status_no_extents": (asking, lambda r: r.status(status(0)), "4 bytes"),
    "status_ragged": (asking, lambda r: r.status(status(0, 512)), "8 bytes"),
    "status_too_short": (asking, lambda r: r.status(b"\0\0"), "2 bytes"),
    "status_empty_extent": (asking, lambda r: r.status(status(0, 512, 1, 0, 0)), "empty extent"),
    "status_beyond": (asking, lambda r: r.status(status(0, 1024, 1, 512, 0)), "beyond"),
    "status_two_for_req_one": (
        lambda: asking(REQ_ONE),
        lambda r: r.status(status(0, 512, 1, 512, 0)),
        "more than one",
    ),
    "status_long_for_req_one": (
        lambda: asking(REQ_ONE),
        lambda r: r.status(status(0, 1025, 1)),
        "more than one",
    ),
    "status_ext_wrong_count": (asking, lambda r: r.status_ext(status_ext(0, 2, 512, 1)), "2 announced"),
    "status_ext_no_extents": (asking, lambda r: r.status_ext(status_ext(0, 0)), "8 bytes"),
    "status_incomplete": (asking, lambda r: [r.status(status(0, 512, 1)), r.finish()], "daily"),
    "error_too_short": (reading, lambda r: r.error_chunk(0x8001, b"\0" * 5), "5 bytes"),
    "error_without_error": (reading, lambda r: r.error_chunk(0x8001, error(0, b"x")), "without an error"),
    "error_text_too_long": (reading, lambda r: r.error_chunk(0x8001, error(5, b"x", length=2)), "2 bytes"),
    "error_text_above_4096": (
        reading,
        lambda r: r.error_chunk(0x8001, error(5, b"x" * 4097)),
        "4097 bytes",
    ),
    "error_offset_missing": (reading, lambda r: r.error_chunk(0x8002, error(5, b"x", b"1234567")), "offset"),
    "error_offset_outside": (
        reading,
        lambda r: r.error_chunk(0x8002, error(5, b"x", struct.pack(">Q", 1100))),
        "outside",
    ),
}


@pytest.mark.parametrize(("make", "act", "words"), BAD.values(), ids=BAD.keys())
def test_bad(make: Callable[[], InFlight], act: Callable[[InFlight], object], words: str) -> None:
    with pytest.raises(NbdError, match=words) as caught:
        act(make())
    assert "broke the protocol" in str(caught.value)


def test_content_in_any_order() -> None:
    request = reading()
    for at in (1060, 1000, 1040):
        request.content(at, 20)[:] = bytes([at - 1000]) * 20
    request.hole(1020, 20)
    request.hole(1080, 20)
    request.finish()
    assert request.data is not None
    expected = bytes(20) + bytes(20) + b"\x28" * 20 + b"\x3c" * 20 + bytes(20)
    assert request.data == expected
    assert request.holes == [(1020, 20), (1080, 20)]


def test_status_is_clipped_to_the_request() -> None:
    request = asking()
    request.status(status(0, 512, 1, 100_000, 0))
    request.status_ext(status_ext(5, 1, 1 << 50, 1))
    request.finish()
    assert list(request.extents["base:allocation"]) == [Extent(512, 1), Extent(512, 0)]
    assert list(request.extents["qemu:dirty-bitmap:daily"]) == [Extent(1024, 1)]


def test_neighbours_with_equal_flags_are_joined() -> None:
    request = asking()
    request.status(status(0, 256, 1, 256, 1, 256, 0))
    assert list(request.extents["base:allocation"]) == [Extent(512, 1), Extent(256, 0)]


@pytest.mark.parametrize("kind", [0x8001, 0x8003, 0xFFFF], ids=["known", "unknown", "last"])
def test_error_chunk(kind: int) -> None:
    request = reading()
    request.error_chunk(kind, error(5, b"disk \x1b[31mfire", b"future fields"))
    request.finish()
    assert (request.error, request.text) == (5, "disk ?[31mfire")


def test_error_at_an_offset_and_the_first_one_counts() -> None:
    request = reading()
    request.error_chunk(0x8002, error(5, b"", struct.pack(">Q", 1050)))
    request.error_chunk(0x8001, error(22, b"later"))
    assert (request.error, request.text) == (5, "EIO")


def test_texts() -> None:
    assert errno_text(28) == "ENOSPC" and errno_text(12345) == "error 12345"
    assert readable("a\nb\x00c\u202ed é") == "a?b?c?d é"


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=30))
def test_covered_against_a_set(ranges: list[tuple[int, int]]) -> None:
    covered = Covered()
    seen: set[int] = set()
    for start, length in ranges:
        wanted = set(range(start, start + length))
        assert covered.add(start, start + length) == (not seen & wanted)
        if not seen & wanted:
            seen |= wanted
        assert covered.total == len(seen)
    assert len(covered._starts) <= 41


def test_scattered_content_is_refused_before_it_costs() -> None:
    request = InFlight(1, Cmd.READ, 0, 1 << 20, CmdFlag(0))
    with pytest.raises(NbdError, match="scattered"):
        for at in range(0, 1 << 20, 2):
            request.content(at, 1)
    assert len(request.covered._starts) == MAX_GAPS + 1
