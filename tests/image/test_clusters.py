import asyncio
import logging
import struct
from pathlib import Path

import pytest

from nbdbm.errors import CorruptError
from nbdbm.image.blockfile import ThreadedFile
from nbdbm.image.cache import TableCache
from nbdbm.image.clusters import MAX_COMPLAINTS, ClusterMap, load_l1
from nbdbm.qcow2.constants import COPIED
from nbdbm.qcow2.geometry import Geometry
from nbdbm.qcow2.header import Header
from nbdbm.qcow2.mapping import ABSENT, UNKNOWN, Kind
from tests.support import qcow2build

CLUSTER = 4096
L2_RANGE = 512 * CLUSTER


class Layer:
    """A ClusterMap over a file, to be changed before it is read."""

    def __init__(self, path: Path, image: qcow2build.Image, limit: int = 1 << 20) -> None:
        path.write_bytes(image.build())
        self.path = path
        self.header = Header.parse(path.read_bytes()[: 1 << image.cluster_bits])
        self.cache = TableCache(limit)

    def l1_entry(self, index: int) -> int:
        data = self.path.read_bytes()
        entry: int = struct.unpack_from(">Q", data, self.header.l1_table_offset + 8 * index)[0]
        return entry

    def set_l1(self, index: int, entry: int) -> None:
        qcow2build.patch_bytes(self.path, self.header.l1_table_offset + 8 * index, struct.pack(">Q", entry))

    async def open(self) -> ClusterMap:
        file = ThreadedFile.open(str(self.path))
        l1 = await load_l1(file, self.header.l1_table_offset, self.header.l1_size)
        return ClusterMap(file, file, Geometry(self.header), l1, self.header.size, self.cache, 0)


@pytest.fixture
def layer(tmp_path: Path) -> Layer:
    """16 L2 tables' worth of disk: data in the first and the tenth."""
    image = qcow2build.Image(
        size=16 * L2_RANGE,
        cluster_bits=12,
        clusters={1: b"a", 2: b"b", 511: b"c", 512: b"d", 9 * 512 + 3: b"e"},
    )
    return Layer(tmp_path / "disk.qcow2", image)


