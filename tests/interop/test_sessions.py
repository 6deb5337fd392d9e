"""Sessions as real clients hold them: forms of replies, many connections, what ends when and how."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.interop.serving import digest, fingerprint
from tests.support import images, libnbd, qemu, servers
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "qemu-nbd", "nbdcopy", "nbdinfo", "libnbd", "newer")]

BITMAPS = "bitmaps-inconsistent"


@pytest.fixture(scope="module")
def case(gallery: images.Gallery) -> images.Case:
    return gallery.get("v3-packed")


@pytest.fixture(scope="module")
def server(case: images.Case) -> Iterator[servers.Server]:
    with servers.nbdbm(case.path) as server:
        yield server


@pytest.fixture(scope="module")
def content(case: images.Case, gallery: images.Gallery) -> bytes:
    return gallery.content(case)


def handle(server: servers.Server, *contexts: str) -> Any:
    """An open libnbd connection."""
    h = libnbd.module().NBD()
    for context in contexts:
        h.add_meta_context(context)
    h.connect_uri(server.uri)
    return h


# -- reads


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_reads_of_every_size_and_alignment(server: servers.Server, content: bytes, structured: bool) -> None:
    h = libnbd.module().NBD()
    h.set_request_structured_replies(structured)
    h.connect_uri(server.uri)
    size = len(content)
    spots = [0, 1, 511, 512, 4095, 65535, 65536, 65537, 1 << 20, size - 65537, size - 513, size - 1]
    for offset in spots:
        for length in (1, 2, 511, 512, 513, 4096, 65536, 65537, 300000):
            take = min(length, size - offset)
            assert h.pread(take, offset) == content[offset : offset + take], (offset, take)
    assert h.pread(size, 0) == content
    h.shutdown()


def test_chunks_of_a_structured_read(server: servers.Server, content: bytes) -> None:
    """Holes come as holes; with DF there is one chunk of data."""
    nbd = libnbd.module()
    h = handle(server)
    size = len(content)
    chunks: list[tuple[int, int, int]] = []

    def on_chunk(data: bytes, offset: int, status: int, error: Any) -> None:
        assert bytes(data) == content[offset : offset + len(data)]
        chunks.append((offset, len(data), status))

    assert h.pread_structured(size, 0, on_chunk) == content
    assert {status for _, _, status in chunks} == {nbd.READ_DATA, nbd.READ_HOLE}
    chunks.sort()
    assert sum(length for _, length, _ in chunks) == size

    chunks.clear()
    assert h.pread_structured(size, 0, on_chunk, nbd.CMD_FLAG_DF) == content
    assert chunks == [(0, size, nbd.READ_DATA)]
    h.shutdown()


def test_many_reads_in_flight(server: servers.Server, content: bytes) -> None:
    """Answers may overtake each other, and each belongs to its question."""
    nbd = libnbd.module()
    h = handle(server)
    pending: dict[int, tuple[int, Any]] = {}
    length = 7777
    spots = [(index * 104729) % (len(content) - length) for index in range(300)]
    while spots or pending:
        while spots and len(pending) < 64:
            offset = spots.pop()
            buffer = nbd.Buffer(length)
            pending[h.aio_pread(buffer, offset)] = (offset, buffer)
        h.poll(10000)
        for cookie in [cookie for cookie in pending if h.aio_command_completed(cookie)]:
            offset, buffer = pending.pop(cookie)
            assert buffer.to_bytearray() == content[offset : offset + length]
    h.shutdown()


def test_cache_and_flush(server: servers.Server) -> None:
    h = handle(server)
    assert (h.can_cache(), h.can_flush()) == (True, True)
    h.cache(1 << 20, 0)
    h.flush()
    h.shutdown()


@pytest.mark.parametrize("verb", ["write", "zero", "trim"])
def test_nothing_can_be_written(server: servers.Server, content: bytes, verb: str) -> None:
    """EPERM, even for a client that does not care what the server offers."""
    nbd = libnbd.module()
    h = handle(server)
    h.set_strict_mode(0)
    with pytest.raises(nbd.Error) as refused:
        if verb == "write":
            h.pwrite(b"x" * 70000, 4096)
        else:
            getattr(h, verb)(4096, 4096)
    assert refused.value.errno == "EPERM"
    assert h.pread(70000, 4096) == content[4096:74096]
    h.shutdown()


@pytest.mark.parametrize(
    ("offset", "length"), [(8 << 20, 512), ((8 << 20) - 256, 512), (1 << 62, 512), (0, (8 << 20) + 1)]
)
def test_reads_past_the_end(server: servers.Server, content: bytes, offset: int, length: int) -> None:
    nbd = libnbd.module()
    h = handle(server, "base:allocation")
    h.set_strict_mode(0)
    for ask in (
        lambda: h.pread(length, offset),
        lambda: h.block_status(length, offset, lambda *_: 0),
        lambda: h.cache(length, offset),
    ):
        with pytest.raises(nbd.Error) as refused:
            ask()
        assert refused.value.errno == "EINVAL"
    assert h.pread(512, 0) == content[:512]
    h.shutdown()


def test_an_oversize_read_is_refused_and_nothing_else(server: servers.Server, content: bytes) -> None:
    nbd = libnbd.module()
    h = handle(server)
    h.set_strict_mode(0)
    with pytest.raises(nbd.Error):
        h.pread(64 << 20, 0)
    assert h.pread(512, 0) == content[:512]
    h.shutdown()


# -- contexts


def test_one_extent_when_one_is_asked_for(server: servers.Server) -> None:
    nbd = libnbd.module()
    h = handle(server, "base:allocation", "qemu:allocation-depth")
    answers: dict[str, list[int]] = {}
    h.block_status(
        8 << 20, 0, lambda name, at, entries, error: answers.update({name: entries}), nbd.CMD_FLAG_REQ_ONE
    )
    assert {name: len(entries) for name, entries in answers.items()} == {
        "base:allocation": 2,
        "qemu:allocation-depth": 2,
    }
    assert all(entries[0] <= 8 << 20 for entries in answers.values())
    h.shutdown()


def test_block_status_from_anywhere(server: servers.Server) -> None:
    """Whatever the range, the answer is a piece of the whole picture."""
    contexts = ["base:allocation", "qemu:allocation-depth"]
    whole = libnbd.probe(server.uri, contexts=contexts, digest=False)["maps"]
    h = handle(server, *contexts)
    for offset, length in [(1, 1), (65535, 2), (123457, 1 << 20), ((8 << 20) - 1, 1), (4 << 20, 4 << 20)]:
        answers: dict[str, list[int]] = {}

        def on_extents(name: str, at: int, entries: list[int], error: Any, answers: Any = answers) -> None:
            assert name not in answers
            answers[name] = entries

        h.block_status(length, offset, on_extents)
        for name in contexts:
            at = offset
            for step, flags in zip(answers[name][0::2], answers[name][1::2], strict=True):
                assert flags_of(whole[name], at) == flags_of(whole[name], at + step - 1) == flags
                at += step
            assert offset < at <= 8 << 20
    h.shutdown()


def flags_of(extents: list[list[int]], offset: int) -> int:
    for length, flags in extents:
        if offset < length:
            return flags
        offset -= length
    raise AssertionError("past the end")


QUERIES = {
    "base:": ["base:allocation"],
    "base:allocation": ["base:allocation"],
    "qemu:": ["qemu:allocation-depth", "qemu:dirty-bitmap:fair", "qemu:dirty-bitmap:good"],
    "qemu:allocation-depth": ["qemu:allocation-depth"],
    "qemu:dirty-bitmap:": ["qemu:dirty-bitmap:fair", "qemu:dirty-bitmap:good"],
    "qemu:dirty-bitmap:good": ["qemu:dirty-bitmap:good"],
    "qemu:dirty-bitmap:broken": [],
    "qemu:dirty-bitmap:none": [],
    "qemu:nothing": [],
    "base:nothing": [],
    "other:": [],
    "other:thing": [],
}


@pytest.mark.parametrize("peer", ["nbdbm", "qemu-nbd"])
@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query)
def test_queries(gallery: images.Gallery, query: str, peer: str) -> None:
    """What LIST_META_CONTEXT and SET_META_CONTEXT find; the same is asked of qemu-nbd."""
    case = gallery.get(BITMAPS)
    start = servers.nbdbm(case.path) if peer == "nbdbm" else servers.qemu_nbd(case.path, bitmaps=case.bitmaps)
    with start as server:
        nbd = libnbd.module()
        h = nbd.NBD()
        h.set_opt_mode(True)
        h.connect_uri(server.uri)
        found: list[str] = []
        h.add_meta_context(query)
        h.opt_list_meta_context(found.append)
        assert sorted(found) == QUERIES[query]
        h.opt_abort()

        # A wildcard lists, but selects nothing.
        h = nbd.NBD()
        h.add_meta_context(query)
        h.connect_uri(server.uri)
        chosen = [name for name in case.contexts() if h.can_meta_context(name)]
        assert chosen == ([query] if QUERIES[query] == [query] else [])
        h.shutdown()


def test_several_queries_at_once(gallery: images.Gallery) -> None:
    case = gallery.get("bitmaps-many")
    with servers.nbdbm(case.path) as server:
        answer = libnbd.probe(
            server.uri, contexts=[*case.contexts(), "x:y", "qemu:dirty-bitmap:no"], digest=False
        )
        assert answer["contexts"] == case.contexts()


# -- several connections


def test_many_connections_at_once(server: servers.Server, content: bytes) -> None:
    handles = [handle(server) for _ in range(16)]
    assert all(h.can_multi_conn() for h in handles)
    for index, h in enumerate(handles * 3):
        offset = index * 4093
        assert h.pread(100_000, offset) == content[offset : offset + 100_000]
    for h in handles:
        h.shutdown()


def test_readers_in_parallel(server: servers.Server, case: images.Case, gallery: images.Gallery) -> None:
    """Four whole reads by four threads, while block status is asked for over and over."""
    expected = gallery.expected(case)
    answers: list[object] = []

    def read() -> None:
        answers.append(libnbd.probe(server.uri, contexts=["base:allocation"])["digest"])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert answers == [expected] * 4


# -- the life of a server


def serve(*args: object, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*servers.NBDBM, "serve", "-r", *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=qemu.environment(),
        **more,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signals_end_it_cleanly(case: images.Case, number: signal.Signals) -> None:
    before = fingerprint(case.files)
    with servers.nbdbm(case.path, clean=False) as server:
        h = handle(server)
        h.pread(512, 0)
        server.process.send_signal(number)
        assert server.process.wait(20) == 0
        assert not Path(server.socket).exists()
        assert "Traceback" not in server.output()
        assert fingerprint(case.files) == before


def test_what_it_prints(gallery: images.Gallery, tmp_path: Path) -> None:
    """The URI and the contexts on stdout, what is not served, why and the remedy on stderr."""
    case = gallery.get(BITMAPS)
    process = serve("-k", tmp_path / "s", "-x", "disk", case.path)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(1 + len(case.contexts()))]
    finally:
        process.terminate()
        out, err = process.communicate(timeout=20)
    assert lines[0] == f"nbd+unix:///disk?socket={tmp_path}/s"
    assert sorted(line.removeprefix("context: ") for line in lines[1:]) == sorted(case.contexts())
    assert out == ""
    for name in case.refused:
        (why,) = [line for line in err.splitlines() if f"'{name}'" in line]
        assert "in use" in why.lower() or "inconsistent" in why.lower() or "IN_USE" in why
        assert f"nbdbm bitmap remove {case.path} {name}" in err


def test_run_a_command(case: images.Case, gallery: images.Gallery, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    done = servers.nbdbm_run("serve", "-r", "--run", f'nbdcopy "$uri" {copy} && exit 3', case.path)
    assert done.returncode == 3, done.stderr
    assert digest(copy) == gallery.expected(case)


def test_only_the_bitmap_asked_for(gallery: images.Gallery) -> None:
    case = gallery.get(BITMAPS)
    with servers.nbdbm(case.path, "--bitmap", "fair", "--no-allocation-depth") as server:
        answer = libnbd.probe(server.uri, contexts=case.contexts(), digest=False, maps=False)
    assert answer["contexts"] == ["base:allocation", "qemu:dirty-bitmap:fair"]


@pytest.mark.parametrize("name", ["broken", "absent"])
def test_a_bitmap_that_cannot_be_served(gallery: images.Gallery, tmp_path: Path, name: str) -> None:
    done = servers.nbdbm_run("serve", "-r", "-k", tmp_path / "s", "-B", name, gallery.get(BITMAPS).path)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if name in line]
    assert line.startswith("nbdbm: ")
    assert not (tmp_path / "s").exists()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(case: images.Case, tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = serve("-k", path, case.path)
    try:
        wait_for(path)
        done = servers.nbdbm_run("serve", "-r", "-k", path, case.path)
        assert done.returncode == 1
        assert str(path) in done.stderr
        qemu.SYSTEM.run("nbdinfo", "--size", f"nbd+unix:///?socket={path}")
        first.kill()
    finally:
        first.kill()
        first.communicate(timeout=20)
    assert stat.S_ISSOCK(path.stat().st_mode)
    second = serve("-k", path, case.path)
    try:
        wait_for(path)
        qemu.SYSTEM.run("nbdinfo", "--size", f"nbd+unix:///?socket={path}")
    finally:
        second.terminate()
        second.communicate(timeout=20)
    assert not path.exists()


def wait_for(path: Path) -> None:
    """Until somebody accepts on ``path``."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if (
            path.exists()
            and qemu.run(
                qemu.SYSTEM.argv("nbdinfo", "--size", f"nbd+unix:///?socket={path}"), check=False
            ).returncode
            == 0
        ):
            return
        time.sleep(0.02)
    raise AssertionError(f"{path}: nobody there")


