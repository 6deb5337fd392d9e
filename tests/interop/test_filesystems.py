"""File systems that are really full or really read-only (tests/support/mounts.py)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.interop.serving import fingerprint
from tests.interop.writing import Guest, bitmaps, check, connect, content_by_qemu, dirty_by_qemu, judge
from tests.support import images, libnbd, mounts, qemu, servers
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "qemu-nbd", "libnbd", "newer")]

SIZE = 64 << 20
"""Of the disk; the file systems are smaller."""
CLUSTER = 64 << 10
IN_USE = {"in-use", "auto"}


@pytest.fixture
def small(tmp_path: Path) -> Iterator[mounts.Mounted]:
    """A file system with room for a sixth of the disk."""
    with mounts.memory(tmp_path / "small", 10 << 20) as mounted:
        yield mounted


@pytest.fixture(params=["nbdbm", "qemu-img"])
def case(request: pytest.FixtureRequest, small: mounts.Mounted) -> images.Case:
    """An empty disk on it, made by either program, with two bitmaps that record."""
    case = images.Case(request.param, small.path / "disk.qcow2", size=SIZE, bitmaps=["b", "fine"])
    if request.param == "nbdbm":
        servers.nbdbm_run("create", "-q", case.path, SIZE, check=True)
    else:
        qemu.SYSTEM.img("create", "-q", "-f", "qcow2", case.path, SIZE)
    servers.nbdbm_run("bitmap", "add", case.path, "b", check=True)
    servers.nbdbm_run("bitmap", "add", case.path, "fine", "-g", 4096, check=True)
    return case


def refused(work: Any) -> bool:
    """Whether the server said ENOSPC; anything but that or success is a failure of the test."""
    try:
        work()
    except libnbd.module().Error as error:
        assert error.errno == "ENOSPC", error
        return True
    return False


def flags_of(path: Path) -> dict[str, set[str]]:
    return {name: set(flags) for name, (_, flags) in bitmaps(path).items()}


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line


class TestReadOnly:
    @pytest.fixture
    def files(self, small: mounts.Mounted) -> list[Path]:
        """A chain of two and a raw image, which nobody can write to any more."""
        base, top, raw = (small.path / name for name in ("base.qcow2", "top.qcow2", "disk.raw"))
        qemu.SYSTEM.img("create", "-q", "-f", "qcow2", base, "1M")
        qemu.SYSTEM.io(base, "write -q -P 7 0 64k")
        qemu.SYSTEM.img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
        servers.nbdbm_run("bitmap", "add", top, "b", check=True)
        raw.write_bytes(b"\7" * (1 << 20))
        small.read_only()
        return [base, top, raw]

    def test_refused_for_writing_and_served_for_reading(self, files: list[Path], tmp_path: Path) -> None:
        before = fingerprint(files)
        for image in files:
            form = ["-f", "raw"] if image.suffix == ".raw" else []
            done = servers.nbdbm_run("serve", *form, "-k", tmp_path / "s", image)
            assert one_line(done) == (
                f"nbdbm: {image}: cannot be opened for writing: Read-only file system;"
                " --read-only serves it as it is"
            )
            with servers.nbdbm(image, *form) as server:
                client = connect(server.uri)
                assert client.is_read_only() and client.pread(CLUSTER, 0) == b"\7" * CLUSTER
                client.shutdown()
        assert fingerprint(files) == before

    def test_an_overlay_elsewhere_is_written_to(self, files: list[Path], tmp_path: Path) -> None:
        """What lies under it need only be read."""
        before = fingerprint(files)
        over = tmp_path / "over.qcow2"
        qemu.SYSTEM.img("create", "-q", "-f", "qcow2", "-b", files[1], "-F", "qcow2", over)
        with servers.nbdbm(over, writable=True) as server:
            client = connect(server.uri)
            client.pwrite(b"x" * 10, 5)
            assert client.pread(20, 0) == b"\7" * 5 + b"x" * 10 + b"\7" * 5
            client.shutdown()
        assert check(over)[0] == 0 and fingerprint(files) == before

    def test_a_directory_of_it(self, files: list[Path]) -> None:
        """Each image is refused when it is asked for; the server says why and goes on."""
        nbd = libnbd.module()
        with servers.nbdbm(files[0].parent, "--directory", writable=True) as server:
            for _ in range(2):
                with pytest.raises(nbd.Error):
                    connect(f"nbd+unix:///top.qcow2?socket={server.socket}")
            said = server.output()
        reason = "cannot be opened for writing: Read-only file system; --read-only serves it as it is"
        assert said.count(f"{files[1]}: {reason}") == 1

    @pytest.mark.parametrize(
        "words",
        [
            ("bitmap", "add", "{image}", "new"),
            ("bitmap", "remove", "{image}", "b"),
            ("checkpoint", "{image}", "--name", "new"),
            ("resize", "{image}", "+1M"),
            ("check", "--repair", "all", "{image}"),
            ("create", "{place}/new.qcow2", "1M"),
            ("serve", "-r", "-k", "{place}/s", "{image}"),
            ("serve", "-r", "--pid-file", "{place}/p", "--run", "true", "{image}"),
            ("serve", "-r", "--control", "{place}/c", "--run", "true", "{image}"),
        ],
        ids=" ".join,
    )
    def test_commands_that_need_to_write(self, files: list[Path], words: tuple[str, ...]) -> None:
        before = fingerprint(files)
        done = servers.nbdbm_run(*(word.format(image=files[1], place=files[1].parent) for word in words))
        assert one_line(done).endswith(": Read-only file system")
        assert str(files[1].parent) in done.stderr
        assert fingerprint(files) == before


def test_read_only_from_one_moment_to_the_next(tmp_path: Path) -> None:
    """An error of the disk under a file system: what was flushed is there, and no bitmap claims anything."""
    nbd = libnbd.module()
    path = tmp_path / "broken/disk.qcow2"
    with mounts.ext4(tmp_path / "broken", 32 << 20) as broken:
        servers.nbdbm_run("create", "-q", path, SIZE, check=True)
        servers.nbdbm_run("bitmap", "add", path, "b", check=True)
        with servers.nbdbm(path, writable=True, clean=False) as server:
            client = connect(server.uri)
            client.pwrite(b"a" * CLUSTER, 0)
            client.flush()
            client.pwrite(b"b" * CLUSTER, 1 << 20)
            broken.abort()
            for work in (lambda: client.pwrite(b"c" * CLUSTER, 2 << 20), client.flush):
                with pytest.raises(nbd.Error) as caught:
                    work()
                assert caught.value.errno in ("EPERM", "EIO")
            assert client.pread(CLUSTER, 0) == b"a" * CLUSTER
            assert client.pread(CLUSTER, 1 << 20) == b"b" * CLUSTER
            client.shutdown()
            assert servers.stop(server.process) == 1
            said = server.output().splitlines()
    assert said[-1].startswith(f"nbdbm: {path}: what was written since the last flush could not be stored: ")
    assert said[-1].endswith("; the bitmaps stay marked as in use")
    disk = tmp_path / "broken.ext4"
    qemu.run(qemu.newer().argv("e2fsck", "-fp", disk), check=False)
    copy = tmp_path / "copy.qcow2"
    qemu.newer().run("debugfs", "-R", f"dump /disk.qcow2 {copy}", disk)
    assert check(copy)[0] in (0, 3)
    assert flags_of(copy) == {"b": IN_USE}
    qemu.SYSTEM.io(copy, f"read -q -P 97 0 {CLUSTER}", options=("-r", "-f", "qcow2"))


class TestFull:
    def test_amid_writes_and_room_again(self, case: images.Case, small: mounts.Mounted) -> None:
        """What was taken is kept and can be flushed, what cannot be taken is refused; then it goes on."""
        guest = Guest(bytes(SIZE), 1)
        before = dirty_by_qemu(case)
        small.fill(3 << 20)
        with servers.nbdbm(case.path, writable=True) as server:
            client = connect(server.uri)
            failures = 0
            for number in range(60):
                offset, data = number * 16 * CLUSTER, bytes([number + 1]) * CLUSTER
                if refused(lambda at=offset, what=data: client.pwrite(what, at)):  # type: ignore[misc]
                    failures += 1
                    # It counts as written, and the disk there is as it was.
                    guest.touched.append((offset, CLUSTER))
                else:
                    guest.wrote(offset, data)
            assert failures > 5
            client.flush()
            # What needs no space can be done.
            client.pwrite(b"in place", 100)
            guest.wrote(100, b"in place")
            client.flush()
            assert client.pread(32 << 20, 0) == guest.content[: 32 << 20]
            small.make_room()
            client.pwrite(b"again" * 1000, SIZE - 5000)
            guest.wrote(SIZE - 5000, b"again" * 1000)
            client.shutdown()
            lines = [line for line in server.output().splitlines() if "failed: " in line]
        assert len(lines) == failures
        assert all(line.endswith(f" failed: {case.path}: No space left on device") for line in lines)
        judge(case, guest, before)

    @pytest.mark.parametrize("flushed", [True, False])
    def test_at_the_end(self, case: images.Case, small: mounts.Mounted, flushed: bool) -> None:
        """The bitmaps cannot be stored: the data is there, they are in use, and one line says it."""
        with servers.nbdbm(case.path, writable=True, clean=False) as server:
            client = connect(server.uri)
            for number in range(20):
                client.pwrite(bytes([number + 1]) * CLUSTER, number * 20 * CLUSTER)
            if flushed:
                client.flush()
            small.fill()
            client.shutdown()
            status = servers.stop(server.process)
            said = [line for line in server.output().splitlines() if str(case.path) in line]
        assert status == 1
        assert said == [
            f"nbdbm: {case.path}: the bitmaps could not be stored: No space left on device;"
            " they stay marked as in use, the data is safe"
        ]
        small.make_room()
        status, report = check(case.path)
        assert status == 0, report
        content = content_by_qemu(case)
        for number in range(20):
            assert content[number * 20 * CLUSTER :][:CLUSTER] == bytes([number + 1]) * CLUSTER, number
        assert flags_of(case.path) == {"b": IN_USE, "fine": IN_USE}
        # Another life, when there is room: without these bitmaps, with new ones.
        servers.nbdbm_run("bitmap", "remove", "--inconsistent", case.path, check=True)
        servers.nbdbm_run("bitmap", "add", case.path, "again", check=True)
        case.bitmaps = ["again"]
        guest = Guest(content_by_qemu(case), 2)
        before = dirty_by_qemu(case)
        with servers.nbdbm(case.path, writable=True) as server:
            client = connect(server.uri)
            guest.play([client], 10, 100_000)
            client.shutdown()
        judge(case, guest, before)

    def test_from_the_beginning(self, case: images.Case, small: mounts.Mounted) -> None:
        """IN_USE needs no space, nor does a session without writes."""
        small.fill()
        before = case.path.read_bytes()
        with servers.nbdbm(case.path, writable=True) as server:
            client = connect(server.uri)
            assert flags_of(case.path) == {"b": IN_USE, "fine": IN_USE}
            client.flush()
            client.shutdown()
        assert case.path.read_bytes() == before
        with servers.nbdbm(case.path, writable=True) as server:
            client = connect(server.uri)
            assert refused(lambda: client.pwrite(b"x", 0))
            # The bits of a write that failed are stored once there is room.
            small.make_room()
            client.shutdown()
        guest = Guest(bytes(SIZE), 3)
        guest.touched.append((0, 1))
        judge(case, guest, {"b": set(), "fine": set()})

    def test_tables_without_space(self, case: images.Case, small: mounts.Mounted) -> None:
        """A copy that leaves out zeroes has no space for its tables: then it is the flush that fails. What it
        could not write it writes later; a server that ends before that says so."""
        sparse = case.path.with_name("sparse.qcow2")
        qemu.run(["cp", "--sparse=always", str(case.path), str(sparse)])
        case.path.unlink()
        case.path = sparse
        before = dirty_by_qemu(case)
        guest = Guest(bytes(SIZE), 4)

        small.fill(3 << 20)
        with servers.nbdbm(sparse, writable=True) as server:
            client = connect(server.uri)
            for number in range(20):
                offset, data = number * 20 * CLUSTER, bytes([number + 1]) * CLUSTER
                client.pwrite(data, offset)
                guest.wrote(offset, data)
            small.fill()
            assert refused(client.flush)
            assert refused(client.flush)
            small.make_room()
            client.flush()
            client.shutdown()
        judge(case, guest, before)

    def test_ended_before_the_flush_could_be_done(self, case: images.Case, small: mounts.Mounted) -> None:
        """The disk is as it was at the last flush, and the bitmaps do not claim otherwise."""
        sparse = case.path.with_name("sparse.qcow2")
        qemu.run(["cp", "--sparse=always", str(case.path), str(sparse)])
        with servers.nbdbm(sparse, writable=True, clean=False) as server:
            client = connect(server.uri)
            client.pwrite(b"x" * CLUSTER, 0)
            small.fill()
            client.shutdown()
            status = servers.stop(server.process)
            said = [line for line in server.output().splitlines() if "could not" in line]
        assert status == 1
        assert said == [
            f"nbdbm: {sparse}: what was written since the last flush could not be stored: No space left on"
            " device; the bitmaps stay marked as in use"
        ]
        assert check(sparse)[0] in (0, 3)
        assert flags_of(sparse) == {"b": IN_USE, "fine": IN_USE}
