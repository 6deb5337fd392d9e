"""The client against our own server core, over a real socket."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from nbdbm import client as client_module
from nbdbm.client import NbdClient
from nbdbm.errors import NbdError
from nbdbm.extents import Extent
from nbdbm.nbd import events
from nbdbm.uri import NbdUri
from tests.support.diskserver import DIRTY, SIZE, DiskServer, connected, run, serving

MODES = pytest.mark.parametrize(
    ("structured", "extended"),
    [(False, False), (True, False), (True, True)],
    ids=["simple", "structured", "extended"],
)


@MODES
def test_reads_in_pieces_and_at_once(tmp_path: Path, structured: bool, extended: bool) -> None:
    async def main() -> None:
        disk = DiskServer()
        async with connected(tmp_path, disk, structured=structured, extended=extended) as client:
            assert (client.structured, client.extended) == (structured, extended)
            assert client.size == SIZE
            # Longer than a payload may be: in pieces.
            assert await client.read(0, SIZE) == disk.data
            assert [c.length for c in disk.commands if isinstance(c, events.Read)] == [65536] * 16
            into = bytearray(100_000)
            await client.read_into(memoryview(into), 5)
            assert into == disk.data[5:100_005]
            assert await client.read(7, 0) == b""
            pieces = await asyncio.gather(*(client.read(at, 4096) for at in range(0, SIZE, 4096)))
            assert b"".join(pieces) == disk.data
        assert disk.goodbyes == 1

    run(main())


@MODES
def test_writes_and_the_rest(tmp_path: Path, structured: bool, extended: bool) -> None:
    async def main() -> None:
        disk = DiskServer()
        async with connected(tmp_path, disk, structured=structured, extended=extended) as client:
            data = bytes(range(256)) * 800
            await client.write(1000, data, fua=True)
            assert disk.data[1000 : 1000 + len(data)] == data
            assert {int(c.flags) for c in disk.commands} == {1}
            await client.write_zeroes(4096, 65537 * 2, no_hole=True, fast=False)
            assert not any(disk.data[4096 : 4096 + 65537 * 2])
            await client.trim(4096, 4096)
            await client.cache(0, 65537)
            await client.flush()
            kinds = [type(c).__name__ for c in disk.commands[-4:]]
            assert kinds == ["Trim", "Cache", "Cache", "Flush"]
            # A refusal concerns one request; the connection goes on.
            with pytest.raises(NbdError, match="ENOSPC") as caught:
                await client.trim(0, 4096)
            assert str(caught.value).startswith(f"{client.uri}: 0+4096: ENOSPC")
            assert caught.value.errno == errno.ENOSPC
            assert ("no room for a trim" in str(caught.value)) is structured
            assert await client.read(SIZE - 10, 10) == disk.data[-10:]

    run(main())


@pytest.mark.parametrize("extended", [False, True])
def test_block_status_covers_the_range(tmp_path: Path, extended: bool) -> None:
    async def main() -> None:
        size = 3 << 20
        disk = DiskServer(size=size)
        async with connected(
            tmp_path, disk, contexts=["base:allocation", DIRTY], extended=extended
        ) as client:
            assert set(client.contexts) == {"base:allocation", DIRTY}
            found = await client.block_status(0, size)
            assert found["base:allocation"] == [
                Extent(1 << 20, 0),
                Extent(1 << 20, 1),
                Extent(1 << 20, 0),
            ]
            assert found[DIRTY] == [Extent(65536, i % 2) for i in range(48)]
            found = await client.block_status(100, 65536, [DIRTY])
            assert found == {DIRTY: [Extent(65436, 0), Extent(100, 1)]}
            assert await client.block_status(0, 0) == {"base:allocation": [], DIRTY: []}

            asked = len(disk.commands)
            once = await client.status(0, size, [DIRTY])
            assert len(disk.commands) == asked + 1 and once[DIRTY].covered == 5 * 65536

            streamed = [extent async for extent in client.extents(DIRTY)]
            assert streamed == [Extent(65536, i % 2) for i in range(48)]
            streamed = [e async for e in client.extents("base:allocation", 1 << 20, 1)]
            assert streamed == [Extent(1, 1)]
            with pytest.raises(NbdError, match="'x' was not selected"):
                await client.block_status(0, 1, ["x"])

    run(main())


def test_long_requests_are_split_for_32_bit_headers(tmp_path: Path) -> None:
    async def main() -> None:
        disk = DiskServer(size=9 << 30)
        async with serving(tmp_path, disk) as uri:
            for extended in (False, True):
                async with await NbdClient.connect(uri, extended=extended) as client:
                    await client.trim(4096, (9 << 30) - 4096)
        lengths = [c.length for c in disk.commands if isinstance(c, events.Trim)]
        most = (1 << 32) - (1 << 21)
        assert lengths == [most, most, (9 << 30) - 4096 - 2 * most, (9 << 30) - 4096]

    run(main())


def test_a_server_without_a_limit_gets_no_more_at_once_than_others(tmp_path: Path) -> None:
    async def main() -> None:
        disk = DiskServer(size=1 << 30, maximum_payload=0xFFFFFFFF)
        async with connected(tmp_path, disk) as client:
            assert client.export.maximum_payload == 0xFFFFFFFF
            await client.cache(0, 100 << 20)
        lengths = [c.length for c in disk.commands if isinstance(c, events.Cache)]
        assert lengths == [32 << 20, 32 << 20, 32 << 20, 4 << 20]

    run(main())


def test_the_handshake_can_be_asked(tmp_path: Path) -> None:
    async def main() -> None:
        disk = DiskServer()
        async with serving(tmp_path, disk) as uri:
            async with await NbdClient.open(uri) as client:
                assert [tuple(e) for e in await client.list_exports()] == [("disk", "a disk")]
                info = await client.info()
                assert (info.name, info.size, info.maximum_payload) == ("disk", SIZE, 65536)
                assert await client.list_contexts() == ("base:allocation", DIRTY)
                assert await client.list_contexts(["qemu:"]) == (DIRTY,)
                assert (await client.go([DIRTY])).contexts == (DIRTY,)
                assert len(await client.read(0, 10)) == 10
            async with await NbdClient.open(uri):
                pass
        assert disk.goodbyes == 2

    run(main())


def test_what_the_server_does_not_have(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, DiskServer()) as uri:
            with pytest.raises(NbdError, match="no metadata context 'base:nothing'"):
                await NbdClient.connect(uri, contexts=["base:allocation", "base:nothing"])
            with pytest.raises(NbdError, match="no structured replies"):
                await NbdClient.connect(uri, contexts=["base:allocation"], structured=False, extended=False)
            with pytest.raises(NbdError, match="export 'other': the server refuses") as caught:
                await NbdClient.connect(NbdUri.unix(uri.socket, "other"))
            assert str(caught.value).startswith(f"nbd+unix:///other?socket={uri.socket}: ")

    run(main())


def test_requests_outside_the_disk_are_not_sent(tmp_path: Path) -> None:
    async def main() -> None:
        disk = DiskServer()
        async with serving(tmp_path, disk) as uri, await NbdClient.connect(uri) as client:
            for offset, length in ((SIZE, 1), (-1, 2), (0, SIZE + 1)):
                with pytest.raises(NbdError, match="outside the disk") as caught:
                    await client.read(offset, length)
                assert caught.value.errno == errno.EINVAL
            assert disk.commands == []

    run(main())


def test_tcp(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, DiskServer(), tcp=True) as uri, await NbdClient.connect(uri) as client:
            assert bytes(await client.read(65536, 2)) == b"\2\2"

    run(main())


def test_many_large_writes_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        disk = DiskServer(size=8 << 20, maximum_payload=1 << 20)
        disk.data = bytearray(8 << 20)
        async with connected(tmp_path, disk) as client:
            pieces = {at: bytes([at >> 20]) * (1 << 20) for at in range(0, 8 << 20, 1 << 20)}
            await asyncio.gather(*(client.write(at, data) for at, data in pieces.items()))
        assert disk.data == b"".join(pieces.values())

    run(main())


def test_extents_without_end_are_not_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_EXTENTS", 20)

    async def main() -> None:
        async with connected(tmp_path, DiskServer(size=64 << 20), contexts=[DIRTY]) as client:
            with pytest.raises(NbdError, match=f"{DIRTY}: more than 20 extents"):
                await client.block_status(0, 64 << 20)

    run(main())
