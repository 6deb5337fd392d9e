"""The server's handshake: any options, of several exports, arriving in any pieces.

What must hold: no exception; every option is answered once, in order, and by well-formed replies; how the
bytes were cut makes no difference; what waits to be sent stays within the limits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace

from nbdbm.nbd.catalog import Absent, ExportInfo
from nbdbm.nbd.constants import Rep
from nbdbm.nbd.events import Disconnected, Event, ExportWanted, GoRequested
from nbdbm.nbd.limits import Limits
from nbdbm.nbd.protocol import ServerProtocol
from tests.fuzz import wire
from tests.fuzz.script import Script
from tests.support.pair import COARSE, DISK, HUGE, SCRATCH

LAZY = replace(DISK, name="lazy", description="")
HIDDEN = replace(DISK, name="hidden")
LONG = replace(DISK, name="n" * 4096, description="d" * 4096)
MANY = replace(DISK, name="many", contexts=tuple(f"qemu:dirty-bitmap:{number}" for number in range(300)))
EXPORTS = (DISK, SCRATCH, HUGE, COARSE, LAZY, HIDDEN, LONG, MANY)
NAMES = (b"", b"absent", b"\xff", b"a\0b", b"x" * 4097, *(info.name.encode() for info in EXPORTS))
QUERIES = (
    b"base:allocation", b"base:", b"qemu:", b"qemu:dirty-bitmap:", b"qemu:dirty-bitmap:daily", b"", b":",
    b"x:y", b"qemu:allocation-depth", b"\xff\xfe", b"\0", b"q" * 5000, b"qemu:dirty-bitmap:7",
)  # fmt: skip

WIDE = Limits(max_pipelined=1000)
"""The pieces in which options arrive say how many of them are answered at once."""
TIGHT = Limits(max_pipelined=1000, max_option_length=64, max_options=6, max_queued=300, max_contexts=3)
LARGEST_ANSWER = 40_000
"""Bytes of the longest answer to one option (LIST, or 300 contexts)."""


class Catalog:
    """All exports; one is opened when it is asked for, another is for those with TLS."""

    def __init__(self) -> None:
        self.opened = False

    def listing(self) -> Sequence[tuple[str, str]]:
        return [(info.name, info.description) for info in EXPORTS]

    def info(self, name: str) -> ExportInfo | Absent | None:
        if name == LAZY.name and not self.opened:
            return Absent.UNOPENED
        if name == HIDDEN.name:
            return Absent.NEEDS_TLS
        return next((info for info in EXPORTS if info.name == name), None if name else EXPORTS[0])


def starts() -> Iterable[bytes]:
    """Scripts to begin with: each option, alone and behind others."""
    for tight in (0, 1):
        for code in range(len(wire.OPTIONS)):
            for name in range(len(NAMES)):
                yield bytes([tight, 3, 0, 0, 1, 7, 0, code, name, 2, 0, 1, 0, 5, name, 0])
        yield (
            bytes([tight, 3, 0, 0, 3, 1, 5, 9])
            + bytes([0, 7, 0, 0])
            + bytes([0, 9, 5, 3, 0, 1, 4, 0, 6, 5, 0, 0])
        )


def run(data: bytes) -> None:
    script = Script(data)
    tight = script.flag()
    flags = script.byte()
    decisions = script.bytes(2)
    pieces = Script(script.bytes(8))
    stream = struct.pack(">I", flags if flags < 250 else script.number(4)) + _stream(script)
    whole = _session([stream], decisions, tight)
    parts = _session(wire.cut(stream, pieces), decisions, tight)
    assert whole == parts, "the way the bytes were cut made a difference"
    bytewise = [stream[at : at + 1] for at in range(min(len(stream), 400))]
    single = _session([*bytewise, stream[400:]], decisions, tight)
    assert whole == single, "byte by byte it is another"
    _judge(stream, *whole, tight)


def _stream(script: Script) -> bytes:
    """Options as the script says; much of what is likely can be said in few bytes."""
    found = []
    while script.more:
        kind = script.byte()
        if kind >= 0xF0:
            found.append(script.bytes(kind & 15))
            continue
        code = script.pick(wire.OPTIONS)
        data = b""
        if code in (wire.INFO, wire.GO):
            data = wire.string(script.pick(NAMES))
            wanted = script.bytes(script.byte() & 7)
            data += struct.pack(">H", len(wanted)) + b"".join(struct.pack(">H", each) for each in wanted)
        elif code in (wire.LIST_META, wire.SET_META):
            data = wire.string(script.pick(NAMES))
            queries = [script.pick(QUERIES) for _ in range(script.byte() & 7)]
            data += struct.pack(">I", len(queries)) + b"".join(map(wire.string, queries))
        elif code == wire.EXPORT_NAME:
            data = script.pick(NAMES)
        length = None
        if kind >= 0x80:
            # Something about it is a lie.
            at = script.byte() % (len(data) + 1)
            match kind & 3:
                case 0:
                    data = data[:at] + script.bytes(4) + data[at + 4 :]
                case 1:
                    data = data[:at]
                case 2:
                    data += script.bytes(kind >> 2 & 15)
                case _:
                    length = script.value(len(data)) & 0xFFFFFFFF
        found.append(wire.option(code, data, length))
    return b"".join(found)


def _session(pieces: Sequence[bytes], decisions: bytes, tight: bool) -> tuple[bytes, list[str], bool]:
    """(what the server sent, the events of the handshake as texts, whether transmission began)."""
    catalog = Catalog()
    server = ServerProtocol(catalog, limits=TIGHT if tight else WIDE)
    out = b""
    seen: list[str] = []
    accepted = False

    def decide(event: GoRequested | ExportWanted) -> list[Event]:
        nonlocal accepted
        if decisions[len(seen) % 2 :][:1] >= b"\x80":
            return server.refuse(Rep.ERR_UNKNOWN, "no")
        if isinstance(event, ExportWanted):
            catalog.opened = True
            return server.opened()
        info = catalog.info(event.name)
        assert isinstance(info, ExportInfo)
        accepted = True
        return server.accept(info)

    def act(events: list[Event]) -> None:
        while events:
            following: list[Event] = []
            for event in events:
                if isinstance(event, GoRequested | ExportWanted):
                    seen.append(str(event)[:100])
                    following = decide(event)
                elif isinstance(event, Disconnected):
                    # The wording may depend on where the pieces ended.
                    seen.append(f"disconnected {event.clean}")
                else:
                    assert accepted
                    server.reply(event.cookie)
            events = following

    for piece in pieces:
        act(server.receive_data(piece))
        if not tight:
            out += b"".join(server.data_to_send())
    act(server.receive_eof())
    assert server.closed and not server.receive_data(b"more")
    return out + b"".join(server.data_to_send()), seen, accepted


def _judge(stream: bytes, out: bytes, seen: list[str], accepted: bool, tight: bool) -> None:
    """What came is what an independent reader of both directions expects."""
    assert out[:16] == wire.GREETING and len(out) >= 18
    replies, rest = wire.option_replies(out[18:])
    assert accepted or not rest, "not an option reply"
    finals = [code for code, kind, _ in replies if kind == wire.FINAL or kind >> 31]
    assert not replies or replies[-1][1] == wire.FINAL or replies[-1][1] >> 31, "an answer without an end"
    asked, _ = wire.options_of(stream)
    assert finals == asked[: len(finals)], "answers are not those of the options"
    for code, kind, data in replies:
        assert kind in (1, 2, 3, 4) or 1 <= kind & 0x7FFFFFFF <= 10
        if kind >> 31:
            data.decode()
            assert len(data) <= 4096
        elif kind == 2:
            length = struct.unpack_from(">I", data)[0]
            assert code == wire.LIST and length <= len(data) - 4
        elif kind == 4:
            assert code in (wire.LIST_META, wire.SET_META) and len(data) > 4
        elif kind == 3:
            assert code in (wire.INFO, wire.GO) and len(data) >= 2
        else:
            assert not data
    if tight:
        assert len(out) <= TIGHT.max_queued + LARGEST_ANSWER, "more is queued than the limit allows"
