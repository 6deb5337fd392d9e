import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbm.errors import LockedError
from nbdbm.image import locks
from nbdbm.image.locks import FLOCK, lock
from tests.support.marks import requires
from tests.support.qemu import SYSTEM


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def opened(image: Path) -> Iterator[list[int]]:
    """Three descriptions of one file, as different programs have them."""
    fds = [os.open(image, os.O_RDWR) for _ in range(3)]
    yield fds
    for fd in fds:
        os.close(fd)


def held(fd: int) -> list[int]:
    """The bytes below 300 that anybody else has locked."""
    found = []
    for start in range(300):
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0))
        if FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
            found.append(start)
    return found


def test_the_bytes_are_qemus(opened: list[int]) -> None:
    one, two, _ = opened
    assert lock(one, "disk", writable=False) is None
    assert held(two) == [100, 201, 203]


def test_a_writers_bytes(opened: list[int]) -> None:
    assert lock(opened[0], "disk", writable=True) is None
    assert held(opened[1]) == [100, 101, 103, 201, 203]


def test_force_share_takes_one_byte(opened: list[int]) -> None:
    assert lock(opened[0], "disk", writable=False, force_share=True) is None
    assert held(opened[1]) == [100]


def test_readers_share(opened: list[int]) -> None:
    for fd in opened:
        assert lock(fd, "disk", writable=False) is None


def test_a_writer_excludes_readers(opened: list[int]) -> None:
    lock(opened[0], "disk", writable=True)
    with pytest.raises(LockedError, match=r"^disk: in use for writing by .*--force-share") as caught:
        lock(opened[1], "disk", writable=False)
    assert caught.value.errno == errno.EAGAIN
    assert lock(opened[2], "disk", writable=False, force_share=True) is None


def test_readers_exclude_a_writer(opened: list[int]) -> None:
    lock(opened[0], "disk", writable=False)
    with pytest.raises(LockedError, match=r"^disk: in use by .*, which excludes writing$") as caught:
        lock(opened[1], "disk", writable=True)
    assert "--force-share" not in str(caught.value)


def test_twice_in_one_process(opened: list[int]) -> None:
    lock(opened[0], "disk", writable=True)
    with pytest.raises(LockedError, match=r"for writing by this process itself \(is it served twice\?\)"):
        lock(opened[1], "disk", writable=True)


def test_force_share_excludes_nobody(opened: list[int]) -> None:
    lock(opened[0], "disk", writable=False, force_share=True)
    assert lock(opened[1], "disk", writable=True) is None


def test_names_the_process(image: Path, opened: list[int]) -> None:
    script = (
        "import os, sys; from nbdbm.image.locks import lock\n"
        "lock(os.open(sys.argv[1], os.O_RDWR), 'x', writable=True)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with pytest.raises(LockedError, match=f"by process {other.pid} \\(python"):
            lock(opened[0], "disk", writable=False)
        assert other.stdin is not None
        other.stdin.close()
    # The bytes that the failed attempt has set are in nobody's way once its file is closed.
    os.close(opened.pop(0))
    assert lock(opened[0], "disk", writable=True) is None


@pytest.mark.parametrize("number", locks.NO_LOCKS)
def test_file_system_without_locks(opened: list[int], monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*args: object) -> bytes:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    notice = lock(opened[0], "disk", writable=False)
    assert notice is not None and notice.startswith("disk: its file system has no locks")


def test_locked_as_a_whole(opened: list[int]) -> None:
    fcntl.fcntl(opened[1], fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    with pytest.raises(LockedError, match="as a whole"):
        lock(opened[0], "disk", writable=False)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("lock:\t1: OFDLCK ADVISORY  READ -1 00:2a:77 100 101", True),
        ("lock:\t1: OFDLCK ADVISORY  READ -1 00:2a:77 100 EOF", True),
        ("lock:\t1: OFDLCK ADVISORY  READ -1 00:2a:77 102 103", False),
        ("lock:\t1: POSIX  ADVISORY  READ 42 00:2a:77 100 101", False),
        ("pos:\t0", False),
        ("", False),
    ],
)
def test_lock_lines(line: str, expected: bool) -> None:
    assert locks._covers(line, 101) is expected


@requires("qemu-io")
def test_qemu_honours_and_is_honoured(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    fd = os.open(path, os.O_RDWR)
    try:
        lock(fd, str(path), writable=False)
        refused = subprocess.run(
            SYSTEM.argv("qemu-io", "-f", "raw", "-c", "write 0 512", path), capture_output=True, text=True
        )
        assert '"write" lock' in refused.stderr
        shared = SYSTEM.run("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", path)
        assert "read 512/512" in shared
    finally:
        os.close(fd)
    argv = SYSTEM.argv("qemu-io", "-f", "raw", path)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.write("read 0 512\n")
        holder.stdin.flush()
        while "512 bytes" not in holder.stdout.readline():
            assert holder.poll() is None
        fd = os.open(path, os.O_RDONLY)
        try:
            with pytest.raises(LockedError, match=r"in use for writing by process .*qemu-io"):
                lock(fd, str(path), writable=False)
        finally:
            os.close(fd)
        holder.stdin.write("quit\n")
        holder.stdin.close()
