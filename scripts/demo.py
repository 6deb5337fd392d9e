"""The main job, on a real image: serve a disk with bitmaps and read over NBD what a backup would read.

Run by ``make demo`` in the project's virtual environment; needs neither QEMU nor root. The image was
made by QEMU (scripts/data/make-sample.sh), and what it holds according to QEMU is in sample.json: every
answer of ours is compared with that, and any difference ends in status 1.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nbdbm.client import NbdClient
from nbdbm.errors import NbdError
from nbdbm.extents import Extent
from nbdbm.nbd.constants import CONTEXT_ALLOCATION, CONTEXT_BITMAP, AllocationFlag, DirtyFlag
from nbdbm.uri import NbdUri

DATA = Path(__file__).resolve().parent / "data"
PATIENCE = 30.0
"""Seconds for the server to start or to end; it takes a fraction of one, a loaded machine may take more."""
PIECE = 1024 * 1024
"""Bytes of one read."""
IN_FLIGHT = 8


class Check:
    """Counts what differs from what QEMU says, and says so."""

    def __init__(self) -> None:
        self.failed = 0

    def same(self, what: str, ours: object, expected: object) -> None:
        """Compare and print the verdict."""
        if ours == expected:
            print(f"  ok: {what}")
        else:
            self.failed += 1
            print(f"  WRONG: {what}\n    read:     {ours}\n    expected: {expected}")


def main() -> int:
    expected = json.loads((DATA / "sample.json").read_text())
    check = Check()
    with tempfile.TemporaryDirectory(prefix="nbdbm-demo-") as directory:
        image = Path(directory) / "sample.qcow2"
        image.write_bytes(gzip.decompress((DATA / "sample.qcow2.gz").read_bytes()))
        before = image.read_bytes(), image.stat().st_mtime_ns
        path = Path(directory) / "nbd.socket"
        log = Path(directory) / "server.log"

        arguments = ["serve", "--read-only", "--socket", str(path), str(image)]
        say("Here is the disk of a virtual machine that is switched off. Serve it, with all its bitmaps:")
        print(f"\n  $ nbdbm {' '.join(arguments)}")
        with log.open("wb") as output:
            server = subprocess.Popen(
                [sys.executable, "-m", "nbdbm", *arguments], stdout=output, stderr=subprocess.STDOUT
            )
        try:
            wait_for(path, server, log)
            print(indented(log.read_text()))
            uri = NbdUri.unix(str(path))
            asyncio.run(tour(uri, expected, check))
            say(f"The same for people who would rather look:\n\n  $ nbdbm map --picture '{uri}'\n")
            shown = subprocess.run([sys.executable, "-m", "nbdbm", "map", "--picture", str(uri)], check=False)
            check.same("the picture was drawn", shown.returncode, 0)
        finally:
            server.terminate()
            status = server.wait(timeout=PATIENCE)

        say("The server was told to end.")
        check.same("it ended cleanly", status, 0)
        after = image.read_bytes(), image.stat().st_mtime_ns
        check.same("serving changed no byte of the image, nor its time stamp", after == before, True)
        said = log.read_text()
        told = [name for name in expected["refused"] if name in said]
        check.same("it had told of every bitmap that cannot be trusted", told, expected["refused"])
    if check.failed:
        say(f"{check.failed} answers differ from what QEMU says about this image.")
        return 1
    say("Everything that came over NBD is what QEMU says about this image.")
    return 0


async def tour(uri: NbdUri, expected: dict[str, Any], check: Check) -> None:
    """Ask the server for everything that it has, as a backup program would."""
    say(f"A backup program connects to {uri} and asks what there is:\n")
    async with await NbdClient.open(uri) as client:
        for name in await client.list_contexts():
            print(f"  {name}")
        available = {
            name.removeprefix(CONTEXT_BITMAP)
            for name in await client.list_contexts()
            if name.startswith(CONTEXT_BITMAP)
        }
    print()
    check.same("every bitmap that can be trusted is offered", available, set(expected["dirty"]))
    for name in expected["refused"]:
        try:
            async with await NbdClient.connect(uri, contexts=[CONTEXT_BITMAP + name]):
                outcome = "served"
        except NbdError:
            outcome = "refused"
        check.same(f"the bitmap {name!r}, spoilt by a power failure, is not to be had", outcome, "refused")

    bitmaps = [CONTEXT_BITMAP + name for name in sorted(available)]
    async with await NbdClient.connect(uri, contexts=[CONTEXT_ALLOCATION, *bitmaps]) as client:
        check.same("the disk's size", client.size, expected["size"])
        found = await client.block_status(0, client.size)

        allocated = sum(e.length for e in found[CONTEXT_ALLOCATION] if not e.flags & AllocationFlag.HOLE)
        say(f"A full backup copies what is allocated, {amount(allocated)} of {amount(client.size)}:\n")
        check.same("SHA-256 of the whole disk", await digest(client), expected["sha256"])

        for context in bitmaps:
            name = context.removeprefix(CONTEXT_BITMAP)
            dirty = dirty_ranges(found[context])
            total = sum(length for _, length in dirty)
            if not dirty:
                say(f"Since the bitmap {name!r} was made, nothing has been recorded in it:\n")
            else:
                say(
                    f"An incremental backup since {name!r} copies {amount(total)}, "
                    f"{100 * total / allocated:.1f} % of the full one:\n"
                )
            for offset, length in dirty:
                content = hashlib.sha256(await client.read(offset, length)).hexdigest()
                print(f"  {length:>9} bytes at {offset:<9} sha256 {content[:16]}...")
            check.same(f"what is dirty in {name!r}", dirty, expected["dirty"][name])


def dirty_ranges(extents: list[Extent]) -> list[list[int]]:
    """[offset, length] of each dirty extent, from extents that begin at the start of the disk."""
    ranges: list[list[int]] = []
    offset = 0
    for extent in extents:
        if extent.flags & DirtyFlag.DIRTY:
            ranges.append([offset, extent.length])
        offset += extent.length
    return ranges


async def digest(client: NbdClient) -> str:
    """SHA-256 of the disk, read with several requests in flight."""
    sha = hashlib.sha256()
    for start in range(0, client.size, PIECE * IN_FLIGHT):
        stop = min(start + PIECE * IN_FLIGHT, client.size)
        pieces = [client.read(at, min(PIECE, stop - at)) for at in range(start, stop, PIECE)]
        for piece in await asyncio.gather(*pieces):
            sha.update(piece)
    return sha.hexdigest()


def wait_for(path: Path, server: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the server has made its socket: from then on it answers."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"demo: the server did not start:\n{indented(log.read_text())}")
        time.sleep(0.02)


def amount(count: int) -> str:
    return f"{count / 1024 / 1024:.1f} MiB" if count >= 1024 * 1024 else f"{count // 1024} KiB"


def indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
