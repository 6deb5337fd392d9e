"""``nbdbm serve --fork``: what its caller sees, and what goes on after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.cli.program import TIMEOUT, argv, environment, greeted, run


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(65536))
    return path


@contextmanager
def forked(image: Path, *options: object) -> Iterator[tuple[subprocess.CompletedProcess[str], int]]:
    """The command, which has ended, and the process ID of the server."""
    pid_file = image.parent / "pid"
    done = run(*argv(image, "--fork", "--pid-file", pid_file, *options))
    assert done.returncode == 0, done.stderr
    pid = int(pid_file.read_text())
    try:
        yield done, pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def await_end(pid_file: Path) -> None:
    """The PID file goes when everything is stored."""
    deadline = time.monotonic() + TIMEOUT
    while pid_file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_returns_when_clients_can_connect(image: Path, tmp_path: Path) -> None:
    """``run`` reads stdout and stderr to their ends: the server must not keep them open."""
    with forked(image, "-k", tmp_path / "s") as (done, pid):
        assert done.stdout.splitlines()[0] == f"nbd+unix:///?socket={tmp_path / 's'}"
        assert "context: base:allocation" in done.stdout.splitlines()
        assert greeted(str(tmp_path / "s"))
        assert os.getsid(pid) == pid
        os.kill(pid, signal.SIGTERM)
        await_end(tmp_path / "pid")
        assert not (tmp_path / "s").exists()


def test_a_log_that_is_a_file_goes_on(image: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nbdbm", "serve", "-r", "-f", "raw", "--fork"]
    with open(tmp_path / "log", "wb") as log:
        subprocess.run(
            [*command, "-k", str(tmp_path / "s"), "--pid-file", str(tmp_path / "pid"), str(image)],
            stdout=subprocess.DEVNULL,
            stderr=log,
            timeout=TIMEOUT,
            env=environment(),
            check=True,
        )
    pid = int((tmp_path / "pid").read_text())
    try:
        assert greeted(str(tmp_path / "s"))
        os.kill(pid, signal.SIGTERM)
        await_end(tmp_path / "pid")
        assert "used no export" in (tmp_path / "log").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_start_that_fails_is_the_command_s_failure(image: Path, tmp_path: Path) -> None:
    result = run(*argv(tmp_path / "none", "--fork", "-k", tmp_path / "s"))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"nbdbm: {tmp_path / 'none'}: cannot be opened: No such file or directory\n"
    with forked(image, "-k", tmp_path / "s"):
        again = run(*argv(image, "--fork", "-k", tmp_path / "s"))
        assert again.returncode == 1 and "another process is listening" in again.stderr


@pytest.mark.parametrize(
    ("options", "extra", "says"),
    [(["--run", "true"], {}, "--fork excludes --run"), ([], {"LISTEN_FDS": "1"}, "LISTEN_FDS")],
)
def test_what_it_does_not_go_with(
    image: Path,
    options: list[str],
    extra: dict[str, str],
    says: str,
) -> None:
    result = run(*argv(image, "--fork", *options), env=extra)
    assert result.returncode == 1 and says in result.stderr and result.stderr.count("\n") == 1
