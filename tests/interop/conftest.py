"""Fixtures for the interoperability tests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.support import qemu, servers
from tests.support.marks import missing

HASTE = 10
"""Seconds before pytest-timeout's signal, which cannot interrupt a wait inside libnbd."""


@pytest.fixture(autouse=True)
def watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    """End the servers under a test that takes too long, so that it fails instead of hanging."""
    mark = request.node.get_closest_marker("timeout")
    limit = mark.args[0] if mark else float(request.config.getini("timeout"))
    timer = threading.Timer(limit - HASTE, servers.kill_all)
    timer.start()
    yield
    timer.cancel()


@pytest.fixture(params=["system", "newer"])
def tools(request: pytest.FixtureRequest) -> qemu.Tools:
    """Debian 12's tools, then Debian 13's; a test that uses this carries ``requires("newer")``."""
    if request.param == "system":
        return qemu.SYSTEM
    reason = missing("newer")
    assert reason is None, reason
    return qemu.newer()


@pytest.fixture
def unused_port() -> int:
    """A TCP port of the loopback interface that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
