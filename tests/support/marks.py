"""What a test needs from outside, by name: ``pytestmark = requires("qemu-img", "libnbd")``.

A missing peer skips the test with its reason, or fails it where NBDBM_REQUIRE_PEERS is set (``make
test`` and continuous integration set it): there, a test that did not run must not look like one that
passed. tests/conftest.py acts on the mark.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import cache, partial

import pytest

from tests.support import guest, imageio, libnbd, machine, nbdkit, qemu, virtnbdbackup


def requires(*peers: str) -> pytest.MarkDecorator:
    """Mark a test as needing ``peers``, names out of PEERS."""
    unknown = set(peers) - PEERS.keys()
    assert not unknown, f"no such peer: {unknown}"
    return pytest.mark.requires(*peers)


def missing(peer: str) -> str | None:
    """Why ``peer`` cannot be used here, or None if it can."""
    return _missing(peer)


def peers_are_required() -> bool:
    """Whether a missing peer is a failure."""
    return os.environ.get("NBDBM_REQUIRE_PEERS", "") not in ("", "0")


@cache
def _missing(peer: str) -> str | None:
    return PEERS[peer]()


def _program(name: str) -> Callable[[], str | None]:
    def judge() -> str | None:
        return None if shutil.which(name, path=qemu.SEARCH_PATH) else f"the program {name} is not installed"

    return judge


def _compiled() -> str | None:
    if importlib.util.find_spec("nbdbm._speed") is not None:
        return None
    return "the package was installed without a compiler: install it again with gcc and Python's headers"


PEERS: dict[str, Callable[[], str | None]] = {
    **{
        name: _program(name)
        for name in (
            "qemu-img",
            "qemu-io",
            "qemu-nbd",
            "openssl",
            "fio",
            "nbdinfo",
            "nbdcopy",
            "nbdkit",
            "nbd-client",
            "nbd-server",
            "man",
            "mandoc",
            "bash",
            "zsh",
            "fish",
            "systemd-analyze",
            "dpkg-deb",
            "ip",
        )
    },
    "compiled": _compiled,
    "imageio": imageio.missing,
    **{kernel: partial(guest.missing, suite) for kernel, suite in guest.KERNELS.items()},
    "libnbd": libnbd.missing,
    "machine": machine.missing,
    "nbdkit-python": nbdkit.missing,
    "newer": qemu.newer_missing,
    "python3.13": qemu.newer_python_missing,
    "virtnbdbackup": virtnbdbackup.missing,
}
