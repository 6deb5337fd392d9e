"""``nbdbm bitmap list``: every bitmap, what it is good for, and how much is dirty in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nbdbm.cli import bitmap, main
from tests.support.marks import requires
from tests.support.qcow2build import Bitmap, Image
from tests.support.qemu import SYSTEM
from tests.support.sample import EXPECTED, unpack

DIRTY = sum(length for _, length in EXPECTED["dirty"]["monday"])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return unpack(tmp_path)


def run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["bitmap", "list", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def listed(*arguments: object) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads(run(*arguments, "--json").stdout)}


def built(path: Path, bitmaps: list[Bitmap]) -> None:
    path.write_bytes(Image(size=1 << 20, bitmaps=bitmaps).build())


def test_json(image: Path) -> None:
    entries = listed(image)
    assert list(entries) == ["sunday", "archive", "monday"]
    assert entries["monday"] == {
        "name": "monday",
        "granularity": 16384,
        "flags": ["auto"],
        "state": "usable",
        "reason": None,
        "remedy": None,
        "dirty_bytes": DIRTY,
    }
    assert entries["archive"]["flags"] == [] and entries["archive"]["dirty_bytes"] == 0
    sunday = entries["sunday"]
    assert (sunday["flags"], sunday["state"]) == (["in-use", "auto"], "inconsistent")
    assert sunday["dirty_bytes"] is None
    assert sunday["reason"].startswith("it is inconsistent")
    assert str(image) in sunday["remedy"] and "sunday" in sunday["remedy"]


def test_for_people(image: Path) -> None:
    lines = run(image).stdout.splitlines()
    assert lines[0].split() == ["bitmap", "granularity", "flags", "state", "dirty"]
    assert [line.split() for line in lines[2:5]] == [
        ["sunday", "64", "KiB", "in-use,", "auto", "inconsistent", "-"],
        ["archive", "64", "KiB", "-", "usable", "0", "B"],
        ["monday", "16", "KiB", "auto", "usable", f"{DIRTY // 1024}", "KiB"],
    ]
    assert lines[5].startswith("bitmap 'sunday' cannot be used: it is inconsistent")
    assert lines[6].startswith("  remedy: ")
    assert len(lines) == 7


def test_large_bitmaps_are_counted_when_asked(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = EXPECTED["size"] // 65536
    monkeypatch.setattr(bitmap, "CHEAP_BITS", bits)
    # archive takes all that is cheap; monday's bits come on top.
    assert [e["dirty_bytes"] for e in listed(image).values()] == [None, 0, None]
    assert "not counted" in run(image).stdout
    assert [e["dirty_bytes"] for e in listed(image, "--dirty").values()] == [None, 0, DIRTY]


def test_names_that_would_move_the_cursor(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    built(image, [Bitmap(b"a\x1b[2J\nb")])
    shown = run(image).stdout
    assert "\x1b" not in shown and "a\\x1b[2J\\nb" in shown
    assert list(listed(image)) == ["a\x1b[2J\nb"]


def test_one_broken_bitmap_among_good_ones(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    built(image, [Bitmap(b"bad", type=7), Bitmap(b"[bold]good", bits=b"\x01")])
    entries = listed(image)
    assert entries["bad"]["state"] == "refused" and "type" in entries["bad"]["reason"]
    assert entries["[bold]good"]["dirty_bytes"] == 65536
    # Names are never taken for markup.
    assert "[bold]good" in run(image).stdout


def test_no_bitmaps(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    built(image, [])
    assert run(image).stdout == "no bitmaps\n"
    assert listed(image) == {}


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(65536))
    result = run(other, status=1)
    assert result.stderr.startswith(f"nbdbm: {other}: ") and result.stderr.count("\n") == 1


@requires("qemu-img")
def test_the_same_as_qemu_img_says(image: Path) -> None:
    theirs = SYSTEM.img_json("info", image)["format-specific"]["data"]["bitmaps"]
    ours = listed(image).values()
    assert [{key: entry[key] for key in ("name", "granularity", "flags")} for entry in ours] == [
        {key: entry[key] for key in ("name", "granularity", "flags")} for entry in theirs
    ]
