import asyncio
import json
import os
import struct
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdbm.errors import CorruptError
from nbdbm.extents import ExtentList
from nbdbm.image import status
from nbdbm.image.image import Image, Run
from nbdbm.qcow2.constants import COMPRESSED, COPIED
from tests.support import engine, images, qcow2build, servers
from tests.support.marks import requires
from tests.support.qcow2build import EXT_BACKING_FORMAT
from tests.support.qemu import SYSTEM

CLUSTER = 65536
MIB = 1 << 20


def make(
    path: Path, clusters: dict[int, bytes | int], count: int, backing: str = "", format: str = "qcow2"
) -> Path:
    extensions = [(EXT_BACKING_FORMAT, format.encode())] if backing else []
    image = qcow2build.Image(
        size=count * CLUSTER, clusters=clusters, backing=backing.encode(), extensions=extensions
    )
    path.write_bytes(image.build())
    return path


def shown(runs: list[Run]) -> list[tuple[int, str, int]]:
    """(clusters, data or zero or both, depth)."""
    return [(run.length // CLUSTER, "D" * run.data + "Z" * run.zero, run.depth) for run in runs]


def walk(path: Path) -> list[tuple[int, str, int]]:
    return shown(engine.use(path, engine.walk))


DATA = b"x" * CLUSTER
PACKED = COMPRESSED | 0x10000


def test_each_kind(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", {0: DATA, 1: PACKED, 2: 1, 3: COPIED | 0x10000 | 1, 5: DATA}, 8)
    assert walk(path) == [(2, "D", 1), (2, "Z", 1), (1, "Z", 0), (1, "D", 1), (2, "Z", 0)]


def test_depth_counts_layers(tmp_path: Path) -> None:
    make(tmp_path / "a", {0: DATA, 1: DATA, 2: 1, 6: DATA}, 8)
    make(tmp_path / "b", {1: DATA}, 4, "a")
    top = make(tmp_path / "c", {3: DATA}, 8, "b")
    # Past the end of b: zeroes of b's, whatever a holds there.
    assert walk(top) == [(1, "D", 3), (1, "D", 2), (1, "Z", 3), (1, "D", 1), (4, "Z", 2)]


def test_raw_below(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        file.truncate(6 * CLUSTER)
        file.seek(CLUSTER)
        file.write(DATA)
        file.seek(4 * CLUSTER)
        file.write(DATA)
        file.flush()
        os.fsync(file.fileno())
    if raw.stat().st_blocks * 512 > 3 * CLUSTER:
        pytest.skip("the file system keeps no holes")
    top = make(tmp_path / "top", {0: DATA, 3: 1}, 8, "raw", "raw")
    # All of a raw layer is allocated; past its end are its zeroes.
    assert walk(top) == [
        (1, "D", 1),
        (1, "D", 2),
        (1, "Z", 2),
        (1, "Z", 1),
        (1, "D", 2),
        (3, "Z", 2),
    ]


def test_preallocated_metadata(tmp_path: Path) -> None:
    """Data clusters that are holes in the file are zero as well, if most of the file is holes."""
    path = make(tmp_path / "disk", dict.fromkeys(range(32), DATA), 32)
    data = path.read_bytes()
    table = struct.unpack_from(">Q", data, qcow2build.get_field(data, "l1_table_offset"))[0] & ~COPIED
    first = struct.unpack_from(">Q", data, table)[0] & ~COPIED
    assert walk(path) == [(32, "D", 1)]
    with path.open("r+b") as file:
        file.truncate(first)
        file.truncate(len(data))
        file.seek(first + 5 * CLUSTER)
        file.write(DATA)
        file.seek(table)
        file.write(data[table:])
        file.flush()
        os.fsync(file.fileno())
    if path.stat().st_blocks * 512 > len(data) // 2:
        pytest.skip("the file system keeps no holes")
    assert walk(path) == [(5, "DZ", 1), (1, "D", 1), (26, "DZ", 1)]


def test_damage_stops_before_itself(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", {0: DATA, 1: DATA, 2: 2, 3: DATA}, 4)

    async def look(image: Image) -> None:
        assert shown(await image.status(0, image.size)) == [(2, "D", 1)]
        for _ in range(2):
            with pytest.raises(CorruptError, match="index 2"):
                await image.status(2 * CLUSTER, 10)
        assert shown(await image.status(3 * CLUSTER, CLUSTER)) == [(1, "D", 1)]

    engine.use(path, look)


def test_damage_below_stops_before_itself(tmp_path: Path) -> None:
    make(tmp_path / "base", {0: DATA, 1: 2}, 4)
    top = make(tmp_path / "top", {3: DATA}, 4, "base")

    async def look(image: Image) -> None:
        assert shown(await image.status(0, image.size)) == [(1, "D", 2)]
        with pytest.raises(CorruptError, match="base"):
            await image.status(CLUSTER, 10)

    engine.use(top, look)


def test_any_part_of_the_disk(tmp_path: Path) -> None:
    """The answer for a range is the whole answer, cut."""
    make(tmp_path / "base", dict.fromkeys(range(0, 40, 3), DATA), 40)
    top = make(tmp_path / "top", {n: (DATA if n % 2 else 1) for n in range(0, 50, 5)}, 50, "base")

    async def look(image: Image) -> None:
        flat: list[tuple[bool, bool, int]] = []
        for run in await engine.walk(image):
            flat += [run[1:]] * (run.length // 512)
        for offset in range(0, image.size, 37 * 512):
            for length in (512, 5 * 512, CLUSTER, 1 << 20):
                length = min(length, image.size - offset)
                at = offset // 512
                for run in await image.status(offset, length):
                    for _ in range(run.length // 512):
                        assert flat[at] == run[1:]
                        at += 1
                assert offset // 512 < at <= (offset + length) // 512

    engine.use(top, look)


def test_odd_ranges(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", {1: DATA}, 3)

    async def look(image: Image) -> None:
        runs = await image.status(CLUSTER - 3, CLUSTER + 10)
        assert [run.length for run in runs] == [3, CLUSTER, 7]

    engine.use(path, look)


def test_work_per_call_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small answers, all the same in the end."""
    make(tmp_path / "base", dict.fromkeys(range(0, 40000, 5000), DATA), 40000)
    top = make(tmp_path / "top", dict.fromkeys(range(0, 40000, 7000), DATA), 40000, "base")
    whole = walk(top)
    monkeypatch.setattr(status, "CALL_SLICES", 1)
    monkeypatch.setattr(status, "CALL_RUNS", 2)
    monkeypatch.setattr(status, "STEP_SLICES", 1)
    assert walk(top) == whole

    async def first(image: Image) -> int:
        return len(await image.status(0, image.size))

    assert engine.use(top, first) < len(whole)


def test_absent_tables_cost_nothing(tmp_path: Path) -> None:
    """16 TiB with nothing in them: one call, at once."""
    path = tmp_path / "disk"
    image = qcow2build.Image(size=1 << 44, clusters={(1 << 28) - 1: DATA})
    path.write_bytes(image.build())

    async def look(image: Image) -> None:
        started = time.monotonic()
        runs = await image.status(0, image.size)
        assert time.monotonic() - started < 2
        assert shown(runs) == [((1 << 28) - 1, "Z", 0), (1, "D", 1)]

    engine.use(path, look)


def test_cancelled_status(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", {0: DATA}, 4)

    async def look(image: Image) -> None:
        task = asyncio.ensure_future(image.status(0, image.size))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert shown(await image.status(0, image.size)) == [(1, "D", 1), (3, "Z", 0)]

    engine.use(path, look)


# -- what qemu-nbd says of the same files

MATRIX = [
    "v3",
    "cluster-512",
    "zlib-2m",
    "extl2",
    "extl2-packed",
    "prealloc-metadata",
    "prealloc-metadata-extl2",
    "prealloc-falloc",
    "prealloc-full",
    "data-file",
    "data-file-raw",
    "load-second-extl2",
    "chain-5",
    "chain-mixed-clusters",
    "over-raw",
    "over-raw-odd",
    "short-backing",
    "long-backing",
    "middle-shorter",
    "over-compressed",
    "raw",
]


def extents(uri: str, context: str) -> list[tuple[int, int]]:
    """(length, flags), neighbours merged."""
    merged: list[tuple[int, int]] = []
    for entry in json.loads(SYSTEM.run("nbdinfo", "--json", f"--map={context}", uri)):
        length, flags = entry["length"], entry["type"]
        if merged and merged[-1][1] == flags:
            length += merged.pop()[0]
        merged.append((length, flags))
    return merged


def project(runs: list[Run], what: str) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for run in runs:
        flags = run.depth if what == "depth" else (not run.data) | run.zero << 1
        length = run.length
        if merged and merged[-1][1] == flags:
            length += merged.pop()[0]
        merged.append((length, flags))
    return merged


@requires("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
@pytest.mark.parametrize("name", MATRIX)
def test_says_what_qemu_says(name: str, gallery: images.Gallery) -> None:
    case = gallery.get(name)
    options = dict(zip(case.options[::2], case.options[1::2], strict=True))
    runs = engine.use(case.path, engine.walk, format=case.format, snapshot=options.get("--load-snapshot"))
    with servers.qemu_nbd(case.path, *case.qemu_options, image_format=case.format) as server:
        uri = server.uri
        assert project(runs, "allocation") == extents(uri, "base:allocation")
        assert project(runs, "depth") == extents(uri, "qemu:allocation-depth")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from("UUDDDCZA"), min_size=1, max_size=80),
    tail=st.integers(1, 512),
    cuts=st.lists(st.integers(0, 80 * 512), max_size=4),
    limit=st.sampled_from([1, 3, 1000]),
)
def test_the_short_way_says_the_same(
    tmp_path: Path, kinds: list[str], tail: int, cuts: list[int], limit: int
) -> None:
    """``fill`` beside ``status``, over several slices, between any two offsets, in lists of any room."""
    # 2 MiB clusters would have one slice; of 512 bytes, 64 entries are one.
    entry = {"C": COMPRESSED | 0x200, "Z": 1, "A": COPIED | 0x200 | 1}
    clusters = {n: entry.get(kind, b"x" * 512) for n, kind in enumerate(kinds) if kind != "U"}
    size = 512 * (len(kinds) - 1) + tail
    path = tmp_path / "disk"
    path.write_bytes(qcow2build.Image(size=size, cluster_bits=9, clusters=clusters).build())

    async def look(image: Image) -> None:
        edges = sorted({min(cut, size) for cut in cuts} | {0, size})
        for start, end in pairwise(edges):
            slow = [ExtentList(start, end - start, limit) for _ in range(2)]
            fast = [ExtentList(start, end - start, limit) for _ in range(2)]
            runs: list[Run] = []
            while (at := start + sum(run.length for run in runs)) < end:
                runs += await image.status(at, end - at)
            for run in runs:
                slow[0].add(run.length, int(not run.data) | int(run.zero) << 1)
                slow[1].add(run.length, run.depth)
            columns = [(fast[0], (3, 3, 0)), (fast[1], (0, 1, 1))]
            reached = await image.fill_status(start, end - start, columns)
            assert reached == end or all(extents.full for extents in fast)
            assert [extents.flat for extents in fast] == [extents.flat for extents in slow]

    engine.use(path, look)


def test_the_short_way_stops_where_it_must(tmp_path: Path) -> None:
    """Before an entry that breaks the rules, and at once if there are layers below."""

    async def reached(image: Image) -> int:
        return await image.fill_status(0, image.size, [(ExtentList(0, image.size, 10), (3, 3, 0))])

    path = make(tmp_path / "broken", {0: DATA, 8192: 1 << 60 | 0x10000}, 8200)
    assert engine.use(path, reached) == 8192 * CLUSTER
    make(tmp_path / "base", {0: DATA}, 8)
    assert engine.use(make(tmp_path / "top", {1: DATA}, 8, "base"), reached) == 0
