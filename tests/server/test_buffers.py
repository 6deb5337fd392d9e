"""Buffers come back, within bounds."""

from __future__ import annotations

import pytest

from nbdbm.server.buffers import MAX_KEPT, SMALL, BufferPool


@pytest.mark.parametrize("length", [0, 1, SMALL - 1, SMALL, SMALL + 1, 1 << 20, (1 << 20) + 1])
def test_a_buffer_is_long_enough(length: int) -> None:
    assert length <= len(BufferPool().take(length)) <= max(SMALL, 2 * length)


def test_given_back_is_handed_out_again() -> None:
    pool = BufferPool()
    buffer = pool.take(100_000)
    pool.give(buffer)
    assert pool.kept == len(buffer)
    assert pool.take(70_000) is buffer
    assert pool.kept == 0
    assert pool.take(70_000) is not buffer


def test_small_ones_are_not_kept() -> None:
    pool = BufferPool()
    pool.give(pool.take(SMALL - 1))
    assert pool.kept == 0


def test_what_is_kept_is_bounded() -> None:
    pool = BufferPool()
    buffers = [pool.take(MAX_KEPT // 4) for _ in range(6)]
    for buffer in buffers:
        pool.give(buffer)
    assert pool.kept == MAX_KEPT


@pytest.mark.parametrize("other", [bytearray(1 << 20), bytes(1 << 20), None])
def test_what_is_not_ours_is_dropped(other: object) -> None:
    pool = BufferPool()
    pool.give(other)
    assert pool.kept == 0
