import asyncio
import errno
import itertools
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.errors import CorruptError
from nbdbm.image import unpack
from nbdbm.image.blockfile import ThreadedFile
from nbdbm.image.image import Image
from nbdbm.image.unpack import BATCH_BYTES, NEAR, _runs
from nbdbm.qcow2.constants import COMPRESSED, COPIED
from tests.support import engine, qcow2build

MIB = 1 << 20


def text(seed: int, length: int) -> bytes:
    return b"".join(struct.pack(">II", seed, at) for at in range(0, length, 8))[:length]


def deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -12)
    return stream.compress(data) + stream.flush()


def packed_image(path: Path, bits: int, payloads: list[bytes], *, cut: bool = False) -> None:
    """An image whose clusters are compressed, one payload right behind the other; with ``cut`` the file
    ends with the last payload's last byte."""
    cluster = 1 << bits
    image = qcow2build.Image(
        size=len(payloads) * cluster,
        cluster_bits=bits,
        clusters=dict.fromkeys(range(len(payloads)), COMPRESSED),
    )
    data = bytearray(image.build())
    l1 = qcow2build.get_field(data, "l1_table_offset")
    table = struct.unpack_from(">Q", data, l1)[0] & ~COPIED
    for number, payload in enumerate(payloads):
        at = len(data)
        data += payload
        more = (at + len(payload) - 1) // 512 - at // 512
        struct.pack_into(">Q", data, table + 8 * number, COMPRESSED | more << 62 - (bits - 8) | at)
    path.write_bytes(data + (b"" if cut else bytes(-len(data) % cluster)))


def point(path: Path, number: int, host: int, length: int, bits: int) -> None:
    """Have the descriptor of cluster ``number`` name other data."""
    data = path.read_bytes()
    table = (
        struct.unpack_from(">Q", data, qcow2build.get_field(bytearray(data), "l1_table_offset"))[0] & ~COPIED
    )
    more = (host + length - 1) // 512 - host // 512
    entry = COMPRESSED | more << 62 - (bits - 8) | host
    qcow2build.patch_bytes(path, table + 8 * number, struct.pack(">Q", entry))


ways = pytest.mark.parametrize("limit", [0.0, 1e9], ids=["threads", "inline"])
"""Values of INLINE_TIME."""


