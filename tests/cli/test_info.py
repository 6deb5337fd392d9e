"""``nbdbm info``: the documented keys, and the tables for people."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nbdbm.cli import info as info_module
from nbdbm.cli import main
from tests.support.marks import requires
from tests.support.qcow2build import patch
from tests.support.qemu import SYSTEM
from tests.support.sample import EXPECTED, unpack

KEYS = [
    "file",
    "format",
    "virtual_size",
    "disk_size",
    "cluster_size",
    "version",
    "compat",
    "compression",
    "refcount_bits",
    "features",
    "data_file",
    "backing_file",
    "backing_chain",
    "snapshots",
    "bitmaps",
    "notices",
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return unpack(tmp_path)


def run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["info", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def facts(*arguments: object) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    assert list(parsed) == KEYS
    return parsed


def words(text: str) -> list[list[str]]:
    """The cells of each line that is not empty."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]


def test_json(image: Path) -> None:
    found = facts(image)
    assert found["file"] == str(image)
    assert (found["format"], found["virtual_size"]) == ("qcow2", EXPECTED["size"])
    assert found["disk_size"] == image.stat().st_blocks * 512
    assert (found["cluster_size"], found["version"], found["compat"]) == (65536, 3, "1.1")
    assert (found["compression"], found["refcount_bits"]) == ("zlib", 16)
    assert found["features"] == ["bitmaps"]
    assert (found["data_file"], found["backing_chain"], found["snapshots"]) == (None, [], [])
    assert {b["name"]: b["state"] for b in found["bitmaps"]} == {
        "sunday": "inconsistent",
        "archive": "usable",
        "monday": "usable",
    }
    assert found["notices"] == []


def test_the_keys_are_documented() -> None:
    documented = re.findall(r"^ *``(\w+)``", info_module.gather.__doc__ or "", re.MULTILINE)
    assert documented == KEYS


def test_for_people(image: Path) -> None:
    shown = words(run(image).stdout)
    assert ["image", str(image)] in shown
    assert ["format", "qcow2 (compat 1.1)"] in shown
    assert ["virtual size", "32 MiB (33554432 bytes)"] in shown
    assert ["features", "bitmaps"] in shown
    assert any(row[0] == "monday" and row[-1] == "176 KiB" for row in shown)
    assert any(row[0].startswith("bitmap 'sunday' cannot be used") for row in shown)


def test_raw(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(1000))
    found = facts("-f", "raw", raw)
    assert (found["format"], found["virtual_size"]) == ("raw", 1000)
    # A raw image has none of it, which is not the same as a qcow2 image without.
    for key in KEYS[KEYS.index("cluster_size") : KEYS.index("backing_chain")]:
        assert found[key] is None
    shown = words(run("-f", "raw", raw).stdout)
    assert [row[0] for row in shown] == ["image", "format", "virtual size", "disk size"]
    assert ["virtual size", "1000 bytes"] in shown


def test_marks_of_trouble(image: Path) -> None:
    patch(image, incompatible_features=3, autoclear_features=0)
    found = facts(image)
    assert found["features"] == ["dirty", "corrupt", "bitmaps"]
    assert found["bitmaps"] == []
    assert any("bitmap" in notice for notice in found["notices"])
    assert "note: " in run(image).stdout


