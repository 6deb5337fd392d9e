"""Which names which queries find."""

from __future__ import annotations

import pytest

from nbdbm.nbd.metacontext import Query, matches

NAMES = (
    "base:allocation",
    "qemu:allocation-depth",
    "qemu:dirty-bitmap:daily",
    "qemu:dirty-bitmap:weekly",
    "qemu:dirty-bitmap:base:",
)
BITMAPS = list(NAMES[2:])

# query -> found by LIST, found by SET
CASES = {
    "exact_base": (["base:allocation"], ["base:allocation"], ["base:allocation"]),
    "exact_depth": (["qemu:allocation-depth"], [NAMES[1]], [NAMES[1]]),
    "exact_bitmap": (["qemu:dirty-bitmap:daily"], [NAMES[2]], [NAMES[2]]),
    "bitmap_that_looks_like_a_wildcard": (["qemu:dirty-bitmap:base:"], [NAMES[4]], [NAMES[4]]),
    "base_wildcard": (["base:"], ["base:allocation"], []),
    "qemu_wildcard": (["qemu:"], list(NAMES[1:]), []),
    "bitmap_wildcard": (["qemu:dirty-bitmap:"], BITMAPS, []),
    "several_in_listing_order": (
        ["qemu:dirty-bitmap:weekly", "base:allocation", "qemu:dirty-bitmap:weekly"],
        [NAMES[0], NAMES[3]],
        [NAMES[0], NAMES[3]],
    ),
    "wildcard_and_exact": (["base:", "qemu:dirty-bitmap:daily"], [NAMES[0], NAMES[2]], [NAMES[2]]),
    "unknown_namespace": (["x-own:", "nbd-server:x"], [], []),
    "unknown_leaf": (["base:nothing", "qemu:nothing", "qemu:dirty-bitmap:nothing"], [], []),
    "no_colon": (["base"], [], []),
    "empty": ([""], [], []),
    "prefix_of_a_name": (["qemu:dirty-bitmap:dai"], [], []),
    "case_matters": (["BASE:allocation"], [], []),
}


@pytest.mark.parametrize(("queries", "listed", "selected"), CASES.values(), ids=CASES.keys())
def test_matches(queries: list[str], listed: list[str], selected: list[str]) -> None:
    parsed = [Query.parse(query) for query in queries]
    assert matches(parsed, NAMES, listing=True) == listed
    assert matches(parsed, NAMES, listing=False) == selected


def test_many_queries_on_many_names_take_one_pass_each() -> None:
    names = [f"qemu:dirty-bitmap:{i}" for i in range(65535)]
    queries = [Query.parse(name) for name in reversed(names)]
    assert matches(queries, names, listing=False) == names
