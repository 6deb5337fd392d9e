"""Hostile clients: the server stays alive and small, and serves a good client at the same time.

Each attack runs against a server of its own, holds its connections open, and meanwhile a client that was
there before, and one that comes only now, must be served as ever.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from collections.abc import Callable

import pytest

from nbdbm.nbd.constants import Cmd, CmdFlag, Opt, Rep
from tests.interop.hostile import ALLOCATION, Peer, client, extended, option, queries, request
from tests.support import images, servers
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "libnbd")]

MEMORY = 384 << 20
"""Bytes resident at the worst moment: what three connections may hold at once (64 MiB each, and as much in
copies on their way out)."""


Attack = Callable[[Callable[[], Peer]], None]
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__.strip("_").replace("_", "-")] = function
    return function


# -- before transmission


@attack
def garbage(peer: Callable[[], Peer]) -> None:
    for seed in range(10):
        one = peer()
        one.pour(random.Random(seed).randbytes(100_000), 0.2)
        assert one.hung_up()


@attack
def another_protocol(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert one.hung_up()


@attack
def unknown_client_flags(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.greet(0xFFFFFFFF)
    assert one.hung_up()


@attack
def silence(peer: Callable[[], Peer]) -> None:
    for _ in range(40):
        peer()


@attack
def slow_greeting(peer: Callable[[], Peer]) -> None:
    """A byte at a time; slow is not wrong, so it ends in transmission."""
    one = peer()
    one.receive(18)
    for byte in struct.pack(">I", 3) + option(Opt.GO, struct.pack(">IH", 0, 0)):
        one.send(bytes([byte]))
        time.sleep(0.02)
    assert one.final_reply() == Rep.ACK


@attack
def option_with_a_bad_magic(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.greet()
    one.send(b"NOTANOPT", struct.pack(">II", Opt.LIST, 0))
    assert one.hung_up()


@attack
def huge_option(peer: Callable[[], Peer]) -> None:
    """4 GiB are announced for one option, and a good part of them sent."""
    one = peer()
    one.greet()
    one.send(option(Opt.INFO, length=0xFFFFFFFF))
    one.pour(bytes(64 << 20))


@attack
def huge_option_of_an_unknown_kind(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.greet()
    one.send(option(0x7FFFFFFF, length=0xFFFFFFF0))
    one.pour(bytes(64 << 20))


@attack
def thousands_of_options(peer: Callable[[], Peer]) -> None:
    """All sent at once, no reply read."""
    one = peer()
    one.greet()
    one.pour(option(Opt.LIST) * 200_000)


@attack
def thousands_of_options_politely(peer: Callable[[], Peer]) -> None:
    """One after the other, for ever: the server loses patience first."""
    one = peer()
    one.greet()
    with contextlib.suppress(ConnectionError):
        for _ in range(4_000):
            one.send(option(Opt.LIST_META_CONTEXT, queries()) * 8)
            for _ in range(8):
                one.final_reply()


@attack
def lying_queries(peer: Callable[[], Peer]) -> None:
    """Counts and lengths that the data does not hold."""
    for data in (
        struct.pack(">II", 0, 0xFFFFFFFF),
        struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">III", 0, 1, 0xFFFFFFFF),
        struct.pack(">II", 0, 1),
        b"",
        b"\0",
    ):
        one = peer()
        one.greet()
        one.send(option(Opt.STRUCTURED_REPLY))
        assert one.final_reply() == Rep.ACK
        one.send(option(Opt.SET_META_CONTEXT, data))
        assert one.final_reply() & 1 << 31
        one.send(option(Opt.GO, struct.pack(">IH", 0, 0)))
        assert one.final_reply() == Rep.ACK


@attack
def very_many_queries(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.greet()
    one.send(option(Opt.STRUCTURED_REPLY))
    assert one.final_reply() == Rep.ACK
    one.pour(option(Opt.LIST_META_CONTEXT, queries(*[b"qemu:"] * 20_000)))
    one.pour(option(Opt.SET_META_CONTEXT, queries(*[b"base:allocation"] * 20_000)))
    one.final_reply()


@attack
def as_many_queries_as_may_be(peer: Callable[[], Peer]) -> None:
    """One more is too many; with these, what is there is selected, and transmission begins."""
    one = peer()
    one.greet()
    one.send(option(Opt.STRUCTURED_REPLY))
    assert one.final_reply() == Rep.ACK
    names = [b"qemu:dirty-bitmap:%d" % number for number in range(4096)]
    one.send(option(Opt.SET_META_CONTEXT, queries(b"base:allocation", *names)))
    assert one.final_reply() == Rep.ERR_TOO_BIG
    one.send(option(Opt.SET_META_CONTEXT, queries(b"base:allocation", *names[1:])))
    assert one.reply() == (Opt.SET_META_CONTEXT, Rep.META_CONTEXT, bytes(4) + b"base:allocation")
    assert one.final_reply() == Rep.ACK
    one.send(option(Opt.GO, struct.pack(">IH", 0, 0)))
    assert one.final_reply() == Rep.ACK
    one.send(request(Cmd.BLOCK_STATUS, 0, 65536, cookie=3))
    assert one.chunk()[:3] == (1, 5, 3)


@attack
def option_data_without_end(peer: Callable[[], Peer]) -> None:
    """Politely, each answered: until it is enough."""
    one = peer()
    one.greet()
    answered = 0
    with contextlib.suppress(ConnectionError):
        while answered < 1000:
            one.send(option(Opt.LIST_META_CONTEXT, bytes(1 << 20)))
            one.final_reply()
            answered += 1
    assert answered == 32


@attack
def garbage_after_the_end(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.greet()
    one.send(option(Opt.ABORT), random.Random(2).randbytes(50_000))
    assert one.hung_up()
    two = peer()
    two.go()
    two.pour(request(Cmd.DISC) + request(Cmd.READ, 0, 512) * 10_000)
    assert two.hung_up()


@attack
def names_that_are_not_there(peer: Callable[[], Peer]) -> None:
    for name in (b"other", b"\xff\xfe", b"x" * 4096, b"x" * 100_000, b"../../etc/passwd", b"\0"):
        one = peer()
        one.greet()
        one.send(option(Opt.GO, struct.pack(">I", len(name)) + name + b"\0\0"))
        assert one.final_reply() & 1 << 31
        one.send(option(Opt.EXPORT_NAME, name))
        assert one.hung_up()


@attack
def requests_before_transmission(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.greet()
    one.pour(request(Cmd.READ, 0, 4096) * 1000)
    assert one.hung_up()


@attack
def tls_that_is_not_there(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.greet()
    one.send(option(Opt.STARTTLS))
    assert one.final_reply() & 1 << 31
    one.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", random.Random(1).randbytes(500))
    assert one.hung_up()


# -- in transmission


@attack
def flood_of_large_reads(peer: Callable[[], Peer]) -> None:
    """Gigabytes are asked for and never read."""
    for _ in range(3):
        one = peer()
        one.go()
        one.pour(request(Cmd.READ, 0, 8 << 20) * 5000, 2)


@attack
def flood_of_small_reads(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.go()
    one.pour(request(Cmd.READ, 512, 1) * 60_000, 2)


@attack
def flood_of_block_status(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.go((Opt.STRUCTURED_REPLY, b""), (Opt.SET_META_CONTEXT, ALLOCATION))
    one.pour(request(Cmd.BLOCK_STATUS, 0, 8 << 20) * 40_000, 2)


@attack
def flood_of_flushes(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.go()
    one.pour(request(Cmd.FLUSH) * 40_000, 2)


@attack
def bad_magic_in_mid_stream(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.go()
    one.send(request(Cmd.READ, 0, 512))
    one.receive(16 + 512)
    one.send(b"\0" * 28)
    assert one.hung_up()


@attack
def extended_requests_unasked_for(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.go()
    one.send(extended(Cmd.READ, 0, 512))
    assert one.hung_up()


@attack
def unknown_commands(peer: Callable[[], Peer]) -> None:
    """Each is refused, and the stream stays in step."""
    one = peer()
    one.go()
    for kind in (8, 9, 100, 0x7FFF, 0xFFFF):
        one.send(request(kind, 0, 512, cookie=kind))
        assert struct.unpack(">IIQ", one.receive(16)) == (0x67446698, 22, kind)
    one.send(request(Cmd.READ, 0, 512, cookie=7))
    assert struct.unpack(">IIQ", one.receive(16 + 512)[:16]) == (0x67446698, 0, 7)


@attack
def every_flag(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.go()
    for kind in (Cmd.READ, Cmd.FLUSH, Cmd.CACHE):
        one.send(request(kind, 0, 512, cookie=kind, flags=0xFFFF))
        assert struct.unpack(">IIQ", one.receive(16)) == (0x67446698, 22, kind)


@attack
def offsets_that_wrap(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.go()
    for offset, length in (
        (0xFFFFFFFFFFFFFFFF, 1),
        (0xFFFFFFFFFFFFFE00, 1024),
        (1 << 63, 512),
        (0, 0xFFFFFFFF),
    ):
        one.send(request(Cmd.READ, offset, length, cookie=5))
        magic, error, cookie = struct.unpack(">IIQ", one.receive(16))
        assert (magic, cookie) == (0x67446698, 5)
        assert error in (22, 75)


@attack
def extended_lengths_that_wrap(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.go((Opt.EXTENDED_HEADERS, b""), (Opt.SET_META_CONTEXT, ALLOCATION))
    for kind in (Cmd.READ, Cmd.CACHE, Cmd.BLOCK_STATUS):
        one.send(extended(kind, 512, 0xFFFFFFFFFFFFFFFF, cookie=kind))
        magic, _, _, cookie, _, length = struct.unpack(">IHHQQQ", one.receive(32))
        assert (magic, cookie) == (0x6E8A278C, kind)
        one.receive(length)


@attack
def one_cookie_for_all(peer: Callable[[], Peer]) -> None:
    """With extended headers too, whose replies repeat the offsets of requests."""
    one = peer()
    one.go()
    one.send(request(Cmd.READ, 0, 512, cookie=9) * 100)
    for _ in range(100):
        assert struct.unpack(">IIQ", one.receive(16 + 512)[:16]) == (0x67446698, 0, 9)
    two = peer()
    two.go((Opt.EXTENDED_HEADERS, b""), (Opt.SET_META_CONTEXT, ALLOCATION))
    two.send(*(extended(Cmd.BLOCK_STATUS, 512 * at, 512, cookie=9) for at in range(100)))
    two.send(extended(Cmd.READ, 0, 512, cookie=10))
    done = [cookie for flags, _, cookie, _ in (two.extended_chunk() for _ in range(101)) if flags & 1]
    assert sorted(done) == [9] * 100 + [10]


@attack
def requests_about_nothing(peer: Callable[[], Peer]) -> None:
    """Length 0, at the beginning, at the end and beyond: answered, whatever the answer, and in step."""
    one = peer()
    one.go()
    for kind in (Cmd.READ, Cmd.CACHE, Cmd.BLOCK_STATUS, Cmd.FLUSH, Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES):
        for offset in (0, 8 << 20, 1 << 40, 0xFFFFFFFFFFFFFFFF):
            one.send(request(kind, offset, 0, cookie=offset))
            assert struct.unpack(">IxxxxQ", one.receive(16)) == (0x67446698, offset)
    two = peer()
    two.go((Opt.EXTENDED_HEADERS, b""), (Opt.SET_META_CONTEXT, ALLOCATION))
    for kind in (Cmd.READ, Cmd.CACHE, Cmd.BLOCK_STATUS, Cmd.FLUSH, Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES):
        for flags in (0, CmdFlag.PAYLOAD_LEN):
            two.send(extended(kind, 0, 0, cookie=kind, flags=flags))
            assert two.extended_chunk()[2] == kind


@attack
def payloads_nobody_asked_for(peer: Callable[[], Peer]) -> None:
    """Commands that have none come with one: it is skipped, and the command refused."""
    one = peer()
    one.go((Opt.EXTENDED_HEADERS, b""), (Opt.SET_META_CONTEXT, ALLOCATION))
    payload = extended(Cmd.DISC) * 200
    for kind in (Cmd.READ, Cmd.CACHE, Cmd.FLUSH, Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS, 0x1234):
        one.send(extended(kind, 0, len(payload), cookie=kind, flags=CmdFlag.PAYLOAD_LEN), payload)
        _, reply, cookie, data = one.extended_chunk()
        assert (reply, cookie) == (0x8001, kind)
        assert struct.unpack_from(">I", data)[0] in (1, 22)  # EPERM, EINVAL
    one.send(extended(Cmd.READ, 0, 512, cookie=99))
    assert one.extended_chunk()[2] == 99


@attack
def block_status_of_everything_and_more(peer: Callable[[], Peer]) -> None:
    """Effect lengths up to 2**64 - 1, in the header and in a payload."""
    one = peer()
    one.go((Opt.EXTENDED_HEADERS, b""), (Opt.SET_META_CONTEXT, ALLOCATION))
    for length in (1 << 63, (1 << 63) - 1, (1 << 64) - 1, (1 << 64) - 4096, 1 << 40):
        for offset in (0, 4096, 1 << 63):
            one.send(extended(Cmd.BLOCK_STATUS, offset, length, cookie=5))
            _, kind, cookie, _ = one.extended_chunk()
            assert cookie == 5 and kind in (6, 0x8001)
            head = extended(Cmd.BLOCK_STATUS, offset, 12, cookie=6, flags=CmdFlag.PAYLOAD_LEN)
            one.send(head, struct.pack(">QI", length, 0))
            _, kind, cookie, _ = one.extended_chunk()
            assert cookie == 6 and kind in (6, 0x8001)


@attack
def huge_block_status_payload(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.go((Opt.EXTENDED_HEADERS, b""), (Opt.SET_META_CONTEXT, ALLOCATION))
    one.send(extended(Cmd.BLOCK_STATUS, 0, 1 << 40, flags=1 << 5))
    one.pour(bytes(64 << 20))


@attack
def write_payload_is_drained(peer: Callable[[], Peer]) -> None:
    """Refused, as the export is read-only; then the connection goes on."""
    one = peer()
    one.go()
    one.send(request(Cmd.WRITE, 0, 4 << 20, cookie=1), bytes(4 << 20), request(Cmd.READ, 0, 512, cookie=2))
    assert struct.unpack(">IIQ", one.receive(16)) == (0x67446698, 1, 1)
    assert struct.unpack(">IIQ", one.receive(16)) == (0x67446698, 0, 2)


@attack
def oversize_write_payload(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.go()
    one.send(request(Cmd.WRITE, 0, 0xFFFFFFFF))
    one.pour(bytes(256 << 20))


@attack
def hanging_up_in_mid_payload(peer: Callable[[], Peer]) -> None:
    for _ in range(50):
        one = peer()
        one.go()
        one.send(request(Cmd.WRITE, 0, 1 << 20), bytes(1000))
        one.socket.close()


@attack
def hanging_up_before_the_replies(peer: Callable[[], Peer]) -> None:
    for _ in range(30):
        one = peer()
        one.go()
        one.send(request(Cmd.READ, 0, 1 << 20) * 20)
        # Not a polite end: the server learns of it while sending.
        one.reset()


@attack
def half_closed(peer: Callable[[], Peer]) -> None:
    """Nothing more to say, but the answers are wanted: the server gives them, then ends."""
    one = peer()
    one.go()
    one.send(request(Cmd.READ, 0, 1 << 20) * 4)
    one.socket.shutdown(socket.SHUT_WR)
    assert len(one.receive(4 * (16 + (1 << 20)))) == 4 * (16 + (1 << 20))
    assert one.hung_up()


@attack
def a_reader_slower_than_its_appetite(peer: Callable[[], Peer]) -> None:
    one = peer()
    one.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.go()
    one.pour(request(Cmd.READ, 0, 4 << 20) * 100, 1)
    for _ in range(20):
        one.receive(100)
        time.sleep(0.02)


@attack
def coming_and_going(peer: Callable[[], Peer]) -> None:
    for number in range(500):
        one = peer()
        if number % 2:
            one.receive(18)
        one.socket.close()


@attack
def many_connections(peer: Callable[[], Peer]) -> None:
    for _ in range(90):
        peer().go()


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(gallery: images.Gallery, name: str) -> None:
    case = gallery.get("v3-packed")
    content = gallery.content(case)
    with servers.nbdbm(case.path) as server, contextlib.ExitStack() as stack:
        early = client(server)
        assert early.pread(65536, 0) == content[:65536]
        files = server.open_files()

        def peer() -> Peer:
            one = Peer(server.connect(20))
            stack.callback(one.socket.close)
            return one

        ATTACKS[name](peer)
        assert server.alive(), server.output()

        late = client(server)
        started = time.monotonic()
        for offset in range(0, len(content), 1 << 20):
            for h in (early, late):
                assert h.pread(1 << 20, offset) == content[offset : offset + (1 << 20)]
        assert time.monotonic() - started < 10
        late.shutdown()

        assert server.peak_rss() < MEMORY, f"{server.peak_rss() >> 20} MiB"
        stack.close()
        deadline = time.monotonic() + 20
        while server.open_files() > files:
            assert time.monotonic() < deadline, f"{server.open_files()} files are open, {files} were"
            time.sleep(0.05)
        assert early.pread(512, 0) == content[:512]
        early.shutdown()
        assert "Traceback" not in server.output()
