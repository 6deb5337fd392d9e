"""``nbdbm status`` against a running server, and against sockets that are none."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest

from nbdbm.cli.status import INTERVAL, rates, status
from tests.cli.program import SERVE, TIMEOUT, ended, environment, qcow2, started, write_byte
from tests.support.servers import nbdbm_run

STATUS = (sys.executable, "-m", "nbdbm", "status")


def test_tables_and_json(tmp_path: Path) -> None:
    image, path, place = qcow2(tmp_path / "disk.qcow2", "day"), tmp_path / "s", tmp_path / "c"
    with started(*SERVE, "-x", "disk", "-k", str(path), "--control", str(place), str(image), lines=4) as (
        process,
        _,
    ):
        assert place.stat().st_mode & 0o777 == 0o600
        write_byte(path, "disk")
        done = nbdbm_run("status", place, "--json", check=True)
        (export,) = json.loads(done.stdout)["exports"]
        assert (export["operations"] >= 1, export["bytes_written"]) == (True, 1)
        assert export["bitmaps"][0]["dirty"] == 65536 and export["mode"] == "writable"
        done = nbdbm_run("status", place, check=True)
        assert "serving, 0 clients now, 1 so far" in done.stdout
        assert "writable" in done.stdout and "64 KiB" in done.stdout and "in use" in done.stdout
        watching = subprocess.Popen(
            [*STATUS, "--watch", "0.1", "--json", str(place)],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(),
            # A shell that runs the suite in the background has SIGINT ignored for all of it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            assert watching.stdout is not None
            for _ in range(3):
                assert json.loads(watching.stdout.readline())["state"] == "serving"
            watching.send_signal(signal.SIGINT)
            assert watching.communicate(timeout=TIMEOUT)[1] == b"" and watching.returncode == 0
        finally:
            watching.kill()
            watching.communicate()
        assert ended(process) == (0, "") and not place.exists()


def test_watching_on_a_terminal_ends_on_q(tmp_path: Path) -> None:
    image, path, place = qcow2(tmp_path / "disk.qcow2"), tmp_path / "s", tmp_path / "c"
    with started(*SERVE, "-x", "disk", "-k", str(path), "--control", str(place), str(image), lines=3):
        ours, theirs = pty.openpty()
        watching = subprocess.Popen(
            [*STATUS, str(place), "--watch=60"],
            stdin=theirs, stdout=theirs, stderr=theirs, env=environment(TERM="xterm", COLUMNS="150"),
        )  # fmt: skip
        os.close(theirs)
        try:
            shown, deadline = b"", time.monotonic() + TIMEOUT
            while b"OPS/S" not in shown:
                assert time.monotonic() < deadline
                if select.select([ours], [], [], 1)[0]:
                    shown += os.read(ours, 65536)
            os.write(ours, b"q")
            assert watching.wait(TIMEOUT) == 0
        finally:
            watching.kill()
            watching.wait()
            os.close(ours)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["c"], ("c", None)),
        (["--watch", "c"], ("c", INTERVAL)),
        (["c", "--watch"], ("c", INTERVAL)),
        (["--watch", "--json", "c"], ("c", INTERVAL)),
        (["--watch", "3", "c"], ("c", 3)),
        (["--watch=.5", "c"], ("c", 0.5)),
        (["c", "--watch", "7.5"], ("c", 7.5)),
        (["--watch", "--", "3"], ("3", INTERVAL)),
        (["--", "--watch"], ("--watch", None)),
    ],
)
def test_watch_takes_a_number_and_never_the_path(
    given: list[str], expected: tuple[str, float | None]
) -> None:
    context = status.make_context("status", given)
    assert (context.params["path"], context.params["watch"]) == expected


@pytest.mark.parametrize(
    "given", [["--watch", "0", "c"], ["--watch=c", "c"], ["--watch", "3"], ["--watch=nan", "c"], ["--watch"]]
)
def test_watch_refuses(given: list[str]) -> None:
    with pytest.raises(click.UsageError):
        status.invoke(status.make_context("status", given))


def test_rates() -> None:
    one = {"name": "a", "operations": 10, "bytes_read": 100, "bytes_written": 0}
    two = {"name": "a", "operations": 30, "bytes_read": 300, "bytes_written": 50}
    new = {**two, "name": "b"}
    assert rates(None, {"time": 1, "exports": [one]}) == {}
    assert rates({"time": 1, "exports": [one]}, {"time": 3, "exports": [two, new]}) == {"a": (10, 100, 25)}


@pytest.mark.parametrize(
    "said",
    [b"", b"{", b"[]", b"3", b'{"return": 3}', b'{"return": {}}', b'{"return": {"exports": [{}]}}', b"\xff",
     b'{"error": 1}', b"[" * 100_000],
)  # fmt: skip
def test_a_socket_of_somebody_else(tmp_path: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "c"))
        server.listen()

        def speak() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(100)
                peer.sendall(said)

        speaker = threading.Thread(target=speak)
        speaker.start()
        done = nbdbm_run("status", tmp_path / "c")
        speaker.join(TIMEOUT)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert "not the answer of a control socket" in done.stderr


def test_nobody_there(tmp_path: Path) -> None:
    done = nbdbm_run("status", tmp_path / "c")
    assert done.returncode == 1 and done.stderr == f"nbdbm: {tmp_path / 'c'}: No such file or directory\n"


def test_a_file_and_a_dead_socket(tmp_path: Path) -> None:
    path = tmp_path / "c"
    expected = f"nbdbm: {path}: is not the control socket of a running server\n"
    path.touch()
    assert nbdbm_run("status", path).stderr == expected
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    assert nbdbm_run("status", path).stderr == expected
