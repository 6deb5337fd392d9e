"""The fast path beside its slow twin: every request goes both ways, and everything must come out the same.

A connection that is not given its socket (as under TLS) knows only the general way.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nbdbm.exports import Export
from nbdbm.image.blockfile import ThreadedFile
from nbdbm.image.image import Image, OpenOptions
from nbdbm.nbd.events import Event
from nbdbm.registry import ExportRegistry
from nbdbm.server import fastpath, holdings
from nbdbm.server.connection import NbdConnection
from nbdbm.server.fastpath import FastPath
from nbdbm.server.listener import prepare
from nbdbm.server.server import Server
from tests.server.rawclient import (
    CACHE,
    DISC,
    FLUSH,
    OPT_STRUCTURED,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
)
from tests.server.running import run, until
from tests.support import engine
from tests.support.marks import requires
from tests.support.qemu import SYSTEM

pytestmark = requires("qemu-img", "qemu-io")

OPT_EXTENDED = 11
FUA, NO_HOLE, DF = 1, 2, 4
KIB = 1024
SIZE = 2 * 1024 * KIB
BITMAPS = ("fine", "coarse", "off")

KINDS = {
    "plain": "cluster_size=64k",
    "small": "cluster_size=4k",
    "version-2": "compat=0.10",
    "extended": "cluster_size=64k,extended_l2=on",
    "backing": "cluster_size=64k",
    "packed": "cluster_size=64k",
}
STYLES = ("simple", "structured", "extended")


def make(place: Path, kind: str) -> Path:
    """Data, zeroes, nothing, and (by kind) compressed clusters, a backing file, subclusters; bitmaps."""
    path = place / f"{kind}.qcow2"
    if path.exists():
        return path
    words = ["-o", KINDS[kind]]
    if kind == "backing":
        base = place / "base.qcow2"
        SYSTEM.img("create", "-q", "-f", "qcow2", base, 1536 * KIB + 512)
        SYSTEM.io(base, "write -q -P 1 0 500k", "write -q -P 2 1M 500k")
        words += ["-b", str(base), "-F", "qcow2"]
    SYSTEM.img("create", "-q", "-f", "qcow2", *words, path, SIZE)
    rng = random.Random(kind)
    commands = []
    if kind == "packed":
        commands += [f"write -q -c -P {n + 1} {n * 64}k 64k" for n in range(0, 32, 3)]
    for number in range(16):
        length = 512 * rng.randrange(1, 250)
        offset = 512 * rng.randrange((SIZE - length) // 512)
        verb = "write -q -z" if number % 4 == 3 and kind != "version-2" else f"write -q -P {number + 1}"
        commands.append(f"{verb} {offset} {length}")
    SYSTEM.io(path, *commands)
    if kind != "version-2":
        for name, granularity in zip(BITMAPS, (512, 65536, 4096), strict=True):
            SYSTEM.img(
                "bitmap", "--add", "-g", granularity, *(["--disable"] if name == "off" else []), path, name
            )
    return path


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fastpath")


# -- one server without a listener


@asynccontextmanager
async def serving(path: Path, **options: Any) -> AsyncIterator[tuple[Server, Image]]:
    image = await Image.open(str(path), OpenOptions(**options))
    registry = ExportRegistry()
    registry.add(Export.of(image))
    server = Server(registry)
    try:
        yield server, image
    finally:
        server.hurry()
        await server.close()


async def connect(server: Server, style: str, *, fast: bool, buffer: int = 0) -> RawClient:
    """A client in transmission; ``buffer``: bytes of the server's send buffer."""
    ours, theirs = socket.socketpair()
    prepare(ours)
    if buffer:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)

    def factory() -> NbdConnection:
        made = NbdConnection(server, ours if fast else None)
        server._connections.add(made)
        server._empty.clear()
        return made

    await asyncio.get_running_loop().connect_accepted_socket(factory, ours)
    reader, writer = await asyncio.open_connection(sock=theirs, limit=1 << 16)
    client = RawClient(reader, writer)
    assert await reader.readexactly(18) == b"NBDMAGICIHAVEOPT\x00\x03"
    client.send(struct.pack(">I", 3))
    if style != "simple":
        await client.option(OPT_STRUCTURED if style == "structured" else OPT_EXTENDED)
    assert (await client.go())[-1][0] == 1
    return client


