"""Growing disks: what shows in the new range, the bitmaps, and failures on the way."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdbm.errors import BitmapError, ImageError, UnsupportedError
from nbdbm.image.blockfile import HostFile, ThreadedFile
from nbdbm.image.check import check
from nbdbm.image.image import Image, OpenOptions
from nbdbm.image.resize import Resized, resize
from tests.support import qcow2build
from tests.support.bitmapjudge import Seen, agreed, assert_clean, seen_in, we_see
from tests.support.engine import read_all, use
from tests.support.faults import FaultFile, FaultPlan
from tests.support.marks import requires
from tests.support.powercut import PowerCutFile, Timeline
from tests.support.qcow2build import Bitmap
from tests.support.qemu import SYSTEM

MIB = 1 << 20
needs_qemu = requires("qemu-img", "qemu-io", "qemu-nbd", "libnbd")


def grow(path: Path, size: int, **options: object) -> Resized:
    return asyncio.run(resize(str(path), size, **options))  # type: ignore[arg-type]


def content(path: Path) -> bytes:
    """The disk as QEMU has it."""
    raw = path.with_suffix(".content")
    SYSTEM.img("convert", "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()


def refused(path: Path, size: int, by: type[Exception], **options: object) -> str:
    before = path.read_bytes()
    with pytest.raises(by) as caught:
        grow(path, size, **options)
    assert path.read_bytes() == before
    return str(caught.value)


# -- every kind of image -----------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """An image to grow, made by qemu-img. Written to: its first bytes, and its last ones."""

    name: str
    options: tuple[str, ...] = ()
    size: int = MIB
    after: int = 5 * MIB
    backing: int = 0
    """Bytes of a backing file full of data."""
    snapshot: bool = False
    compressed: bool = False
    shrunk: bool = False
    """Longer once, and full of data."""
    data_file: bool = False
    bitmaps: bool = True


KINDS = [
    Kind("v3"),
    Kind("a-little", after=MIB + 512),
    Kind("odd-sizes", size=MIB + 512, after=2 * MIB + 1536),
    Kind("longer-l1", ("cluster_size=512",)),
    Kind("much-longer-l1", ("cluster_size=1k",), after=1 << 30),
    Kind("large-clusters", ("cluster_size=2M",), size=5 * MIB, after=100 * MIB),
    Kind("extended-l2", ("extended_l2=on", "cluster_size=16k"), size=MIB + 512, after=64 * MIB),
    Kind("refcounts-1", ("refcount_bits=1", "cluster_size=4k"), after=1 << 30),
    Kind("refcounts-64", ("refcount_bits=64", "cluster_size=512"), after=9 * MIB),
    Kind("lazy-refcounts", ("lazy_refcounts=on",)),
    Kind("v2", ("compat=0.10", "cluster_size=4k"), after=9 * MIB, bitmaps=False),
    Kind("v2-backing", ("compat=0.10",), backing=MIB, bitmaps=False),
    Kind("preallocated", ("preallocation=metadata",)),
    Kind("compressed", compressed=True, size=MIB + 512),
    Kind("snapshot", ("cluster_size=1k",), snapshot=True, size=MIB + 512),
    Kind("short-backing", backing=MIB // 2),
    Kind("long-backing", backing=3 * MIB),
    Kind("longer-backing", backing=9 * MIB),
    Kind("odd-backing", ("cluster_size=4k",), size=MIB + 512, backing=3 * MIB + 1024),
    Kind("small-backing-clusters", ("cluster_size=512",), size=MIB + 512, backing=3 * MIB + 1024),
    Kind("extended-backing", ("extended_l2=on", "cluster_size=16k"), size=MIB + 512, backing=3 * MIB + 512),
    Kind("snapshot-backing", ("cluster_size=1k",), snapshot=True, size=MIB + 512, backing=3 * MIB),
    Kind("shrunk", ("cluster_size=4k",), shrunk=True, size=MIB + 512),
    Kind("shrunk-little-clusters", ("cluster_size=512",), shrunk=True, size=MIB + 512),
    Kind("data-file", data_file=True, size=MIB + 512),
    Kind("data-file-raw", ("data_file_raw=on",), data_file=True, size=MIB + 512),
    Kind("shrunk-data-file-raw", ("data_file_raw=on",), data_file=True, shrunk=True, size=MIB + 512),
]


def make(kind: Kind, place: Path) -> Path:
    """The image; its bitmaps: recording (64 KiB), fine (4 KiB), idle (disabled)."""
    path = place / "disk.qcow2"
    first = 4 * MIB if kind.shrunk else kind.size
    options = [*kind.options, *([f"data_file={place / 'disk.data'}"] if kind.data_file else [])]
    chosen = ["-o", ",".join(options)] if options else []
    if kind.backing:
        (place / "base.raw").write_bytes((b"backing file! " * (kind.backing // 14 + 1))[: kind.backing])
        chosen += ["-b", "base.raw", "-F", "raw"]
    SYSTEM.img("create", "-q", "-f", "qcow2", *chosen, path, first)
    if kind.compressed:
        (place / "full").write_bytes(b"packed" * (kind.size // 6) + bytes(kind.size % 6))
        SYSTEM.img("convert", "-n", "-c", "-f", "raw", "-O", "qcow2", place / "full", path)
    if kind.shrunk:
        SYSTEM.io(path, f"write -P 9 0 {first}")
        SYSTEM.img("resize", "-q", "--shrink", path, kind.size)
    if kind.bitmaps:
        SYSTEM.img("bitmap", "--add", "-g", "64k", path, "recording")
        SYSTEM.img("bitmap", "--add", "-g", "4k", path, "fine")
        SYSTEM.img("bitmap", "--add", path, "idle", "-g", "64k")
    SYSTEM.io(path, "write -P 1 512 1k")
    if kind.bitmaps:
        SYSTEM.img("bitmap", "--disable", path, "idle")
    if not kind.compressed:
        SYSTEM.io(path, f"write -P 2 {kind.size - 512} 512")
    if kind.snapshot:
        SYSTEM.img("snapshot", "-c", "before", path)
        SYSTEM.io(path, "write -P 3 4k 512")
    return path


def merged(*ranges: tuple[int, int]) -> list[tuple[int, int]]:
    """(start, end) of dirty ranges as (offset, length), neighbours merged."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start <= sum(found[-1]):
            found[-1] = (found[-1][0], max(end, sum(found[-1])) - found[-1][0])
        else:
            found.append((start, end - start))
    return found


