"""The same bytes to nbdbm and to QEMU 10's qemu-nbd, and the same answers.

Each conversation ends with a request that both answer, or with the end of the connection; so nobody waits.
Where the answers differ on purpose (docs/interop.md), a test names both.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from nbdbm.nbd.constants import Cmd, CmdFlag, Info, NbdErrno, Opt, Rep
from tests.interop.hostile import Peer, extended, option, queries, request
from tests.support import qemu, servers
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "qemu-nbd", "newer")]

MIB = 1 << 20
SIZE = 64 * MIB
END = 1 << 64
Answers = list[tuple[object, ...]]
Pair = tuple[servers.Server, servers.Server]

SIMPLE: list[tuple[int, bytes]] = []
STRUCTURED = [
    (Opt.STRUCTURED_REPLY, b""),
    (Opt.SET_META_CONTEXT, queries(b"base:allocation", b"qemu:dirty-bitmap:b")),
]
EXTENDED = [(Opt.EXTENDED_HEADERS, b""), STRUCTURED[1]]


def make(path: Path) -> Path:
    qemu.SYSTEM.img("create", "-q", "-f", "qcow2", path, SIZE)
    qemu.SYSTEM.io(path, "write -q -P 1 0 1M", "write -q -z 4M 1M")
    qemu.SYSTEM.img("bitmap", "--add", path, "b")
    qemu.SYSTEM.io(path, "write -q -P 2 8M 64k")
    return path


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both serve the same image."""
    path = make(tmp_path_factory.mktemp("wire") / "disk.qcow2")
    with servers.nbdbm(path) as mine, servers.qemu_nbd(path, bitmaps=["b"], tools=qemu.newer()) as its:
        yield mine, its


@pytest.fixture(scope="module")
def writable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Each serves an image of its own."""
    place = tmp_path_factory.mktemp("wire")
    ours, theirs = make(place / "ours.qcow2"), make(place / "theirs.qcow2")
    with (
        servers.nbdbm(ours, writable=True) as mine,
        servers.qemu_nbd(theirs, "--discard=unmap", bitmaps=["b"], tools=qemu.newer(), writable=True) as its,
    ):
        yield mine, its


# -- the handshake


def info(name: bytes = b"", *wanted: int, count: int | None = None) -> bytes:
    number = len(wanted) if count is None else count
    return struct.pack(f">I{len(name)}sH{len(wanted)}H", len(name), name, number, *wanted)


OPTIONS: dict[str, bytes] = {
    "list": option(Opt.LIST),
    "list_with_data": option(Opt.LIST, b"x"),
    "list_with_a_mib_of_data": option(Opt.LIST, bytes(MIB + 1)),
    "unknown": option(99),
    "unknown_with_data": option(0xFFFFFFFF, bytes(100_000)),
    "peek_export": option(Opt.PEEK_EXPORT),
    "starttls": option(Opt.STARTTLS),
    "starttls_with_data": option(Opt.STARTTLS, b"x"),
    "info": option(Opt.INFO, info()),
    "info_named": option(Opt.INFO, info(b"", Info.NAME, Info.NAME, 77, Info.EXPORT)),
    "info_unknown_export": option(Opt.INFO, info(b"no")),
    "info_cut": option(Opt.INFO, info()[:5]),
    "info_too_few_requests": option(Opt.INFO, info(b"", 3, count=2)),
    "info_too_many_requests": option(Opt.INFO, info(b"", 3, 3, count=1)),
    "info_trailing_byte": option(Opt.INFO, info() + b"x"),
    "info_of_a_name_without_end": option(Opt.INFO, struct.pack(">IH", 0xFFFFFFFF, 0)),
    "info_of_a_nul": option(Opt.INFO, info(b"\0")),
    "info_of_4096_bytes": option(Opt.INFO, info(b"n" * 4096)),
    "info_of_4097_bytes": option(Opt.INFO, info(b"n" * 4097)),
    "go_unknown_export": option(Opt.GO, info(b"no")),
    "structured_twice": option(Opt.STRUCTURED_REPLY) * 2,
    "structured_with_data": option(Opt.STRUCTURED_REPLY, b"x"),
    "extended_twice": option(Opt.EXTENDED_HEADERS) * 2,
    "extended_then_structured": option(Opt.EXTENDED_HEADERS) + option(Opt.STRUCTURED_REPLY),
    "extended_info": option(Opt.EXTENDED_HEADERS) + option(Opt.INFO, info()),
    "list_contexts": option(Opt.LIST_META_CONTEXT, queries()),
    "set_before_structured": option(Opt.SET_META_CONTEXT, queries(b"base:allocation")),
    "set_for_nobody": option(Opt.STRUCTURED_REPLY)
    + option(Opt.SET_META_CONTEXT, struct.pack(">I2sI", 2, b"no", 0)),
    **{
        f"{name}_{query.decode()}": option(Opt.STRUCTURED_REPLY) + option(code, queries(query))
        for name, code in (("list", Opt.LIST_META_CONTEXT), ("set", Opt.SET_META_CONTEXT))
        for query in (b"", b":", b"x:y", b"base", b"base:", b"base:x", b"qemu:", b"qemu:dirty-bitmap:")
    },
    "queries_without_end": option(Opt.STRUCTURED_REPLY)
    + option(Opt.SET_META_CONTEXT, struct.pack(">II", 0, 0xFFFFFFFF)),
    "query_cut": option(Opt.STRUCTURED_REPLY)
    + option(Opt.SET_META_CONTEXT, struct.pack(">III", 0, 1, 6) + b"base:"),
}


def haggle(server: servers.Server, sent: bytes) -> Answers:
    """The replies to ``sent``; NBD_OPT_ABORT's is the last."""
    with server.connect() as connected:
        peer = Peer(connected)
        peer.greet()
        peer.send(sent + option(Opt.ABORT))
        found: Answers = []
        while not found or found[-1][0] != Opt.ABORT:
            code, kind, data = peer.reply()
            if kind & 1 << 31 or data[:2] == struct.pack(">H", Info.BLOCK_SIZE):
                data = b""  # words, and the preferred size, are each server's own
            found.append((code, kind, data))
        return found


