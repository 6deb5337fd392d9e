"""What a server has counted, as text for Prometheus; imported only where that is wanted.

Labels are names of ours (exports, commands, errors, endings) and of bitmaps, and nothing that clients choose.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily as Counter
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import HistogramMetricFamily as Histogram
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from nbdbm import __version__
from nbdbm.exports import Export
from nbdbm.metrics import BitmapFigures, CacheFigures, Tally
from nbdbm.server.account import Totals
from nbdbm.server.responder import Page, Pages
from nbdbm.server.server import Server
from nbdbm.server.turns import Turns

MAX_EXPORTS = 1000
"""Exports with series of their own; the rest is counted in nbdbm_exports_unlisted. A hundred lines each."""

MAX_BITMAPS = 100
"""Bitmaps of one export with series of their own; an image may have 65535."""

EDGES = tuple(range(10, 36, 2))
"""Edges of the histogram: 2^k nanoseconds, that is, a microsecond, four, sixteen ... to 17 seconds."""

AT_ONCE = 200
"""Samples made into text in one step: about a millisecond."""

LOOKED_AT = 500
"""Bitmaps looked at in one step."""

SHARE = 4
"""How many times as long as it took to make the text no other is made: the exports come first."""

M = TypeVar("M", bound=Metric)
T = TypeVar("T")

PER_EXPORT = ("export",)
PER_COMMAND = ("export", "command")
PER_BITMAP = ("export", "bitmap")
PER_CACHE = ("export", "cache")

STEP = b""
"""No text yet, but time for others."""


def totals(server: Server) -> Iterator[tuple[str, Tally]]:
    """What was done with each export, those first that were used."""
    names = chain(list(server.metrics.exports), [slot.source.name for slot in server.registry.slots()])
    sums = Totals(server.metrics, [client.account for client in server.clients])
    for name in islice(dict.fromkeys(names), MAX_EXPORTS):
        yield name, sums.of(name)[0]


class Exposition:
    """The pages of one server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[Page] | None = None
        """Makes the text for all who have asked since the last one was begun."""
        self._not_before = 0.0
        """When the next one may be begun, on the loop's clock."""

    @property
    def pages(self) -> Pages:
        return {"/metrics": self._metrics, "/healthz": self._health}

    async def _health(self) -> Page:
        if self._server.serving:
            return Page(200, b"serving\n")
        return Page(503, b"stopping\n" if self._server.closing else b"starting\n")

    async def _metrics(self) -> Page:
        """The text; who asks while one is being made gets the next one, together with all others who do."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._make())
        return await asyncio.shield(self._next)  # one may give up while others wait for it

    async def _make(self) -> Page:
        """Make the text step by step, so that requests are answered in between."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            await asyncio.sleep(self._not_before - loop.time())
            self._next = None  # who asks from now on wants a newer one
            turns = Turns()
            parts = []
            for part in self.text():
                if part:
                    parts.append(part)
                await turns.step()
            self._not_before = loop.time() + min(turns.spent * SHARE, 1.0)
        return Page(200, b"".join(parts), CONTENT_TYPE_LATEST)

    def text(self) -> Iterator[bytes]:
        """Everything in small steps, each thing as it is when its turn comes."""
        yield from map(_text, self._of_the_server())
        used = []
        for each in totals(self._server):
            used.append(each)
            yield STEP
        yield from _in_steps(
            Counter("nbdbm_requests", "Requests answered, well or not", labels=PER_COMMAND), used, _requests
        )
        yield from _in_steps(
            Counter(
                "nbdbm_requests_at_once",
                "Of these, answered by the fast path, which asks no cache",
                labels=PER_EXPORT,
            ),
            used,
            _at_once,
        )
        yield from _in_steps(
            Counter("nbdbm_request_bytes", "Bytes of the ranges of those that succeeded", labels=PER_COMMAND),
            used,
            _bytes,
        )
        yield from _in_steps(
            Counter("nbdbm_request_errors", "Requests that failed", labels=(*PER_COMMAND, "error")),
            used,
            _errors,
        )
        yield from _in_steps(
            Histogram("nbdbm_request_seconds", "How long carrying them out took", labels=PER_COMMAND),
            used,
            _seconds,
        )
        slots = list(self._server.registry.slots())
        beyond = max(0, len(slots) - MAX_EXPORTS)
        yield _text(Gauge("nbdbm_exports_unlisted", "Exports beyond those listed", beyond))
        open_now = [
            (slot.source.name, slot.export) for slot in slots[:MAX_EXPORTS] if slot.export is not None
        ]
        yield from _in_steps(
            Gauge("nbdbm_bitmap_dirty_bytes", "Bytes in dirty granules", labels=PER_BITMAP),
            _bitmaps(open_now),
            _dirty,
        )
        yield from _in_steps(
            Gauge("nbdbm_bitmap_state", "1 for the state it is in", labels=(*PER_BITMAP, "state")),
            _bitmaps(open_now),
            _state,
        )
        yield from _in_steps(
            Gauge("nbdbm_bitmaps_inconsistent", "Bitmaps that a crash has spoilt", labels=PER_EXPORT),
            _inconsistent(open_now),
            _count,
        )
        yield from _in_steps(
            Counter("nbdbm_cache_hits", "Found in a cache", labels=PER_CACHE), _caches(open_now), _hits
        )
        yield from _in_steps(
            Counter("nbdbm_cache_misses", "Not found in a cache", labels=PER_CACHE),
            _caches(open_now),
            _misses,
        )

    def _of_the_server(self) -> Iterator[Metric]:
        server, metrics = self._server, self._server.metrics
        info = InfoMetricFamily("nbdbm", "This server")
        info.add_metric([], {"version": __version__})
        yield info
        clients = list(server.clients)
        running, held = sum(each.running for each in clients), sum(each.held for each in clients)
        yield Gauge("nbdbm_connections", "Clients connected now", len(clients))
        yield Gauge("nbdbm_inflight_requests", "Requests received and not answered", running)
        yield Gauge("nbdbm_inflight_bytes", "Memory of these and of unsent replies", held)
        yield Counter("nbdbm_connections", "Clients let in", metrics.accepted)
        yield Counter("nbdbm_connections_refused", "Clients not let in", metrics.refused)
        ends = Counter("nbdbm_connection_ends", "Connections by how they ended", labels=["ended"])
        for ending, count in metrics.ends.items():
            ends.add_metric([ending], count)
        yield ends


