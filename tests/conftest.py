"""Settings for the whole suite: peers that are missing, Hypothesis, asyncio's debug mode."""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import certificates, images, marks

# Two shared cores: how long an example takes says nothing about the code.
settings.register_profile("nbdbm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nbdbm")

# For the tests' own event loops; servers started as subprocesses run as users run them
# (tests/support/servers.py drops the variable).
os.environ.setdefault("PYTHONASYNCIODEBUG", "1")
# In that mode asyncio warns of callbacks that took long, as any may on a busy machine: where a test runs a
# command in this process, that would be a line of its stderr.
logging.getLogger("asyncio").addFilter(lambda record: not record.getMessage().startswith("Executing "))


GALLERY = "NBDBM_TEST_GALLERY"
"""Where the image matrix is kept during a run, shared by pytest-xdist's workers."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requires(*peers): outside programs the test needs (support/marks.py)")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("requires"):
        for peer in mark.args:
            reason = marks.missing(peer)
            if reason is None:
                continue
            if marks.peers_are_required():
                pytest.fail(f"{peer}: {reason} (make peers installs it)", pytrace=False)
            pytest.skip(f"{peer}: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End the process if a test does not end after its time-out either.

    The time-out is an exception out of a signal's handler: an event loop that happens to be in a callback
    takes it for the callback's failure, loses what was to come next, and waits for ever.
    """
    mark = item.get_closest_marker("timeout")
    seconds = mark.args[0] if mark is not None else float(item.config.getini("timeout"))
    faulthandler.dump_traceback_later(2 * seconds + 120, exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


MADE = pytest.StashKey[str]()


def pytest_sessionstart(session: pytest.Session) -> None:
    if GALLERY not in os.environ:
        os.environ[GALLERY] = session.config.stash[MADE] = tempfile.mkdtemp(prefix="nbdbm-images-")


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Workers inherit the variable and come here first; the process that made the directory removes it.
    if (made := session.config.stash.get(MADE, None)) is not None:
        del os.environ[GALLERY]
        shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="session")
def gallery() -> images.Gallery:
    """The image matrix (tests/support/recipes.py)."""
    return images.Gallery(Path(os.environ[GALLERY]))


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> certificates.Pki:
    """An authority, a server's and a client's certificate; tests change copies only."""
    return certificates.Pki(tmp_path_factory.mktemp("pki"))
