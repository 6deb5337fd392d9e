"""``nbdbm status``: what a running server does, asked at its control socket."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from nbdbm.cli import printable
from nbdbm.cli.options import FILE
from nbdbm.cli.picture import human
from nbdbm.errors import NbdbmError

if TYPE_CHECKING:
    from rich.console import RenderableType

TIMEOUT = 5.0
"""Seconds for an answer; the server gives us no more."""

MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of an answer: many times what a server with a thousand exports says."""

INTERVAL = 2.0
"""Seconds between two looks of ``--watch``."""

REQUEST = b'{"execute": "nbdbm-status"}\n'

Rates = dict[str, tuple[float, float, float]]
"""By export: operations, bytes read and bytes written, per second."""


class Watchable(click.Command):
    """Takes ``--watch`` without a number too, wherever it stands.

    click gives an option whose value may be left out whatever comes next, and that may be the path.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        found: list[str] = []
        for index, arg in enumerate(args):
            if arg == "--":
                return super().parse_args(ctx, found + args[index:])
            alone = arg == "--watch" and not _is_number(args[index + 1] if index + 1 < len(args) else "")
            found.append(f"--watch={INTERVAL:g}" if alone else arg)
        return super().parse_args(ctx, found)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@click.command(cls=Watchable)
@click.argument("path", type=FILE, metavar="PATH")
@click.option("--json", "as_json", is_flag=True, help="A JSON object; with --watch one a line.")
@click.option(
    "--watch",
    type=click.FloatRange(0.1, 3600),
    metavar="[SECONDS]",
    help=f"Look again and again, with rates, until q or Ctrl-C.  [default: every {INTERVAL:g}]",
)
def status(path: str, as_json: bool, watch: float | None) -> None:
    """Show the exports, clients and bitmaps of the server whose --control is PATH."""
    if watch is None:
        found = ask(path)
        if as_json:
            click.echo(json.dumps(found, indent=2))
        else:
            from nbdbm.cli.tables import console

            console().print(_checked(path, lambda: view(found)))
        return
    if watch != watch:  # NaN is within any range
        raise click.BadParameter("must be a number of seconds", param_hint="'--watch'")
    with suppress(KeyboardInterrupt):  # that is how it ends
        _watch(path, watch, as_json)


def ask(path: str) -> dict[str, Any]:
    """The status of the server at ``path``. Raises NbdbmError or OSError."""
    received = bytearray()
    deadline = time.monotonic() + TIMEOUT
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        try:
            peer.settimeout(TIMEOUT)
            peer.connect(path)
            peer.sendall(REQUEST)
            peer.shutdown(socket.SHUT_WR)
            while some := peer.recv(65536):
                received += some
                if len(received) > MAX_ANSWER or time.monotonic() > deadline:
                    raise NbdbmError(f"{path}: no answer in {TIMEOUT:g} s and {MAX_ANSWER} bytes")
        except TimeoutError:
            raise NbdbmError(f"{path}: no answer in {TIMEOUT:g} s") from None
        except ConnectionRefusedError:
            raise NbdbmError(f"{path}: is not the control socket of a running server") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), path) from error
    try:
        answer = json.loads(received)
        if "error" in answer:
            raise NbdbmError(f"{path}: {answer['error']['desc']}")
        found: dict[str, Any] = answer["return"]
        if not isinstance(found, dict):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise NbdbmError(f"{path}: not the answer of a control socket of nbdbm") from None
    return found


def _checked(path: str, make: Callable[[], RenderableType]) -> RenderableType:
    try:
        return make()
    except (ValueError, TypeError, KeyError, AttributeError):
        raise NbdbmError(f"{path}: not the answer of a control socket of nbdbm") from None


def _watch(path: str, interval: float, as_json: bool) -> None:
    if as_json:
        while True:
            click.echo(json.dumps(ask(path)))
            time.sleep(interval)
    from rich.live import Live

    from nbdbm.cli.tables import console

    before: dict[str, Any] | None = None
    terminal = sys.stdout.isatty()
    with _keys() as quit_within, Live(console=console(), screen=terminal, auto_refresh=False) as live:
        while True:
            now, last = ask(path), before
            shown = _checked(path, lambda now=now, last=last: view(now, rates(last, now)))  # type: ignore[misc]
            if terminal:
                live.update(shown, refresh=True)
            else:
                live.console.print(shown)
            before = now
            if quit_within(interval):
                return


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits so many seconds, and tells whether q was pressed meanwhile."""
    if not sys.stdin.isatty():

        def sleep(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield sleep
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def pressed(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([terminal], [], [], left)[0]:
                keys = os.read(terminal, 64)
                if not keys or b"q" in keys.lower():
                    return True
        return False

    tty.setcbreak(terminal)
    try:
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def rates(before: dict[str, Any] | None, now: dict[str, Any]) -> Rates:
    """What was done between two looks."""
    if before is None:
        return {}
    seconds = max(now["time"] - before["time"], 0.001)
    old = {each["name"]: each for each in before["exports"]}
    found: Rates = {}
    for each in now["exports"]:
        if (past := old.get(each["name"])) is not None:
            keys = ("operations", "bytes_read", "bytes_written")
            done, read, written = (max(0, each[key] - past[key]) / seconds for key in keys)
            found[each["name"]] = (done, read, written)
    return found


def view(found: dict[str, Any], speeds: Rates | None = None) -> RenderableType:
    """The tables; ``speeds`` adds columns to that of the exports."""
    from rich.console import Group

    from nbdbm.cli.tables import table

    more = ("OPS/S:r", "READ/S:r", "WRITTEN/S:r") if speeds is not None else ()
    exports = table(
        "EXPORT", "MODE", "SIZE:r", "CLIENTS:r", "OPS:r", "FAILED:r", "READ:r", "WRITTEN:r", *more
    )
    bitmaps = table("EXPORT", "BITMAP", "STATE", "RECORDING", "GRANULARITY:r", "DIRTY:r")
    for each in found["exports"]:
        name = printable(each["name"]) or '""'
        row = [name, each["mode"] or "not open", "" if each["size"] is None else human(each["size"])]
        row += [str(each["clients"]), *_done(each)]
        if speeds is not None:
            done, read, written = speeds.get(each["name"], (0.0, 0.0, 0.0))
            row += [f"{done:.0f}", human(round(read)), human(round(written))]
        exports.add_row(*row)
        for bitmap in each["bitmaps"] or ():
            dirty = "" if bitmap["dirty"] is None else human(bitmap["dirty"])
            recording = "yes" if bitmap["recording"] else "no"
            size = human(bitmap["granularity"])
            bitmaps.add_row(
                name, printable(bitmap["name"]), printable(bitmap["state"]), recording, size, dirty
            )
    clients = table(
        "CLIENT",
        "EXPORT",
        "CONTEXTS:r",
        "OPS:r",
        "FAILED:r",
        "READ:r",
        "WRITTEN:r",
        "IN FLIGHT:r",
        "MEMORY:r",
    )
    for each in found["clients"]:
        export = "(handshake)" if each["export"] is None else printable(each["export"]) or '""'
        contexts = len(each["contexts"]) + each.get("contexts_more", 0)
        row = [printable(each["client"]), export, str(contexts), *_done(each)]
        clients.add_row(*row, str(each["in_flight"]), human(each["memory"]))
    head = f"nbdbm {printable(found['version'])}, {printable(found['state'])}, "
    head += f"{found['connections']:d} clients now, {found['connections_total']:d} so far, "
    head += f"{found['connections_refused']:d} refused"
    parts: list[RenderableType] = [head, "", exports]
    for each in (clients, bitmaps):
        if each.row_count:
            parts += ["", each]
    for key in ("exports_more", "clients_more"):
        if key in found:
            parts.append(f"and {found[key]:d} more {key.removesuffix('_more')}")
    return Group(*parts)


def _done(each: dict[str, Any]) -> list[str]:
    return [
        str(each["operations"]),
        str(each["errors"]),
        human(each["bytes_read"]),
        human(each["bytes_written"]),
    ]
