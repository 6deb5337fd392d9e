"""One parser case, run in every way in which its bytes may arrive: whole, byte by byte, in odd pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

Result = TypeVar("Result")


def pieces(data: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """(name, pieces) of each way to cut ``data``."""
    yield "whole", [data]
    yield "bytes", [data[i : i + 1] for i in range(len(data))]
    yield "sevens", [data[i : i + 7] for i in range(0, len(data), 7)]
    yield "half", [data[: len(data) // 2], data[len(data) // 2 :]]


def in_slices(data: bytes, run: Callable[[list[bytes]], Result]) -> Result:
    """``run`` a fresh parser on each way to cut ``data``; all must agree. Returns what they agree on."""
    ways = pieces(data)
    _, first = next(ways)
    expected = run(first)
    for name, cut in ways:
        assert run(cut) == expected, f"fed as {name}"
    return expected
