"""What lets others watch a run of ``nbdbm serve``, from before its images are opened until all is closed."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from nbdbm.config import ServerConfig, host_and_port

if TYPE_CHECKING:
    from nbdbm.server.listener import Listener
    from nbdbm.server.server import Server

CONTROL_MODE = 0o600
"""Permissions of the control socket: it tells the names of everything, and who uses it."""

log = logging.getLogger(__name__)


@asynccontextmanager
async def observed(config: ServerConfig, server: Server) -> AsyncIterator[list[str]]:
    """Inside the block ``server`` can be watched as configured; yields where, one line for each."""
    places: list[str] = []
    async with AsyncExitStack() as stack:
        if config.metrics is not None:
            places.append(f"metrics: {_metrics(config.metrics, server, stack)}")
        if config.control is not None:
            _control(config.control, server, stack)
        for place in places:
            log.info("%s", place)
        yield places


def _metrics(address: str, server: Server, stack: AsyncExitStack) -> str:
    """Answer Prometheus until ``stack`` unwinds; the URL."""
    from nbdbm.server.exposition import Exposition
    from nbdbm.server.listener import bind_tcp
    from nbdbm.server.responder import Responder, http

    listener = bind_tcp(*host_and_port("metrics", address))
    url = f"http://{_authority(listener)}/metrics"
    if listener.exposed:
        log.warning("%s: other machines can reach this, and learn the names of exports and bitmaps", url)
    responder = Responder(listener, http(Exposition(server).pages))
    stack.push_async_callback(responder.close)
    responder.start()
    return url


def _control(path: str, server: Server, stack: AsyncExitStack) -> None:
    """Answer ``nbdbm status`` until ``stack`` unwinds."""
    from nbdbm.control import control
    from nbdbm.server.listener import UnixListener
    from nbdbm.server.responder import Responder

    responder = Responder(UnixListener(path, CONTROL_MODE), control(server))
    stack.push_async_callback(responder.close)
    responder.start()


def _authority(listener: Listener) -> str:
    """Host and port as a URL has them."""
    uri = listener.uri("")
    return f"[{uri.host}]:{uri.port}" if ":" in uri.host else f"{uri.host}:{uri.port}"
