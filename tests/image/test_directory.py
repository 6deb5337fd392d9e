"""What of a directory is an image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdbm.image import directory
from nbdbm.image.directory import images

QCOW2 = b"QFI\xfb" + bytes(100)


def test_qcow2_images_by_their_beginning(tmp_path: Path) -> None:
    (tmp_path / "b.qcow2").write_bytes(QCOW2)
    (tmp_path / "a").write_bytes(QCOW2)
    (tmp_path / "raw.img").write_bytes(bytes(1000))
    (tmp_path / "empty.qcow2").write_bytes(b"")
    (tmp_path / ".hidden.qcow2").write_bytes(QCOW2)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.qcow2").write_bytes(QCOW2)
    os.mkfifo(tmp_path / "fifo")
    assert images(str(tmp_path), any_format=False) == ["a", "b.qcow2"]
    assert images(str(tmp_path), any_format=True) == ["a", "b.qcow2", "empty.qcow2", "raw.img"]


def test_the_next_look_reads_only_what_may_have_become_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(QCOW2)
    (tmp_path / "d").write_bytes(b"")
    seen: dict[str, int] = {}
    assert images(str(tmp_path), any_format=False, seen=seen) == ["a", "b", "c"]
    (tmp_path / "a").unlink()
    (tmp_path / "new").write_bytes(b"no image")
    (tmp_path / "new").rename(tmp_path / "b")
    (tmp_path / "d").write_bytes(QCOW2)
    read: list[str] = []
    is_qcow2 = directory._is_qcow2
    monkeypatch.setattr(directory, "_is_qcow2", lambda path: read.append(path) or is_qcow2(path))
    assert images(str(tmp_path), any_format=False, seen=seen) == ["c", "d"]
    assert sorted(map(os.path.basename, read)) == ["b", "d"]
    assert images(str(tmp_path), any_format=False, seen=seen) == ["c", "d"]
    assert len(read) == 3, "only b again"


def test_what_is_passed_over_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(QCOW2)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / os.fsdecode(b"\xff")).write_bytes(QCOW2)
    told: list[str] = []
    assert images(str(tmp_path), any_format=False, skipped=told.append) == ["a"]
    assert sorted(told) == [
        f"{tmp_path}/link: a symbolic link, not served",
        f"{tmp_path}: the name '\\udcff' is not UTF-8, not served",
    ]


def test_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_FILES", 2)
    for name in "abc":
        (tmp_path / name).write_bytes(QCOW2)
    told: list[str] = []
    assert len(images(str(tmp_path), any_format=False, skipped=told.append)) == 2
    assert told == [f"{tmp_path}: has more than 2 images; the others are not served"]


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        images(str(tmp_path / "nowhere"), any_format=False)
