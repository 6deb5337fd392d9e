"""The fast path among others: its turns, its neighbours, clients that stop or leave, what is overtaken."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdbm.image.blockfile import ThreadedFile
from nbdbm.image.image import Image
from nbdbm.nbd.events import Event
from nbdbm.server import fastpath, holdings
from nbdbm.server.fastpath import FastPath
from nbdbm.server.server import Server
from tests.server.rawclient import READ, WRITE
from tests.server.running import run, until
from tests.server.twoways import SIZE, Replies, Request, connect, make, only, serving
from tests.support import engine
from tests.support.marks import requires

pytestmark = requires("qemu-img", "qemu-io")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fastpath")


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


async def first_data(image: Image) -> int:
    """An offset that is not zero."""
    content = await engine.read_all(image)
    return len(content) - len(content.lstrip(b"\0"))


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
        await until(lambda: not server.connections)
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

        def full(fd: int, view: memoryview, offset: int) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
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
