"""``nbdbm serve``: one image over NBD until a signal, or until the command of ``--run`` ends."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from nbdbm.cli import PROGRAM, Ended, printable
from nbdbm.config import (
    DEFAULT_BUSY_POLL,
    DEFAULT_HOST,
    DEFAULT_MAX_CONNECTIONS,
    DEFAULT_PORT,
    DETECT_ZEROES,
    DISCARD,
    FORMATS,
    ListenConfig,
    ServeConfig,
    ServerConfig,
)
from nbdbm.errors import ImageError, UsageError

if TYPE_CHECKING:
    from tempfile import TemporaryDirectory

    from nbdbm.exports import Export
    from nbdbm.image.image import Image
    from nbdbm.server.listener import Listener

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Why an image cannot be written to that can perhaps be read."""


@click.command()
@click.argument("image", type=click.Path())
@click.option("-k", "--socket", metavar="PATH", help="Listen on a Unix socket.")
@click.option("-b", "--bind", metavar="ADDR", help=f"Listen on this address.  [default: {DEFAULT_HOST}]")
@click.option(
    "-p", "--port", type=int, metavar="N", help=f"TCP port; 0 takes a free one.  [default: {DEFAULT_PORT}]"
)
@click.option("-x", "--export-name", default="", metavar="NAME", help="Name of the export.  [default: empty]")
@click.option("-D", "--description", default="", metavar="TEXT", help="What clients may show people.")
@click.option("-r", "--read-only", is_flag=True, help="Refuse writes, and change nothing in any file.")
@click.option(
    "-B",
    "--bitmap",
    "bitmaps",
    multiple=True,
    metavar="NAME",
    help="Serve this dirty bitmap only; repeatable.  [default: every usable one]",
)
@click.option(
    "-A",
    "--allocation-depth/--no-allocation-depth",
    default=True,
    help="Serve the context qemu:allocation-depth.  [default: yes]",
)
@click.option(
    "-e",
    "--max-connections",
    "--shared",
    type=int,
    default=DEFAULT_MAX_CONNECTIONS,
    show_default=True,
    metavar="N",
    help="Clients served at once, others wait; 0: no limit.",
)
@click.option(
    "-f", "--format", "format_", type=click.Choice(FORMATS), help="Format of IMAGE.  [default: qcow2]"
)
@click.option("-l", "--load-snapshot", metavar="NAME", help="Serve an internal snapshot (id or name).")
@click.option("--no-backing", is_flag=True, help="Refuse an image that refers to other files.")
@click.option("--backing-root", metavar="DIR", help="Refuse backing and data files outside of DIR.")
@click.option(
    "-U",
    "--force-share",
    is_flag=True,
    help="With --read-only: read although another program may be writing.",
)
@click.option(
    "--discard",
    type=click.Choice(DISCARD),
    default="unmap",
    show_default=True,
    help="Whether trims, and zeroes that may be holes, give space back.",
)
@click.option(
    "--detect-zeroes",
    type=click.Choice(DETECT_ZEROES),
    default="off",
    show_default=True,
    help="Turn writes of zeroes into zero clusters; unmap: into holes.",
)
@click.option(
    "--busy-poll",
    type=int,
    default=DEFAULT_BUSY_POLL,
    show_default=True,
    metavar="USEC",
    help="Microseconds to stay awake for the next request; 0: never.",
)
@click.option("--pid-file", metavar="FILE", help="Hold the process ID here while serving.")
@click.option(
    "--run", "run_", metavar="CMD", help="Serve while CMD runs, $uri being the export; exit as it does."
)
@click.option("-t", "--persistent", is_flag=True, help="Accepted for qemu-nbd's sake: always so.")
@click.option("-v", "--verbose", is_flag=True, help="Log what is said on the wire.")
def serve(
    image: str,
    socket: str | None,
    bind: str | None,
    port: int | None,
    export_name: str,
    description: str,
    read_only: bool,
    bitmaps: tuple[str, ...],
    allocation_depth: bool,
    max_connections: int,
    format_: str | None,
    load_snapshot: str | None,
    no_backing: bool,
    backing_root: str | None,
    force_share: bool,
    discard: str,
    detect_zeroes: str,
    busy_poll: int,
    pid_file: str | None,
    run_: str | None,
    persistent: bool,
    verbose: bool,
) -> None:
    """Serve IMAGE and its dirty bitmaps over NBD.

    The export's URI is the first line on stdout, its metadata contexts follow; then it can be connected
    to. SIGTERM and SIGINT end it.
    """
    config = ServeConfig(
        image=image,
        format=format_,
        read_only=read_only or load_snapshot is not None,  # a snapshot cannot be written to
        snapshot=load_snapshot,
        no_backing=no_backing,
        backing_root=backing_root,
        force_share=force_share,
        discard=discard,
        detect_zeroes=detect_zeroes,
        export_name=export_name,
        description=description,
        bitmaps=bitmaps or None,
        allocation_depth=allocation_depth,
        pid_file=pid_file,
        run=run_,
        listen=ListenConfig(socket=socket, host=bind, port=port),
        server=ServerConfig(max_connections=max_connections, busy_poll=busy_poll / 1e6),
    )
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING, format=f"{PROGRAM}: %(message)s", force=True
    )
    raise Ended(asyncio.run(run(config, os.environ)))