def _in_steps(family: M, items: Iterable[T | None], add: Callable[[M, T], object]) -> Iterator[bytes]:
    """The text of a family; ``add`` gives it samples for an item. None among them is a step without one."""
    begun = False
    for item in items:
        if item is not None:
            add(family, item)
        if len(family.samples) < AT_ONCE:
            yield STEP
            continue
        yield _text(family, go_on=begun)
        family.samples = []
        begun = True
    if family.samples or not begun:
        yield _text(family, go_on=begun)


def _text(family: Metric, *, go_on: bool = False) -> bytes:
    text = generate_latest(_Only(family))
    # Its name, type and meaning are said once.
    return text.split(b"\n", 2)[2] if go_on else text


class _Only:
    """One family, as the library's registries give theirs."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> list[Metric]:
        return [self._family]


# -- of requests: an item is an export's name and Tally

Used = tuple[str, Tally]


def _requests(family: Counter, used: Used) -> None:
    name, tally = used
    for command, figures in tally.commands.items():
        family.add_metric([name, command], figures.operations)


def _at_once(family: Counter, used: Used) -> None:
    name, tally = used
    family.add_metric([name], tally.at_once)


def _bytes(family: Counter, used: Used) -> None:
    name, tally = used
    for command, figures in tally.commands.items():
        family.add_metric([name, command], figures.bytes)


def _errors(family: Counter, used: Used) -> None:
    name, tally = used
    for command, figures in tally.commands.items():
        for error, count in figures.errors.items():
            family.add_metric([name, command, error], count)


def _seconds(family: Histogram, used: Used) -> None:
    name, tally = used
    for command, figures in tally.commands.items():
        if not figures.operations:
            continue  # many commands are never used, and it would be fifteen lines for each
        edges = [(repr(2**edge / 1e9), float(sum(figures.buckets[: edge + 1]))) for edge in EDGES]
        edges.append(("+Inf", float(sum(figures.buckets))))
        family.add_metric([name, command], edges, figures.nanoseconds / 1e9)


# -- of images: those that are open now

Open = list[tuple[str, Export]]


def _bitmaps(exports: Open) -> Iterator[tuple[str, BitmapFigures]]:
    for name, export in exports:
        bitmaps = export.bitmaps
        for index in range(min(len(bitmaps), MAX_BITMAPS)):
            yield name, bitmaps[index]


def _dirty(family: Gauge, item: tuple[str, BitmapFigures]) -> None:
    name, bitmap = item
    if bitmap.dirty is not None:
        family.add_metric([name, bitmap.name], bitmap.dirty)


def _state(family: Gauge, item: tuple[str, BitmapFigures]) -> None:
    name, bitmap = item
    family.add_metric([name, bitmap.name, bitmap.state], 1)


def _inconsistent(exports: Open) -> Iterator[tuple[str, int] | None]:
    """How many each has: all of them are looked at, which takes steps."""
    for name, export in exports:
        count = 0
        for number, bitmap in enumerate(export.bitmaps):
            count += bitmap.state == "inconsistent"
            if number % LOOKED_AT == LOOKED_AT - 1:
                yield None
        yield name, count


def _count(family: Gauge, item: tuple[str, int]) -> None:
    name, count = item
    family.add_metric([name], count)


def _caches(exports: Open) -> Iterator[tuple[str, CacheFigures]]:
    for name, export in exports:
        for cache in export.caches:
            yield name, cache


def _hits(family: Counter, item: tuple[str, CacheFigures]) -> None:
    name, cache = item
    family.add_metric([name, cache.name], cache.hits)


def _misses(family: Counter, item: tuple[str, CacheFigures]) -> None:
    name, cache = item
    family.add_metric([name, cache.name], cache.misses)
