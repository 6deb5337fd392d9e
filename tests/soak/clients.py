"""The clients of the soak test. Each works until the world is over; servers may go away at any time.

A client that loses its connection, or a tool that fails, has an excuse if a server ended or its export was
changed meanwhile. Without one, the test fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import struct
from collections.abc import Awaitable, Callable

from nbdbm.client import NbdClient
from nbdbm.errors import NbdError
from nbdbm.nbd.constants import CONTEXT_ALLOCATION, CONTEXT_DEPTH
from tests.server.rawclient import OPT_GO, READ, WRITE, request
from tests.soak import watchers
from tests.soak.disk import FAULT, SIZE, WILD, Disk
from tests.soak.world import GRACE, PATIENCE, SECRET, STATIC, TARGET, World, outcome
from tests.support import qemu

IHAVEOPT = b"IHAVEOPT"
OPT_STARTTLS = 5


async def forever(world: World, work: Callable[[], Awaitable[None]], pause: float) -> None:
    """``work`` again and again while servers serve; only an end of the server excuses its failures."""
    while not world.over:
        await world.up.wait()
        if world.over:
            return
        changes = world.changes
        try:
            # Not wait_for, which may lose a cancellation in Python 3.11.
            async with asyncio.timeout(PATIENCE):
                await work()
        except (NbdError, OSError, qemu.ToolFailed) as error:
            if isinstance(error, NbdError):
                assert not FAULT.search(str(error)), error
            if world.up.is_set() and world.changes == changes:
                # The end of the server may be noticed here before the test has said that it is to end.
                raise AssertionError(f"without any reason: {error!r}\n{world.said()[-2000:]}") from error
        await asyncio.sleep(world.rng.random() * pause)


async def write(world: World, disk: Disk) -> None:
    """Sessions of writing clients on one disk, one after the other."""
    rng = random.Random(f"{world.rng.random()}{disk.path}")
    on_demand = disk.path.stem in ("demand", "found")
    while not world.over:
        await world.up.wait()
        if world.over:
            return
        if not disk.offered:
            await asyncio.sleep(0.05)
            continue
        changes = disk.changes
        try:
            uri = world.uri(disk.name, tls=rng.random() < 0.3)
            await disk.session(uri, rng.uniform(0.3, 2) if on_demand else rng.uniform(1, 5))
        except (NbdError, OSError) as error:
            assert not FAULT.search(str(error)), error
            assert disk.excused(changes), f"{disk.name}: without any reason: {error}\n{world.said()[-2000:]}"
            await asyncio.sleep(0.05)
        # Long enough that what is opened on demand is closed, sometimes.
        await asyncio.sleep(rng.random() * (3 * GRACE if on_demand else 0.1))


async def read(world: World) -> None:
    """Reads, and block status, of the image that nobody writes to."""
    contexts = [CONTEXT_ALLOCATION, CONTEXT_DEPTH, "qemu:dirty-bitmap:since"]
    rng = random.Random(world.rng.random())
    tls = rng.random() < 0.5
    uri = world.uri(rng.choice([STATIC, SECRET]) if tls else STATIC, tls=tls)
    async with await NbdClient.connect(uri, contexts=contexts) as client:
        for _ in range(rng.randrange(1, 20)):
            pieces = [sorted((rng.randrange(SIZE), rng.randrange(SIZE))) for _ in range(4)]
            found = await asyncio.gather(*(client.read(a, b - a) for a, b in pieces if b > a))
            for (a, b), data in zip([p for p in pieces if p[1] > p[0]], found, strict=True):
                assert data == world.content[a:b], f"{STATIC}: {a}..{b} is wrong"
            answer = await client.block_status(0, SIZE)
            assert {sum(each.length for each in extents) for extents in answer.values()} == {SIZE}
            world.counts["reads by TLS" if tls else "reads"] += len(found)
            await asyncio.sleep(rng.random() * 0.1)


async def look(world: World) -> None:
    """Every context of some disk while it is written to, through a client of its own."""
    disk = world.rng.choice(world.disks)
    if not disk.offered:
        return
    changes = disk.changes
    try:
        await disk.look(world.uri(disk.name))
        world.counts["block status"] += 1
    except (NbdError, OSError) as error:
        if not disk.excused(changes):
            raise
        assert not FAULT.search(str(error)), error


# -- tools


async def run(world: World, *argv: object, tool: str) -> str:
    """Run one of QEMU's or libnbd's programs; ToolFailed if its status is not 0."""
    status, said = await outcome(qemu.SYSTEM.argv(tool, *argv))
    if status:
        raise qemu.ToolFailed(f"{tool} {' '.join(map(str, argv))}: status {status}\n{said}")
    world.counts[tool] += 1
    return said


async def copy_out(world: World) -> None:
    """nbdcopy, nbdinfo and qemu-img on the image that nobody writes to."""
    rng = world.rng
    uri = world.uri(STATIC)
    kind = rng.randrange(4)
    if kind == 0:
        place = world.place / "copy.raw"
        if rng.random() < 0.5:
            uri = world.uri(SECRET, tls=True)
            world.counts["nbdcopy by TLS"] += 1
        await run(world, uri, place, tool="nbdcopy")
        assert place.read_bytes() == world.content
    elif kind == 1:
        await run(world, "compare", "-f", "raw", "-F", "raw", uri, world.raw, tool="qemu-img")
    elif kind == 2:
        changes = [disk.changes for disk in world.disks]
        said = await run(world, "--json", uri, tool="nbdinfo")
        # It says nothing of contexts, and is content, if the server ends when it asks for them.
        if "qemu:dirty-bitmap:since" not in said:
            assert any(map(Disk.excused, world.disks, changes)), said
    else:
        changes = [disk.changes for disk in world.disks]
        try:
            # By TLS: it wants to know all about each that is listed.
            said = await run(world, "--list", world.uri("", tls=True), tool="nbdinfo")
        except qemu.ToolFailed:
            # It asks about each export that was listed, and one of them may be gone by then.
            if any(map(Disk.excused, world.disks, changes)):
                return
            raise
        assert all(f'export="{name}":' in said for name in (STATIC, SECRET, TARGET, "found.qcow2")), said


async def copy_in(world: World) -> None:
    """Fill an export as a whole, and look whether it holds that."""
    uri, rng = world.uri(TARGET), world.rng
    kind = rng.randrange(3)
    if kind == 0:
        await run(world, world.raw, uri, tool="nbdcopy")
    elif kind == 1:
        await run(world, "convert", "-n", "-f", "raw", "-O", "raw", world.raw, uri, tool="qemu-img")
    else:
        # It may wait for ever for a server that is gone; a job that is a process would outlive it then.
        said = await run(
            *(world, "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite"),
            *("--bsrange=512-64k", "--bs_unaligned=0", "--size=4m", "--io_size=1m", "--iodepth=8"),
            *("--fsync=32", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"),
            *(f"--randseed={rng.randrange(1 << 30)}", "--output-format=terse", "--thread"),
            tool="fio",
        )
        results = [line.split(";") for line in said.splitlines() if line.startswith("3;")]
        if not results or results[0][4] != "0":
            raise qemu.ToolFailed(said)
        return
    await run(world, "compare", "-f", "raw", "-F", "raw", uri, world.raw, tool="qemu-img")


async def write_by_tool(world: World) -> None:
    """qemu-io writes to the lane of some disk that is for tools."""
    disk = world.rng.choice(world.disks)

    async def write(offset: int, length: int, byte: int) -> bool:
        changes = disk.changes
        words = f"write -P {byte} {offset} {length}", "flush", f"read -P {byte} {offset} {length}"
        commands = [word for each in words for word in ("-c", each)]
        try:
            said = await run(world, "-f", "raw", *commands, world.uri(disk.name), tool="qemu-io")
            if re.search("failed|error", said, re.IGNORECASE):
                raise qemu.ToolFailed(said)
        except qemu.ToolFailed:
            # Who writes to it may not have noticed yet that it has been withdrawn.
            if disk.offered and not disk.excused(changes):
                raise
            return False
        return True

    await disk.by_tool(write)


# -- those who mean harm


async def not_for_everybody(world: World) -> None:
    """Without TLS there is nothing to be had of an export for clients with TLS."""
    try:
        client = await NbdClient.connect(world.uri(SECRET))
    except NbdError as error:
        if "TLS" not in str(error):
            raise
        world.counts["refused without TLS"] += 1
    else:
        await client.close()
        raise AssertionError(f"{SECRET} is served without TLS")


async def pester_or_not(world: World) -> None:
    with contextlib.suppress(OSError):
        await watchers.pester(world)


async def attack(world: World) -> None:
    """One hostile connection: whatever becomes of it, nothing becomes of the server."""
    rng = random.Random(world.rng.random())
    assert world.address is not None
    disk = rng.choice([disk for disk in world.disks if disk.offered])
    if world.address.socket:
        opening = asyncio.open_unix_connection(world.address.socket)
    else:
        opening = asyncio.open_connection("127.0.0.1", world.address.port)
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        reader, writer = await opening
        try:
            await rng.choice(ATTACKS)(rng, reader, writer, disk)
            world.counts["attacks"] += 1
            await asyncio.sleep(rng.random() * 0.2)
        finally:
            # At once, and without reading what has come: a reset.
            writer.transport.abort()


async def _go(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, disk: Disk) -> None:
    """Into transmission, with simple replies."""
    await reader.readexactly(18)
    name = disk.name.encode()
    data = struct.pack(">I", len(name)) + name + b"\0\0"
    writer.write(struct.pack(">I", 3) + IHAVEOPT + struct.pack(">II", OPT_GO, len(data)) + data)
    while True:
        _, _, kind, length = struct.unpack(">QIII", await reader.readexactly(20))
        await reader.readexactly(length)
        if kind == 1:
            return
        if kind & 1 << 31:
            raise ConnectionError("not offered just now")


async def _nothing(
    rng: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, disk: Disk
) -> None:
    """Connects, and says nothing."""


async def _garbage(
    rng: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, disk: Disk
) -> None:
    writer.write(rng.randbytes(rng.randrange(1, 5000)))


async def _garbage_after_the_greeting(
    rng: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, disk: Disk
) -> None:
    kind = rng.choice([1, 3, 6, 7, 8, 10, 11, 99])
    data = rng.randbytes(rng.randrange(200))
    writer.write(struct.pack(">I", 3) + IHAVEOPT + struct.pack(">II", kind, len(data)) + data)


async def _half_an_option(
    rng: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, disk: Disk
) -> None:
    writer.write(struct.pack(">I", 3) + IHAVEOPT + struct.pack(">II", OPT_GO, 1000) + b"x" * 10)


async def _garbage_in_transmission(
    rng: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, disk: Disk
) -> None:
    await _go(reader, writer, disk)
    # No accidental request: the magic is wrong from the beginning.
    writer.write(b"\0" + rng.randbytes(rng.randrange(1, 5000)))


async def _half_a_write(
    rng: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, disk: Disk
) -> None:
    """Some writes, the last one not to its end."""
    await _go(reader, writer, disk)
    at, length = SIZE - WILD, WILD // 2
    for cookie in range(rng.randrange(3)):
        writer.write(request(WRITE, cookie, at + rng.randrange(length), 1000) + rng.randbytes(1000))
    writer.write(request(WRITE, 9, at, length) + rng.randbytes(rng.randrange(length)))


async def _never_reads(
    rng: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, disk: Disk
) -> None:
    await _go(reader, writer, disk)
    reader._limit = 1  # type: ignore[attr-defined]
    for cookie in range(rng.randrange(1, 60)):
        writer.write(request(READ, cookie, 0, SIZE))


async def _writes_and_leaves(
    rng: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, disk: Disk
) -> None:
    """Writes and zeroes whose replies nobody awaits."""
    await _go(reader, writer, disk)
    at = SIZE - WILD
    for cookie in range(20):
        offset = at + rng.randrange(WILD - 8192)
        if cookie % 3:
            writer.write(request(WRITE, cookie, offset, 8192) + rng.randbytes(8192))
        else:
            writer.write(request(rng.choice([4, 6]), cookie, offset, 8192))


async def _out_of_range(
    rng: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, disk: Disk
) -> None:
    await _go(reader, writer, disk)
    for cookie in range(10):
        writer.write(request(rng.choice([0, 4, 5, 6, 7, 8]), cookie, SIZE - rng.randrange(9), 1 << 20, 1))


async def _half_a_handshake_of_tls(
    rng: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, disk: Disk
) -> None:
    """STARTTLS, and then something that is not TLS, or too little of it."""
    await reader.readexactly(18)
    writer.write(struct.pack(">I", 3) + IHAVEOPT + struct.pack(">II", OPT_STARTTLS, 0))
    await reader.readexactly(20)
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    writer.write(rng.choice([b"", b"more", hello, hello + rng.randbytes(508), rng.randbytes(5000)]))


ATTACKS = [
    _half_a_handshake_of_tls,
    _nothing,
    _garbage,
    _garbage_after_the_greeting,
    _half_an_option,
    _garbage_in_transmission,
    _half_a_write,
    _never_reads,
    _writes_and_leaves,
    _out_of_range,
]


def start(world: World) -> list[asyncio.Task[None]]:
    """All of them."""
    works = [write(world, disk) for disk in world.disks]
    works += [forever(world, lambda: read(world), 0.05) for _ in range(2)]
    works.append(forever(world, lambda: look(world), 0.2))
    works.append(forever(world, lambda: copy_out(world), 0.3))
    works.append(forever(world, lambda: copy_in(world), 0.3))
    works.append(forever(world, lambda: write_by_tool(world), 0.3))
    works += [forever(world, lambda: attack(world), 0.1) for _ in range(3)]
    watcher = watchers.Watcher(world)
    works.append(forever(world, watcher.scrape, 0.3))
    works.append(forever(world, watcher.ask, 1))
    works.append(forever(world, lambda: pester_or_not(world), 0.5))
    works.append(forever(world, lambda: not_for_everybody(world), 0.5))
    return [asyncio.ensure_future(work) for work in works]
