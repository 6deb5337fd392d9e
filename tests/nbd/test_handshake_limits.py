"""What a client may send in a handshake, and how much of it."""

from __future__ import annotations

import functools
import mmap
import resource
import struct
from pathlib import Path

import pytest

from nbdbm.nbd.catalog import ExportInfo
from nbdbm.nbd.constants import Rep
from nbdbm.nbd.events import Disconnected, Event, GoRequested
from nbdbm.nbd.limits import DEFAULT_LIMITS, Limits
from nbdbm.nbd.options import REPLIES_AT_ONCE
from nbdbm.nbd.protocol import ServerProtocol
from tests.support.options import FLAGS, Replies, haggle, info_data, kinds, meta_data, opt, split, string
from tests.support.pair import DISK, ListCatalog

SMALL = Limits(max_option_length=64, max_options=4, max_queued=100)


@pytest.mark.parametrize(
    ("option", "expected"), [(9, Rep.ERR_TOO_BIG), (77, Rep.ERR_UNSUP)], ids=["known", "unknown"]
)
def test_long_option_is_drained_and_answered(option: int, expected: Rep) -> None:
    replies, events = haggle(opt(option, bytes(1000)) + opt(8), limits=SMALL)
    assert kinds(replies) == [(option, expected), (8, Rep.ACK)]
    assert events == []


def test_draining_needs_no_memory() -> None:
    protocol = ServerProtocol(ListCatalog(), limits=Limits(max_option_bytes=1 << 31))
    protocol.data_to_send()
    protocol.receive_data(FLAGS + opt(9, length=(1 << 30) + 4096))
    assert len(protocol.get_buffer()) == 4096  # who sends much gets more from then on
    assert protocol.buffer_updated(4096) == []
    for _ in range(1 << 12):
        view = protocol.get_buffer()
        assert len(view) >= 1 << 18
        assert protocol.buffer_updated(1 << 18) == []
    assert kinds(split(b"".join(protocol.data_to_send()))) == [(9, Rep.ERR_TOO_BIG)]
    protocol.receive_data(opt(8))
    assert kinds(split(b"".join(protocol.data_to_send()))) == [(8, Rep.ACK)]


def test_large_option_comes_into_its_own_buffer() -> None:
    queries = [f"qemu:dirty-bitmap:{i:0200}" for i in range(4000)]
    data = opt(9, meta_data("disk", *queries, "base:")) + opt(8)
    protocol = ServerProtocol(ListCatalog())
    protocol.data_to_send()
    for start in range(0, len(FLAGS + data), 100_000):
        assert protocol.receive_data((FLAGS + data)[start : start + 100_000]) == []
    replies = split(b"".join(protocol.data_to_send()))
    assert kinds(replies) == [(9, Rep.META_CONTEXT), (9, Rep.ACK), (8, Rep.ACK)]


def test_too_many_options_disconnect() -> None:
    replies, events = haggle(opt(99) * 5, limits=Limits(max_options=4))
    assert len(replies) == 4
    assert events == [Disconnected(False, "more than 4 options in one handshake")]


QUARTER = DEFAULT_LIMITS.max_option_bytes // 4


@pytest.mark.parametrize("code", [3, 6, 9, 10, 77], ids=["list", "info", "list_meta", "set_meta", "unknown"])
def test_too_much_option_data_disconnects(code: int) -> None:
    """Whatever becomes of the options."""
    protocol = ServerProtocol(ListCatalog())
    protocol.data_to_send()
    protocol.receive_data(FLAGS)
    for _ in range(4):
        assert protocol.receive_data(opt(code, bytes(QUARTER))) == []
    assert len(split(b"".join(protocol.data_to_send()))) == 4
    (event,) = protocol.receive_data(opt(code, b"x"))
    assert event == Disconnected(False, "more than 33554432 bytes of option data in one handshake")
    assert protocol.data_to_send() == []


def test_an_option_announced_larger_than_all_may_be_disconnects() -> None:
    replies, events = haggle(opt(6, length=0xFFFFFFFF))
    assert replies == []
    assert events == [Disconnected(False, "more than 33554432 bytes of option data in one handshake")]


