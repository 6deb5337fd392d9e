"""Large reads of read-only images, sent from the page cache: the same bytes, whatever the client does."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdbm.image.pagecache import supported
from nbdbm.server import fastpath
from tests.server.rawclient import READ
from tests.server.running import run, until
from tests.server.twoways import STYLES, Replies, Request, connect, only, serving
from tests.support import engine
from tests.support.marks import requires
from tests.support.qemu import SYSTEM

MIB = 1024 * 1024
SIZE = 12 * MIB

pytestmark = [
    requires("qemu-img"),
    pytest.mark.skipif(not supported(), reason="this kernel has no cachestat(2) (Linux 6.5)"),
]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """All data, in one piece but for the tables between."""
    place = tmp_path_factory.mktemp("send")
    content = random.Random(1).randbytes(SIZE)
    (place / "raw").write_bytes(content)
    path = place / "disk.qcow2"
    SYSTEM.img("convert", "-f", "raw", "-O", "qcow2", place / "raw", path)
    return path, content


@contextmanager
def sendfiles(fail_after: int | None = None) -> Iterator[list[int]]:
    """What each sendfile(2) of the fast path has sent."""
    sent: list[int] = []
    real = os.sendfile

    def spy(out: int, fd: int, offset: int, count: int) -> int:
        if fail_after is not None and len(sent) >= fail_after:
            raise OSError(errno.EIO, "bad sector")
        sent.append(real(out, fd, offset, count))
        return sent[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastpath.os, "sendfile", spy)
        yield sent


def requests_of_all_sizes() -> list[Request]:
    rng = random.Random(2)
    lengths = [4096, 65535, 65536, 65537, 100_000, MIB, MIB + 1, 2 * MIB, fastpath.SEND_LARGEST]
    found = [Request(READ, n, rng.randrange(SIZE - length), length) for n, length in enumerate(lengths * 3)]
    return [*found, Request(READ, 1000, SIZE - 65536, 65536), Request(READ, 1001, 0, SIZE)]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("buffer", [0, 4096], ids=["", "small buffer"])
def test_the_same_bytes(disk: tuple[Path, bytes], style: str, buffer: int) -> None:
    path, content = disk

    async def main() -> None:
        async with serving(path) as (server, image):
            await engine.read_all(image)  # tables into the cache
            client = await connect(server, style, fast=True, buffer=buffer)
            requests = requests_of_all_sizes()
            replies = Replies(style, requests)
            with sendfiles() as sent:
                for each in requests:
                    client.send(each.pack(style))
                while len(replies.found) < len(requests):
                    await replies.take(client.reader)
            assert sum(sent) > (0 if buffer else 10 * MIB)
            for each in requests:
                assert replies.found[each.cookie].data == content[each.offset : each.offset + each.length]
            await until(lambda: not server.budget.used)
            await client.close()

    run(main)


def test_a_writable_image_never(disk: tuple[Path, bytes], tmp_path: Path) -> None:
    """Until the client has taken the reply, a cluster could have got another user."""
    path = tmp_path / "copy.qcow2"
    path.write_bytes(disk[0].read_bytes())

    async def main() -> None:
        async with serving(path, read_only=False) as (server, image):
            await engine.read_all(image)
            assert image.try_send(0, 65536) is None
            client = await connect(server, "simple", fast=True)
            replies = Replies("simple", [Request(READ, 1, 0, MIB)])
            with sendfiles() as sent:
                client.send(Request(READ, 1, 0, MIB).pack("simple"))
                await replies.take(client.reader)
            assert not sent
            assert replies.found[1].data == disk[1][:MIB]
            await client.close()

    run(main)


def test_what_is_not_in_the_page_cache_is_read(disk: tuple[Path, bytes], monkeypatch: Any) -> None:
    monkeypatch.setattr("nbdbm.image.blockfile.cached", lambda *_: False)

    async def main() -> None:
        async with serving(disk[0]) as (server, image):
            await engine.read_all(image)
            client = await connect(server, "structured", fast=True)
            requests = [Request(READ, n, n * MIB, MIB) for n in range(8)]
            replies = Replies("structured", requests)
            with sendfiles() as sent:
                for each in requests:
                    client.send(each.pack("structured"))
                while len(replies.found) < len(requests):
                    await replies.take(client.reader)
            assert not sent
            assert all(replies.found[n].data == disk[1][n * MIB : (n + 1) * MIB] for n in range(8))
            await client.close()

    run(main)


def test_a_client_that_stops_taking(disk: tuple[Path, bytes]) -> None:
    """What was not taken waits in bounded memory, and is complete in the end."""

    async def main() -> None:
        async with serving(disk[0]) as (server, image):
            await engine.read_all(image)
            client = await connect(server, "structured", fast=True)
            requests = [Request(READ, n, n % 8 * MIB, 3 * MIB) for n in range(40)]
            replies = Replies("structured", requests)
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            for each in requests:
                client.send(each.pack("structured"))
            one = only(server)
            await until(lambda: one._outbox.blocked or bool(one._outbox.unsent))
            for _ in range(50):
                await asyncio.sleep(0)
            assert sum(map(len, one._outbox.unsent)) <= fastpath.SEND_LARGEST + MIB
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            while len(replies.found) < len(requests):
                await replies.take(client.reader)
            for each in requests:
                assert replies.found[each.cookie].data == disk[1][each.offset : each.offset + each.length]
            await client.close()

    run(main)


def test_a_file_that_is_cut_while_it_is_sent(
    disk: tuple[Path, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The reply has begun, so the connection ends, and one line names the file. Others are served."""
    path = tmp_path / "copy.qcow2"
    path.write_bytes(disk[0].read_bytes())

    async def main() -> None:
        async with serving(path) as (server, image):
            await engine.read_all(image)
            where = image.try_send(8 * MIB, MIB)
            assert where is not None
            client = await connect(server, "simple", fast=True)
            real = os.sendfile

            def cut(out: int, fd: int, offset: int, count: int) -> int:
                os.truncate(path, where[1] + 4096)
                return real(out, fd, offset, count)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(fastpath.os, "sendfile", cut)
                client.send(Request(READ, 1, 8 * MIB, MIB).pack("simple"))
                received = await client.reader.read()
            assert received[16:] == disk[1][8 * MIB : 8 * MIB + 4096], "nothing that is not there"
            await client.close()
            second = await connect(server, "simple", fast=True)
            request = Request(READ, 2, 0, 65536)
            replies = Replies("simple", [request])
            second.send(request.pack("simple"))
            while not replies.found:
                await replies.take(second.reader)
            assert replies.found[2].data == disk[1][:65536]
            await second.close()

    run(main)
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert str(path) in record.getMessage() and "has become shorter" in record.getMessage()