@ways
@pytest.mark.parametrize("bits", [9, 12, 16])
@pytest.mark.parametrize("cut", [True, False])
def test_compressed(
    tmp_path: Path, bits: int, cut: bool, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Payloads of all lengths cross sectors and host clusters; the last sector may be cut short."""
    monkeypatch.setattr(unpack, "INLINE_TIME", limit)
    cluster = 1 << bits
    contents = [
        os.urandom(share) + text(n, cluster - share)
        for n, share in enumerate([0, cluster // 2, cluster - 50, cluster // 3, 7, 0, cluster - 1] * 3)
    ]
    packed_image(tmp_path / "disk", bits, [deflate(content) for content in contents], cut=cut)
    whole = b"".join(contents)

    async def look(image: Image) -> None:
        assert await engine.read_all(image) == whole
        for offset in range(0, len(whole) - 100, cluster // 3 + 1):
            length = min(3 * cluster // 2, len(whole) - offset)
            assert await engine.read(image, offset, length) == whole[offset : offset + length]
            assert await engine.read(image, offset, 10) == whole[offset : offset + 10]

    engine.use(tmp_path / "disk", look)


@ways
def test_small_reads_of_a_cluster_share_its_decompression(
    tmp_path: Path, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "INLINE_TIME", limit)
    content = text(1, 65536)
    packed_image(tmp_path / "disk", 16, [deflate(content)])

    async def look(image: Image) -> None:
        calls = []
        layer = image._layers[0]
        decompress = layer.decompress
        assert decompress is not None

        def count(data: bytes, size: int) -> bytes:
            calls.append(size)
            return decompress(data, size)

        layer.decompress = count
        reads = [engine.read(image, at, 100) for at in range(0, 65000, 1000)]
        assert b"".join(await asyncio.gather(*reads)) == b"".join(
            content[at : at + 100] for at in range(0, 65000, 1000)
        )
        assert calls == [65536]

    engine.use(tmp_path / "disk", look)


@ways
@pytest.mark.parametrize("bits", [12, 16])
def test_damaged_compressed_data(
    tmp_path: Path, bits: int, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "INLINE_TIME", limit)
    cluster = 1 << bits
    good = deflate(text(1, cluster))
    packed_image(tmp_path / "disk", bits, [good, b"\xff" * 600, good, deflate(b"short")])

    async def look(image: Image) -> None:
        for _ in range(2):
            assert await engine.read(image, 0, cluster) == text(1, cluster)
            assert await engine.read(image, 2 * cluster, cluster) == text(1, cluster)
            for number, what in ((1, "damaged zlib"), (3, "ends after 5 bytes")):
                for length in (10, cluster):
                    with pytest.raises(CorruptError, match=f"L2 table 0, index {number} .*{what}") as caught:
                        await engine.read(image, number * cluster, length)
                    assert caught.value.errno == errno.EIO
        with pytest.raises(CorruptError, match="index 1"):
            await engine.read_all(image)

    engine.use(tmp_path / "disk", look)


def test_compressed_data_past_the_end(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    packed_image(path, 12, [deflate(text(1, 4096)), deflate(text(2, 4096))], cut=True)
    data = path.read_bytes()
    table = struct.unpack_from(">Q", data, qcow2build.get_field(data, "l1_table_offset"))[0] & ~COPIED
    qcow2build.patch_bytes(path, table + 8, struct.pack(">Q", COMPRESSED | len(data)))

    async def look(image: Image) -> None:
        assert await engine.read(image, 0, 4096) == text(1, 4096)
        with pytest.raises(CorruptError, match=r"index 1 .*past the file's end"):
            await engine.read(image, 4096, 1)

    engine.use(path, look)


@ways
def test_without_the_page_cache(tmp_path: Path, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of clusters, whole ones, and both."""
    monkeypatch.setattr(unpack, "INLINE_TIME", limit)
    monkeypatch.setattr(ThreadedFile, "read_now", lambda *args: 0)
    whole = b"".join(os.urandom(30_000) + bytes(35_536) for _ in range(8))
    packed_image(tmp_path / "disk", 16, [deflate(whole[at : at + 65536]) for at in range(0, 8 << 16, 65536)])

    async def look(image: Image) -> None:
        for offset, length in ((5, 10), (65536, 65536), (3 * 65536 + 100, 3 * 65536), (0, 8 * 65536)):
            assert await engine.read(image, offset, length) == whole[offset : offset + length]
        reads = [engine.read(image, at, 5000) for at in range(0, 500_000, 5000)]
        assert b"".join(await asyncio.gather(*reads)) == whole[:500_000]

    engine.use(tmp_path / "disk", look)


# -- how it is read


class Reads:
    """Counts what is read from files, at once or by a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, cached: bool = True) -> None:
        self.found: list[tuple[int, int]] = []
        inner: Callable[..., int] = ThreadedFile.read_now

        def count(file: ThreadedFile, view: memoryview, offset: int) -> int:
            self.found.append((offset, len(view)))
            return inner(file, view, offset) if cached else 0

        monkeypatch.setattr(ThreadedFile, "read_now", count)


@pytest.mark.parametrize("cached", [True, False])
def test_neighbours_are_one_read(tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [os.urandom(30_000) + bytes(35_536) for _ in range(16)]
    packed_image(tmp_path / "disk", 16, [deflate(content) for content in contents])

    async def look(image: Image) -> None:
        await engine.read(image, 0, 1)
        reads = Reads(monkeypatch, cached=cached)
        assert await engine.read(image, 0, MIB) == b"".join(contents)
        # Without the page cache it is tried, and then waited for.
        ((_, length),) = set(reads.found)
        assert 16 * 30_000 < length < 16 * 30_300

    engine.use(tmp_path / "disk", look)


def test_large_reads_go_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers stay small, and other requests get their turn."""
    contents = [os.urandom(60_000) + bytes(5536) for _ in range(50)]
    packed_image(tmp_path / "disk", 16, [deflate(content) for content in contents])

    async def look(image: Image) -> None:
        await engine.read(image, 0, 1)
        reads = Reads(monkeypatch)
        assert await engine.read_all(image, 50 * 65536) == b"".join(contents)
        assert len(reads.found) == 4
        assert max(length for _, length in reads.found) <= BATCH_BYTES

    engine.use(tmp_path / "disk", look)


@pytest.mark.parametrize("bits", [9, 21])
def test_descriptors_far_apart_and_over_each_other(tmp_path: Path, bits: int) -> None:
    """As many clusters as like may name the same data, parts of it, or places at both ends of the file."""
    cluster = 1 << bits
    path = tmp_path / "disk"
    good = [text(n, cluster) for n in range(6)]
    packs = [deflate(content) for content in good]
    packed_image(path, bits, [*packs, b"\xff" * 200])
    # Cluster 1 names what 0 does, but claims as much as a descriptor can; 3 lies far behind the others.
    end = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(end + 64 * MIB)
        file.seek(end + 60 * MIB)
        file.write(packs[3])
    first = path.read_bytes().index(packs[0])
    point(path, 1, first, 2 * cluster - 512, bits)
    point(path, 3, end + 60 * MIB, len(packs[3]), bits)
    expected = [good[0], good[0], good[2], good[3], good[4], good[5]]

    async def look(image: Image) -> None:
        assert await engine.read(image, 0, 6 * cluster) == b"".join(expected)
        with pytest.raises(CorruptError, match="index 6"):
            await engine.read(image, 0, 7 * cluster)

    engine.use(path, look)


@given(st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 9000)), min_size=1, max_size=20))
def test_runs(spans: list[tuple[int, int]]) -> None:
    runs, places = _runs(spans)
    file = [offset + at for offset, length in runs for at in range(length)]
    for (offset, length), place in zip(spans, places, strict=True):
        assert file[place] == offset and file[place + length - 1] == offset + length - 1
    # No byte is read twice, and little is read in vain.
    assert sorted(runs) == runs
    assert all(b[0] - sum(a) > NEAR for a, b in itertools.pairwise(runs))
    assert sum(length for _, length in runs) <= sum(length for _, length in spans) + NEAR * (len(spans) - 1)


