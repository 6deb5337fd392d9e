"""What a server logs: lines of text and of JSON, not too many, and never waiting for a reader."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nbdbm.cli import logs
from nbdbm.cli.logs import BURST, MAX_MESSAGE, WINDOW, JsonLines, ServerLog, TextLines, Writer
from tests.cli.program import TIMEOUT, ended, environment, run, started

NASTY = "a\nnbdbm: forged\x1b[31m\x00\x9b\u2028\udc80"


def record(text: str, *values: object, level: int = logging.INFO, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("nbdbm.some", level, "", 0, text, values, None)
    made.__dict__.update(extra)
    return made


class Recorder:
    """Takes lines as ``write``, and tells the time."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.now = 0.0
        self.works = True

    def __call__(self, line: str) -> bool:
        if self.works:
            self.lines.append(line)
        return self.works

    def log(self, form: logging.Formatter | None = None) -> ServerLog:
        handler = ServerLog(self, lambda: self.now)
        handler.setFormatter(form or TextLines())
        return handler


class TestLines:
    def test_text(self) -> None:
        assert TextLines().format(record("%s is %d", "x", 5)) == "nbdbm: x is 5"

    def test_no_name_breaks_a_line_or_a_terminal(self) -> None:
        for form in (TextLines(), JsonLines()):
            line = form.format(record("export %s", NASTY, fields={"export": NASTY, "contexts": [NASTY]}))
            assert line.isprintable() and "\\n" in line
        found = json.loads(line)
        assert found["message"] == "export " + found["export"]
        assert found["export"].startswith("a\nnbdbm: forged\x1b[31m\x00\x9b\u2028")
        found["export"].encode()  # no half of a surrogate pair

    def test_json(self) -> None:
        made = record("%s", "hello", level=logging.WARNING, fields={"operations": 3, "export": None})
        made.created = datetime(2026, 1, 2, 3, 4, 5, 678000, UTC).timestamp()
        assert json.loads(JsonLines().format(made)) == {
            "time": "2026-01-02T03:04:05.678Z",
            "level": "warning",
            "logger": "nbdbm.some",
            "message": "hello",
            "operations": 3,
            "export": None,
        }

    def test_tracebacks(self) -> None:
        try:
            raise OSError(NASTY)
        except OSError:
            made = record("failed")
            made.exc_info = sys.exc_info()
        first, *others = TextLines().format(made).split("\n")
        assert first == "nbdbm: failed" and others[0].startswith("Traceback")
        line = JsonLines().format(made)
        assert "\n" not in line and json.loads(line)["traceback"].startswith("Traceback")

    def test_a_long_message_is_cut(self) -> None:
        line = TextLines().format(record("%s", "x" * 10_000))
        assert line.endswith("...") and len(line) < MAX_MESSAGE + 20


class TestFloods:
    def test_the_same_again_is_counted(self) -> None:
        recorder = Recorder()
        handler = recorder.log()
        for number in range(1000):
            handler.emit(record("failed: %d", number, level=logging.WARNING))
        handler.emit(record("another"))
        assert recorder.lines[:BURST] == [f"nbdbm: failed: {number}" for number in range(BURST)]
        assert recorder.lines[BURST:] == ["nbdbm: another"]
        recorder.now = WINDOW
        handler.emit(record("failed: %d", 7, level=logging.WARNING))
        assert recorder.lines[BURST + 1 :] == [
            f"nbdbm: {1000 - BURST} more lines like this one: failed: 999",
            "nbdbm: failed: 7",
        ]

    def test_the_number_is_written_when_the_flood_is_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(logs, "WINDOW", 0.05)
        recorder = Recorder()
        handler = recorder.log(JsonLines())

        async def main() -> None:
            for number in range(BURST + 5):
                handler.emit(record("failed: %d", number))
            while len(recorder.lines) <= BURST:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(main(), TIMEOUT))
        assert json.loads(recorder.lines[-1])["more"] == 5
        handler.close()
        assert len(recorder.lines) == BURST + 1

    def test_and_at_the_end(self) -> None:
        recorder = Recorder()
        handler = recorder.log()
        for number in range(BURST + 1):
            handler.emit(record("failed: %d", number))
        handler.close()
        assert recorder.lines[-1] == f"nbdbm: 1 more lines like this one: failed: {BURST}"

    def test_debugging_is_not_limited_and_others_may_say_more(self) -> None:
        recorder = Recorder()
        handler = recorder.log()
        for _ in range(3 * BURST):
            handler.emit(record("<", level=logging.DEBUG))
            handler.emit(record("ended", burst=2 * BURST))
        assert recorder.lines.count("nbdbm: <") == 3 * BURST
        assert recorder.lines.count("nbdbm: ended") == 2 * BURST

    def test_memory_does_not_grow_with_what_is_said(self) -> None:
        handler = Recorder().log()
        for number in range(10_000):
            handler.emit(record("export %r failed", f"name {number}"))
        assert len(handler._kinds) == 1