@pytest.mark.parametrize("name", OPTIONS)
def test_options(read_only: Pair, name: str) -> None:
    ours, theirs = (haggle(server, OPTIONS[name]) for server in read_only)
    assert ours[-1][1] == Rep.ACK and sorted(ours, key=str) == sorted(theirs, key=str)


@pytest.mark.parametrize("flags", [4, 7, 0x80000003])
def test_unknown_client_flags(read_only: Pair, flags: int) -> None:
    for server in read_only:
        with server.connect() as connected:
            peer = Peer(connected)
            peer.greet(flags)
            assert peer.hung_up()


# -- transmission


def converse(server: servers.Server, options: list[tuple[int, bytes]], sent: bytes, length: int) -> Answers:
    """What answers cookie 1, whose simple reply has ``length`` bytes; a FLUSH of cookie 2 shows that the
    stream is in step."""
    wide = options is EXTENDED
    with server.connect(timeout=20) as connected:
        peer = Peer(connected)
        peer.go(*options)
        peer.send(sent, (extended if wide else request)(Cmd.FLUSH, cookie=2))
        found: Answers = []
        covered: list[tuple[int, int]] = []
        for _ in range(2):
            done = False
            while not done:
                magic = peer.receive(4)
                if magic == b"\x67\x44\x66\x98":
                    error, cookie = struct.unpack(">IQ", peer.receive(12))
                    done = True
                    data = peer.receive(length) if cookie == 1 and not error else b""
                    found.append((cookie, error, data))
                    continue
                form = ">HHQQQ" if wide else ">HHQI"
                flags, kind, cookie, *_, size = struct.unpack(form, peer.receive(struct.calcsize(form)))
                data = peer.receive(size)
                done = bool(flags & 1)
                if kind in (1, 2):
                    at = struct.unpack_from(">Q", data)[0]
                    covered.append((at, size - 8 if kind == 1 else struct.unpack_from(">I", data, 8)[0]))
                else:
                    # Of an error its number, not its words. Context ids are each server's own: sorted out.
                    found.append((cookie, kind, data[:4] if kind & 1 << 15 else data[4:]))
        # However the content was cut: it must be contiguous.
        covered.sort()
        for (at, size), (after, _) in pairwise(covered):
            assert at + size == after
        if covered:
            found.append((covered[0][0], sum(size for _, size in covered)))
        return sorted(found, key=str)


RANGES: dict[str, tuple[int, int]] = {
    "whole_sector": (0, 512),
    "nothing": (0, 0),
    "nothing_at_the_end": (SIZE, 0),
    "nothing_past_the_end": (SIZE + 1, 0),
    "last_byte": (SIZE - 1, 1),
    "past_the_end": (SIZE - 1, 2),
    "at_2_63": (1 << 63, 512),
    "wraps": (END - 512, 512),
    "odd": (4 * MIB - 1, MIB + 3),
    "mixed": (0, 16 * MIB),
}
COMMANDS = [Cmd.READ, Cmd.FLUSH, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS, Cmd.RESIZE]
READING = (Cmd.READ, Cmd.CACHE, Cmd.BLOCK_STATUS)
"""What may meet what other tests have written would depend on their order."""

