"""New images, with qemu-img's as the pattern."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from nbdbm.errors import ImageError, LockedError, UsageError
from nbdbm.image.check import check
from nbdbm.image.create import CreateOptions, create, create_on
from nbdbm.qcow2.header import Header
from tests.image.checking import assert_same
from tests.support.faults import FaultFile, FaultPlan
from tests.support.marks import requires
from tests.support.memfile import MemoryFile
from tests.support.powercut import CrashFile, PowerCutFile, Timeline
from tests.support.qcow2build import Image
from tests.support.qemu import SYSTEM

MIB = 1 << 20
TIB = 1 << 40

QEMU_NAMES = {"version": "compat", "size": None}
QEMU_VALUES = {True: "on", False: "off", 2: "0.10", 3: "1.1"}


def make(path: Path, **options: Any) -> None:
    asyncio.run(create(str(path), CreateOptions(**options)))


def info(path: Path) -> dict[str, Any]:
    """What the image is, without what may differ between two of them."""
    found: dict[str, Any] = SYSTEM.img_json("info", "-f", "qcow2", path)
    for key in ("filename", "actual-size", "children"):
        found.pop(key, None)
    return found


def mapped(path: Path) -> list[tuple[bool, bool, int, int]]:
    """What is allocated, whatever the host has to say about holes."""
    found: list[list[Any]] = []
    for extent in SYSTEM.img_json("map", "-f", "qcow2", path):
        kind = [extent["present"], extent["data"], extent["depth"]]
        if found and found[-1][:3] == kind:
            found[-1][3] += extent["length"]
        else:
            found.append([*kind, extent["length"]])
    return [tuple(extent) for extent in found]


CASES: list[dict[str, Any]] = [
    *({"cluster_size": 1 << bits, "size": 100 * MIB} for bits in range(9, 22)),
    *(
        {"cluster_size": 1 << bits, "size": 3 * MIB + 512, "preallocation": "metadata"}
        for bits in (9, 12, 16, 21)
    ),
    *(
        {"refcount_bits": bits, "size": 64 * MIB, "preallocation": "metadata"}
        for bits in (1, 2, 4, 8, 32, 64)
    ),
    *(
        {"refcount_bits": bits, "size": 4 * MIB, "preallocation": "metadata", "cluster_size": 512}
        for bits in (1, 64)
    ),
    *({"size": size} for size in (0, 1, 512, 1000, TIB, 64 * TIB)),
    {"size": 16 << 30, "cluster_size": 512},
    {"size": 0, "version": 2},
    {"size": 64 * TIB, "version": 2},
    {"size": 10 * MIB, "version": 2, "preallocation": "metadata"},
    {"size": 1 << 30, "extended_l2": True},
    {"size": 32 * MIB, "extended_l2": True, "preallocation": "metadata", "cluster_size": 16384},
    {"size": 10 * MIB, "lazy_refcounts": True},
    {"size": 10 * MIB, "compression_type": "zstd"},
]


@requires("qemu-img")
@pytest.mark.parametrize("options", CASES, ids=lambda case: ",".join(f"{k}={v}" for k, v in case.items()))
def test_like_qemu(options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    make(ours, **options)
    assert assert_same(ours).exit_status == 0
    words = [
        f"{QEMU_NAMES.get(key, key)}={QEMU_VALUES.get(value, value) if key != 'refcount_bits' else value}"
        for key, value in options.items()
        if key != "size"
    ]
    given = ["-o", ",".join(words)] if words else []
    SYSTEM.img("create", "-q", "-f", "qcow2", *given, theirs, options["size"])
    assert info(ours) == info(theirs)
    if options["size"] <= 64 * TIB:
        assert mapped(ours) == mapped(theirs)
    heads = [Header.parse(path.read_bytes()[: 1 << 21].ljust(1 << 21, b"\0")) for path in (ours, theirs)]
    assert heads[0].extensions == heads[1].extensions
    assert heads[0].header_length == heads[1].header_length


@requires("qemu-img")
@pytest.mark.parametrize("how", [{}, {"data_file_raw": True}, {"preallocation": "metadata"}])
def test_data_file(how: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "disk.raw"
    found = []
    for name in ("ours", "theirs"):
        path = tmp_path / f"{name}.qcow2"
        if name == "ours":
            make(path, size=10 * MIB, data_file=str(data), **how)
            assert assert_same(path).exit_status == 0
        else:
            words = [f"{key}={QEMU_VALUES.get(value, value)}" for key, value in how.items()]
            SYSTEM.img(
                "create", "-q", "-f", "qcow2", "-o", ",".join([f"data_file={data}", *words]), path, 10 * MIB
            )
        assert data.stat().st_size == 10 * MIB
        found.append((info(path), mapped(path)))
        data.unlink()
    assert found[0] == found[1]


def test_data_file_name_is_relative_to_the_image(tmp_path: Path) -> None:
    make(tmp_path / "a.qcow2", size=MIB, data_file="a.raw", data_file_raw=True)
    assert (tmp_path / "a.raw").stat().st_size == MIB
    assert Header.parse((tmp_path / "a.qcow2").read_bytes()).data_file == "a.raw"


@requires("qemu-img")
@pytest.mark.parametrize("version", [2, 3])
def test_backing(version: int, tmp_path: Path) -> None:
    """The size is the backing file's, rounded up to whole sectors; the name is recorded as given."""
    (tmp_path / "base.raw").write_bytes(b"x" * (MIB + 100))
    path = tmp_path / "over.qcow2"
    make(path, backing_file="base.raw", backing_format="raw", version=version)
    found = info(path)
    assert found["virtual-size"] == MIB + 512
    assert found["backing-filename"] == "base.raw" and found["backing-filename-format"] == "raw"
    assert assert_same(path).exit_status == 0
    make(tmp_path / "top.qcow2", backing_file="over.qcow2", backing_format="qcow2", size=3 * MIB)
    SYSTEM.img("convert", "-f", "qcow2", "-O", "raw", tmp_path / "top.qcow2", tmp_path / "top.raw")
    assert (tmp_path / "top.raw").read_bytes() == (b"x" * (MIB + 100)).ljust(3 * MIB, b"\0")


