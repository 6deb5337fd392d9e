"""Files that change under a server: clients get an error and never wrong data, and the log names the file."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.support import images, libnbd, qemu, servers
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "libnbd")]

SIZE = 8 * images.MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu.SYSTEM.run("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    qemu.SYSTEM.run("qemu-io", "-f", "qcow2", "-c", f"write -P 17 0 {SIZE}", path)
    return path


def test_an_image_that_shrinks(image: Path) -> None:
    nbd = libnbd.module()
    with servers.nbdbm(image) as server:
        client = nbd.NBD()
        client.connect_uri(server.uri)
        assert client.pread(4096, 0) == b"\x11" * 4096
        length = image.stat().st_size
        with image.open("r+b") as file:
            file.truncate(length - 2 * images.MIB)
        assert client.pread(4096, 0) == b"\x11" * 4096
        for offset, count in ((SIZE - 4096, 4096), (SIZE - images.MIB, images.MIB), (0, SIZE)):
            other = nbd.NBD()
            other.connect_uri(server.uri)
            with pytest.raises(nbd.Error):
                other.pread(count, offset)
        assert client.pread(4096, 0) == b"\x11" * 4096
        client.shutdown()
        assert str(image) in server.output() and "has become shorter while it is in use" in server.output()


def test_an_image_that_loses_its_tables(image: Path) -> None:
    """Gone before the L2 table was read: the disk must not look empty."""
    nbd = libnbd.module()
    with servers.nbdbm(image) as server:
        with image.open("r+b") as file:
            file.truncate(3 * 65536)
        client = nbd.NBD()
        client.add_meta_context("base:allocation")
        client.connect_uri(server.uri)
        with pytest.raises(nbd.Error) as caught:
            client.pread(4096, 0)
        assert caught.value.errno == errno.errorcode[errno.EIO]
        with pytest.raises(nbd.Error):
            client.block_status(SIZE, 0, lambda *_: 0)
        client.shutdown()


def test_an_image_that_is_deleted(image: Path, tmp_path: Path) -> None:
    """It is served to the end, writes and all; its bitmaps go with it."""
    nbd = libnbd.module()
    second = tmp_path / "link.qcow2"
    second.hardlink_to(image)
    with servers.nbdbm(image, writable=True) as server:
        image.unlink()
        client = nbd.NBD()
        client.connect_uri(server.uri)
        client.pwrite(b"x" * 4096, 65536)
        client.flush()
        assert client.pread(4096, 65536) == b"x" * 4096
        client.shutdown()
    qemu.SYSTEM.run("qemu-img", "check", "-q", second)
    qemu.SYSTEM.run("qemu-io", "-f", "qcow2", "-r", "-c", "read -P 0x78 65536 4096", second)
