"""Counting: sums, buckets, and that nothing is lost when tallies are added."""

from __future__ import annotations

import pytest

from nbdbm.metrics import COMMANDS, Figures, Metrics, Tally, total


@pytest.mark.parametrize("nanoseconds", [0, 1, 2, 3, 1023, 1024, 10**9, 2**62])
def test_a_latency_is_in_the_first_bucket_that_holds_it(nanoseconds: int) -> None:
    figures = Figures()
    figures.record(1, 0, nanoseconds)
    bucket = figures.buckets.index(1)
    assert nanoseconds < 2**bucket and (bucket == 0 or nanoseconds >= 2 ** (bucket - 1))


def test_a_batch_counts_for_each_of_its_requests() -> None:
    figures = Figures()
    figures.record(16, 65536, 50_000)
    assert (figures.operations, figures.bytes, figures.nanoseconds) == (16, 65536, 800_000)
    assert sum(figures.buckets) == 16


def test_failures_and_refusals() -> None:
    figures = Figures()
    figures.record(1, 0, 10)
    figures.fail("EIO")
    figures.refuse("EINVAL")
    figures.refuse("EINVAL")
    assert (figures.operations, figures.errors) == (3, {"EIO": 1, "EINVAL": 2})
    assert sum(figures.buckets) == 1


def test_adding() -> None:
    one, two = Tally(), Tally()
    for tally, size in ((one, 512), (two, 4096)):
        for command in COMMANDS:
            tally.commands[command].record(2, size, 3000)
            tally.commands[command].fail("EIO")
        tally.general = 3
    both = total([one, two])
    assert both.general == 6 and both.at_once == 4 * len(COMMANDS) - 6
    assert both.operations == 4 * len(COMMANDS) and both.errors == 2 * len(COMMANDS)
    for figures in both.commands.values():
        assert (figures.bytes, figures.nanoseconds, figures.errors) == (4608, 12_000, {"EIO": 2})
        assert sum(figures.buckets) == 4
    assert one.operations == 2 * len(COMMANDS)


def test_an_export_keeps_its_sums() -> None:
    metrics = Metrics()
    metrics.export("disk").commands["read"].record(1, 2, 3)
    assert metrics.export("disk").operations == 1 and list(metrics.exports) == ["disk"]
