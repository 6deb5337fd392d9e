"""A network of two machines: namespaces with a cable between them, which can be pulled.

Only root may make them, and in some containers not even root: where it is refused, the test is skipped with
the reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.support import qemu

CLONE_NEWNET = 0x40000000
HERE, THERE = "198.51.100.1", "198.51.100.2"
"""Addresses that belong to nobody (RFC 5737)."""


@dataclass
class Network:
    """The server's machine (HERE) and the client's (THERE), as descriptors of their namespaces."""

    here: int
    there: int
    stack: contextlib.ExitStack
    """What ends with it: connections, too."""

    def enter(self, namespace: int) -> Callable[[], None]:
        """For ``preexec_fn``: run in a namespace."""
        return lambda: _set(namespace)

    def connect(self, port: int) -> socket.socket:
        """From THERE to a port of HERE."""
        return self._connect(self.there, port)

    def connect_here(self, port: int) -> socket.socket:
        """From HERE itself."""
        return self._connect(self.here, port)

    def _connect(self, namespace: int, port: int) -> socket.socket:
        with _inside(namespace):
            return self.stack.enter_context(socket.create_connection((HERE, port), 20))

    def pull(self) -> None:
        """From now on nothing is heard of THERE, not even that its connections end."""
        _ip(self.there, "link", "set", "cable", "down")


@contextlib.contextmanager
def cable() -> Iterator[Network]:
    """Two machines for a block."""
    with contextlib.ExitStack() as stack:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        stack.callback(os.close, home)
        found = []
        for _ in range(2):
            try:
                _call("unshare", CLONE_NEWNET)
            except OSError as error:
                pytest.skip(f"network namespaces cannot be made here: {error.strerror}")
            found.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))
            stack.callback(os.close, found[-1])
            _set(home)
        network = Network(*found, stack)
        there = f"/proc/{os.getpid()}/fd/{network.there}"
        _ip(network.here, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", there)
        for namespace, address in ((network.here, HERE), (network.there, THERE)):
            _ip(namespace, "link", "set", "lo", "up")
            _ip(namespace, "address", "add", f"{address}/24", "dev", "cable")
            _ip(namespace, "link", "set", "cable", "up")
        yield network


@contextlib.contextmanager
def _inside(namespace: int) -> Iterator[None]:
    """This thread in another namespace: sockets that it makes stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _set(namespace)
        yield
        _set(home)
    finally:
        os.close(home)


def _ip(namespace: int, *words: str) -> None:
    with _inside(namespace):
        qemu.run(["ip", *words])


def _set(namespace: int) -> None:
    _call("setns", namespace, CLONE_NEWNET)


def _call(name: str, *args: int) -> None:
    # os.unshare and os.setns came with Python 3.12.
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