def test_a_message_with_a_bug_is_no_end() -> None:
    recorder = Recorder()
    recorder.log().emit(record("%d", "not a number"))
    (line,) = recorder.lines
    assert line.startswith("nbdbm: a message of nbdbm.some cannot be written: TypeError")


class TestWriter:
    @pytest.fixture
    def pipe(self) -> Iterator[tuple[int, int]]:
        read_end, write_end = os.pipe()
        yield read_end, write_end
        for end in (read_end, write_end):
            with suppress(OSError):
                os.close(end)

    def test_a_full_pipe_does_not_block(self, pipe: tuple[int, int]) -> None:
        read_end, write_end = pipe
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 65536)
        handler = ServerLog(Writer(write_end))
        handler.setFormatter(TextLines())
        for _ in range(200):
            handler.emit(record("x" * 1500, level=logging.DEBUG))
        lost = handler._lost
        assert 100 < lost < 200
        first = os.read(read_end, 1 << 20).decode().split("\n")
        assert len(first) >= 200 - lost
        handler.emit(record("again"))
        rest = os.read(read_end, 1 << 20).decode().lstrip("\n").split("\n")
        assert rest == [f"nbdbm: {lost} lines were lost", "nbdbm: again", ""]

    def test_a_cut_line_ends_before_the_next(self, pipe: tuple[int, int]) -> None:
        read_end, write_end = pipe
        size = fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 8192)
        write = Writer(write_end)
        assert not write("y" * (size * 2))
        assert os.read(read_end, 1 << 20) == b"y" * size
        assert write("next")
        assert os.read(read_end, 100) == b"\nnext\n"

    def test_a_closed_pipe_is_no_end(self, pipe: tuple[int, int]) -> None:
        read_end, write_end = pipe
        os.close(read_end)
        assert not Writer(write_end)("text")

    def test_a_full_disk_is_no_end(self) -> None:
        with open("/dev/full", "wb") as full:
            assert not Writer(full.fileno())("text")


# -- the program


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 65536)
    return path


def serve(image: Path, *options: object) -> list[str]:
    words = [sys.executable, "-m", "nbdbm", "serve", "-r", "-f", "raw", "-x", "my disk"]
    return [*words, *map(str, options), str(image)]