async def run(config: ServeConfig, environ: MutableMapping[str, str]) -> int:
    """Serve as configured until the end; return the exit status."""
    from nbdbm.exports import Export, ExportRegistry
    from nbdbm.server.listener import notify
    from nbdbm.server.server import Server

    stop = asyncio.Event()
    registry = ExportRegistry()
    server = Server(registry, config.server)
    _on_signals(stop, server)
    with _bound(config, environ) as listeners:
        image = await _open(config)
        try:
            export = Export.of(
                image,
                name=config.export_name,
                description=config.description,
                bitmaps=config.bitmaps,
                allocation_depth=config.allocation_depth,
            )
        except BaseException:
            await image.close()
            raise
        registry.add(export)
        try:
            await server.start(listeners)
            with _pid_file(config.pid_file):
                _report(config, image, export, listeners)
                notify(environ.get("NOTIFY_SOCKET"), f"READY=1\nMAINPID={os.getpid()}")
                status = 0
                if config.run is not None:
                    status = await _run_command(config.run, config.export_name, listeners, environ, stop)
                else:
                    await stop.wait()
                notify(environ.get("NOTIFY_SOCKET"), "STOPPING=1")
                await server.close()
        finally:
            try:
                await server.close()
            finally:
                _ignore_signals()
    return status


async def _open(config: ServeConfig) -> Image:
    from nbdbm.image.image import DetectZeroes, Image, OpenOptions

    options = OpenOptions(
        format=config.format,
        read_only=config.read_only,
        snapshot=config.snapshot,
        no_backing=config.no_backing,
        backing_root=config.backing_root,
        force_share=config.force_share,
        discard=config.discard == "unmap",
        detect_zeroes=DetectZeroes(config.detect_zeroes),
    )
    try:
        return await Image.open(config.image, options)
    except ImageError as error:
        if config.read_only or error.path != config.image or error.errno not in READ_ONLY:
            raise
        raise ImageError(
            error.path, f"{error.reason}; --read-only serves it as it is", errno=error.errno
        ) from error


def _on_signals(stop: asyncio.Event, server: object) -> None:
    """First signal: end in order. Second: without waiting for clients. Third: at once, by default action."""
    from nbdbm.server.server import Server

    assert isinstance(server, Server)
    loop = asyncio.get_running_loop()

    def caught() -> None:
        if not stop.is_set():
            stop.set()
            return
        server.hurry()
        for number in SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in SIGNALS:
        loop.add_signal_handler(number, caught)


