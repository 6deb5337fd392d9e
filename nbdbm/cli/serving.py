"""A run of ``nbdbm serve``: from the configuration to the end, with its signals, PID file and reloads."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import click

from nbdbm.cli import explain, printable
from nbdbm.cli.opening import Directory, sources
from nbdbm.config import ListenConfig, ServeConfig, TlsConfig
from nbdbm.errors import NbdbmError, UsageError

if TYPE_CHECKING:
    from tempfile import TemporaryDirectory

    from nbdbm.registry import ExportRegistry, Slot
    from nbdbm.server.listener import Listener
    from nbdbm.server.server import Server
    from nbdbm.uri import NbdUri

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)

MAX_PID_FILE = 64
"""Bytes that a PID file may have; a number has at most 10 digits, and some programs pad it."""


async def run(
    config: ServeConfig,
    environ: MutableMapping[str, str],
    again: Callable[[], ServeConfig],
    started: Callable[[], None] | None = None,
) -> int:
    """Serve as configured until the end; return the exit status.

    Args:
        again: reads the configuration anew.
        started: called once, when clients can connect and everything has been printed.
    """
    from nbdbm.cli.observers import observed
    from nbdbm.registry import ExportRegistry
    from nbdbm.server.listener import notify
    from nbdbm.server.server import Server

    stop = asyncio.Event()
    registry = ExportRegistry()
    server = Server(registry, config.server)
    _use_tls(server, config.tls)
    _on_signals(stop, server)
    reloads = _Reloads(config, again, server, registry, environ)
    async with AsyncExitStack() as stack:
        listeners = stack.enter_context(_bound(config, environ))
        places = await stack.enter_async_context(observed(config.server, server))
        for listener in listeners:
            if listener.exposed and not config.tls.required:
                log.warning(
                    "%s: other machines can reach this, and what they read and write is not encrypted%s",
                    listener.uri(""),
                    " unless they ask for TLS; --tls require insists" if config.tls.enabled else "",
                )
        if config.directory is not None:
            registry.directory = Directory(config.directory)
        slots = [registry.offer(source) for source in sources(config)]
        try:
            await _open(slots, or_else=config.file is not None)
            await server.start(listeners)
            with _pid_file(config.pid_file), reloads:
                _report(config, registry, listeners, places)
                notify(environ.get("NOTIFY_SOCKET"), f"READY=1\nMAINPID={os.getpid()}")
                if started is not None:
                    started()
                status = 0
                if config.run is not None:
                    name = config.exports[0].name if config.exports else ""
                    variables = command_variables(_uri(listeners[0], name, config))
                    status = await _run_command(config.run, variables, environ, stop)
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


async def _open(slots: Iterable[Slot], *, or_else: bool) -> None:
    """Open those that are not opened on demand.

    ``or_else``: one that cannot be opened shall not keep the others from being served: it is logged, and
    tried again when a client asks for it. Without, the failure is raised.
    """
    from nbdbm.registry import Refused

    for slot in slots:
        if slot.source.grace is not None:
            continue
        if not or_else:
            await slot.open()
            continue
        with suppress(Refused):
            await slot.ensure_open()


def _use_tls(server: Server, config: TlsConfig) -> None:
    """Read certificates or keys, for connections that begin from now on."""
    from nbdbm.server.tls import Credentials

    if not config.enabled:
        server.tls = None
    elif server.tls is None:
        server.tls = Credentials(config)
    else:
        server.tls.reload(config)


class _Reloads:
    """SIGHUP: the configuration is read again, and what changed is changed; nothing, if it has mistakes.

    From the beginning on: what comes while images are being opened is seen to in the block that this is
    entered for, when there is something to reload.
    """

    def __init__(
        self,
        config: ServeConfig,
        again: Callable[[], ServeConfig],
        server: Server,
        registry: ExportRegistry,
        environ: MutableMapping[str, str],
    ) -> None:
        self._config = config
        self._again = again
        self._server = server
        self._registry = registry
        self._environ = environ
        self._task: asyncio.Task[None] | None = None
        self._wanted = False
        self._serving = False
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._caught)

    def __enter__(self) -> None:
        self._serving = True
        self._begin()

    def __exit__(self, *_: object) -> None:
        # The handler stays until ``_ignore_signals``: without one, SIGHUP would end the process.
        self._serving = False
        if self._task is not None:
            self._task.cancel()

    def _caught(self) -> None:
        self._wanted = True
        self._begin()

    def _begin(self) -> None:
        if self._wanted and self._serving and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        from nbdbm.server.listener import notify

        address = self._environ.get("NOTIFY_SOCKET")
        try:
            while self._wanted:
                self._wanted = False
                notify(address, f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
                await self._reload()
                notify(address, "READY=1")
        except Exception:
            log.exception("reloading failed")  # a bug; what is served goes on
        finally:
            self._task = None

    def _read(self) -> tuple[ServeConfig, Directory | None]:
        new = self._again()
        return new, Directory(new.directory) if new.directory is not None else None

    async def _reload(self) -> None:
        try:
            # In a thread: a file of a thousand exports takes a second to be understood.
            new, directory = await asyncio.to_thread(self._read)
        except (NbdbmError, OSError) as error:
            for line in explain(error).split("\n"):
                log.error("not reloaded: %s", line)
            return
        if self._server.closing:
            return  # what would be opened now, nobody would close
        old, self._config = self._config, new
        try:
            _use_tls(self._server, new.tls)
        except (NbdbmError, OSError) as error:
            log.error("%s; TLS goes on with what it has", explain(error))
        if new.file is None:
            return  # there is nothing else that could have changed
        if new.listen != old.listen:
            log.warning("%s: [listen] has changed, which needs a restart", new.file)
        if (new.server.metrics, new.server.control) != (old.server.metrics, old.server.control):
            log.warning("%s: metrics or control has changed, which needs a restart", new.file)
        self._server.reconfigure(new.server)
        if new.directory != old.directory:
            self._registry.directory = directory
            self._registry.withdraw_found()
        fresh = self._registry.update(sources(new))
        await _open(fresh, or_else=True)
        log.info(
            "%s: reloaded, %d exports, %d of them new or changed", new.file, len(new.exports), len(fresh)
        )


def _on_signals(stop: asyncio.Event, server: Server) -> None:
    """First signal: end in order. Second: without waiting for clients. Third: at once, by default action."""
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
    numbers = (*SIGNALS, signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        for number in numbers:
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
    """``path`` holds this process's ID inside the block: there complete, and gone after it if still ours.

    It replaces nothing but what was left of such a file: a wrong path must not cost an image.
    """
    if path is None:
        yield
        return
    if os.path.lexists(path) and not _was_pid_file(path):
        raise UsageError(f"{path}: exists and is not a PID file; choose another path or remove it")
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


def _was_pid_file(path: str) -> bool:
    """Whether the file holds a process ID, or nothing. What is not a plain file is not even opened."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        content = file.read(MAX_PID_FILE + 1)
    return len(content) <= MAX_PID_FILE and re.fullmatch(rb"\s*\d*\s*", content) is not None