FLAGS = [CmdFlag.FUA, CmdFlag.NO_HOLE, CmdFlag.DF, CmdFlag.REQ_ONE, CmdFlag.FAST_ZERO, 1 << 6, 1 << 15]
STYLES = pytest.mark.parametrize(
    "options", [SIMPLE, STRUCTURED, EXTENDED], ids=["simple", "structured", "extended"]
)


def as_qemu_says(answers: Answers) -> Answers:
    """``answers`` with QEMU's error where the specification wants another one past the end."""
    nospc, inval = (struct.pack(">I", number) for number in (NbdErrno.ENOSPC, NbdErrno.EINVAL))
    swap = {NbdErrno.ENOSPC: NbdErrno.EINVAL, nospc: inval}
    return sorted((tuple(swap.get(part, part) for part in each) for each in answers), key=str)  # type: ignore[call-overload]


@STYLES
@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS), ids=lambda command: command.name.lower())
def test_ranges(read_only: Pair, writable: Pair, options: list[tuple[int, bytes]], command: Cmd) -> None:
    pair = read_only if command in READING else writable
    form = extended if options is EXTENDED else request
    for name, (offset, length) in RANGES.items():
        sent = form(command, offset, length, cookie=1)
        size = length if command == Cmd.READ else 0
        ours, theirs = (converse(server, options, sent, size) for server in pair)
        if command == Cmd.WRITE_ZEROES:
            ours = as_qemu_says(ours)
        assert ours == theirs, name


@STYLES
@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS), ids=lambda command: command.name.lower())
def test_flags(read_only: Pair, writable: Pair, options: list[tuple[int, bytes]], command: Cmd) -> None:
    pair = read_only if command in READING else writable
    form = extended if options is EXTENDED else request
    for flag in FLAGS:
        sent = form(command, 32 * MIB, 65536, cookie=1, flags=flag)
        ours, theirs = (converse(server, options, sent, 65536 * (command == Cmd.READ)) for server in pair)
        assert ours == theirs, flag


PAYLOADS: dict[str, bytes] = {
    "one_context": struct.pack(">QI", MIB, 0),
    "twice_the_same": struct.pack(">QII", MIB, 0, 0),
    "unknown": struct.pack(">QI", MIB, 77),
    "none": struct.pack(">Q", MIB),
    "cut": struct.pack(">I", MIB),
    "odd": struct.pack(">QI", MIB, 0) + b"x",
    "past_the_end": struct.pack(">QI", SIZE + 1, 0),
    "about_nothing": struct.pack(">QI", 0, 0),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_block_status_with_a_payload(read_only: Pair, name: str) -> None:
    payload = PAYLOADS[name]
    sent = extended(Cmd.BLOCK_STATUS, 0, len(payload), cookie=1, flags=CmdFlag.PAYLOAD_LEN) + payload
    ours, theirs = (converse(server, EXTENDED, sent, 0) for server in read_only)
    assert ours == theirs


@pytest.mark.parametrize("command", dict.fromkeys([*COMMANDS, Cmd.WRITE]), ids=lambda command: command.name)
def test_who_may_only_read(read_only: Pair, command: Cmd) -> None:
    """The payload of a refused WRITE is not taken for requests. QEMU says EINVAL, the specification EPERM."""
    payload = bytes(4096) if command == Cmd.WRITE else b""
    sent = request(command, 0, 4096, cookie=1) + payload
    size = 4096 if command == Cmd.READ else 0
    ours, theirs = (converse(server, SIMPLE, sent, size) for server in read_only)
    if command in (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES):
        assert (1, NbdErrno.EPERM, b"") in ours and (1, NbdErrno.EINVAL, b"") in theirs
    else:
        assert ours == theirs


def test_the_images_are_alike_in_the_end(tmp_path: Path) -> None:
    """The same writes leave the same disk."""
    for name in ("ours", "theirs"):
        qemu.SYSTEM.img("create", "-q", "-f", "qcow2", tmp_path / name, SIZE)
    writes = [(0, 512), (511, 3), (65535, 2), (MIB - 1, 2 * MIB), (SIZE - 1, 1), (SIZE - 1, 2), (1 << 63, 1)]
    with (
        servers.nbdbm(tmp_path / "ours", writable=True) as mine,
        servers.qemu_nbd(tmp_path / "theirs", tools=qemu.newer(), writable=True) as its,
    ):
        for fill, (offset, length) in enumerate(writes, 1):
            sent = request(Cmd.WRITE, offset, length, cookie=1) + bytes([fill]) * length
            ours, theirs = (converse(server, SIMPLE, sent, 0) for server in (mine, its))
            assert as_qemu_says(ours) == theirs
    qemu.SYSTEM.img("compare", "-f", "qcow2", "-F", "qcow2", tmp_path / "ours", tmp_path / "theirs")