def _ignore_signals() -> None:
    """Let no signal change the exit status any more: everything is stored and closed.

    Otherwise the loop, when it closes, gives signals their default action back, and one that comes while
    the interpreter ends makes a clean end look like a kill.
    """
    loop = asyncio.get_running_loop()
    # Blocked meanwhile, since taking a handler off restores the default action first. (In this thread: an
    # I/O thread can still take one in these microseconds.)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _bound(config: ServeConfig, environ: MutableMapping[str, str]) -> Iterator[list[Listener]]:
    """The listeners, bound but not listening yet; closed in the end, with the private directory if any."""
    from nbdbm.server.listener import bind, inherited

    listeners = inherited(environ)
    directory: TemporaryDirectory[str] | None = None
    try:
        if listeners and config.listen.given:
            raise UsageError(
                "the service manager passed sockets (LISTEN_FDS), which excludes --socket, --bind and --port"
            )
        if not listeners:
            listen = config.listen
            if config.run is not None and not listen.given:
                from tempfile import TemporaryDirectory  # with shutil and what it needs: a tenth of the start

                directory = TemporaryDirectory(prefix="nbdbm-")
                listen = ListenConfig(socket=os.path.join(directory.name, "socket"))
            listeners = [bind(listen)]
        yield listeners
    finally:
        for listener in listeners:
            listener.close()
        if directory is not None:
            directory.cleanup()


@contextmanager
def _pid_file(path: str | None) -> Iterator[None]:
    """``path`` holds this process's ID inside the block: there complete, and gone after it if still ours."""
    if path is None:
        yield
        return
    content = f"{os.getpid()}\n"
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "w", encoding="ascii") as file:
            file.write(content)
        os.rename(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise OSError(error.errno, error.strerror, path) from error
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            with open(path, encoding="ascii") as file:
                ours = file.read() == content
            if ours:
                os.unlink(path)


def _report(config: ServeConfig, image: Image, export: Export, listeners: list[Listener]) -> None:
    """Say what is served where (stdout, unless ``--run`` has that) and what is not (stderr)."""
    for notice in image.notices:
        # Those about another file of the chain begin with its name.
        named = notice if notice.startswith(f"{config.image}: ") else f"{config.image}: {notice}"
        _say(f"{PROGRAM}: {named}", err=True)
    for bitmap in image.tracker.refused():
        _say(f"{PROGRAM}: {config.image}: bitmap {bitmap.name!r} is not served: {bitmap.refusal}", err=True)
        _say(f"{PROGRAM}: {config.image}: to remove it: {remedy(config.image, bitmap.name)}", err=True)
    if config.run is not None:
        return
    lines = [str(listener.uri(export.info.name)) for listener in listeners]
    lines += [f"context: {printable(name)}" for name in export.info.contexts]
    _say("\n".join(lines))


def remedy(image: str, bitmap: str) -> str:
    """The shell command that removes a bitmap which can be used for nothing else."""
    import shlex

    end = ["--"] if image.startswith("-") or bitmap.startswith("-") else []
    return shlex.join([PROGRAM, "bitmap", "remove", *end, image, bitmap])


def _say(text: str, *, err: bool = False) -> None:
    """Print and flush; a reader that has gone away is no reason to stop serving."""
    try:
        click.echo("\n".join(printable(line) for line in text.split("\n")), err=err)
    except OSError as error:
        log.debug("nobody reads what is printed: %s", error)
        # What is left in the stream's buffer would fail once more at exit.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if err else sys.stdout).fileno())


async def _run_command(
    command: str,
    export: str,
    listeners: list[Listener],
    environ: MutableMapping[str, str],
    stop: asyncio.Event,
) -> int:
    """Run ``command`` by the shell with the export in its environment; return its status for our own.

    A signal to us goes on to the command, whose end is awaited.
    """
    process = await asyncio.create_subprocess_shell(
        command, env={**environ, **command_variables(listeners[0], export)}
    )
    ended = asyncio.ensure_future(process.wait())
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((ended, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            with suppress(ProcessLookupError):
                process.terminate()
        status = await ended
    finally:
        stopped.cancel()
    return 128 - status if status < 0 else status


def command_variables(listener: Listener, export: str) -> dict[str, str]:
    """The variables that tell a command how to reach the export, as nbdkit's captive mode names them."""
    uri = listener.uri(export)
    if uri.socket:
        address, old = {"unixsocket": uri.socket, "port": ""}, f"nbd:unix:{uri.socket}"
    else:
        address, old = {"unixsocket": "", "port": str(uri.port)}, f"nbd:{uri.host}:{uri.port}"
    if export:
        old += f":exportname={export}"
    return {"uri": str(uri), "nbd": old, "exportname": export, **address}
