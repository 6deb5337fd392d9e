"""The server's handshake: any options, of several exports, arriving in any pieces, with TLS and without.

What must hold: no exception; every option is answered once, in order, by what the specification says
(tests/fuzz/handshakemodel.py), and what is agreed upon in the end is what was granted, nothing of it before
TLS; how the bytes were cut makes no difference; what waits to be sent stays within the limits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from nbdbm.nbd.catalog import Absent, ExportInfo
from nbdbm.nbd.constants import Rep
from nbdbm.nbd.events import Disconnected, Event, ExportWanted, GoRequested, StartTls
from nbdbm.nbd.handshake import Negotiated, State, TlsMode
from nbdbm.nbd.limits import Limits
from nbdbm.nbd.protocol import ServerProtocol
from tests.fuzz import wire
from tests.fuzz.handshakemodel import (
    ACK,
    DF,
    INFO,
    META,
    SERVER,
    STATUS_PAYLOAD,
    Answered,
    Client,
    Expected,
    Export,
)
from tests.fuzz.script import Script
from tests.support.pair import COARSE, DISK, HUGE, SCRATCH

LAZY = replace(DISK, name="lazy", description="")
HIDDEN = replace(DISK, name="hidden")
LONG = replace(DISK, name="n" * 4096, description="d" * 4096)
MANY = replace(DISK, name="many", contexts=tuple(f"qemu:dirty-bitmap:{number}" for number in range(300)))
EXPORTS = (DISK, SCRATCH, HUGE, COARSE, LAZY, HIDDEN, LONG, MANY)
SHOWN = [
    Export(info.name.encode(), info.size, tuple(map(str.encode, info.contexts)), info is HIDDEN, info is LAZY)
    for info in EXPORTS
]
NAMES = (b"", b"absent", b"\xff", b"a\0b", b"x" * 4097, *(info.name.encode() for info in EXPORTS))
QUERIES = (
    b"base:allocation", b"base:", b"qemu:", b"qemu:dirty-bitmap:", b"qemu:dirty-bitmap:daily", b"", b":",
    b"x:y", b"qemu:allocation-depth", b"\xff\xfe", b"\0", b"q" * 5000, b"qemu:dirty-bitmap:7",
)  # fmt: skip

WIDE = Limits(max_pipelined=1000, max_queued=1 << 30)
"""The pieces in which options arrive say how many of them, and how much, is answered at once."""
TIGHT = Limits(max_pipelined=1000, max_option_length=64, max_options=6, max_queued=300, max_contexts=3)
LONGEST_STREAM = 40_000
LARGEST_ANSWER = 40_000
"""Bytes of the longest answer to one option (LIST, or 300 contexts)."""


class Catalog:
    """All exports; one is opened when it is asked for, another is for those with TLS."""

    def __init__(self) -> None:
        self.opened = False
        self.encrypted = False

    def listing(self) -> Sequence[tuple[str, str]]:
        return [(info.name, info.description) for info in EXPORTS]

    def info(self, name: str) -> ExportInfo | Absent | None:
        if name == LAZY.name and not self.opened:
            return Absent.UNOPENED
        if name == HIDDEN.name and not self.encrypted:
            return Absent.NEEDS_TLS
        return next((info for info in EXPORTS if info.name == name), None if name else EXPORTS[0])


CUTS = (3, 1, 5, 9, 0, 0, 0, 0)


def starts() -> Iterable[bytes]:
    """Scripts to begin with: each option, alone and behind others."""
    for tls in range(3):
        # Agree on everything, begin TLS, ask what is left of it; or go on in plain text.
        before = [0, 7, 0, 9, 5, 2, 0, 4, 0, 4]
        for wait in ([0xF0], [], [0xF4, *b"more"]):
            for after in (
                [0, 6, 5, 0],
                [0, 7, 0, 10, 0, 6, 5, 0],
                [0, 10, 0, 9, 5, 1, 4, 0, 6, 5, 0],
                [0, 4, 0, 6, 10, 0],
            ):
                yield bytes([tls << 1, 3, 0, 0, *CUTS, *before, *wait, *after])
    for settings in (0, 1, 2, 4):
        for code in range(len(wire.OPTIONS)):
            for name in range(len(NAMES)):
                yield bytes([settings, 3, 0, 0, *CUTS, 0, code, name, 2, 0, 1, 0, 5, name, 0])
        yield bytes([settings, 3, 0, 0, *CUTS, 0, 7, 0, 9, 5, 3, 0, 1, 4, 0, 6, 5, 0])


def run(data: bytes) -> None:
    script = Script(data)
    settings = script.byte()
    tight, tls = bool(settings & 1), (settings >> 1) % 3
    flags = script.byte()
    decisions = script.bytes(2)
    pieces = Script(script.bytes(8))
    flights = _flights(script, struct.pack(">I", flags if flags < 250 else script.number(4)))
    whole = _session([[flight] for flight in flights], decisions, tight, tls)
    parts = _session([wire.cut(flight, pieces) for flight in flights], decisions, tight, tls, in_turns=True)
    assert whole == parts, "in pieces, and in turns, it is another"
    bytewise = [
        [*(flight[at : at + 1] for at in range(min(len(flight), 400))), flight[400:]] for flight in flights
    ]
    single = _session(bytewise, decisions, tight, tls)
    assert whole == single, "byte by byte it is another"
    no = [decisions[at : at + 1] >= b"\x80" for at in (0, 1)]
    longest = TIGHT.max_option_length if tight else WIDE.max_option_length
    _judge(Client(SHOWN, tls, no, longest, flights).found, whole, tight)


def _flights(script: Script, found: bytes) -> list[bytes]:
    """Options as the script says; much of what is likely can be said in few bytes."""
    flights = []
    length_of_all = 0
    while script.more and length_of_all < LONGEST_STREAM:
        kind = script.byte()
        if kind == 0xF0:
            flights.append(found)
            found = b""
            continue
        if kind > 0xF0:
            found += script.bytes(kind & 15)
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
        found += wire.option(code, data, length)
        length_of_all += 16 + len(data)
    return [*flights, found]


class Heard(NamedTuple):
    """What became of a session."""

    sent: bytes
    """By the server."""
    events: list[str]
    secure_from: int
    """Bytes that were sent before TLS began; -1: it did not."""
    agreed: Negotiated | None


def _session(
    flights: Sequence[Sequence[bytes]], decisions: bytes, tight: bool, tls: int, *, in_turns: bool = False
) -> Heard:
    """Each flight comes in pieces; TLS begins, if it was agreed upon, behind one."""
    catalog = Catalog()
    limits = TIGHT if tight else WIDE
    server = ServerProtocol(catalog, limits=limits, tls=list(TlsMode)[tls], in_turns=in_turns)
    out = b""
    seen: list[str] = []
    secure_from = -1

    def decide(event: GoRequested | ExportWanted) -> list[Event]:
        assert tls < 2 or catalog.encrypted, "an export was asked for without the TLS that is required"
        if decisions[len(seen) % 2 :][:1] >= b"\x80":
            return server.refuse(Rep.ERR_UNKNOWN, "no")
        if isinstance(event, ExportWanted):
            catalog.opened = True
            return server.opened()
        info = catalog.info(event.name)
        assert isinstance(info, ExportInfo)
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
                elif not isinstance(event, StartTls):
                    assert server.negotiated is not None
                    server.reply(event.cookie)
            while server.unfinished:
                following = following + server.go_on()
            events = following

    for pieces in flights:
        for piece in pieces:
            act(server.receive_data(piece))
            if not tight:
                out += b"".join(server.data_to_send())
        if server.state is State.STARTING_TLS:
            out += b"".join(server.data_to_send())
            secure_from, catalog.encrypted = len(out), True
            server.tls_started()
    act(server.receive_eof())
    assert server.closed and not server.receive_data(b"more")
    return Heard(out + b"".join(server.data_to_send()), seen, secure_from, server.negotiated)


def _judge(expected: Expected, heard: Heard, tight: bool) -> None:
    """What came is what an independent reader of both directions expects."""
    out = heard.sent
    assert out[:16] == wire.GREETING and len(out) >= 18
    replies, rest = wire.option_replies(out[18:])
    owners: dict[int, bytes] = {}
    before: dict[bytes, int] = {}
    chosen: list[tuple[int, bytes]] = []
    asked = iter(expected.answers)
    group: list[tuple[int, bytes]] = []
    answered = at = 0
    for code, kind, data in replies:
        at += 20 + len(data)
        if kind != ACK and not kind >> 31:
            group.append((kind, data))
            continue
        answer = next(asked, None)
        assert answer is not None and code == answer.code, f"an answer to {code}, which nobody has asked"
        assert kind in answer.finals, f"{kind:#x} answers {code}"
        if kind >> 31:
            assert not group and len(data) <= 4096
            data.decode()
        else:
            assert not data
            if answered == expected.secure_from:
                owners.clear()
                before.clear()
            _look(answer, group, owners, before)
            if answered == expected.selected:
                chosen = sorted((struct.unpack_from(">I", data)[0], data[4:]) for _, data in group)
        group = []
        answered += 1
        if answered == expected.secure_from:
            assert heard.secure_from == 18 + at, "TLS has not begun behind its option"
    assert not group, "an answer without an end"
    complete = next(asked, None) is None
    assert complete or tight, "an option was not answered"
    if tight:
        assert len(out) <= TIGHT.max_queued + LARGEST_ANSWER, "more is queued than the limit allows"
    assert complete or heard.agreed is None
    if not complete:
        return
    assert (heard.secure_from >= 0) == (expected.secure_from >= 0)
    _look_at_agreement(expected, heard.agreed, chosen, rest, tight)


def _look(
    answer: Answered, group: list[tuple[int, bytes]], owners: dict[int, bytes], before: dict[bytes, int]
) -> None:
    """The replies before an ACK. ``owners``: of all ids; ``before``: what was selected last."""
    export = answer.export
    if answer.code == wire.LIST:
        names = []
        for kind, data in group:
            length = struct.unpack_from(">I", data)[0]
            assert kind == SERVER and length <= len(data) - 4
            names.append(data[4 : 4 + length])
        assert names == [each.name for each in SHOWN]
    elif answer.code in (wire.INFO, wire.GO):
        assert export is not None and {kind for kind, _ in group} == {INFO}
        items = {struct.unpack_from(">H", data)[0]: data[2:] for _, data in group}
        assert len(items) == len(group) and items.get(1, export.name) == export.name
        size, flags = struct.unpack(">QH", items[0])
        assert size == export.size and bool(flags & DF) == (answer.style > 0)
        assert not flags & STATUS_PAYLOAD or answer.style == 2
    elif answer.code in (wire.LIST_META, wire.SET_META):
        assert all(kind == META and len(data) > 4 for kind, data in group)
        found = [(struct.unpack_from(">I", data)[0], data[4:]) for _, data in group]
        names = [name for _, name in found]
        assert len(set(names)) == len(names) and answer.must <= set(names) <= answer.may
        if answer.code == wire.SET_META:
            for number, name in found:
                assert owners.setdefault(number, name) == name, "an id stands for another context now"
                assert before.get(name, number) == number, "a context that was selected has another id now"
            # Nothing is left of ids that were given before TLS.
            assert sorted(owners) == list(range(len(owners)))
            before.clear()
            before.update((name, number) for number, name in found)
    else:
        assert not group


def _look_at_agreement(
    expected: Expected, agreed: Negotiated | None, chosen: list[tuple[int, bytes]], rest: bytes, tight: bool
) -> None:
    if agreed is None:
        assert not rest, "not an option reply"
        assert expected.go is None or tight, "transmission has not begun"
        return
    assert expected.go is not None, "transmission has begun"
    assert agreed.info.name.encode() == expected.go.name
    assert agreed.style == expected.style, "other headers than were agreed upon"
    assert [(number, name.encode()) for number, name in agreed.contexts] == chosen, "other contexts"
    if expected.bare:
        assert struct.unpack_from(">Q", rest)[0] == expected.go.size
        assert rest[10 : expected.bare] == bytes(expected.bare - 10)
