"""The images that mutations begin with are what they are meant to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import disk
from tests.fuzz.script import Script
from tests.fuzz.seeds import Seed, damaged, seeds
from tests.support import qemu
from tests.support.marks import requires


@pytest.mark.parametrize("seed", seeds(), ids=lambda seed: seed.name)
class TestSeed:
    def test_is_sound(self, seed: Seed) -> None:
        assert disk.run(disk.is_sound(seed.data))

    @requires("qemu-img")
    def test_qemu_finds_nothing_either(
        self, seed: Seed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)  # where QEMU looks for a data file
        path = tmp_path / "disk.qcow2"
        path.write_bytes(seed.data)
        for name, data in seed.others.items():
            (tmp_path / name).write_bytes(data)
        qemu.run(["qemu-img", "check", str(path)], check=True)

    def test_an_empty_script_changes_nothing(self, seed: Seed) -> None:
        assert damaged(seed, Script(b"")) == seed.data

    def test_every_kind_of_number_can_be_changed(self, seed: Seed) -> None:
        """The script that chooses the last of each kind, and all ones for it."""
        for kind in range(len(seed.spots)):
            assert damaged(seed, Script(bytes([1, 0, kind, 1, 3, 5]))) != seed.data
