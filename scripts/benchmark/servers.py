"""The contenders, and one run of one of them: started and ended by its pid, its processor time and memory."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.support import qemu

START_TIMEOUT = 30.0
STOP_TIMEOUT = 60.0
"""Seconds."""

POLL = 0.001
"""Seconds between looks at a server that is starting; what start-up times are exact to."""

GREETING = 18
"""Bytes that an NBD server says first."""

TICK = os.sysconf("SC_CLK_TCK")


class CannotServe(Exception):
    """A contender would not serve what a work asks for; the text is its own last line."""


@dataclass(frozen=True)
class Serving:
    """What a work asks a server for."""

    image: Path
    writable: bool = False
    bitmaps: tuple[str, ...] = ()
    """Offered as contexts. Those that are enabled record whatever is offered."""
    connections: int = 16
    size: int = 0
    """Of the disk, bytes; for servers that make their own."""


@dataclass(frozen=True)
class Contender:
    """A server that takes part: its name in the table, and its command line."""

    name: str
    argv: Callable[[Serving, str], list[str]]
    ours: bool = False
    place: Path = Path("/")
    """Its working directory: ``python -m`` would find a package there before any other build of it."""
    limit: bool = False
    """Serves memory and knows no images: shows what client and machine can do at most."""


class Processor(NamedTuple):
    """Processor time, seconds."""

    user: float
    system: float

    @property
    def total(self) -> float:
        return self.user + self.system


@dataclass
class Running:
    """A server that accepts connections."""

    process: subprocess.Popen[bytes]
    socket: str
    log: Path
    start_time: float
    """Seconds from its start to the greeting of the first connection."""

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def cpu(self) -> Processor:
        """Processor time so far, of the process and its living children."""
        ticks = [_cpu_ticks(pid) for pid in self.pids()]
        return Processor(sum(user for user, _ in ticks) / TICK, sum(system for _, system in ticks) / TICK)

    def rss(self) -> int:
        """Resident memory now, bytes."""
        return sum(_memory(pid, "VmRSS") for pid in self.pids())

    def peak(self) -> int:
        """Greatest resident memory so far, bytes."""
        return sum(_memory(pid, "VmHWM") for pid in self.pids())

    def stop(self) -> float:
        """End it by SIGTERM and wait; return the seconds that took. Raises CannotServe if it went wrong."""
        begin = time.perf_counter()
        if self.process.poll() is None:
            ending = os.pidfd_open(self.process.pid)
            try:
                self.process.send_signal(signal.SIGTERM)
                # Popen.wait with a timeout looks after 0.5, 1.5, 3.5 ... ms: its pauses would be measured.
                ended, _, _ = select.select([ending], [], [], STOP_TIMEOUT)
            finally:
                os.close(ending)
            if not ended:
                self.process.kill()
                self.process.wait()
                raise CannotServe(f"did not end in {STOP_TIMEOUT:g} s after SIGTERM")
        took = time.perf_counter() - begin
        status = self.process.wait()
        if status not in (0, -signal.SIGTERM):
            raise CannotServe(f"ended with status {status}: {last_line(self.log)}")
        return took

    def pids(self) -> list[int]:
        """The process and its living children."""
        found = [self.process.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                with suppress(OSError):  # a thread that has ended since
                    found += [int(word) for word in children.read_text().split()]
        return found


def _cpu_ticks(pid: int) -> tuple[int, int]:
    # Field 2 is the command in parentheses and may hold anything; 14 and 15 are utime and stime.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]), int(fields[12])


def _memory(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def last_line(log: Path) -> str:
    """The last thing a server said."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


@contextmanager
def serve(contender: Contender, serving: Serving) -> Iterator[Running]:
    """Run a server until the block ends; it is stopped then if the block has not done so.

    Raises CannotServe if it does not start, or does not stop cleanly.
    """
    with ExitStack() as stack:
        # A Unix socket's path has at most 107 bytes: not under the directory of the images.
        place = Path(tempfile.mkdtemp(prefix="nbdbm-bench-"))
        stack.callback(shutil.rmtree, place)
        path, log = str(place / "s"), place / "log"
        argv = contender.argv(serving, path)
        environment = qemu.environment()
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # pip compiles what it installs
        with log.open("wb") as out:
            begin = time.perf_counter()
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=contender.place,
            )
        stack.callback(_kill, process)
        while not _greeted(path):
            if process.poll() is not None:
                raise CannotServe(last_line(log))
            if time.perf_counter() - begin > START_TIMEOUT:
                raise CannotServe(f"no connection in {START_TIMEOUT:g} s: {last_line(log)}")
            time.sleep(POLL)
        running = Running(process, path, log, time.perf_counter() - begin)
        yield running
        running.stop()


def _greeted(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(START_TIMEOUT)
        try:
            sock.connect(path)
            return len(sock.recv(GREETING, socket.MSG_WAITALL)) == GREETING
        except OSError:
            return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def nbdbm(name: str = "nbdbm", command: str = "") -> Contender:
    """This server, or with ``command`` another build of it."""
    program = shlex.split(command) or [sys.executable, "-m", "nbdbm"]

    def argv(serving: Serving, path: str) -> list[str]:
        words = [*program, "serve", "-k", path, "-e", str(serving.connections)]
        if not serving.writable:
            words.append("--read-only")
        for bitmap in serving.bitmaps:
            words += ["-B", bitmap]
        return [*words, str(serving.image)]

    return Contender(name, argv, ours=True, place=Path("/") if command else qemu.ROOT)


def qemu_nbd(tools: qemu.Tools, *options: str) -> Contender:
    """qemu-nbd of one generation, with ``options``."""
    words = tools.run("qemu-nbd", "--version").split()
    version = ".".join(words[1].split(".")[:2])
    name = " ".join([f"qemu-nbd {version}", *(option.lstrip("-") for option in options)])

    def argv(serving: Serving, path: str) -> list[str]:
        chosen = [word for bitmap in serving.bitmaps for word in ("-B", bitmap)]
        mode = [] if serving.writable else ["-r"]
        return tools.argv(
            "qemu-nbd", "-t", "-A", "-e", serving.connections, "-k", path, "-f", "qcow2",
            *mode, *chosen, *options, serving.image,
        )  # fmt: skip

    return Contender(name, argv)


def nbdkit_memory() -> Contender:
    """nbdkit's memory plugin: no image, no file, compiled."""

    def argv(serving: Serving, path: str) -> list[str]:
        mode = [] if serving.writable else ["-r"]
        return ["nbdkit", "-f", "-U", path, *mode, "memory", str(serving.size)]

    return Contender("nbdkit memory", argv, limit=True)


def peers() -> list[Contender]:
    """Every qemu-nbd there is, with its default way of reading files and with io_uring."""
    return [qemu_nbd(tools, *options) for tools in _generations() for options in ((), ("--aio=io_uring",))]


def newest_peer() -> Contender | None:
    """The newest qemu-nbd as it comes."""
    tools = _generations()
    return qemu_nbd(tools[-1]) if tools else None


def _generations() -> list[qemu.Tools]:
    system = [] if shutil.which("qemu-nbd") is None else [qemu.SYSTEM]
    return system + ([] if qemu.newer_missing() else [qemu.newer()])