def test_ranges_across_tables(layer: Layer) -> None:
    async def run() -> None:
        clusters = await layer.open()
        runs = await clusters.map(0, layer.header.size)
        assert [(run.kind, run.length // CLUSTER) for run in runs] == [
            (Kind.UNALLOCATED, 1),
            (Kind.DATA, 2),
            (Kind.UNALLOCATED, 508),
            (Kind.DATA, 1),
            (Kind.DATA, 1),
            (Kind.UNALLOCATED, 511),
            (Kind.UNALLOCATED, 7 * 512),
            (Kind.UNALLOCATED, 3),
            (Kind.DATA, 1),
            (Kind.UNALLOCATED, 508),
            (Kind.UNALLOCATED, 6 * 512),
        ]
        clusters.file.close()

    asyncio.run(run())


def test_locate_needs_a_cached_table(layer: Layer) -> None:
    async def run() -> None:
        clusters = await layer.open()
        assert clusters.locate(CLUSTER, 10) == UNKNOWN
        assert clusters.locate(5 * L2_RANGE, 10) == ABSENT
        host = (await clusters.map(CLUSTER, 1))[0].host
        assert clusters.locate(CLUSTER + 5, 10) == host + 5
        assert clusters.locate(CLUSTER, 2 * CLUSTER) == host
        assert clusters.locate(0, 10) == ABSENT
        assert clusters.locate(0, 2 * CLUSTER) == UNKNOWN
        assert clusters.locate(L2_RANGE - 10, 20) == UNKNOWN
        clusters.file.close()

    asyncio.run(run())


def test_memory_stays_within_the_cache(tmp_path: Path) -> None:
    """Every table is visited, and few are kept."""
    image = qcow2build.Image(size=64 * L2_RANGE, cluster_bits=12, clusters={n * 512: b"x" for n in range(64)})
    layer = Layer(tmp_path / "disk", image, limit=10 * CLUSTER)

    async def run() -> None:
        clusters = await layer.open()
        for start in (0, 0):
            runs = await clusters.map(start, layer.header.size)
            assert sum(run.length for run in runs if run.kind is Kind.DATA) == 64 * CLUSTER
        assert layer.cache.weight <= 10 * CLUSTER
        clusters.file.close()

    asyncio.run(run())


def test_slices_of_a_large_table(tmp_path: Path) -> None:
    """A table of 256 KiB is read in quarters."""
    image = qcow2build.Image(size=1 << 33, cluster_bits=18, clusters={0: b"a", 8192: b"b", 32767: b"c"})
    layer = Layer(tmp_path / "disk", image)

    async def run() -> None:
        clusters = await layer.open()
        runs = await clusters.map(8191 << 18, 3 << 18)
        assert [run.kind for run in runs] == [Kind.UNALLOCATED, Kind.DATA, Kind.UNALLOCATED]
        assert list(layer.cache.values) == [0, 1]
        assert (await clusters.map(32767 << 18, 1))[0].kind is Kind.DATA
        assert list(layer.cache.values) == [0, 1, 3]
        clusters.file.close()

    asyncio.run(run())


# -- damage: the range concerned fails, the rest is served


def check_damage(layer: Layer, offset: int, text: str, fine: int, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        clusters = await layer.open()
        for _ in range(2):
            with pytest.raises(CorruptError, match=text) as caught:
                await clusters.map(offset, 10)
            assert caught.value.path == str(layer.path)
        assert (await clusters.map(fine, 10))[0].kind is Kind.DATA
        clusters.file.close()

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "entry, text",
    [
        (COPIED | 0x5200, "L1 table, index 9: L1 entry .*aligned"),
        (1 << 60 | 0x5000, "L1 table, index 9: L1 entry .*reserved"),
        (COPIED | 1 << 40, "L1 table, index 9: .* past the file's end"),
    ],
)
def test_damaged_l1_entry(layer: Layer, entry: int, text: str, caplog: pytest.LogCaptureFixture) -> None:
    layer.set_l1(9, entry)
    check_damage(layer, 9 * L2_RANGE, text, CLUSTER, caplog)


@pytest.mark.parametrize(
    "entry, text",
    [
        (COPIED | 0x5200, "L2 table 9, index 3 .guest offset 0x1203000.: L2 entry .*aligned"),
        (1 << 57 | 0x5000, "L2 table 9, index 3 .*reserved"),
        (COPIED | 1 << 40, "guest offset 0x1203000: data cluster at 0x10000000000 lies past the file's end"),
    ],
)
def test_damaged_l2_entry(layer: Layer, entry: int, text: str, caplog: pytest.LogCaptureFixture) -> None:
    table = layer.l1_entry(9) & ~COPIED
    qcow2build.patch_bytes(layer.path, table + 8 * 3, struct.pack(">Q", entry))
    check_damage(layer, 9 * L2_RANGE + 3 * CLUSTER, text, CLUSTER, caplog)


def test_names_the_entry_at_fault_in_a_long_range(layer: Layer) -> None:
    qcow2build.patch_bytes(layer.path, (layer.l1_entry(0) & ~COPIED) + 8 * 77, struct.pack(">Q", 2))

    async def run() -> None:
        clusters = await layer.open()
        with pytest.raises(CorruptError, match="L2 table 0, index 77 "):
            await clusters.map(CLUSTER, 300 * CLUSTER)
        assert clusters.locate(77 * CLUSTER, 1) == UNKNOWN
        clusters.file.close()

    asyncio.run(run())


def test_complaints_are_bounded(layer: Layer, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        clusters = await layer.open()
        for number in range(2 * MAX_COMPLAINTS):
            clusters.complain(f"place {number}")
        clusters.file.close()

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert len(caplog.records) == MAX_COMPLAINTS


def test_a_last_cluster_cut_short(layer: Layer) -> None:
    """The file may end inside its last data cluster, not before it."""
    host = (layer.path.stat().st_size // CLUSTER + 1) * CLUSTER
    table = layer.l1_entry(0) & ~COPIED
    qcow2build.patch_bytes(layer.path, table + 8 * 5, struct.pack(">Q", COPIED | host))

    async def look() -> list[int]:
        clusters = await layer.open()
        try:
            return [run.host for run in await clusters.map(5 * CLUSTER, CLUSTER)]
        finally:
            clusters.file.close()

    with layer.path.open("r+b") as file:
        file.truncate(host + 1)
    assert asyncio.run(look()) == [host]
    with layer.path.open("r+b") as file:
        file.truncate(host)
    with pytest.raises(CorruptError, match="past the file's end"):
        asyncio.run(look())


# -- walking a long way

MANY = 3 * 8192
"""Clusters of three whole L2 tables, each of which is one slice."""


@pytest.fixture
def large(tmp_path: Path) -> Layer:
    """Three L2 tables with a cluster of data in every fortieth place; none for the fourth."""
    image = qcow2build.Image(size=(MANY + 8192) * 65536, clusters=dict.fromkeys(range(7, MANY, 40), b"x"))
    return Layer(tmp_path / "disk.qcow2", image)


async def walked(clusters: ClusterMap, first: int, stop: int) -> str:
    """A letter per cluster of [first, stop)."""
    letters = ""
    offset, end = first * 65536 + 5, stop * 65536 - 5
    while offset < end:
        covered, kinds, base = await clusters.kinds(offset, end - offset)
        assert 0 < covered <= end - offset
        here, last = offset >> 16, (offset + covered - 1) >> 16
        if kinds is None:
            letters += "U" * (last + 1 - here)
        else:
            assert base % 65536 == 0 and base <= offset
            letters += kinds[here - (base >> 16) : last + 1 - (base >> 16)].decode()
            assert len(kinds) > last - (base >> 16)
        offset += covered
    return letters


def wanted(first: int, stop: int) -> str:
    return "".join("D" if n % 40 == 7 and n < MANY else "U" for n in range(first, stop))


def test_a_walk_leaves_the_cache_as_it_is(large: Layer) -> None:
    async def run() -> None:
        clusters = await large.open()
        for first, stop in ((0, MANY + 8192), (500, MANY - 3), (8191, 8193), (3, 2000)):
            assert await walked(clusters, first, stop) == wanted(first, stop)
        # Only those where a range ends.
        assert list(large.cache.values) == [2, 1, 0]
        clusters.file.close()

    asyncio.run(run())


async def change(clusters: ClusterMap, cluster: int) -> None:
    """Make one cluster read as zeroes, in memory only, as a write does."""
    table = await clusters.slice(cluster // 8192)
    table.words[cluster % 8192] = 1
    table.kinds = None


def test_what_is_cached_is_newer_than_the_file(large: Layer) -> None:
    async def run() -> None:
        clusters = await large.open()
        letters = list(wanted(0, MANY))
        for cluster in (0, 8192 + 511):
            await change(clusters, cluster)
            letters[cluster] = "Z"
        assert await walked(clusters, 0, MANY) == "".join(letters)
        clusters.file.close()

    asyncio.run(run())


def test_what_is_changed_while_the_file_is_read(large: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write in the middle of a walk: what was read is out of date before it is looked at."""

    async def run() -> None:
        clusters = await large.open()
        pread = clusters.file.pread
        reads = 0

        async def late(offset: int, length: int) -> bytes:
            nonlocal reads
            reads += 1
            raw = await pread(offset, length)
            if reads == 1:
                await change(clusters, 3 * 512)
            return raw

        monkeypatch.setattr(clusters.file, "pread", late)
        letters = list(wanted(0, MANY))
        letters[3 * 512] = "Z"
        assert await walked(clusters, 0, MANY) == "".join(letters)
        assert reads == 2
        clusters.file.close()

    asyncio.run(run())


def test_a_table_that_moves_while_it_is_read(large: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        clusters = await large.open()
        pread = clusters.file.pread
        first, second = clusters.l1[0], clusters.l1[1]
        clusters.l1[0] = second

        async def late(offset: int, length: int) -> bytes:
            raw = await pread(offset, length)
            clusters.l1[0] = first
            return raw

        monkeypatch.setattr(clusters.file, "pread", late)
        assert await walked(clusters, 0, MANY) == wanted(0, MANY)
        clusters.file.close()

    asyncio.run(run())
