import asyncio
import errno
import os
import socket
import threading
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest

from nbdbm.errors import ImageError
from nbdbm.image import blockfile
from nbdbm.image.blockfile import INLINE_WRITE, BlockFile, ThreadedFile, fill_zeroes
from tests.server.running import until

CONTENT = bytes(range(256)) * 64  # 16 KiB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


async def read(file: BlockFile, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(b"\xaa" * length))
    await file.pread_into(view, offset)
    assert await file.pread(offset, length) == bytes(view)
    return bytes(view)


# -- opening


def test_refuses_by_kind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, kind in [
            (tmp_path, "a directory"),
            (tmp_path / "fifo", "a FIFO"),
            (tmp_path / "socket", "a socket"),
            (Path("/dev/zero"), "a character device"),
        ]:
            with pytest.raises(ImageError, match=kind) as caught:
                ThreadedFile.open(str(name))
            assert caught.value.path == str(name)


def test_refuses_a_file_without_a_size() -> None:
    with pytest.raises(ImageError, match=r"^/proc/self/mem: cannot be opened: Invalid argument$"):
        ThreadedFile.open("/proc/self/mem")


def test_refuses_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file") as caught:
        ThreadedFile.open(str(tmp_path / "missing"))
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(ImageError, match="null"):
        ThreadedFile.open("a\0b")


