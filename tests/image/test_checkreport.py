"""The findings of a check, as numbers, lines and JSON."""

from __future__ import annotations

import pytest

from nbdbm.image.checkreport import MAX_PROBLEMS, CheckReport


def test_messages_are_bounded() -> None:
    report = CheckReport("x")
    for number in range(MAX_PROBLEMS + 5):
        report.corrupt(str(number))
    assert report.corruptions == MAX_PROBLEMS + 5
    assert len(report.problems) == MAX_PROBLEMS and report.more_problems == 5


@pytest.mark.parametrize(
    ("errors", "corruptions", "leaks", "status"),
    [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 2), (0, 0, 1, 3)],
)
def test_exit_status(errors: int, corruptions: int, leaks: int, status: int) -> None:
    report = CheckReport("x", check_errors=errors, corruptions=corruptions, leaks=leaks)
    assert report.exit_status == status


def test_json_names_only_what_there_is() -> None:
    report = CheckReport("x")
    assert "leaks" not in report.to_json() and "corruptions-fixed" not in report.to_json()
    report.failed("a place")
    report.corrupt("a thing")
    report.leaks_fixed = 3
    found = report.to_json()
    assert (found["check-errors"], found["corruptions"], found["leaks-fixed"]) == (1, 1, 3)
    assert report.problems == ["not checked: a place", "corrupt: a thing"]