def test_nothing_is_changed(image: Path) -> None:
    before = image.read_bytes(), image.stat().st_mtime_ns
    run(image, "--dirty")
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none", None, "No such file"),
        ("text", b"hello", "qcow2"),
        ("zeroes", bytes(1 << 20), "not a qcow2 image"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    result = run(path, status=1)
    assert result.stderr.startswith(f"nbdbm: {path}: ") and says in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


@requires("qemu-img", "qemu-io")
def test_chain_snapshots_and_features(tmp_path: Path) -> None:
    base, middle, top = (tmp_path / name for name in ("base.raw", "middle.qcow2", "top[1].qcow2"))
    SYSTEM.img("create", "-q", "-f", "raw", base, "3M")
    SYSTEM.img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", middle)
    options = "compat=1.1,lazy_refcounts=on,extended_l2=on,compression_type=zstd,refcount_bits=1"
    SYSTEM.img("create", "-q", "-f", "qcow2", "-o", options, "-b", middle, "-F", "qcow2", top, "4M")
    found = facts(top)
    assert found["features"] == ["compression-type", "extended-l2", "lazy-refcounts"]
    assert (found["compression"], found["refcount_bits"]) == ("zstd", 1)
    assert [(Path(x["file"]).name, x["format"], x["virtual_size"]) for x in found["backing_chain"]] == [
        ("middle.qcow2", "qcow2", 3 << 20),
        ("base.raw", "raw", 3 << 20),
    ]
    shown = words(run(top).stdout)
    assert ["image", str(top)] in shown
    assert ["backing file", "format", "virtual size", "disk size"] in shown
    assert [row[1:3] for row in shown if row[0].endswith("base.raw")] == [["raw", "3 MiB"]]

    SYSTEM.img("snapshot", "-c", "before", middle)
    found = facts(middle)
    assert [(s["id"], s["name"], s["virtual_size"], s["vm_state_size"]) for s in found["snapshots"]] == [
        ("1", "before", 3 << 20, 0)
    ]
    theirs = SYSTEM.img_json("info", middle)["snapshots"]
    assert found["snapshots"][0]["date"] == theirs[0]["date-sec"]
    assert any(row[:2] == ["1", "before"] and row[2].endswith("UTC") for row in words(run(middle).stdout))


@requires("qemu-img")
def test_what_it_refers_to_may_be_missing(tmp_path: Path) -> None:
    base, top, split, data = (tmp_path / name for name in ("base.qcow2", "top.qcow2", "split.qcow2", "data"))
    SYSTEM.img("create", "-q", "-f", "qcow2", base, "1M")
    SYSTEM.img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    SYSTEM.img("bitmap", "--add", top, "monday")
    SYSTEM.img("create", "-q", "-f", "qcow2", "-o", f"data_file={data}", split, "1M")
    base.unlink()
    data.unlink()
    found = facts(top)
    assert (found["backing_file"], found["backing_chain"]) == (str(base), [])
    assert [b["dirty_bytes"] for b in found["bitmaps"]] == [0]
    assert any(str(base) in notice and "No such file" in notice for notice in found["notices"])
    assert ["backing file", str(base)] in words(run(top).stdout)
    assert any(str(data) in notice for notice in facts(split)["notices"])
    assert "No such file" in run("--backing-root", tmp_path, top, status=1).stderr
    # Nothing of this for the image itself.
    assert run(base, status=1).stderr.count("No such file") == 1


@requires("qemu-img")
def test_old_and_external(tmp_path: Path) -> None:
    old, split = tmp_path / "old.qcow2", tmp_path / "split.qcow2"
    SYSTEM.img("create", "-q", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4096", old, "1M")
    found = facts(old)
    assert (found["version"], found["compat"], found["cluster_size"]) == (2, "0.10", 4096)
    data = tmp_path / "split.data"
    SYSTEM.img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", split, "1M")
    found = facts(split)
    assert found["features"] == ["data-file", "data-file-raw"]
    assert found["data_file"] == str(data)
    assert ["data file", str(data)] in words(run(split).stdout)


@requires("qemu-img", "qemu-io")
def test_an_image_in_use(image: Path) -> None:
    held = subprocess.Popen(
        SYSTEM.argv("qemu-io", "-f", "qcow2", image), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert held.stdin is not None and held.stdout is not None
        held.stdin.write(b"read 0 512\n")
        held.stdin.flush()
        assert b"read" in held.stdout.readline()
        result = run(image, status=1)
        assert result.stderr.startswith(f"nbdbm: {image}: ")
        # QEMU has marked them all as in use, and what they miss is in its memory.
        assert {b["state"] for b in facts(image, "--force-share")["bitmaps"]} == {"inconsistent"}
    finally:
        assert held.stdin is not None
        held.communicate(b"quit\n", timeout=20)