def test_identity_and_real_path(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    one, two = ThreadedFile.open(str(path)), ThreadedFile.open(str(link))
    assert one.identity == two.identity
    assert two.real_path() == str(path.resolve())
    assert two.path == str(link)
    for file in (one, two, two):
        file.close()


def test_nothing_is_inherited(path: Path) -> None:
    file = ThreadedFile.open(str(path))
    assert not os.get_inheritable(file.fd)
    file.close()


# -- reading


@pytest.mark.parametrize("nowait", [True, False])
@pytest.mark.parametrize(
    "offset, length",
    [(0, 1), (0, 16384), (5, 999), (16383, 1), (16384, 10), (16380, 100), (1 << 40, 9), (0, 3 << 20)],
)
def test_reads_with_zeroes_behind_the_end(path: Path, nowait: bool, offset: int, length: int) -> None:
    file = ThreadedFile.open(str(path))
    file._nowait = nowait
    expected = CONTENT[offset : offset + length].ljust(length, b"\0")
    assert asyncio.run(read(file, offset, length)) == expected
    view = memoryview(bytearray(b"\xaa" * length))
    assert file.try_pread_into(view, offset) is nowait
    if nowait:
        assert bytes(view) == expected
    file.close()


def test_file_system_without_nowait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried once, and the answer remembered."""
    calls = []
    preadv = os.preadv

    def answer(fd: int, buffers: object, offset: int, flags: int = 0) -> int:
        calls.append(flags)
        if flags:
            raise OSError(errno.EOPNOTSUPP, "no")
        return preadv(fd, buffers, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", answer)
    file = ThreadedFile.open(str(path))
    assert asyncio.run(read(file, 100, 50)) == CONTENT[100:150]
    assert calls == [os.RWF_NOWAIT, 0, 0]
    assert not file.try_pread_into(memoryview(bytearray(9)), 0)
    file.close()


def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def few(fd: int, buffers: tuple[memoryview], offset: int, flags: int = 0) -> int:
        if flags and offset:
            raise BlockingIOError(errno.EAGAIN, "not cached")
        return preadv(fd, (buffers[0][:1000],), offset)

    monkeypatch.setattr(os, "preadv", few)
    file = ThreadedFile.open(str(path))
    assert not file.try_pread_into(memoryview(bytearray(5000)), 0)
    assert asyncio.run(read(file, 0, 5000)) == CONTENT[:5000]
    assert asyncio.run(read(file, 7, 20000)) == CONTENT[7:].ljust(20000, b"\0")
    file.close()


def test_errors_keep_their_number(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> int:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "preadv", fail)
    file = ThreadedFile.open(str(path))
    with pytest.raises(OSError) as caught:
        asyncio.run(file.pread(0, 10))
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(path)
    file.close()


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "ftruncate"])
def test_errors_name_the_file(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """There may be a chain of them, and many images."""

    def fail(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space")

    async def work(file: ThreadedFile) -> None:
        await file.pwrite(0, b"x")
        monkeypatch.setattr(os, call, fail)
        if call == "ftruncate":
            await file.truncate(5)
        elif call == "fdatasync":
            await file.sync()
        else:
            await file.pwrite(0, bytes(1 << 20))

    file = ThreadedFile.open(str(path), writable=True)
    with pytest.raises(OSError) as caught:
        asyncio.run(work(file))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    monkeypatch.undo()
    file.close()


def test_reading_changes_nothing(path: Path) -> None:
    os.utime(path, ns=(10**18, 10**18))
    before = path.stat()
    file = ThreadedFile.open(str(path))
    asyncio.run(read(file, 0, 9000))
    file.close()
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert path.read_bytes() == CONTENT


def test_fill_zeroes() -> None:
    for length in (0, 1, 1 << 20, (2 << 20) + 5):
        buffer = bytearray(b"\xff" * length)
        fill_zeroes(memoryview(buffer))
        assert buffer == bytes(length)


# -- holes


def test_data_runs(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as out:
        out.truncate(1 << 20)
        out.seek(128 << 10)
        out.write(b"x" * (64 << 10))
        out.flush()
        os.fsync(out.fileno())
    if path.stat().st_blocks * 512 >= 1 << 20:
        pytest.skip("the file system keeps no holes")
    file = ThreadedFile.open(str(path))

    def runs(offset: int, length: int, limit: int = 10) -> list[tuple[bool, int]]:
        return asyncio.run(file.data_runs(offset, length, limit))

    k = 1 << 10
    assert runs(0, 1 << 20) == [(False, 128 * k), (True, 64 * k), (False, (1024 - 192) * k)]
    assert runs(130 * k, 10) == [(True, 10)]
    assert runs(0, 10) == [(False, 10)]
    assert runs(130 * k, 1 << 20) == [(True, 62 * k), (False, (1024 - 62) * k)]
    assert runs(0, 1 << 20, 2) == [(False, 128 * k), (True, 64 * k)]
    assert runs(2 << 20, 5) == [(False, 5)]
    file.close()


def test_data_runs_where_the_host_cannot_tell(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ThreadedFile.open(str(path))

    def fail(*args: object) -> int:
        raise OSError(errno.EINVAL, "no such thing")

    monkeypatch.setattr(os, "lseek", fail)
    assert asyncio.run(file.data_runs(0, 100, 9)) == [(True, 100)]
    assert asyncio.run(file.data_runs(16000, 1000, 9)) == [(True, 384), (False, 616)]
    file.close()


# -- writing


def test_write_zero_discard_truncate(path: Path) -> None:
    file = ThreadedFile.open(str(path), writable=True)

    async def run() -> None:
        await file.pwrite(100, b"abc")
        await file.pwrite(20000, memoryview(b"end"))
        assert file.size == 20003
        await file.zero(0, 50, punch=False)
        await file.zero(4096, 4096, punch=True)
        await file.zero(20003, 997, punch=True)
        assert file.size == 21000
        await file.discard(8192, 4096)
        await file.sync()
        await file.truncate(20002)
        assert file.size == 20002

    asyncio.run(run())
    expected = bytearray(CONTENT.ljust(20000, b"\0") + b"en")
    expected[100:103] = b"abc"
    expected[0:50] = bytes(50)
    expected[4096:8192] = bytes(4096)
    found = path.read_bytes()
    assert found[:8192] == expected[:8192]
    assert found[12288:] == expected[12288:]
    file.close()


def test_zero_without_fallocate(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockfile, "_fallocate", lambda *args: False)
    file = ThreadedFile.open(str(path), writable=True)
    asyncio.run(file.zero(10, 3 << 20, punch=True))
    assert path.read_bytes() == CONTENT[:10] + bytes(3 << 20)
    assert file.size == 10 + (3 << 20)
    file.close()


def test_a_sync_with_nothing_to_do_costs_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    file = ThreadedFile.open(str(path), writable=True)

    async def count(*work: Awaitable[object]) -> int:
        """Syncs that it takes to be safe after ``work``, asked for twice."""
        synced.clear()
        await asyncio.gather(*work)
        await file.sync()
        await file.sync()
        return len(synced)

    async def run() -> None:
        assert await count() == 1  # others may have written before us
        assert await count() == 0
        assert await count(file.pread(0, 10)) == 0
        assert await count(file.pwrite(0, b"some")) == 1
        assert await count(file.pwrite(0, bytes(1 << 20))) == 1
        assert file.try_pwrite(0, memoryview(b"some")) and await count() == 1
        assert await count(file.zero(0, 4096, punch=False)) == 1
        assert await count(file.zero(0, 4096, punch=True)) == 1
        assert await count(file.discard(0, 4096)) == 1
        assert await count(file.truncate(4096)) == 1
        # Who comes while a sync is under way cannot know that it will end well.
        file.try_pwrite(0, memoryview(b"some"))
        synced.clear()
        await asyncio.gather(file.sync(), file.sync())
        assert len(synced) == 2

    asyncio.run(run())
    file.close()


def test_a_failed_sync_is_done_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "failed")

    monkeypatch.setattr(os, "fdatasync", fail)
    file = ThreadedFile.open(str(path), writable=True)
    for _ in range(2):
        with pytest.raises(OSError):
            asyncio.run(file.sync())
    file.close()


def test_writing_needs_a_writable_file(path: Path) -> None:
    file = ThreadedFile.open(str(path))
    with pytest.raises(OSError):
        asyncio.run(file.pwrite(0, b"x"))
    with pytest.raises(OSError):
        asyncio.run(file.zero(0, 10, punch=True))
    assert path.read_bytes() == CONTENT
    file.close()


def test_one_thread_writes_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is written in the event loop's thread meanwhile: it would wait for the file's lock."""
    file = ThreadedFile.open(str(path), writable=True)
    writing = most = 0
    go = threading.Event()
    write = file._pwrite

    def slowly(offset: int, view: memoryview) -> None:
        nonlocal writing, most
        writing += 1
        most = max(most, writing)
        go.wait(10)
        time.sleep(0.005)
        write(offset, view)
        writing -= 1

    monkeypatch.setattr(file, "_pwrite", slowly)
    parts = [bytes([number]) * (INLINE_WRITE + 1) for number in range(4)]

    async def main() -> None:
        large = [asyncio.ensure_future(file.pwrite(n * len(part), part)) for n, part in enumerate(parts)]
        await until(lambda: writing == 1)
        assert not file.try_pwrite(0, memoryview(b"small"))
        go.set()
        await file.pwrite(4 * len(parts[0]), b"small")
        await asyncio.gather(*large)
        assert file.try_pwrite(4 * len(parts[0]) + 5, memoryview(b"er"))

    asyncio.run(main())
    assert most == 1
    assert path.read_bytes()[: 4 * len(parts[0]) + 7] == b"".join(parts) + b"smaller"
    file.close()


# -- a file that somebody else makes shorter


@pytest.mark.parametrize("nowait", [True, False])
def test_bytes_that_somebody_cut_off_are_an_error(path: Path, nowait: bool) -> None:
    async def main() -> None:
        file = ThreadedFile.open(str(path))
        file._nowait = nowait
        os.truncate(path, 5000)
        assert await read(file, 0, 5000) == CONTENT[:5000]
        assert await file.pread(len(CONTENT), 100) == bytes(100), "never there"
        for offset, length in ((4096, 2000), (8192, 100), (8192, len(CONTENT))):
            with pytest.raises(OSError, match="shorter") as caught:
                await file.pread(offset, length)
            assert caught.value.errno == errno.EIO and caught.value.filename == str(path)
            with pytest.raises(OSError, match="shorter"):
                await file.data_runs(8192, length, 10)
        file.close()

    asyncio.run(main())


def test_what_we_cut_off_ourselves_is_none(path: Path) -> None:
    async def main() -> None:
        file = ThreadedFile.open(str(path), writable=True)
        await file.truncate(5000)
        assert await file.pread(8192, 100) == bytes(100)
        assert await file.data_runs(8192, 100, 10) == [(False, 100)]
        await file.pwrite(9000, b"x")
        assert await file.pread(8999, 3) == b"\0x\0"
        file.close()

    asyncio.run(main())
