"""The receive buffer: shared scratch, what is kept between receives, bodies in place."""

from __future__ import annotations

from nbdbm.nbd.receiver import SCRATCH_SIZE, SMALL_BODY, Receiver


class Lines(Receiver):
    """The least parser there is: messages of one length byte and a body."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bytes] = []

    def feed(self, data: bytes) -> None:
        view = self.get_buffer()
        view[: len(data)] = data
        end = self._received(len(data))
        at = 0
        while at < end and end - at > self._scratch[at]:
            length = self._scratch[at]
            self.seen.append(bytes(self._view[at + 1 : at + 1 + length]))
            at += 1 + length
        self._keep(at, end)


def test_two_connections_share_the_scratch() -> None:
    first, second = Lines(), Lines()
    first.feed(b"\x03on")
    second.feed(b"\x03tw")
    first.feed(b"e\x01")
    second.feed(b"o")
    first.feed(b"1")
    assert first.seen == [b"one", b"1"]
    assert second.seen == [b"two"]


def test_an_idle_connection_holds_nothing() -> None:
    connection = Lines()
    connection.feed(b"\x01a")
    assert connection._partial == b"" and connection._body is None
    assert len(connection.get_buffer()) == SCRATCH_SIZE


def test_a_private_scratch() -> None:
    scratch = bytearray(2 * SMALL_BODY)
    connection = Receiver(scratch)
    connection.get_buffer()[:2] = b"hi"
    assert scratch[:2] == b"hi"


def test_a_body_is_received_in_place() -> None:
    connection = Receiver()
    connection.get_buffer()[:5] = b"HEADb"
    assert connection._received(5) == 5
    body = memoryview(bytearray(4))
    connection._begin_body(body, 4, 5)
    assert connection._take_body() is None
    rest = connection.get_buffer()
    assert len(rest) == 3
    rest[:2] = b"od"
    assert connection._received(2) == 0 and connection._take_body() is None
    connection.get_buffer()[:1] = b"y"
    connection._received(1)
    assert connection._take_body() is body and body == b"body"
    assert len(connection.get_buffer()) == SCRATCH_SIZE


def test_skipping_stops_at_what_is_there() -> None:
    connection = Receiver()
    connection._skip = 10
    assert connection._skipped(2, 6) == 6 and connection._skip == 6
    assert connection._skipped(0, 20) == 6 and connection._skip == 0
