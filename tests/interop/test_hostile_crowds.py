"""Crowds: more clients than there are places for, and more exports than anybody needs to hear of twice."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbm.nbd.constants import Cmd, Opt, Rep
from tests.interop.hostile import Peer, client, option, request
from tests.support import images, servers
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "libnbd")]

CROWD = 1000
EXPORTS = 300


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Room for a crowd's sockets in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = CROWD + 500
    assert hard == resource.RLIM_INFINITY or hard >= needed, f"at most {hard} files may be open"
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("many_descriptors")
def test_a_thousand_at_once(gallery: images.Gallery, tmp_path: Path) -> None:
    """They come together, for a hundred places, fifty of which are taken by clients that say nothing: all of
    them are connected, wait for their turn, and get what they ask for."""
    case = gallery.get("v3-packed")
    content = gallery.content(case)

    async def one(port: int, number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await reader.readexactly(18))[:8] == b"NBDMAGIC"
        writer.write(struct.pack(">I", 3) + option(Opt.GO, struct.pack(">IH", 0, 0)))
        kind = Rep.INFO
        while kind == Rep.INFO:
            kind, length = struct.unpack(">II", (await reader.readexactly(20))[12:])
            await reader.readexactly(length)
        assert kind == Rep.ACK
        offset = number * 4096 % len(content)
        writer.write(request(Cmd.READ, offset, 4096, cookie=number))
        answer = await reader.readexactly(16 + 4096)
        assert struct.unpack_from(">IIQ", answer) == (0x67446698, 0, number)
        assert answer[16:] == content[offset : offset + 4096]
        writer.write(request(Cmd.DISC))
        assert await reader.read() == b""
        writer.close()

    async def all_of_them(port: int) -> None:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
        await asyncio.gather(*(one(port, number) for number in range(CROWD)))
        for _, writer in silent:
            writer.close()

    with servers.nbdbm_on_tcp(case.path, tmp_path, "--read-only") as (process, port):
        asyncio.run(all_of_them(port))
        assert process.poll() is None


@pytest.mark.timeout(120)
def test_lists_of_hundreds_of_exports_again_and_again(gallery: images.Gallery, tmp_path: Path) -> None:
    """By some who await each list, and by some who never read any; a good client is served beside them."""
    directory = tmp_path / "images"
    directory.mkdir()
    shutil.copy(gallery.get("v3").path, directory / "0.qcow2")
    for number in range(1, EXPORTS):
        (directory / f"{number}.qcow2").hardlink_to(directory / "0.qcow2")
    with servers.nbdbm(directory, "--directory", export="") as server, contextlib.ExitStack() as stack:

        def peer() -> Peer:
            one = Peer(server.connect(20))
            stack.callback(one.socket.close)
            one.greet()
            return one

        before = server.rss()
        for _ in range(40):
            peer().pour(option(Opt.LIST) * 2000, 0.05)
        one = peer()
        for _ in range(30):  # within the time of one handshake, on a busy machine too
            one.send(option(Opt.LIST))
            listed = 0
            while True:
                _, kind, _ = one.reply()
                if kind != Rep.SERVER:
                    break
                listed += 1
            assert (kind, listed) == (Rep.ACK, EXPORTS)
        server.export = "7.qcow2"
        good = client(server)
        assert good.pread(65536, 0) == gallery.content(gallery.get("v3"))[:65536]
        good.shutdown()
        assert server.peak_rss() - before < 128 << 20
