"""``nbdbm resize``: sizes, what it prints, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nbdbm.cli import main
from tests.support.bitmapjudge import Seen, we_see
from tests.support.qcow2build import Bitmap, Image, get_field


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(Image(bitmaps=[Bitmap(b"monday")]).build())
    return path


def run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["resize", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def test_sizes(disk: Path) -> None:
    assert run(disk, "2M").stdout == f"{disk}: 1 MiB before, 2 MiB now\n"
    assert get_field(disk.read_bytes(), "size") == 2 << 20
    assert run(disk, "+1.5m").stdout == f"{disk}: 2 MiB before, 3.5 MiB now\n"
    assert run(disk, "+512", "-q").stdout == ""
    assert get_field(disk.read_bytes(), "size") == (7 << 19) + 512
    assert run(disk, (7 << 19) + 512).stdout.endswith(" already\n")
    assert we_see(disk)["monday"] == Seen(65536, ("auto",), [(1 << 20, (5 << 19) + 512)])


def test_raw(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"x" * 1000)
    assert "say --format raw" in run(raw, "1M", status=1).stderr
    run("-f", "raw", raw, "1M")
    assert raw.read_bytes() == (b"x" * 1000).ljust(1 << 20, b"\0")


def test_errors_are_one_line(tmp_path: Path, disk: Path) -> None:
    assert run(disk, "512K", status=1).stderr.startswith(
        f"nbdbm: {disk}: has 1048576 bytes; making it smaller"
    )
    torn = tmp_path / "torn.qcow2"
    torn.write_bytes(Image(bitmaps=[Bitmap(b"monday", flags=1)]).build())
    result = run(torn, "+1M", status=1)
    assert result.stderr.startswith(f"nbdbm: {torn}: bitmap 'monday': it is inconsistent")
    assert result.stderr.count("\n") == 1
    for size in ("", "+", "++1", "1X", "+-1"):
        assert "is not a size" in run(disk, size, status=2).stderr


def test_notices_go_to_stderr(tmp_path: Path) -> None:
    path = tmp_path / "stale.qcow2"
    path.write_bytes(Image(bitmaps=[Bitmap(b"old")], autoclear=0).build())
    assert "stale" in run(path, "+1M").stderr
    assert we_see(path) == {}
