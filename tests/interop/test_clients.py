"""Our own client against servers of others: ``nbdbm map`` speaks NBD for a URI."""

from __future__ import annotations

import json
import os
import signal
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.support import images, libnbd, qemu, servers
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "qemu-nbd", "nbdkit", "nbd-server", "libnbd", "newer")]

MIB = 1024 * 1024


def ours(target: object, *options: object) -> list[list[int]]:
    """[length, flags] as ``nbdbm map --json`` tells them."""
    done = servers.nbdbm_run("map", "--json", *options, target)
    assert done.returncode == 0, done.stderr
    found, at = [], 0
    for entry in json.loads(done.stdout):
        assert entry["offset"] == at
        at += entry["length"]
        found.append([entry["length"], entry["type"]])
    return found


def theirs(uri: str, context: str) -> list[list[int]]:
    """The same by libnbd."""
    answer = libnbd.probe(uri, contexts=[context], digest=False)
    extents: list[list[int]] = answer["maps"][context]
    return extents


CONTEXTS = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:fine", "qemu:dirty-bitmap:default"]


@pytest.mark.parametrize("context", CONTEXTS)
def test_map_of_qemu_nbd(gallery: images.Gallery, tools: qemu.Tools, context: str) -> None:
    """And of the image itself: the same answer by either way."""
    case = gallery.get("bitmaps")
    with servers.qemu_nbd(case.path, bitmaps=case.bitmaps, tools=tools) as server:
        expected = theirs(server.uri, context)
        assert ours(server.uri, "--context", context) == expected
    assert ours(case.path, "--context", context) == expected


def test_map_of_nbdbm(gallery: images.Gallery) -> None:
    case = gallery.get("chain-5")
    with servers.nbdbm(case.path) as server:
        assert ours(server.uri) == theirs(server.uri, "base:allocation") == ours(case.path)


def test_map_of_nbdkit(tmp_path: Path) -> None:
    """A server that answers as a script says: short answers, and extents past what was asked for."""
    script = tmp_path / "extents.py"
    script.write_text(
        textwrap.dedent(
            """
            import nbdkit
            API_VERSION = 2
            SIZE = 64 * 1024 * 1024

            def open(readonly):
                return 1

            def get_size(h):
                return SIZE

            def can_extents(h):
                return True

            def pread(h, buf, offset, flags):
                buf[:] = b"x" * len(buf)

            def extents(h, count, offset, flags):
                # Alternating mebibytes, a few at a time, the first one from before the offset.
                first = offset // 1048576 * 1048576
                kinds = [0, nbdkit.EXTENT_HOLE, nbdkit.EXTENT_ZERO, nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO]
                return [(first + i * 1048576, 1048576, kinds[(first // 1048576 + i) % 4]) for i in range(3)]
            """
        )
    )
    argv = qemu.SYSTEM.argv
    with servers.started(lambda path: argv("nbdkit", "-f", "-r", "-U", path, "python", script)) as server:
        found = ours(server.uri)
    # nbdkit's own flags: 1 hole, 2 zero, the same numbers as on the wire.
    assert found == [[MIB, index % 4] for index in range(64)]


def test_map_of_nbd_server(tmp_path: Path, unused_port: int) -> None:
    """One that knows simple replies only: it is said that nothing can be known of its disk."""
    (tmp_path / "disk").write_bytes(bytes(MIB))
    (tmp_path / "config").write_text(
        textwrap.dedent(
            f"""
            [generic]
            port = {unused_port}
            listenaddr = 127.0.0.1
            [disk]
            exportname = {tmp_path}/disk
            readonly = true
            """
        )
    )
    # It becomes a daemon, and its process is known by its file only.
    pid_file = tmp_path / "pid"
    qemu.SYSTEM.run("nbd-server", "-C", tmp_path / "config", "-p", pid_file)
    try:
        servers.wait_for_port(unused_port)
        done = servers.nbdbm_run("map", f"nbd://127.0.0.1:{unused_port}/disk")
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "no metadata contexts" in line


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("nbd+unix:///?socket=/nowhere/at/all", "/nowhere/at/all"),
        ("nbd://127.0.0.1:1/", "127.0.0.1"),
        ("nbd+unix:///", "socket"),
        ("nbds://127.0.0.1:1/", "connection refused"),
        ("http://127.0.0.1/", ""),
    ],
)
def test_servers_that_are_not_there(uri: str, says: str) -> None:
    done = servers.nbdbm_run("map", uri)
    assert done.returncode == 1, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("nbdbm: ")
    assert says.lower() in line.lower()