def test_a_file_system_that_cannot(disk: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once; everything is read instead."""
    asked: list[int] = []

    def refuse(out: int, fd: int, offset: int, count: int) -> int:
        asked.append(count)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(fastpath.os, "sendfile", refuse)

    async def main() -> None:
        async with serving(disk[0]) as (server, image):
            await engine.read_all(image)
            client = await connect(server, "structured", fast=True)
            requests = [Request(READ, n, n * MIB, MIB) for n in range(8)]
            replies = Replies("structured", requests)
            for each in requests:
                client.send(each.pack("structured"))
                await replies.take(client.reader)
            assert len(asked) == 1
            assert all(replies.found[n].data == disk[1][n * MIB : (n + 1) * MIB] for n in range(8))
            await client.close()

    run(main)


def test_a_failure_after_the_header_ends_the_connection(
    disk: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client can be told nothing else, and must not take what follows for data."""

    def fail(fd: int, view: memoryview, offset: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fastpath, "_read", fail)

    async def main() -> None:
        async with serving(disk[0]) as (server, image):
            await engine.read_all(image)
            client = await connect(server, "simple", fast=True)
            with sendfiles(fail_after=0):
                client.send(Request(READ, 1, 0, MIB).pack("simple"))
                assert len(await client.ended()) <= 16
            await until(lambda: not server.connections)
            await client.close()

    run(main)
    assert f"{disk[0]}: reading {MIB} bytes at " in caplog.text
    assert "so the connection ends: Input/output error" in caplog.text
