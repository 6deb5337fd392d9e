"""Reads that wait for their data: overtaken, answered with what is there then, counted, and never lost.

The disk is in the test's hand: what is missing comes when it says so. The fast path's other tests, and one
here, have the real one.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdbm.image.blockfile import ThreadedFile
from nbdbm.image.image import Image
from nbdbm.image.ring import CACHED, CAME, FAILED, Told
from nbdbm.nbd.events import Read
from nbdbm.server import connection, holdings, misses
from nbdbm.server.fastpath import CHEAPER, FastPath
from nbdbm.server.server import Server
from tests.server.rawclient import READ, TRIM, WRITE, WRITE_ZEROES, RawClient
from tests.server.running import run, until
from tests.server.test_busypoll import Counting
from tests.server.test_fastpath import (
    KIB,
    KINDS,
    SIZE,
    Replies,
    Request,
    connect,
    make,
    only,
    serving,
    stream,
)
from tests.support import engine
from tests.support.marks import requires
from tests.support.qemu import SYSTEM

MIB = 1 << 20
pytestmark = requires("qemu-img", "qemu-io")


class SlowDisk:
    """Everything misses the page cache until the test lets it come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: list[tuple[Told, object]] = []
        self.missing = True
        read_now = ThreadedFile.read_now

        def missing(file: ThreadedFile, view: memoryview, offset: int) -> int:
            return 0 if self.missing else read_now(file, view, offset)

        def bring(file: ThreadedFile, offset: int, length: int, told: Told, about: object) -> bool:
            self.waiting.append((told, about))
            return True

        monkeypatch.setattr(ThreadedFile, "read_now", missing)
        monkeypatch.setattr(ThreadedFile, "bring", bring)

    def come(self, what: int = CAME, count: int = 1 << 30) -> None:
        """The first ``count`` of those that wait are told; what comes from now on does not miss."""
        self.missing = False
        waiting, self.waiting = self.waiting[:count], self.waiting[count:]
        for told, about in waiting:
            told(about, what)


