"""One image for many threads: its life, its bitmaps, and the parameters that it is opened with."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdbm.config import ExportConfig
from nbdbm.errors import ImageError, NbdbmError, UsageError
from nbdbm.nbd.constants import TransmissionFlag
from nbdbm.nbdkit.disk import Disk, configured
from tests.interop.serving import fingerprint
from tests.interop.writing import bitmaps
from tests.support import bitmapjudge, images
from tests.support.marks import requires
from tests.support.qemu import SYSTEM

KIB = 1024
MIB = 1024 * KIB

pytestmark = requires("qemu-img", "qemu-nbd", "libnbd")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """64 MiB with the recording bitmap ``b``, granules of 64 KiB."""
    path = tmp_path / "disk.qcow2"
    SYSTEM.img("create", "-q", "-f", "qcow2", path, "64M")
    SYSTEM.img("bitmap", "--add", path, "b")
    return path


@pytest.fixture
def disk(path: Path) -> Iterator[Disk]:
    disk = Disk(ExportConfig(image=str(path)))
    yield disk
    disk.shut()


# -- parameters --------------------------------------------------------------------------------


def test_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = configured({"image": "a=b.qcow2", "backing-root": ".", "discard": "ignore", "format": "raw"})
    assert config.image == str(tmp_path / "a=b.qcow2") and config.backing_root == str(tmp_path)
    assert (config.discard, config.format, config.no_backing) == ("ignore", "raw", False)
    assert configured({"image": "a", "detect-zeroes": "on"}).detect_zeroes == "on"
    assert configured({"image": "a", "snapshot": "1"}).snapshot == "1"
    for word, value in {"true": True, "1": True, "ON": True, "no": False, "off": False}.items():
        assert configured({"image": "a", "no-backing": word}).no_backing is value


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "image=FILE is missing"),
        ({"image": ""}, "image: the value is empty"),
        ({"image": "a", "bitmaps": "b"}, "bitmaps: unknown parameter; there are image, format"),
        ({"image": "a", "no-backing": "perhaps"}, "no-backing=perhaps: must be true or false"),
        ({"image": "a", "format": "vdi"}, "format vdi: formats are qcow2, raw"),
        ({"image": "a", "discard": "all"}, "discard all: must be one of unmap, ignore"),
        ({"image": "a", "detect-zeroes": "unmap", "discard": "ignore"}, "unmap excludes discard ignore"),
        ({"image": "a", "no-backing": "yes", "backing-root": "/"}, "no-backing excludes backing-root"),
    ],
)
def test_parameters_that_cannot_be(given: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        configured(given)
    assert said in str(caught.value) and "--" not in str(caught.value)


# -- looking first -----------------------------------------------------------------------------


def test_probe_changes_nothing(path: Path, disk: Disk) -> None:
    before = fingerprint([path])
    assert disk.probe() == []
    assert fingerprint([path]) == before


def test_probe_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(NbdbmError) as caught:
        Disk(ExportConfig(image=str(tmp_path / "none"))).probe()
    assert str(caught.value) == f"{tmp_path}/none: cannot be opened: No such file or directory"
    bad = tmp_path / "bad"
    bad.write_bytes(bytes(1024))
    with pytest.raises(NbdbmError, match="not a qcow2 image"):
        Disk(ExportConfig(image=str(bad))).probe()


def test_probe_names_bitmaps_that_do_not_record(gallery: images.Gallery) -> None:
    case = gallery.get("bitmaps-inconsistent")
    lines = Disk(ExportConfig(image=str(case.path))).probe()
    assert len(lines) == len(case.refused) > 0
    for name, line in zip(case.refused, lines, strict=True):
        assert line.startswith(f"{case.path}: bitmap {name!r} cannot be used: ")


# -- the life of the image ---------------------------------------------------------------------


def write(disk: Disk, offset: int, data: bytes) -> None:
    export = disk.acquire(read_only=False)
    disk.call(export.write(offset, memoryview(data), fua=False))
    disk.release()


def test_open_while_used(path: Path, disk: Disk) -> None:
    one = disk.acquire(read_only=False)
    two = disk.acquire(read_only=False)
    assert one is two
    disk.call(one.write(MIB, memoryview(b"x" * 70_000), fua=False))
    disk.release()
    assert "in-use" in bitmaps(path)["b"][1], "there is another user"
    disk.release()
    assert bitmapjudge.agreed(path)["b"].dirty == [(MIB, 128 * KIB)]
    # And again, by the next one.
    write(disk, 0, b"y")
    assert bitmapjudge.agreed(path)["b"].dirty == [(0, 64 * KIB), (MIB, 128 * KIB)]


def test_the_first_user_says_whether_to_write(path: Path, disk: Disk) -> None:
    before = fingerprint([path])
    one, two = disk.acquire(read_only=True), disk.acquire(read_only=False)
    assert one is two and one.info.flags & TransmissionFlag.READ_ONLY
    disk.release()
    disk.release()
    assert fingerprint([path]) == before
    assert not disk.acquire(read_only=False).info.flags & TransmissionFlag.READ_ONLY
    disk.release()


def test_a_snapshot_is_read_only(gallery: images.Gallery) -> None:
    case = gallery.get("load-first")
    disk = Disk(ExportConfig(image=str(case.path), snapshot=case.options[1]))
    assert disk.acquire(read_only=False).info.flags & TransmissionFlag.READ_ONLY
    disk.release()
    disk.shut()


def test_an_image_that_comes_later(tmp_path: Path) -> None:
    """A user who could not be served is none."""
    path = tmp_path / "disk.qcow2"
    disk = Disk(ExportConfig(image=str(path)))
    with pytest.raises(ImageError, match="cannot be opened"):
        disk.acquire(read_only=False)
    SYSTEM.img("create", "-q", "-f", "qcow2", path, "1M")
    write(disk, 0, b"x")
    bitmapjudge.assert_clean(path)
    SYSTEM.io(path, "read -P 0x78 0 1", "write 0 1")  # nobody holds it
    disk.shut()


def test_many_threads(path: Path, disk: Disk) -> None:
    """Users that come and go while others read and write, each its own part of the disk."""
    piece, rounds, users = 48 * KIB, 12, 8

    def user(number: int) -> None:
        for turn in range(rounds):
            export = disk.acquire(read_only=False)
            offset = (number * rounds + turn) * piece
            data = bytes([number + 1]) * piece
            disk.call(export.write(offset, memoryview(data), fua=turn == 0))
            view = memoryview(bytearray(piece))
            disk.call(export.read(view, offset, sparse=False))
            assert view == data
            disk.release()

    with ThreadPoolExecutor(users) as pool:
        list(pool.map(user, range(users)))
    assert bitmapjudge.agreed(path)["b"].dirty == [(0, users * rounds * piece)]
    SYSTEM.io(path, *(f"read -P {n + 1} {n * rounds * piece} {rounds * piece}" for n in range(users)))


def test_shut_waits_for_calls_and_refuses_later_ones(path: Path) -> None:
    disk = Disk(ExportConfig(image=str(path)))
    export = disk.acquire(read_only=False)
    begun = threading.Event()

    async def slow() -> None:
        begun.set()
        for number in range(64):
            await export.write(number * MIB, memoryview(b"z" * 4096), fua=False)

    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(disk.call, slow())
        assert begun.wait(20)
        disk.shut()
        under_way.result()
    found = bitmapjudge.agreed(path)["b"].dirty
    assert found == [(number * MIB, 64 * KIB) for number in range(64)]
    with pytest.raises(NbdbmError, match="the server ends"):
        disk.call(export.flush())
    disk.release()
    disk.shut()


def test_extents_agree_with_qemu(gallery: images.Gallery) -> None:
    case = gallery.get("v3-packed")
    disk = Disk(ExportConfig(image=str(case.path)))
    export = disk.acquire(read_only=True)
    found = disk.extents(export, 0, case.size, one=False)
    kinds = {
        offset: {0: (True, False), 2: (True, True), 3: (False, True)}[flags] for offset, _, flags in found
    }
    assert len(kinds) > 5
    shown = SYSTEM.img_json("map", case.path)
    assert sum(length for _, length, _ in found) == case.size == sum(e["length"] for e in shown)
    for extent in shown:
        at = max(offset for offset in kinds if offset <= extent["start"])
        assert kinds[at][1] == extent["zero"], extent
    [only] = disk.extents(export, 4096, case.size - 4096, one=True)
    assert only[0] == 4096
    disk.release()
    disk.shut()
