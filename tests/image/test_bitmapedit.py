"""Bitmaps changed offline: as QEMU does it, all or nothing, and whatever fails in between."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdbm.errors import BitmapError, ImageError, LockedError, UnsupportedError
from nbdbm.image.bitmapedit import (
    Add,
    BitmapEditor,
    Clear,
    Disable,
    Edited,
    Enable,
    Merge,
    Operation,
    Remove,
    RemoveInconsistent,
    Rename,
    edit_bitmaps,
)
from tests.support import qcow2build
from tests.support.bitmapjudge import (
    Seen,
    after_failure,
    agreed,
    assert_clean,
    qemu_list,
    qemu_sees,
    sound,
    we_see,
)
from tests.support.faults import FaultFile, FaultPlan
from tests.support.marks import requires
from tests.support.powercut import PowerCutFile, Timeline
from tests.support.qcow2build import Bitmap, patch, patch_bitmap_flags
from tests.support.qemu import SYSTEM

MIB = 1 << 20
SIZE = 8 * MIB
needs_qemu = requires("qemu-img", "qemu-io", "qemu-nbd", "libnbd")


def edit(path: Path, *operations: Operation) -> Edited:
    return asyncio.run(edit_bitmaps(str(path), operations))


def refused(path: Path, *operations: Operation, by: type[Exception] = BitmapError) -> str:
    """What the refusal says; not a byte of the file has changed."""
    before = path.read_bytes()
    with pytest.raises(by) as caught:
        edit(path, *operations)
    assert path.read_bytes() == before
    return str(caught.value)


def make(path: Path, *options: str, size: int = SIZE) -> Path:
    """An image with data, and the bitmaps monday (enabled, dirty), idle (disabled, dirty), torn
    (inconsistent), fine (enabled, small granules)."""
    chosen = ["-o", ",".join(options)] if options else []
    SYSTEM.img("create", "-q", "-f", "qcow2", *chosen, path, size)
    for name, granularity in (("monday", 65536), ("torn", 65536), ("fine", 4096), ("idle", 32768)):
        SYSTEM.img("bitmap", "--add", "-g", granularity, path, name)
    SYSTEM.io(path, "write -P 1 100k 300k", "write -P 2 5M 4k", f"write -P 3 {size - 512} 512")
    SYSTEM.img("bitmap", "--disable", path, "idle")
    SYSTEM.io(path, "write -P 4 3M 64k")
    SYSTEM.img("bitmap", "--clear", path, "fine")
    SYSTEM.io(path, "write -P 5 6M 20k")
    patch_bitmap_flags(path, "torn", set=1)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("edit") / "disk.qcow2", "cluster_size=4096")


@pytest.fixture
def disk(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original, tmp_path / "disk.qcow2"))


def entry_bytes(path: Path, name: str) -> bytes:
    data = path.read_bytes()
    at = qcow2build.bitmap_entries(data)[name.encode()]
    return data[at : at + 24 + len(name)]


# -- the same as QEMU --------------------------------------------------------------------------

TWINS: dict[str, tuple[list[Operation], list[str], str]] = {
    "add": ([Add("new")], ["--add"], "new"),
    "add-fine": ([Add("new", 512)], ["--add", "-g", "512"], "new"),
    "add-coarse": ([Add("new", 1 << 21)], ["--add", "-g", "2M"], "new"),
    "add-disabled": ([Add("new", None, False)], ["--add", "--disable"], "new"),
    "add-unicode": ([Add("früh: 'x' 1")], ["--add"], "früh: 'x' 1"),
    "remove": ([Remove("monday")], ["--remove"], "monday"),
    "remove-inconsistent": ([Remove("torn")], ["--remove"], "torn"),
    "clear": ([Clear("monday")], ["--clear"], "monday"),
    "clear-disabled": ([Clear("idle")], ["--clear"], "idle"),
    "enable": ([Enable("idle")], ["--enable"], "idle"),
    "enable-enabled": ([Enable("monday")], ["--enable"], "monday"),
    "disable": ([Disable("monday")], ["--disable"], "monday"),
    "merge-same": ([Merge("monday", "monday")], ["--merge", "monday"], "monday"),
    "merge-into-coarser": ([Merge("monday", "fine")], ["--merge", "fine"], "monday"),
    "merge-into-finer": ([Merge("fine", "monday")], ["--merge", "monday"], "fine"),
    "merge-into-disabled": ([Merge("idle", "monday")], ["--merge", "monday"], "idle"),
    "several": (
        [Add("all"), Merge("all", "monday"), Merge("all", "idle"), Disable("all")],
        ["--add", "--merge", "monday", "--merge", "idle", "--disable"],
        "all",
    ),
}


@needs_qemu
@pytest.mark.parametrize("case", TWINS)
def test_as_qemu_img_does_it(case: str, disk: Path) -> None:
    operations, words, name = TWINS[case]
    theirs = Path(shutil.copy(disk, disk.with_name("theirs.qcow2")))
    torn = entry_bytes(disk, "torn") if name != "torn" else b""
    before = we_see(disk)
    done = edit(disk, *operations)
    SYSTEM.img("bitmap", *words, "-f", "qcow2", theirs, name)
    assert agreed(disk) == qemu_sees(theirs)
    assert done.changed is (we_see(disk) != before)
    if torn:
        assert entry_bytes(disk, "torn") == torn
    # And on from here with QEMU: what we wrote is what it can change.
    SYSTEM.io(disk, "write 2M 1k")
    assert all("in-use" not in seen.flags or n == "torn" for n, seen in agreed(disk).items())


@needs_qemu
def test_rename(disk: Path) -> None:
    before = agreed(disk)
    assert edit(disk, Rename("monday", "lundi"), Rename("idle", "monday")).changed
    names = {"monday": "lundi", "idle": "monday"}
    assert agreed(disk) == {names.get(name, name): seen for name, seen in before.items()}


@needs_qemu
def test_what_nobody_names_stays_where_it_is(disk: Path) -> None:
    kept = {name: entry_bytes(disk, name) for name in ("torn", "fine", "idle")}
    edit(disk, Clear("monday"), Add("x"))
    assert {name: entry_bytes(disk, name) for name in kept} == kept


@needs_qemu
@pytest.mark.parametrize(
    "options",
    [
        ("cluster_size=512",),
        ("cluster_size=2M",),
        ("refcount_bits=1",),
        ("extended_l2=on",),
        ("lazy_refcounts=on",),
        ("cluster_size=1k", "refcount_bits=64"),
    ],
    ids=str,
)
def test_on_every_kind_of_image(options: tuple[str, ...], tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.qcow2", *options)
    before = agreed(disk)
    edit(disk, Add("new", 512), Merge("new", "monday"), Clear("fine"), Remove("torn"))
    after = agreed(disk)
    assert after["new"] == Seen(512, ("auto",), before["monday"].dirty)
    assert after["fine"].dirty == [] and "torn" not in after and after["idle"] == before["idle"]


@needs_qemu
def test_the_first_and_the_last_bitmap(tmp_path: Path) -> None:
    base, disk = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    SYSTEM.img("create", "-q", "-f", "qcow2", base, SIZE)
    SYSTEM.img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", disk)
    for _ in range(3):
        edit(disk, Add("only"))
        assert list(agreed(disk)) == ["only"]
        edit(disk, Remove("only"))
        assert agreed(disk) == {}
        data = disk.read_bytes()
        assert qcow2build.get_field(data, "autoclear_features") == 0
        assert qcow2build.EXT_BITMAPS not in [type_ for type_, _, _ in qcow2build.extensions(data)]
    info = SYSTEM.img_json("info", disk)
    assert (info["backing-filename"], info["backing-filename-format"]) == (str(base), "qcow2")


@needs_qemu
def test_an_overlay_does_not_need_its_backing_file(tmp_path: Path) -> None:
    base, disk = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    SYSTEM.img("create", "-q", "-f", "qcow2", base, SIZE)
    SYSTEM.img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", disk)
    base.rename(tmp_path / "elsewhere")
    edit(disk, Add("new"))
    assert list(we_see(disk)) == ["new"]
    assert list(qemu_list(disk)) == ["new"]


@needs_qemu
def test_the_default_granularity(tmp_path: Path) -> None:
    for cluster_size, expected in (
        (512, 4096),
        (4096, 4096),
        (16384, 16384),
        (65536, 65536),
        (2 * MIB, 65536),
    ):
        disk = tmp_path / f"{cluster_size}.qcow2"
        SYSTEM.img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", disk, SIZE)
        SYSTEM.img("bitmap", "--add", disk, "theirs")
        edit(disk, Add("ours"))
        assert {seen.granularity for seen in agreed(disk).values()} == {expected}


# -- all or nothing, and what is refused -------------------------------------------------------


@requires("qemu-img", "qemu-io")
def test_one_that_cannot_be_done_stops_all(disk: Path) -> None:
    assert "no such bitmap" in refused(disk, Add("x"), Clear("monday"), Remove("nothing"))


@requires("qemu-img", "qemu-io")
def test_nothing_to_do_writes_nothing(disk: Path) -> None:
    before = disk.read_bytes()
    for operations in ([], [Enable("monday")], [Add("x"), Remove("x")], [Disable("fine"), Enable("fine")]):
        assert not edit(disk, *operations).changed
        assert disk.read_bytes() == before


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize(
    "operation",
    [
        Clear("torn"),
        Enable("torn"),
        Disable("torn"),
        Rename("torn", "x"),
        Merge("torn", "monday"),
        Merge("monday", "torn"),
    ],
    ids=lambda op: type(op).__name__,
)
def test_an_inconsistent_bitmap_can_only_be_removed(operation: Operation, disk: Path) -> None:
    says = refused(disk, operation)
    assert "bitmap 'torn'" in says and "inconsistent" in says and "remove" in says


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize(
    ("operation", "says"),
    [
        (Add("monday"), "of this name already"),
        (Add("torn"), "of this name already"),
        (Add(""), "0 bytes long"),
        (Add("x" * 1024), "1024 bytes long"),
        (Add("ü" * 512), "1024 bytes long"),
        (Add("a\0b"), "NUL"),
        (Add("a\udcffb"), "not UTF-8"),
        (Add("x", 256), "granularity is 256"),
        (Add("x", 1 << 32), "granularity is 4294967296"),
        (Add("x", 3 << 20), "granularity is 3145728"),
        (Rename("monday", "idle"), "of this name already"),
        (Rename("monday", "x" * 1024), "1024 bytes long"),
        (Rename("none", "x"), "no such bitmap"),
        (Clear("none"), "no such bitmap"),
        (Merge("monday", "none"), "no such bitmap"),
        (Merge("none", "monday"), "no such bitmap"),
        (Remove("none"), "no such bitmap"),
    ],
)
def test_refusals(operation: Operation, says: str, disk: Path) -> None:
    assert says in refused(disk, operation)


def build(path: Path, **fields: object) -> Path:
    path.write_bytes(qcow2build.Image(**fields).build())  # type: ignore[arg-type]
    return path


def test_limits(tmp_path: Path) -> None:
    assert len(we_see_after(build(tmp_path / "long.qcow2"), Add("ü" * 511 + "x"))) == 1
    large = build(tmp_path / "large.qcow2", size=1 << 46, cluster_bits=21)
    says = refused(large, Add("x", 512))
    assert "512 MiB" in says and "with 16384 they do not" in says
    assert we_see_after(large, Add("x", 16384)) == {"x": Seen(16384, ("auto",), [])}
    empty = build(tmp_path / "empty.qcow2", size=0)
    assert "no bytes" in refused(empty, Add("x"))


def we_see_after(path: Path, *operations: Operation) -> dict[str, Seen]:
    assert edit(path, *operations).changed
    return we_see(path)


def test_no_more_bitmaps_than_the_format_has(tmp_path: Path) -> None:
    # In use: nobody looks at what they say beyond their names.
    many = [Bitmap(b"%d" % n, flags=1, table=[], table_offset=65536, table_size=1) for n in range(65535)]
    disk = build(tmp_path / "many.qcow2", bitmaps=many)
    assert "65535 bitmaps already" in refused(disk, Add("x"))
    assert "65534" in we_see_after(disk, Remove("0"), Add("x"))


def test_a_directory_that_would_be_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdbm.image.bitmapedit.MAX_BITMAP_DIRECTORY", 100)
    disk = build(tmp_path / "disk.qcow2", bitmaps=[Bitmap(b"a" * 40)])
    assert "directory would take 128 bytes" in refused(disk, Add("b" * 40), by=ImageError)


def test_images_that_cannot_have_bitmaps(tmp_path: Path) -> None:
    old = build(tmp_path / "old.qcow2", version=2)
    assert "qemu-img amend -f qcow2 -o compat=1.1" in refused(old, Add("x"), by=UnsupportedError)
    corrupt = build(tmp_path / "corrupt.qcow2", incompatible=2)
    assert "corrupt bit" in refused(corrupt, Add("x"), by=ImageError)
    other = tmp_path / "text"
    other.write_bytes(b"hello")
    assert "too short for a qcow2 header" in refused(other, Add("x"), by=ImageError)

    async def as_raw() -> None:
        await BitmapEditor.open(str(other), format="raw")

    with pytest.raises(UnsupportedError, match="raw image"):
        asyncio.run(as_raw())


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("mode", ["-f", "-r"])
def test_an_image_that_somebody_holds(mode: str, disk: Path) -> None:
    words = ["qemu-io", "-f", "qcow2", *(["-r"] if mode == "-r" else []), disk]
    held = subprocess.Popen(SYSTEM.argv(*words), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert held.stdin is not None and held.stdout is not None
    try:
        held.stdin.write(b"read 0 512\n")
        held.stdin.flush()
        assert b"read" in held.stdout.readline()
        assert f"process {held.pid}" in refused(disk, Add("x"), by=LockedError)
    finally:
        held.communicate(b"quit\n", timeout=20)
    edit(disk, Add("x"))


# -- what other programs left ------------------------------------------------------------------


@needs_qemu
def test_a_stale_extension_is_not_trusted(disk: Path) -> None:
    patch(disk, autoclear_features=0)
    done = edit(disk, Add("fresh"))
    assert any("stale" in notice for notice in done.notices)
    assert list(qemu_list(disk)) == ["fresh"] == list(we_see(disk))
    # The old bitmaps' clusters are leaked, as QEMU leaks them.
    SYSTEM.img("check", "-q", "-r", "leaks", disk)
    assert list(agreed(disk)) == ["fresh"]


@needs_qemu
def test_unknown_features_and_extensions(tmp_path: Path) -> None:
    disk = build(tmp_path / "disk.qcow2", autoclear=1 << 9, extensions=[(0x12345678, b"keep me")])
    assert any("0x200" in notice for notice in edit(disk, Add("x")).notices)
    data = disk.read_bytes()
    assert qcow2build.get_field(data, "autoclear_features") == 1
    kept = {type_: data[at : at + length] for type_, at, length in qcow2build.extensions(data)}
    assert kept[0x12345678] == b"keep me"
    assert list(agreed(disk)) == ["x"]


@requires("qemu-img")
def test_refcounts_of_an_unclean_image_are_rebuilt_first(tmp_path: Path) -> None:
    disk = build(tmp_path / "disk.qcow2", clusters={0: b"x" * 65536}, incompatible=1, compatible=1)
    assert any("rebuilt" in notice for notice in edit(disk, Add("x")).notices)
    assert_clean(disk)
    assert list(qemu_list(disk)) == ["x"]


def test_all_inconsistent_ones_at_once(tmp_path: Path) -> None:
    bitmaps = [
        Bitmap(b"a", flags=3),
        Bitmap(b"good", bits=b"\x01"),
        Bitmap(b"b", flags=1),
        Bitmap(b"twice", flags=1),
        Bitmap(b"twice", flags=1),
        Bitmap(b"odd", type=9),
    ]
    disk = build(tmp_path / "disk.qcow2", bitmaps=bitmaps)
    assert list(we_see_after(disk, RemoveInconsistent())) == ["good", "odd"]
    assert not edit(disk, RemoveInconsistent()).changed


@requires("qemu-img")
def test_removing_what_cannot_be_trusted_leaks_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bitmaps = [
        Bitmap(b"good", bits=b"\x01"),
        Bitmap(b"refused", bits=b"\x01", type=9),
        Bitmap(b"reserved", flags=1, table=[0x7 << 56]),
        Bitmap(b"misplaced", flags=1, table_offset=512),
        Bitmap(b"outside", flags=1, table_offset=1 << 40),
        Bitmap(b"huge", flags=1, table_size=1 << 20),
    ]
    disk = build(tmp_path / "disk.qcow2", bitmaps=bitmaps)
    names = [b.name.decode() for b in bitmaps[1:]]
    with caplog.at_level(logging.WARNING):
        assert list(we_see_after(disk, *map(Remove, names))) == ["good"]
    assert [
        f"{name!r} are leaked" in record.getMessage()
        for name, record in zip(names, caplog.records, strict=True)
    ]
    assert len(caplog.records) == len(names)
    done = subprocess.run(SYSTEM.argv("qemu-img", "check", "-q", "-r", "leaks", disk), check=False)
    assert done.returncode == 0
    assert list(we_see(disk)) == ["good"]


@pytest.mark.parametrize("twice", [False, True])
def test_a_directory_that_cannot_be_read(twice: bool, tmp_path: Path) -> None:
    broken = {"bitmaps": [Bitmap(b"a")], "nb_bitmaps": 5}
    if twice:
        broken = {"bitmaps": [Bitmap(b"a")], "extensions": [(qcow2build.EXT_BITMAPS, bytes(24))]}
    disk = build(tmp_path / "disk.qcow2", **broken)
    says = refused(disk, Add("x"), by=ImageError)
    assert "remove --inconsistent" in says
    assert we_see_after(disk, RemoveInconsistent()) == {}
    assert list(we_see_after(disk, Add("x"))) == ["x"]
    other = build(tmp_path / "other.qcow2", **broken)
    assert list(we_see_after(other, RemoveInconsistent(), Add("x"))) == ["x"]
    types = [type_ for type_, _, _ in qcow2build.extensions(other.read_bytes())]
    assert types.count(qcow2build.EXT_BITMAPS) == 1


def test_a_bit_without_an_extension(tmp_path: Path) -> None:
    disk = build(tmp_path / "disk.qcow2", autoclear=1)
    assert list(we_see_after(disk, Add("x"))) == ["x"]


# -- merging from other images -----------------------------------------------------------------


@needs_qemu
def test_merging_from_another_image(disk: Path) -> None:
    other = disk.with_name("other.qcow2")
    SYSTEM.img("create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", other, SIZE)
    SYSTEM.img("bitmap", "--add", "-g", 512, other, "source")
    SYSTEM.io(other, "write 1M 512", "write 2M 1k", "write 4095k 2k")
    theirs = Path(shutil.copy(disk, disk.with_name("theirs.qcow2")))
    SYSTEM.img("bitmap", "--merge", "source", "-b", other, "-F", "qcow2", "-f", "qcow2", theirs, "fine")
    before = other.read_bytes()
    edit(disk, Merge("fine", "source", str(other), "qcow2"))
    assert other.read_bytes() == before
    assert agreed(disk)["fine"] == qemu_sees(theirs)["fine"]
    # The same image by another name is no other image.
    os.symlink(disk, disk.with_name("link"))
    edit(disk, Add("copy", 4096), Merge("copy", "fine", str(disk.with_name("link"))))
    assert agreed(disk)["copy"].dirty == agreed(disk)["fine"].dirty


def test_sources_that_are_refused(tmp_path: Path) -> None:
    disk = build(tmp_path / "disk.qcow2", bitmaps=[Bitmap(b"target", bits=b"\x01")])
    other = build(tmp_path / "other.qcow2", bitmaps=[Bitmap(b"torn", flags=1), Bitmap(b"odd", type=9)])
    longer = build(tmp_path / "longer.qcow2", size=2 * MIB, bitmaps=[Bitmap(b"good")])
    says = refused(disk, Merge("target", "torn", str(other)), by=ImageError)
    assert says.startswith(f"{other}: bitmap 'torn': it is inconsistent")
    assert "its type is 9" in refused(disk, Merge("target", "odd", str(other)), by=ImageError)
    assert "no such bitmap" in refused(disk, Merge("target", "none", str(other)), by=ImageError)
    says = refused(disk, Merge("target", "good", str(longer)))
    assert "covers 2097152 bytes, the disk has 1048576" in says
    assert "No such file" in refused(disk, Merge("target", "good", str(tmp_path / "none")), by=ImageError)


# -- failures ----------------------------------------------------------------------------------

EDITS: dict[str, Sequence[Operation]] = {
    "add": [Add("new")],
    "remove": [Remove("monday")],
    "remove-all": [Remove("monday"), Remove("idle"), Remove("fine"), RemoveInconsistent()],
    "clear": [Clear("monday")],
    "disable": [Disable("monday")],
    "merge": [Merge("fine", "monday")],
    "rename": [Rename("monday", "lundi")],
    "several": [Add("new"), Merge("new", "monday"), Disable("monday"), Remove("torn"), Clear("fine")],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("edit") / "tiny.qcow2", "cluster_size=1024", size=7 * MIB)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without bitmaps, with a backing file's name behind the extensions."""
    path = tmp_path_factory.mktemp("edit") / "plain.qcow2"
    names = ["-b", "b" * 300, "-F", "raw"]
    SYSTEM.img("create", "-q", "-f", "qcow2", "-u", "-o", "cluster_size=1024", *names, path, MIB)
    return path


