"""The programs people use: nbdinfo in every mode, qemu-img over NBD, nbdkit and nbd-client."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.interop.serving import UNDER_TEST, clip, digest, serving
from tests.support import images, libnbd, qemu, servers
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdcopy", "libnbd", "newer")]

CASE = "bitmaps-inconsistent"
SIZE = 8 * images.MIB
BITMAP = "qemu:dirty-bitmap:good"


@pytest.fixture(scope="module")
def case(gallery: images.Gallery) -> images.Case:
    return gallery.get(CASE)


@pytest.fixture(scope="module")
def server(case: images.Case) -> Iterator[servers.Server]:
    with serving(case, export="disk") as server:
        yield server


@pytest.fixture(scope="module")
def oracle(case: images.Case) -> Iterator[servers.Server]:
    with servers.qemu_nbd(case.path, bitmaps=case.bitmaps, export="disk") as server:
        yield server


def info(tools: qemu.Tools, *args: object) -> Any:
    """nbdinfo's JSON."""
    # What nbdinfo makes of the content (with file(1), if that is installed) is not always JSON.
    return json.loads(tools.run("nbdinfo", "--no-content", "--json", *args))


# -- nbdinfo


def test_info_is_what_it_is_of_qemu_nbd(tools: qemu.Tools, server: servers.Server, case: images.Case) -> None:
    ours = info(tools, server.uri)
    with servers.qemu_nbd(case.path, bitmaps=case.bitmaps, export="disk", tools=tools) as oracle:
        theirs = info(tools, oracle.uri)
    for field in ("protocol", "TLS", "structured", "extended"):
        assert ours.get(field) == theirs.get(field), field
    (export,), (expected,) = ours["exports"], theirs["exports"]
    assert sorted(export["contexts"]) == sorted(expected["contexts"])
    # Which sizes are preferred is a matter of taste.
    tastes = {"uri", "contexts", "description", "block_size_minimum", "block_size_preferred"}
    for field in expected.keys() - tastes:
        assert export[field] == expected[field], field


def test_info_names_no_inconsistent_bitmap(
    tools: qemu.Tools, server: servers.Server, case: images.Case
) -> None:
    (export,) = info(tools, server.uri)["exports"]
    assert sorted(export["contexts"]) == sorted(case.contexts())
    assert export["export-size"] == SIZE


def test_info_as_text(tools: qemu.Tools, server: servers.Server) -> None:
    out = tools.run("nbdinfo", server.uri)
    assert "export-size: 8388608 (8M)" in out
    assert BITMAP in out


def test_list(tools: qemu.Tools, server: servers.Server) -> None:
    listed = info(tools, "--list", server.uri)["exports"]
    assert [export["export-name"] for export in listed] == ["disk"]
    assert listed[0]["export-size"] == SIZE
    assert 'export="disk"' in tools.run("nbdinfo", "--list", server.uri)


def test_size(tools: qemu.Tools, server: servers.Server) -> None:
    assert tools.run("nbdinfo", "--size", server.uri).strip() == str(SIZE)


def test_capabilities(tools: qemu.Tools, server: servers.Server, oracle: servers.Server) -> None:
    """``--can`` and ``--is`` answer by exit status: 0 yes, 2 no."""
    able = [
        "cache",
        "connect",
        "df",
        "fast-zero",
        "flush",
        "fua",
        "multi-conn",
        "read",
        "trim",
        "write",
        "zero",
    ]
    questions = [f"--can={what}" for what in [*able, "structured-reply"]]
    questions += [f"--is={what}" for what in ["read-only", "rotational", "tls"]]
    for question in questions:
        statuses = []
        for uri in (server.uri, oracle.uri):
            done = qemu.run(tools.argv("nbdinfo", question, uri), check=False)
            assert done.returncode in (0, 2), done.stderr
            statuses.append(done.returncode)
        ours, theirs = statuses
        assert ours == theirs, question


@pytest.mark.parametrize("context", ["base:allocation", "qemu:allocation-depth", BITMAP])
def test_map(tools: qemu.Tools, server: servers.Server, oracle: servers.Server, context: str) -> None:
    """The same regions, whatever the size of the replies that told them."""

    def regions(uri: str) -> list[list[int]]:
        found: list[list[int]] = []
        for entry in info(tools, f"--map={context}", uri):
            assert entry["offset"] == sum(length for length, _ in found)
            if found and found[-1][1] == entry["type"]:
                found[-1][0] += entry["length"]
            else:
                found.append([entry["length"], entry["type"]])
        return found

    ours = regions(server.uri)
    assert len(ours) > 1
    assert ours == regions(oracle.uri)


@pytest.mark.parametrize("context", ["base:allocation", "qemu:allocation-depth", BITMAP])
def test_totals(tools: qemu.Tools, server: servers.Server, oracle: servers.Server, context: str) -> None:
    ours = info(tools, f"--map={context}", "--totals", server.uri)
    assert sum(entry["size"] for entry in ours) == SIZE
    assert ours == info(tools, f"--map={context}", "--totals", oracle.uri)


def test_map_of_an_inconsistent_bitmap(tools: qemu.Tools, server: servers.Server) -> None:
    done = qemu.run(tools.argv("nbdinfo", "--map=qemu:dirty-bitmap:broken", server.uri), check=False)
    assert done.returncode != 0
    assert "broken" in done.stderr


def test_an_export_that_is_not_there(tools: qemu.Tools, server: servers.Server) -> None:
    done = qemu.run(tools.argv("nbdinfo", server.uri.replace("/disk?", "/other?")), check=False)
    assert done.returncode == 1
    # The connection of the one who asked for it ends; the server does not.
    assert tools.run("nbdinfo", "--size", server.uri).strip() == str(SIZE)


