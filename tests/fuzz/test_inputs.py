"""The kept inputs of the fuzzing targets, run as they are: no atheris is needed.

An input that is kept because something was wrong with it has a word behind it, which says what.
"""

from __future__ import annotations

import base64
import importlib
import logging
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.fuzz import modules
from tests.fuzz.targets import TARGETS

INPUTS = Path(__file__).resolve().parent / "inputs"

MEMORY = 64 << 20
"""Bytes that one input may take: all are small, whatever they claim to be."""


@pytest.fixture
def quiet() -> Iterator[None]:
    """What is said about hundreds of damaged images helps nobody; errors still reach the targets."""
    logger = logging.getLogger("nbdbm")
    before = logger.propagate
    logger.propagate = False
    yield
    logger.propagate = before


@pytest.mark.parametrize("target", TARGETS)
def test_kept(target: str, quiet: None) -> None:
    """Each input, and that all that it took is bounded."""
    module = importlib.import_module(f"tests.fuzz.targets.{target}")
    lines = (INPUTS / f"{target}.txt").read_text().splitlines()
    inputs = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    assert inputs
    for number, line in inputs:
        try:
            module.run(base64.b64decode(line.split()[0]))
        except BaseException as error:
            error.add_note(f"{INPUTS / target}.txt, line {number}")
            raise


@pytest.mark.parametrize("target", TARGETS)
def test_starts(target: str, quiet: None) -> None:
    """Some of what mutations begin with, with an account of memory, which is too slow for all inputs."""
    module = importlib.import_module(f"tests.fuzz.targets.{target}")
    starts = list(module.starts())
    starts = starts[:: 1 + len(starts) // 12]
    module.run(starts[0])
    tracemalloc.start()
    try:
        for number, data in enumerate(starts):
            tracemalloc.reset_peak()
            module.run(data)
            _, peak = tracemalloc.get_traced_memory()
            assert peak < MEMORY, f"start {number} took {peak >> 20} MiB"
    finally:
        tracemalloc.stop()


def test_what_is_looked_into_can_be_imported() -> None:
    """The fuzzer imports every module by name, wanted or not."""
    names = modules()
    assert "nbdbm.nbd.handshake" in names
    for name in names:
        importlib.import_module(name)
