"""Clients whose machine loses its power or its cable: nobody says that the connection ends.

The server waits five minutes for that; here it is told to wait three seconds.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbm.nbd.constants import Cmd
from tests.interop.hostile import Peer, request
from tests.interop.writing import Guest, blank, judge
from tests.support import network, qemu, servers
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-nbd", "libnbd", "ip")]

SIZE = 64 << 20
MIB = 1 << 20
IMPATIENT = """
import sys
from nbdbm.server import listener, server
listener.KEEPALIVE_IDLE = listener.KEEPALIVE_INTERVAL = 1
listener.KEEPALIVE_COUNT = 2
server.SILENCE, server.LOOK_AROUND = 3, 0.2
from nbdbm.cli import program
sys.argv[0] = "nbdbm"
program()
"""
TIMEOUT = 50


@pytest.fixture
def cable() -> Iterator[network.Network]:
    with network.cable() as made:
        yield made


def test_their_places_and_memory_are_given_back(cable: network.Network, tmp_path: Path) -> None:
    """Whatever they were at: nothing, replies on their way to them, a payload on its way from them."""
    case = blank(tmp_path, SIZE, ("b", 65536))
    log = tmp_path / "server"
    options = ["--bind", network.HERE, "--port", "0", "--max-connections", "3"]
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, "serve", *options, str(case.path)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=qemu.environment(),
            preexec_fn=cable.enter(cable.here),
        )
    try:
        port = int(said(log, r"^nbd://[\d.]+:(\d+)")[1])
        idle, reader, writer = (Peer(cable.connect(port)) for _ in range(3))
        for peer in (idle, reader, writer):
            peer.go()
        # Filled, so that reading gives data.
        writer.send(request(Cmd.WRITE, 0, MIB), b"\5" * MIB)
        assert writer.receive(16)[8:] == bytes(8)
        reader.send(*(request(Cmd.READ, 0, MIB, cookie) for cookie in range(60)))
        assert reader.receive(100)
        writer.send(request(Cmd.WRITE, 8 * MIB, MIB), b"\6" * (MIB // 2))
        cable.pull()
        # Somebody else gets a place, and there is the memory again.
        after = Peer(cable.connect_here(port))
        after.socket.settimeout(TIMEOUT)
        after.go()
        for count in range(1, 4):
            said(log, rf"(?s)({network.THERE}:\d+: export .*?){{{count}}}")
        after.send(request(Cmd.READ, 0, 100))
        assert after.receive(116)[16:] == b"\5" * 100
        after.send(request(Cmd.DISC))
        assert after.hung_up()
        assert servers.stop(server) == 0
    finally:
        servers.stop(server)
    ends = re.findall(rf"^nbdbm: {network.THERE}:\d+: export .* s, (.*)$", log.read_text(), re.MULTILINE)
    assert len(ends) == 3, log.read_text()
    silent = "time-out: its machine has not been heard of for 3 s"
    assert silent in ends
    assert set(ends) <= {silent, "disconnected: [Errno 110] Connection timed out"}, ends
    guest = Guest(bytes(SIZE), 1)
    guest.wrote(0, b"\5" * MIB)
    judge(case, guest, {"b": set()})


def said(log: Path, pattern: str) -> re.Match[str]:
    """Until the server has said it."""
    deadline = time.monotonic() + TIMEOUT
    while not (found := re.search(pattern, log.read_text(), re.MULTILINE)):
        assert time.monotonic() < deadline, f"no {pattern!r} in\n{log.read_text()}"
        time.sleep(0.05)
    return found
