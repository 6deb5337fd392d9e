"""Data of writes that lies in the receive buffer, which all connections share: it is done with, or copied,
before anybody receives again."""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
from pathlib import Path

import pytest

from nbdbm.nbd.events import Event
from nbdbm.server import connection
from tests.server.rawclient import READ, WRITE, RawClient
from tests.server.running import until
from tests.server.twoways import KIB, SIZE, Replies, Request, connect, make, serving
from tests.support import engine
from tests.support.marks import requires

pytestmark = requires("qemu-img", "qemu-io")

COUNT = 400


async def overwrite(client: RawClient) -> None:
    """Have the receive buffer filled with something else, by another client."""
    requests = [Request(WRITE, n, 0, 4 * KIB, 1, b"\xee" * 4 * KIB) for n in range(60)]
    client.send(b"".join(request.pack("simple") for request in requests))
    replies = Replies("simple", requests)
    for _ in requests:
        await replies.take(client.reader)


async def written(path: Path, style: str, *, stalled: bool) -> tuple[bytes, bytes]:
    """What a crowd of writes leaves on the disk, and what it should: to places of every kind, sent at once, a
    quarter with FUA, beside another client. ``stalled``: the client takes no replies meanwhile."""
    rng = random.Random(style)
    async with serving(path, read_only=False) as (server, image):
        expected = bytearray(await engine.read_all(image))
        one = await connect(server, style, fast=True, buffer=4096 if stalled else 0)
        other = await connect(server, "simple", fast=True)
        requests = [Request(READ, 1000 + n, 0, 256 * KIB) for n in range(8 * stalled)]
        for number, slot in enumerate(rng.sample(range(1, SIZE // 4096), COUNT)):
            # The first are so small that they come with the reads in front of them.
            data = rng.randbytes(rng.choice((1, 512, 4096)) if number > 30 else 64)
            requests.append(Request(WRITE, number, slot * 4096, len(data), number % 4 == 0, data))
            expected[slot * 4096 : slot * 4096 + len(data)] = data
        if stalled:
            theirs = one.writer.get_extra_info("socket")
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.writer.transport.pause_reading()  # type: ignore[attr-defined]
        one.send(b"".join(request.pack(style) for request in requests))
        for _ in range(5):
            await overwrite(other)
        if stalled:
            one.writer.transport.resume_reading()  # type: ignore[attr-defined]
        replies = Replies(style, requests)
        while len(replies.found) < len(requests):
            await replies.take(one.reader)
        expected[: 4 * KIB] = b"\xee" * 4 * KIB
        found = await engine.read_all(image)
        for client in (one, other):
            await client.close()
        await until(lambda: not server.clients)
        return found, bytes(expected)


@pytest.mark.parametrize("stalled", [False, True], ids=["", "stalled"])
@pytest.mark.parametrize("style", ["simple", "extended"])
@pytest.mark.parametrize("kind", ["plain", "backing", "packed", "extended"])
def test_what_was_sent_is_written(tmp_path: Path, kind: str, style: str, stalled: bool) -> None:
    path = tmp_path / "copy.qcow2"
    shutil.copy(make(tmp_path, kind), path)
    found, expected = asyncio.run(written(path, style, stalled=stalled))
    assert found == expected


def test_it_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with nothing copied."""

    def lent(event: Event) -> Event:
        return event

    monkeypatch.setattr(connection, "owned", lent)
    found, expected = asyncio.run(written(make(tmp_path, "backing"), "simple", stalled=False))
    assert found != expected
