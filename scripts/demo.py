"""The main job, on real images: a disk's life with nbdbm alone, and then a disk that QEMU left behind.

Run by ``make demo`` in the project's virtual environment; needs neither QEMU nor root. Whatever differs
from what it should be is said, and ends in status 1.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbdbm.client import NbdClient
from nbdbm.extents import Extent
from nbdbm.nbd.constants import CONTEXT_ALLOCATION, CONTEXT_BITMAP, AllocationFlag, DirtyFlag
from nbdbm.uri import NbdUri

DATA = Path(__file__).resolve().parent / "data"
PATIENCE = 30.0
"""Seconds for the server to start or to end; it takes a fraction of one, a loaded machine may take more."""
PIECE = 1024 * 1024
"""Bytes of one read."""
KIB, MIB = 1024, 1024 * 1024
GRANULARITY = 64 * KIB
"""Bytes that one bit of a new bitmap stands for."""


class Check:
    """Counts what differs from what it should be, and says so."""

    def __init__(self) -> None:
        self.failed = 0

    def same(self, what: str, found: object, expected: object) -> None:
        """Compare and print the verdict."""
        if found == expected:
            print(f"  ok: {what}", flush=True)
        else:
            self.failed += 1
            print(f"  WRONG: {what}\n    found:    {found}\n    expected: {expected}", flush=True)


check = Check()


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="nbdbm-demo-") as directory:
        os.chdir(directory)
        life_of_a_disk()
        disk_of_qemu()
    if check.failed:
        say(f"{check.failed} answers are not what they should be.")
        return 1
    say("Everything is as it should be.")
    return 0


# -- first act: a disk, its guest, its backups


def life_of_a_disk() -> None:
    title("A disk of its own: create, write, take a checkpoint, write again, back up what changed")

    say("Make a disk for a virtual machine. Serve it, and let the machine install itself:\n")
    nbdbm("create", "vm.qcow2", "64M")
    with serving("vm.qcow2") as uri:
        asyncio.run(install(uri))

    say("The machine is off. From this checkpoint on, a bitmap notes what is written; make a full backup:\n")
    nbdbm("checkpoint", "vm.qcow2", "--name", "monday")
    with serving("--read-only", "vm.qcow2") as uri:
        full = asyncio.run(full_backup(uri))

    say("The machine runs again and does its day's work:\n")
    with serving("vm.qcow2") as uri:
        touched = asyncio.run(work(uri))

    say("In the evening: read what is dirty in the bitmap, and nothing else:\n")
    with serving("--read-only", "vm.qcow2") as uri:
        asyncio.run(incremental_backup(uri, full, touched))
        say("The same for people who would rather look:\n")
        nbdbm("map", "--picture", str(uri), shown=f"map --picture '{uri}'")

    say("The next backup has its own bitmap; this one ends here. And is the image sound?\n")
    nbdbm("checkpoint", "vm.qcow2", "--name", "tuesday", "--disable", "monday")
    nbdbm("bitmap", "list", "vm.qcow2")
    nbdbm("check", "vm.qcow2")


async def install(uri: NbdUri) -> None:
    """What a guest writes while it is being installed."""
    async with await NbdClient.connect(uri) as client:
        for megabyte in (0, 1, 2, 3, 8, 20, 21, 40):
            await client.write(megabyte * MIB, text(f"installed at {megabyte}", MIB))
        await client.flush()
        print(f"  the guest wrote {amount(8 * MIB)} and flushed\n")


async def full_backup(uri: NbdUri) -> bytearray:
    """Read what is allocated; the rest is zeroes."""
    async with await NbdClient.connect(uri, contexts=[CONTEXT_ALLOCATION]) as client:
        copy = bytearray(client.size)
        extents = (await client.block_status(0, client.size))[CONTEXT_ALLOCATION]
        ranges = where(extents, lambda flags: not flags & AllocationFlag.HOLE)
        for offset, length in ranges:
            copy[offset : offset + length] = await client.read(offset, length)
        print(f"  read {amount(total(ranges))} of {amount(client.size)}: that is all there is\n")
        check.same("the full backup equals the disk", sha256(copy), sha256(await everything(client)))
        return copy


async def work(uri: NbdUri) -> list[tuple[int, int]]:
    """What a guest does in a day: files large and small, some deleted, some wiped."""
    async with await NbdClient.connect(uri) as client:
        written = [(MIB + 700, 12), (8 * MIB + 123456, 300 * KIB), (50 * MIB, 100 * KIB)]
        for offset, length in written:
            await client.write(offset, text(f"changed at {offset}", length))
        await client.write_zeroes(3 * MIB, 256 * KIB)
        await client.trim(20 * MIB, MIB)
        await client.flush()
        print("  the guest wrote three files, one of 12 bytes, wiped one and deleted one\n")
    return [*written, (3 * MIB, 256 * KIB), (20 * MIB, MIB)]


async def incremental_backup(uri: NbdUri, full: bytearray, touched: list[tuple[int, int]]) -> None:
    """Copy the dirty extents over the full backup: that must give the disk."""
    context = CONTEXT_BITMAP + "monday"
    async with await NbdClient.connect(uri, contexts=[context]) as client:
        extents = (await client.block_status(0, client.size))[context]
        dirty = where(extents, lambda flags: bool(flags & DirtyFlag.DIRTY))
        disk = sha256(await everything(client))
        check.same("the full backup is out of date", sha256(full) != disk, True)
        print()
        for offset, length in dirty:
            full[offset : offset + length] = await client.read(offset, length)
            print(f"  {length // KIB:>6} KiB at {offset // KIB} KiB")
        print(f"  {total(dirty) // KIB:>6} KiB, {100 * total(dirty) / client.size:.1f} % of the disk\n")
        check.same("what is dirty is what the guest touched", granules(dirty), granules(touched))
        check.same("full backup + dirty extents = the disk", sha256(full), disk)


# -- second act: QEMU's image


def disk_of_qemu() -> None:
    """Made by scripts/data/make-sample.sh; sample.json has what QEMU says of it."""
    title("A disk that QEMU wrote, served read-only: every answer must be QEMU's")
    print()
    expected = json.loads((DATA / "sample.json").read_text())
    image = Path("sample.qcow2")
    image.write_bytes(gzip.decompress((DATA / "sample.qcow2.gz").read_bytes()))
    before = image.read_bytes(), image.stat().st_mtime_ns
    with serving("--read-only", str(image)) as uri:
        asyncio.run(compare(uri, expected))
    check.same(
        "serving changed no byte of it", (image.read_bytes(), image.stat().st_mtime_ns) == before, True
    )


async def compare(uri: NbdUri, expected: dict[str, Any]) -> None:
    """Ask for all that there is."""
    async with await NbdClient.open(uri) as client:
        offered = [name for name in await client.list_contexts() if name.startswith(CONTEXT_BITMAP)]
    names = [name.removeprefix(CONTEXT_BITMAP) for name in offered]
    check.same("the bitmaps offered are those to be trusted", sorted(names), sorted(expected["dirty"]))
    async with await NbdClient.connect(uri, contexts=offered) as client:
        check.same("the content of the disk", sha256(await everything(client)), expected["sha256"])
        found = await client.block_status(0, client.size)
        for context, name in zip(offered, names, strict=True):
            dirty = where(found[context], lambda flags: bool(flags & DirtyFlag.DIRTY))
            check.same(
                f"what is dirty in {name!r}: {amount(total(dirty))}",
                [list(item) for item in dirty],
                expected["dirty"][name],
            )


# -- running nbdbm


def nbdbm(*arguments: str, shown: str = "") -> None:
    """Run a command, and show it as one would type it."""
    print(f"  $ nbdbm {shown or shlex.join(arguments)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "nbdbm", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.stdout:
        print(indented(done.stdout), flush=True)
    check.same(f"nbdbm {arguments[0]}", done.returncode, 0)
    print()


@contextmanager
def serving(*arguments: str) -> Iterator[NbdUri]:
    """``nbdbm serve`` until the block ends; then it is asked to end."""
    uri = NbdUri.unix(os.path.abspath("nbd.sock"))
    print(f"  $ nbdbm serve --socket nbd.sock {shlex.join(arguments)} &", flush=True)
    log = Path("server.log")
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "nbdbm", "serve", "--socket", "nbd.sock", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while "nbd+unix:" not in log.read_text():
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"demo: the server did not start:\n{indented(log.read_text())}")
            time.sleep(0.02)
        print(indented(log.read_text()), flush=True)
        yield uri
    finally:
        server.terminate()
        status = server.wait(timeout=PATIENCE)
    check.same("the server ended cleanly", status, 0)


# -- small things


def where(extents: list[Extent], wanted: Any) -> list[tuple[int, int]]:
    """(offset, length) of the extents whose flags are ``wanted``, from the start of the disk."""
    ranges = []
    offset = 0
    for extent in extents:
        if wanted(extent.flags):
            ranges.append((offset, extent.length))
        offset += extent.length
    return ranges


def granules(ranges: list[tuple[int, int]]) -> set[int]:
    """The granules that ranges touch."""
    return {
        number
        for offset, length in ranges
        for number in range(offset // GRANULARITY, -(-(offset + length) // GRANULARITY))
    }


def total(ranges: list[tuple[int, int]]) -> int:
    return sum(length for _, length in ranges)


async def everything(client: NbdClient) -> bytearray:
    """The whole disk, with several reads in flight."""
    copy = bytearray(client.size)
    view = memoryview(copy)
    starts = range(0, client.size, PIECE)
    await asyncio.gather(*(client.read_into(view[at : at + PIECE], at) for at in starts))
    view.release()
    return copy


def text(line: str, length: int) -> bytes:
    return (f"{line}\n".encode() * (length // len(line) + 1))[:length]


def sha256(data: bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def amount(count: int) -> str:
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count // KIB} KiB"


def indented(said: str) -> str:
    return "\n".join(f"  | {line}" for line in said.splitlines())


def title(words: str) -> None:
    print(f"\n{words}\n{'=' * len(words)}", flush=True)


def say(words: str) -> None:
    print(f"\n{words}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
