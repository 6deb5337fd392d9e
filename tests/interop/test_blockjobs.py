"""QEMU's block jobs into and out of our exports: running machines are copied, moved and backed up.

A qemu-storage-daemon is the machine: what a guest writes comes through an NBD export of its own, above the
jobs, as a virtual disk would be.
"""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import qemu, servers
from tests.support.bitmapjudge import assert_clean, qemu_dirty
from tests.support.libnbd import module
from tests.support.marks import requires

pytestmark = requires("newer", "libnbd", "qemu-img")

SIZE = 16 << 20
MIB = 1 << 20


class Machine:
    """A daemon, spoken to by QMP; the guest's disk is the node ``disk``."""

    def __init__(self, control: socket.socket, place: str) -> None:
        control.settimeout(qemu.TIMEOUT)
        self._stream = control.makefile("rwb")
        self._events: list[dict[str, Any]] = []
        self._place = place
        assert "QMP" in json.loads(self._stream.readline())
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        said = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._stream.write(json.dumps({"execute": command, "arguments": said}).encode() + b"\n")
        self._stream.flush()
        while True:
            answer = json.loads(self._stream.readline())
            if "event" in answer:
                self._events.append(answer)
                continue
            assert "return" in answer, f"{command} {said}: {answer}"
            return answer["return"]

    def wait(self, event: str, job: str) -> None:
        while True:
            for each in self._events:
                if each["event"] == event and each["data"].get("device") == job:
                    assert "error" not in each["data"], each
                    self._events.remove(each)
                    return
            self._events.append(json.loads(self._stream.readline()))

    def guest(self) -> Any:
        """The disk as the guest has it: a libnbd handle."""
        path = f"{self._place}/guest"
        self("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
        self("block-export-add", type="nbd", id="guest", node_name="disk", name="", writable=True)
        handle = module().NBD()
        handle.connect_uri(f"nbd+unix:///?socket={path}")
        return handle


@contextmanager
def machine(**disk: Any) -> Iterator[Machine]:
    """A machine with this disk, which ends in good order."""
    place = tempfile.TemporaryDirectory(prefix="nbdbm-")
    with ExitStack() as stack:
        stack.enter_context(place)
        nodes = ["--blockdev", json.dumps({"node-name": "disk", **disk})]
        server = stack.enter_context(
            servers.started(
                lambda path: qemu.newer().argv(
                    "qemu-storage-daemon",
                    *nodes,
                    *("--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "chardev=c"),
                )
            )
        )
        found = Machine(stack.enter_context(server.connect()), place.name)
        yield found
        found("quit")
        assert server.process.wait(qemu.TIMEOUT) == 0, server.output()


def local(path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "discard": "unmap", "file": {"driver": "file", "filename": str(path)}}


def remote(server: servers.Server) -> dict[str, Any]:
    return {"driver": "nbd", "server": {"type": "unix", "path": server.socket}}


def image(path: Path, *bitmaps: str) -> Path:
    servers.nbdbm_run("create", path, SIZE, check=True)
    if bitmaps:
        servers.nbdbm_run("bitmap", "add", path, *bitmaps, check=True)
    return path


def same(one: Path, other: Path) -> None:
    qemu.newer().img("compare", "-f", "qcow2", "-F", "qcow2", one, other)


def covers(path: Path, bitmap: str, *ranges: tuple[int, int]) -> bool:
    """Whether QEMU finds all of the ranges dirty, and not all of the disk."""
    dirty = set[int]()
    for offset, length in qemu_dirty(path, bitmap)[bitmap]:
        dirty.update(range(offset >> 16, (offset + length - 1 >> 16) + 1))
    wanted = {at >> 16 for offset, length in ranges for at in range(offset, offset + length, 1 << 16)}
    return wanted <= dirty and len(dirty) < SIZE >> 16


def test_a_disk_that_we_serve_is_copied_while_it_is_written(tmp_path: Path) -> None:
    disk, copy = image(tmp_path / "disk.qcow2", "day"), image(tmp_path / "copy.qcow2")
    with servers.nbdbm(disk, writable=True) as server, machine(**remote(server)) as qemu_:
        guest = qemu_.guest()
        guest.pwrite(b"1" * MIB, 0)
        qemu_("blockdev-add", node_name="copy", **local(copy))
        qemu_("blockdev-mirror", job_id="job", device="disk", target="copy", sync="full")
        qemu_.wait("BLOCK_JOB_READY", "job")
        guest.pwrite(b"2" * 70000, 5 * MIB)
        guest.zero(MIB // 2, 0)
        guest.flush()
        qemu_("block-job-cancel", device="job")
        qemu_.wait("BLOCK_JOB_COMPLETED", "job")
        guest.shutdown()
    same(disk, copy)
    assert_clean(disk)
    assert covers(disk, "day", (0, MIB), (5 * MIB, 70000))


def test_a_machine_moves_onto_our_export(tmp_path: Path) -> None:
    old, new = image(tmp_path / "old.qcow2"), image(tmp_path / "new.qcow2", "moved")
    with (
        servers.nbdbm(new, "--detect-zeroes", "unmap", writable=True) as server,
        machine(**local(old)) as qemu_,
    ):
        guest = qemu_.guest()
        guest.pwrite(b"1" * MIB, MIB)
        qemu_("blockdev-add", node_name="new", **remote(server))
        qemu_("blockdev-mirror", job_id="job", device="disk", target="new", sync="full")
        qemu_.wait("BLOCK_JOB_READY", "job")
        guest.pwrite(b"2" * MIB, 2 * MIB)
        qemu_("block-job-complete", device="job")
        qemu_.wait("BLOCK_JOB_COMPLETED", "job")
        guest.pwrite(b"3" * 65536, 9 * MIB)
        guest.flush()
        guest.shutdown()
    with pytest.raises(qemu.ToolFailed, match=f"offset {9 * MIB}!"):
        same(old, new)
    qemu.SYSTEM.io(old, f"write -P 0x33 {9 * MIB} 65536")
    same(old, new)
    assert_clean(new)


def test_incremental_backups_into_our_export(tmp_path: Path) -> None:
    disk, backup = image(tmp_path / "disk.qcow2"), image(tmp_path / "backup.qcow2", "changed")
    with machine(**local(disk)) as qemu_:
        guest = qemu_.guest()
        guest.pwrite(b"1" * (3 * MIB), 0)
        with servers.nbdbm(backup, writable=True) as server:
            qemu_("blockdev-add", node_name="backup", **remote(server))
            begin = {
                "type": "block-dirty-bitmap-add",
                "data": {"node": "disk", "name": "b", "persistent": True},
            }
            full = {"job-id": "full", "device": "disk", "target": "backup", "sync": "full"}
            qemu_("transaction", actions=[begin, {"type": "blockdev-backup", "data": full}])
            qemu_.wait("BLOCK_JOB_COMPLETED", "full")
            qemu_("blockdev-del", node_name="backup")
        servers.nbdbm_run("bitmap", "clear", backup, "changed", check=True)
        for number in range(3):
            guest.pwrite(bytes([number + 2]) * 123456, number * 4 * MIB + 777)
            guest.zero(65536, number * MIB)
            with servers.nbdbm(backup, writable=True) as server:
                qemu_("blockdev-add", node_name="backup", **remote(server))
                job = f"increment{number}"
                qemu_(
                    "blockdev-backup",
                    job_id=job,
                    device="disk",
                    target="backup",
                    sync="incremental",
                    bitmap="b",
                )
                qemu_.wait("BLOCK_JOB_COMPLETED", job)
                qemu_("blockdev-del", node_name="backup")
        guest.shutdown()
    same(disk, backup)
    assert_clean(backup)
    assert covers(backup, "changed", *((number * 4 * MIB + 777, 123456) for number in range(3)))


def test_an_overlay_on_our_export_is_committed_and_streamed(tmp_path: Path) -> None:
    base = image(tmp_path / "base.qcow2", "day")
    qemu.SYSTEM.io(base, f"write -P 1 {MIB} {MIB}")
    overlays = [tmp_path / "commit.qcow2", tmp_path / "stream.qcow2"]
    expected = tmp_path / "expected.qcow2"
    with servers.nbdbm(base, writable=True) as server:
        for overlay in overlays:
            qemu.newer().img("create", "-f", "qcow2", "-b", server.uri, "-F", "raw", overlay)
        with machine(**local(overlays[0])) as qemu_:
            guest = qemu_.guest()
            guest.pwrite(b"2" * 65536, MIB + 65536)
            qemu_("block-commit", job_id="job", device="disk")
            qemu_.wait("BLOCK_JOB_READY", "job")
            qemu_("block-job-complete", device="job")
            qemu_.wait("BLOCK_JOB_COMPLETED", "job")
            guest.shutdown()
        with machine(**local(overlays[1])) as qemu_:
            qemu_("block-stream", job_id="job", device="disk")
            qemu_.wait("BLOCK_JOB_COMPLETED", "job")
        qemu.newer().img("convert", "-O", "qcow2", server.uri, expected)
    assert "backing" not in qemu.newer().img("info", overlays[1])
    same(overlays[1], expected)
    same(base, expected)
    assert covers(base, "day", (MIB + 65536, 65536))