@contextmanager
def client(path: Path) -> Iterator[socket.socket]:
    """In transmission, simple replies."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(str(path))
        stream = sock.makefile("rb")
        stream.read(18)
        sock.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, 7) + b"my disk")  # EXPORT_NAME
        stream.read(10)
        stream.close()
        yield sock


def read_and_leave(path: Path) -> None:
    with client(path) as sock:
        sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 4096))
        received = 0
        while received < 16 + 4096:
            received += len(sock.recv(1 << 16))
        sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 2, 0, 0))
        assert sock.recv(1) == b""


def test_one_line_for_each_connection(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with started(*serve(image, "-k", path)) as (process, _):
        read_and_leave(path)
        status, said = ended(process)
    assert status == 0
    (line,) = said.splitlines()
    who = f"unix pid {os.getpid()} uid {os.getuid()}"
    assert line.startswith(
        f"nbdbm: {who}: export 'my disk', 0 contexts, 1 operations (0 failed), read 4096 bytes, wrote 0, "
    )
    assert line.endswith(" s, goodbye")


def test_json_lines(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with started(*serve(image, "-k", path, "--log-format", "json")) as (process, _):
        read_and_leave(path)
        with client(path) as sock:
            sock.sendall(b"\n" * 28)
            assert sock.recv(1) == b""
        with client(path):
            _, said = ended(process)
    good, bad, stopped = [json.loads(line) for line in said.splitlines()]
    assert good["export"] == "my disk" and good["bytes_read"] == 4096 and good["ended"] == "goodbye"
    assert good["level"] == "info" and good["logger"] == "nbdbm.server.account"
    when = datetime.fromisoformat(good["time"].replace("Z", "+00:00"))
    assert abs((datetime.now(UTC) - when).total_seconds()) < 600
    assert bad["ended"] == "protocol error" and "magic" in bad["reason"]
    assert stopped["ended"] == "server shutdown"


@pytest.mark.parametrize(("options", "lines"), [([], 1), (["-q"], 0)])
def test_quiet(image: Path, tmp_path: Path, options: list[str], lines: int) -> None:
    path = tmp_path / "s"
    with started(*serve(image, "-k", path, *options)) as (process, _):
        read_and_leave(path)
        assert len(ended(process)[1].splitlines()) == lines


@pytest.mark.parametrize(("options", "lines"), [([], 0), (["-v"], 1)])
def test_stderr_belongs_to_the_command_of_run(
    image: Path, tmp_path: Path, options: list[str], lines: int
) -> None:
    script = (
        "import os, pathlib; from tests.cli.test_logs import read_and_leave;"
        " read_and_leave(pathlib.Path(os.environ['unixsocket']))"
    )
    root = Path(__file__).resolve().parents[2]
    command = f'cd {root} && {sys.executable} -c "{script}"'
    done = run(*serve(image, *options, "--run", command))
    assert done.returncode == 0, done.stderr
    assert sum("goodbye" in line and "export 'my disk'" in line for line in done.stderr.splitlines()) == lines
    assert bool(options) or done.stderr == ""


@pytest.mark.parametrize(("option", "traced"), [("-v", False), ("-vv", True)])
def test_the_wire_is_traced_for_two(image: Path, tmp_path: Path, option: str, traced: bool) -> None:
    path = tmp_path / "s"
    with started(*serve(image, "-k", path, option)) as (process, _):
        read_and_leave(path)
        said = ended(process)[1]
    assert ("nbdbm: < " in said) is traced and "goodbye" in said


@pytest.mark.parametrize("how", ["closed", "full", "none"])
def test_nobody_reads_stderr(image: Path, tmp_path: Path, how: str) -> None:
    """The server serves on, and ends well."""
    path = tmp_path / "s"
    read_end, write_end = os.pipe()
    if how == "full":
        os.set_blocking(write_end, False)
        try:
            while True:
                os.write(write_end, b"x" * 4096)
        except BlockingIOError:
            os.set_blocking(write_end, True)
    elif how == "closed":
        os.close(read_end)
    command = serve(image, "-k", path, "-vv")
    if how == "none":
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=write_end, text=True, env=environment()
    )
    os.close(write_end)
    try:
        assert process.stdout is not None and process.stdout.readline().startswith("nbd+unix:")
        for _ in range(20):
            read_and_leave(path)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0
    finally:
        process.kill()
        process.wait(TIMEOUT)
        assert process.stdout is not None
        process.stdout.close()
        if how != "closed":
            os.close(read_end)


def test_warnings_of_other_commands_are_lines_of_the_program() -> None:
    script = (
        "import click, logging, nbdbm.cli\n"
        "nbdbm.cli.main.get_command(click.Context(nbdbm.cli.main), 'map')\n"
        "logging.getLogger('nbdbm.tlsfiles').warning('%s: is open to others', 'k\\x1b')\n"
        "logging.getLogger('nbdbm.image').info('nothing')"
    )
    done = run(sys.executable, "-c", script)
    assert (done.returncode, done.stderr) == (0, "nbdbm: k\\x1b: is open to others\n")


def test_what_ends_a_server_before_it_serves_is_json_too(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[[export]]\nimage = 1\nnome = "a"\n')
    command = [sys.executable, "-m", "nbdbm", "serve", "--log-format", "json"]
    for arguments, messages in (
        ([tmp_path / "no.qcow2"], ["cannot be opened: No such file or directory"]),
        (["--config", tmp_path / "c.toml"], ["line 2: export.1.image", "line 3: export.1.nome"]),
    ):
        done = run(*command, *map(str, arguments))
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert (done.returncode, len(lines)) == (1, len(messages))
        for line, expected in zip(lines, messages, strict=True):
            assert line["level"] == "error" and expected in line["message"]
