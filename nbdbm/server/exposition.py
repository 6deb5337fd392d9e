"""What a server has counted, as text for Prometheus; imported only where that is wanted.

Labels are names of ours (exports, commands, errors, endings) and of bitmaps, and nothing that clients choose.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import islice

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from nbdbm import __version__
from nbdbm.exports import Export
from nbdbm.metrics import Tally, total
from nbdbm.server.responder import Page, Pages
from nbdbm.server.server import Server

MAX_EXPORTS = 1000
"""Exports with series of their own; the rest is counted in nbdbm_exports_unlisted. A hundred lines each."""

MAX_BITMAPS = 100
"""Bitmaps of one export with series of their own; an image may have 65535."""

EDGES = tuple(range(10, 36, 2))
"""Edges of the histogram: 2^k nanoseconds, that is, a microsecond, four, sixteen ... to 17 seconds."""

AT_ONCE = 1000
"""Samples made into text in one turn of the event loop: a few milliseconds."""

SHARE = 4
"""How many times as long as it took to make the text no other is made: the exports come first."""


def totals(server: Server) -> dict[str, Tally]:
    """What was done with each export: by connections that have ended, and by those that have not."""
    parts = {name: [tally] for name, tally in server.metrics.exports.items()}
    for slot in server.registry.slots():
        parts.setdefault(slot.source.name, [])
    for client in server.clients:
        if client.account.export is not None and client.account.tally is not None:
            parts.setdefault(client.account.export, []).append(client.account.tally)
    return {
        name: tallies[0] if len(tallies) == 1 else total(tallies)
        for name, tallies in islice(parts.items(), MAX_EXPORTS)
    }


class Exposition:
    """The pages of one server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._turn = asyncio.Lock()

    @property
    def pages(self) -> Pages:
        return {"/metrics": self._metrics, "/healthz": self._health}

    async def _health(self) -> Page:
        if self._server.serving:
            return Page(200, b"serving\n")
        return Page(503, b"stopping\n" if self._server.closing else b"starting\n")

    async def _metrics(self) -> Page:
        """The text, made piece by piece, so that requests are answered in between."""
        async with self._turn:
            spent = 0.0
            parts = []
            began = time.monotonic()
            for part in (part for family in self.families() for part in _pieces(family)):
                parts.append(part)
                spent += time.monotonic() - began
                await asyncio.sleep(0)
                began = time.monotonic()
            await asyncio.sleep(min(spent * SHARE, 1.0))
        return Page(200, b"".join(parts), CONTENT_TYPE_LATEST)

    def families(self) -> Iterator[Metric]:
        """Everything, looked at when it is asked for."""
        yield from self._of_the_server()
        yield from _of_requests(totals(self._server))
        yield from self._of_images()

    def _of_the_server(self) -> Iterator[Metric]:
        server, metrics = self._server, self._server.metrics
        info = InfoMetricFamily("nbdbm", "This server")
        info.add_metric([], {"version": __version__})
        yield info
        clients = list(server.clients)
        running, held = sum(each.running for each in clients), sum(each.held for each in clients)
        yield GaugeMetricFamily("nbdbm_connections", "Clients connected now", len(clients))
        yield GaugeMetricFamily("nbdbm_inflight_requests", "Requests received and not answered", running)
        yield GaugeMetricFamily("nbdbm_inflight_bytes", "Memory of these and of unsent replies", held)
        yield CounterMetricFamily("nbdbm_connections", "Clients let in", metrics.accepted)
        yield CounterMetricFamily("nbdbm_connections_refused", "Clients not let in", metrics.refused)
        ends = CounterMetricFamily("nbdbm_connection_ends", "Connections by how they ended", labels=["ended"])
        for ending, count in metrics.ends.items():
            ends.add_metric([ending], count)
        yield ends

    def _of_images(self) -> Iterator[Metric]:
        """Those that are open now."""
        dirty = GaugeMetricFamily(
            "nbdbm_bitmap_dirty_bytes", "Bytes in dirty granules", labels=["export", "bitmap"]
        )
        state = GaugeMetricFamily(
            "nbdbm_bitmap_state", "1 for the state it is in", labels=["export", "bitmap", "state"]
        )
        bad = GaugeMetricFamily(
            "nbdbm_bitmaps_inconsistent", "Bitmaps that a crash has spoilt", labels=["export"]
        )
        hits = CounterMetricFamily("nbdbm_cache_hits", "Found in a cache", labels=["export", "cache"])
        misses = CounterMetricFamily("nbdbm_cache_misses", "Not found in a cache", labels=["export", "cache"])
        slots = list(self._server.registry.slots())
        unlisted = len(slots) - MAX_EXPORTS
        yield GaugeMetricFamily("nbdbm_exports_unlisted", "Exports beyond those listed", max(0, unlisted))
        for slot in slots[:MAX_EXPORTS]:
            name = slot.source.name
            if slot.export is not None:
                _of_bitmaps(name, slot.export, dirty, state, bad)
                for cache in slot.export.caches:
                    hits.add_metric([name, cache.name], cache.hits)
                    misses.add_metric([name, cache.name], cache.misses)
        yield from (dirty, state, bad, hits, misses)


def _pieces(family: Metric) -> Iterator[bytes]:
    """The text of one family, a part of its samples at a time."""
    samples = family.samples
    for start in range(0, max(len(samples), 1), AT_ONCE):
        family.samples = samples[start : start + AT_ONCE]
        text = generate_latest(_Only(family))
        # Its name, type and meaning are said once.
        yield text if start == 0 else text.split(b"\n", 2)[2]


class _Only:
    """One family, as the library's registries give theirs."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> list[Metric]:
        return [self._family]


def _of_requests(tallies: dict[str, Tally]) -> Iterator[Metric]:
    names = ["export", "command"]
    requests = CounterMetricFamily("nbdbm_requests", "Requests answered, well or not", labels=names)
    volume = CounterMetricFamily(
        "nbdbm_request_bytes", "Bytes of the ranges of those that succeeded", labels=names
    )
    errors = CounterMetricFamily("nbdbm_request_errors", "Requests that failed", labels=[*names, "error"])
    seconds = HistogramMetricFamily("nbdbm_request_seconds", "How long carrying them out took", labels=names)
    at_once = CounterMetricFamily(
        "nbdbm_requests_at_once",
        "Of these, answered by the fast path, which asks no cache",
        labels=["export"],
    )
    for export, tally in tallies.items():
        at_once.add_metric([export], tally.at_once)
        for command, figures in tally.commands.items():
            requests.add_metric([export, command], figures.operations)
            volume.add_metric([export, command], figures.bytes)
            for error, count in figures.errors.items():
                errors.add_metric([export, command, error], count)
            if not figures.operations:
                continue  # many commands are never used, and it would be fifteen lines for each
            edges = [(repr(2**edge / 1e9), float(sum(figures.buckets[: edge + 1]))) for edge in EDGES]
            edges.append(("+Inf", float(sum(figures.buckets))))
            seconds.add_metric([export, command], edges, figures.nanoseconds / 1e9)
    yield from (requests, at_once, volume, errors, seconds)


def _of_bitmaps(
    name: str, export: Export, dirty: GaugeMetricFamily, state: GaugeMetricFamily, bad: GaugeMetricFamily
) -> None:
    bitmaps = export.bitmaps
    bad.add_metric([name], sum(each.state == "inconsistent" for each in bitmaps))
    for bitmap in bitmaps[:MAX_BITMAPS]:
        state.add_metric([name, bitmap.name, bitmap.state], 1)
        if bitmap.dirty is not None:
            dirty.add_metric([name, bitmap.name], bitmap.dirty)
