import asyncio
import errno
import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.image.blockfile import ThreadedFile
from nbdbm.image.image import Image
from nbdbm.image.read import MIN_HOLE, _merge
from tests.support import engine, images, qcow2build
from tests.support.marks import requires
from tests.support.qemu import SYSTEM

CLUSTER = 4096
MIB = 1 << 20


def text(seed: int, length: int) -> bytes:
    return b"".join(struct.pack(">II", seed, at) for at in range(0, length, 8))[:length]


def make(path: Path, **more: Any) -> bytes:
    """An image of 100 clusters and a bit, a third of them data, next to each other or not; its content."""
    size = 100 * CLUSTER + 1000
    clusters: dict[int, bytes | int] = {n: text(n, CLUSTER) for n in range(101) if n % 7 in (1, 2) or n > 98}
    clusters[5] = 1  # zero
    path.write_bytes(qcow2build.Image(size=size, cluster_bits=12, clusters=clusters, **more).build())
    data = [c if isinstance(c := clusters.get(n), bytes) else bytes(CLUSTER) for n in range(101)]
    return b"".join(data)[:size]


@pytest.fixture
def disk(tmp_path: Path) -> tuple[Path, bytes]:
    return tmp_path / "disk", make(tmp_path / "disk")


@given(data=st.data())
def test_any_range(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All three ways of reading say the same."""
    path = tmp_path_factory.getbasetemp() / "any-range"
    content = make(path)

    async def look(image: Image) -> None:
        for _ in range(8):
            offset = data.draw(st.integers(0, len(content) - 1))
            length = min(
                data.draw(st.sampled_from([1, 511, CLUSTER, 3 * CLUSTER, MIB])), len(content) - offset
            )
            expected = content[offset : offset + length]
            assert await engine.read(image, offset, length) == expected
            now = bytearray(length)
            if image.try_read_into(memoryview(now), offset):
                assert now == expected
            sparse = bytearray(b"\xaa" * length)
            at = 0
            for part, is_data in await image.read_sparse(memoryview(sparse), offset):
                assert part > 0
                if not is_data:
                    # Known to be zero, and not touched.
                    assert sparse[at : at + part] == b"\xaa" * part
                    assert part >= MIN_HOLE or part == length
                    sparse[at : at + part] = bytes(part)
                at += part
            assert at == length
            assert sparse == expected

    engine.use(path, look)


def test_nothing_at_all(disk: tuple[Path, bytes]) -> None:
    async def look(image: Image) -> None:
        assert await engine.read(image, 100, 0) == b""
        assert await image.read_sparse(memoryview(bytearray()), 100) == []

    engine.use(disk[0], look)


def test_without_the_page_cache(disk: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece goes through a thread."""
    monkeypatch.setattr(ThreadedFile, "read_now", lambda *args: 0)
    path, content = disk

    async def look(image: Image) -> None:
        assert not image.try_read_into(memoryview(bytearray(10)), CLUSTER)
        assert await engine.read_all(image) == content
        reads = [engine.read(image, at, 5000) for at in range(0, 300_000, 5000)]
        assert b"".join(await asyncio.gather(*reads)) == content[:300_000]

    engine.use(path, look)


def test_try_read(disk: tuple[Path, bytes]) -> None:
    path, content = disk

    async def look(image: Image) -> None:
        view = memoryview(bytearray(100))
        assert not image.try_read_into(view, CLUSTER)  # its table is not cached yet
        await engine.read(image, 0, 1)
        assert image.try_read_into(view, CLUSTER)
        assert bytes(view) == content[CLUSTER : CLUSTER + 100]
        assert image.try_read_into(view, 3 * CLUSTER)
        assert bytes(view) == bytes(100)

    engine.use(path, look)


def test_adjacent_clusters_are_one_read(disk: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    preadv = os.preadv

    def count(fd: int, views: tuple[memoryview], offset: int, flags: int) -> int:
        calls.append((offset, len(views[0])))
        return preadv(fd, views, offset, flags)

    async def look(image: Image) -> None:
        await engine.read(image, 0, 1)
        monkeypatch.setattr(os, "preadv", count)
        await engine.read(image, CLUSTER, 9 * CLUSTER)
        monkeypatch.undo()

    engine.use(disk[0], look)
    # Clusters 1, 2 and 8, 9, each pair together on the host.
    assert [length for _, length in calls] == [2 * CLUSTER, 2 * CLUSTER]


def test_disk_errors_keep_their_number(disk: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = disk

    async def look(image: Image) -> None:
        await engine.read(image, 0, 1)
        monkeypatch.setattr(ThreadedFile, "read_now", lambda *args: 0)

        def fail(*args: object) -> None:
            raise OSError(errno.EIO, "broken disk")

        monkeypatch.setattr(ThreadedFile, "read_waiting", fail)
        with pytest.raises(OSError) as caught:
            await engine.read(image, 0, 30 * CLUSTER)
        assert caught.value.errno == errno.EIO
        monkeypatch.undo()
        assert await engine.read_all(image) == content

    engine.use(path, look)


def test_cancelled_reads_leave_the_buffer_alone(
    disk: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No view outlives its await: after the cancellation nobody writes into it."""
    import time

    fill = ThreadedFile.read_waiting

    def slow(self: ThreadedFile, view: memoryview, offset: int) -> None:
        time.sleep(0.05)
        fill(self, view, offset)

    async def look(image: Image) -> None:
        await engine.read(image, 0, 1)
        monkeypatch.setattr(ThreadedFile, "read_now", lambda *args: 0)
        monkeypatch.setattr(ThreadedFile, "read_waiting", slow)
        buffer = bytearray(40 * CLUSTER)
        task = asyncio.ensure_future(image.read_into(memoryview(buffer), 0))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        buffer[:] = b"\xbb" * len(buffer)
        await asyncio.sleep(0.15)
        assert buffer == b"\xbb" * len(buffer)

    engine.use(disk[0], look)


def test_raw_holes(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    with path.open("wb") as file:
        file.truncate(4 * MIB + 100)
        file.seek(MIB)
        file.write(b"x" * 65536)
        file.flush()
        os.fsync(file.fileno())
    if path.stat().st_blocks * 512 > MIB:
        pytest.skip("the file system keeps no holes")

    async def look(image: Image) -> None:
        assert await image.read_sparse(memoryview(bytearray(2 * MIB)), 0) == [
            (MIB, False),
            (65536, True),
            (MIB - 65536, False),
        ]
        # A small read does not ask.
        assert await image.read_sparse(memoryview(bytearray(CLUSTER)), 0) == [(CLUSTER, True)]
        assert await engine.read_all(image) == path.read_bytes()

    engine.use(path, look, format="raw")


def test_merge() -> None:
    assert _merge([(10, 5), (0, 3), (3, 7), (20, 1)]) == [(0, 15), (20, 1)]
    assert _merge([]) == []


# -- what QEMU makes, read as QEMU reads it

MATRIX = [
    "v2-512",
    "v3-packed",
    "cluster-2097152",
    "zlib-512",
    "zstd-mixed",
    "extl2-16k",
    "extl2-packed",
    "sectors-129",
    "data-file-extl2",
    "load-first",
    "chain-mixed-clusters",
    "middle-shorter",
    "over-compressed",
    "raw",
]


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("name", MATRIX)
def test_reads_what_qemu_reads(name: str, gallery: images.Gallery, tmp_path: Path) -> None:
    case = gallery.get(name)
    options = dict(zip(case.options[::2], case.options[1::2], strict=True))
    wanted = options.get("--load-snapshot")
    snapshot = ["-l", f"snapshot.name={wanted}"] if wanted else []
    SYSTEM.img("convert", "-f", case.format, *snapshot, "-O", "raw", case.path, tmp_path / "raw")
    expected = (tmp_path / "raw").read_bytes()

    async def look(image: Image) -> None:
        assert image.size == len(expected)
        for step in (MIB, 100_001):
            found = await engine.read_all(image, step)
            assert hashlib.sha256(found).digest() == hashlib.sha256(expected).digest()

    engine.use(case.path, look, format=case.format, snapshot=wanted)