def only(server: Server) -> NbdConnection:
    (one,) = server._connections
    return one


@dataclass
class Request:
    """One request, whatever the style of its header."""

    command: int
    cookie: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    data: bytes = b""

    def pack(self, style: str) -> bytes:
        flags = self.flags
        if style == "extended":
            flags |= 1 << 5 if self.command == WRITE else 0
            head = (0x21E41C71, flags, self.command, self.cookie, self.offset, self.length)
            return struct.pack(">IHHQQQ", *head) + self.data
        head = (0x25609513, flags, self.command, self.cookie, self.offset, self.length)
        return struct.pack(">IHHQQI", *head) + self.data


@dataclass
class Answer:
    """What came for one cookie."""

    error: int = 0
    data: bytes = b""


class Replies:
    """Takes the server's bytes apart, strictly, and puts each read together again."""

    def __init__(self, style: str, requests: list[Request]) -> None:
        self.extended = style == "extended"
        self.asked = {request.cookie: request for request in requests}
        self.found: dict[int, Answer] = {}
        self._parts: dict[int, bytearray] = {}

    async def take(self, reader: asyncio.StreamReader) -> int:
        """Read one reply or chunk; return its cookie."""
        (magic,) = struct.unpack(">I", await reader.readexactly(4))
        if magic == 0x67446698:
            assert not self.extended
            error, cookie = struct.unpack(">IQ", await reader.readexactly(12))
            request = self.asked[cookie]
            length = request.length if request.command == READ and not error else 0
            self._done(cookie, Answer(error, await reader.readexactly(length)))
            return int(cookie)
        if self.extended:
            assert magic == 0x6E8A278C
            flags, kind, cookie, origin, length = struct.unpack(">HHQQQ", await reader.readexactly(28))
            assert origin == self.asked[cookie].offset
        else:
            assert magic == 0x668E33EF
            flags, kind, cookie, length = struct.unpack(">HHQI", await reader.readexactly(16))
        body = await reader.readexactly(length)
        request = self.asked[cookie]
        parts = self._parts.setdefault(cookie, bytearray())
        error = 0
        if kind == 1:
            (offset,) = struct.unpack_from(">Q", body)
            assert offset == request.offset + len(parts)
            parts += body[8:]
        elif kind == 2:
            offset, hole = struct.unpack(">QI", body)
            assert offset == request.offset + len(parts) and not request.flags & DF
            parts += bytes(hole)
        elif kind & 1 << 15:
            (error,) = struct.unpack_from(">I", body)
        else:
            assert kind == 0 and not body
        if flags & 1:
            self._done(cookie, Answer(error, bytes(self._parts.pop(cookie))))
        return int(cookie)

    def _done(self, cookie: int, answer: Answer) -> None:
        assert cookie not in self.found
        if self.asked[cookie].command == READ and not answer.error:
            assert len(answer.data) == self.asked[cookie].length
        self.found[cookie] = answer


@dataclass
class Outcome:
    """All that a client, or whoever reads the disk afterwards, could tell apart."""

    answers: dict[int, Answer]
    disk: bytes
    dirty: dict[str, list[tuple[int, bool]]]
    calls: list[tuple[str, int, int]] = field(default_factory=list)


async def outcome(replies: Replies, image: Image) -> Outcome:
    dirty = {}
    for bitmap in image.tracker.usable():
        dirty[bitmap.name] = list((await image.bits(bitmap.name)).runs(0, image.size))
    return Outcome(replies.found, await engine.read_all(image), dirty)


