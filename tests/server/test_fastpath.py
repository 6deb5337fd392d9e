"""The fast path beside its slow twin: every request goes both ways, and everything must come out the same.

A connection that is not given its socket (as under TLS) knows only the general way.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nbdbm.image.blockfile import ThreadedFile
from nbdbm.image.image import Image
from tests.server.rawclient import (
    CACHE,
    DISC,
    FLUSH,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
)
from tests.server.twoways import (
    DF,
    FUA,
    KIB,
    KINDS,
    NO_HOLE,
    SIZE,
    STYLES,
    Answer,
    Replies,
    Request,
    connect,
    make,
    only,
    serving,
)
from tests.support import engine
from tests.support.marks import requires

pytestmark = requires("qemu-img", "qemu-io")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fastpath")


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
    pwrite, sync = os.pwrite, ThreadedFile.sync

    def spy_pwrite(fd: int, view: memoryview, offset: int) -> int:
        calls.append(("pwrite", offset, len(view)))
        return pwrite(fd, view, offset)

    async def spy_sync(self: ThreadedFile) -> None:
        calls.append(("sync", 0, 0))
        await sync(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", spy_pwrite)
        patch.setattr(ThreadedFile, "sync", spy_sync)
        yield calls


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