def _report(
    config: ServeConfig, registry: ExportRegistry, listeners: list[Listener], places: list[str]
) -> None:
    """Say what is served where, and ``places`` to watch it, on stdout, unless ``--run`` has that."""
    if config.run is not None:
        return
    lines = []
    for slot in registry.slots():
        lines += [str(_uri(listener, slot.source.name, config)) for listener in listeners]
        if slot.export is not None:
            lines += [f"context: {printable(name)}" for name in slot.export.info.contexts]
    # Of a directory, or with nothing to serve yet: where it is, at least.
    lines = lines or [str(_uri(listener, "", config)) for listener in listeners]
    _say("\n".join([*lines, *places]))


def _uri(listener: Listener, name: str, config: ServeConfig) -> NbdUri:
    """Where a client finds an export, and whether it needs TLS for it."""
    uri = listener.uri(name)
    return uri.with_tls() if config.tls.required else uri


def _say(text: str) -> None:
    """Print and flush; a reader that has gone away is no reason to stop serving."""
    try:
        click.echo("\n".join(printable(line) for line in text.split("\n")))
    except OSError as error:
        log.debug("nobody reads what is printed: %s", error)
        # What is left in the stream's buffer would fail once more at exit.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def _run_command(
    command: str,
    variables: dict[str, str],
    environ: MutableMapping[str, str],
    stop: asyncio.Event,
) -> int:
    """Run ``command`` by the shell with the export in its environment; return its status for our own.

    A signal to us goes on to the command, whose end is awaited.
    """
    process = await asyncio.create_subprocess_shell(command, env={**environ, **variables})
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


def command_variables(uri: NbdUri) -> dict[str, str]:
    """The variables that tell a command how to reach the export, as nbdkit's captive mode names them."""
    export = uri.export
    if uri.socket:
        address, old = {"unixsocket": uri.socket, "port": ""}, f"nbd:unix:{uri.socket}"
    else:
        address, old = {"unixsocket": "", "port": str(uri.port)}, f"nbd:{uri.host}:{uri.port}"
    if export:
        old += f":exportname={export}"
    return {"uri": str(uri), "nbd": old, "exportname": export, **address}