def grown(bitmap: Seen, before: int, after: int) -> Seen:
    """What is to become of a bitmap."""
    assert bitmap.dirty is not None
    granularity = bitmap.granularity
    ranges = []
    for offset, length in bitmap.dirty:
        # A granule that was cut off by the disk's end is whole now, or cut off later.
        end = offset + length
        ranges.append((offset, min(-(-end // granularity) * granularity, after)))
    if "auto" in bitmap.flags:
        ranges.append((before // granularity * granularity, after))
    return bitmap._replace(dirty=merged(*ranges))


@needs_qemu
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_on_every_kind_of_image(kind: Kind, tmp_path: Path) -> None:
    path = make(kind, tmp_path)
    disk, bitmaps = content(path), we_see(path) if kind.bitmaps else {}
    done = grow(path, kind.after)
    assert (done.before, done.after, done.notices) == (kind.size, kind.after, [])
    assert SYSTEM.img_json("info", path)["virtual-size"] == kind.after
    assert_clean(path)
    if kind.after <= 100 * MIB:
        assert content(path) == disk.ljust(kind.after, b"\0")
        assert use(path, read_all) == disk.ljust(kind.after, b"\0")
    if kind.bitmaps:
        expected = {name: grown(seen, kind.size, kind.after) for name, seen in bitmaps.items()}
        assert agreed(path) == expected
    if kind.snapshot:
        old = use(path, read_all, snapshot="before")
        assert len(old) == kind.size
        assert old == disk[:4096] + content_of_snapshot(path, tmp_path)[4096 : kind.size]
    if "data_file_raw=on" in kind.options:
        assert (tmp_path / "disk.data").read_bytes() == disk.ljust(kind.after, b"\0")
    # It can be used to its very end, by QEMU and by us.
    SYSTEM.io(path, f"write -P 5 {kind.after - 512} 512")
    assert_clean(path)

    async def write(image: Image) -> None:
        await image.write(kind.after - 1024, memoryview(b"6" * 512))

    use(path, write, read_only=False)
    assert_clean(path)
    grow(path, 512, relative=True)
    assert_clean(path)
    assert agreed(path)["fine"].dirty[-1][0] <= kind.size if kind.bitmaps else True  # type: ignore[index]


def content_of_snapshot(path: Path, place: Path) -> bytes:
    raw = place / "snapshot.raw"
    SYSTEM.img("convert", "-l", "snapshot.name=before", "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()


@needs_qemu
def test_a_disk_without_bytes(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    SYSTEM.img("create", "-q", "-f", "qcow2", path, 0)
    grow(path, MIB)
    assert_clean(path)
    assert content(path) == bytes(MIB)


@needs_qemu
def test_machine_state_behind_the_end_never_shows(tmp_path: Path) -> None:
    """Entries of the L1 table behind the disk's end are no part of the larger disk."""
    path = tmp_path / "disk.qcow2"
    # Two tables: the second lies behind the end once the header says a smaller size.
    table = 512 // 8 * 512
    image = qcow2build.Image(size=4 * table, cluster_bits=9, clusters={0: b"a" * 512, 64: b"b" * 512})
    path.write_bytes(image.build())
    qcow2build.patch(path, size=table)
    assert_clean(path)
    grow(path, 3 * table)
    assert_clean(path)
    assert content(path) == b"a" * 512 + bytes(3 * table - 512)


@requires("qemu-img")
def test_on_an_image_whose_refcount_table_has_to_move(tmp_path: Path) -> None:
    """The header of the new disk has the refcount table's new place."""
    path = tmp_path / "disk.qcow2"
    # One cluster of refcount table describes 64 * 64 clusters of 512 bytes.
    clusters: dict[int, bytes | int] = {n: bytes((n % 251 + 1,)) * 512 for n in range(3960)}
    image = qcow2build.Image(size=2 * MIB, cluster_bits=9, refcount_order=6, clusters=clusters)
    path.write_bytes(image.build())
    before = qcow2build.get_field(path.read_bytes(), "refcount_table_offset")
    disk = use(path, read_all)
    grow(path, 16 * MIB)
    assert qcow2build.get_field(path.read_bytes(), "refcount_table_offset") != before
    SYSTEM.img("check", "-q", path)
    assert use(path, lambda image: read_prefix(image, len(disk))) == disk


async def read_prefix(image: Image, length: int) -> bytes:
    buffer = bytearray(length)
    await image.read_into(memoryview(buffer), 0)
    return bytes(buffer)


# -- what is refused ---------------------------------------------------------------------------


def build(path: Path, **fields: object) -> Path:
    path.write_bytes(qcow2build.Image(**fields).build())  # type: ignore[arg-type]
    return path


def test_refusals(tmp_path: Path) -> None:
    disk = build(tmp_path / "disk.qcow2")
    assert "qemu-img resize --shrink" in refused(disk, MIB - 512, UnsupportedError)
    assert "not a multiple of 512" in refused(disk, MIB + 1, ImageError)
    small = build(tmp_path / "small.qcow2", cluster_bits=9)
    assert "at most 137438953472" in refused(small, (128 << 30) + 512, ImageError)
    assert refused(build(tmp_path / "corrupt.qcow2", incompatible=2), 2 * MIB, ImageError)
    assert not grow(disk, MIB).notices
    assert disk.read_bytes() == qcow2build.Image().build()


@pytest.mark.parametrize(
    ("bitmap", "says"),
    [(Bitmap(b"x", flags=1), "inconsistent"), (Bitmap(b"x", type=2), "its type is 2")],
)
def test_bitmaps_that_cannot_be_carried_along(bitmap: Bitmap, says: str, tmp_path: Path) -> None:
    disk = build(tmp_path / "disk.qcow2", bitmaps=[Bitmap(b"good"), bitmap])
    text = refused(disk, 2 * MIB, BitmapError)
    assert "bitmap 'x'" in text and says in text and "remove the bitmap" in text


def test_bitmaps_that_would_be_too_large(tmp_path: Path) -> None:
    disk = build(tmp_path / "disk.qcow2", cluster_bits=21, bitmaps=[Bitmap(b"x", granularity_bits=9)])
    assert "more than 512 MiB" in refused(disk, 1 << 46, BitmapError)
    grow(disk, 1 << 41)
    assert we_see(disk)["x"].dirty == [(MIB, (1 << 41) - MIB)]


def test_a_directory_that_cannot_be_read(tmp_path: Path) -> None:
    disk = build(tmp_path / "disk.qcow2", bitmaps=[Bitmap(b"a")], nb_bitmaps=7)
    assert "remove --inconsistent" in refused(disk, 2 * MIB, ImageError)


@needs_qemu
def test_version_2_has_limits(tmp_path: Path) -> None:
    path = make(Kind("v2", ("compat=0.10",), backing=2 * MIB, bitmaps=False), tmp_path)
    assert "compat=1.1" in refused(path, 3 * MIB, UnsupportedError)
    other = tmp_path / "other.qcow2"
    SYSTEM.img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", other, MIB)
    SYSTEM.img("snapshot", "-c", "before", other)
    # QEMU records their size even there, but calls such an image unfit to be resized.
    assert "snapshots" in refused(other, 2 * MIB, UnsupportedError)


# -- failures ----------------------------------------------------------------------------------

SMALL = (MIB // 4 + 512, MIB)
FAILING = {
    kind.name: kind
    for kind in (
        Kind("plain", ("cluster_size=1k",), *SMALL),
        Kind("backing", ("cluster_size=1k",), *SMALL, backing=MIB // 2 + 512),
        Kind("snapshot", ("cluster_size=1k",), *SMALL, snapshot=True),
        Kind("shrunk", ("cluster_size=1k",), *SMALL, shrunk=True),
        Kind("no-bitmaps", ("cluster_size=1k",), *SMALL, bitmaps=False),
        Kind("data-file-raw", ("data_file_raw=on", "cluster_size=1k"), *SMALL, data_file=True),
    )
}


@dataclass
class Look:
    """One state of the disk."""

    disk: bytes
    bitmaps: dict[str, Seen]


async def look(files: dict[str, HostFile]) -> Look:
    """What there is; asserts that it is sound but for leaks."""
    for file in files.values():
        file.close = lambda: None  # type: ignore[method-assign]

    def open_file(path: str, writable: bool) -> HostFile:
        return files.get(os.path.basename(path)) or ThreadedFile.open(path, writable=writable)

    first = files["disk.qcow2"]
    image = await Image.open(first.path, OpenOptions(), open_file)
    try:
        assert image.header is not None
        report = await check(first, image.header)
        assert not report.corruptions and not report.check_errors, report.problems
        return Look(await read_all(image), await seen_in(image))
    finally:
        await image.close()


class Bench:
    """The files of an image in memory."""

    def __init__(self, kind: Kind, place: Path) -> None:
        self.timeline = Timeline()
        names = ["disk.qcow2", *(["disk.data"] if kind.data_file else [])]
        self.files: dict[str, HostFile] = {}
        for name in names:
            file = PowerCutFile(self.timeline, (place / name).read_bytes(), path=str(place / name))
            file.close = lambda: None  # type: ignore[method-assign]
            self.files[name] = file

    async def resize(self, path: Path, size: int, plan: FaultPlan | None = None) -> None:
        def open_file(path: str, writable: bool) -> HostFile:
            file = self.files.get(os.path.basename(path))
            if file is None:
                return ThreadedFile.open(path, writable=writable)
            return file if plan is None else FaultFile(file, plan)

        await resize(str(path), size, open_file=open_file)


def old_or_new(found: Look, old: Look, new: Look) -> bool:
    """Whether it is the new one; asserts that it is one of both, all of it."""
    assert found in (old, new)
    return found == new


@needs_qemu
@pytest.mark.parametrize("name", FAILING)
def test_power_failures_leave_the_old_disk_or_the_new_one(name: str, tmp_path: Path) -> None:
    kind = FAILING[name]
    path = make(kind, tmp_path)

    async def main() -> None:
        bench = Bench(kind, tmp_path)
        old = await look(bench.files)
        await bench.resize(path, kind.after)
        new = await look(bench.files)
        assert new.disk == old.disk.ljust(kind.after, b"\0")
        assert new.bitmaps == {n: grown(s, kind.size, kind.after) for n, s in old.bitmaps.items()}
        seen = set()
        for state in bench.timeline.states(random=120, seed=11):
            files: dict[str, HostFile] = dict(zip(bench.files, state.files, strict=True))
            seen.add(old_or_new(await look(files), old, new))
        assert seen == {False, True}

    asyncio.run(main())


@needs_qemu
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("name", ["backing", "snapshot", "data-file-raw"])
def test_whatever_fails_it_is_the_old_disk_or_the_new_one(
    name: str, number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    kind = FAILING[name]
    path = make(kind, tmp_path)

    async def attempt(nth: int | None, old: Look, new: Look | None) -> FaultPlan:
        bench = Bench(kind, tmp_path)
        plan = FaultPlan(nth, errno=number)
        try:
            await bench.resize(path, kind.after, plan)
        except (OSError, ImageError) as error:
            assert os.strerror(number) in str(error)
        if new is not None:
            old_or_new(await look(bench.files), old, new)
        return plan

    async def main() -> None:
        bench = Bench(kind, tmp_path)
        old = await look(bench.files)
        await bench.resize(path, kind.after)
        new = await look(bench.files)
        total = (await attempt(None, old, new)).seen
        assert total > 10
        for nth in sorted({*range(0, total, max(1, total // 40)), *range(total - 12, total)}):
            assert (await attempt(nth, old, new)).failed

    asyncio.run(main())
