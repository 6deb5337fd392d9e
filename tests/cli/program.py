"""``nbdbm`` as its users run it: a process, its output, its end; and images for it to serve."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdbm.client import NbdClient
from nbdbm.errors import NbdError
from nbdbm.uri import NbdUri
from tests.support.servers import nbdbm_run

TIMEOUT = 40
"""Seconds."""

SERVE = (sys.executable, "-m", "nbdbm", "serve", "-q")
"""Without the lines about connections, which test_logs.py is about."""


def argv(image: object, *options: object) -> list[str]:
    """Serving a raw image, read-only."""
    return [*SERVE, "-r", "-f", "raw", *map(str, options), str(image)]


def environment(**extra: str) -> dict[str, str]:
    """As users have it: without the asyncio debugging of the test suite."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONASYNCIODEBUG"}
    return {**inherited, **extra}


@contextlib.contextmanager
def started(
    *command: str, env: dict[str, str] | None = None, lines: int = 3
) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The process and its first lines of output, which mean that it can be connected to."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**(env or {})),
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        said = [process.stdout.readline().rstrip("\n") for _ in range(lines)]
        yield process, said
    finally:
        process.kill()
        process.wait(TIMEOUT)
        process.stdout.close()
        process.stderr.close()


def ended(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
    """Signal the process; return its status and what it said on stderr."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=TIMEOUT)
    return process.returncode, errors


def run(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, env=environment(**(env or {}))
    )


def greeted(address: str | tuple[str, int]) -> bool:
    """Whether an NBD server answers at ``address``."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as client:
        client.settimeout(TIMEOUT)
        client.connect(address)
        return client.recv(8) == b"NBDMAGIC"


def raw(path: Path, letter: str) -> Path:
    path.write_bytes(letter.encode() * 65536)
    return path


def qcow2(path: Path, *bitmaps: str) -> Path:
    nbdbm_run("create", path, "1M", check=True)
    if bitmaps:
        nbdbm_run("bitmap", "add", path, *bitmaps, check=True)
    return path


def first_byte(socket: Path, export: str) -> bytes:
    """The first byte of the export; raises NbdError if there is none of that name."""

    async def main() -> bytes:
        async with await NbdClient.connect(str(NbdUri.unix(str(socket), export))) as client:
            return bytes(await client.read(0, 1))

    return asyncio.run(main())


def write_byte(socket: Path, export: str) -> None:
    async def main() -> None:
        async with await NbdClient.connect(str(NbdUri.unix(str(socket), export))) as client:
            await client.write(0, b"w")

    asyncio.run(main())


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def served(socket: Path, export: str) -> bool:
    try:
        first_byte(socket, export)
    except NbdError:
        return False
    return True
