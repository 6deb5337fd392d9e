"""Fixtures for the interoperability tests."""

from __future__ import annotations

import socket

import pytest

from tests.support import qemu
from tests.support.marks import missing


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
