"""Start a server for a test and end it again: nbdbm through its command line, qemu-nbd to agree with."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import qemu

START_TIMEOUT = 20
STOP_TIMEOUT = 20

RUNNING: set[subprocess.Popen[bytes]] = set()
"""Servers that tests of this process have started and not ended yet."""

NBDBM = [sys.executable, "-m", "nbdbm"]


class ServerFailed(AssertionError):
    """A server ended before it could be connected to."""

    def __init__(self, status: int, output: str) -> None:
        super().__init__(f"server ended with status {status}:\n{output}")
        self.status = status
        self.output = output


@dataclass
class Server:
    """A running server on a Unix socket."""

    process: subprocess.Popen[bytes]
    socket: str
    log: Path
    export: str = ""

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.export}?socket={self.socket}"

    @property
    def qemu_uri(self) -> str:
        """The same in QEMU's own notation, for ``x-dirty-bitmap`` and the like."""
        return f"driver=nbd,server.type=unix,server.path={self.socket},export={self.export}"

    def output(self) -> str:
        """What it has printed so far, on both streams."""
        return self.log.read_text(errors="backslashreplace")

    def alive(self) -> bool:
        return self.process.poll() is None

    def rss(self) -> int:
        """Resident memory now, bytes."""
        return self._status("VmRSS")

    def peak_rss(self) -> int:
        """Greatest resident memory so far, bytes."""
        return self._status("VmHWM")

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def files(self) -> set[str]:
        """Paths of the files that it has open now; of deleted ones, with `` (deleted)`` behind."""
        place = Path(f"/proc/{self.process.pid}/fd")
        found = set()
        for name in os.listdir(place):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.add(os.readlink(place / name))
        return found

    def connect(self, timeout: float = 10) -> socket.socket:
        """A plain connected socket, for speaking bytes."""
        return _connect(self.socket, timeout)

    def _status(self, field: str) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"no {field} for process {self.process.pid}")


def _connect(path: str, timeout: float) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(timeout)
    try:
        peer.connect(path)
    except OSError:
        peer.close()
        raise
    return peer


def _address_space(limit: int | None) -> Callable[[], None] | None:
    """A preexec function that bounds the address space, bytes."""
    if limit is None:
        return None
    bound = limit

    def set_limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))

    return set_limit


@contextlib.contextmanager
def _stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Have the process among those RUNNING until the block ends, and end it then."""
    RUNNING.add(process)
    try:
        yield
    finally:
        RUNNING.discard(process)
        stop(process)


@contextlib.contextmanager
def started(
    argv: Callable[[str], Sequence[str]],
    *,
    export: str = "",
    address_space: int | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Run ``argv(socket path)`` until the block ends; yields once it can be connected to.

    A server that is still alive at the end gets SIGTERM, and SIGKILL if that has no effect in time.
    The status is left in ``server.process.returncode``.
    """
    # Not under tmp_path: a Unix socket's path has at most 107 bytes.
    with contextlib.ExitStack() as stack:
        place = Path(tempfile.mkdtemp(prefix="nbdbm-"))
        stack.callback(shutil.rmtree, place)
        path = str(place / "s")
        log = place / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                list(argv(path)),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment or qemu.environment(),
                preexec_fn=_address_space(address_space),
            )
        stack.enter_context(_stopped(process))
        server = Server(process, path, log, export)
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                _connect(path, 5).close()
                break
            except OSError:
                status = process.poll()
                if status is not None:
                    raise ServerFailed(status, server.output()) from None
                if time.monotonic() > deadline:
                    raise ServerFailed(-1, f"no socket in {START_TIMEOUT} s\n{server.output()}") from None
                time.sleep(0.01)
        yield server


