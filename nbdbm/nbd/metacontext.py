"""Metadata contexts: how a client's queries select from the names an export has.

Two namespaces are known, ``base`` (the specification's) and ``qemu`` (docs/interop/nbd.txt). A query in
any other is ignored, never an error ("Metadata querying").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from nbdbm.nbd.constants import CONTEXT_BITMAP

WILDCARDS = ("base:", "qemu:", CONTEXT_BITMAP)
"""Queries with an empty leaf. They list all that begins with them; they select nothing."""


class MetaContext(NamedTuple):
    """A context as one connection knows it."""

    id: int
    name: str


class Query(NamedTuple):
    """One query string."""

    text: str
    wildcard: bool

    @classmethod
    def parse(cls, text: str) -> Query:
        return cls(text, text in WILDCARDS)


def matches(queries: Iterable[Query], names: Sequence[str], *, listing: bool) -> list[str]:
    """The names that any query asks for, each once, in the order of ``names``."""
    return list(filter(selector(queries, listing=listing), names))


def selector(queries: Iterable[Query], *, listing: bool) -> Callable[[str], bool]:
    """Whether any query asks for a name.

    Exact names match in both options, wildcards only when ``listing``. The queries are gone through once,
    and for a name it does not matter how many there are: names may be 65535.
    """
    exact: set[str] = set()
    prefixes: set[str] = set()
    for query in queries:
        if not query.wildcard:
            exact.add(query.text)
        elif listing:
            prefixes.add(query.text)
    if not prefixes:
        return exact.__contains__
    starts = tuple(prefixes)
    return lambda name: name in exact or name.startswith(starts)