@contextmanager
def calls_of_files() -> Iterator[list[tuple[str, int, int]]]:
    """What is written and synced, in order."""
    calls: list[tuple[str, int, int]] = []
    pwrite, sync = ThreadedFile._pwrite, ThreadedFile.sync

    def spy_pwrite(self: ThreadedFile, offset: int, view: memoryview) -> None:
        calls.append(("pwrite", offset, len(view)))
        pwrite(self, offset, view)

    async def spy_sync(self: ThreadedFile) -> None:
        calls.append(("sync", 0, 0))
        await sync(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThreadedFile, "_pwrite", spy_pwrite)
        patch.setattr(ThreadedFile, "sync", spy_sync)
        yield calls


@contextmanager
def answered() -> Iterator[list[int]]:
    """How many events each turn of the fast path has answered."""
    counts: list[int] = []
    serve = FastPath.serve

    def spy(self: FastPath, events: list[Event], most: int) -> tuple[list[Event], list[Event], bytes]:
        left, rest, unsent = serve(self, events, most)
        counts.append(len(events) - len(left) - len(rest))
        return left, rest, unsent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastPath, "serve", spy)
        yield counts


# -- requests


OFFSETS = st.integers(0, SIZE - 1) | st.sampled_from([0, 4096, 65535, 65536, 1 << 20, SIZE - 512, SIZE - 1])
LENGTHS = st.sampled_from([1, 512, 4096, 5000, 65536, 65537, 140_000])
COMMANDS = st.sampled_from([READ, READ, READ, WRITE, WRITE, WRITE, FLUSH, TRIM, WRITE_ZEROES, CACHE, 77])


