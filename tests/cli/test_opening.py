"""From configuration to sources: what is opened, what is said of it, what a directory offers."""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nbdbm.access import Access
from nbdbm.cli import opening
from nbdbm.cli.opening import Directory, source, sources
from nbdbm.config import ExportConfig, ServeConfig
from nbdbm.errors import ImageError
from tests.support.sample import unpack
from tests.support.servers import nbdbm_run


def made(path: Path) -> Path:
    nbdbm_run("create", path, "1M", check=True)
    return path


def test_keys_tell_what_opens_the_same(tmp_path: Path) -> None:
    config = ExportConfig(image="a", name="n")
    key = source(config).key
    assert key == source(replace(config, description="x", access=Access(tls=True))).key
    assert key != source(replace(config, read_only=True)).key
    assert key != source(replace(config, image="b")).key


def test_grace_is_for_what_is_opened_on_demand() -> None:
    assert source(ExportConfig(image="a")).grace is None
    assert source(ExportConfig(image="a", on_demand=True, grace=3)).grace == 3


def test_opening(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = made(tmp_path / "disk.qcow2")
    nbdbm_run("bitmap", "add", image, "b0", check=True)
    config = ExportConfig(
        image=str(image), name="n", description="d", bitmaps=("b0",), allocation_depth=False
    )
    (only,) = sources(ServeConfig(exports=(config,)))
    assert (only.name, only.description) == ("n", "d")

    async def main() -> None:
        export = await only.open()
        try:
            assert export.info.contexts == ("base:allocation", "qemu:dirty-bitmap:b0")
        finally:
            await export.close()

    asyncio.run(main())
    # (asyncio may complain of a loaded machine.)
    said = [record for record in caplog.records if record.name.startswith("nbdbm")]
    assert not [record for record in said if record.levelno >= logging.WARNING]


def test_a_bitmap_that_is_not_there_closes_the_image(tmp_path: Path) -> None:
    image = made(tmp_path / "disk.qcow2")

    async def main() -> None:
        for _ in range(2):  # the second would find the image locked
            with pytest.raises(ImageError, match=r"disk\.qcow2: bitmap 'none': there is no such bitmap"):
                await source(ExportConfig(image=str(image), bitmaps=("none",))).open()

    asyncio.run(main())


def test_a_missing_backing_file_is_one_line(tmp_path: Path) -> None:
    base, image = made(tmp_path / "base.qcow2"), tmp_path / "disk.qcow2"
    nbdbm_run("create", "-b", base, "-F", "qcow2", image, check=True)
    base.unlink()
    with pytest.raises(ImageError, match=r"base\.qcow2") as caught:
        asyncio.run(source(ExportConfig(image=str(image))).open())
    assert "\n" not in str(caught.value)


class TestDirectory:
    def test_names_and_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(opening, "SCAN_AFTER", 0.0)
        made(tmp_path / "a.qcow2")
        directory = Directory(ExportConfig(image=str(tmp_path), read_only=True, grace=5))
        first = directory()
        assert list(first) == ["a.qcow2"] and first["a.qcow2"].grace == 5
        made(tmp_path / "b.qcow2")
        second = directory()
        assert list(second) == ["a.qcow2", "b.qcow2"]
        assert second["a.qcow2"] is first["a.qcow2"]
        (tmp_path / "a.qcow2").unlink()
        assert list(directory()) == ["b.qcow2"]

    def test_remembered_for_a_while(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(opening, "SCAN_AFTER", 1000.0)
        directory = Directory(ExportConfig(image=str(tmp_path)))
        made(tmp_path / "a.qcow2")
        assert directory() == {}

    def test_gone_later(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(opening, "SCAN_AFTER", 0.0)
        place = tmp_path / "d"
        place.mkdir()
        made(place / "a.qcow2")
        directory = Directory(ExportConfig(image=str(place)))
        (place / "a.qcow2").unlink()
        place.rmdir()
        assert list(directory()) == list(directory()) == ["a.qcow2"]
        assert [record.message for record in caplog.records] == [f"{place}: No such file or directory"]

    def test_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            Directory(ExportConfig(image=str(tmp_path / "nowhere")))


def test_an_inconsistent_bitmap_that_is_asked_for(tmp_path: Path) -> None:
    image = unpack(tmp_path)
    says = rf"^{re.escape(str(image))}: bitmap 'sunday': cannot .*: nbdbm bitmap remove \S+ sunday$"
    with pytest.raises(ImageError, match=says):
        asyncio.run(source(ExportConfig(image=str(image), bitmaps=("sunday",))).open())


def test_read_only_is_not_recommended_where_it_does_not_help(tmp_path: Path) -> None:
    base, image = made(tmp_path / "base.qcow2"), tmp_path / "disk.qcow2"
    nbdbm_run("create", "-b", base, "-F", "qcow2", image, check=True)
    for read_only in (False, True):
        with pytest.raises(ImageError, match=r"refused by --no-backing$"):
            asyncio.run(source(ExportConfig(image=str(image), no_backing=True, read_only=read_only)).open())
