"""Many exports in one server, as clients see them: lists, names, descriptions, rules, connections."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.interop.serving import digest
from tests.support import images, libnbd, qemu, servers
from tests.support.marks import requires
from tests.support.servers import NBDBM, Server, nbdbm_run, started, stop

pytestmark = [requires("qemu-img", "qemu-io", "nbdinfo", "nbdcopy", "libnbd", "newer")]

SIZE = 4 * images.MIB


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two images that differ, tracked by a bitmap each."""
    place = tmp_path_factory.mktemp("exports")
    for name, pattern in (("one", 0x11), ("two", 0x22)):
        path = place / f"{name}.qcow2"
        qemu.SYSTEM.run("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
        qemu.SYSTEM.run("qemu-img", "bitmap", "--add", path, "b0")
        qemu.SYSTEM.run("qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} 1M 1M", path)
    return place


@contextmanager
def server(*arguments: object, clean: bool = True) -> Iterator[Server]:
    """``nbdbm serve`` on a Unix socket; ends well, without a traceback."""
    with started(lambda path: [*NBDBM, "serve", "--socket", path, *map(str, arguments)], export="") as server:
        yield server
        status = stop(server.process)
        assert "Traceback" not in server.output() and status == 0, server.output()


def uri(server: Server, export: str) -> str:
    return server.uri.replace("///?", f"///{export}?")


def listed(tools: qemu.Tools, server: Server) -> dict[str, Any]:
    found = json.loads(tools.run("nbdinfo", "--no-content", "--json", "--list", server.uri))
    return {export["export-name"]: export for export in found["exports"]}


def test_list_tells_names_descriptions_and_contexts(tools: qemu.Tools, place: Path, tmp_path: Path) -> None:
    config = tmp_path / "nbdbm.toml"
    config.write_text(
        f'[[export]]\nname = "first"\nimage = "{place}/one.qcow2"\nread-only = true\n'
        'description = "the first"\n'
        f'[[export]]\nname = "séc ond"\nimage = "{place}/two.qcow2"\nread-only = true\nbitmaps = []\n'
        f'[[export]]\nname = "hidden"\nimage = "{place}/two.qcow2"\nread-only = true\nallow-users = [65534]\n'
        f'[directory]\npath = "{place}"\nread-only = true\n'
    )
    with server("--config", config) as running:
        exports = listed(tools, running)
    assert list(exports) == ["first", "séc ond", "one.qcow2", "two.qcow2"]
    assert exports["first"]["description"] == "the first"
    assert "qemu:dirty-bitmap:b0" in exports["first"]["contexts"]
    assert "qemu:dirty-bitmap:b0" not in exports["séc ond"]["contexts"]
    assert "qemu:dirty-bitmap:b0" in exports["two.qcow2"]["contexts"]
    assert all(export["export-size"] == SIZE for export in exports.values())


def test_what_cannot_be_opened_stays_in_the_list(tools: qemu.Tools, place: Path, tmp_path: Path) -> None:
    (tmp_path / "two.qcow2").write_bytes(b"QFI\xfb" + bytes(200))
    for name in ("one", "three"):
        (tmp_path / f"{name}.qcow2").write_bytes((place / "one.qcow2").read_bytes())
    with server("-r", "--directory", tmp_path) as running:
        done = qemu.run(tools.argv("nbdinfo", "--no-content", "--list", running.uri), check=False)
        assert done.returncode == 1 and "for export: two.qcow2" in done.stderr, "it was in the list"
        assert [line for line in done.stdout.splitlines() if line.startswith("export=")] == [
            'export="one.qcow2":',
            'export="three.qcow2":',
        ]


def test_each_name_is_its_own_image(tools: qemu.Tools, place: Path, tmp_path: Path) -> None:
    with server("-r", f"a={place}/one.qcow2", f"b={place}/two.qcow2") as running:
        for export, name in (("a", "one"), ("b", "two")):
            tools.run(
                "qemu-img",
                "compare",
                "-f",
                "raw",
                "-F",
                "qcow2",
                uri(running, export),
                place / f"{name}.qcow2",
            )
            copy = tmp_path / f"{export}.raw"
            tools.run("nbdcopy", uri(running, export), copy)
            expected = tmp_path / f"{name}.raw"
            tools.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", place / f"{name}.qcow2", expected)
            assert digest(copy) == digest(expected)
        with pytest.raises(qemu.ToolFailed, match="export: c"):
            tools.run("nbdinfo", uri(running, "c"))


def test_a_directory_is_written_to_and_its_bitmaps_are_true(tools: qemu.Tools, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tools.run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / name, SIZE)
        tools.run("qemu-img", "bitmap", "--add", "-g", "64K", tmp_path / name, "b0")
    with server("--directory", tmp_path, "--grace", "0") as running:
        tools.run("qemu-io", "-f", "raw", "-c", "write -P 7 128K 64K", uri(running, "a"))
        # Closed when qemu-io has left: b is opened by another client meanwhile.
        tools.run("qemu-io", "-f", "raw", "-c", "write -P 9 1M 4K", uri(running, "b"))
        dirty = json.loads(tools.run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:b0", uri(running, "a")))
        assert [(each["offset"], each["length"]) for each in dirty if each["type"]] == [(131072, 65536)]
    for name, offset in (("a", 131072), ("b", 1048576)):
        tools.run("qemu-img", "check", "-q", tmp_path / name)
        with servers.qemu_nbd(tmp_path / name, bitmaps=["b0"], tools=tools) as oracle:
            dirty = json.loads(tools.run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:b0", oracle.uri))
        assert [each["offset"] for each in dirty if each["type"]] == [offset]


def test_no_path_reaches_the_file_system(place: Path) -> None:
    nbd = libnbd.module()
    names = ["../one.qcow2", "./one.qcow2", f"{place}/one.qcow2", "one.qcow2/", "", ".", "/", "ONE.qcow2"]
    with server("-r", "--directory", place) as running:
        for name in [*names, "one.qcow2"]:
            client = nbd.NBD()
            client.set_export_name(name)
            if name in names:
                with pytest.raises(nbd.Error):
                    client.connect_unix(running.socket)
            else:
                client.connect_unix(running.socket)
                assert client.get_size() == SIZE
                client.shutdown()


def test_a_broken_image_is_refused_and_named_in_the_log_only(tmp_path: Path) -> None:
    (tmp_path / "broken.qcow2").write_bytes(b"QFI\xfb" + bytes(508))
    nbd = libnbd.module()
    with server("-r", "--directory", tmp_path) as running:
        client = nbd.NBD()
        with pytest.raises(nbd.Error) as caught:
            client.connect_uri(uri(running, "broken.qcow2"))
        assert f"{tmp_path}/broken.qcow2: " in running.output()
        assert str(tmp_path) not in str(caught.value)


def test_connections_of_one_export(place: Path, tmp_path: Path) -> None:
    config = tmp_path / "nbdbm.toml"
    config.write_text(
        f'[[export]]\nname = "a"\nimage = "{place}/one.qcow2"\nread-only = true\nmax-connections = 1\n'
    )
    nbd = libnbd.module()
    with server("--config", config) as running:
        first = nbd.NBD()
        first.connect_uri(uri(running, "a"))
        second = nbd.NBD()
        with pytest.raises(nbd.Error, match="policy prevents"):
            second.connect_uri(uri(running, "a"))
        assert first.pread(1, 1 << 20) == b"\x11"
        first.shutdown()


def test_writes_are_seen_through_every_connection(tmp_path: Path) -> None:
    """What CAN_MULTI_CONN promises: seen at once, and durable by a flush on another connection."""
    image = tmp_path / "disk.qcow2"
    nbdbm_run("create", image, SIZE, check=True)
    nbd = libnbd.module()
    with server(image) as running:
        first, second = nbd.NBD(), nbd.NBD()
        for each in (first, second):
            each.connect_uri(running.uri)
            assert each.can_multi_conn()
        first.pwrite(b"x" * 4096, 8192)
        assert second.pread(4096, 8192) == b"x" * 4096
        second.flush()
        # Killed: what was flushed through the other connection is there.
        running.process.kill()
        running.process.wait()
        qemu.SYSTEM.run("qemu-io", "-f", "qcow2", "-r", "-c", "read -P 0x78 8192 4096", image)
        running.process.returncode = 0