@requires("qemu-img")
def test_preallocated_over_backing(tmp_path: Path) -> None:
    """With subclusters the backing file shows through a preallocated image."""
    (tmp_path / "base.raw").write_bytes(b"x" * MIB)
    path = tmp_path / "over.qcow2"
    make(path, backing_file="base.raw", backing_format="raw", extended_l2=True, preallocation="metadata")
    assert assert_same(path).exit_status == 0
    SYSTEM.img("convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == b"x" * MIB


def test_backing_checked(tmp_path: Path) -> None:
    path = tmp_path / "over.qcow2"
    with pytest.raises(ImageError, match="cannot be opened"):
        make(path, size=MIB, backing_file="absent.raw", backing_format="raw")
    assert not path.exists()
    make(path, size=MIB, backing_file="absent.raw", backing_format="raw", check_backing=False)
    with pytest.raises(ImageError, match="its own backing"):
        make(path, size=MIB, backing_file="over.qcow2", backing_format="raw", force=True)
    (tmp_path / "link.qcow2").hardlink_to(path)
    with pytest.raises(ImageError, match="its own backing"):
        make(path, size=MIB, backing_file="link.qcow2", backing_format="raw", force=True)
    with pytest.raises(ImageError, match="its own data file"):
        make(tmp_path / "self.qcow2", size=MIB, data_file="self.qcow2")


# -- refusals ---------------------------------------------------------------------------------------

REFUSED = {
    "no_size": ({"size": None}, "size is missing"),
    "negative": ({"size": -1}, "negative"),
    "beyond_2_63": ({"size": 1 << 63, "cluster_size": 2 * MIB}, "2\\^63"),
    "l1_too_large": ({"size": (128 << 30) + 512, "cluster_size": 512}, "take larger ones"),
    "l1_too_large_64k": ({"size": (2 << 50) + 512}, "take larger ones"),
    "l1_too_large_extended": ({"size": (1 << 50) + 512, "extended_l2": True}, "take larger ones"),
    "cluster_256": ({"cluster_size": 256}, "power of two"),
    "cluster_4m": ({"cluster_size": 4 * MIB}, "power of two"),
    "cluster_odd": ({"cluster_size": 65537}, "power of two"),
    "cluster_zero": ({"cluster_size": 0}, "power of two"),
    "refcount_3": ({"refcount_bits": 3}, "refcount bits 3"),
    "refcount_128": ({"refcount_bits": 128}, "refcount bits 128"),
    "version_4": ({"version": 4}, "version 4"),
    "v2_refcount": ({"version": 2, "refcount_bits": 8}, "16 refcount bits only"),
    "v2_lazy": ({"version": 2, "lazy_refcounts": True}, "need compat 1.1"),
    "v2_extended": ({"version": 2, "extended_l2": True}, "need compat 1.1"),
    "v2_zstd": ({"version": 2, "compression_type": "zstd"}, "zlib only"),
    "v2_data_file": ({"version": 2, "data_file": "d"}, "needs compat 1.1"),
    "extended_small": ({"extended_l2": True, "cluster_size": 8192}, "at least 16K"),
    "lz4": ({"compression_type": "lz4"}, "zlib or zstd"),
    "full": ({"preallocation": "full"}, "off or metadata"),
    "backing_without_format": ({"backing_file": "b"}, "needs its format"),
    "format_without_backing": ({"backing_format": "raw"}, "needs a backing file"),
    "backing_vmdk": ({"backing_file": "b", "backing_format": "vmdk"}, "one of qcow2, raw"),
    "backing_empty": ({"backing_file": "", "backing_format": "raw"}, "empty"),
    "backing_long": ({"backing_file": "b" * 1024, "backing_format": "raw"}, "longer than 1023"),
    "backing_nul": ({"backing_file": "a\0b", "backing_format": "raw"}, "NUL"),
    "backing_preallocated": (
        {"backing_file": "b", "backing_format": "raw", "preallocation": "metadata"},
        "hide the backing file",
    ),
    "raw_without_data_file": ({"data_file_raw": True}, "needs a data file"),
    "raw_with_backing": (
        {"data_file": "d", "data_file_raw": True, "backing_file": "b", "backing_format": "raw"},
        "excludes a backing",
    ),
    "data_file_empty": ({"data_file": ""}, "empty"),
    "data_file_long": ({"data_file": "d" * 1024}, "longer than 1023"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    options, why = REFUSED[case]
    with pytest.raises(UsageError, match=why):
        CreateOptions(**({"size": MIB} | options))


@pytest.mark.parametrize(
    "options",
    [
        {"size": 128 << 30, "cluster_size": 512},
        {"size": 2 << 50},
        {"size": 1 << 50, "extended_l2": True},
        {"size": 2 << 60, "cluster_size": 2 * MIB},
    ],
)
def test_largest(options: dict[str, Any]) -> None:
    """QEMU's limits exactly: one sector more is refused above."""
    assert CreateOptions(**options).size == options["size"]


def test_preallocated_refcount_table_too_large() -> None:
    options = CreateOptions(size=128 << 30, cluster_size=512, refcount_bits=64, preallocation="metadata")
    file = MemoryFile()
    with pytest.raises(UsageError, match="refcount table of more than 8 MiB"):
        asyncio.run(create_on(file, options))
    assert not file.log


def test_name_too_long_for_the_cluster(tmp_path: Path) -> None:
    """Cluster and name are fine, but not together; nothing is left behind."""
    path = tmp_path / "a.qcow2"
    with pytest.raises(Exception, match="length of header"):
        make(
            path,
            size=MIB,
            cluster_size=512,
            backing_file="b" * 500,
            backing_format="raw",
            check_backing=False,
        )
    assert not list(tmp_path.iterdir())


# -- what is there already ----------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "precious.qcow2"
    path.write_bytes(b"precious")
    with pytest.raises(ImageError, match="--force"):
        make(path, size=MIB)
    assert path.read_bytes() == b"precious"
    data = tmp_path / "precious.raw"
    data.write_bytes(b"precious")
    with pytest.raises(ImageError, match="--force"):
        make(tmp_path / "new.qcow2", size=MIB, data_file="precious.raw")
    assert data.read_bytes() == b"precious"
    with pytest.raises(ImageError, match="neither"):
        make(tmp_path, size=MIB, force=True)
    with pytest.raises(ImageError, match="cannot be created"):
        make(tmp_path / "absent" / "a.qcow2", size=MIB)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precious.qcow2", "precious.raw"]


def test_existing_image_stops_before_the_data_file(tmp_path: Path) -> None:
    (tmp_path / "a.qcow2").write_bytes(b"precious")
    with pytest.raises(ImageError, match="--force"):
        make(tmp_path / "a.qcow2", size=MIB, data_file="a.raw")
    assert not (tmp_path / "a.raw").exists()


def test_force(tmp_path: Path) -> None:
    """Replaced as a whole, behind a link too, with the old file's permissions."""
    path, link = tmp_path / "a.qcow2", tmp_path / "link"
    path.write_bytes(b"old" * 1000000)
    path.chmod(0o640)
    link.symlink_to(path)
    make(link, size=MIB, force=True)
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert Header.parse(path.read_bytes()).size == MIB
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.qcow2", "link"]


def test_empty_file_is_filled(tmp_path: Path) -> None:
    """As mktemp leaves it."""
    path = tmp_path / "a.qcow2"
    path.touch()
    make(path, size=MIB)
    assert Header.parse(path.read_bytes()).size == MIB


def test_permissions_follow_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make(tmp_path / "a.qcow2", size=MIB)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.qcow2").stat().st_mode) == 0o640


def test_in_use(tmp_path: Path) -> None:
    from nbdbm.image.blockfile import ThreadedFile

    path = tmp_path / "a.qcow2"
    make(path, size=MIB)
    before = path.read_bytes()
    user = ThreadedFile.open(str(path))
    try:
        user.lock(writable=False, force_share=False)
        with pytest.raises(LockedError):
            make(path, size=2 * MIB, force=True)
    finally:
        user.close()
    assert path.read_bytes() == before


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbdbm.image import create as module

    async def fail(file: object, options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "create_on", fail)
    with pytest.raises(OSError, match="No space"):
        make(tmp_path / "a.qcow2", size=MIB, data_file="a.raw")
    assert not list(tmp_path.iterdir())


# -- in place: devices, and power failures --------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"size": MIB},
        {"size": MIB, "cluster_size": 512, "preallocation": "metadata"},
        {"size": 0, "cluster_size": 512},
    ],
)
def test_over_old_content(options: dict[str, Any]) -> None:
    """Nothing of what a device held shows in the new image."""
    file = MemoryFile(b"\xab" * (8 * MIB))
    header = asyncio.run(create_on(file, CreateOptions(**options)))
    report = asyncio.run(check(file, header))
    assert report.exit_status == 0, report.problems
    assert b"\xab" not in file.data[: report.image_end_offset]


@pytest.mark.parametrize("old", [b"", Image(size=MIB, clusters={0: b"old"}, cluster_bits=9).build()])
def test_power_failure(old: bytes) -> None:
    """At every moment: the old image, no image, or the new one complete."""
    options = CreateOptions(size=64 * 1024, cluster_size=1024, preallocation="metadata")
    timeline = Timeline()
    asyncio.run(create_on(PowerCutFile(timeline, old), options))
    seen = set()
    for state in timeline.states(random=600, seed=1):
        seen.add(_judge(state.files[0], old))
    assert seen == ({"none", "new"} if not old else {"old", "none", "new"})


@pytest.mark.parametrize("sync", [0, 1])
def test_each_sync_is_needed(sync: int) -> None:
    old = Image(size=MIB, clusters={0: b"old"}, cluster_bits=9).build()
    options = CreateOptions(size=64 * 1024, cluster_size=1024, preallocation="metadata")
    timeline = Timeline()
    asyncio.run(create_on(PowerCutFile(timeline, old), options))
    with pytest.raises(AssertionError, match="torn"):
        for state in timeline.states(random=3000, seed=1, dropped=[sync]):
            _judge(state.files[0], old)


def _judge(file: CrashFile, old: bytes) -> str:
    if old and file.read(0, len(old)) == old:
        return "old"
    if file.read(0, 4) != b"QFI\xfb":
        return "none"
    cluster = Header.peek_cluster_size(file.read(0, 512))
    header = Header.parse(file.read(0, cluster))
    assert header.size == 64 * 1024, "torn: the old image, damaged"
    report = asyncio.run(check(file, header))
    assert report.exit_status == 0, ("torn", report.problems)
    return "new"


def test_the_tables_have_their_space(tmp_path: Path) -> None:
    """On a host that becomes full, what goes into them can be flushed."""
    path = tmp_path / "disk.qcow2"
    make(path, size=1 << 50)
    with path.open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == path.stat().st_size


def test_failing_operations() -> None:
    options = CreateOptions(size=64 * 1024, cluster_size=512, preallocation="metadata")
    number = 0
    while True:
        inner = PowerCutFile(Timeline(), b"\xab" * (1 << 18))
        plan = FaultPlan(nth=number, errno=errno.EIO, short=False)
        try:
            asyncio.run(create_on(FaultFile(inner, plan), options))
        except OSError:
            assert plan.failed
        else:
            break
        number += 1
    assert number > 6
