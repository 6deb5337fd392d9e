"""``nbdbm serve`` as its users run it: a process, its output, its end."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from nbdbm.cli import main, remedy
from nbdbm.cli.serving import command_variables
from nbdbm.uri import NbdUri
from tests.cli.program import TIMEOUT, argv, ended, environment, greeted, run, started

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image, which needs no other program to make."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


class TestOutput:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_uri_then_contexts_then_served(self, image: Path, tmp_path: Path, number: signal.Signals) -> None:
        path = tmp_path / "s"
        with started(*argv(image, "-k", path, "-x", "my disk")) as (process, said):
            assert said == [
                f"nbd+unix:///my%20disk?socket={path}",
                "context: base:allocation",
                "context: qemu:allocation-depth",
            ]
            assert greeted(str(path))
            assert ended(process, number) == (0, "")
            assert not path.exists()

    def test_no_allocation_depth(self, image: Path, tmp_path: Path) -> None:
        options = ("-k", tmp_path / "s", "--no-allocation-depth", "--export-name", "")
        with started(*argv(image, *options), lines=2) as (process, said):
            assert said[1] == "context: base:allocation"
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=TIMEOUT)[0] == ""

    def test_free_port(self, image: Path) -> None:
        with started(*argv(image, "-b", "127.0.0.1", "-p", 0)) as (process, said):
            assert said[0].startswith("nbd://127.0.0.1:")
            assert greeted(("127.0.0.1", int(said[0].rsplit(":", 1)[1])))
            assert ended(process) == (0, "")

    def test_nobody_reads_it(self, image: Path, tmp_path: Path) -> None:
        path = tmp_path / "s"
        read_end, write_end = os.pipe()
        os.close(read_end)
        process = subprocess.Popen(
            argv(image, "-k", path), stdout=write_end, stderr=subprocess.PIPE, text=True, env=environment()
        )
        os.close(write_end)
        try:
            deadline = time.monotonic() + TIMEOUT
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert greeted(str(path))
            assert ended(process) == (0, "")
        finally:
            process.kill()
            process.wait(TIMEOUT)
            assert process.stderr is not None
            process.stderr.close()

    def test_wire_trace(self, image: Path, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with started(*argv(image, "-k", path, "-vv")) as (process, _):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.recv(18)
                client.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 3, 0))  # LIST
                assert client.recv(1000)
            status, errors = ended(process)
            assert status == 0
            assert "nbdbm: < " in errors and "nbdbm: > " in errors and "LIST" in errors


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (["-p0"], "nbdbm: {image}: not a qcow2 image (magic); if it is a raw image, say --format raw"),
            (["-r", "-k", "s", "-p", "1"], "nbdbm: --socket excludes --bind, --port"),
            (["-r", "-e", "-1"], "nbdbm: --max-connections -1: must be"),
            (["-r", "-f", "raw", "-p", "70000"], "nbdbm: --port 70000: a port is a number from 0 to 65535"),
        ],
    )
    def test_one_line(self, image: Path, options: list[str], text: str) -> None:
        result = CliRunner().invoke(main, ["serve", *options, str(image)])
        assert result.exit_code == 1
        # With the suite's debugging, asyncio may complain of a loaded machine before it.
        said = [line for line in result.stderr.splitlines() if not line.startswith("nbdbm: Executing")]
        assert len(said) == 1 and said[0].startswith(text.format(image=image))
        assert result.stdout == ""

    def test_missing_image_leaves_no_socket(self, tmp_path: Path) -> None:
        missing = tmp_path / "none"
        result = run(*argv(missing, "-k", tmp_path / "s"))
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"nbdbm: {missing}: cannot be opened: No such file or directory\n"
        assert os.listdir(tmp_path) == []

    def test_no_such_bitmap(self, image: Path, tmp_path: Path) -> None:
        result = run(*argv(image, "-k", tmp_path / "s", "-B", "b0"))
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"nbdbm: {image}: bitmap 'b0': there is no such bitmap in the image\n"
        assert not (tmp_path / "s").exists()

    def test_live_socket(self, image: Path, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with started(*argv(image, "-k", path)) as (process, _):
            result = run(*argv(image, "-k", path))
            assert result.returncode == 1
            assert result.stderr.startswith(f"nbdbm: {path}: another process is listening there")
            assert result.stderr.count("\n") == 1
            assert greeted(str(path))
            assert ended(process) == (0, "")

    def test_port_in_use(self, image: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            result = run(*argv(image, "-b", "127.0.0.1", "-p", port))
        assert result.returncode == 1
        assert result.stderr == f"nbdbm: 127.0.0.1:{port}: Address already in use\n"


class TestRun:
    def test_exits_as_the_command_does(self, image: Path) -> None:
        result = run(
            *argv(image, "-x", "a b", "--run", 'echo "$uri|$unixsocket|$exportname|$port|$nbd"; exit 7')
        )
        assert result.returncode == 7 and result.stderr == ""
        uri, path, name, port, old = result.stdout.rstrip("\n").split("|")
        assert (uri, name, port) == (f"nbd+unix:///a%20b?socket={path}", "a b", "")
        assert old == f"nbd:unix:{path}:exportname=a b"
        # The private directory is gone.
        assert not os.path.exists(os.path.dirname(path))

    def test_the_export_is_there(self, image: Path) -> None:
        script = (
            "import os, socket; s = socket.socket(socket.AF_UNIX); "
            "s.connect(os.environ['unixsocket']); print(s.recv(8))"
        )
        result = run(*argv(image, "--run", f'{sys.executable} -c "{script}"'))
        assert (result.returncode, result.stdout) == (0, "b'NBDMAGIC'\n"), result.stderr

    def test_on_a_given_address(self, image: Path, tmp_path: Path) -> None:
        result = run(*argv(image, "-k", tmp_path / "s", "--run", "echo $unixsocket"))
        assert result.stdout == f"{tmp_path}/s\n"

    def test_killed_command(self, image: Path) -> None:
        assert run(*argv(image, "--run", "kill -9 $$")).returncode == 128 + 9

    def test_signal_goes_on_to_the_command(self, image: Path) -> None:
        command = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done"
        with started(*argv(image, "--run", command), lines=1) as (process, said):
            assert said == ["ready"]
            assert ended(process) == (5, "")


class TestPidFile:
    def test_there_while_serving(self, image: Path, tmp_path: Path) -> None:
        pid_file = tmp_path / "pid"
        with started(*argv(image, "-k", tmp_path / "s", "--pid-file", pid_file)) as (process, _):
            assert pid_file.read_text() == f"{process.pid}\n"
            assert ended(process) == (0, "")
            assert sorted(os.listdir(tmp_path)) == ["disk.raw"]

    def test_a_successor_keeps_its_own(self, image: Path, tmp_path: Path) -> None:
        pid_file = tmp_path / "pid"
        with started(*argv(image, "-k", tmp_path / "s", "--pid-file", pid_file)) as (process, _):
            pid_file.write_text("1\n")
            assert ended(process) == (0, "")
            assert pid_file.read_text() == "1\n"

    @pytest.mark.parametrize("left", ["", "4711", "4711\n", "  4711\n"])
    def test_one_that_a_crash_left_is_replaced(self, image: Path, tmp_path: Path, left: str) -> None:
        pid_file = tmp_path / "pid"
        pid_file.write_text(left)
        result = run(*argv(image, "--pid-file", pid_file, "--run", f"cat {pid_file}; echo $PPID"))
        first, second = result.stdout.split()
        assert (result.returncode, first) == (0, second)
        assert not pid_file.exists()

    def test_no_other_file_is_replaced(self, image: Path, tmp_path: Path) -> None:
        content = image.read_bytes()
        result = run(*argv(image, "--pid-file", image, "--run", "true"))
        assert result.returncode == 1
        assert result.stderr == (
            f"nbdbm: {image}: exists and is not a PID file; choose another path or remove it\n"
        )
        assert image.read_bytes() == content
        os.mkfifo(tmp_path / "fifo")
        for other in (tmp_path, tmp_path / "fifo"):
            result = run(*argv(image, "--pid-file", other, "--run", "true"))
            assert result.returncode == 1
            assert "is not a PID file" in result.stderr

    def test_no_such_directory(self, image: Path, tmp_path: Path) -> None:
        pid_file = tmp_path / "no" / "pid"
        result = run(*argv(image, "-k", tmp_path / "s", "--pid-file", pid_file))
        assert result.returncode == 1
        assert result.stderr == f"nbdbm: {pid_file}: No such file or directory\n"
        assert not (tmp_path / "s").exists()


class TestServiceManager:
    def activated(self, listening: socket.socket, *command: str) -> list[str]:
        """``command`` started as a service manager does: the socket is descriptor 3, LISTEN_PID its own."""
        script = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ.update(LISTEN_PID=str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"
        )
        return [sys.executable, "-c", script, str(listening.fileno()), *command]

    def test_inherited_socket(self, image: Path, tmp_path: Path) -> None:
        path = tmp_path / "s"
        notified = tmp_path / "notify"
        with (
            socket.socket(socket.AF_UNIX) as listening,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        ):
            listening.bind(str(path))
            listening.listen()
            manager.bind(str(notified))
            manager.settimeout(TIMEOUT)
            process = subprocess.Popen(
                self.activated(listening, *argv(image)),
                pass_fds=[listening.fileno()],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(LISTEN_FDS="1", NOTIFY_SOCKET=str(notified)),
            )
            try:
                assert manager.recv(1000).split(b"\n")[0] == b"READY=1"
                assert greeted(str(path))
                process.send_signal(signal.SIGTERM)
                assert manager.recv(1000) == b"STOPPING=1"
                output, errors = process.communicate(timeout=TIMEOUT)
                assert (process.returncode, errors) == (0, "")
                assert output.startswith(f"nbd+unix:///?socket={path}\n")
                assert path.exists()
            finally:
                process.kill()
                process.communicate()

    def test_excludes_an_address(self, image: Path, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            result = subprocess.run(
                self.activated(listening, *argv(image, "-k", tmp_path / "s")),
                pass_fds=[listening.fileno()],
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                env=environment(LISTEN_FDS="1"),
            )
        assert result.returncode == 1
        assert "LISTEN_FDS" in result.stderr and result.stderr.count("\n") == 1


def test_signals_one_by_one(image: Path, tmp_path: Path) -> None:
    """The first waits for clients to take their replies, the second does not."""
    path = tmp_path / "s"
    with open(image, "r+b") as file:
        file.truncate(64 << 20)
    with started(*argv(image, "-k", path)) as (process, _), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, 0))  # EXPORT_NAME ""
        client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 32 << 20))
        assert client.recv(1)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        status, errors = ended(process)
        assert status == 0
        assert errors == "nbdbm: closing 1 connections before their replies were taken\n"


def test_command_variables_for_tcp() -> None:
    assert command_variables(NbdUri.tcp("localhost", 1234, "e")) == {
        "uri": "nbd://localhost:1234/e",
        "nbd": "nbd:localhost:1234:exportname=e",
        "exportname": "e",
        "unixsocket": "",
        "port": "1234",
    }


def test_remedy_is_quoted_for_the_shell() -> None:
    assert remedy("my disk.qcow2", "b'1") == "nbdbm bitmap remove 'my disk.qcow2' 'b'\"'\"'1'"
    assert remedy("disk.qcow2", "-b") == "nbdbm bitmap remove -- disk.qcow2 -b"
