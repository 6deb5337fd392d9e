"""``nbdbm serve --metrics`` as a process: scraped over HTTP while libnbd's traffic goes on."""

from __future__ import annotations

import http.client
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from nbdbm.config import ServerConfig, host_and_port
from nbdbm.errors import UsageError
from tests.cli.program import SERVE, TIMEOUT, ended, qcow2, raw, started
from tests.server.test_exposition import Series, parsed, value
from tests.support import libnbd
from tests.support.servers import nbdbm_run


def fetched(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def scraped(url: str) -> Series:
    status, text = fetched(url)
    assert status == 200
    return parsed(text)


@pytest.mark.requires("libnbd")
def test_libnbd_is_counted_to_the_request(tmp_path: Path) -> None:
    image, path = qcow2(tmp_path / "disk.qcow2", "day"), tmp_path / "s"
    command = (*SERVE, "-x", "disk", "-k", str(path), "--metrics", "127.0.0.1:0", str(image))
    with started(*command, lines=5) as (process, said):
        url = said[4].removeprefix("metrics: ")
        nbd = libnbd.module()
        handle = nbd.NBD()
        handle.add_meta_context("qemu:dirty-bitmap:day")
        handle.connect_uri(f"nbd+unix:///disk?socket={path}")
        handle.set_strict_mode(0)
        for number in range(20):
            handle.pwrite(bytes([number + 1]) * 4096, number * 4096)
        for number in range(30):
            handle.pread(8192, number * 8192)
        handle.zero(65536, 65536)
        handle.trim(65536, 131072)
        handle.flush()
        handle.cache(65536, 0)
        seen = []
        handle.block_status(1 << 20, 0, lambda *arguments: seen.append(arguments))
        with pytest.raises(nbd.Error):
            handle.pread(512, 1 << 30)
        series = scraped(url)
        for command_, operations, size in (
            ("write", 20, 81920),
            ("read", 31, 245760),
            ("zero", 1, 65536),
            ("trim", 1, 65536),
            ("flush", 1, 0),
            ("cache", 1, 65536),
            ("status", 1, 0),
            ("other", 0, 0),
        ):
            labels = {"export": "disk", "command": command_}
            assert value(series, "nbdbm_requests_total", **labels) == operations, command_
            assert value(series, "nbdbm_request_bytes_total", **labels) == size, command_
        errors = [(dict(labels), found) for (name, labels), found in series.items() if "_errors" in name]
        assert errors == [({"export": "disk", "command": "read", "error": "EINVAL"}, 1)]
        assert value(series, "nbdbm_connections") == value(series, "nbdbm_connections_total") == 1
        # As the client itself was told.
        assert value(series, "nbdbm_bitmap_dirty_bytes", export="disk", bitmap="day") == 3 * 65536
        assert value(series, "nbdbm_bitmap_state", export="disk", bitmap="day", state="in use") == 1
        handle.shutdown()
        deadline = time.monotonic() + TIMEOUT
        while value(after := scraped(url), "nbdbm_connections"):
            assert time.monotonic() < deadline
        assert value(after, "nbdbm_connection_ends_total", ended="goodbye") == 1
        assert value(after, "nbdbm_requests_total", export="disk", command="write") == 20
        assert ended(process) == (0, "")


def test_an_inconsistent_bitmap_is_seen(tmp_path: Path) -> None:
    image, path = qcow2(tmp_path / "disk.qcow2", "day", "week"), tmp_path / "s"
    with started(*SERVE, "-k", str(path), str(image), lines=5) as (process, _):
        process.kill()
        process.wait(TIMEOUT)
    with started(*SERVE, "-k", str(path), "--metrics", "0", str(image), lines=4) as (process, said):
        series = scraped(said[3].removeprefix("metrics: "))
        assert value(series, "nbdbm_bitmaps_inconsistent", export="") == 2
        assert value(series, "nbdbm_bitmap_state", export="", bitmap="week", state="inconsistent") == 1
        assert not any(name == "nbdbm_bitmap_dirty_bytes" for name, _ in series)


def test_health_until_the_end(tmp_path: Path) -> None:
    """A client that does not read keeps the server from ending at once: meanwhile it is not healthy."""
    image, path = raw(tmp_path / "disk.img", "a"), tmp_path / "s"
    image.write_bytes(bytes(64 << 20))
    command = (*SERVE, "-r", "-f", "raw", "-k", str(path), "--metrics", "127.0.0.1:0", str(image))
    with started(*command, lines=4) as (process, said):
        health = said[3].removeprefix("metrics: ").replace("/metrics", "/healthz")
        assert fetched(health) == (200, "serving\n")
        assert fetched(health.replace("/healthz", "/"))[0] == 404
        client = subprocess.Popen(
            ["python3", "-c", READS_NOTHING, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert client.stdout is not None and client.stdout.readline() == b"asked\n"
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + TIMEOUT
            while fetched(health) != (503, "stopping\n"):
                assert time.monotonic() < deadline
            process.send_signal(signal.SIGTERM)  # it need not wait for that client
            assert process.wait(TIMEOUT) == 0
            with pytest.raises((urllib.error.URLError, http.client.HTTPException)):
                fetched(health)
        finally:
            client.kill()
            client.communicate()


READS_NOTHING = """
import socket, struct, sys
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
peer.recv(18, socket.MSG_WAITALL)
peer.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
peer.recv(10, socket.MSG_WAITALL)
for number in range(8):
    peer.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, number, 0, 32 << 20))
peer.recv(16, socket.MSG_WAITALL)
print("asked", flush=True)
sys.stdin.read()
"""


def test_a_public_address_is_warned_about(tmp_path: Path) -> None:
    image, path = raw(tmp_path / "disk.img", "a"), tmp_path / "s"
    command = (*SERVE, "-r", "-f", "raw", "-k", str(path), "--metrics", "0.0.0.0:0", str(image))
    with started(*command, lines=4) as (process, said):
        assert said[3].startswith("metrics: http://localhost:")
        status, errors = ended(process)
        assert status == 0 and "other machines can reach this" in errors and "names of exports" in errors


def test_from_the_configuration_file(tmp_path: Path) -> None:
    raw(tmp_path / "disk.img", "a")
    file = tmp_path / "c.toml"
    text = '[listen]\nsocket = "s"\n[server]\nmetrics = ":0"\n[[export]]\nimage = "disk.img"\n'
    file.write_text(text + 'format = "raw"\nread-only = true\n')
    with started(*SERVE, "--config", str(file), lines=4) as (_, said):
        assert said[3].startswith("metrics: http://localhost:")
        assert fetched(said[3].removeprefix("metrics: "))[0] == 200
    file.write_text(text.replace(":0", "1.2.3.4") + 'format = "raw"\n')
    done = nbdbm_run("serve", "--config", file)
    assert done.returncode == 1
    assert "line 4: server.metrics: 1.2.3.4: must be ADDR:PORT or PORT" in done.stderr


def test_a_port_in_use(tmp_path: Path) -> None:
    image, path = raw(tmp_path / "disk.img", "a"), tmp_path / "s"
    command = (*SERVE, "-r", "-f", "raw", "-k", str(path), "--metrics", "127.0.0.1:0", str(image))
    with started(*command, lines=4) as (_, said):
        port = said[3].removesuffix("/metrics").rpartition(":")[2]
        done = nbdbm_run(
            "serve", "-r", "-f", "raw", "-k", tmp_path / "t", "--metrics", f"127.0.0.1:{port}", image
        )
        assert done.returncode == 1 and f"127.0.0.1:{port}: Address already in use" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("9100", ("localhost", 9100)),
        (":9100", ("localhost", 9100)),
        ("192.0.2.1:0", ("192.0.2.1", 0)),
        ("[::1]:9100", ("::1", 9100)),
        ("*:9100", ("*", 9100)),
    ],
)
def test_addresses(text: str, found: tuple[str, int]) -> None:
    assert host_and_port("metrics", text) == found


@pytest.mark.parametrize("text", ["", "host", "host:", ":65536", ":-1", "::1:9100", "a:٣", "h:999999", ":1 "])
def test_no_addresses(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--metrics"):
        ServerConfig(metrics=text)
