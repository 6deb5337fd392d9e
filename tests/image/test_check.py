"""The consistency walk, with qemu-img check as the judge."""

from __future__ import annotations

import asyncio
import errno
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdbm.errors import CorruptError, LockedError, UnsupportedError
from nbdbm.image.check import MAX_HOST_CLUSTERS, Survey, check, open_locked, survey
from nbdbm.qcow2.header import Header
from tests.image.checking import Patient, assert_same, report_of
from tests.support.faults import FaultFile, FaultPlan
from tests.support.images import Gallery
from tests.support.marks import requires
from tests.support.memfile import MemoryFile
from tests.support.powercut import PowerCutFile, Timeline
from tests.support.qcow2build import COPIED, Bitmap, Image, get_field

KIB = 1024


def walk(data: bytes, *, path: str = "memory.qcow2") -> Survey:
    header = Header.parse(data[: Header.peek_cluster_size(data)])
    return asyncio.run(survey(MemoryFile(data, path=path), header))


# -- sound images --------------------------------------------------------------------------------

SOUND = [
    "v2",
    "v2-512",
    "v3",
    "cluster-512",
    "cluster-2097152",
    "zlib",
    "zlib-512",
    "zstd",
    "extl2",
    "extl2-16k",
    *(f"refcount-{bits}" for bits in (1, 2, 4, 8, 32, 64)),
    "prealloc-metadata",
    "prealloc-metadata-extl2",
    "empty",
    "sectors-129",
    "huge",
    "data-file",
    "data-file-raw",
    "data-file-extl2",
    "snapshots",
    "snapshots-v2",
    "load-second-extl2",
    "bitmaps",
    "bitmaps-inconsistent",
    "bitmaps-all-ones",
    "bitmaps-small-clusters",
    "bitmaps-snapshots",
    "unknown-optional",
    "corrupt-bit",
    "dirty-bit",
    "bitmaps-stale",
]


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("name", SOUND)
def test_like_qemu(name: str, gallery: Gallery) -> None:
    report = assert_same(gallery.get(name).path)
    # The first two lost clusters when they were patched; anything else in this list is sound.
    assert report.exit_status == (3 if name in ("bitmaps-stale", "bitmaps-all-ones") else 0)


# -- damage ---------------------------------------------------------------------------------------


