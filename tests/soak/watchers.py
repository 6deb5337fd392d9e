"""Those who watch the server of the soak test: scrapes of its metrics, its status, and its certificate."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import ssl

from prometheus_client.parser import text_string_to_metric_families

from nbdbm.client import NbdClient
from tests.soak.world import SECRET, STATIC, World, outcome
from tests.support import qemu, servers


class Watcher:
    """Follows the counters of one server after the other: none of them ever falls."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._seen: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._served = 0

    async def scrape(self) -> None:
        """Metrics over HTTP, by an outside parser; some scrapers leave in the middle."""
        world, rng = self._world, self._world.rng
        reader, writer = await asyncio.open_connection("127.0.0.1", world.metrics_port)
        try:
            path = rng.choice(["/metrics"] * 4 + ["/healthz", "/nothing"])
            writer.write(f"GET {path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n\r\n".encode())
            if rng.random() < 0.1:
                await reader.readline()
                writer.transport.abort()
                return
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        if not head:
            raise ConnectionError("a scrape without an answer")
        status = int(head.split()[1])
        # Health is 503 once the server ends, and that it may at any time.
        assert status in {"/metrics": (200,), "/healthz": (200, 503), "/nothing": (404,)}[path], head
        if path == "/metrics":
            self._judge(body.decode())
            world.counts["scrapes"] += 1

    def _judge(self, text: str) -> None:
        if self._served != self._world.served:
            self._served, self._seen = self._world.served, {}
        found = {}
        for family in text_string_to_metric_families(text):
            # Those of caches begin anew with each opening of their image.
            if family.type == "counter" and not family.name.startswith("nbdbm_cache"):
                for sample in family.samples:
                    found[sample.name, frozenset(sample.labels.items())] = sample.value
        assert any(name == "nbdbm_requests_total" for name, _ in found), text[:2000]
        for key, value in found.items():
            before = self._seen.get(key, 0)
            assert value >= before, f"{key} has fallen from {before} to {value}"
        self._seen |= found

    async def ask(self) -> None:
        """``nbdbm status``, as a person or a program would."""
        world = self._world
        as_json = world.rng.random() < 0.7
        changes, ends = [disk.changes for disk in world.disks], world.changes
        status, said = await outcome((*servers.NBDBM, "status", str(world.control), *["--json"] * as_json))
        assert "Traceback" not in said, said
        if status:
            raise qemu.ToolFailed(f"nbdbm status: {said}")
        if not world.up.is_set() or world.changes != ends:
            return  # it may have been about to end, and have no exports left
        if as_json:
            found = {export["name"]: export for export in json.loads(said)["exports"]}
            assert found[STATIC]["mode"] == "read-only", said
            for disk, before in zip(world.disks, changes, strict=True):
                if not disk.offered or disk.excused(before):
                    continue
                # One that was found in a directory is known while it is open.
                assert disk.name in found or disk.path.stem == "found", said
                if disk.name in found:
                    self._judge_bitmaps(disk.name, found[disk.name]["bitmaps"])
        else:
            assert STATIC in said
        world.counts["nbdbm status"] += 1

    @staticmethod
    def _judge_bitmaps(name: str, bitmaps: list[dict[str, object]] | None) -> None:
        for each in bitmaps or ():
            usable = each["name"] != "broken"
            assert (each["state"] == "inconsistent") != usable, f"{name}: {each}"
            assert each["recording"] == usable, f"{name}: {each}"


async def pester(world: World) -> None:
    """Somebody who talks nonsense to the metrics and the control socket. Raises OSError."""
    rng = random.Random(world.rng.random())
    if rng.random() < 0.5:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.metrics_port)
    else:
        reader, writer = await asyncio.open_unix_connection(str(world.control))
    try:
        writer.write(
            rng.choice([b"", b"GET ", b"\0" * 100_000, rng.randbytes(300), b'{"execute": []}\n' * 999])
        )
        async with asyncio.timeout(rng.random()):
            await reader.read(100)
    finally:
        writer.transport.abort()


# -- the certificate


async def shown(world: World) -> bytes:
    """The certificate that a client sees who comes now."""
    async with await NbdClient.connect(world.uri(SECRET, tls=True)) as client:
        assert client._link._tunnel is not None
        certificate = client._link._tunnel.tls.getpeercert(True)
        assert certificate is not None
        return certificate


async def renew(world: World) -> None:
    """A new certificate: those who come after the reload see it, and those who are there stay."""
    async with await NbdClient.connect(world.uri(SECRET, tls=True)) as client:
        before = await shown(world)
        await asyncio.to_thread(world.pki.authority.issue, "server", world.certificates)
        await world.reload()
        assert await client.read(0, 65536) == world.content[:65536]
    after = ssl.PEM_cert_to_DER_cert((world.certificates / "server-cert.pem").read_text())
    assert await shown(world) == after != before, "what is shown is not the one in the file"
    world.counts["certificates renewed"] += 1


async def spoil(world: World) -> None:
    """A key that belongs to another certificate: TLS goes on with what it has."""
    complaint = "TLS goes on with what it has"
    count = world.said().count(complaint)
    before = await shown(world)
    key = world.certificates / "server-key.pem"
    kept = key.with_suffix(".kept")
    shutil.copy2(key, kept)
    shutil.copy2(world.pki.client / "client-key.pem", key)
    await world.reload()
    assert world.said().count(complaint) > count
    assert await shown(world) == before
    os.replace(kept, key)
    await world.reload()
    assert world.said().count(complaint) == count + 1
    world.counts["certificates refused"] += 1
