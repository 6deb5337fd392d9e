"""Layouts against bytes written by hand from the specification."""

from __future__ import annotations

import pytest

from nbdbm.nbd.constants import MAX_STRING, Cmd, NbdErrno, Opt, Rep, ReplyFlag, ReplyType
from nbdbm.nbd.messages import (
    Chunk,
    ExtendedChunk,
    Greeting,
    OptionReply,
    OptionRequest,
    Request,
    SimpleReply,
    decode,
    display,
    encode,
    reply_text,
)

COMPACT = bytes.fromhex("25609513 0004 0000 1122334455667788 0000000000010000 00001000")
EXTENDED = bytes.fromhex("21e41c71 0020 0001 1122334455667788 0000000000010000 0000000100000000")


def test_greeting_is_nbdmagic_ihaveopt_flags() -> None:
    greeting = Greeting.newstyle(3)
    assert greeting.pack() == b"NBDMAGICIHAVEOPT\x00\x03"
    assert Greeting.parse(b"xx" + greeting.pack() + b"yy", 2) == greeting


def test_option_request() -> None:
    raw = OptionRequest.pack(Opt.GO, b"abc")
    assert raw == b"IHAVEOPT" + bytes.fromhex("00000007 00000003") + b"abc"
    head = OptionRequest.parse(raw)
    assert (head.option, head.length) == (Opt.GO, 3)
    assert str(head) == "OPT_GO [3]"


def test_option_reply() -> None:
    raw = OptionReply.pack(Opt.LIST, Rep.ERR_POLICY, b"no")
    assert raw == bytes.fromhex("0003e889045565a9 00000003 80000002 00000002") + b"no"
    head = OptionReply.parse(raw)
    assert (head.option, head.reply, head.length) == (Opt.LIST, Rep.ERR_POLICY, 2)
    assert str(head) == "OPT_LIST REP_ERR_POLICY [2]"


@pytest.mark.parametrize("raw", [COMPACT, EXTENDED], ids=["compact", "extended"])
def test_request_round_trip(raw: bytes) -> None:
    parse = Request.parse if raw is COMPACT else Request.parse_extended
    assert parse(raw).pack() == raw
    assert parse(b"\xff" * 3 + raw + b"\xff" * 3, 3) == parse(raw)


def test_request_fields() -> None:
    request = Request.parse(COMPACT)
    assert request == Request.compact(Cmd.READ, 0x1122334455667788, 65536, 4096, 4)
    assert Request.parse_extended(EXTENDED) == Request.extended(
        Cmd.WRITE, 0x1122334455667788, 65536, 1 << 32, 32
    )
    assert str(request) == "READ #1122334455667788 @65536+4096 <CmdFlag.DF: 4>"
    assert str(Request.compact(99, 1, 2, 3)) == "0x63 #1 @2+3"


def test_simple_reply() -> None:
    raw = SimpleReply.pack(NbdErrno.EPERM, 7)
    assert raw == bytes.fromhex("67446698 00000001 0000000000000007")
    assert SimpleReply.parse(raw)[1:] == (NbdErrno.EPERM, 7)
    assert reply_text(raw) == "REPLY #7 EPERM"
    assert reply_text(SimpleReply.pack(0, 7)) == "REPLY #7 ok"


def test_structured_chunk() -> None:
    raw = Chunk.pack(ReplyFlag.DONE, ReplyType.OFFSET_HOLE, 7, 12)
    assert raw == bytes.fromhex("668e33ef 0001 0002 0000000000000007 0000000c")
    assert Chunk.parse(raw)[1:] == (1, 2, 7, 12)
    assert reply_text(raw) == "CHUNK_OFFSET_HOLE #7 [12] done"


def test_extended_chunk() -> None:
    raw = ExtendedChunk.pack(0, ReplyType.ERROR, 7, 65536, 6)
    assert raw == bytes.fromhex("6e8a278c 0000 8001 0000000000000007 0000000000010000 0000000000000006")
    assert ExtendedChunk.parse(raw)[1:] == (0, ReplyType.ERROR, 7, 65536, 6)
    assert reply_text(raw) == "CHUNK_ERROR #7 [6]"


def test_strings_that_are_no_utf8_come_back_as_they_were() -> None:
    assert encode(decode(b"\xff\xfe ok")) == b"\xff\xfe ok"


def test_a_string_that_is_no_text_at_all_still_packs() -> None:
    assert encode("\ud800") == b"\\ud800"


@pytest.mark.parametrize(
    ("text", "raw"),
    [
        ("plain", b"plain"),
        ("a\0b", b"a\\0b"),
        ("x" * 5000, b"x" * MAX_STRING),
        ("é" * 2049, "é".encode() * 2048),
        ("x" + "é" * 2048, b"x" + "é".encode() * 2047),
    ],
    ids=["plain", "nul", "long", "long_whole", "long_cut"],
)
def test_display_is_bounded_and_whole(text: str, raw: bytes) -> None:
    assert display(text) == raw