def test_an_honest_client_may_ask_about_every_export_there_can_be() -> None:
    """16384 of them, by names as long as file names may be."""
    protocol = ServerProtocol(ListCatalog())
    protocol.receive_data(FLAGS)
    asking = opt(6, info_data("x" * 255))
    for _ in range(DEFAULT_LIMITS.max_options):
        protocol.data_to_send()
        assert protocol.receive_data(asking) == []


@pytest.mark.parametrize("code", [9, 10], ids=["list", "set"])
def test_too_many_queries_are_refused(code: int) -> None:
    most = DEFAULT_LIMITS.max_queries
    for count, expected in ((most, Rep.ACK), (most + 1, Rep.ERR_TOO_BIG)):
        asking = opt(code, meta_data("disk", *[""] * count))
        replies, events = haggle(opt(8) + asking + opt(7, info_data("disk")))
        assert kinds(replies)[:2] == [(8, Rep.ACK), (code, expected)]
        assert events == [GoRequested("disk")]


def test_queries_that_are_not_there_are_a_lie_and_not_too_many() -> None:
    data = string("disk") + struct.pack(">I", 0xFFFFFFFF) + bytes(100)
    replies, _ = haggle(opt(9, data))
    assert replies == [(9, Rep.ERR_INVALID, b"LIST_META_CONTEXT: 4294967295 queries in 100 bytes")]


def test_pipelined_options_disconnect_once_their_replies_pile_up() -> None:
    protocol = ServerProtocol(ListCatalog(), limits=Limits(max_queued=100))
    protocol.data_to_send()
    (event,) = protocol.receive_data(FLAGS + opt(3) * 3)
    assert isinstance(event, Disconnected) and "without awaiting" in event.reason
    assert len(split(b"".join(protocol.data_to_send()))) == 5


def test_pipelined_options_disconnect_when_they_are_too_many() -> None:
    protocol = ServerProtocol(ListCatalog(), limits=Limits(max_pipelined=3))
    protocol.data_to_send()
    protocol.receive_data(FLAGS + opt(3) * 3)
    assert not protocol.closed
    protocol.data_to_send()
    assert not protocol.receive_data(opt(99) * 3)
    (event,) = protocol.receive_data(opt(99))
    assert isinstance(event, Disconnected) and "without awaiting" in event.reason


