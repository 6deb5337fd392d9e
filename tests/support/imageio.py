"""oVirt imageio (PyPI ``ovirt-imageio``): its NBD client in this process, its daemon as a process.

The daemon is what a backup program talks to in oVirt: HTTP on one side, an NBD client on the other. It
gets its export through a ticket.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from tests.support import qemu, servers

START_TIMEOUT = 30
"""Seconds."""


def missing() -> str | None:
    """Why it cannot be used, or None if it can."""
    if importlib.util.find_spec("ovirt_imageio") is None:
        return "the Python package ovirt-imageio is not installed"
    return None


def module(name: str) -> Any:
    """One of its modules, such as ``_internal.nbd``; who calls this carries ``requires("imageio")``."""
    return importlib.import_module(f"ovirt_imageio.{name}")


def url(server: servers.Server) -> str:
    """Where a server is, in imageio's notation."""
    name = f":exportname={server.export}" if server.export else ""
    return f"nbd:unix:{server.socket}{name}"


def backend(server: servers.Server, **options: Any) -> Any:
    """A connection, as imageio's daemon makes it."""
    return module("_internal.backends.nbd").open(urlparse(url(server)), **options)


@contextlib.contextmanager
def daemon(place: Path, server: servers.Server, size: int, *, dirty: bool) -> Iterator[str]:
    """The daemon with one ticket for the export of ``server``; yields the ticket's HTTP address."""
    (place / "conf.d").mkdir(parents=True)
    log = place / "log"
    ticket = place / "ticket"
    ticket.write_text(
        json.dumps(
            {
                "uuid": "disk",
                "size": size,
                "url": url(server),
                "timeout": 300,
                "sparse": True,
                "dirty": dirty,
                "ops": ["read", "write"],
            }
        )
    )
    (place / "conf.d/test.conf").write_text(
        textwrap.dedent(
            f"""
            [daemon]
            poll_interval = 0.1
            run_dir = {place}
            drop_privileges = false
            systemd_enable = false
            [tls]
            enable = false
            [remote]
            host = 127.0.0.1
            port = 0
            [local]
            enable = false
            [control]
            enable = false
            [logger_root]
            level = DEBUG
            [handler_logfile]
            keyword__class = logging.FileHandler
            args = ("{log}",)
            kwargs = {{}}
            """
        )
    )
    program = Path(sys.executable).with_name("ovirt-imageio")
    with (place / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(program), "--conf-dir", str(place), "--ticket", str(ticket)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=qemu.environment(),
        )
    try:
        yield f"http://127.0.0.1:{_port(process, log, place / 'output')}/images/disk"
    finally:
        servers.stop(process)


def transfer(verb: str, *args: str, **options: Any) -> None:
    """``upload`` or ``download`` of its client library, without TLS.

    In a process of its own: the library leaves sockets to the garbage collector.
    """
    call = f"client.{verb}(*{args!r}, cafile=None, secure=False, **{options!r})"
    qemu.run([sys.executable, "-c", f"from ovirt_imageio import client; {call}"])


def _port(process: subprocess.Popen[bytes], log: Path, output: Path) -> int:
    """The port that the daemon took, from its log, once it takes requests."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        said = log.read_text() if log.exists() else ""
        found = re.search(r"remote\.service listening on \('127\.0\.0\.1', (\d+)\)", said)
        if found and "Ready for requests" in said:
            return int(found[1])
        if process.poll() is not None or time.monotonic() > deadline:
            raise servers.ServerFailed(process.poll() or -1, said + output.read_text())
        time.sleep(0.02)
