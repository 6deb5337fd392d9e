"""BusyPoll: who is awaited awake, for how long, and that nobody else has to wait for it."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdbm.config import ServerConfig
from nbdbm.server import busypoll
from nbdbm.server.busypoll import NEAR, TURN, BusyPoll, processors
from tests.server.memimage import MemoryImage
from tests.server.rawclient import DISC, FLUSH, RawClient, request
from tests.server.running import connected, run, running, until

LIMIT = 100e-6
CONTENT = bytes(range(256)) * 4096


class Clock:
    """Each look at it takes ``step`` seconds."""

    def __init__(self, step: float = 0.0) -> None:
        self.now = 5.0
        self.step = step
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        self.now += self.step
        return self.now


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


BUFFER = memoryview(bytearray(64))


def buffer() -> memoryview:
    return BUFFER


def test_only_after_a_request_that_came_soon(pair: tuple[socket.socket, socket.socket]) -> None:
    clock = Clock()
    poll = BusyPoll(pair[0], LIMIT, clock)
    assert not poll.begin()  # the first request of all
    clock.now += NEAR * LIMIT * 0.9
    assert poll.begin()
    poll.stop()
    clock.now += NEAR * LIMIT * 1.1
    assert not poll.begin()
    clock.now += NEAR * LIMIT * 0.9
    assert poll.begin()


def test_not_again_while_going_on(pair: tuple[socket.socket, socket.socket]) -> None:
    clock = Clock()
    poll = BusyPoll(pair[0], LIMIT, clock)
    poll.begin()
    assert poll.begin()
    assert not poll.begin()
    assert poll.going_on


def test_receives_what_is_there(pair: tuple[socket.socket, socket.socket]) -> None:
    clock = Clock()
    poll = BusyPoll(pair[0], LIMIT, clock)
    poll.begin()
    assert poll.begin()
    pair[1].send(b"hello")
    assert poll.receive(buffer) == 5
    assert bytes(BUFFER[:5]) == b"hello"
    assert poll.going_on


def test_gives_up_after_the_limit(pair: tuple[socket.socket, socket.socket]) -> None:
    clock = Clock()
    poll = BusyPoll(pair[0], LIMIT, clock)
    poll.begin()
    assert poll.begin()
    clock.step = LIMIT / 10
    began = clock.now
    assert poll.receive(buffer) == 0
    assert LIMIT < clock.now - began < 1.5 * LIMIT
    assert not poll.going_on
    # What comes soon after that is awaited awake again.
    assert poll.begin()


def test_turn(pair: tuple[socket.socket, socket.socket]) -> None:
    """After a turn it returns without having given up, even while requests keep coming."""
    clock = Clock()
    poll = BusyPoll(pair[0], LIMIT, clock)
    poll.begin()
    assert poll.begin()
    pair[1].send(b"hello")
    clock.now += TURN
    assert poll.receive(buffer) == 0
    assert poll.going_on
    poll.resume()
    assert poll.receive(buffer) == 5


@pytest.mark.parametrize("how", ["end", "error"])
def test_end_and_errors_are_left_to_the_transport(
    pair: tuple[socket.socket, socket.socket], how: str
) -> None:
    clock = Clock()
    poll = BusyPoll(pair[0], LIMIT, clock)
    poll.begin()
    assert poll.begin()
    if how == "end":
        pair[1].close()
    else:
        pair[0].close()
    assert poll.receive(buffer) == 0
    assert not poll.going_on
    if how == "end":
        assert pair[0].recv(1) == b""


def test_what_has_come_is_received_without_waiting(pair: tuple[socket.socket, socket.socket]) -> None:
    clock = Clock()
    poll = BusyPoll(pair[0], LIMIT, clock)
    poll.resume()
    assert poll.receive_now(buffer) == 0 and clock.looks == 2
    pair[1].send(b"hello")
    assert poll.receive_now(buffer) == 5
    assert bytes(BUFFER[:5]) == b"hello"
    pair[1].send(b"later")
    clock.now += TURN
    assert poll.receive_now(buffer) == 0, "the event loop has its turn"
    poll.resume()
    assert poll.receive_now(buffer) == 5
    pair[1].close()
    assert poll.receive_now(buffer) == 0
    assert pair[0].recv(1) == b""
    pair[0].close()
    assert poll.receive_now(buffer) == 0


# -- in connections: the limit is long, so that staying awake is certain


async def one_by_one(client: RawClient, count: int) -> None:
    for cookie in range(count):
        at = cookie * 4096 % len(CONTENT)
        client.read(cookie, at, 4096)
        assert (await client.reply()).data == CONTENT[at : at + 4096]


class Counting(BusyPoll):
    """Counts what was received awake; stands for BusyPoll."""

    received = taken = 0

    def receive(self, get_buffer: Callable[[], memoryview]) -> int:
        count = super().receive(get_buffer)
        Counting.received += bool(count)
        return count

    def receive_now(self, get_buffer: Callable[[], memoryview]) -> int:
        count = super().receive_now(get_buffer)
        Counting.taken += bool(count)
        return count


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr(Counting, "received", 0)
    monkeypatch.setattr(Counting, "taken", 0)
    monkeypatch.setattr("nbdbm.server.connection.BusyPoll", Counting)
    monkeypatch.setattr("nbdbm.server.server.processors", lambda: 2)
    return Counting


CONNECTED = (
    "import socket, struct, sys\n"
    "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
    "f = s.makefile('rwb'); f.read(18)\n"
    "f.write(struct.pack('>IQIIIH', 3, 0x49484156454F5054, 7, 6, 0, 0)); f.flush()\n"
    "while True:\n"
    "    _, _, kind, length = struct.unpack('>QIII', f.read(20)); f.read(length)\n"
    "    if kind == 1: break\n"
    "content = bytes(range(256)) * 16\n"
)
"""How a client of another process begins: ``f`` is in transmission."""


async def in_another_process(path: str, count: int) -> None:
    """``count`` reads one by one by a client that does not need our event loop to go on."""
    script = CONNECTED + (
        "for cookie in range(int(sys.argv[2])):\n"
        "    f.write(struct.pack('>IHHQQI', 0x25609513, 0, 0, cookie, cookie % 9 * 4096, 4096)); f.flush()\n"
        "    assert f.read(16) == struct.pack('>IIQ', 0x67446698, 0, cookie)\n"
        "    assert f.read(4096) == content\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, path, str(count))
    assert await process.wait() == 0


def test_answers_awake(tmp_path: Path, counting: type[Counting]) -> None:
    async def main() -> None:
        async with running(MemoryImage(CONTENT), tmp_path, ServerConfig(busy_poll=0.001)) as (server, path):
            await in_another_process(path, 2000)
            await until(lambda: not server.connections)
        assert counting.received > 500

    run(main)


def test_off(tmp_path: Path, counting: type[Counting]) -> None:
    async def main() -> None:
        async with running(MemoryImage(CONTENT), tmp_path, ServerConfig(busy_poll=0)) as (_, path):
            await in_another_process(path, 200)
        assert counting.received == 0

    run(main)


def test_never_with_one_processor(
    tmp_path: Path, counting: type[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdbm.server.server.processors", lambda: 1)

    async def main() -> None:
        async with running(MemoryImage(CONTENT), tmp_path, ServerConfig(busy_poll=0.001)) as (_, path):
            await in_another_process(path, 200)
        assert counting.received == 0

    run(main)


def test_others_are_served_meanwhile(tmp_path: Path, counting: type[Counting]) -> None:
    """A second client connects and gets answers while the first one never stops asking."""

    async def main() -> None:
        async with running(MemoryImage(CONTENT), tmp_path, ServerConfig(busy_poll=0.001)) as (server, path):
            busy = asyncio.ensure_future(in_another_process(path, 20_000))
            await until(lambda: counting.received > 100)
            other = await connected(path)
            before = counting.received
            await one_by_one(other, 50)
            # Nobody is awaited awake while there are two.
            assert counting.received - before < 50
            other.send(request(DISC, 0))
            await other.close()
            assert not busy.done()
            await busy
            await until(lambda: not server.connections)

    run(main)


def test_what_the_fast_path_leaves_over(tmp_path: Path, counting: type[Counting]) -> None:
    """Requests of every kind, awake: those that are answered later, and the goodbye."""

    async def main() -> None:
        async with running(MemoryImage(CONTENT), tmp_path, ServerConfig(busy_poll=0.001)) as (server, path):
            client = await connected(path)
            for cookie in range(0, 200, 2):
                client.read(cookie, 0, 4096)
                assert (await client.reply()).data == CONTENT[:4096]
                client.send(request(FLUSH, cookie + 1))
                assert (await client.reply()).cookie == cookie + 1
            client.send(request(DISC, 0))
            assert await client.ended() == b""
            await until(lambda: not server.connections)
            await client.close()

    run(main)


def test_processors() -> None:
    assert processors() >= 1
    assert busypoll.TURN <= 0.002


async def many_at_a_time(path: str, rounds: int) -> None:
    """Thirty-two reads under way, always, by a client that does not need our event loop to go on."""
    script = CONNECTED + (
        "def ask(n): f.write(struct.pack('>IHHQQI', 0x25609513, 0, 0, n, n % 9 * 4096, 4096)); f.flush()\n"
        "for n in range(32): ask(n)\n"
        "for n in range(32, int(sys.argv[2])):\n"
        "    assert f.read(4) == b'\\x67\\x44\\x66\\x98'; f.read(12)\n"
        "    assert f.read(4096) == content\n"
        "    ask(n)\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, path, str(rounds))
    assert await process.wait() == 0


def test_many_are_taken_past_the_event_loop(tmp_path: Path, counting: type[Counting]) -> None:
    async def main() -> None:
        async with running(MemoryImage(CONTENT), tmp_path) as (server, path):
            await many_at_a_time(path, 20_000)
            await until(lambda: not server.connections)
        assert counting.taken > 0

    run(main)
