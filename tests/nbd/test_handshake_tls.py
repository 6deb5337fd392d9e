"""TLS in the handshake: asked for, insisted upon, and nothing agreed upon before survives it."""

from __future__ import annotations

import struct

import pytest

from nbdbm.nbd.constants import Opt, Rep
from nbdbm.nbd.events import Disconnected, Event, GoRequested, StartTls
from nbdbm.nbd.handshake import OPTION_HANDLERS, HeaderStyle, State, TlsMode
from nbdbm.nbd.limits import Limits
from nbdbm.nbd.protocol import ServerProtocol
from tests.support.options import FLAGS, Replies, info_data, kinds, meta_data, opt, sent
from tests.support.pair import DISK, ListCatalog
from tests.support.slices import in_slices

INVALID = Rep.ERR_INVALID
SET = opt(10, meta_data("disk", "base:allocation", "qemu:dirty-bitmap:daily"))
STARTTLS = opt(Opt.STARTTLS)
OFFERING = [TlsMode.ON, TlsMode.REQUIRE]


def offering(mode: TlsMode, flags: bytes = FLAGS) -> ServerProtocol:
    protocol = ServerProtocol(ListCatalog(), tls=mode)
    assert protocol.receive_data(flags) == []
    protocol.data_to_send()
    return protocol


def encrypted(mode: TlsMode, before: bytes = b"") -> ServerProtocol:
    """Through TLS now, after options in plain text."""
    protocol = offering(mode)
    assert protocol.receive_data(before) == []
    assert protocol.receive_data(STARTTLS) == [StartTls()]
    protocol.data_to_send()
    protocol.tls_started()
    return protocol


@pytest.mark.parametrize("mode", OFFERING)
class TestStartTls:
    def test_upgrade(self, mode: TlsMode) -> None:
        def run(pieces: list[bytes]) -> tuple[list[Event], Replies]:
            protocol = offering(mode)
            events = [event for piece in pieces for event in protocol.receive_data(piece)]
            assert protocol.state is State.STARTING_TLS
            replies = sent(protocol)
            protocol.tls_started()
            assert protocol.receive_data(opt(Opt.LIST)) == []
            return events, replies + sent(protocol)

        events, replies = in_slices(STARTTLS, run)
        assert events == [StartTls()]
        assert kinds(replies) == [(5, Rep.ACK)] + [(3, Rep.SERVER)] * 4 + [(3, Rep.ACK)]

    def test_with_data_is_invalid(self, mode: TlsMode) -> None:
        protocol = offering(mode)
        assert protocol.receive_data(opt(Opt.STARTTLS, b"x")) == []
        assert kinds(sent(protocol)) == [(5, INVALID)]
        assert protocol.receive_data(STARTTLS) == [StartTls()]

    def test_twice_is_invalid(self, mode: TlsMode) -> None:
        protocol = encrypted(mode)
        assert protocol.receive_data(STARTTLS + opt(Opt.STRUCTURED_REPLY)) == []
        assert kinds(sent(protocol)) == [(5, INVALID), (8, Rep.ACK)]

    @pytest.mark.parametrize("behind", [opt(Opt.LIST), b"I", opt(Opt.GO, info_data("disk")), b"\x16\x03\x01"])
    def test_plain_text_behind_it_ends_the_connection(self, mode: TlsMode, behind: bytes) -> None:
        protocol = offering(mode)
        (event,) = protocol.receive_data(STARTTLS + behind)
        assert isinstance(event, Disconnected) and not event.clean and "plain text" in event.reason
        assert protocol.closed
        protocol.tls_started()
        assert protocol.closed and protocol.receive_data(opt(Opt.LIST)) == []

    def test_plain_text_that_comes_later_does_too(self, mode: TlsMode) -> None:
        protocol = offering(mode)
        assert protocol.receive_data(STARTTLS) == [StartTls()]
        (event,) = protocol.receive_data(b"I")
        assert isinstance(event, Disconnected) and "plain text" in event.reason

    def test_end_of_file(self, mode: TlsMode) -> None:
        protocol = offering(mode)
        protocol.receive_data(STARTTLS)
        (event,) = protocol.receive_eof()
        assert isinstance(event, Disconnected) and not event.clean
        protocol.tls_started()
        assert protocol.closed

    def test_needs_fixed_newstyle(self, mode: TlsMode) -> None:
        protocol = offering(mode, bytes(4))
        (event,) = protocol.receive_data(STARTTLS)
        assert isinstance(event, Disconnected) and "fixed newstyle" in event.reason

    def test_the_clients_flags_survive(self, mode: TlsMode) -> None:
        protocol = encrypted(mode)
        assert protocol.receive_data(opt(Opt.EXPORT_NAME, b"disk")) == [GoRequested("disk")]
        protocol.accept(DISK)
        # No 124 zeroes, as the flags in plain text said.
        assert b"".join(protocol.data_to_send()) == struct.pack(">QH", DISK.size, DISK.flags)

    def test_options_count_over_both_halves(self, mode: TlsMode) -> None:
        protocol = ServerProtocol(ListCatalog(), tls=mode, limits=Limits(max_options=4))
        protocol.receive_data(FLAGS + opt(99))
        protocol.receive_data(STARTTLS)
        protocol.tls_started()
        protocol.data_to_send()
        (event,) = protocol.receive_data(opt(99) * 3)
        assert isinstance(event, Disconnected) and "more than 4 options" in event.reason


