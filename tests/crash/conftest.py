"""Images are made once for all tests of a process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.harness import TALLY
from tests.crash.scenarios import Kind

Made = Callable[[Kind], Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Where the image of a kind is, with all that belongs to it. For reading: recordings copy it."""
    places: dict[str, Path] = {}

    def make(kind: Kind) -> Path:
        if kind.name not in places:
            place = tmp_path_factory.mktemp(kind.name)
            kind.make(place)
            places[kind.name] = place
        return places[kind.name]

    return make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLY["states"]:
        terminalreporter.write_line(f"{TALLY['states']} crash states judged")