@contextlib.contextmanager
def on_tcp(argv: Sequence[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``argv``, which is to listen on a loopback port, until the block ends."""
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=qemu.environment()
    )
    with _stopped(process):
        wait_for_port(port, process)
        yield process


@contextlib.contextmanager
def nbdbm_on_tcp(
    image: object, place: Path, *options: object
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """``nbdbm serve`` on a free loopback port: the process, and the port that it says it took.

    If the process still lives at the end of the block, it must then end with 0 and without a traceback.
    What it prints goes to ``place / "server"``.
    """
    log = place / "server"
    argv = [*NBDBM, "serve", "--bind", "127.0.0.1", "--port", "0", *map(str, options), str(image)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=qemu.environment()
        )
    with _stopped(process):
        deadline = time.monotonic() + START_TIMEOUT
        while not (found := re.search(r"^nbds?://127\.0\.0\.1:(\d+)(?:/.*)?\n", log.read_text(), re.M)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerFailed(process.poll() or -1, log.read_text())
            time.sleep(0.01)
        yield process, int(found[1])
        if process.poll() is None:
            status = stop(process)
            output = log.read_text(errors="backslashreplace")
            assert status == 0 and "Traceback" not in output, f"status {status} after SIGTERM\n{output}"


def wait_for_port(port: int, process: subprocess.Popen[bytes] | None = None) -> None:
    """Until somebody accepts on a loopback port, and the ``process`` that is to do so lives."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 5).close()
            return
        except OSError:
            if process is not None and process.poll() is not None:
                raise ServerFailed(process.returncode, "") from None
            if time.monotonic() > deadline:
                raise ServerFailed(-1, f"nothing on port {port} in {START_TIMEOUT} s") from None
            time.sleep(0.01)


def kill_all() -> None:
    """Kill the servers in RUNNING: whoever waits for one of them waits no longer."""
    for process in list(RUNNING):
        process.kill()


def stop(process: subprocess.Popen[bytes]) -> int:
    """End a process that a test started, politely first; return its status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode


@contextlib.contextmanager
def nbdbm(
    image: object,
    *options: object,
    export: str = "",
    address_space: int | None = None,
    clean: bool = True,
    writable: bool = False,
) -> Iterator[Server]:
    """``nbdbm serve --read-only`` on ``image``; if ``clean``, it must end with 0 and without a traceback."""
    mode = [] if writable else ["--read-only"]

    def argv(path: str) -> list[str]:
        name = ["--export-name", export] if export else []
        return [*NBDBM, "serve", *mode, "--socket", path, *name, *map(str, options), str(image)]

    with started(argv, export=export, address_space=address_space) as server:
        yield server
        if clean:
            assert server.alive(), f"the server died: {server.process.returncode}\n{server.output()}"
            status = stop(server.process)
            output = server.output()
            assert "Traceback" not in output, output
            assert status == 0, f"status {status} after SIGTERM\n{output}"


@contextlib.contextmanager
def qemu_nbd(
    image: object,
    *options: object,
    bitmaps: Sequence[str] = (),
    image_format: str = "qcow2",
    export: str = "",
    tools: qemu.Tools = qemu.SYSTEM,
    writable: bool = False,
) -> Iterator[Server]:
    """``qemu-nbd -r -A -B NAME...`` on ``image``."""
    mode = [] if writable else ["-r"]

    def argv(path: str) -> list[str]:
        chosen = [word for name in bitmaps for word in ("-B", name)]
        form = ["-f", image_format] if image_format else []
        return tools.argv(
            "qemu-nbd",
            *mode,
            "-A",
            "-t",
            "-e",
            "8",
            "-k",
            path,
            "-x",
            export,
            *form,
            *chosen,
            *options,
            image,
        )

    with started(argv, export=export) as server:
        yield server


def nbdbm_run(*args: object, check: bool = False, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    """One run of the ``nbdbm`` command line to its end."""
    return qemu.run([*NBDBM, *map(str, args)], check=check, timeout=timeout)


def limited_run(
    argv: Sequence[str], *, address_space: int, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run to the end within bounds of memory (address space, bytes) and time (seconds)."""
    return qemu.run(list(argv), check=False, timeout=timeout, preexec=_address_space(address_space))