# -- qemu-img


def test_image_info(tools: qemu.Tools, server: servers.Server) -> None:
    shown = tools.img_json("info", server.uri)
    assert (shown["format"], shown["virtual-size"]) == ("raw", SIZE)


def test_image_map(tools: qemu.Tools, server: servers.Server, oracle: servers.Server) -> None:
    ours = tools.img_json("map", server.uri)
    assert len(ours) > 3
    assert ours == tools.img_json("map", oracle.uri)


@pytest.mark.parametrize("name", ["good", "fair"])
def test_dirty_extents_as_qemu_img_sees_them(
    tools: qemu.Tools, server: servers.Server, oracle: servers.Server, name: str
) -> None:
    """``x-dirty-bitmap`` is how qemu-img shows a bitmap: dirty parts appear as not "data"."""

    def dirty(peer: servers.Server) -> Any:
        node = f"{peer.qemu_uri},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        return tools.img_json("map", "--image-opts", node)

    ours = dirty(server)
    assert {entry["data"] for entry in ours} == {True, False}
    assert ours == dirty(oracle)


def test_compare(tools: qemu.Tools, server: servers.Server, case: images.Case) -> None:
    out = tools.img("compare", "-U", "-f", "raw", "-F", "qcow2", server.uri, case.path)
    assert "identical" in out


def test_incremental_copy(
    tools: qemu.Tools, server: servers.Server, case: images.Case, tmp_path: Path
) -> None:
    """A full copy of nothing plus the dirty extents is the disk where it was written: the use of it all."""
    answer = libnbd.probe(server.uri, contexts=[BITMAP], digest=False)
    ranges, at = [], 0
    for length, flags in answer["maps"][BITMAP]:
        if flags & 1:
            ranges.append([at, length])
        at += length
    answer = libnbd.probe(server.uri, ranges=ranges, digest=False)
    copy = tmp_path / "full.raw"
    tools.img("convert", "-U", "-f", "qcow2", "-O", "raw", case.path, copy)
    expected = copy.read_bytes()
    assert ranges
    for (offset, length), data in zip(ranges, answer["ranges"], strict=True):
        assert bytes.fromhex(data) == expected[offset : offset + length]


def test_backup_by_qemu_img(
    tools: qemu.Tools, server: servers.Server, gallery: images.Gallery, tmp_path: Path
) -> None:
    """``convert`` to a qcow2 image of its own, and back."""
    tools.img("convert", "-f", "raw", "-O", "qcow2", "-c", server.uri, tmp_path / "backup.qcow2")
    tools.img("convert", "-O", "raw", tmp_path / "backup.qcow2", tmp_path / "raw")
    assert digest(tmp_path / "raw") == gallery.expected(gallery.get(CASE))


def test_newer_nbdcopy(server: servers.Server, gallery: images.Gallery, tmp_path: Path) -> None:
    """Four connections at once, each with 64 requests in flight."""
    qemu.newer().run("nbdcopy", "--connections=4", "--requests=64", server.uri, tmp_path / "copy")
    assert digest(tmp_path / "copy") == gallery.expected(gallery.get(CASE))


def test_nbdcopy_in_small_requests(
    tools: qemu.Tools, server: servers.Server, gallery: images.Gallery, tmp_path: Path
) -> None:
    tools.run("nbdcopy", "--request-size=4096", server.uri, tmp_path / "copy")
    assert digest(tmp_path / "copy") == gallery.expected(gallery.get(CASE))


# -- nbdkit, nbd-client


@requires("nbdkit")
def test_through_nbdkit(server: servers.Server, case: images.Case, gallery: images.Gallery) -> None:
    """nbdkit's nbd plugin passes on reads and block status, and nbdinfo and nbdcopy see the same disk."""

    def argv(path: str) -> list[str]:
        return qemu.SYSTEM.argv("nbdkit", "-f", "-U", path, "nbd", f"uri={server.uri}")

    with servers.started(argv) as proxy:
        answer = libnbd.probe(proxy.uri, contexts=["base:allocation"])
        direct = libnbd.probe(server.uri, contexts=["base:allocation"])
    assert answer["digest"] == direct["digest"] == gallery.expected(case)
    assert clip(answer["maps"]["base:allocation"], SIZE) == direct["maps"]["base:allocation"]


@requires("nbd-client")
def test_list_by_nbd_client(case: images.Case, unused_port: int) -> None:
    """The oldest client there is, over TCP."""
    if UNDER_TEST == "qemu-nbd":
        argv = qemu.SYSTEM.argv(
            "qemu-nbd", "-r", "-t", "-p", unused_port, "-x", "disk", "-f", "qcow2", case.path
        )
    else:
        argv = [
            *servers.NBDBM,
            "serve",
            "-r",
            "-b",
            "127.0.0.1",
            "-p",
            str(unused_port),
            "-x",
            "disk",
            str(case.path),
        ]
    with servers.on_tcp(argv, unused_port):
        out = qemu.SYSTEM.run("nbd-client", "-l", "127.0.0.1", unused_port)
        assert out.splitlines()[-1] == "disk"
        assert info(qemu.SYSTEM, f"nbd://127.0.0.1:{unused_port}/disk")["exports"][0]["export-size"] == SIZE


def test_qemu_lists_it(tools: qemu.Tools, server: servers.Server) -> None:
    """``qemu-nbd --list`` shows the contexts of every export."""
    done = subprocess.run(
        tools.argv("qemu-nbd", "--list", "-k", server.socket),
        capture_output=True,
        text=True,
        timeout=qemu.TIMEOUT,
        check=True,
        env=qemu.environment(),
    )
    assert "export: 'disk'" in done.stdout
    assert BITMAP in done.stdout
    assert "broken" not in done.stdout
