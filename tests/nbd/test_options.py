"""Options: cut out of what is received, let in one by one; what becomes of data that comes later."""

from __future__ import annotations

import pytest

from nbdbm.nbd.constants import Rep
from nbdbm.nbd.events import Disconnected, GoRequested, StartTls
from nbdbm.nbd.handshake import Handshake, OptionEvent, ProtocolViolation, TlsMode
from nbdbm.nbd.limits import DEFAULT_LIMITS, Limits
from nbdbm.nbd.messages import OptionRequest
from nbdbm.nbd.options import REPLIES_AT_ONCE, Options, Rest
from nbdbm.nbd.receiver import SMALL_BODY
from tests.support.options import GREETING, info_data, kinds, meta_data, opt, split
from tests.support.pair import ListCatalog

LONG = opt(9, meta_data("disk", *["x" * 1000] * 100, "base:"))
"""Its data is too long for the scratch."""
HEAD = 16


class Received:
    """Options of which ``data`` is what was received, and nothing more."""

    def __init__(
        self,
        data: bytes,
        *,
        limits: Limits = DEFAULT_LIMITS,
        in_turns: bool = False,
        tls: TlsMode = TlsMode.OFF,
    ) -> None:
        self.data = data
        self.room = True
        self.traced: list[object] = []
        handshake = Handshake(ListCatalog(), limits, tls)
        self.options = Options(
            handshake,
            limits,
            memoryview(data),
            allocate=lambda length: bytearray(length + 1) if self.room else None,
            in_turns=in_turns,
            trace=lambda _, message: self.traced.append(message),
        )
        assert b"".join(self.options.take_replies()) == GREETING
        handshake.client_flags(3)

    def parse(self, at: int = 0) -> tuple[int, OptionEvent]:
        return self.options.parse(at, len(self.data))

    def replies(self) -> list[tuple[int, int]]:
        return kinds(split(b"".join(self.options.take_replies())))


def test_one_after_the_other() -> None:
    first, second = opt(8), opt(6, info_data("disk"))
    one = Received(first + second)
    assert one.parse() == (len(first), None)
    assert one.parse(len(first)) == (len(one.data), None)
    replies = one.replies()
    assert (
        replies[0] == (8, Rep.ACK) and set(replies[1:-1]) == {(6, Rep.INFO)} and replies[-1] == (6, Rep.ACK)
    )
    assert one.parse(len(one.data)) == (len(one.data), None), "nothing is left"
    assert len(one.traced) == 2 + len(replies) and isinstance(one.traced[0], OptionRequest)


@pytest.mark.parametrize("data", [opt(7, info_data("disk")), opt(8), opt(7, bytes(SMALL_BODY))])
def test_what_is_incomplete_stays(data: bytes) -> None:
    for end in {1, HEAD - 1, HEAD, len(data) - 1} - {len(data)}:
        one = Received(data[:end])
        assert one.parse() == (0, None) and one.replies() == [] and one.options.rest is None
        assert not one.options.receiving


@pytest.mark.parametrize(
    ("data", "tls", "expected"),
    [
        (opt(7, info_data("disk")), TlsMode.OFF, GoRequested("disk")),
        (opt(2, b"why"), TlsMode.OFF, Disconnected(True, "NBD_OPT_ABORT")),
        (opt(2, length=1000), TlsMode.OFF, Disconnected(True, "NBD_OPT_ABORT")),
        (opt(5), TlsMode.ON, StartTls()),
    ],
    ids=["go", "abort", "abort that promises data", "TLS"],
)
def test_what_the_shell_has_to_do(data: bytes, tls: TlsMode, expected: OptionEvent) -> None:
    at, event = Received(data, tls=tls).parse()
    assert at == len(data)
    if isinstance(expected, Disconnected):
        assert isinstance(event, Disconnected) and event.clean is expected.clean
    else:
        assert event == expected


def test_only_closing_is_left() -> None:
    with pytest.raises(ProtocolViolation, match="option magic"):
        Received(b"IHAVENOT" + bytes(8)).parse()
    many = Received(opt(8) * 3, limits=Limits(max_pipelined=2))
    at, _ = many.parse(many.parse()[0])
    with pytest.raises(ProtocolViolation, match="without awaiting"):
        many.parse(at)
    many.options.sent()
    assert many.parse(at) == (len(many.data), None)


def test_what_is_refused_is_thrown_away_first() -> None:
    limits = Limits(max_option_length=64)
    one = Received(opt(9, bytes(65)), limits=limits)
    assert one.parse() == (HEAD, None)
    option = OptionRequest.parse(one.data, 0)
    assert one.options.rest == Rest(option, Rep.ERR_TOO_BIG) and one.replies() == []


def test_long_data_has_a_buffer_of_its_own() -> None:
    one = Received(LONG[:20])
    one.room = False
    assert one.parse() == (0, None) and one.options.rest is None and not one.options.receiving
    one.room = True
    assert one.parse() == (HEAD, None) and one.options.receiving
    rest = one.options.rest
    assert rest is not None and isinstance(rest.fate, memoryview)
    assert len(rest.fate) == len(LONG) - HEAD == rest.option.length
    rest.fate[:] = LONG[HEAD:]
    assert one.options.received(rest.fate) is None and not one.options.receiving
    assert one.replies() == [(9, Rep.META_CONTEXT), (9, Rep.ACK)]
    assert len([each for each in one.traced if isinstance(each, OptionRequest)]) == 1


class TestInTurns:
    def test_each_waits_for_its_own(self) -> None:
        one = Received(opt(8) * 2, in_turns=True)
        assert one.parse() == (0, None) and one.options.unfinished and one.replies() == []
        assert one.options.go_on() is None
        at, _ = one.parse()
        assert at == HEAD and one.replies() == [(8, Rep.ACK)]
        assert one.parse(at) == (at, None) and one.options.unfinished
        one.options.go_on()
        one.options.end_turn()
        assert one.parse(at) == (at, None) and one.options.unfinished, "the turn is over"

    def test_long_data_too(self) -> None:
        one = Received(LONG[:20], in_turns=True)
        one.parse()
        one.options.go_on()
        assert one.parse() == (HEAD, None)
        one.options.end_turn()
        assert one.options.received(memoryview(LONG)[HEAD:]) is None
        assert one.options.unfinished and one.options.receiving and one.replies() == []
        assert one.options.go_on() is None and not one.options.receiving
        assert one.replies() == [] and one.options.unfinished, "the answer has its own turns"
        one.options.go_on()
        assert one.replies() == [(9, Rep.META_CONTEXT), (9, Rep.ACK)]

    @pytest.mark.parametrize("in_turns", [False, True])
    def test_a_long_answer_comes_in_parts(self, in_turns: bool) -> None:
        one = Received(opt(8), in_turns=in_turns)
        one.options.handshake.more = iter([b"part"] * (2 * REPLIES_AT_ONCE) + [b""])
        parts = [len(one.options.take_replies())]
        while one.options.unfinished:
            assert one.options.go_on() is None
            parts.append(len(one.options.take_replies()))
        assert parts == ([0, REPLIES_AT_ONCE, REPLIES_AT_ONCE, 0] if in_turns else [2 * REPLIES_AT_ONCE])
