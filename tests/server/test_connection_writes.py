"""Connections that write: payloads stay in step with requests, whatever becomes of each."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.server.memimage import MemoryImage, WritableImage
from tests.server.rawclient import FLUSH, READ, TRIM, WRITE, WRITE_ZEROES, request
from tests.server.running import connected, run, running, until

K64 = 65536
CONTENT = b"." * (8 * K64)
EPERM, EIO, EINVAL, ENOSPC, ENOTSUP = 1, 5, 22, 28, 95
FUA, NO_HOLE, FAST_ZERO = 1, 2, 16


def test_every_command(tmp_path: Path) -> None:
    async def main() -> None:
        image = WritableImage(CONTENT)
        async with running(image, tmp_path) as (_, path):
            client = await connected(path)
            # HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN, CACHE, FAST_ZERO.
            assert client.flags == 0b1101_0110_1101
            client.send(request(WRITE, 1, 10, 3, FUA) + b"abc")
            client.send(request(WRITE_ZEROES, 2, K64, K64, NO_HOLE | FAST_ZERO))
            client.send(request(TRIM, 3, 2 * K64, K64) + request(FLUSH, 4))
            replies = await client.replies(4)
            assert {cookie: reply.error for cookie, reply in replies.items()} == {1: 0, 2: 0, 3: 0, 4: 0}
            assert sorted(image.changes) == [
                ("trim", 2 * K64, K64),
                ("write", 10, 3, "fua"),
                ("zeroes", K64, K64, "no_hole", "fast"),
            ]
            client.read(5, 9, 5)
            assert (await client.reply()).data == b".abc."
            await client.close()

    run(main)


@pytest.mark.parametrize("length", [1, 1000, K64, 3 * K64 + 1])
@pytest.mark.parametrize("offset", [0, 8 * K64 - 1], ids=["inside", "past the end"])
def test_refused_payloads_are_skipped(tmp_path: Path, length: int, offset: int) -> None:
    """A read-only export answers EPERM, and what follows the payload is understood."""

    async def main() -> None:
        image = MemoryImage(CONTENT)
        async with running(image, tmp_path) as (_, path):
            client = await connected(path)
            # The payload looks like requests.
            lure = (request(READ, 99, 0, 1) * (length // 28 + 1))[:length]
            client.send(request(WRITE, 1, offset, length) + lure)
            client.send(request(WRITE_ZEROES, 2, 0, K64) + request(TRIM, 3, 0, K64))
            client.read(4, 0, 3)
            replies = await client.replies(4)
            assert replies[1].error in (EPERM, EINVAL if offset and length > 1 else EPERM)
            assert (replies[2].error, replies[3].error) == (EPERM, EPERM)
            assert replies[4].data == b"..."
            assert image.content == CONTENT
            await client.close()

    run(main)


@pytest.mark.parametrize(("failure", "error"), [(28, ENOSPC), (122, ENOSPC), (5, EIO), (30, EPERM)])
def test_a_failed_write_is_one_requests_failure(tmp_path: Path, failure: int, error: int) -> None:
    async def main() -> None:
        image = WritableImage(CONTENT)
        image.failures[K64] = OSError(failure, "as the host says")
        async with running(image, tmp_path) as (server, path):
            client, other = await connected(path), await connected(path)
            client.send(request(WRITE, 1, K64, 4) + b"lost" + request(WRITE, 2, 0, 4) + b"kept")
            other.send(request(WRITE, 3, 2 * K64, 4) + b"also")
            replies = await client.replies(2)
            assert (replies[1].error, replies[2].error) == (error, 0)
            assert (await other.reply()).error == 0
            client.read(4, 0, 5)
            assert (await client.reply()).data == b"kept."
            assert server.connections == 2
            await client.close()
            await other.close()

    run(main)


def test_a_client_that_leaves_does_not_stop_its_write(tmp_path: Path) -> None:
    """What was begun is ended before the image is closed."""

    async def main() -> None:
        image = WritableImage(CONTENT)
        image.gate = asyncio.Event()
        async with running(image, tmp_path) as (server, path):
            client = await connected(path)
            client.send(request(WRITE, 1, 0, 4) + b"late")
            await until(lambda: server.budget.used > 0)
            client.writer.transport.abort()
            await asyncio.sleep(0.05)
            assert image.changes == []
            ending = asyncio.ensure_future(server.close())
            await asyncio.sleep(0.05)
            assert image.closes == 0 and not ending.done()
            image.gate.set()
            await ending
            await client.close()
            assert image.changes == [("write", 0, 4)] and image.closes == 1

    run(main)


def test_a_write_cut_short_is_not_carried_out(tmp_path: Path) -> None:
    async def main() -> None:
        image = WritableImage(CONTENT)
        async with running(image, tmp_path) as (server, path):
            client = await connected(path)
            client.send(request(WRITE, 1, 0, 1000) + b"x" * 999)
            await client.writer.drain()
            await client.close()
            await until(lambda: server.connections == 0)
        assert image.changes == [] and image.closes == 1

    run(main)


def test_closing_fails(tmp_path: Path) -> None:
    """Whoever ends the server learns that something was not stored."""

    class Failing(WritableImage):
        async def close(self) -> None:
            await super().close()
            raise OSError(28, "No space left on device")

    async def main() -> None:
        image = Failing(CONTENT)
        with pytest.raises(OSError, match="No space left"):
            async with running(image, tmp_path) as (server, path):
                client = await connected(path)
                client.send(request(WRITE, 1, 0, 4) + b"data")
                assert (await client.reply()).error == 0
                await client.close()
                with pytest.raises(OSError, match="No space left"):
                    await server.close()
        assert image.closes == 1

    run(main)


@pytest.mark.parametrize("fua", [0, FUA], ids=["fast", "general"])
def test_buffers_of_payloads_are_used_again(tmp_path: Path, fua: int) -> None:
    """By the next payload, which is not mixed up with the one before; after a failure they are not."""
    length = 6 * K64  # more than is received together with the header

    async def main() -> None:
        image = WritableImage(CONTENT)
        async with running(image, tmp_path) as (server, path):
            client = await connected(path)
            for cookie in range(1, 6):
                client.send(request(WRITE, cookie, cookie, length, fua) + bytes([cookie]) * length)
                assert (await client.reply()).error == 0
                assert length <= server.buffers.kept <= 2 * length
                client.read(100, 0, length + 10)
                got = (await client.reply()).data
                assert got[cookie : cookie + length] == bytes([cookie]) * length
            image.failures[3] = OSError(EIO, "failed")
            kept = server.buffers.kept
            client.send(request(WRITE, 7, 3, length, fua) + bytes(length))
            assert (await client.reply()).error == EIO
            assert server.buffers.kept < kept
            await client.close()

    run(main)
