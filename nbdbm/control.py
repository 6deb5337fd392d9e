"""The control socket of a server: one JSON object a line, asked and answered in the shape of QEMU's QMP.

    {"execute": "nbdbm-status"}
    {"return": {"version": ..., "exports": [...], "clients": [...]}}

Whoever may connect to the socket learns everything there is to know; nothing can be changed by it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from nbdbm import __version__
from nbdbm.metrics import Tally
from nbdbm.registry import Slot
from nbdbm.server.account import Totals
from nbdbm.server.connection import NbdConnection
from nbdbm.server.responder import Talk
from nbdbm.server.server import Server
from nbdbm.server.turns import Turns

STATUS = "nbdbm-status"

MAX_LISTED = 1000
"""Exports, and clients, that an answer has; ``exports_more`` and ``clients_more`` count the others."""

MAX_BITMAPS = 100
"""Bitmaps of one export that it has; ``bitmaps_more`` counts the others."""

MAX_CONTEXTS = 16
"""Contexts of one client that it has; ``contexts_more`` counts the others."""


AT_ONCE = 64 * 1024
"""Characters of an answer that are made before they are sent."""


class Refusal(Exception):
    """A line that is not answered; ``kind`` is what QMP calls its class."""

    def __init__(self, desc: str, kind: str = "GenericError") -> None:
        super().__init__(desc)
        self.kind = kind


def control(server: Server) -> Talk:
    """A conversation about ``server``: line by line, until the other side has said all."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                line = await reader.readline()
            except ValueError:
                # Where the next line begins is not known.
                writer.write(json.dumps(_error(Refusal("the line is too long"))).encode() + b"\n")
                return
            if not line:
                return
            if line.strip():
                await _say(answer(server, line), writer)

    return talk


async def _say(text: Iterator[str], writer: asyncio.StreamWriter) -> None:
    """Send a line, made in small steps, no faster than it is taken."""
    turns, held = Turns(), 0
    for piece in text:
        writer.write(piece.encode())
        held += len(piece)
        if held >= AT_ONCE:
            await writer.drain()
            held = 0
        await turns.step()
    writer.write(b"\n")
    await writer.drain()


def answer(server: Server, line: bytes) -> Iterator[str]:
    """What is said to one line: JSON, in pieces that take little time each."""
    try:
        _judge(line)
    except Refusal as refusal:
        yield json.dumps(_error(refusal))
        return
    yield '{"return": '
    yield from status(server)
    yield "}"


def _judge(line: bytes) -> None:
    """Raise Refusal unless it asks for the status."""
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError):
        raise Refusal("not JSON") from None
    if not isinstance(asked, dict) or not isinstance(asked.get("execute"), str):
        raise Refusal('not an object with "execute", a string')
    if asked["execute"] != STATUS:
        raise Refusal(f"no such command; there is {STATUS}", "CommandNotFound")
    if asked.get("arguments", {}) != {} or asked.keys() - {"execute", "arguments"}:
        raise Refusal(f"{STATUS} takes no arguments")


def _error(refusal: Refusal) -> dict[str, Any]:
    return {"error": {"class": refusal.kind, "desc": str(refusal)}}


def status(server: Server) -> Iterator[str]:
    """The server as a JSON object, each part as it is when its turn comes.

    Sizes are bytes; keys are only ever added.

    ``exports``: ``name``, ``description``, ``open``, ``mode`` (``read-only``, ``writable``; null while it
    is not open, as are ``size``, ``bitmaps`` and ``caches``), ``clients`` (connected now), and what was done
    since the server began: ``operations``, ``errors``, ``bytes_read``, ``bytes_written``.

    ``clients``: ``client``, ``export`` (null before it has one), ``contexts``, ``seconds`` (since it came),
    ``operations`` ... as above, ``in_flight`` (requests), ``memory``.
    """
    slots, clients = list(server.registry.slots()), list(server.clients)
    totals = Totals(server.metrics, [each.account for each in clients])
    head: dict[str, Any] = {
        "version": __version__,
        "state": "serving" if server.serving else "stopping" if server.closing else "starting",
        "time": round(time.time(), 3),
        "connections": len(clients),
        "connections_total": server.metrics.accepted,
        "connections_refused": server.metrics.refused,
    }
    for key, count in (("exports_more", len(slots)), ("clients_more", len(clients))):
        if count > MAX_LISTED:
            head[key] = count - MAX_LISTED
    yield json.dumps(head)[:-1]
    yield from _listed("exports", (_export(slot, totals) for slot in slots[:MAX_LISTED]))
    yield from _listed("clients", (_client(each) for each in clients[:MAX_LISTED]))
    yield "}"


def _listed(key: str, values: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A member of an object, after others."""
    yield f', "{key}": ['
    for index, value in enumerate(values):
        yield ", " * bool(index) + json.dumps(value)
    yield "]"


def _done(tally: Tally) -> dict[str, Any]:
    return {
        "operations": tally.operations,
        "errors": tally.errors,
        "bytes_read": tally.commands["read"].bytes,
        "bytes_written": tally.commands["write"].bytes,
    }


def _export(slot: Slot, totals: Totals) -> dict[str, Any]:
    name, export = slot.source.name, slot.export
    tally, users = totals.of(name)
    made: dict[str, Any] = {
        "name": name,
        "description": slot.source.description,
        "open": export is not None,
        "mode": None if export is None else "read-only" if export.read_only else "writable",
        "size": None if export is None else export.info.size,
        "clients": users,
        **_done(tally),
        "bitmaps": None,
        "caches": None,
    }
    if export is not None:
        bitmaps = export.bitmaps
        made["bitmaps"] = [
            {
                "name": each.name,
                "state": each.state,
                "recording": each.enabled,
                "granularity": each.granularity,
                "dirty": each.dirty,
            }
            for each in bitmaps[:MAX_BITMAPS]
        ]
        if len(bitmaps) > MAX_BITMAPS:
            made["bitmaps_more"] = len(bitmaps) - MAX_BITMAPS
        made["caches"] = [
            {"name": each.name, "hits": each.hits, "misses": each.misses, "bytes": each.bytes}
            for each in export.caches
        ]
    return made


def _client(client: NbdConnection) -> dict[str, Any]:
    account = client.account
    made: dict[str, Any] = {
        "client": str(client.peer),
        "export": account.export,
        "contexts": [*account.contexts[:MAX_CONTEXTS]],
        "seconds": round(time.monotonic() - account.began, 3),
        **_done(account.tally or Tally()),
        "in_flight": client.running,
        "memory": client.held,
    }
    if len(account.contexts) > MAX_CONTEXTS:
        made["contexts_more"] = len(account.contexts) - MAX_CONTEXTS
    return made