async def crash_states(path: Path, operations: Sequence[Operation], *, most: int = 150) -> int:
    """Judge what power failures leave of an edit; returns how many states there were."""
    timeline = Timeline()
    file = PowerCutFile(timeline, path.read_bytes(), path=str(path))
    before = await sound(file)
    await edit_bitmaps(str(path), operations, lambda path, writable: file)
    file.closed = False
    after = await sound(file)
    assert after != before
    seen = set()
    count = 0
    for options in ({"exhaustive": True, "tear": 1, "limit": 1 << 11}, {"random": most, "seed": 5}):
        for state in timeline.states(**options):  # type: ignore[arg-type]
            found = await after_failure(state)
            assert found in (before, after), str(state)
            seen.add(found == after)
            count += 1
    assert seen == {False, True}
    return count


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("case", EDITS)
def test_power_failures_leave_the_old_or_the_new(case: str, tiny: Path) -> None:
    assert asyncio.run(crash_states(tiny, EDITS[case])) > 100


@requires("qemu-img", "qemu-io")
def test_each_barrier_is_needed(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without the sync before the switch, or the one behind it, some state is found bad."""
    caplog.set_level(logging.CRITICAL)

    async def main() -> None:
        timeline = Timeline()
        file = PowerCutFile(timeline, tiny.read_bytes(), path=str(tiny))
        before = await sound(file)
        await edit_bitmaps(str(tiny), EDITS["several"], lambda path, writable: file)
        after = await sound(file)

        async def noticed(dropped: int) -> bool:
            for state in timeline.states(random=300, seed=dropped, dropped={dropped}):
                try:
                    if await after_failure(state) not in (before, after):
                        return True
                except (AssertionError, ImageError):
                    return True
            return False

        *barriers, last = range(len(timeline.syncs))
        assert [await noticed(number) for number in barriers] == [True] * len(barriers)
        assert len(barriers) == 2 and not await noticed(last)

    asyncio.run(main())


@requires("qemu-img")
def test_power_failures_while_the_header_is_rearranged(plain: Path) -> None:
    assert asyncio.run(crash_states(plain, [Add("first")])) > 100


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("case", ["add", "several"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_whatever_fails_the_old_or_the_new_is_there(
    case: str, number: int, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)

    async def run(nth: int | None) -> tuple[FaultPlan, dict[str, Seen]]:
        file = PowerCutFile(Timeline(), tiny.read_bytes(), path=str(tiny))
        plan = FaultPlan(nth, errno=number)
        faulty = FaultFile(file, plan)
        try:
            done = await edit_bitmaps(str(tiny), EDITS[case], lambda path, writable: faulty)
            assert done.changed
        except (OSError, ImageError) as error:
            assert os.strerror(number) in str(error), error
        file.closed = False
        return plan, await sound(file)

    async def every() -> None:
        before = await sound(PowerCutFile(Timeline(), tiny.read_bytes(), path=str(tiny)))
        plan, after = await run(None)
        assert plan.seen >= 8
        for nth in range(plan.seen):
            _, found = await run(nth)
            assert found in (before, after)

    asyncio.run(every())
