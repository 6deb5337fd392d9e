"""Requests judged, replies built: a catalogue, and replies in hand-written bytes."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.extents import ExtentList
from nbdbm.nbd.catalog import ExportInfo
from nbdbm.nbd.constants import Cmd, CmdFlag, NbdErrno, TransmissionFlag
from nbdbm.nbd.handshake import HeaderStyle, Negotiated
from nbdbm.nbd.messages import Request
from nbdbm.nbd.metacontext import MetaContext
from nbdbm.nbd.transmission import (
    MAX_EXTENT_32,
    REPLIES,
    ZEROES,
    Chunks,
    Judge,
    Origins,
    Output,
    append_zeroes,
)
from tests.support.pair import COARSE, DISK, SCRATCH

SIMPLE, STRUCTURED, EXTENDED = HeaderStyle
MIB = 1 << 20


def negotiated(info: ExportInfo, style: HeaderStyle = STRUCTURED, *, contexts: bool = True) -> Negotiated:
    if style >= STRUCTURED:
        info = replace(info, flags=info.flags | TransmissionFlag.SEND_DF)
    chosen = (MetaContext(0, "base:allocation"),) if contexts and style >= STRUCTURED else ()
    return Negotiated(info, style, chosen, 32 * MIB)


def verdict(
    info: ExportInfo, style: HeaderStyle, command: int, offset: int, length: int, flags: int = 0
) -> NbdErrno | None:
    refusal = Judge(negotiated(info, style)).check(Request.compact(command, 1, offset, length, flags))
    return refusal.error if refusal is not None else None


PLAIN = replace(SCRATCH, flags=TransmissionFlag.HAS_FLAGS)
BIG = replace(SCRATCH, size=1 << 40)
BIG_DISK = replace(DISK, size=1 << 40)
PERM, INVAL, NOSPC, OVERFLOW = NbdErrno.EPERM, NbdErrno.EINVAL, NbdErrno.ENOSPC, NbdErrno.EOVERFLOW

CASES: dict[str, tuple[ExportInfo, HeaderStyle, int, int, int, int, NbdErrno | None]] = {
    "read": (DISK, SIMPLE, Cmd.READ, 0, 4096, 0, None),
    "read_to_the_end": (DISK, SIMPLE, Cmd.READ, MIB - 1, 1, 0, None),
    "read_nothing_at_the_end": (DISK, SIMPLE, Cmd.READ, MIB, 0, 0, None),
    "read_past_the_end": (DISK, SIMPLE, Cmd.READ, MIB - 1, 2, 0, INVAL),
    "read_far_past_the_end": (DISK, SIMPLE, Cmd.READ, (1 << 64) - 1, 0xFFFFFFFF, 0, INVAL),
    "read_fua": (DISK, SIMPLE, Cmd.READ, 0, 1, CmdFlag.FUA, None),
    "read_fua_unadvertised": (PLAIN, SIMPLE, Cmd.READ, 0, 1, CmdFlag.FUA, INVAL),
    "read_df": (DISK, STRUCTURED, Cmd.READ, 0, 1, CmdFlag.DF, None),
    "read_df_simple": (DISK, SIMPLE, Cmd.READ, 0, 1, CmdFlag.DF, INVAL),
    "read_req_one": (DISK, STRUCTURED, Cmd.READ, 0, 1, CmdFlag.REQ_ONE, INVAL),
    "read_no_hole": (DISK, STRUCTURED, Cmd.READ, 0, 1, CmdFlag.NO_HOLE, INVAL),
    "read_payload_len": (DISK, EXTENDED, Cmd.READ, 0, 0, CmdFlag.PAYLOAD_LEN, INVAL),
    "read_unknown_flag": (DISK, STRUCTURED, Cmd.READ, 0, 1, 1 << 15, INVAL),
    "read_oversize_simple": (BIG_DISK, SIMPLE, Cmd.READ, 0, 32 * MIB + 1, 0, INVAL),
    "read_oversize_structured": (BIG_DISK, STRUCTURED, Cmd.READ, 0, 32 * MIB + 1, 0, OVERFLOW),
    "read_largest": (BIG_DISK, STRUCTURED, Cmd.READ, 0, 32 * MIB, 0, None),
    "read_unaligned": (COARSE, STRUCTURED, Cmd.READ, 1, 512, 0, INVAL),
    "read_unaligned_length": (COARSE, STRUCTURED, Cmd.READ, 512, 511, 0, INVAL),
    "read_aligned": (COARSE, STRUCTURED, Cmd.READ, 512, 512, 0, None),
    "write": (SCRATCH, SIMPLE, Cmd.WRITE, 0, 4096, 0, None),
    "write_fua": (SCRATCH, SIMPLE, Cmd.WRITE, 0, 4096, CmdFlag.FUA, None),
    "write_read_only": (DISK, SIMPLE, Cmd.WRITE, 0, 4096, 0, PERM),
    "write_read_only_past_the_end": (DISK, SIMPLE, Cmd.WRITE, MIB, 4096, 0, PERM),
    "write_past_the_end": (SCRATCH, SIMPLE, Cmd.WRITE, MIB - 1, 2, 0, NOSPC),
    "write_payload_len": (SCRATCH, EXTENDED, Cmd.WRITE, 0, 1, CmdFlag.PAYLOAD_LEN, None),
    "write_payload_len_compact": (SCRATCH, STRUCTURED, Cmd.WRITE, 0, 1, CmdFlag.PAYLOAD_LEN, INVAL),
    "write_fast_zero": (SCRATCH, SIMPLE, Cmd.WRITE, 0, 1, CmdFlag.FAST_ZERO, INVAL),
    "write_unaligned": (COARSE, SIMPLE, Cmd.WRITE, 0, 100, 0, INVAL),
    "flush": (DISK, SIMPLE, Cmd.FLUSH, 0, 0, 0, None),
    "flush_fua": (DISK, SIMPLE, Cmd.FLUSH, 0, 0, CmdFlag.FUA, None),
    "flush_unadvertised": (PLAIN, SIMPLE, Cmd.FLUSH, 0, 0, 0, INVAL),
    "flush_with_a_range_elsewhere": (DISK, SIMPLE, Cmd.FLUSH, 2 * MIB, 1, 0, INVAL),
    "trim": (BIG, SIMPLE, Cmd.TRIM, 0, 0xFFFFFFFF, CmdFlag.FUA, None),
    "trim_read_only": (DISK, SIMPLE, Cmd.TRIM, 0, 1, 0, PERM),
    "trim_past_the_end": (SCRATCH, SIMPLE, Cmd.TRIM, MIB, 1, 0, INVAL),
    "trim_unadvertised": (PLAIN, SIMPLE, Cmd.TRIM, 0, 1, 0, INVAL),
    "cache": (DISK, SIMPLE, Cmd.CACHE, 0, MIB, 0, None),
    "cache_df": (DISK, STRUCTURED, Cmd.CACHE, 0, MIB, CmdFlag.DF, INVAL),
    "cache_past_the_end": (DISK, SIMPLE, Cmd.CACHE, 1, MIB, 0, INVAL),
    "cache_oversize": (BIG_DISK, STRUCTURED, Cmd.CACHE, 0, 32 * MIB + 1, 0, OVERFLOW),
    "cache_unadvertised": (PLAIN, SIMPLE, Cmd.CACHE, 0, 1, 0, INVAL),
    "zeroes": (BIG, SIMPLE, Cmd.WRITE_ZEROES, 0, 0xFFFFFFFF, 0, None),
    "zeroes_all_flags": (
        SCRATCH,
        SIMPLE,
        Cmd.WRITE_ZEROES,
        0,
        1,
        CmdFlag.FUA | CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO,
        None,
    ),
    "zeroes_fast_unadvertised": (
        replace(SCRATCH, flags=SCRATCH.flags & ~TransmissionFlag.SEND_FAST_ZERO),
        SIMPLE,
        Cmd.WRITE_ZEROES,
        0,
        1,
        CmdFlag.FAST_ZERO,
        INVAL,
    ),
    "zeroes_read_only": (DISK, SIMPLE, Cmd.WRITE_ZEROES, 0, 1, 0, PERM),
    "zeroes_past_the_end": (SCRATCH, SIMPLE, Cmd.WRITE_ZEROES, MIB, 1, 0, NOSPC),
    "zeroes_unadvertised": (PLAIN, SIMPLE, Cmd.WRITE_ZEROES, 0, 1, 0, INVAL),
    "status": (DISK, STRUCTURED, Cmd.BLOCK_STATUS, 0, MIB, 0, None),
    "status_req_one": (DISK, STRUCTURED, Cmd.BLOCK_STATUS, 0, MIB, CmdFlag.REQ_ONE, None),
    "status_without_contexts": (DISK, SIMPLE, Cmd.BLOCK_STATUS, 0, MIB, 0, INVAL),
    "status_of_nothing": (DISK, STRUCTURED, Cmd.BLOCK_STATUS, 0, 0, 0, INVAL),
    "status_past_the_end": (DISK, STRUCTURED, Cmd.BLOCK_STATUS, 0, MIB + 1, 0, INVAL),
    "status_longer_than_a_payload": (BIG_DISK, STRUCTURED, Cmd.BLOCK_STATUS, 0, 0xFFFFFFFF, 0, None),
    "status_df": (DISK, STRUCTURED, Cmd.BLOCK_STATUS, 0, 1, CmdFlag.DF, INVAL),
    "resize": (SCRATCH, STRUCTURED, Cmd.RESIZE, 0, 1, 0, INVAL),
    "unknown_command": (SCRATCH, STRUCTURED, 99, 0, 1, 0, INVAL),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_check(case: tuple[ExportInfo, HeaderStyle, int, int, int, int, NbdErrno | None]) -> None:
    *request, expected = case
    assert verdict(*request) == expected  # type: ignore[arg-type]


def test_a_refusal_names_the_command_and_the_value() -> None:
    judge = Judge(negotiated(DISK))
    refusal = judge.check(Request.compact(Cmd.READ, 1, MIB, 512))
    assert refusal is not None
    assert refusal.text == "READ: 1048576+512 is past the end of the export, 1048576 bytes"


# replies


def built(style: HeaderStyle, method: str, *args: object) -> bytes:
    out: Output = []
    getattr(REPLIES[style], method)(out, 7, 4096, *args)
    return b"".join(out)


def simple(error: int) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, 7)


def chunk(style: HeaderStyle, flags: int, kind: int, payload: bytes) -> bytes:
    if style is STRUCTURED:
        head = struct.pack(">IHHQI", 0x668E33EF, flags, kind, 7, len(payload))
    else:
        head = struct.pack(">IHHQQQ", 0x6E8A278C, flags, kind, 7, 4096, len(payload))
    return head + payload


CHUNKED = pytest.mark.parametrize("style", [STRUCTURED, EXTENDED], ids=["structured", "extended"])


def test_done() -> None:
    assert built(SIMPLE, "done") == simple(0)
    assert built(STRUCTURED, "done") == simple(0)
    assert built(EXTENDED, "done") == chunk(EXTENDED, 1, 0, b"")


def test_simple_error_is_a_number() -> None:
    assert built(SIMPLE, "error", NbdErrno.EIO, "words") == simple(5)


@CHUNKED
def test_error_has_words(style: HeaderStyle) -> None:
    expected = chunk(style, 1, 0x8001, b"\0\0\0\x16\0\x05words")
    assert built(style, "error", NbdErrno.EINVAL, "words") == expected
    assert built(style, "error", NbdErrno.EINVAL, "") == chunk(style, 1, 0x8001, b"\0\0\0\x16\0\0")


DATA = bytes(range(1, 101))
AT = struct.pack(">Q", 4096)
READS: dict[str, tuple[Chunks, list[tuple[int, int, bytes]]]] = {
    "data": ([(100, DATA)], [(1, 1, AT + DATA)]),
    "hole": ([(100, None)], [(1, 2, AT + struct.pack(">I", 100))]),
    "nothing": ([], [(1, 0, b"")]),
    "empty_parts": ([(0, None), (0, b"")], [(1, 0, b"")]),
    "neighbours_of_one_kind": ([(40, DATA[:40]), (60, DATA[40:])], [(1, 1, AT + DATA)]),
    "neighbouring_holes": ([(40, None), (60, None)], [(1, 2, AT + struct.pack(">I", 100))]),
    "mixed": (
        [(40, DATA[:40]), (512, None), (10, DATA[40:50]), (50, DATA[50:])],
        [
            (0, 1, AT + DATA[:40]),
            (0, 2, struct.pack(">QI", 4136, 512)),
            (1, 1, struct.pack(">Q", 4648) + DATA[40:]),
        ],
    ),
}


@CHUNKED
@pytest.mark.parametrize(("chunks", "expected"), READS.values(), ids=READS.keys())
def test_read(style: HeaderStyle, chunks: Chunks, expected: list[tuple[int, int, bytes]]) -> None:
    assert built(style, "read", chunks) == b"".join(chunk(style, *part) for part in expected)


@pytest.mark.parametrize(("chunks", "_"), READS.values(), ids=READS.keys())
def test_simple_read_fills_holes(chunks: Chunks, _: object) -> None:
    data = b"".join(bytes(length) if part is None else bytes(part) for length, part in chunks)
    assert built(SIMPLE, "read", chunks) == simple(0) + data


def test_payloads_are_passed_through() -> None:
    view = memoryview(DATA)
    for style in HeaderStyle:
        out: Output = []
        REPLIES[style].read(out, 7, 0, [(100, view)])
        assert len(out) == 2 and out[1] is view


@pytest.mark.parametrize("length", [0, 1, len(ZEROES), 3 * len(ZEROES) + 1])
def test_append_zeroes(length: int) -> None:
    out: Output = []
    append_zeroes(out, length)
    assert b"".join(out) == bytes(length)


def extents(*pairs: tuple[int, int], length: int | None = None) -> ExtentList:
    made = ExtentList(4096, sum(n for n, _ in pairs) if length is None else length, 1 << 20)
    for n, flags in pairs:
        made.add(n, flags)
    return made


def test_structured_status() -> None:
    sent = built(STRUCTURED, "status", [(0, extents((512, 3), (1024, 0))), (9, extents((1536, 1)))])
    assert sent == chunk(STRUCTURED, 0, 5, struct.pack(">IIIII", 0, 512, 3, 1024, 0)) + chunk(
        STRUCTURED, 1, 5, struct.pack(">III", 9, 1536, 1)
    )


def test_extended_status() -> None:
    sent = built(EXTENDED, "status", [(9, extents((1 << 40, 1), (512, 0)))])
    assert sent == chunk(EXTENDED, 1, 6, struct.pack(">IIQQQQ", 9, 2, 1 << 40, 1, 512, 0))


@pytest.mark.parametrize("style", [STRUCTURED, EXTENDED])
def test_a_status_packed_before_its_cookie_is_known(style: HeaderStyle) -> None:
    contexts = [(0, extents((512, 3), (1024, 0))), (9, extents((1536, 1)))]
    packed, places = REPLIES[style].pack_status(4096, contexts)
    for at in places:
        packed[at : at + 8] = struct.pack(">Q", 7)
    assert packed == built(style, "status", contexts)


def test_simple_status_does_not_exist() -> None:
    with pytest.raises(AssertionError):
        built(SIMPLE, "status", [])
    with pytest.raises(AssertionError):
        REPLIES[SIMPLE].pack_status(0, [])


FITS: dict[str, tuple[list[tuple[int, int]], list[int]]] = {
    "short": ([(512, 1), (512, 0)], [512, 1, 512, 0]),
    "exactly": ([(MAX_EXTENT_32, 1), (512, 0)], [MAX_EXTENT_32, 1, 512, 0]),
    "one_long": ([(1 << 40, 1)], [MAX_EXTENT_32, 1]),
    "long_ends_it": ([(512, 0), (1 << 32, 1), (512, 0)], [512, 0, MAX_EXTENT_32, 1]),
    "all_fit_in_a_long_range": (
        [(1 << 31, 0), (1 << 31, 1), (1 << 31, 0)],
        [1 << 31, 0, 1 << 31, 1, 1 << 31, 0],
    ),
}


@pytest.mark.parametrize(("pairs", "flat"), FITS.values(), ids=FITS.keys())
def test_lengths_fit_32_bits(pairs: list[tuple[int, int]], flat: list[int]) -> None:
    sent = built(STRUCTURED, "status", [(7, extents(*pairs))])
    assert sent == chunk(STRUCTURED, 1, 5, struct.pack(f">I{len(flat)}I", 7, *flat))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=30), st.randoms())
def test_origins_hold_the_offsets_of_each_cookie(requests: list[tuple[int, int]], random: object) -> None:
    origins = Origins()
    held: dict[int, list[int]] = {}
    for cookie, offset in requests:
        origins.note(cookie, offset)
        held.setdefault(cookie, []).append(offset)
    random.shuffle(requests)  # type: ignore[attr-defined]
    for cookie, offset in requests:
        assert origins.take(cookie, offset) == offset
        held[cookie].remove(offset)
    assert not any(held.values())


def test_origins_of_an_unknown_offset_is_the_oldest() -> None:
    origins = Origins()
    for offset in (10, 20, 30):
        origins.note(1, offset)
    assert [origins.take(1, 20), origins.take(1, 0), origins.take(1, 0)] == [20, 10, 30]