ORDERS = [*(f"refcount-{bits}" for bits in (1, 2, 4, 8)), "v3", "refcount-32", "refcount-64", "v2"]


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("name", ORDERS)
def test_wrong_refcounts(name: str, patient: Callable[[str], Patient]) -> None:
    """A leak, a cluster in use that counts as free, and the COPIED flag that contradicts it."""
    it = patient(name)
    top = (1 << (1 << it.order)) - 1
    it.drop(it.used()[0])
    it.refcount(it.word(it.used()[3]) % 2**56 // it.cluster, 0)
    it.refcount(it.word(it.used()[4]) % 2**56 // it.cluster, min(top, 200))
    report = assert_same(it.save())
    assert report.exit_status == 2
    assert report.leaks == (1 if top == 1 else 2)


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("name", ["v3", "extl2", "snapshots", "zlib", "cluster-512", "bitmaps", "data-file"])
def test_wrong_flags(name: str, patient: Callable[[str], Patient]) -> None:
    it = patient(name)
    for at in (it.l1, it.used()[0], it.used()[5]):
        it.put(at, it.word(at) ^ COPIED)
    assert assert_same(it.save()).corruptions == 3


def _reserved(it: Patient) -> None:
    it.put(it.used()[2], it.word(it.used()[2]) | 1 << 57)


def _misaligned(it: Patient) -> None:
    it.put(it.used()[2], it.word(it.used()[2]) + 512)


def _twice(it: Patient) -> None:
    it.put(it.used()[2], it.word(it.used()[3]))


def _l1_reserved(it: Patient) -> None:
    it.put(it.l1, it.word(it.l1) | 1 << 60)


def _no_block(it: Patient) -> None:
    it.put(it.reftable, 0)


def _block_outside(it: Patient) -> None:
    it.put(it.reftable, (it.clusters + 5) * it.cluster)


def _data_is_l2(it: Patient) -> None:
    it.put(it.used()[2], it.l2() | COPIED)


def _data_is_header(it: Patient) -> None:
    # Offset 0 means unallocated: the second cluster is the nearest thing.
    it.put(it.used()[2], it.cluster | COPIED)


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("name", ["v3", "snapshots", "bitmaps"])
@pytest.mark.parametrize(
    "damage",
    [_reserved, _misaligned, _twice, _l1_reserved, _no_block, _block_outside, _data_is_l2, _data_is_header],
)
def test_damage(name: str, damage: Callable[[Patient], None], patient: Callable[[str], Patient]) -> None:
    it = patient(name)
    damage(it)
    assert assert_same(it.save()).exit_status == 2


@requires("qemu-img", "qemu-io")
def test_truncated(patient: Callable[[str], Patient]) -> None:
    it = patient("v3")
    del it.data[-2 * it.cluster :]
    report = assert_same(it.save())
    assert report.corruptions == 2 and "outside the file" in report.problems[0]


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("seed", range(12))
def test_random_refcounts(seed: int, patient: Callable[[str], Patient]) -> None:
    rng = random.Random(seed)
    it = patient(rng.choice(["v3", "extl2", "snapshots", "zlib", "cluster-512", "refcount-4"]))
    top = (1 << (1 << it.order)) - 1
    per_block = it.cluster * 8 >> it.order
    for _ in range(10):
        it.refcount(rng.randrange(min(it.clusters, per_block)), rng.choice([0, 1, 2, min(5, top)]))
    assert_same(it.save())


# -- what qemu-img does not see, or sees differently ------------------------------------------------


def test_overlap_with_matching_refcount() -> None:
    """Data in the L1 table's cluster, counted twice: consistent, and yet a disaster waiting."""
    data = bytearray(Image(clusters={0: b"a", 1: b"b"}).build())
    sound = walk(bytes(data))
    assert not sound.report.exit_status, sound.report.problems
    l1 = get_field(data, "l1_table_offset")
    l2 = struct.unpack_from(">Q", data, l1)[0] & ~COPIED
    lost = struct.unpack_from(">Q", data, l2 + 8)[0] & ~COPIED
    struct.pack_into(">Q", data, l2 + 8, l1)
    block = struct.unpack_from(">Q", data, get_field(data, "refcount_table_offset"))[0]
    struct.pack_into(">H", data, block + 2 * (l1 >> 16), 2)
    struct.pack_into(">H", data, block + 2 * (lost >> 16), 0)
    found = walk(bytes(data))
    assert found.report.corruptions == 1 and found.overlapped == {l1 >> 16}
    assert found.report.problems == [
        f"corrupt: cluster {l1 >> 16} holds the L1 table, but 2 places refer to it"
    ]


def test_unaligned_l2_table_hides_nothing() -> None:
    """What the entry referred to looks leaked, but the walk knows that it is not complete."""
    data = bytearray(Image(clusters={0: b"a"}).build())
    l1 = get_field(data, "l1_table_offset")
    struct.pack_into(">Q", data, l1, struct.unpack_from(">Q", data, l1)[0] + 512)
    found = walk(bytes(data))
    assert found.report.exit_status == 2 and not found.complete
    assert any("is not aligned" in problem for problem in found.report.problems)


@pytest.mark.parametrize("auto", [0, 1])
def test_bitmaps_counted(auto: int) -> None:
    """Also those IN_USE; none if the autoclear bit disowns them."""
    built = Image(
        size=1 << 24,
        cluster_bits=9,
        bitmaps=[Bitmap(b"used", b"\x05" * 512, 9, flags=1), Bitmap(b"kept", b"\x07" * 512, 12)],
        autoclear=auto,
    ).build()
    report = walk(built).report
    assert not report.corruptions
    assert bool(report.leaks) is not bool(auto)


def test_broken_bitmap_directory() -> None:
    data = bytearray(Image(bitmaps=[Bitmap(b"b", b"\x01")], nb_bitmaps=3).build())
    found = walk(bytes(data))
    assert found.report.exit_status == 2 and not found.complete


# -- errors and limits ------------------------------------------------------------------------------


@pytest.mark.parametrize("nth", range(4))
def test_read_error(nth: int) -> None:
    """Whatever cannot be read is named; the rest is checked, and the status says so."""
    data = Image(clusters={0: b"a"}, bitmaps=[Bitmap(b"b", b"\x01")]).build()
    plan = FaultPlan(nth=nth, kinds=("pread",), errno=errno.EIO)
    file = FaultFile(PowerCutFile(Timeline(), data), plan)
    file.try_pread_into = lambda view, offset: False  # type: ignore[method-assign]
    report = asyncio.run(check(file, Header.parse(data)))
    assert plan.failed and report.check_errors == 1 and report.exit_status == 1
    assert any("Input/output error" in problem for problem in report.problems)


def test_too_many_clusters() -> None:
    header = Header.parse(Image(cluster_bits=9).build())
    vast = MemoryFile()
    vast.size = 512 * (MAX_HOST_CLUSTERS + 1)
    with pytest.raises(UnsupportedError, match="can be checked"):
        Survey(vast, header)


def test_progress() -> None:
    data = Image(size=1 << 30, cluster_bits=9, clusters={n * 1000: b"a" for n in range(9)}).build()
    steps: list[tuple[int, int]] = []
    header = Header.parse(data)
    asyncio.run(check(MemoryFile(data), header, progress=lambda done, total: steps.append((done, total))))
    assert steps == sorted(steps) and steps[-1] == (header.l1_size, header.l1_size) and len(steps) == 10


def test_open_locked(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"no image at all" * 100)
    with pytest.raises(CorruptError, match="magic"):
        report_of(path)
    path.write_bytes(Image(header={"version": 9}).build())
    with pytest.raises(UnsupportedError, match="version"):
        report_of(path)
    path.write_bytes(Image().build())

    async def twice() -> None:
        file, _, _ = await open_locked(str(path), writable=True)
        with pytest.raises(LockedError):
            await open_locked(str(path), writable=False)
        other, _, _ = await open_locked(str(path), writable=False, force_share=True)
        other.close()
        file.close()

    asyncio.run(twice())
