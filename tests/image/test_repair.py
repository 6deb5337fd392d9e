"""Repairs: what is left is what qemu-img check agrees with, the content is what it was, and a power failure
in the middle makes nothing worse."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdbm.errors import CorruptError
from nbdbm.image.check import Survey, open_locked, survey
from nbdbm.image.checkreport import CheckReport
from nbdbm.image.repair import rebuild_refcounts, repair
from nbdbm.qcow2.header import Header
from tests.image.checking import Patient, qemu_check
from tests.support.faults import FaultFile, FaultPlan
from tests.support.marks import requires
from tests.support.memfile import MemoryFile
from tests.support.powercut import CrashFile, PowerCutFile, Scratch, Timeline
from tests.support.qcow2build import COPIED, Bitmap, Image, get_field
from tests.support.qemu import SYSTEM, run

DIRTY, CORRUPT = 1, 2


def fix(path: Path, *, errors: bool) -> CheckReport:
    async def mend() -> CheckReport:
        file, header, _ = await open_locked(str(path), writable=True)
        try:
            header, report = await repair(file, header, errors=errors)
            assert Header.parse(await file.pread(0, header.cluster_size)) == header
            return report
        finally:
            file.close()

    return asyncio.run(mend())


def content(path: Path) -> str:
    raw = path.with_suffix(".raw")
    done = run(SYSTEM.argv("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw), check=False)
    assert done.returncode == 0, done.stderr
    return hashlib.sha256(raw.read_bytes()).hexdigest()


# -- against qemu-img -------------------------------------------------------------------------------


def leaks(it: Patient) -> None:
    for cluster in (it.clusters - 1, it.word(it.used()[2]) % 2**56 // it.cluster):
        top = (1 << (1 << it.order)) - 1
        it.refcount(cluster, min(3, top))
    it.drop(it.used()[0])


def too_low(it: Patient) -> None:
    for at in it.used()[:4]:
        it.refcount(it.word(at) % 2**56 // it.cluster, 0)
    it.refcount(it.l2() // it.cluster, 0)


def flags(it: Patient) -> None:
    for at in (it.l1, *it.used()[:3]):
        it.put(at, it.word(at) ^ COPIED)


def shared(it: Patient) -> None:
    """Two entries for one cluster of refcount 1, both COPIED: writing to one would change the other."""
    it.put(it.used()[1], it.word(it.used()[2]))


def no_blocks(it: Patient) -> None:
    it.put(it.reftable, 0)


def block_misaligned(it: Patient) -> None:
    it.put(it.reftable, it.word(it.reftable) + 512)


def block_is_data(it: Patient) -> None:
    it.put(it.used()[1], it.word(it.reftable) | COPIED)


ALL = [leaks, too_low, flags, shared, no_blocks, block_misaligned, block_is_data]
IMAGES = ["v2", "v3", "snapshots", "extl2", "bitmaps", "zlib", "refcount-2", "refcount-8", "refcount-64"]


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("damage", ALL)
def test_all(damage: Callable[[Patient], None], name: str, patient: Callable[[str], Patient]) -> None:
    it = patient(name)
    damage(it)
    path = it.save()
    before = content(path) if damage is not block_misaligned else None
    report = fix(path, errors=True)
    assert report.exit_status == 0, report.problems
    assert report.leaks_fixed + report.corruptions_fixed > 0
    found, status = qemu_check(path)
    assert status == 0, found
    if damage is block_is_data:
        # The block's place is the guest's now, with what the block held.
        return
    assert before in (None, content(path))


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize(
    ("damage", "name"),
    [(d, n) for d in (leaks, no_blocks) for n in ("refcount-1", "cluster-512", "data-file")]
    + [(no_blocks, "zlib-512")],
)
def test_all_narrow(damage: Callable[[Patient], None], name: str, patient: Callable[[str], Patient]) -> None:
    """Refcounts of one bit, and a structure of many small blocks."""
    it = patient(name)
    if damage is no_blocks:
        no_blocks(it)
    elif name == "data-file":
        it.refcount(it.clusters - 1, 3)
    else:
        it.drop(it.used()[0])
    path = it.save()
    before = content(path)
    assert fix(path, errors=True).exit_status == 0
    assert qemu_check(path)[1] == 0
    assert content(path) == before


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("name", IMAGES)
def test_leaks_only(name: str, patient: Callable[[str], Patient]) -> None:
    it = patient(name)
    it.drop(it.used()[0])
    it.put(it.used()[2], it.word(it.used()[2]) ^ COPIED)
    path = it.save()
    before, status = qemu_check(path)
    assert status == 2
    report = fix(path, errors=False)
    found, status = qemu_check(path)
    assert status == 2, "flags are not repaired along with leaks"
    assert report.leaks_fixed == before["leaks"] and "leaks" not in found
    assert report.corruptions == found["corruptions"] == before["corruptions"]


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("name", ["v3", "extl2"])
def test_unaligned_zero_loses_its_place(name: str, patient: Callable[[str], Patient]) -> None:
    """An entry that reads as zeroes needs no cluster; its impossible one goes."""
    it = patient(name)
    at = next(a for a in it.used() if not it.word(a) & 1)
    cluster = it.word(at) & 0xFFFFFFFFFFFE00
    if it.wide == 2:
        it.put(at, cluster + 512 | COPIED)
        it.put(at + 8, 0xFFFFFFFF << 32)
    else:
        it.put(at, cluster + 512 | COPIED | 1)
    path = it.save()
    report = fix(path, errors=True)
    if it.wide == 2:
        # The zeroes are in the bitmap, which stays.
        assert struct.unpack_from(">QQ", path.read_bytes(), at) == (0, 0xFFFFFFFF << 32)
    else:
        assert struct.unpack_from(">Q", path.read_bytes(), at) == (1,)
    assert report.exit_status == 0, report.problems
    assert qemu_check(path)[1] == 0


# -- feature bits -----------------------------------------------------------------------------------


def of(data: bytes | bytearray) -> tuple[MemoryFile, Header]:
    return MemoryFile(bytes(data)), Header.parse(bytes(data))


def walk(file: MemoryFile | CrashFile) -> Survey:
    head = file.read(0, 1 << 16) if isinstance(file, CrashFile) else bytes(file.data)
    return asyncio.run(survey(file, Header.parse(head)))


@pytest.mark.parametrize("errors", [False, True])
def test_bits_cleared_when_sound(errors: bool) -> None:
    file, header = of(Image(incompatible=DIRTY | CORRUPT, clusters={0: b"a"}).build())
    header, report = asyncio.run(repair(file, header, errors=errors))
    assert report.exit_status == 0
    assert header.incompatible_features == get_field(file.data, "incompatible_features") == 0


def test_bits_kept_while_corrupt() -> None:
    data = bytearray(Image(incompatible=DIRTY | CORRUPT, clusters={0: b"a", 1: b"b"}).build())
    l2 = struct.unpack_from(">Q", data, get_field(data, "l1_table_offset"))[0] & ~COPIED
    struct.pack_into(">Q", data, l2 + 8, struct.unpack_from(">Q", data, l2 + 8)[0] + 512)
    file, header = of(data)
    header, report = asyncio.run(repair(file, header, errors=True))
    assert report.exit_status == 2 and header.incompatible_features == DIRTY | CORRUPT
    assert get_field(file.data, "incompatible_features") == DIRTY | CORRUPT
    with pytest.raises(CorruptError, match="not aligned"):
        asyncio.run(rebuild_refcounts(file, header))


def test_sound_image_is_not_written() -> None:
    data = Image(clusters={0: b"a"}, bitmaps=[Bitmap(b"b", b"\x01")]).build()
    file, header = of(data)
    asyncio.run(repair(file, header, errors=True))
    assert not file.log and bytes(file.data) == data


# -- nothing is freed that may be in use --------------------------------------------------------------


@pytest.mark.parametrize("errors", [False, True])
def test_incomplete_walk_frees_nothing(errors: bool) -> None:
    """The L1 entry is damaged: the cluster of its table, and the data, only look leaked."""
    data = bytearray(Image(clusters={0: b"a", 1: b"b"}).build())
    l1 = get_field(data, "l1_table_offset")
    struct.pack_into(">Q", data, l1, struct.unpack_from(">Q", data, l1)[0] + 512)
    file, header = of(data)
    before = walk(file)
    assert before.report.leaks > 0
    _, report = asyncio.run(repair(file, header, errors=errors))
    assert report.exit_status == 2
    after = walk(file)
    for cluster in range(before.clusters):
        assert after.stored[cluster] >= before.stored[cluster]


def test_lost_structure_and_incomplete_walk() -> None:
    """With neither refcounts nor a whole walk there is nothing to rebuild from: left alone."""
    data = bytearray(Image(clusters={0: b"a", 1: b"b"}).build())
    l1, reftable = get_field(data, "l1_table_offset"), get_field(data, "refcount_table_offset")
    for at in (l1, reftable):
        struct.pack_into(">Q", data, at, struct.unpack_from(">Q", data, at)[0] + 512)
    file, header = of(data)
    _, report = asyncio.run(repair(file, header, errors=True))
    assert report.exit_status == 2 and bytes(file.data) == bytes(data)


def test_overlapped_table_is_not_written() -> None:
    """Flags in a table that is also data would change the data; the entry itself is made to copy."""
    data = bytearray(Image(clusters={0: b"a", 1: b"b"}).build())
    l1 = get_field(data, "l1_table_offset")
    l2 = struct.unpack_from(">Q", data, l1)[0] & ~COPIED
    struct.pack_into(">Q", data, l2 + 8, l1 | COPIED)
    file, header = of(data)
    _, report = asyncio.run(repair(file, header, errors=True))
    assert report.exit_status == 2 and "holds the L1 table" in report.problems[0]
    assert struct.unpack_from(">Q", file.data, l2 + 8)[0] == l1, "no longer COPIED: a write goes elsewhere"
    assert file.data[l1 : l1 + 8] == data[l1 : l1 + 8]


# -- lazy refcounts ---------------------------------------------------------------------------------


def past_the_end() -> bytearray:
    """A dirty image after a power failure: the L2 entries got to the disk, the file's new length did not,
    nor did any refcount."""
    data = bytearray(Image(incompatible=DIRTY, compatible=1, size=1 << 22, clusters={0: b"a"}).build())
    l2 = struct.unpack_from(">Q", data, get_field(data, "l1_table_offset"))[0] & ~COPIED
    end = -(-len(data) >> 16)
    for index in range(1, 9):
        struct.pack_into(">Q", data, l2 + 8 * index, (end + index) << 16 | COPIED)
    # The block is gone as well, so that a new one must find a place.
    struct.pack_into(">Q", data, get_field(data, "refcount_table_offset"), 0)
    return data


def test_new_refcounts_stay_off_clusters_in_use() -> None:
    data = past_the_end()
    file, header = of(data)
    header = asyncio.run(rebuild_refcounts(file, header))
    found = walk(file)
    assert found.report.exit_status == 0, found.report.problems
    assert not header.dirty
    l2 = struct.unpack_from(">Q", data, get_field(data, "l1_table_offset"))[0] & ~COPIED
    for index in range(1, 9):
        host = struct.unpack_from(">Q", file.data, l2 + 8 * index)[0] & ~COPIED
        assert host >= len(data), "the entry stays"
        assert not any(file.data[host : host + (1 << 16)]), "and shows nothing but zeroes"


def test_past_the_end_of_a_closed_file_is_damage() -> None:
    """Without the dirty bit the file has lost its end: it is not declared sound, nor made to look so."""
    data = past_the_end()
    struct.pack_into(">Q", data, 72, 0)
    file, header = of(data)
    _, report = asyncio.run(repair(file, header, errors=True))
    assert sum("outside the file" in p for p in report.problems) == 8 and report.exit_status == 2
    assert report.problems[-1].startswith("not repaired: ")
    assert bytes(file.data) == bytes(data)


def test_no_growth_for_a_wild_reference() -> None:
    data = past_the_end()
    l2 = struct.unpack_from(">Q", data, get_field(data, "l1_table_offset"))[0] & ~COPIED
    struct.pack_into(">Q", data, l2 + 8, 1 << 50 | COPIED)
    file, header = of(data)
    with pytest.raises(CorruptError, match="entries refer to the space behind"):
        asyncio.run(rebuild_refcounts(file, header))
    assert file.size < 1 << 30


# -- power failures ---------------------------------------------------------------------------------


WOUNDS = ["rebuild", "in place", "entry"]


def wounded(name: str) -> bytearray:
    """A small image, damaged so that every step of a repair has something to do."""
    data = bytearray(
        Image(
            incompatible=DIRTY | CORRUPT,
            cluster_bits=10,
            size=1 << 16,
            clusters={n: bytes((n + 1,)) * 1024 for n in range(12)},
        ).build()
    )
    reftable, l1 = get_field(data, "refcount_table_offset"), get_field(data, "l1_table_offset")
    block = struct.unpack_from(">Q", data, reftable)[0]
    l2 = struct.unpack_from(">Q", data, l1)[0] & ~COPIED
    if name == "rebuild":
        struct.pack_into(">Q", data, reftable, 0)
    elif name == "entry":
        entry = struct.unpack_from(">Q", data, l2 + 8 * 3)[0]
        struct.pack_into(">Q", data, l2 + 8 * 3, 1 | entry + 512)
    else:
        for index in range(4):
            host = struct.unpack_from(">Q", data, l2 + 8 * index)[0] & ~COPIED
            struct.pack_into(">H", data, block + 2 * (host >> 10), index * 2)
        struct.pack_into(">Q", data, l2 + 8 * 11, 0)
    struct.pack_into(">Q", data, l2 + 8 * 5, struct.unpack_from(">Q", data, l2 + 8 * 5)[0] & ~COPIED)
    return data


def guest_bytes(file: CrashFile) -> list[bytes]:
    """The clusters of the one L2 table, through L1 and L2 as they are."""
    l1 = int.from_bytes(file.read(40, 8), "big")
    l2 = int.from_bytes(file.read(l1, 8)) & ~COPIED
    entries = [int.from_bytes(file.read(l2 + 8 * n, 8)) & ~COPIED for n in range(12)]
    return [file.read(entry, 1024) if entry and not entry & 1 else bytes(1024) for entry in entries]


def unprotected(found: Survey) -> int:
    """Clusters in use that an allocator would give away, by the refcounts in force."""
    return sum(
        1
        for cluster in range(found.clusters)
        if found.counted[cluster] > found.stored[cluster] or not found.known(cluster)
    )


@pytest.mark.parametrize("name", WOUNDS)
def test_power_failure(name: str) -> None:
    data = wounded(name)
    timeline = Timeline()
    file = PowerCutFile(timeline, bytes(data))
    header, report = asyncio.run(repair(file, Header.parse(bytes(data)), errors=True))
    assert report.exit_status == 0 and not header.incompatible_features, report.problems
    assert len(timeline.syncs) == (2 if name == "in place" else 3)
    start = walk(MemoryFile(bytes(data)))
    expected = None
    count = 0
    for state in timeline.states(random=400, seed=1):
        crashed = state.files[0]
        count += 1
        found = walk(crashed)
        assert unprotected(found) <= unprotected(start), state
        here = guest_bytes(crashed)
        expected = expected or here
        assert here == expected, state
        features = int.from_bytes(crashed.read(72, 8))
        assert features == DIRTY | CORRUPT or found.report.exit_status == 0, (state, found.report.problems)
        again, left = asyncio.run(repair(crashed, found.header, errors=True))
        assert left.exit_status == 0 and not again.incompatible_features, (state, left.problems)
    assert count == 400


@pytest.mark.parametrize(
    ("name", "sync"), [("rebuild", 0), ("rebuild", 1), ("entry", 0), ("entry", 1), ("in place", 0)]
)
def test_each_sync_is_needed(name: str, sync: int) -> None:
    """Without it some failure leaves refcounts that are worse than before, or a false word of health."""
    data = wounded(name)
    timeline = Timeline()
    asyncio.run(repair(PowerCutFile(timeline, bytes(data)), Header.parse(bytes(data)), errors=True))
    start = unprotected(walk(MemoryFile(bytes(data))))
    worse = 0
    for state in timeline.states(random=3000, seed=2, dropped=[sync]):
        crashed = state.files[0]
        found = walk(crashed)
        claimed = int.from_bytes(crashed.read(72, 8)) == 0
        worse += unprotected(found) > start or (claimed and found.report.exit_status != 0)
        if worse:
            break
    assert worse


@requires("qemu-img")
def test_power_failure_before_qemu(tmp_path: Path) -> None:
    """QEMU, too, can repair whatever a failure leaves."""
    data = wounded("rebuild")
    timeline = Timeline()
    asyncio.run(repair(PowerCutFile(timeline, bytes(data)), Header.parse(bytes(data)), errors=True))
    scratch = Scratch(tmp_path / "crash.qcow2")
    for state in timeline.states(random=25, seed=3):
        path = scratch.show(state.files[0])
        copy = tmp_path / "copy.qcow2"
        shutil.copyfile(path, copy)
        run(SYSTEM.argv("qemu-img", "check", "-q", "-r", "all", "-f", "qcow2", copy), check=False)
        assert qemu_check(copy)[1] == 0, state


# -- the host refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WOUNDS)
def test_failing_operations(name: str) -> None:
    """Every write and sync in turn fails: the error comes out, and a second attempt succeeds."""
    data = wounded(name)
    start = unprotected(walk(MemoryFile(bytes(data))))
    number = 0
    while True:
        inner = PowerCutFile(Timeline(), bytes(data))
        plan = FaultPlan(nth=number, errno=errno.ENOSPC, seed=number)
        try:
            asyncio.run(repair(FaultFile(inner, plan), Header.parse(bytes(data)), errors=True))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        else:
            break
        after = MemoryFile(bytes(inner.data))
        found = walk(after)
        assert unprotected(found) <= start, plan.failed
        _, report = asyncio.run(repair(after, found.header, errors=True))
        assert report.exit_status == 0, (plan.failed, report.problems)
        number += 1
    assert number >= 5
