"""The client's handshake against servers in hand-written bytes: good, old, and hostile."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from nbdbm.errors import NbdError, UsageError
from nbdbm.nbd.catalog import ExportInfo
from nbdbm.nbd.client import (
    ClientEvent,
    ClientProtocol,
    ContextsListed,
    ContextsSelected,
    ExportsListed,
    HandshakeReady,
    InfoReceived,
    ListedExport,
    OptionRefused,
    Ready,
    StartTls,
)
from nbdbm.nbd.clienthandshake import TRANSITIONS, ClientState
from nbdbm.nbd.constants import Info, Opt, Rep, TransmissionFlag
from nbdbm.nbd.limits import ClientLimits
from tests.support.slices import in_slices

GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
EXPORT = struct.pack(">HQH", 0, 1 << 20, 3)


def rep(option: int, reply: int, data: bytes = b"", length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">QIII", 0x0003E889045565A9, option, reply, size) + data


def string(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def client(*, limits: ClientLimits | None = None) -> ClientProtocol:
    """A client that may ask options: extended headers were granted."""
    made = ClientProtocol(limits=limits or ClientLimits())
    assert made.receive_data(GREETING + rep(11, 1)) == [HandshakeReady(True, True)]
    made.data_to_send()
    return made


def asked(protocol: ClientProtocol) -> bytes:
    return b"".join(protocol.data_to_send())


ABORT = b"IHAVEOPT" + struct.pack(">II", Opt.ABORT, 0)


@pytest.mark.parametrize("option", [11, 8])
def test_a_server_that_shuts_down_is_left(option: int) -> None:
    made = ClientProtocol()
    made.receive_data(GREETING + (rep(11, Rep.ERR_UNSUP) if option == 8 else b""))
    asked(made)
    with pytest.raises(NbdError, match="shutting down: see you"):
        made.receive_data(rep(option, Rep.ERR_SHUTDOWN, b"see you"))
    assert asked(made) == ABORT


AGREEMENTS: dict[str, tuple[bool, bool, bytes, HandshakeReady, list[int]]] = {
    "extended": (True, True, rep(11, 1), HandshakeReady(True, True), [11]),
    "structured_instead": (
        True,
        True,
        rep(11, Rep.ERR_UNSUP, b"what?") + rep(8, 1),
        HandshakeReady(True, False),
        [11, 8],
    ),
    "neither": (
        True,
        True,
        rep(11, Rep.ERR_UNSUP) + rep(8, Rep.ERR_POLICY),
        HandshakeReady(False, False),
        [11, 8],
    ),
    "structured_wanted": (True, False, rep(8, 1), HandshakeReady(True, False), [8]),
    "only_extended_wanted": (False, True, rep(11, Rep.ERR_UNSUP), HandshakeReady(False, False), [11]),
    "nothing_wanted": (False, False, b"", HandshakeReady(False, False), []),
}


@pytest.mark.parametrize("case", AGREEMENTS.values(), ids=AGREEMENTS.keys())
def test_agreement(case: tuple[bool, bool, bytes, HandshakeReady, list[int]]) -> None:
    structured, extended, answers, expected, options = case

    def run(pieces: list[bytes]) -> tuple[list[ClientEvent], bytes]:
        made = ClientProtocol(structured=structured, extended=extended)
        events: list[ClientEvent] = []
        for piece in pieces:
            events += made.receive_data(piece)
        return events, asked(made)

    events, sent = in_slices(GREETING + answers, run)
    assert events == [expected]
    assert sent == b"\0\0\0\3" + b"".join(b"IHAVEOPT" + struct.pack(">II", opt, 0) for opt in options)


@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no NBD server"),
        (b"NBDMAGIX", "no NBD server"),
        (b"NBDMAGIC" + bytes.fromhex("0000420281861253") + bytes(200), "oldstyle"),
    ],
    ids=["ssh", "short", "oldstyle"],
)
def test_not_our_kind_of_server(greeting: bytes, words: str) -> None:
    made = ClientProtocol()
    with pytest.raises(NbdError, match=words):
        made.receive_data(greeting)
    assert made.state is ClientState.CLOSED
    assert made.receive_data(GREETING) == []
    made.receive_eof()


def test_flags_follow_the_server() -> None:
    made = ClientProtocol(structured=False, extended=False)
    made.receive_data(GREETING[:-1] + b"\x01")
    assert asked(made) == b"\0\0\0\1"


# options and their answers


def test_list_exports() -> None:
    made = client()
    made.list_exports()
    assert asked(made) == b"IHAVEOPT" + bytes.fromhex("00000003 00000000")
    answers = rep(3, 2, string(b"one")) + rep(3, 2, string(b"") + b"hi\x07") + rep(3, 1)
    expected = [ExportsListed((ListedExport("one", ""), ListedExport("", "hi?")))]
    assert made.receive_data(answers) == expected


def test_info() -> None:
    made = client()
    made.info("disk")
    assert asked(made) == b"IHAVEOPT" + bytes.fromhex("00000006 00000010 00000004") + b"disk" + bytes.fromhex(
        "0003 0001 0002 0003"
    )
    answers = [
        rep(6, 3, struct.pack(">HIII", 3, 512, 4096, 1 << 20)),
        rep(6, 3, b"\0\1canonical"),
        rep(6, 3, b"\0\2about"),
        rep(6, 3, b"\xff\xffwhatever"),
        rep(6, 3, struct.pack(">HQH", 0, 1 << 20, 0xF003)),
        rep(6, 1),
    ]
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY | TransmissionFlag.BLOCK_STAT_PAYLOAD
    assert made.receive_data(b"".join(answers)) == [
        InfoReceived(ExportInfo("canonical", 1 << 20, flags, "about", 512, 4096, 1 << 20))
    ]
    assert made.export is None


def test_contexts() -> None:
    made = client()
    made.list_contexts("disk", ["base:"])
    assert asked(made).endswith(string(b"disk") + b"\0\0\0\1" + string(b"base:"))
    answers = rep(9, 4, bytes(4) + b"base:allocation") + rep(9, 1)
    assert made.receive_data(answers) == [ContextsListed(("base:allocation",))]
    made.set_contexts("disk", ["base:allocation", "qemu:missing"])
    asked(made)
    answers = rep(10, 4, b"\0\0\0\7base:allocation") + rep(10, 1)
    assert made.receive_data(answers) == [ContextsSelected(((7, "base:allocation"),))]
    assert made.contexts == {"base:allocation": 7}
    made.go("disk")
    (ready,) = made.receive_data(rep(7, 3, EXPORT) + rep(7, 1))
    assert isinstance(ready, Ready) and ready.info.contexts == ("base:allocation",)
    assert made.export == ready.info


def test_contexts_of_another_export_are_void() -> None:
    made = client()
    made.set_contexts("disk", ["base:allocation"])
    made.receive_data(rep(10, 4, b"\0\0\0\7base:allocation") + rep(10, 1))
    made.go("other")
    (ready,) = made.receive_data(rep(7, 3, EXPORT) + rep(7, 1))
    assert isinstance(ready, Ready) and ready.info.contexts == () and made.contexts == {}


def test_failed_selection_selects_nothing() -> None:
    made = client()
    made.set_contexts("disk", ["base:allocation"])
    answers = rep(10, 4, b"\0\0\0\7base:allocation") + rep(10, Rep.ERR_TOO_BIG, b"\x1b[2Jtoo many")
    assert made.receive_data(answers) == [OptionRefused(10, Rep.ERR_TOO_BIG, "?[2Jtoo many")]
    assert made.contexts == {}


def test_refusals_and_another_try() -> None:
    made = client()
    for error, text in ((Rep.ERR_UNKNOWN, "ERR_UNKNOWN"), (0x80000063, "error 0x80000063")):
        made.go("disk")
        assert made.receive_data(rep(7, error)) == [OptionRefused(7, error, text)]
    made.go("disk")
    assert made.receive_data(rep(7, 3, EXPORT) + rep(7, 1))[0].__class__ is Ready


# old servers


@pytest.mark.parametrize("zeroes", [True, False], ids=["zeroes", "no_zeroes"])
@pytest.mark.parametrize("fixed", [True, False], ids=["go_unsupported", "not_fixed"])
def test_export_name(zeroes: bool, fixed: bool) -> None:
    def run(pieces: list[bytes]) -> list[ClientEvent]:
        made = ClientProtocol(extended=False, structured=False)
        flags = fixed | (not zeroes) << 1
        assert made.receive_data(GREETING[:-1] + bytes([flags])) == [HandshakeReady(False, False)]
        assert asked(made) == struct.pack(">I", flags)
        made.go("disk")
        if fixed:
            asked(made)
            assert made.receive_data(rep(7, Rep.ERR_UNSUP)) == []
        assert asked(made) == b"IHAVEOPT" + bytes.fromhex("00000001 00000004") + b"disk"
        events: list[ClientEvent] = []
        for piece in pieces:
            events += made.receive_data(piece)
        return events

    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY
    answer = struct.pack(">QH", 1 << 20, 3) + bytes(124 if zeroes else 0)
    assert in_slices(answer, run) == [Ready(ExportInfo("disk", 1 << 20, flags, preferred_block=4096))]


def test_export_name_of_an_unknown_export() -> None:
    made = ClientProtocol()
    made.receive_data(GREETING[:-1] + b"\0")
    made.go("disk")
    with pytest.raises(NbdError, match="'disk'"):
        made.receive_eof()


def test_an_old_server_has_no_options() -> None:
    made = ClientProtocol()
    made.receive_data(GREETING[:-1] + b"\0")
    with pytest.raises(NbdError, match="too old for LIST"):
        made.list_exports()


def test_extended_headers_never_fall_back_to_export_name() -> None:
    made = client()
    made.go("disk")
    assert made.receive_data(rep(7, Rep.ERR_UNSUP)) == [OptionRefused(7, Rep.ERR_UNSUP, "ERR_UNSUP")]


# goodbye


def test_abort() -> None:
    made = client()
    made.abort()
    assert asked(made) == b"IHAVEOPT" + bytes.fromhex("00000002 00000000")
    assert made.receive_data(rep(2, 1)) == []
    made.receive_eof()


def test_eof_during_the_handshake() -> None:
    with pytest.raises(NbdError, match="during the handshake"):
        client().receive_eof()


# hostile servers


def listing(made: ClientProtocol) -> None:
    made.list_exports()


def going(made: ClientProtocol) -> None:
    made.go("disk")


def selecting(made: ClientProtocol) -> None:
    made.set_contexts("disk", ["a:b", "c:d"])


def nothing(made: ClientProtocol) -> None:
    pass


CONTEXT = b"\0\0\0\7a:b"
HOSTILE: dict[str, tuple[Callable[[ClientProtocol], None], bytes, str]] = {
    "magic": (listing, b"\0" * 20, "magic"),
    "unasked": (nothing, rep(3, 1), "nothing that was asked"),
    "another_option": (listing, rep(6, 1), "nothing that was asked"),
    "unknown_reply": (listing, rep(3, 99), "no answer"),
    "reply_of_another_option": (listing, rep(3, 3, EXPORT), "no answer"),
    "ack_with_data": (listing, rep(3, 1, b"x"), "has data"),
    "absurd_length": (listing, rep(3, 2, length=0xFFFFFFFF), "too long"),
    "absurd_error": (listing, rep(3, Rep.ERR_POLICY, length=1 << 20), "too long"),
    "server_without_length": (listing, rep(3, 2, b"\0\0"), "export name"),
    "server_name_beyond": (listing, rep(3, 2, b"\0\0\0\5abc"), "of 5 bytes"),
    "server_name_too_long": (listing, rep(3, 2, string(b"x" * 4097)), "of 4097 bytes"),
    "info_without_type": (going, rep(7, 3, b"\0"), "no type"),
    "no_export_info": (going, rep(7, 1), "without describing"),
    "short_export_info": (going, rep(7, 3, EXPORT[:-1]) + rep(7, 1), "EXPORT of 11"),
    "long_name_info": (going, rep(7, 3, EXPORT) + rep(7, 3, b"\0\1" + b"x" * 4097) + rep(7, 1), "NAME of"),
    "absurd_size": (going, rep(7, 3, struct.pack(">HQH", 0, 1 << 63, 1)) + rep(7, 1), "an export of"),
    "context_without_name": (selecting, rep(10, 4, bytes(4)), "legal length"),
    "context_too_long": (selecting, rep(10, 4, bytes(4) + b"x" * 4097), "legal length"),
    "context_twice": (selecting, rep(10, 4, CONTEXT) * 2 + rep(10, 1), "twice"),
    "context_id_twice": (
        selecting,
        rep(10, 4, CONTEXT) + rep(10, 4, b"\0\0\0\7c:d") + rep(10, 1),
        "twice",
    ),
    "context_unasked": (selecting, rep(10, 4, b"\0\0\0\7e:f") + rep(10, 1), "unasked"),
}


@pytest.mark.parametrize(("ask", "answer", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile(ask: Callable[[ClientProtocol], None], answer: bytes, words: str) -> None:
    def run(pieces: list[bytes]) -> str:
        made = client()
        ask(made)
        with pytest.raises(NbdError, match=words) as caught:
            for piece in pieces:
                made.receive_data(piece)
        assert made.state is ClientState.CLOSED
        return str(caught.value)

    in_slices(answer, run)


@pytest.mark.parametrize(
    "sizes",
    [(3, 4096, 1 << 20), (1 << 17, 1 << 17, 1 << 20), (512, 256, 1 << 20), (512, 4096, 512), (0, 0, 0)],
    ids=["no_power", "minimum_too_large", "preferred_below", "maximum_below", "zero"],
)
def test_illegal_block_sizes(sizes: tuple[int, int, int]) -> None:
    made = client()
    made.go("disk")
    answer = rep(7, 3, EXPORT) + rep(7, 3, struct.pack(">HIII", Info.BLOCK_SIZE, *sizes)) + rep(7, 1)
    with pytest.raises(NbdError, match="block sizes"):
        made.receive_data(answer)


@pytest.mark.parametrize("option", [Opt.LIST, Opt.LIST_META_CONTEXT])
def test_endless_lists_end(option: Opt) -> None:
    made = client(limits=ClientLimits(max_listed=10))
    if option is Opt.LIST:
        made.list_exports()
        answer = rep(3, 2, string(b"x"))
    else:
        made.list_contexts("disk")
        answer = rep(9, 4, CONTEXT)
    with pytest.raises(NbdError, match="more than 10"):
        made.receive_data(answer * 11)


def test_endless_info_costs_nothing() -> None:
    made = client()
    made.go("disk")
    for kind in range(4, 1000):
        made.receive_data(rep(7, 3, struct.pack(">H", kind) + bytes(100)))
    assert made._items == {}


@pytest.mark.parametrize("name", ["x" * 4097, "a\0b"], ids=["long", "nul"])
def test_names_that_cannot_be_sent(name: str) -> None:
    made = client()
    with pytest.raises(UsageError):
        made.go(name)


def test_the_table_names_every_state_and_ends() -> None:
    assert set(TRANSITIONS) == set(ClientState)
    assert TRANSITIONS[ClientState.CLOSED] == frozenset()


class TestStartTls:
    def asking(self, **options: bool) -> ClientProtocol:
        made = ClientProtocol(tls=True, **options)
        assert made.receive_data(GREETING) == []
        # Before anything else, which would be worth nothing.
        assert asked(made) == b"\0\0\0\3IHAVEOPT" + struct.pack(">II", Opt.STARTTLS, 0)
        return made

    def test_granted(self) -> None:
        def run(pieces: list[bytes]) -> list[ClientEvent]:
            made = self.asking()
            events = [event for piece in pieces for event in made.receive_data(piece)]
            assert made.state is ClientState.STARTING_TLS and asked(made) == b""
            events += made.tls_started()
            assert asked(made) == b"IHAVEOPT" + struct.pack(">II", Opt.EXTENDED_HEADERS, 0)
            return events + made.receive_data(rep(11, 1))

        assert in_slices(rep(5, 1), run) == [StartTls(), HandshakeReady(True, True)]

    def test_granted_with_nothing_else_to_agree_upon(self) -> None:
        made = self.asking(structured=False, extended=False)
        assert made.receive_data(rep(5, 1)) == [StartTls()]
        assert made.tls_started() == [HandshakeReady(False, False)]

    @pytest.mark.parametrize(
        ("error", "data", "text"),
        [
            (Rep.ERR_POLICY, b"not today", "not today"),
            (Rep.ERR_UNSUP, b"", "ERR_UNSUP"),
            (1 << 31 | 99, b"", "error"),
        ],
        ids=["text", "name", "unknown"],
    )
    def test_refused(self, error: int, data: bytes, text: str) -> None:
        made = self.asking()
        asked(made)
        with pytest.raises(NbdError, match=f"refuses TLS: {text}"):
            made.receive_data(rep(5, error, data))
        assert asked(made) == ABORT

    def test_required_and_not_wanted(self) -> None:
        made = ClientProtocol()
        made.receive_data(GREETING)
        asked(made)
        with pytest.raises(NbdError, match="requires TLS"):
            made.receive_data(rep(11, Rep.ERR_TLS_REQD))
        assert asked(made) == ABORT

    def test_server_without_options(self) -> None:
        with pytest.raises(NbdError, match="too old for TLS"):
            ClientProtocol(tls=True).receive_data(b"NBDMAGICIHAVEOPT\0\0")

    @pytest.mark.parametrize("behind", [rep(11, 1), b"\0"])
    def test_plain_text_behind_the_answer(self, behind: bytes) -> None:
        made = self.asking()
        with pytest.raises(NbdError, match="plain text"):
            made.receive_data(rep(5, 1) + behind)

    def test_plain_text_that_comes_later(self) -> None:
        made = self.asking()
        made.receive_data(rep(5, 1))
        with pytest.raises(NbdError, match="plain text"):
            made.receive_data(b"\0")
