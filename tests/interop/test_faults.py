"""Files that change under a server: clients get an error and never wrong data, and the log names the file."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from tests.interop.writing import check, connect, content_by_qemu, dirty_by_qemu
from tests.support import images, libnbd, qemu, servers
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "qemu-nbd", "libnbd")]

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


def wait_closed(server: servers.Server, path: Path) -> None:
    """Until the server has closed an image that it opens on demand: nobody holds it any more."""
    deadline = time.monotonic() + 30
    while str(path) in server.files():
        assert time.monotonic() < deadline, server.output()
        time.sleep(0.05)


def overlay(backing: Path) -> Path:
    """An empty image on top of another one."""
    path = backing.with_name("overlay.qcow2")
    qemu.SYSTEM.img("create", "-q", "-f", "qcow2", "-b", backing.name, "-F", "qcow2", path)
    return path


def filled(path: Path, value: int, size: int = SIZE) -> Path:
    qemu.SYSTEM.img("create", "-q", "-f", "qcow2", path, size)
    qemu.SYSTEM.io(path, f"write -q -P {value} 0 {size}")
    return path


@pytest.mark.parametrize("size", [SIZE, SIZE // 2, 2 * SIZE])
def test_a_backing_file_that_is_replaced(image: Path, size: int) -> None:
    """Whoever began with the old one goes on with it; the next server takes the new one, of any size."""
    top = overlay(image)
    with servers.nbdbm(top, writable=True) as server:
        client = connect(server.uri)
        filled(image.with_name("new"), 34, size).rename(image)
        # Of the middle of a cluster: what surrounds it comes from below.
        client.pwrite(b"x" * 100, SIZE - images.MIB + 1000)
        assert client.pread(2000, SIZE - images.MIB) == b"\x11" * 1000 + b"x" * 100 + b"\x11" * 900
        client.shutdown()
    assert check(top)[0] == 0
    with servers.nbdbm(top) as server:
        client = connect(server.uri)
        assert client.pread(100, 0) == b"\x22" * 100
        below = b"\x22" if size >= SIZE else b"\0"
        assert client.pread(100, SIZE - 100) == below * 100
        client.shutdown()


def test_a_backing_file_that_shrinks(image: Path) -> None:
    """Reading what is gone fails, and so does writing to a part of it: zeroes in its place would be lies."""
    nbd = libnbd.module()
    top = overlay(image)
    with servers.nbdbm(top, writable=True) as server:
        client = connect(server.uri)
        assert client.pread(4096, 0) == b"\x11" * 4096
        with image.open("r+b") as file:
            file.truncate(image.stat().st_size - 2 * images.MIB)
        for work in (lambda: client.pread(4096, SIZE - 4096), lambda: client.pwrite(b"x", SIZE - 4096)):
            with pytest.raises(nbd.Error) as caught:
                work()
            assert caught.value.errno == "EIO"
        # A whole cluster needs nothing from below.
        client.pwrite(b"y" * 65536, SIZE - 65536)
        assert client.pread(4096, SIZE - 4096) == b"y" * 4096
        client.shutdown()
        said = server.output()
        assert f"{image}: has become shorter while it is in use" in said
    assert check(top)[0] == 0


def test_a_backing_file_that_is_not_there(image: Path) -> None:
    """Deleted while it is served, it is served to the end; then one line says what is missing."""
    top = overlay(image)
    with servers.nbdbm(top) as server:
        image.unlink()
        client = connect(server.uri)
        assert client.pread(4096, 0) == b"\x11" * 4096
        client.shutdown()
    done = servers.nbdbm_run("serve", "--run", "true", top)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"nbdbm: {top}: ") and str(image) in line and "No such file or directory" in line


def test_an_image_that_is_renamed(image: Path) -> None:
    """What is written, and the bitmaps, go to the file that was opened, whatever it is called."""
    qemu.SYSTEM.img("bitmap", "--add", "-g", "64K", image, "b")
    elsewhere = image.with_name("elsewhere.qcow2")
    with servers.nbdbm(image, writable=True) as server:
        client = connect(server.uri)
        image.rename(elsewhere)
        filled(image, 51)
        before = image.read_bytes()
        client.pwrite(b"x" * 4096, 65536)
        client.shutdown()
    assert image.read_bytes() == before
    case = images.Case("renamed", elsewhere, bitmaps=["b"], size=SIZE)
    assert dirty_by_qemu(case) == {"b": {1}}
    assert check(elsewhere)[0] == 0
    assert content_by_qemu(case)[65536:69632] == b"x" * 4096


def test_an_image_of_a_directory_that_is_replaced(image: Path) -> None:
    """Once it is closed, its name means the new file; until then, the old one."""
    uri = "nbd+unix:///{}?socket={}"
    with servers.nbdbm(image.parent, "--grace", "0", "--directory", writable=True) as server:
        client = connect(uri.format(image.name, server.socket))
        assert client.get_size() == SIZE
        filled(image.parent.parent / "new", 34, SIZE // 2).rename(image)
        other = connect(uri.format(image.name, server.socket))
        assert other.get_size() == SIZE and other.pread(10, 0) == b"\x11" * 10
        for one in (client, other):
            one.shutdown()
        wait_closed(server, image.with_name(image.name + " (deleted)"))
        client = connect(uri.format(image.name, server.socket))
        assert client.get_size() == SIZE // 2 and client.pread(10, 0) == b"\x22" * 10
        client.shutdown()
        wait_closed(server, image)
        image.unlink()
        with pytest.raises(libnbd.module().Error):
            connect(uri.format(image.name, server.socket))
