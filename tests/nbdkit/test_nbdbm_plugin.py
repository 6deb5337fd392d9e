"""The plugin in the real nbdkit: what clients see, what it leaves on the disk, and what it says."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.interop.conftest import watchdog as watchdog
from tests.interop.serving import clip, digest, fingerprint
from tests.interop.writing import (
    Guest,
    bitmaps,
    blank,
    connect,
    dirty_by_qemu,
    granules,
    judge,
    read_all,
    writable_copy,
)
from tests.support import images, libnbd, nbdkit, qcow2edit, qemu, servers
from tests.support.marks import requires
from tests.support.qemu import SYSTEM

pytestmark = requires("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdcopy", "libnbd", "nbdkit-python")

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


@pytest.fixture
def case(tmp_path: Path) -> images.Case:
    """64 MiB with two recording bitmaps."""
    return blank(tmp_path, 64 * MIB, ("fine", 4 * KIB), ("coarse", 64 * KIB))


# -- reading -----------------------------------------------------------------------------------

READ = [
    "v2",
    "zlib-512",
    "zstd-mixed",
    "extl2-packed",
    "chain-5",
    "data-file",
    "load-first",
    "raw",
    "bitmaps",
]


@pytest.mark.parametrize("name", READ)
def test_content_and_extents(name: str, gallery: images.Gallery, tmp_path: Path) -> None:
    """As qemu-img and qemu-nbd have them; and ``-r`` changes no byte and no time."""
    case = gallery.get(name)
    before = fingerprint(case.files)
    copy = tmp_path / "copy.raw"
    with nbdkit.serving(*nbdkit.parameters(case), options=("-r",)) as server:
        SYSTEM.run("nbdcopy", server.uri, copy)
        ours = libnbd.probe(server.uri, contexts=["base:allocation"])
        assert '"is_read_only": true' in SYSTEM.run("nbdinfo", "--json", server.uri)
    assert fingerprint(case.files) == before
    assert ours["size"] == case.size
    assert ours["digest"] == digest(copy) == gallery.expected(case)
    with servers.qemu_nbd(case.path, *case.qemu_options, image_format=case.format) as theirs:
        wanted = libnbd.probe(theirs.uri, contexts=["base:allocation"], digest=False)
    assert ours["maps"]["base:allocation"] == clip(wanted["maps"]["base:allocation"], case.size)


def test_nbdinfo_and_qemu_agree_on_what_is_offered(case: images.Case) -> None:
    with nbdkit.serving(f"image={case.path}") as server:
        shown = SYSTEM.run("nbdinfo", "--json", server.uri)
        theirs = SYSTEM.run("nbdinfo", "--map", server.uri)
    for can in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert f'"can_{can}": true' in shown
    assert '"is_read_only": false' in shown and '"block_size_preferred": 65536' in shown
    assert "qemu:dirty-bitmap" not in shown  # a limit of nbdkit, which docs/nbdkit.md names
    assert theirs.split() == ["0", str(64 * MIB), "3", "hole,zero"]


# -- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["v3-packed", "extl2-packed", "bitmaps", "bitmaps-small-clusters", "data-file"]
)
def test_every_kind_of_write(name: str, gallery: images.Gallery, tmp_path: Path) -> None:
    """Writes, zeroes, trims, FUA and flush over three connections; QEMU judges content and every granule."""
    case = writable_copy(name, gallery, tmp_path)
    guest = Guest(gallery.content(gallery.get(name)), zlib.crc32(name.encode()))
    before = dirty_by_qemu(case)
    with nbdkit.serving(*nbdkit.parameters(case)) as server:
        handles = [connect(server.uri) for _ in range(3)]
        # nbdkit tries the next best where a fast zero is refused, which is no error here.
        guest.play(handles, 60, 300_000)
        guest.storm(handles, 60, 7777)
        for h in handles:
            assert read_all(h, guest.size) == guest.content
            h.shutdown()
    judge(case, guest, before)


def test_exactly_what_was_touched_is_dirty(case: images.Case) -> None:
    touched = [
        (5 * MIB + 100, 1),
        (9 * MIB - 1, 2),
        (20 * MIB, 3 * MIB),
        (40 * MIB, 128 * KIB),
        (50 * MIB, 64 * KIB),
    ]
    with nbdkit.serving(f"image={case.path}") as server:
        h = connect(server.uri)
        for offset, length in touched[:3]:
            h.pwrite(b"x" * length, offset)
        h.zero(touched[3][1], touched[3][0])
        h.trim(touched[4][1], touched[4][0])
        h.pread(MIB, 30 * MIB)
        h.cache(MIB, 33 * MIB)
        h.flush()
        h.shutdown()
    for name, granularity in (("fine", 4 * KIB), ("coarse", 64 * KIB)):
        wanted = set().union(*(granules(offset, length, granularity) for offset, length in touched))
        assert dirty_by_qemu(case)[name] == wanted
    SYSTEM.img("check", "-q", case.path)
    # What nbdinfo makes of it, served by our own server.
    with servers.nbdbm(case.path) as again:
        shown = SYSTEM.run("nbdinfo", "--map=qemu:dirty-bitmap:coarse", again.uri)
    dirty = [line.split()[:2] for line in shown.splitlines() if line.endswith("dirty")]
    assert dirty == [
        [str(offset), str(length)]
        for offset, length in [
            (5 * MIB, 64 * KIB),
            (9 * MIB - 64 * KIB, 128 * KIB),
            (20 * MIB, 3 * MIB),
            (40 * MIB, 128 * KIB),
            (50 * MIB, 64 * KIB),
        ]
    ]


def test_the_last_client_leaves_the_bitmaps_stored(case: images.Case) -> None:
    """While nbdkit goes on; and for the next client they record again."""
    with nbdkit.serving(f"image={case.path}") as server:
        for number in range(2):
            one, two = connect(server.uri), connect(server.uri)
            one.pwrite(b"x", number * MIB)
            one.shutdown()
            two.pwrite(b"y", number * MIB + 64 * KIB)
            assert all("in-use" in flags for _, flags in bitmaps(case.path).values())
            two.shutdown()
            deadline = time.monotonic() + 20
            while _has_open(server, case.path):
                assert time.monotonic() < deadline, "nobody is left, and the image is open"
                time.sleep(0.02)
            assert not any("in-use" in flags for _, flags in bitmaps(case.path).values())
            wanted = {at for n in range(number + 1) for at in (n * 16, n * 16 + 1)}
            assert dirty_by_qemu(case)["coarse"] == wanted


def _has_open(server: servers.Server, path: Path) -> bool:
    for descriptor in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(descriptor) == str(path):
                return True
    return False


def test_zeroes_and_trims_become_holes_unless_told_otherwise(case: images.Case) -> None:
    nbd = libnbd.module()
    with nbdkit.serving(f"image={case.path}") as server:
        h = connect(server.uri)
        h.pwrite(b"x" * 4 * MIB, 0)
        h.zero(MIB, 0)
        h.zero(MIB, MIB, nbd.CMD_FLAG_NO_HOLE)
        h.trim(MIB, 2 * MIB)
        h.zero(MIB, 10 * MIB, nbd.CMD_FLAG_FAST_ZERO)
        assert h.pread(3 * MIB, 0) == bytes(3 * MIB)
        h.flush()
        h.shutdown()
        ours = libnbd.probe(server.uri, contexts=["base:allocation"], digest=False)["maps"]
    with servers.qemu_nbd(case.path) as theirs:
        wanted = libnbd.probe(theirs.uri, contexts=["base:allocation"], digest=False)["maps"]
    assert ours == wanted
    runs = {e["start"]: e for e in SYSTEM.img_json("map", case.path)}
    # ``zero`` kept its space where that was asked for, and nowhere else.
    assert "offset" in runs[MIB] and "offset" not in runs[0] and "offset" not in runs[2 * MIB]


@pytest.mark.parametrize("how", ["flush", "fua"])
def test_what_was_flushed_survives_a_kill(how: str, case: images.Case) -> None:
    """And the bitmaps, which could not be stored, do not claim to be consistent."""
    with nbdkit.serving(f"image={case.path}", clean=False) as server:
        h = connect(server.uri)
        h.pwrite(b"y" * MIB, 3 * MIB, libnbd.module().CMD_FLAG_FUA if how == "fua" else 0)
        if how == "flush":
            h.flush()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(20)
    assert all("in-use" in flags for _, flags in bitmaps(case.path).values())
    SYSTEM.io(case.path, f"read -P 0x79 {3 * MIB} {MIB}")


def test_two_clients_at_once(case: images.Case) -> None:
    """nbdcopy fills the beginning while somebody else writes and reads further on."""
    source = case.path.parent / "source.raw"
    source.write_bytes(images.noise(1, 16 * MIB))
    guest = Guest(bytes(64 * MIB), 1)
    guest.wrote(0, source.read_bytes())
    before = dirty_by_qemu(case)
    with nbdkit.serving(f"image={case.path}") as server:
        h = connect(server.uri)
        copy = subprocess.Popen(SYSTEM.argv("nbdcopy", "--flush", source, server.uri), env=qemu.environment())
        number = 0
        while copy.poll() is None or number < 50:
            offset, data = 32 * MIB + number % 256 * 64 * KIB, bytes([number % 255 + 1]) * 5000
            h.pwrite(data, offset)
            guest.wrote(offset, data)
            assert h.pread(5000, offset) == data
            number += 1
        assert copy.returncode == 0
        h.shutdown()
    judge(case, guest, before)


# -- the end, and the background ---------------------------------------------------------------


def test_sigterm_with_a_client_connected(case: images.Case) -> None:
    """nbdkit drops its client, or waits for it to leave, as it happens; then the bitmaps are stored."""
    guest = Guest(bytes(case.size), 1)
    before = dirty_by_qemu(case)
    with nbdkit.serving(f"image={case.path}", clean=False) as server:
        h = connect(server.uri)
        h.pwrite(b"x" * 70_000, MIB)
        guest.wrote(MIB, b"x" * 70_000)
        os.kill(server.process.pid, signal.SIGTERM)
        with contextlib.suppress(libnbd.module().Error):
            h.shutdown()
        assert server.process.wait(20) == 0
        assert nbdkit.said(server) == []
    judge(case, guest, before)


def test_in_the_background(case: images.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """nbdkit forks and goes to / after it has read its parameters: the image was named from here."""
    guest = Guest(bytes(case.size), 1)
    before = dirty_by_qemu(case)
    monkeypatch.chdir(case.path.parent)
    place = Path(tempfile.mkdtemp(prefix="nbdbm-"))
    try:
        socket, pid_file = place / "s", place / "pid"
        words = ["-P", pid_file, "-U", socket, "python", nbdkit.PLUGIN, f"image={case.path.name}"]
        qemu.run(nbdkit.argv(*words))
        pid = _written_soon(pid_file)
        h = connect(f"nbd+unix:///?socket={socket}")
        h.pwrite(b"b" * MIB, 7 * MIB)
        guest.wrote(7 * MIB, b"b" * MIB)
        h.shutdown()
        os.kill(pid, signal.SIGTERM)
        _wait_for_the_end_of(pid)
    finally:
        shutil.rmtree(place)
    judge(case, guest, before)


def _written_soon(pid_file: Path) -> int:
    """nbdkit's process number, which it writes after the fork, with a line's end last."""
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and (text := pid_file.read_text()).endswith("\n")):
        assert time.monotonic() < deadline, f"no {pid_file}"
        time.sleep(0.02)
    return int(text)


def _wait_for_the_end_of(pid: int) -> None:
    """Until a process that is not our child is gone, or is one that nobody has waited for."""
    deadline = time.monotonic() + 20
    while True:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"nbdkit {pid} did not end")
        time.sleep(0.02)


# -- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "image=FILE is missing"),
        (["imge=x"], "imge: unknown parameter; there are image, "),
        (["image=x", "image=y"], "image: is given twice"),
        (["image=x", "no_backing=maybe"], "no-backing=maybe: must be true or false"),
        (["image=x", "detect_zeroes=unmap", "discard=ignore"], "unmap excludes discard ignore"),
        (["image=/nowhere/x"], "/nowhere/x: cannot be opened: No such file or directory"),
        (["image=/nowhere/a\nb"], "/nowhere/a\\nb: cannot be opened"),
    ],
)
def test_bad_parameters_are_one_line(words: list[str], said: str) -> None:
    _one_line(nbdkit.run(*words), said)


def _one_line(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 1 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith(("nbdkit: error: ", "nbdbm: ")) and said in line


def test_bad_images_are_one_line(case: images.Case, gallery: images.Gallery) -> None:
    bad = case.path.parent / "bad"
    bad.write_bytes(bytes(4096))
    _one_line(nbdkit.run(f"image={bad}"), f"{bad}: not a qcow2 image (magic)")
    shutil.copy(case.path, bad)
    qcow2edit.patch(bad, 20, b"\0\0\0\x63")
    _one_line(nbdkit.run(f"image={bad}"), f"{bad}: cluster_bits is 0x63: ")
    _one_line(nbdkit.run(f"image={case.path}", "snapshot=s"), f"{case.path}: there is no snapshot 's'")
    chain = gallery.get("chain-5").path
    _one_line(nbdkit.run(f"image={chain}", "no-backing=true"), "backing file")


@contextlib.contextmanager
def _used_by_qemu(case: images.Case) -> Iterator[None]:
    """qemu-nbd has it open for writing; it listens before it opens the image, so somebody must get in."""
    with servers.qemu_nbd(case.path, writable=True) as server:
        h = connect(server.uri)
        yield
        h.shutdown()


def test_an_image_in_use_is_one_line(case: images.Case) -> None:
    with _used_by_qemu(case):
        _one_line(nbdkit.run(f"image={case.path}"), f"{case.path}: ")


def test_taken_before_the_first_client_came(case: images.Case) -> None:
    """Clients are turned away, with a line, as long as somebody else writes; and then he is."""
    with nbdkit.serving(f"image={case.path}", clean=False) as server:
        with _used_by_qemu(case), pytest.raises(libnbd.module().Error):
            connect(server.uri)
        [line] = nbdkit.said(server)
        assert line.startswith("nbdkit: ") and f": open: error: {case.path}: " in line
        h = connect(server.uri)
        h.pwrite(b"x", 0)
        with pytest.raises(qemu.ToolFailed, match='Failed to get "write" lock'):
            SYSTEM.io(case.path, "write 0 512")
        h.shutdown()
        assert servers.stop(server.process) == 0
        assert nbdkit.said(server) == [line]
    assert dirty_by_qemu(case) == {"fine": {0}, "coarse": {0}}


def test_bitmaps_that_cannot_record_are_named(gallery: images.Gallery) -> None:
    case = gallery.get("bitmaps-inconsistent")
    with nbdkit.serving(*nbdkit.parameters(case), options=("-r",), clean=False) as server:
        lines = nbdkit.said(server)
    assert len(lines) == len(case.refused) > 0
    for name, line in zip(case.refused, lines, strict=True):
        assert line.startswith(f"nbdbm: {case.path}: bitmap {name!r} cannot be used: ")


def test_a_library_that_is_missing_is_one_line(case: images.Case, tmp_path: Path) -> None:
    (tmp_path / "bitarray.py").write_text("raise ImportError('bitarray is for another Python')\n")
    path = nbdkit.argv()[1].removeprefix("PYTHONPATH=")
    done = nbdkit.run(f"image={case.path}", path=f"{tmp_path}:{path}")
    _one_line(done, "nbdbm: bitarray is for another Python; this nbdkit has Python 3.")


def test_damage_is_an_error_of_the_request_alone(case: images.Case) -> None:
    """EIO and a line that says where; the rest of the disk is served."""
    SYSTEM.io(case.path, f"write -q -P 1 0 {64 * KIB}", f"write -q -P 2 {MIB} {64 * KIB}")
    l1 = qcow2edit.peek(case.path, 40, "Q")
    l2 = qcow2edit.peek(case.path, l1, "Q") & ~(1 << 63)
    qcow2edit.patch(case.path, l2, (1 << 63 | 0x200).to_bytes(8, "big"))  # clusters begin at clusters
    with nbdkit.serving(f"image={case.path}", options=("-r",), clean=False) as server:
        h = connect(server.uri)
        for _ in range(2):
            with pytest.raises(libnbd.module().Error) as caught:
                h.pread(512, 0)
            assert caught.value.errno == "EIO"
            assert h.pread(4, MIB) == b"\2" * 4
        h.shutdown()
        assert servers.stop(server.process) == 0
        lines = nbdkit.said(server)
    where = f"{case.path}: L2 table 0, index 0 (guest offset 0x0)"
    told = [line for line in lines if line.startswith("nbdkit: ")]
    assert len(told) == 2 and all(f": pread: error: {where}" in line for line in told)
    # The engine's own word on it comes once.
    [own] = [line for line in lines if line not in told]
    assert own.startswith(f"nbdbm: {where}")


def _may_not_grow(path: Path, size: int) -> Callable[[str], list[str]]:
    """nbdkit that fails where a file becomes larger than ``size`` bytes."""

    def argv(socket: str) -> list[str]:
        # A signal would end nbdkit where a write is to fail.
        shell = ["sh", "-c", f"trap '' XFSZ; ulimit -f {size // 512}; exec \"$@\"", "sh"]
        return [*shell, *nbdkit.argv("-f", "-U", socket, "python", nbdkit.PLUGIN, f"image={path}")]

    return argv


def test_no_room_is_told(case: images.Case) -> None:
    """ENOSPC, a line, and whatever has room goes on."""
    guest = Guest(bytes(case.size), 1)
    before = dirty_by_qemu(case)
    with servers.started(_may_not_grow(case.path, 4 * MIB)) as server:
        h = connect(server.uri)
        h.pwrite(b"x" * MIB, 0)
        guest.wrote(0, b"x" * MIB)
        with pytest.raises(libnbd.module().Error) as caught:
            h.pwrite(b"y" * 8 * MIB, 16 * MIB)
        assert caught.value.errno == "ENOSPC"
        guest.wrote(16 * MIB, bytes(h.pread(8 * MIB, 16 * MIB)))  # what of it was written is not said
        h.pwrite(b"z" * MIB, 0)
        guest.wrote(0, b"z" * MIB)
        h.shutdown()
        assert servers.stop(server.process) == 0
        [line] = nbdkit.said(server)
    assert ": pwrite: error: " in line and "File too large" in line
    judge(case, guest, before)


def test_bitmaps_that_cannot_be_stored_stay_in_use(case: images.Case) -> None:
    """The data is there, no bitmap claims to be consistent, and a line says so."""
    spare = case.path.with_name("spare.qcow2")
    shutil.copy(case.path, spare)

    def lines(path: Path, limit: int) -> list[str]:
        with servers.started(_may_not_grow(path, limit)) as server:
            h = connect(server.uri)
            h.pwrite(b"x" * 64 * KIB, 0)
            h.flush()
            h.shutdown()
            assert servers.stop(server.process) == 0  # nbdkit's own status, which knows no other
            return nbdkit.said(server)

    assert lines(spare, GIB) == []
    [line] = lines(case.path, spare.stat().st_size - 64 * KIB)
    assert "the bitmaps could not be stored" in line and "they stay marked as in use" in line
    assert all("in-use" in flags for _, flags in bitmaps(case.path).values())
    SYSTEM.io(case.path, f"read -P 0x78 0 {64 * KIB}")
