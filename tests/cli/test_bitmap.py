"""``nbdbm bitmap``: listing bitmaps, and changing them."""

from __future__ import annotations

import json
import shlex
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


# -- changing ----------------------------------------------------------------------------------


def change(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["bitmap", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    assert result.stdout == ""
    return result


def flags(image: Path) -> dict[str, list[str]]:
    return {name: entry["flags"] for name, entry in listed(image).items()}


def test_each_command(image: Path) -> None:
    change("add", image, "new", "fine", "-g", "512")
    assert [listed(image)[name]["granularity"] for name in ("new", "fine")] == [512, 512]
    change("add", image, "idle", "--disable")
    assert (flags(image)["new"], flags(image)["idle"]) == (["auto"], [])
    assert listed(image)["idle"]["granularity"] == 65536
    change("merge", image, "new", "monday", "archive")
    assert listed(image)["new"]["dirty_bytes"] == DIRTY
    change("disable", image, "new", "fine")
    change("enable", image, "idle")
    assert [flags(image)[name] for name in ("new", "fine", "idle")] == [[], [], ["auto"]]
    change("clear", image, "new", "monday")
    assert [listed(image)[name]["dirty_bytes"] for name in ("new", "monday")] == [0, 0]
    change("rename", image, "monday", "tuesday")
    change("remove", image, "new", "idle")
    assert list(listed(image)) == ["sunday", "archive", "tuesday", "fine"]
    change("remove", image, "--inconsistent", "fine")
    assert list(listed(image)) == ["archive", "tuesday"]


def test_merging_from_another_image(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    other.write_bytes(Image(size=EXPECTED["size"], bitmaps=[Bitmap(b"all", bits=b"\xff" * 64)]).build())
    change("merge", image, "archive", "all", "-b", other, "-F", "qcow2")
    assert listed(image)["archive"]["dirty_bytes"] == EXPECTED["size"]
    result = change("merge", image, "archive", "none", "--source-file", other, status=1)
    assert result.stderr == f"nbdbm: {other}: bitmap 'none': there is no such bitmap in the image\n"


def test_several_operations_in_the_order_given(image: Path) -> None:
    change(
        *("edit", "--add", "a", "-g", "4K", "--disabled", "--merge", "a", "monday", image),
        *("--clear", "monday", "--add", "b", "--rename", "a", "c", "--remove-inconsistent"),
        *("--enable", "archive", "--disable", "monday", "--remove", "b", "--add", "b", "--granularity", "1M"),
    )
    found = listed(image)
    assert list(found) == ["archive", "monday", "c", "b"]
    assert found["c"]["dirty_bytes"] == DIRTY and found["monday"]["dirty_bytes"] == 0
    assert [(e["granularity"], e["flags"]) for e in found.values()] == [
        (65536, ["auto"]),
        (16384, []),
        (4096, []),
        (1 << 20, ["auto"]),
    ]


def test_all_or_nothing(image: Path) -> None:
    before = image.read_bytes()
    result = change("edit", image, "--add", "x", "--clear", "sunday", status=1)
    assert result.stderr.startswith(f"nbdbm: {image}: bitmap 'sunday': it is inconsistent")
    assert result.stderr.count("\n") == 1
    change("remove", image, "monday", "none", status=1)
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["add", "IMAGE"], "NAME..."),
        (["add", "IMAGE", "x", "-g", "many"], "'many' is not a size"),
        (["remove", "IMAGE"], "which bitmaps to remove"),
        (["merge", "IMAGE", "monday", "archive", "-F", "raw"], "--source-format is about --source-file"),
        (["edit", "IMAGE"], "what to do"),
        (["edit", "IMAGE", "-g", "4K", "--add", "x"], "belongs to an --add right before it"),
        (["edit", "IMAGE", "--add", "x", "-g", "many"], "'many' is not a size"),
        (["edit", "IMAGE", "--clear", "monday", "--disabled"], "belongs to an --add right before it"),
        (["edit", "IMAGE", "--add", "x", "-b", "file"], "belongs to a --merge right before it"),
        (["edit", "IMAGE", "--merge", "monday", "archive", "-F", "raw"], "--source-format is about"),
        (["edit", "IMAGE", "--merge", "monday"], "requires 2 arguments"),
    ],
)
def test_command_lines_that_make_no_sense(image: Path, words: list[str], says: str) -> None:
    before = image.read_bytes()
    assert says in change(*(image if word == "IMAGE" else word for word in words), status=2).stderr
    assert image.read_bytes() == before


def test_a_raw_image_has_no_bitmaps_to_change(image: Path, tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(4096))
    for words in (["add", raw, "x"], ["merge", image, "monday", "archive", "-b", raw]):
        assert change(*words, status=1).stderr == f"nbdbm: {raw}: magic is 0x0: not a qcow2 image\n"


def test_notices_go_to_stderr(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    image.write_bytes(Image(bitmaps=[Bitmap(b"old")], autoclear=0).build())
    found = run(image)
    assert found.stdout == "no bitmaps\n"
    assert f"{image}: the bitmaps extension is stale" in found.stderr
    assert json.loads(run(image, "--json").stdout) == []
    assert f"{image}: the bitmaps extension is stale" in change("add", image, "new").stderr
    assert list(listed(image)) == ["new"]
    assert run(image).stderr == ""


def test_the_remedy_works(image: Path) -> None:
    program, *words = shlex.split(listed(image)["sunday"]["remedy"])
    assert program == "nbdbm"
    assert CliRunner().invoke(main, words).exit_code == 0
    assert "sunday" not in listed(image)
