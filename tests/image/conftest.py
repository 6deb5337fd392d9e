"""Fixtures for the tests of checks and repairs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.image.checking import Patient
from tests.support.images import Gallery


@pytest.fixture
def patient(gallery: Gallery, tmp_path: Path) -> Callable[[str], Patient]:
    """Takes a copy of an image of the matrix, by name."""

    def take(name: str) -> Patient:
        copy = tmp_path / "patient.qcow2"
        shutil.copyfile(gallery.get(name).path, copy)
        return Patient(copy)

    return take
