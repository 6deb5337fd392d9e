"""The handshake, option by option, in hand-written bytes; every case whole, byte by byte, in pieces."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.nbd.catalog import Absent, ExportInfo
from nbdbm.nbd.constants import Info, Opt, Rep, TransmissionFlag
from nbdbm.nbd.events import Disconnected, Event, ExportWanted, GoRequested
from nbdbm.nbd.handshake import OPTION_HANDLERS, TRANSITIONS, State
from nbdbm.nbd.limits import DEFAULT_LIMITS, Limits
from nbdbm.nbd.protocol import ServerProtocol
from tests.support.options import (
    FLAGS,
    Replies,
    haggle,
    info_data,
    kinds,
    meta_data,
    opt,
    sent,
    split,
    string,
)
from tests.support.pair import CONTEXTS, DISK, READ_ONLY, ListCatalog
from tests.support.slices import in_slices

INVALID = Rep.ERR_INVALID
CASES: dict[str, tuple[bytes, list[tuple[int, int]]]] = {
    "abort": (opt(2), [(2, Rep.ACK)]),
    "abort_with_data": (opt(2, b"bye"), [(2, Rep.ACK)]),
    "abort_announcing_4_gib": (opt(2, length=0xFFFFFFFF), [(2, Rep.ACK)]),
    "list": (opt(3), [(3, Rep.SERVER)] * 4 + [(3, Rep.ACK)]),
    "list_with_data": (opt(3, b"x"), [(3, INVALID)]),
    "list_with_very_much_data": (opt(3, bytes((1 << 20) + 1)), [(3, INVALID)]),
    "peek_export": (opt(4), [(4, Rep.ERR_UNSUP)]),
    "starttls": (opt(5), [(5, Rep.ERR_POLICY)]),
    "starttls_with_data": (opt(5, b"x"), [(5, INVALID)]),
    "unknown_option": (opt(99), [(99, Rep.ERR_UNSUP)]),
    "unknown_option_with_data": (opt(0xFFFFFFFF, b"x" * 300), [(0xFFFFFFFF, Rep.ERR_UNSUP)]),
    "option_zero": (opt(0), [(0, Rep.ERR_UNSUP)]),
    "info": (opt(6, info_data()), [(6, Rep.INFO)] * 3 + [(6, Rep.ACK)]),
    "info_default_export": (opt(6, info_data("")), [(6, Rep.INFO)] * 3 + [(6, Rep.ACK)]),
    "info_unknown_export": (opt(6, info_data("no")), [(6, Rep.ERR_UNKNOWN)]),
    "info_empty": (opt(6), [(6, INVALID)]),
    "info_short_name": (opt(6, string("disk", 5)), [(6, INVALID)]),
    "info_huge_name_length": (opt(6, string("disk", 0xFFFFFFFF)), [(6, INVALID)]),
    "info_no_count": (opt(6, string("disk")), [(6, INVALID)]),
    "info_missing_requests": (opt(6, string("disk") + b"\x00\x02\x00\x01"), [(6, INVALID)]),
    "info_trailing_bytes": (opt(6, info_data() + b"x"), [(6, INVALID)]),
    "info_nul_in_name": (opt(6, info_data(b"di\0sk")), [(6, INVALID)]),
    "info_name_too_long": (opt(6, info_data(b"x" * 4097)), [(6, INVALID)]),
    "info_unknown_requests": (opt(6, info_data("disk", 77, 0xFFFF)), [(6, Rep.INFO)] * 3 + [(6, Rep.ACK)]),
    "info_no_utf8": (opt(6, info_data(b"\xff\xfe")), [(6, Rep.ERR_UNKNOWN)]),
    "go_unknown_export": (opt(7, info_data("no")), [(7, Rep.ERR_UNKNOWN)]),
    "go_malformed": (opt(7, b"\0"), [(7, INVALID)]),
    "structured_twice": (opt(8) * 2, [(8, Rep.ACK), (8, INVALID)]),
    "structured_with_data": (opt(8, b"x"), [(8, INVALID)]),
    "structured_invalid_then_valid": (opt(8, b"x") + opt(8), [(8, INVALID), (8, Rep.ACK)]),
    "extended_twice": (opt(11) * 2, [(11, Rep.ACK), (11, INVALID)]),
    "extended_with_data": (opt(11, b"x"), [(11, INVALID)]),
    "structured_then_extended": (opt(8) + opt(11), [(8, Rep.ACK), (11, Rep.ACK)]),
    "extended_then_structured": (opt(11) + opt(8), [(11, Rep.ACK), (8, Rep.ERR_EXT_HEADER_REQD)]),
    "set_before_structured": (opt(10, meta_data("disk", "base:allocation")), [(10, INVALID)]),
    "set_unknown_export": (opt(8) + opt(10, meta_data("no")), [(8, Rep.ACK), (10, Rep.ERR_UNKNOWN)]),
    "set_nothing": (opt(8) + opt(10, meta_data("disk")), [(8, Rep.ACK), (10, Rep.ACK)]),
    "set_wildcards": (
        opt(8) + opt(10, meta_data("disk", "base:", "qemu:", "qemu:dirty-bitmap:")),
        [(8, Rep.ACK), (10, Rep.ACK)],
    ),
    "set_after_extended": (
        opt(11) + opt(10, meta_data("disk", "base:allocation")),
        [(11, Rep.ACK), (10, Rep.META_CONTEXT), (10, Rep.ACK)],
    ),
    "meta_no_count": (opt(9, string("disk")), [(9, INVALID)]),
    "meta_missing_query": (opt(9, string("disk") + b"\0\0\0\1"), [(9, INVALID)]),
    "meta_absurd_count": (opt(9, string("disk") + b"\xff\xff\xff\xff"), [(9, INVALID)]),
    "meta_query_beyond_data": (
        opt(9, string("disk") + b"\0\0\0\1" + string("base:", 6)),
        [(9, INVALID)],
    ),
    "meta_trailing_bytes": (opt(9, meta_data("disk", "base:") + b"x"), [(9, INVALID)]),
    "meta_nul_in_query": (opt(9, meta_data("disk", b"base:\0")), [(9, INVALID)]),
    "meta_query_too_long_is_ignored": (opt(9, meta_data("disk", b"x" * 4097)), [(9, Rep.ACK)]),
    "meta_query_no_utf8_is_ignored": (opt(9, meta_data("disk", b"qemu:\xff")), [(9, Rep.ACK)]),
    "list_meta_before_structured": (
        opt(9, meta_data("disk", "base:")),
        [(9, Rep.META_CONTEXT), (9, Rep.ACK)],
    ),
    "list_meta_unknown_export": (opt(9, meta_data("no")), [(9, Rep.ERR_UNKNOWN)]),
}


@pytest.mark.parametrize(("data", "expected"), CASES.values(), ids=CASES.keys())
def test_option(data: bytes, expected: list[tuple[int, int]]) -> None:
    replies, events = haggle(data)
    assert kinds(replies) == expected
    if data.startswith(opt(2)[:12]):
        assert events == [Disconnected(True, "the client aborted the handshake")]
    else:
        assert events == []


@pytest.mark.parametrize(
    "data",
    [case for case, _ in CASES.values() if not case.startswith(opt(2)[:12])],
    ids=lambda d: d[:24].hex(),
)
def test_the_next_option_is_parsed_after_any_answer(data: bytes) -> None:
    alone, _ = haggle(data)
    followed, _ = haggle(data + opt(3))
    assert followed[: len(alone)] == alone
    assert kinds(followed[len(alone) :]) == [(3, Rep.SERVER)] * 4 + [(3, Rep.ACK)]


def test_every_error_says_why() -> None:
    for data, _ in CASES.values():
        for _, reply, text in haggle(data)[0]:
            if reply & 1 << 31:
                assert text.decode().isprintable() and text


VIOLATIONS = {
    "unknown_client_flag": (b"\0\0\0\7", b"", "unknown client flags 0x7"),
    "option_magic": (FLAGS, b"IHAVEOPX" + bytes(8), "option magic"),
    "list_without_fixed_newstyle": (b"\0\0\0\0", opt(3), "without fixed newstyle"),
    "unknown_export_name": (FLAGS, opt(1, b"no"), "no export 'no'"),
    "export_name_too_long": (FLAGS, opt(1, length=4097), "4097 bytes"),
    "export_name_absurd": (FLAGS, opt(1, length=0xFFFFFFFF), "4294967295 bytes"),
    "export_name_after_extended": (FLAGS, opt(11) + opt(1, b"disk"), "after extended headers"),
}


@pytest.mark.parametrize(("flags", "data", "reason"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_violation_disconnects(flags: bytes, data: bytes, reason: str) -> None:
    protocol = ServerProtocol(ListCatalog())
    events = protocol.receive_data(flags + data)
    # Data that fits into the scratch is awaited before its option is judged.
    events = events or protocol.receive_data(bytes(4097))
    (event,) = events
    assert isinstance(event, Disconnected) and not event.clean
    assert reason in event.reason
    assert protocol.closed and protocol.state is State.CLOSED
    assert protocol.receive_data(opt(3)) == [] and protocol.receive_eof() == []


# contents of answers


def test_list_names_and_descriptions() -> None:
    replies, _ = haggle(opt(3))
    assert [data for _, _, data in replies] == [
        b"\0\0\0\4diska disk",
        b"\0\0\0\7scratch",
        b"\0\0\0\4huge",
        b"\0\0\0\6coarse",
        b"",
    ]


def test_list_of_many_names() -> None:
    exports = [replace(DISK, name=f"export-{i}") for i in range(3000)]

    class Many(ListCatalog):
        def info(self, name: str) -> ExportInfo | None:
            return exports[int(name.removeprefix("export-"))]

    protocol = ServerProtocol(Many(*exports))
    protocol.data_to_send()
    assert protocol.receive_data(FLAGS + opt(3)) == []
    assert len(split(b"".join(protocol.data_to_send()))) == 3001


def items(replies: Replies) -> dict[int, bytes]:
    return {struct.unpack(">H", data[:2])[0]: data[2:] for _, reply, data in replies if reply == Rep.INFO}


@pytest.mark.parametrize("option", [6, 7], ids=["info", "go"])
def test_info_items(option: int) -> None:
    replies, _ = haggle(opt(option, info_data("disk", Info.NAME)))
    found = items(replies)
    assert found[Info.EXPORT] == struct.pack(">QH", DISK.size, DISK.flags)
    assert found[Info.NAME] == b"disk"
    assert found[Info.DESCRIPTION] == b"a disk"
    assert found[Info.BLOCK_SIZE] == struct.pack(">III", 1, 65536, 32 << 20)
    assert kinds(replies)[-1] == (option, Rep.ACK)


def test_name_only_when_asked_and_canonical() -> None:
    assert Info.NAME not in items(haggle(opt(6, info_data("")))[0])
    assert items(haggle(opt(6, info_data("", Info.NAME)))[0])[Info.NAME] == b"disk"


def test_no_description_if_there_is_none() -> None:
    assert Info.DESCRIPTION not in items(haggle(opt(6, info_data("huge", Info.DESCRIPTION)))[0])


def test_minimum_block_is_told() -> None:
    found = items(haggle(opt(6, info_data("coarse")))[0])
    assert found[Info.BLOCK_SIZE] == struct.pack(">III", 512, 65536, 32 << 20)


@pytest.mark.parametrize(
    ("before", "selecting", "added"),
    [
        (b"", b"", TransmissionFlag(0)),
        (opt(8), b"", TransmissionFlag.SEND_DF),
        (opt(11), b"", TransmissionFlag.SEND_DF),
        (
            opt(11),
            opt(10, meta_data("disk", "base:allocation")),
            TransmissionFlag.SEND_DF | TransmissionFlag.BLOCK_STAT_PAYLOAD,
        ),
        (opt(8), opt(10, meta_data("disk", "base:allocation")), TransmissionFlag.SEND_DF),
    ],
    ids=["simple", "structured", "extended", "extended_contexts", "structured_contexts"],
)
def test_flags_that_depend_on_what_was_agreed(
    before: bytes, selecting: bytes, added: TransmissionFlag
) -> None:
    replies, _ = haggle(before + selecting + opt(7, info_data()))
    (_, flags) = struct.unpack(">QH", items(replies)[Info.EXPORT])
    assert flags == READ_ONLY | added


def test_info_tells_of_the_payload_form_before_contexts_are_selected() -> None:
    replies, _ = haggle(opt(11) + opt(6, info_data()))
    (_, flags) = struct.unpack(">QH", items(replies)[Info.EXPORT])
    assert flags & TransmissionFlag.BLOCK_STAT_PAYLOAD


@pytest.mark.parametrize("zeroes", [True, False], ids=["zeroes", "no_zeroes"])
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "newstyle"])
def test_export_name(zeroes: bool, fixed: bool) -> None:
    flags = struct.pack(">I", fixed | (not zeroes) << 1)

    def run(pieces: list[bytes]) -> bytes:
        protocol = ServerProtocol(ListCatalog())
        protocol.data_to_send()
        events: list[Event] = []
        for piece in pieces:
            events += protocol.receive_data(piece)
        assert events == [GoRequested("disk")]
        assert protocol.accept(DISK) == []
        assert protocol.negotiated is not None and not protocol.sparse_reads
        return b"".join(protocol.data_to_send())

    sent = in_slices(flags + opt(1, b"disk"), run)
    assert sent == struct.pack(">QH", DISK.size, DISK.flags) + bytes(124 if zeroes else 0)


def test_export_name_empty_is_the_default_export() -> None:
    protocol = ServerProtocol(ListCatalog())
    assert protocol.receive_data(FLAGS + opt(1)) == [GoRequested("disk")]


# contexts


def selected(data: bytes) -> list[tuple[int, str]]:
    """The contexts that are in force once GO on ``disk`` has followed ``data``."""
    protocol = ServerProtocol(ListCatalog())
    events = protocol.receive_data(FLAGS + data + opt(7, info_data("disk")))
    assert events == [GoRequested("disk")]
    protocol.accept(DISK)
    assert protocol.negotiated is not None
    return list(protocol.negotiated.contexts)


SET = opt(10, meta_data("disk", "base:allocation", "qemu:dirty-bitmap:daily"))
CHOSEN = [(0, "base:allocation"), (1, "qemu:dirty-bitmap:daily")]

SELECTIONS: dict[str, tuple[bytes, list[tuple[int, str]]]] = {
    "set": (opt(8) + SET, CHOSEN),
    "set_twice": (opt(8) + SET + SET, CHOSEN),
    "replaced": (opt(8) + SET + opt(10, meta_data("disk", "qemu:dirty-bitmap:daily")), CHOSEN[1:]),
    "replaced_by_nothing": (opt(8) + SET + opt(10, meta_data("disk")), []),
    "dropped_by_failed_set": (opt(8) + SET + opt(10, meta_data("no")), []),
    "dropped_by_malformed_set": (opt(8) + SET + opt(10, b"x"), []),
    "dropped_by_oversize_set": (opt(8) + SET + opt(10, bytes(DEFAULT_LIMITS.max_option_length + 1)), []),
    "for_another_export": (opt(8) + opt(10, meta_data("scratch", "base:allocation")), []),
    "by_the_default_name": (opt(8) + opt(10, meta_data("", "base:allocation")), CHOSEN[:1]),
    "kept_by_list": (opt(8) + SET + opt(9, meta_data("disk")), CHOSEN),
    "kept_by_info": (opt(8) + SET + opt(6, info_data("scratch")), CHOSEN),
    "kept_by_failed_go": (opt(8) + SET + opt(7, info_data("no")), CHOSEN),
    "kept_by_extended_headers": (opt(8) + SET + opt(11), CHOSEN),
}


@pytest.mark.parametrize(("data", "expected"), SELECTIONS.values(), ids=SELECTIONS.keys())
def test_selection(data: bytes, expected: list[tuple[int, str]]) -> None:
    assert selected(data) == expected


def test_ids_stay_with_their_names() -> None:
    first = opt(10, meta_data("disk", "qemu:dirty-bitmap:daily"))
    second = opt(10, meta_data("disk", "base:allocation", "qemu:dirty-bitmap:daily"))
    assert selected(opt(8) + first + second) == [(0, "qemu:dirty-bitmap:daily"), (1, "base:allocation")]


def test_set_reports_ids_and_list_reports_none() -> None:
    replies, _ = haggle(opt(8) + SET + opt(9, meta_data("disk")))
    assert [data for option, reply, data in replies if (option, reply) == (10, Rep.META_CONTEXT)] == [
        b"\0\0\0\0base:allocation",
        b"\0\0\0\1qemu:dirty-bitmap:daily",
    ]
    listed = [data for option, reply, data in replies if (option, reply) == (9, Rep.META_CONTEXT)]
    assert listed == [bytes(4) + name.encode() for name in CONTEXTS]


def test_65535_bitmaps_are_listed_and_one_selected() -> None:
    names = tuple(f"qemu:dirty-bitmap:{i}" for i in range(65535))
    protocol = ServerProtocol(ListCatalog(replace(DISK, contexts=names)))
    protocol.data_to_send()
    protocol.receive_data(FLAGS + opt(8))
    protocol.receive_data(opt(9, meta_data("disk")))
    assert len(split(b"".join(protocol.data_to_send()))) == 65537
    protocol.receive_data(opt(10, meta_data("disk", names[-1])))
    assert kinds(split(b"".join(protocol.data_to_send()))) == [(10, Rep.META_CONTEXT), (10, Rep.ACK)]


def test_too_many_contexts_are_refused() -> None:
    protocol = ServerProtocol(ListCatalog(), limits=Limits(max_contexts=1))
    protocol.data_to_send()
    protocol.receive_data(FLAGS + opt(8) + SET)
    assert kinds(split(b"".join(protocol.data_to_send()))) == [(8, Rep.ACK), (10, Rep.ERR_TOO_BIG)]


# deciding


def test_nothing_is_parsed_until_the_answer() -> None:
    protocol = ServerProtocol(ListCatalog())
    protocol.data_to_send()
    assert protocol.receive_data(FLAGS + opt(7, info_data()) + opt(3)) == [GoRequested("disk")]
    assert protocol.state is State.DECIDING
    assert protocol.receive_data(opt(8)) == []
    assert protocol.data_to_send() == []
    assert protocol.refuse(Rep.ERR_SHUTDOWN, "closing down") == []
    replies = split(b"".join(protocol.data_to_send()))
    assert replies[0] == (7, Rep.ERR_SHUTDOWN, b"closing down")
    assert kinds(replies[1:]) == [(3, Rep.SERVER)] * 4 + [(3, Rep.ACK), (8, Rep.ACK)]


def test_go_asked_again_after_a_refusal() -> None:
    protocol = ServerProtocol(ListCatalog())
    protocol.receive_data(FLAGS + opt(7, info_data()))
    assert protocol.refuse(Rep.ERR_POLICY, "not now") == []
    assert protocol.receive_data(opt(7, info_data())) == [GoRequested("disk")]
    protocol.accept(DISK)
    assert protocol.state is State.TRANSMISSION


def test_refused_export_name_disconnects() -> None:
    protocol = ServerProtocol(ListCatalog())
    protocol.receive_data(FLAGS + opt(1, b"disk"))
    assert protocol.refuse(Rep.ERR_POLICY, "not now") == [Disconnected(False, "NBD_OPT_EXPORT_NAME: not now")]


def test_a_flood_before_the_answer_disconnects() -> None:
    protocol = ServerProtocol(ListCatalog())
    assert protocol.receive_data(FLAGS + opt(7, info_data())) == [GoRequested("disk")]
    events = protocol.receive_data(bytes(1 << 20))
    assert events == [Disconnected(False, "the client went on before its option was answered")]
    assert protocol.accept(DISK) == [] and protocol.refuse(Rep.ERR_POLICY, "") == []


def test_eof_before_the_answer() -> None:
    protocol = ServerProtocol(ListCatalog())
    protocol.receive_data(FLAGS + opt(7, info_data()))
    assert protocol.receive_eof() == [Disconnected(False, "the connection ended during the handshake")]
    assert protocol.accept(DISK) == []


# the state machine


def test_the_table_names_every_state_and_ends() -> None:
    assert set(TRANSITIONS) == set(State)
    assert TRANSITIONS[State.CLOSED] == frozenset()
    assert all(State.CLOSED in after for state, after in TRANSITIONS.items() if state is not State.CLOSED)


@given(st.lists(st.sampled_from(sorted(OPTION_HANDLERS)), max_size=6), st.data())
def test_any_options_with_any_data_end_in_a_legal_state(options: list[int], data: st.DataObject) -> None:
    bodies = [
        data.draw(
            st.sampled_from(
                [b"", b"x", info_data(), info_data("no"), meta_data("disk", "base:"), meta_data("disk")]
            )
        )
        for _ in options
    ]
    stream = FLAGS + b"".join(opt(option, body) for option, body in zip(options, bodies, strict=True))
    protocol = ServerProtocol(ListCatalog())
    events = protocol.receive_data(stream)
    if protocol.state is State.DECIDING:
        assert isinstance(events[-1], GoRequested)
    elif protocol.state is State.CLOSED:
        assert isinstance(events[-1], Disconnected)
    else:
        assert protocol.state is State.OPTIONS and events == []


def test_every_option_of_the_specification_is_decided_on() -> None:
    assert set(Opt) - set(OPTION_HANDLERS) == {Opt.PEEK_EXPORT}


class LateCatalog(ListCatalog):
    """Exports that must be opened, and one for clients with TLS only."""

    def __init__(self) -> None:
        super().__init__(DISK)
        self.open = False

    def info(self, name: str) -> ExportInfo | Absent | None:  # type: ignore[override]
        if name == "secret":
            return Absent.NEEDS_TLS
        found = super().info(name)
        return found if self.open or found is None else Absent.UNOPENED


def late() -> tuple[LateCatalog, ServerProtocol]:
    catalog = LateCatalog()
    protocol = ServerProtocol(catalog)
    assert protocol.receive_data(FLAGS) == []
    protocol.data_to_send()
    return catalog, protocol


class TestUnopened:
    def test_list_needs_nothing_opened(self) -> None:
        _, protocol = late()
        assert protocol.receive_data(opt(3)) == []
        assert kinds(sent(protocol)) == [(3, Rep.SERVER), (3, Rep.ACK)]

    @pytest.mark.parametrize(
        ("option", "data"),
        [(Opt.INFO, info_data("disk")), (Opt.LIST_META_CONTEXT, meta_data("disk"))],
        ids=["info", "list-meta-context"],
    )
    def test_an_option_waits_and_is_answered_in_full(self, option: Opt, data: bytes) -> None:
        catalog, protocol = late()
        # What follows in the same packet waits as well.
        assert protocol.receive_data(opt(option, data) + opt(3)) == [ExportWanted("disk")]
        assert sent(protocol) == []
        catalog.open = True
        assert protocol.opened() == []
        expected, _ = haggle(opt(option, data))
        assert len(expected) > 1
        replies = sent(protocol)
        assert replies[: len(expected)] == expected
        assert kinds(replies[len(expected) :]) == [(3, Rep.SERVER), (3, Rep.ACK)]

    def test_contexts_and_go(self) -> None:
        catalog, protocol = late()
        catalog.open = True
        protocol.receive_data(opt(Opt.STRUCTURED_REPLY))
        catalog.open = False
        protocol.data_to_send()
        wish = opt(Opt.SET_META_CONTEXT, meta_data("disk", CONTEXTS[0]))
        assert protocol.receive_data(wish) == [ExportWanted("disk")]
        catalog.open = True
        assert protocol.opened() == []
        assert protocol.receive_data(opt(Opt.GO, info_data("disk"))) == [GoRequested("disk")]
        protocol.accept(DISK)
        assert protocol.negotiated is not None
        assert [context.name for context in protocol.negotiated.contexts] == [CONTEXTS[0]]

    def test_go_hands_on(self) -> None:
        catalog, protocol = late()
        assert protocol.receive_data(opt(Opt.GO, info_data("disk"))) == [ExportWanted("disk")]
        catalog.open = True
        assert protocol.opened() == [GoRequested("disk")]
        protocol.accept(DISK)
        assert protocol.state is State.TRANSMISSION

    def test_export_name(self) -> None:
        catalog, protocol = late()
        assert protocol.receive_data(opt(Opt.EXPORT_NAME, b"disk")) == [ExportWanted("disk")]
        catalog.open = True
        assert protocol.opened() == [GoRequested("disk")]

    @pytest.mark.parametrize("option", [Opt.INFO, Opt.GO])
    def test_refused(self, option: Opt) -> None:
        _, protocol = late()
        assert protocol.receive_data(opt(option, info_data("disk"))) == [ExportWanted("disk")]
        assert protocol.refuse(Rep.ERR_UNKNOWN, "cannot be opened") == []
        assert sent(protocol) == [(option, Rep.ERR_UNKNOWN, b"cannot be opened")]
        assert protocol.state is State.OPTIONS

    def test_refused_export_name_disconnects(self) -> None:
        _, protocol = late()
        protocol.receive_data(opt(Opt.EXPORT_NAME, b"disk"))
        (event,) = protocol.refuse(Rep.ERR_UNKNOWN, "cannot be opened")
        assert isinstance(event, Disconnected) and not event.clean

    def test_the_client_left_meanwhile(self) -> None:
        _, protocol = late()
        protocol.receive_data(opt(Opt.GO, info_data("disk")))
        protocol.receive_eof()
        assert protocol.opened() == [] and protocol.state is State.CLOSED


class TestOnlyWithTls:
    @pytest.mark.parametrize(
        ("option", "data", "reply"),
        [
            (Opt.INFO, info_data("secret"), Rep.ERR_TLS_REQD),
            (Opt.GO, info_data("secret"), Rep.ERR_TLS_REQD),
            # TLS_REQD would say that nothing at all works without TLS.
            (Opt.LIST_META_CONTEXT, meta_data("secret"), Rep.ERR_POLICY),
            (Opt.SET_META_CONTEXT, meta_data("secret", "base:allocation"), Rep.ERR_POLICY),
        ],
        ids=["info", "go", "list-meta-context", "set-meta-context"],
    )
    def test_refused(self, option: Opt, data: bytes, reply: Rep) -> None:
        _, protocol = late()
        assert protocol.receive_data(opt(Opt.STRUCTURED_REPLY)) == []
        sent(protocol)
        assert protocol.receive_data(opt(option, data)) == []
        assert kinds(sent(protocol)) == [(option, reply)]

    def test_export_name_disconnects(self) -> None:
        _, protocol = late()
        (event,) = protocol.receive_data(opt(Opt.EXPORT_NAME, b"secret"))
        assert isinstance(event, Disconnected) and "TLS" in event.reason


def test_selecting_again_and_again_costs_no_memory_and_mixes_nothing_up() -> None:
    names = tuple(f"qemu:dirty-bitmap:{number}" for number in range(100))
    protocol = ServerProtocol(ListCatalog(ExportInfo("disk", 1 << 20, DISK.flags, contexts=names)))
    protocol.data_to_send()
    protocol.receive_data(FLAGS + opt(8))
    protocol.data_to_send()
    given: dict[int, str] = {}
    for first in [*range(0, 100, 5), *range(0, 100, 5)]:
        protocol.receive_data(opt(10, meta_data("disk", *names[first : first + 10])))
        *chosen, _ = split(b"".join(protocol.data_to_send()))
        for _, _, data in chosen:
            number, name = int.from_bytes(data[:4], "big"), data[4:].decode()
            assert given.setdefault(number, name) == name
        assert protocol._options is not None and len(protocol._options.handshake._ids) <= 10
    assert len(given) > 100, "what was forgotten gets another id"