Work = Callable[[Server, Image, SlowDisk, bytes], Coroutine[Any, Any, None]]


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Work], None]]:
    """Runs something on a server of a writable image, of data only, whose tables are cached."""

    def session(work: Work) -> None:
        path = tmp_path / "disk.qcow2"
        SYSTEM.img("create", "-q", "-f", "qcow2", path, SIZE)
        SYSTEM.io(path, *(f"write -q -P {n + 1} {n * 64}k 64k" for n in range(SIZE // (64 * KIB))))

        async def main() -> None:
            async with serving(path, read_only=False) as (server, image):
                content = await engine.read_all(image)
                disk = SlowDisk(monkeypatch)
                try:
                    await work(server, image, disk, content)
                finally:
                    disk.come(FAILED)  # a failed test ends, too

        run(main)

    yield session


async def ask(client: RawClient, requests: list[Request], style: str = "simple") -> Replies:
    client.send(b"".join(each.pack(style) for each in requests))
    return Replies(style, requests)


async def all_of(client: RawClient, replies: Replies) -> None:
    while len(replies.found) < len(replies.asked):
        await replies.take(client.reader)


def spread(count: int, *, length: int = 4096) -> list[Request]:
    return [Request(READ, n, n * 5000, length) for n in range(count)]


def right(replies: Replies, content: bytes) -> None:
    for cookie, request in replies.asked.items():
        assert replies.found[cookie].error == 0
        assert replies.found[cookie].data == content[request.offset :][: request.length]


@pytest.mark.parametrize("style", ["simple", "structured", "extended"])
@pytest.mark.parametrize("what", [CAME, CACHED, FAILED])
def test_they_wait_without_a_task_and_hold_up_nobody(
    session: Callable[[Work], None], style: str, what: int
) -> None:
    async def work(server: Server, image: Image, disk: SlowDisk, content: bytes) -> None:
        client = await connect(server, style, fast=True)
        one = only(server)
        replies = await ask(client, spread(100), style)
        await until(lambda: len(disk.waiting) == 100)
        assert one.running == 100 and not one._backlog._tasks
        assert 0 < one.held == server.budget.used <= 100 * KIB
        # Another one's hits are answered meanwhile.
        disk.missing = False
        other = await connect(server, style, fast=True)
        hits = await ask(other, spread(100), style)
        await all_of(other, hits)
        right(hits, content)
        assert not replies.found and len(disk.waiting) == 100
        disk.come(what)
        await all_of(client, replies)
        right(replies, content)
        await until(lambda: not server.budget.used)
        assert one.running == 0
        assert one._protocol._origins is None or not one._protocol._origins._held
        tally = one.account.tally
        assert tally is not None
        assert tally.commands["read"].operations == tally.general == 100
        assert tally.commands["read"].bytes == 100 * 4096
        assert sum(tally.commands["read"].buckets) == 100
        await client.close()
        await other.close()

    session(work)


def test_gone_again_before_they_are_answered(session: Callable[[Work], None]) -> None:
    """Told that it has come, and it has been dropped from the cache since: the general way."""

    async def work(server: Server, image: Image, disk: SlowDisk, content: bytes) -> None:
        client = await connect(server, "simple", fast=True)
        replies = await ask(client, spread(10))
        await until(lambda: len(disk.waiting) == 10)
        disk.come()
        disk.missing = True
        await all_of(client, replies)
        right(replies, content)
        assert not disk.waiting
        await client.close()

    session(work)


def test_they_see_what_was_written_meanwhile(session: Callable[[Work], None]) -> None:
    async def work(server: Server, image: Image, disk: SlowDisk, content: bytes) -> None:
        client = await connect(server, "extended", fast=True)
        replies = await ask(client, [Request(READ, n, n * 65536, 4096) for n in range(4)], "extended")
        await until(lambda: len(disk.waiting) == 4)
        disk.missing = False
        other = await connect(server, "simple", fast=True)
        changes = [
            Request(WRITE, 0, 65536 + 100, 10, 0, b"y" * 10),
            Request(TRIM, 1, 2 * 65536, 65536),
            Request(WRITE_ZEROES, 2, 3 * 65536, 4096),
        ]
        await all_of(other, await ask(other, changes))
        disk.come()
        await all_of(client, replies)
        found = [replies.found[n].data for n in range(4)]
        assert found == [content[:4096], b"\2" * 100 + b"y" * 10 + b"\2" * 3986, bytes(4096), bytes(4096)]
        await client.close()
        await other.close()

    session(work)


def test_a_cluster_with_a_new_user_is_not_read(session: Callable[[Work], None]) -> None:
    """What is discarded while a read waits gets other data: it must not be what the read returns."""

    async def work(server: Server, image: Image, disk: SlowDisk, content: bytes) -> None:
        client = await connect(server, "simple", fast=True)
        replies = await ask(client, [Request(READ, n, n * 65536, 512) for n in range(8)])
        await until(lambda: len(disk.waiting) == 8)
        disk.missing = False
        await image.trim(0, 8 * 65536)
        await image.flush()
        for number in range(8):
            await image.write((7 - number) * 65536, bytes([200 + number]) * 65536)
        disk.come()
        await all_of(client, replies)
        assert [replies.found[n].data for n in range(8)] == [bytes([207 - n]) * 512 for n in range(8)]
        await client.close()

    session(work)


@pytest.mark.parametrize("how", ["leaves", "is lost", "is lost with answers due"])
def test_the_client_leaves_while_they_wait(session: Callable[[Work], None], how: str) -> None:
    """The export stays held as long as the kernel works for it; then everything is over."""

    async def work(server: Server, image: Image, disk: SlowDisk, content: bytes) -> None:
        client = await connect(server, "simple", fast=True)
        one = only(server)
        await ask(client, spread(10))
        await until(lambda: len(disk.waiting) == 10)
        if how == "is lost with answers due":
            disk.come()
            one.abort()
        else:
            client.writer.transport.abort()
            if how == "is lost":
                one.abort()
            await until(lambda: one._lost if how == "is lost" else one._ended)
            disk.come(count=9)
            await asyncio.sleep(0.01)
            assert only(server) is one and one._lease is not None
            disk.come()
        await until(lambda: not server._connections)
        assert not server.budget.used and one._lease is None
        await client.close()

    session(work)


def test_a_stop_answers_those_that_wait(session: Callable[[Work], None]) -> None:
    async def work(server: Server, image: Image, disk: SlowDisk, content: bytes) -> None:
        client = await connect(server, "simple", fast=True)
        replies = await ask(client, spread(10))
        await until(lambda: len(disk.waiting) == 10)
        closing = asyncio.create_task(server.close())
        await asyncio.sleep(0.01)
        assert not closing.done() and not replies.found
        disk.come(count=5)
        await asyncio.sleep(0.01)
        disk.come(FAILED)
        await all_of(client, replies)
        right(replies, content)
        assert await client.ended() == b""
        await closing
        await client.close()

    session(work)


def test_a_client_that_takes_nothing_gets_all_later(session: Callable[[Work], None]) -> None:
    async def work(server: Server, image: Image, disk: SlowDisk, content: bytes) -> None:
        client = await connect(server, "simple", fast=True, buffer=4096)
        one = only(server)
        replies = await ask(client, spread(holdings.MAX_REQUESTS + 20, length=8192))
        await until(lambda: len(disk.waiting) == holdings.MAX_REQUESTS)
        # No more than the limit wait; the others' turn comes later.
        await asyncio.sleep(0.01)
        assert len(disk.waiting) == holdings.MAX_REQUESTS
        disk.come()
        await until(lambda: one._outbox.blocked)
        await asyncio.sleep(0.01)
        assert one.held < MIB
        while len(replies.found) < len(replies.asked):
            await replies.take(client.reader)
            disk.come()
        right(replies, content)
        await until(lambda: not server.budget.used)
        await client.close()

    session(work)


@pytest.mark.parametrize("clients", [1, 2])
def test_a_few_in_a_turn_beside_others(
    session: Callable[[Work], None], monkeypatch: pytest.MonkeyPatch, clients: int
) -> None:
    turns: list[int] = []
    most = CHEAPER * connection.BEGIN_AT_ONCE
    real = FastPath.serve_arrived

    def spy(self: FastPath, most: int) -> tuple[list[Read], bytes]:
        before = len(self._misses.arrived)
        result = real(self, most)
        turns.append(before - len(self._misses.arrived))
        return result

    monkeypatch.setattr(FastPath, "serve_arrived", spy)

    async def work(server: Server, image: Image, disk: SlowDisk, content: bytes) -> None:
        client = await connect(server, "simple", fast=True)
        others = [await connect(server, "simple", fast=True) for _ in range(clients - 1)]
        replies = await ask(client, spread(90))
        begun = 0
        while begun < 90:
            await asyncio.sleep(0)
            if others:
                assert len(disk.waiting) - begun <= most
            begun = len(disk.waiting)
        disk.come()
        await all_of(client, replies)
        right(replies, content)
        assert sum(turns) == 90
        assert (max(turns) <= most) is bool(others)
        for each in (client, *others):
            await each.close()

    session(work)


FOR_EVER = 1 << 62


@pytest.mark.parametrize("relief", ["calm", "patience", "alone", "is lost"])
def test_whose_data_is_there_goes_first(
    session: Callable[[Work], None], monkeypatch: pytest.MonkeyPatch, relief: str
) -> None:
    """What has come from the disk is not answered while another client's reads hit, for a while."""

    async def work(server: Server, image: Image, disk: SlowDisk, content: bytes) -> None:
        monkeypatch.setattr(misses, "CALM_AFTER", FOR_EVER)
        monkeypatch.setattr(misses, "PATIENCE", FOR_EVER)
        client = await connect(server, "simple", fast=True)
        one = only(server)
        other = await connect(server, "simple", fast=True)
        replies = await ask(client, spread(20))
        await until(lambda: len(disk.waiting) == 20)
        disk.come()
        for _ in range(20):
            hits = await ask(other, spread(5))
            await all_of(other, hits)
            right(hits, content)
        assert one.running == 20
        # Not even when something else is done for the same client.
        await all_of(client, await ask(client, [Request(TRIM, 100, 0, 512)]))
        assert one.running == 20
        match relief:
            case "calm":
                monkeypatch.setattr(misses, "CALM_AFTER", 0)
            case "patience":
                monkeypatch.setattr(misses, "PATIENCE", 0)
            case "alone":
                await other.close()
                await until(lambda: server.alone)
                monkeypatch.setattr(misses, "PATIENCE", 0)
            case "is lost":
                one.abort()
                await until(lambda: server.alone and not server.budget.used)
                assert one.running == 0
                await client.close()
                await other.close()
                return
        await all_of(client, replies)
        right(replies, content)
        await client.close()
        if relief != "alone":
            await other.close()

    session(work)


class Failing(Counting):
    """Has a bug if it is told to."""

    failing = False

    def receive(self, get_buffer: Callable[[], memoryview]) -> int:
        if Failing.failing:
            raise ZeroDivisionError("a bug")
        return super().receive(get_buffer)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Failing]:
    monkeypatch.setattr(Counting, "received", 0)
    monkeypatch.setattr(Failing, "failing", False)
    monkeypatch.setattr(connection, "BusyPoll", Failing)
    monkeypatch.setattr(misses, "CALM_AFTER", FOR_EVER)
    monkeypatch.setattr(misses, "PATIENCE", FOR_EVER)
    monkeypatch.setattr(misses, "ONE_ONLY", 1)
    return Failing


@pytest.mark.parametrize("askers", [0, 1, 2])
def test_who_asks_alone_is_awaited_awake(
    session: Callable[[Work], None],
    counting: type[Failing],
    monkeypatch: pytest.MonkeyPatch,
    askers: int,
) -> None:
    """While others wait for calm, so that there is nothing else to do."""

    async def work(server: Server, image: Image, disk: SlowDisk, content: bytes) -> None:
        server.busy_poll = 0.001
        client = await connect(server, "simple", fast=True)
        others = [await connect(server, "simple", fast=True) for _ in range(max(1, askers))]
        replies = await ask(client, spread(20))
        await until(lambda: len(disk.waiting) == 20)
        disk.come()
        for number in range(40 if askers else 0):
            other = others[number % askers]
            hits = await ask(other, spread(1))
            await all_of(other, hits)
            right(hits, content)
        assert (counting.received > 10) is (askers == 1)
        for other in others:
            await other.close()
        await until(lambda: server.alone)
        assert server.calm._asker is None
        monkeypatch.setattr(misses, "PATIENCE", 0)
        await all_of(client, replies)
        right(replies, content)
        await client.close()

    session(work)


def test_a_bug_meanwhile_ends_the_one_and_not_the_other(
    session: Callable[[Work], None], counting: type[Failing], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(server: Server, image: Image, disk: SlowDisk, content: bytes) -> None:
        failures: list[type] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: failures.append(type(context["exception"]))
        )
        server.busy_poll = 0.001
        client, other = [await connect(server, "simple", fast=True) for _ in range(2)]
        replies = await ask(client, spread(20))
        await until(lambda: len(disk.waiting) == 20)
        disk.come()
        for _ in range(2):
            await all_of(other, await ask(other, spread(1)))
        counting.failing = True
        await until(lambda: server.alone)
        assert set(failures) == {ZeroDivisionError} and only(server).running == 20
        monkeypatch.setattr(misses, "PATIENCE", 0)
        await all_of(client, replies)
        right(replies, content)
        for each in (client, other):
            await each.close()

    session(work)


def test_what_is_hot_again_is_tried_first(session: Callable[[Work], None]) -> None:
    async def work(server: Server, image: Image, disk: SlowDisk, content: bytes) -> None:
        client = await connect(server, "simple", fast=True)
        replies = await ask(client, [Request(READ, 1, 0, 512)])
        await until(lambda: len(disk.waiting) == 1)
        disk.come()
        await all_of(client, replies)
        # One that had been there already is asked of the kernel, the next is not.
        replies = await ask(client, [Request(READ, 2, 0, 512)])
        await until(lambda: len(disk.waiting) == 1)
        disk.come(CACHED)
        await all_of(client, replies)
        replies = await ask(client, [Request(READ, 3, 0, 512)])
        await all_of(client, replies)
        assert not disk.waiting
        await client.close()

    session(work)


def test_a_file_that_shrinks_is_an_error(
    session: Callable[[Work], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As everywhere: EIO, not zeroes. With the real disk."""

    async def work(server: Server, image: Image, disk: SlowDisk, content: bytes) -> None:
        monkeypatch.undo()
        client = await connect(server, "simple", fast=True)
        only(server)._fast._cold = True  # type: ignore[union-attr]
        os.truncate(image.path, 70000)
        replies = await ask(client, [Request(READ, n, n * 65536, 4096) for n in range(8, 16)])
        await all_of(client, replies)
        assert {each.error for each in replies.found.values()} == {errno.EIO}
        await client.close()

    session(work)


@pytest.mark.parametrize("style", ["simple", "extended"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_same_answers_as_the_general_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, style: str
) -> None:
    """Mixed requests, of which half miss, and what the real kernel then says."""
    rng = random.Random(kind + style)
    read_now = ThreadedFile.read_now
    misses = rng.random

    def missing(file: ThreadedFile, view: memoryview, offset: int) -> int:
        return 0 if misses() < 0.5 else read_now(file, view, offset)

    requests = []
    for slot in range(16):
        at = slot * 128 * KIB
        requests.append(
            Request(READ, len(requests), at + rng.randrange(65536), rng.choice([512, 4096, 57000]))
        )
        # What is read is not written to: it does not depend on the order.
        place = at + 128 * KIB - 8192
        command = rng.choice([WRITE, TRIM, WRITE_ZEROES])
        data = rng.randbytes(4096) if command == WRITE else b""
        requests.append(Request(command, len(requests), place, 4096, 0, data))
    original = make(tmp_path, kind)
    outcomes = []
    for fast in (False, True):
        path = tmp_path / "copy.qcow2"
        shutil.copy(original, path)
        if fast:
            monkeypatch.setattr(ThreadedFile, "read_now", missing)
        cuts = [rng.randrange(1 << 20) for _ in range(20)]
        outcomes.append(asyncio.run(stream(path, style, requests, cuts, fast=fast)))
    slow, quick = outcomes
    assert quick.answers == slow.answers
    assert quick.disk == slow.disk
    assert quick.dirty == slow.dirty