def test_an_announced_option_takes_memory_only_as_it_arrives() -> None:
    """A hundred clients that announce 1 MiB each, and send little of it."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    pages = functools.partial(mmap.mmap, -1)
    protocols = [ServerProtocol(ListCatalog(), allocate=pages) for _ in range(100)]
    for protocol in protocols:
        protocol.receive_data(FLAGS + opt(6, bytes(70_000), 1 << 20))
        assert not protocol.closed
    assert resident() - before < 32 << 20


def test_options_that_await_their_replies_are_never_too_many_bytes() -> None:
    protocol = ServerProtocol(ListCatalog(), limits=Limits(max_queued=100))
    protocol.receive_data(FLAGS)
    for _ in range(10):
        protocol.data_to_send()
        assert protocol.receive_data(opt(3)) == []


class TestInTurns:
    """What a shell asks for that has many clients: an option a turn, and of a long answer only a part."""

    def protocol(self, *exports: ExportInfo, limits: Limits = DEFAULT_LIMITS) -> ServerProtocol:
        protocol = ServerProtocol(ListCatalog(*exports), limits=limits, in_turns=True)
        protocol.data_to_send()
        return protocol

    def receive(self, protocol: ServerProtocol, data: bytes) -> None:
        view = protocol.get_buffer()
        view[: len(data)] = data
        assert protocol.buffer_updated(len(data)) == []

    def taken(self, protocol: ServerProtocol) -> Replies:
        return split(b"".join(protocol.data_to_send()))

    def test_one_option_a_turn(self) -> None:
        protocol = self.protocol()
        self.receive(protocol, FLAGS + opt(8) + opt(99) + opt(7, info_data("disk"))[:-1])
        assert protocol.unfinished and self.taken(protocol) == []
        assert protocol.go_on() == [] and protocol.unfinished
        assert kinds(self.taken(protocol)) == [(8, Rep.ACK)]
        assert protocol.go_on() == [] and not protocol.unfinished
        assert kinds(self.taken(protocol)) == [(99, Rep.ERR_UNSUP)]
        assert protocol.go_on() == [], "the rest is not there"
        self.receive(protocol, opt(7, info_data("disk"))[-1:])
        assert protocol.unfinished
        assert protocol.go_on() == [GoRequested("disk")] and not protocol.unfinished

    @pytest.mark.parametrize(
        "asking",
        [
            opt(3),
            opt(9, meta_data("many")),
            opt(9, meta_data("many", "qemu:")),
            opt(9, meta_data("many", "base:")),
            opt(8) + opt(10, meta_data("many", *(f"qemu:dirty-bitmap:{n}" for n in range(2000)))),
        ],
        ids=["exports", "contexts", "bitmaps", "base", "selected"],
    )
    def test_long_answers_come_in_parts(self, asking: bytes) -> None:
        names = ("base:allocation", *(f"qemu:dirty-bitmap:{n}" for n in range(2000)))
        exports = [ExportInfo(f"export {number}", 1 << 20, DISK.flags) for number in range(2000)]
        exports.append(ExportInfo("many", 1 << 20, DISK.flags, contexts=names))
        at_once = ServerProtocol(ListCatalog(*exports))
        at_once.data_to_send()
        at_once.receive_data(FLAGS + asking + opt(6, info_data("many")))
        expected = self.taken(at_once)
        protocol = self.protocol(*exports)
        for start in range(0, len(FLAGS + asking), 1000):
            # What comes while there is something to do waits for it.
            self.receive(protocol, (FLAGS + asking)[start : start + 1000])
            while protocol.unfinished and start + 1000 < len(FLAGS + asking):
                protocol.go_on()
        self.receive(protocol, opt(6, info_data("many")))
        replies, turns = self.taken(protocol), 0
        while protocol.unfinished:
            assert protocol.go_on() == []
            part = self.taken(protocol)
            assert len(part) <= max(REPLIES_AT_ONCE, 3)
            replies += part
            turns += 1
        assert replies == expected and turns > 2000 // REPLIES_AT_ONCE

    def test_data_wait_for_a_buffer_and_then_for_their_turn(self) -> None:
        room = False
        data = opt(9, meta_data("disk", *["x" * 1000] * 100, "base:"))

        def allocate(length: int) -> bytearray | None:
            return bytearray(length) if room else None

        protocol = ServerProtocol(
            ListCatalog(), allocate=allocate, limits=Limits(max_options=2), in_turns=True
        )
        protocol.data_to_send()
        self.receive(protocol, FLAGS + data[:2000])
        assert protocol.unfinished and protocol.go_on() == []
        assert protocol.starved == len(data) - 16 and not protocol.receiving and not protocol.unfinished
        room = True
        assert protocol.feed() == [] and protocol.receiving and not protocol.starved
        view = protocol.get_buffer()
        assert len(view) == len(data) - 2000
        view[:] = data[2000:]
        assert protocol.buffer_updated(len(view)) == [] and protocol.unfinished and protocol.receiving
        assert protocol.go_on() == []
        while protocol.unfinished:
            protocol.go_on()
        assert kinds(self.taken(protocol)) == [(9, Rep.META_CONTEXT), (9, Rep.ACK)] and not protocol.receiving
        self.receive(protocol, opt(99))
        protocol.go_on()
        assert not protocol.closed, "the option was counted once"

    def test_little_is_kept_of_what_comes_too_early(self) -> None:
        protocol = self.protocol()
        protocol.receive_data(FLAGS + opt(7, info_data("disk")))
        events: list[Event] = []
        sent = 0
        while not events:
            view = protocol.get_buffer()
            sent += len(view)
            events = protocol.buffer_updated(len(view))
        assert sent <= 70_000 and isinstance(events[0], Disconnected)
