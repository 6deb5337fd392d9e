"""``nbdbm check``: exit statuses, JSON, and the text for people."""

from __future__ import annotations

import json
import os
import pty
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nbdbm import cli
from nbdbm.image.blockfile import ThreadedFile
from tests.image.checking import qemu_check
from tests.support.marks import requires
from tests.support.qcow2build import COPIED, Image, get_field


def nbdbm(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(cli.main, ["check", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return result


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "check", "nbdbm.cli.check:check")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(Image(size=1 << 20, clusters={0: b"a", 3: b"b"}).build())
    return path


def entry_at(path: Path, index: int) -> int:
    data = path.read_bytes()
    l1 = struct.unpack_from(">Q", data, get_field(data, "l1_table_offset"))[0]
    return int(l1 & ~COPIED) + 8 * index


def change(path: Path, at: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack(">Q", value))


def leak(path: Path) -> None:
    change(path, entry_at(path, 0), 0)


def corrupt(path: Path) -> None:
    at = entry_at(path, 0)
    change(path, at, struct.unpack_from(">Q", path.read_bytes(), at)[0] ^ COPIED)


def test_sound(image: Path) -> None:
    before = image.read_bytes()
    out = nbdbm(image).output
    assert out.splitlines()[0] == "no errors"
    assert "2 of 16 clusters allocated (12.50 %), 0.00 % fragmented, 0.00 % compressed" in out
    assert f"the image ends at byte {-(-len(before) // 65536) * 65536} of the file" in out
    assert image.read_bytes() == before


def test_leaks(image: Path) -> None:
    leak(image)
    out = nbdbm(image, status=3).output
    assert "leaked: 1 cluster; space is wasted" in out and "has refcount 1, but nothing refers to it" in out
    out = nbdbm(image, "--repair", "leaks").output
    assert "repaired: 0 corruptions, 1 leaked cluster" in out and "no errors" in out
    assert nbdbm(image).output.startswith("no errors")


def test_corrupt(image: Path) -> None:
    corrupt(image)
    assert "wrong COPIED flag" in nbdbm(image, status=2).output
    assert "corrupt: 1 error" in nbdbm(image, "-r", "leaks", status=2).output
    assert "repaired: 1 corruption, 0 leaked clusters" in nbdbm(image, "-r", "all").output
    nbdbm(image)


@requires("qemu-img")
@pytest.mark.parametrize("damage", [None, leak, corrupt])
def test_json(damage: object, image: Path) -> None:
    """qemu-img's keys and numbers, and the messages."""
    if callable(damage):
        damage(image)
    theirs, status = qemu_check(image)
    ours = json.loads(nbdbm(image, "--json", status=status).stdout)
    assert len(ours.pop("problems")) == theirs.get("leaks", 0) + theirs.get("corruptions", 0)
    for key in ("allocated-clusters", "fragmented-clusters", "compressed-clusters"):
        theirs.setdefault(key, 0)
    assert ours == theirs
    fixed = json.loads(nbdbm(image, "--json", "-r", "all").stdout)
    assert fixed.get("leaks-fixed", 0) == theirs.get("leaks", 0)
    assert fixed.get("corruptions-fixed", 0) == theirs.get("corruptions", 0)
    assert "leaks" not in fixed and "corruptions" not in fixed


def test_quiet(image: Path) -> None:
    leak(image)
    assert nbdbm(image, "-q", status=3).output == ""
    assert nbdbm(image, "-q", "--json", status=3).output == ""


def test_not_completed(image: Path) -> None:
    image.write_bytes(b"nothing of the kind" * 10)
    assert nbdbm(image, status=1).output.startswith(f"nbdbm: {image}: magic is 0x6e6f7468: not a qcow2 image")
    assert "No such file" in nbdbm(image.with_name("absent"), status=1).output


def test_in_use(image: Path) -> None:
    user = ThreadedFile.open(str(image))
    try:
        user.lock(writable=False, force_share=False)
        nbdbm(image)
        assert "in use" in nbdbm(image, "-r", "all", status=1).output
    finally:
        user.close()
    writer = ThreadedFile.open(str(image), writable=True)
    try:
        writer.lock(writable=True, force_share=False)
        assert "in use" in nbdbm(image, status=1).output
        nbdbm(image, "-U")
    finally:
        writer.close()


def test_repair_needs_the_image_alone(image: Path) -> None:
    assert "excludes --force-share" in nbdbm(image, "-U", "-r", "all", status=1).output


def test_names_cannot_drive_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "disk\x1b[2J.qcow2"
    path.write_bytes(b"")
    assert "\x1b" not in nbdbm(path, status=1).output


def test_many_problems(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(Image(size=1 << 28, clusters={0: b"a"}).build())
    for index in range(1, 1200):
        change(path, entry_at(path, index), 512 * index | COPIED | 1 << 9)
    out = nbdbm(path, status=2).output
    assert " more\n" in out and len(out.splitlines()) < 1100


def test_progress_on_a_terminal(image: Path) -> None:
    """A bar on stderr if that is a terminal, which leaves stdout alone."""
    code = "from nbdbm import cli; cli.COMMANDS['check'] = 'nbdbm.cli.check:check'; cli.main()"
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code, "check", str(image)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=30,
        env=os.environ | {"TERM": "xterm"},
        check=True,
    )
    os.close(theirs)
    shown = os.read(ours, 65536)
    os.close(ours)
    assert b"checking" in shown and b"100%" in shown
    assert done.stdout.startswith(b"no errors")