@st.composite
def request(draw: st.DrawFn, cookie: int, low: int = 0, high: int = SIZE) -> Request:
    """Any request about [low, high), some of them to be refused."""
    command = draw(COMMANDS)
    if command == FLUSH:
        return Request(FLUSH, cookie)
    offset = low + draw(OFFSETS) % (high - low)
    length = draw(LENGTHS)
    if draw(st.integers(0, 9)) or high != SIZE:
        length = min(length, high - offset)  # else it may reach past the end of the disk
    flags = draw(st.sampled_from([0, 0, 0, FUA, DF if command == READ else NO_HOLE]))
    data = b""
    if command == WRITE:
        data = random.Random(cookie).randbytes(8) * (length // 8 + 1)
    return Request(command, cookie, offset, length, flags, data[:length])


# -- both ways, request by request


async def one_by_one(
    path: Path, style: str, requests: list[Request], *, fast: bool, **options: Any
) -> Outcome:
    with calls_of_files() as calls:
        async with serving(path, **options) as (server, image):
            calls.clear()  # what opening did
            client = await connect(server, style, fast=fast)
            replies = Replies(style, requests)
            for each in requests:
                client.send(each.pack(style))
                while each.cookie not in replies.found:
                    await replies.take(client.reader)
            made = list(calls)
            origins = only(server)._protocol._origins
            assert origins is None or not origins._held
            result = await outcome(replies, image)
            result.calls = made
            await client.close()
            return result


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_by_one(place: Path, kind: str, style: str, data: st.DataObject) -> None:
    """Same bytes, errors, bitmap bits; same writes to the file, and synced at the same moments."""
    writable = data.draw(st.sampled_from([True, True, False]))
    requests = [data.draw(request(cookie)) for cookie in range(12)]
    # Again: now the tables are cached.
    requests += [Request(READ, 100 + n, r.offset, min(r.length, SIZE - r.offset)) for n, r in
                 enumerate(requests) if r.length and r.command != 77]  # fmt: skip
    origin = make(place, kind)
    results = []
    for fast in (False, True):
        path = origin
        if writable:
            path = place / "copy.qcow2"
            shutil.copy(origin, path)
        results.append(asyncio.run(one_by_one(path, style, requests, fast=fast, read_only=not writable)))
    slow, quick = results
    assert quick.answers == slow.answers
    assert quick.dirty == slow.dirty
    assert quick.disk == slow.disk
    assert quick.calls == slow.calls


# -- streams, split anywhere


SLOT = 128 * KIB
"""Bytes; each request of a stream has its own, since the order of requests in flight is nobody's."""


async def stream(
    path: Path, style: str, requests: list[Request], cuts: list[int], *, fast: bool, buffer: int = 0
) -> Outcome:
    """Send everything, cut into pieces, with a DISC behind it."""
    data = b"".join(each.pack(style) for each in [*requests, Request(DISC, 0)])
    cuts = sorted({cut % len(data) for cut in cuts} | {0, len(data)})
    async with serving(path, read_only=False) as (server, image):
        client = await connect(server, style, fast=fast, buffer=buffer)
        one = only(server)

        async def send() -> None:
            for start, end in pairwise(cuts):
                client.send(data[start:end])
                await client.writer.drain()
                for _ in range(3):  # let the server have this piece alone
                    await asyncio.sleep(0)

        sending = asyncio.create_task(send())
        replies = Replies(style, requests)
        while len(replies.found) < len(requests):
            await replies.take(client.reader)
        await sending
        assert await client.ended() == b""
        origins = one._protocol._origins
        assert origins is None or not origins._held
        assert not server.budget.used
        result = await outcome(replies, image)
        await client.close()
        return result


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(data=None)
@given(data=st.data())
def test_streams(place: Path, style: str, data: st.DataObject | None) -> None:
    if data is None:
        # A write and two reads, cut behind every byte.
        kind, buffer = "plain", 0
        requests = [Request(WRITE, 1, 100, 30, 0, b"x" * 30), Request(READ, 2, SLOT, 20)]
        requests.append(Request(READ, 3, 2 * SLOT, 4096))
        cuts = list(range(200))
    else:
        kind = data.draw(st.sampled_from(list(KINDS)))
        buffer = data.draw(st.sampled_from([0, 0, 4096]))
        slots = data.draw(st.permutations(range(SIZE // SLOT)))
        requests = [data.draw(request(n, slot * SLOT, (slot + 1) * SLOT)) for n, slot in enumerate(slots)]
        cuts = data.draw(st.lists(st.integers(0, 1 << 20), max_size=30))
    results = []
    for fast in (False, True):
        path = place / "copy.qcow2"
        shutil.copy(make(place, kind), path)
        results.append(
            asyncio.run(stream(path, style, requests, cuts, fast=fast, buffer=buffer if fast else 0))
        )
    slow, quick = results
    assert quick.answers == slow.answers
    assert quick.dirty == slow.dirty
    assert quick.disk == slow.disk


async def first_data(image: Image) -> int:
    """An offset that is not zero."""
    content = await engine.read_all(image)
    return len(content) - len(content.lstrip(b"\0"))


# -- what goes the fast way, and what does not


def fast_session(path: Path, work: Callable[[Server, Image], Any], **options: Any) -> None:
    async def main() -> None:
        async with serving(path, **options) as (server, image):
            # Tables into the cache: only then anything can be answered at once.
            await engine.read_all(image)
            await work(server, image)

    run(main)


def test_a_batch_is_one_turn_and_one_send(place: Path) -> None:
    async def work(server: Server, image: Image) -> None:
        client = await connect(server, "simple", fast=True)
        requests = [Request(READ, n, n * 4096, 4096) for n in range(64)]
        replies = Replies("simple", requests)
        with answered() as counts:
            client.send(b"".join(each.pack("simple") for each in requests))
            for each in requests:
                # Nothing overtakes: they were answered in order.
                assert await replies.take(client.reader) == each.cookie
        assert counts == [64]
        assert not server.budget.used
        await client.close()

    fast_session(make(place, "plain"), work)


def test_neighbours_are_served_meanwhile(place: Path) -> None:
    """One turn has a limit, however much a client asks for at once."""

    async def work(server: Server, image: Image) -> None:
        client = await connect(server, "simple", fast=True)
        requests = [Request(READ, n, n % 32 * 65536, 65536) for n in range(1000)]
        replies = Replies("simple", requests)
        with answered() as counts:
            client.send(b"".join(each.pack("simple") for each in requests))
            while len(replies.found) < len(requests):
                await replies.take(client.reader)
        assert max(counts) * 65536 <= fastpath.TURN_BYTES
        assert {len(answer.data) for answer in replies.found.values()} == {65536}
        await client.close()

    fast_session(make(place, "plain"), work)


def test_a_reader_that_stops(place: Path) -> None:
    """Replies wait in little memory, and come complete when the client goes on."""

    async def work(server: Server, image: Image) -> None:
        content = await engine.read_all(image)
        client = await connect(server, "extended", fast=True, buffer=4096)
        requests = [Request(READ, n, n * 997 % (SIZE - 16384), 16384) for n in range(600)]
        replies = Replies("extended", requests)
        one = only(server)
        client.send(b"".join(each.pack("extended") for each in requests))
        await until(lambda: one._outbox.blocked)
        for _ in range(50):
            await asyncio.sleep(0)
        held = server.budget.used + sum(map(len, one._outbox.unsent))
        assert held < holdings.MAX_BYTES + 2 * fastpath.ARENA
        while len(replies.found) < len(requests):
            await replies.take(client.reader)
        for each in requests:
            assert replies.found[each.cookie].data == content[each.offset : each.offset + each.length]
        await until(lambda: not server.budget.used)
        await client.close()

    fast_session(make(place, "plain"), work)


def test_two_connections_share_the_arena(place: Path) -> None:
    """What one could not send is not overwritten by the other's replies."""

    async def work(server: Server, image: Image) -> None:
        content = await engine.read_all(image)
        clients = [await connect(server, "simple", fast=True, buffer=4096) for _ in range(2)]
        requests = [Request(READ, n, n * 4096, 4096) for n in range(100)]
        for client in clients:
            client.send(b"".join(each.pack("simple") for each in requests))
        for client in clients:
            replies = Replies("simple", requests)
            while len(replies.found) < len(requests):
                await replies.take(client.reader)
            for each in requests:
                assert replies.found[each.cookie].data == content[each.offset : each.offset + 4096]
            await client.close()

    fast_session(make(place, "plain"), work)


@pytest.mark.parametrize("how", ["close", "abort"])
def test_a_client_that_leaves_amid_a_batch(place: Path, how: str) -> None:
    async def work(server: Server, image: Image) -> None:
        client = await connect(server, "simple", fast=True, buffer=4096)
        one = only(server)
        requests = [Request(READ, n, n % 64 * 4096, 65536) for n in range(200)]
        client.send(b"".join(each.pack("simple") for each in requests))
        await until(lambda: one._outbox.blocked)
        if how == "close":
            await client.close()
        else:
            client.writer.transport.abort()
        await until(lambda: not server._connections)
        assert not server.budget.used

    fast_session(make(place, "plain"), work)


def test_the_client_shuts_its_sending_half(place: Path) -> None:
    async def work(server: Server, image: Image) -> None:
        client = await connect(server, "simple", fast=True, buffer=4096)
        requests = [Request(READ, n, n * 4096, 65536) for n in range(60)]
        client.send(b"".join(each.pack("simple") for each in requests))
        client.writer.write_eof()
        replies = Replies("simple", requests)
        while len(replies.found) < len(requests):
            await replies.take(client.reader)
        assert await client.ended() == b""
        await client.close()

    fast_session(make(place, "plain"), work)


def test_shutdown_with_replies_unsent(place: Path) -> None:
    """What was accepted is answered: with data if it was carried out, else with ESHUTDOWN."""

    async def work(server: Server, image: Image) -> None:
        client = await connect(server, "structured", fast=True, buffer=4096)
        one = only(server)
        requests = [Request(READ, n, n * 4096, 65536) for n in range(60)]
        client.send(b"".join(each.pack("structured") for each in requests))
        await until(lambda: one._outbox.blocked)
        closing = asyncio.create_task(server.close())
        replies = Replies("structured", requests)
        while len(replies.found) < len(requests):
            await replies.take(client.reader)
        assert {answer.error for answer in replies.found.values()} <= {0, 108}
        assert await client.ended() == b""
        await client.close()
        await closing

    fast_session(make(place, "plain"), work)


def test_garbage_behind_requests(place: Path) -> None:
    """They are answered, and the connection ends then."""

    async def work(server: Server, image: Image) -> None:
        client = await connect(server, "simple", fast=True)
        requests = [Request(READ, n, n * 4096, 4096) for n in range(5)]
        client.send(b"".join(each.pack("simple") for each in requests) + b"garbage" * 10)
        replies = Replies("simple", requests)
        while len(replies.found) < len(requests):
            await replies.take(client.reader)
        assert await client.ended() == b""
        await client.close()

    fast_session(make(place, "plain"), work)


def test_a_slow_request_is_overtaken(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that misses the page cache does not hold up those that hit it."""

    async def work(server: Server, image: Image) -> None:
        gate = asyncio.Event()
        read_cached, pread_into = ThreadedFile.read_now, ThreadedFile.pread_into

        def missing(self: ThreadedFile, view: memoryview, offset: int) -> int:
            return 0 if len(view) == 1234 else read_cached(self, view, offset)

        async def slowly(self: ThreadedFile, view: memoryview, offset: int) -> None:
            await gate.wait()
            await pread_into(self, view, offset)

        monkeypatch.setattr(ThreadedFile, "read_now", missing)
        monkeypatch.setattr(ThreadedFile, "pread_into", slowly)
        client = await connect(server, "extended", fast=True)
        data = await first_data(image)
        requests = [Request(READ, 0, data, 1234), *(Request(READ, n, n * 4096, 4096) for n in range(1, 9))]
        replies = Replies("extended", requests)
        client.send(b"".join(each.pack("extended") for each in requests))
        for cookie in range(1, 9):
            assert await replies.take(client.reader) == cookie
        gate.set()
        assert await replies.take(client.reader) == 0
        origins = only(server)._protocol._origins
        assert origins is not None and not origins._held
        await client.close()

    fast_session(make(place, "plain"), work)


def test_one_cookie_for_several_requests(place: Path) -> None:
    """A client should not, but may: every reply repeats the offset of a request of this cookie."""

    async def work(server: Server, image: Image) -> None:
        client = await connect(server, "extended", fast=True)
        at = await first_data(image) // 65536 * 65536
        offsets = [at, at + 512, at]
        client.send(b"".join(Request(READ, 7, offset, 512).pack("extended") for offset in offsets))
        seen = []
        for _ in range(3):
            head = await client.reader.readexactly(32)
            seen.append(struct.unpack(">IHHQQQ", head)[4])
            await client.reader.readexactly(8 + 512)
        assert sorted(seen) == [at, at, at + 512]
        origins = only(server)._protocol._origins
        assert origins is not None and not origins._held
        await client.close()

    fast_session(make(place, "plain"), work)


def test_a_failed_write_comes_again_with_its_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place / "failing.qcow2"
    shutil.copy(make(place, "plain"), path)

    async def work(server: Server, image: Image) -> None:
        client = await connect(server, "simple", fast=True)
        data = await first_data(image)

        def full(self: ThreadedFile, offset: int, view: memoryview) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(ThreadedFile, "_pwrite", full)
            requests = [Request(WRITE, 1, data, 3, 0, b"abc")]
            client.send(requests[0].pack("simple"))
            replies = Replies("simple", requests)
            await replies.take(client.reader)
            assert replies.found[1].error == 28
        # It counts as written: nobody knows how far it came.
        for name in ("fine", "coarse"):
            assert (await image.bits(name)).get(data)
        await client.close()

    fast_session(path, work, read_only=False)
