"""The text for Prometheus, read by the library's own parser: what it says is what was done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbdbm import __version__
from nbdbm.client import NbdClient
from nbdbm.metrics import BitmapFigures, CacheFigures
from nbdbm.server import exposition, turns
from nbdbm.server.exposition import AT_ONCE, LOOKED_AT, MAX_BITMAPS, Exposition, totals
from nbdbm.server.server import Server
from tests.server.memimage import MemoryImage
from tests.server.running import running, until

TIMEOUT = 30

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Series:
    """Every sample, each once."""
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(series: Series, name: str, **labels: str) -> float | None:
    return series.get((name, frozenset(labels.items())))


async def scraped(server: Server) -> Series:
    page = await Exposition(server).pages["/metrics"]()
    assert page.status == 200 and page.kind.startswith("text/plain; version=")
    return parsed(page.content.decode())


async def settled(server: Server) -> None:
    deadline = time.monotonic() + TIMEOUT
    while server.connections:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_counts_before_and_after_the_connection_ends(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(MemoryImage(bytes(1 << 20)), tmp_path, name="disk") as (server, path):
            assert value(await scraped(server), "nbdbm_requests_total", export="disk", command="read") == 0
            client = await NbdClient.connect(f"nbd+unix:///disk?socket={path}")
            for at in range(7):
                await client.read(at * 4096, 4096)
            await client.flush()
            for _ in range(2):
                series = await scraped(server)
                for command, count, size in (("read", 7, 28672), ("flush", 1, 0), ("trim", 0, 0)):
                    labels = {"export": "disk", "command": command}
                    assert value(series, "nbdbm_requests_total", **labels) == count
                    assert value(series, "nbdbm_request_bytes_total", **labels) == size
                    assert value(series, "nbdbm_request_seconds_count", **labels) == (count or None)
                    infinite = value(series, "nbdbm_request_seconds_bucket", le="+Inf", **labels)
                    assert infinite == (count or None)
                assert value(series, "nbdbm_connections_total") == 1
                if value(series, "nbdbm_connections") == 0:
                    break
                assert value(series, "nbdbm_connection_ends_total", ended="goodbye") is None
                await client.close()
                await settled(server)
            assert value(series, "nbdbm_connection_ends_total", ended="goodbye") == 1
            assert value(series, "nbdbm_inflight_requests") == value(series, "nbdbm_inflight_bytes") == 0
            assert value(series, "nbdbm_info", version=__version__) == 1
            assert value(series, "nbdbm_connections_refused_total") == 0

    asyncio.run(main())


def test_the_histogram(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(MemoryImage(bytes(4096)), tmp_path) as (server, _):
            read = server.metrics.export("").commands["read"]
            for nanoseconds in (0, 1023, 1024, 5000, 10**9, 2**40):
                read.record(1, 0, nanoseconds)
            read.fail("EIO")
            read.refuse("EINVAL")
            series = await scraped(server)
            buckets = {
                dict(labels)["le"]: found
                for (name, labels), found in series.items()
                if name == "nbdbm_request_seconds_bucket"
            }
            assert buckets["1.024e-06"] == 2 and buckets["4.096e-06"] == 3 and buckets["1.6384e-05"] == 4
            assert buckets["17.179869184"] == 5 and buckets["+Inf"] == 6
            counts = [buckets[le] for le in sorted(buckets, key=float)]
            assert counts == sorted(counts) and len(counts) == 14
            labels = {"export": "", "command": "read"}
            assert value(series, "nbdbm_request_seconds_sum", **labels) == read.nanoseconds / 1e9
            assert value(series, "nbdbm_request_errors_total", error="EIO", **labels) == 1
            assert value(series, "nbdbm_request_errors_total", error="EINVAL", **labels) == 1
            assert value(series, "nbdbm_requests_total", **labels) == 7

    asyncio.run(main())


class Figured(MemoryImage):
    """An image that says these things of itself."""

    bitmaps = (
        BitmapFigures('a"\n\\', "in use", True, 65536, 131072),
        BitmapFigures("b", "inconsistent", False, 65536, None),
        BitmapFigures("c", "refused", False, 65536, None),
    )
    caches = (CacheFigures("tables", 10, 2, 4096),)


def test_bitmaps_and_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running(Figured(bytes(4096)), tmp_path, name="disk") as (server, _):
            series = await scraped(server)
            assert value(series, "nbdbm_bitmap_dirty_bytes", export="disk", bitmap='a"\n\\') == 131072
            assert value(series, "nbdbm_bitmap_dirty_bytes", export="disk", bitmap="b") is None
            assert value(series, "nbdbm_bitmap_state", export="disk", bitmap="b", state="inconsistent") == 1
            assert value(series, "nbdbm_bitmap_state", export="disk", bitmap="c", state="refused") == 1
            assert value(series, "nbdbm_bitmaps_inconsistent", export="disk") == 1
            assert value(series, "nbdbm_cache_hits_total", export="disk", cache="tables") == 10
            assert value(series, "nbdbm_cache_misses_total", export="disk", cache="tables") == 2
            monkeypatch.setattr(exposition, "MAX_BITMAPS", 1)
            series = await scraped(server)
            assert sum(name == "nbdbm_bitmap_state" for name, _ in series) == 1
            assert value(series, "nbdbm_bitmaps_inconsistent", export="disk") == 1

    asyncio.run(main())


def test_many_exports_are_not_all_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "MAX_EXPORTS", 3)

    async def main() -> None:
        async with running(MemoryImage(bytes(4096)), tmp_path) as (server, _):
            for number in range(5):
                server.metrics.export(str(number)).commands["read"].record(1, 0, 1)
            assert [name for name, _ in totals(server)] == ["0", "1", "2"]

    asyncio.run(main())


def test_the_text_is_the_same_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running(Figured(bytes(4096)), tmp_path) as (server, _):
            for number in range(5):
                server.metrics.export(str(number)).commands["read"].record(number + 1, 0, 1)
            pages = Exposition(server).pages
            whole = (await pages["/metrics"]()).content
            monkeypatch.setattr(exposition, "AT_ONCE", 7)
            assert (await pages["/metrics"]()).content == whole
            assert whole.count(b"# TYPE nbdbm_request_seconds histogram") == 1

    asyncio.run(main())


def test_those_who_wait_get_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    text = Exposition.text

    def counted(self: Exposition) -> Iterator[bytes]:
        nonlocal made
        made += 1
        return text(self)

    async def main() -> None:
        async with running(MemoryImage(bytes(4096)), tmp_path) as (server, _):
            page = Exposition(server).pages["/metrics"]
            first = asyncio.ensure_future(page())
            await until(lambda: made > 0)
            others = [asyncio.ensure_future(page()) for _ in range(20)]
            await asyncio.sleep(0)
            others.pop().cancel()
            pages = await asyncio.wait_for(asyncio.gather(first, *others), TIMEOUT)
            assert made == 2 and len({id(each.content) for each in pages[1:]}) == 1

    monkeypatch.setattr(Exposition, "text", counted)
    monkeypatch.setattr(turns, "TURN", 0.0)  # each step is a turn
    asyncio.run(main())


def test_no_step_makes_much(tmp_path: Path) -> None:
    """Of many exports and of many bitmaps: others get their turn between two steps."""

    class Spoilt(MemoryImage):
        bitmaps = tuple(
            BitmapFigures(f"b{number}", "inconsistent", False, 65536, None) for number in range(65535)
        )

    async def main() -> None:
        async with running(Spoilt(bytes(4096)), tmp_path, name="disk") as (server, _):
            for number in range(300):
                server.metrics.export(str(number)).commands["read"].record(1, 0, 1)
            steps = list(Exposition(server).text())
            assert max(step.count(b"\n") for step in steps) < AT_ONCE + 200, "and those of one export"
            assert len(steps) > 300 * 6 + 65535 // LOOKED_AT
            series = parsed(b"".join(steps).decode())
            assert value(series, "nbdbm_bitmaps_inconsistent", export="disk") == 65535
            assert sum(name == "nbdbm_bitmap_state" for name, _ in series) == MAX_BITMAPS

    asyncio.run(main())


def test_health(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(MemoryImage(bytes(4096)), tmp_path) as (server, _):
            health = Exposition(server).pages["/healthz"]
            assert (await health()).status == 200
            await server.close()
            assert (await health())[:2] == (503, b"stopping\n")
            assert (await Exposition(Server(server.registry)).pages["/healthz"]())[:2] == (503, b"starting\n")

    asyncio.run(main())
