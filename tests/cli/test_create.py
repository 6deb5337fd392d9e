"""``nbdbm create``: qemu-img's sizes and options on our command line."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from nbdbm import cli
from nbdbm.cli.create import parse_size
from nbdbm.qcow2.header import Header


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "create", "nbdbm.cli.create:create")


def nbdbm(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(cli.main, ["create", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def header(path: Path) -> Header:
    data = path.read_bytes()
    return Header.parse(data)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("10b", 10),
        ("1k", 1024),
        ("1K", 1024),
        ("1.5G", 3 << 29),
        ("0.1k", 102),
        ("2T", 2 << 40),
        ("1P", 1 << 50),
        ("1E", 1 << 60),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "1Z", "1 G", "1GB", "1e3", ".5G", "1.G", "0x10", "\u0661", "9" * 31]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter, match="not a size"):
        parse_size(text)


def test_defaults(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    assert nbdbm(path, "10G").output == f"created {path}: 10 GiB, clusters of 64 KiB\n"
    made = header(path)
    assert (made.version, made.size, made.cluster_size, made.refcount_bits) == (3, 10 << 30, 65536, 16)


def test_every_option(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    options = ["-f", "qcow2", "--size", "1M", "--cluster-size", "16k", "--extended-l2", "--compat", "v3"]
    options += ["--lazy-refcounts", "--refcount-bits", "8", "--compression-type", "zstd", "-q"]
    options += ["--preallocation", "metadata", "--data-file", "disk.raw", "--data-file-raw"]
    assert nbdbm(*options, path).output == ""
    made = header(path)
    assert made.size == 1 << 20 and made.cluster_size == 16384 and made.refcount_bits == 8
    assert made.extended_l2 and made.lazy_refcounts and made.raw_data_file and made.compression_type == 1
    assert made.data_file == "disk.raw" and (tmp_path / "disk.raw").stat().st_size == 1 << 20
    nbdbm("--compat", "0.10", tmp_path / "old.qcow2", "1M")
    assert header(tmp_path / "old.qcow2").version == 2


def test_backing(tmp_path: Path) -> None:
    nbdbm(tmp_path / "base.qcow2", "3M")
    over = tmp_path / "over.qcow2"
    out = nbdbm("-b", "base.qcow2", "-F", "qcow2", over).output
    assert out == f"created {over}: 3 MiB, clusters of 64 KiB, backed by base.qcow2\n"
    made = header(over)
    assert (made.backing_file, made.backing_format, made.size) == ("base.qcow2", "qcow2", 3 << 20)
    assert (
        "cannot be opened"
        in nbdbm("--backing", "absent", "--backing-format", "raw", tmp_path / "x", "1M", status=1).output
    )
    nbdbm("-u", "--backing", "absent", "--backing-format", "raw", tmp_path / "x", "1M")


def test_force(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    nbdbm(path, "1M")
    before = path.read_bytes()
    assert "--force" in nbdbm(path, "2M", status=1).output
    assert path.read_bytes() == before
    nbdbm(path, "2M", "--force")
    assert header(path).size == 2 << 20


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["1M", "--size", "2M"], 1, "two sizes"),
        ([], 1, "size is missing"),
        (["1M", "-u"], 1, "there is none"),
        (["1M", "-b", "base"], 1, "needs its format"),
        (["1M", "--cluster-size", "3k"], 1, "power of two"),
        (["1X"], 2, "not a size"),
        (["1M", "-f", "vmdk"], 2, "vmdk"),
    ],
)
def test_refused(arguments: list[str], status: int, why: str, tmp_path: Path) -> None:
    assert why in nbdbm(tmp_path / "disk.qcow2", *arguments, status=status).output
    assert not list(tmp_path.iterdir())


def test_the_same_size_twice(tmp_path: Path) -> None:
    nbdbm(tmp_path / "disk.qcow2", "1M", "--size", "1024k")
    assert header(tmp_path / "disk.qcow2").size == 1 << 20