BEFORE = {
    "structured": opt(8),
    "extended": opt(11),
    "contexts": opt(8) + SET,
    "contexts_extended": opt(11) + SET,
}


class TestWhatWasAgreedUponInPlainText:
    """Nothing of it is left once TLS runs: somebody on the way may have sent it."""

    @pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE.keys())
    def test_headers_and_contexts(self, before: bytes) -> None:
        protocol = encrypted(TlsMode.ON, before)
        assert protocol.receive_data(opt(Opt.GO, info_data("disk"))) == [GoRequested("disk")]
        protocol.accept(DISK)
        assert protocol.negotiated is not None
        assert protocol.negotiated.style is HeaderStyle.SIMPLE
        assert protocol.negotiated.contexts == ()

    def test_may_be_agreed_upon_again(self) -> None:
        protocol = encrypted(TlsMode.ON, opt(8) + SET)
        second = opt(10, meta_data("disk", "qemu:dirty-bitmap:daily"))
        assert protocol.receive_data(opt(8) + second) == []
        replies = sent(protocol)
        assert kinds(replies) == [(8, Rep.ACK), (10, Rep.META_CONTEXT), (10, Rep.ACK)]
        # Ids begin anew: the name had 1 before.
        assert replies[1][2] == b"\0\0\0\0qemu:dirty-bitmap:daily"

    def test_contexts_need_structured_replies_again(self) -> None:
        protocol = encrypted(TlsMode.ON, opt(8))
        assert protocol.receive_data(SET) == []
        assert kinds(sent(protocol)) == [(10, INVALID)]


class TestRequired:
    """Without TLS nothing is told: no name, no size, not even which options there are."""

    @pytest.mark.parametrize(
        "option", sorted({*OPTION_HANDLERS, 4, 99, 0xFFFFFFFF} - {Opt.EXPORT_NAME, Opt.ABORT, Opt.STARTTLS})
    )
    @pytest.mark.parametrize("data", [b"", info_data("disk"), bytes(100_000)], ids=["empty", "info", "long"])
    def test_every_option_is_refused(self, option: int, data: bytes) -> None:
        protocol = offering(TlsMode.REQUIRE)
        assert protocol.receive_data(opt(option, data)) == []
        assert kinds(sent(protocol)) == [(option, Rep.ERR_TLS_REQD)]
        assert protocol.receive_data(STARTTLS) == [StartTls()]
        protocol.tls_started()
        protocol.data_to_send()
        protocol.receive_data(opt(option))
        assert all(reply != Rep.ERR_TLS_REQD for _, reply in kinds(sent(protocol)))

    @pytest.mark.parametrize("name", [b"disk", b"", b"no"])
    def test_export_name_disconnects(self, name: bytes) -> None:
        protocol = offering(TlsMode.REQUIRE)
        (event,) = protocol.receive_data(opt(Opt.EXPORT_NAME, name))
        assert isinstance(event, Disconnected) and "without TLS" in event.reason
        assert protocol.data_to_send() == []

    def test_abort(self) -> None:
        protocol = offering(TlsMode.REQUIRE)
        assert protocol.receive_data(opt(Opt.ABORT)) == [
            Disconnected(True, "the client aborted the handshake")
        ]
        assert kinds(sent(protocol)) == [(2, Rep.ACK)]

    def test_go_through_tls(self) -> None:
        protocol = encrypted(TlsMode.REQUIRE)
        assert protocol.receive_data(opt(Opt.GO, info_data("disk"))) == [GoRequested("disk")]


def test_tls_is_optional_where_it_is_only_on() -> None:
    protocol = offering(TlsMode.ON)
    assert protocol.receive_data(opt(8) + opt(Opt.GO, info_data("disk"))) == [GoRequested("disk")]