# -- where it is decompressed


@pytest.mark.parametrize("slow", [True, False])
def test_dear_clusters_go_to_threads(tmp_path: Path, slow: bool) -> None:
    """Which they are is learned from those before."""
    packed_image(tmp_path / "disk", 16, [deflate(text(n, 65536)) for n in range(16)])
    where: list[threading.Thread] = []

    def decompress(data: bytes | memoryview, size: int) -> bytes:
        where.append(threading.current_thread())
        until = time.thread_time() + 0.0004
        while slow and time.thread_time() < until:
            pass
        return bytes(size)

    async def look(image: Image) -> None:
        image._layers[0].decompress = decompress
        for _ in range(40):
            await engine.read(image, 0, MIB)
        inline = [thread is threading.main_thread() for thread in where]
        assert not any(inline[:16])
        assert inline[-16:] == [not slow] * 16

    engine.use(tmp_path / "disk", look)


@pytest.mark.parametrize("length", [100, MIB])
def test_nobody_writes_after_a_cancellation(tmp_path: Path, length: int) -> None:
    packed_image(tmp_path / "disk", 16, [deflate(text(n, 65536)) for n in range(16)])
    started = threading.Event()

    def decompress(data: bytes | memoryview, size: int) -> bytes:
        started.set()
        time.sleep(0.01)
        return b"\xaa" * size

    async def look(image: Image) -> None:
        await engine.read(image, 0, 1)
        image._layers[0].decompress = decompress
        image._reader._unpacker._pace = 1.0
        buffer = bytearray(length)
        task = asyncio.ensure_future(image.read_into(memoryview(buffer), 65536 if length == 100 else 0))
        assert await asyncio.to_thread(started.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        buffer[:] = b"\xbb" * length
        await asyncio.sleep(0.2)
        assert buffer == b"\xbb" * length

    engine.use(tmp_path / "disk", look)


def test_disk_errors_end_the_read_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [os.urandom(30_000) + bytes(35_536) for _ in range(40)]
    packed_image(tmp_path / "disk", 16, [deflate(content) for content in contents])
    whole = b"".join(contents)

    async def look(image: Image) -> None:
        await engine.read(image, 0, 1)

        def fail(*args: Any) -> None:
            raise OSError(errno.EIO, "broken disk")

        monkeypatch.setattr(ThreadedFile, "read_now", lambda *args: 0)
        monkeypatch.setattr(ThreadedFile, "read_waiting", fail)
        for length in (10, len(whole) - 65536):
            with pytest.raises(OSError, match="broken disk") as caught:
                await engine.read(image, 65536, length)
            assert caught.value.errno == errno.EIO
        monkeypatch.undo()
        assert await engine.read(image, 0, len(whole)) == whole

    engine.use(tmp_path / "disk", look)
