"""``nbdbm checkpoint``: what it prints, and which command lines it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nbdbm.cli import main
from tests.support.bitmapjudge import Seen, we_see
from tests.support.qcow2build import Bitmap, Image


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.qcow2", tmp_path / "b.qcow2"]
    for path in paths:
        path.write_bytes(Image(bitmaps=[Bitmap(b"monday", bits=b"\x01")]).build())
    return paths


def run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["checkpoint", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def test_it_says_what_it_did(disks: list[Path]) -> None:
    run(disks[0], "--name", "tuesday", "--disable", "monday", "-q")
    shown = run(*disks, "--name", "tuesday", "--disable", "monday").stdout
    assert shown.splitlines() == [
        f"{disks[0]}: bitmap 'tuesday' there already",
        f"{disks[1]}: bitmap 'tuesday' added",
    ]
    assert we_see(disks[0]) == we_see(disks[1])
    assert we_see(disks[0])["tuesday"] == Seen(65536, ("auto",), [])
    assert we_see(disks[0])["monday"].flags == ()
    assert run(*disks, "-n", "tuesday", "--clear").stdout.count("cleared") == 2
    assert run(*disks, "-n", "fine", "-g", "4K", "-q").stdout == ""
    assert we_see(disks[1])["fine"].granularity == 4096


def test_errors_name_the_disk(disks: list[Path]) -> None:
    run(disks[1], "-n", "tuesday")
    run(disks[1], "-n", "tuesday", "--clear")
    before = disks[0].read_bytes()
    result = run(*disks, "-n", "tuesday", "--disable", "none", status=1)
    assert result.stderr.startswith(f"nbdbm: {disks[0]}: bitmap 'none': ")
    assert result.stderr.count("\n") == 1
    assert disks[0].read_bytes() == before


def test_notices_name_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "stale.qcow2"
    path.write_bytes(Image(bitmaps=[Bitmap(b"old")], autoclear=0).build())
    result = run(path, "-n", "new")
    assert result.stderr.startswith(f"nbdbm: {path}: the bitmaps extension is stale")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--name"),
        (["-n", "x", "--disable", "y", "--clear"], "which?"),
        (["-n", "x", "--disable", "x"], "is what --name says"),
        (["-n", "x", "-g", "many"], "'many' is not a size"),
    ],
)
def test_command_lines_that_make_no_sense(disks: list[Path], words: list[str], says: str) -> None:
    assert says in run(*disks, *words, status=2).stderr
    assert "IMAGE..." in run("-n", "x", status=2).stderr
