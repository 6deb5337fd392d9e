"""``kill -9`` under load: the server, its clients, and what must be true of the image afterwards.

The disk is cut into lanes. In each lane one request follows the other; between lanes, and over several
connections, everything overlaps, and lanes meet in the middle of clusters. So it is known of every sector
which contents it may have: the last one that was flushed, or any written since.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from nbdbm.client import NbdClient
from nbdbm.errors import NbdError
from tests.support import qemu, servers

SECTOR = 512
START_TIMEOUT = 30


@dataclass(slots=True)
class Op:
    """A request that changes ``data`` at ``offset`` of its lane."""

    offset: int
    data: bytes
    fua: bool = False
    answered: bool = False


@dataclass(slots=True)
class Lane:
    """Part of the disk in which requests follow one another."""

    start: int
    durable: bytearray
    """The content at the last flush."""
    ops: list[Op] = field(default_factory=list)
    """What was asked for since then, in order; the last one may be unanswered."""

    @property
    def done(self) -> int:
        """Ops that have been answered."""
        return len(self.ops) - (bool(self.ops) and not self.ops[-1].answered)

    def flushed(self, count: int) -> None:
        """The first ``count`` ops are on stable storage now."""
        for op in self.ops[:count]:
            self.durable[op.offset : op.offset + len(op.data)] = op.data
        del self.ops[:count]

    def lost(self, found: bytes) -> list[int]:
        """Offsets on the disk of sectors whose content nobody may have left there."""
        state = bytearray(self.durable)
        bad = {
            at for at in range(0, len(state), SECTOR) if state[at : at + SECTOR] != found[at : at + SECTOR]
        }
        for op in self.ops:
            end = op.offset + len(op.data)
            state[op.offset : end] = op.data
            for at in range(op.offset // SECTOR * SECTOR, end, SECTOR):
                if state[at : at + SECTOR] == found[at : at + SECTOR]:
                    bad.discard(at)
                elif op.fua and op.answered and op.offset <= at and at + SECTOR <= end:
                    bad.add(at)  # what came before is no longer permitted
        return sorted(self.start + at for at in bad)


class Server:
    """``nbdbm serve`` on a socket path that stays the same through all its deaths."""

    def __init__(self, image: Path, socket: Path, *options: object) -> None:
        self.socket = socket
        self._log = socket.with_suffix(".log")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*servers.NBDBM, "serve", "-k", str(socket), *map(str, options), str(image)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=qemu.environment(),
            )

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def said(self) -> str:
        return self._log.read_text(errors="backslashreplace")

    async def ready(self) -> None:
        """Until it has printed its URI: from then on it can be connected to."""
        deadline = time.monotonic() + START_TIMEOUT
        while self.uri not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            await asyncio.sleep(0.01)

    def kill(self) -> None:
        """The end that nobody can prepare for."""
        self.process.kill()
        self.process.wait()


class Load:
    """Clients that write, zero, trim, flush and read back until the server is gone."""

    def __init__(self, content: bytes, lanes: int, rng: random.Random) -> None:
        self.rng = rng
        self.before = content
        self.size = len(content)
        # Lanes meet on sectors, but hardly ever on clusters.
        cuts = sorted(rng.sample(range(1, self.size // SECTOR), lanes - 1))
        edges = [0, *(cut * SECTOR for cut in cuts), self.size]
        self.lanes = [Lane(start, bytearray(content[start:end])) for start, end in pairwise(edges)]
        self.touched: list[tuple[int, int]] = []
        """The ranges of requests that were answered."""
        self.flushes = 0
        self.requests = 0
        self.resting = False
        """Lanes and flushers are to end where they are."""

    async def run(self, uri: str, connections: int) -> None:
        """Returns when the connections are lost."""
        clients = [await NbdClient.connect(uri, timeout=20) for _ in range(connections)]
        tasks = [self._lane(clients[n % connections], lane) for n, lane in enumerate(self.lanes)]
        tasks += [self._flusher(client) for client in clients[:2]]
        try:
            await asyncio.gather(*tasks)
        finally:
            for client in clients:
                await client.close()

    async def _lane(self, client: NbdClient, lane: Lane) -> None:
        number = 0
        try:
            while not self.resting:
                number += 1
                await self._request(client, lane, number)
                self.requests += 1
        except NbdError as error:
            assert "refused" not in str(error), error

    async def _request(self, client: NbdClient, lane: Lane, number: int) -> None:
        rng, width = self.rng, len(lane.durable)
        unit = rng.choice([1, SECTOR, 4096])
        length = max(1, min(width, int(rng.expovariate(1 / 20_000))))
        offset = rng.randrange(0, width - length + 1) // unit * unit
        fua = rng.random() < 0.05
        kind = rng.choice(["write"] * 5 + ["zeroes", "trim"])
        if kind == "write":
            stamp = b"%08x %08x " % (lane.start, rng.getrandbits(32))
            op = Op(offset, (stamp * (length // len(stamp) + 1))[:length], fua)
        else:
            op = Op(offset, bytes(length), fua and kind == "zeroes")
        at = lane.start + offset
        lane.ops.append(op)
        self.asked(at, length)
        if kind == "write":
            await client.write(at, op.data, fua=fua)
        elif kind == "zeroes":
            await client.write_zeroes(at, length, fua=fua, no_hole=rng.random() < 0.5)
        else:
            await client.trim(at, length)
        self.answered(at, length)
        if kind == "trim":
            # Zeroes or what was there: one of the two, and from now on it stays so.
            op.data = bytes(await client.read(at, length))
        op.answered = True
        if number % 10 == 0:
            state = bytearray(lane.durable)
            for done in lane.ops:
                state[done.offset : done.offset + len(done.data)] = done.data
            found = await client.read(lane.start, width)
            assert found == state, f"lane at {lane.start}: read back wrong"

    def asked(self, offset: int, length: int) -> None:
        """A request that changes this range is about to be sent."""

    def answered(self, offset: int, length: int) -> None:
        """It was carried out."""
        self.touched.append((offset, length))

    async def _flusher(self, client: NbdClient) -> None:
        try:
            while not self.resting:
                await asyncio.sleep(self.rng.random() * 0.03)
                # A flush covers what was answered before it was asked for, on any connection.
                before = [(lane, lane.done, list(lane.ops)) for lane in self.lanes]
                await client.flush()
                self.flushes += 1
                for lane, done, ops in before:
                    # The other flusher may have been here meanwhile.
                    covered = {id(op) for op in ops[:done]}
                    lane.flushed(sum(id(op) in covered for op in lane.ops))
        except NbdError:
            return

    def lost(self, content: bytes) -> list[int]:
        """Sectors that are neither what was flushed last nor anything written since."""
        return [
            at
            for lane in self.lanes
            for at in lane.lost(content[lane.start : lane.start + len(lane.durable)])
        ]

    def written(self, content: bytes, granularity: int) -> set[int]:
        """Granules that a bitmap must have: those of answered requests, and all that changed.

        A request without an answer may have come too late for the server.
        """
        found = {
            at // granularity
            for at in range(0, self.size, granularity)
            if content[at : at + granularity] != self.before[at : at + granularity]
        }
        for offset, length in self.touched:
            found.update(range(offset // granularity, -(-(offset + length) // granularity)))
        return found


def environment_rounds() -> int:
    """Rounds for each kind of image; long runs set more."""
    return int(os.environ.get("NBDBM_KILL_ROUNDS", "2"))