def test_an_export_or_a_context_that_is_not_there(gallery: images.Gallery) -> None:
    case = gallery.get("bitmaps")
    with servers.qemu_nbd(case.path, export="disk", bitmaps=["fine"]) as server:
        for args, says in (
            ([server.uri.replace("/disk?", "/other?")], "other"),
            ([server.uri, "--context", "qemu:dirty-bitmap:none"], "none"),
        ):
            done = servers.nbdbm_run("map", *args)
            assert done.returncode == 1
            (line,) = done.stderr.splitlines()
            assert says in line


def test_totals_are_those_of_nbdinfo(gallery: images.Gallery, tools: qemu.Tools) -> None:
    case = gallery.get("chain-mixed-clusters")

    def rows(text: str) -> Any:
        return sorted((entry["size"], entry["type"]) for entry in json.loads(text))

    with servers.qemu_nbd(case.path, tools=tools) as server:
        done = servers.nbdbm_run("map", "--json", "--totals", server.uri)
        assert done.returncode == 0, done.stderr
        assert rows(done.stdout) == rows(tools.run("nbdinfo", "--map", "--totals", "--json", server.uri))


def test_info_agrees_with_qemu_img(gallery: images.Gallery) -> None:
    """Sizes, chain, snapshots and bitmaps of several images."""
    for name in ("bitmaps", "bitmaps-inconsistent", "snapshots", "chain-5", "zstd", "data-file", "v2-512"):
        case = gallery.get(name)
        done = servers.nbdbm_run("info", "--json", case.path)
        assert done.returncode == 0, done.stderr
        shown = json.loads(done.stdout)
        expected = qemu.SYSTEM.img_json("info", "-U", "--backing-chain", case.path)
        assert values(shown, "virtual-size", "virtual_size", "size") == expected[0]["virtual-size"], name
        text = json.dumps(shown)
        for layer in expected:
            assert json.dumps(layer["filename"])[1:-1].rsplit("/", 1)[-1] in text, (name, layer["filename"])
        for snapshot in expected[0].get("snapshots", []):
            assert snapshot["name"] in text
        for bitmap in expected[0]["format-specific"]["data"].get("bitmaps", []):
            assert bitmap["name"] in text


def values(shown: dict[str, Any], *names: str) -> Any:
    """The first of these fields that is there."""
    for name in names:
        if name in shown:
            return shown[name]
    raise AssertionError(f"none of {names} in {sorted(shown)}")


def test_bitmap_list_agrees_with_qemu_img(gallery: images.Gallery) -> None:
    case = gallery.get("bitmaps-inconsistent")
    done = servers.nbdbm_run("bitmap", "list", "--json", case.path)
    assert done.returncode == 0, done.stderr
    listed = {entry["name"]: entry for entry in json.loads(done.stdout)}
    expected = qemu.SYSTEM.img_json("info", "-U", case.path)["format-specific"]["data"]["bitmaps"]
    assert set(listed) == {bitmap["name"] for bitmap in expected}
    for bitmap in expected:
        assert listed[bitmap["name"]]["granularity"] == bitmap["granularity"]
        assert sorted(listed[bitmap["name"]]["flags"]) == sorted(bitmap["flags"])