def test_the_socket_appears_when_it_can_be_served(case: images.Case, tmp_path: Path) -> None:
    """Whoever waits for the socket to appear may connect at once."""
    path = tmp_path / "s"
    process = serve("-k", path, case.path)
    try:
        deadline = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.0005)
        h = libnbd.module().NBD()
        h.connect_uri(f"nbd+unix:///?socket={path}")
        assert h.get_size() == case.size
        h.shutdown()
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_pid_file(case: images.Case, tmp_path: Path) -> None:
    with servers.nbdbm(case.path, "--pid-file", tmp_path / "pid") as server:
        libnbd.probe(server.uri, digest=False)
        assert int((tmp_path / "pid").read_text()) == server.process.pid


def test_qemu_may_read_the_image_meanwhile(server: servers.Server, case: images.Case) -> None:
    """Both only read: the locks of either leave room for the other."""
    qemu.SYSTEM.img("check", case.path)
    qemu.newer().img("check", case.path)


def test_an_image_that_is_being_written(tmp_path: Path) -> None:
    """A running machine's disk is refused, with a hint at what to do."""
    path = tmp_path / "disk.qcow2"
    qemu.SYSTEM.img("create", "-q", "-f", "qcow2", path, 1 << 20)
    with servers.started(lambda s: qemu.SYSTEM.argv("qemu-nbd", "-t", "-k", s, "-f", "qcow2", path)):
        done = servers.nbdbm_run("serve", "-r", "-k", tmp_path / "s", path)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert str(path) in done.stderr
        assert "lock" in done.stderr or "in use" in done.stderr
        with servers.nbdbm(path, "--force-share") as server:
            assert libnbd.probe(server.uri)["size"] == 1 << 20


def test_the_reader_keeps_writers_out(server: servers.Server, case: images.Case) -> None:
    if os.geteuid() != 0:
        pytest.skip("the image's mode keeps everybody but root from writing")
    done = qemu.run(qemu.SYSTEM.argv("qemu-io", "-f", "qcow2", "-c", "write 0 512", case.path), check=False)
    assert done.returncode != 0
    assert "lock" in done.stderr
