"""``nbdbm serve``: images over NBD until a signal, or until the command of ``--run`` ends."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import replace
from typing import Any

import click
from click.core import ParameterSource

from nbdbm.cli import Ended, explain, logs
from nbdbm.cli.options import DIRECTORY, FILE
from nbdbm.config import (
    DEFAULT_BUSY_POLL,
    DEFAULT_GRACE,
    DEFAULT_HOST,
    DEFAULT_MAX_CONNECTIONS,
    DEFAULT_PORT,
    DETECT_ZEROES,
    DISCARD,
    FORMATS,
    TLS,
    BadValue,
    ExportConfig,
    ListenConfig,
    ServeConfig,
    TlsConfig,
)
from nbdbm.errors import NbdbmError, UsageError

log = logging.getLogger(__name__)

PER_EXPORT = (
    "export_name",
    "description",
    "read_only",
    "bitmaps",
    "allocation_depth",
    "format_",
    "load_snapshot",
    "no_backing",
    "backing_root",
    "force_share",
    "discard",
    "detect_zeroes",
    "grace",
)
"""Options that say how an image is exported, which a configuration file says for each of its own."""


class Octal(click.ParamType):  # type: ignore[type-arg]
    """Permissions, as ``chmod`` takes them."""

    name = "octal"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return int(value, 8)
        except ValueError:
            self.fail(f"{value!r}: not permissions in octal, as 0660", param, ctx)


@click.command()
@click.argument("images", metavar="[[NAME=]IMAGE]...", nargs=-1, type=FILE)
@click.option("--directory", metavar="DIR", type=DIRECTORY, help="Serve each image in DIR, when asked for.")
@click.option(
    "--config",
    "file",
    metavar="FILE",
    type=FILE,
    help="Serve what this file says; SIGHUP reads it anew.",
)
@click.option("-k", "--socket", type=FILE, metavar="PATH", help="Listen on a Unix socket.")
@click.option("--socket-mode", type=Octal(), metavar="MODE", help="Permissions of the Unix socket, as 0660.")
@click.option("--socket-owner", metavar="USER[:GROUP]", help="Owner of the Unix socket.")
@click.option("-b", "--bind", metavar="ADDR", help=f"Listen on this address.  [default: {DEFAULT_HOST}]")
@click.option(
    "-p", "--port", type=int, metavar="N", help=f"TCP port; 0 takes a free one.  [default: {DEFAULT_PORT}]"
)
@click.option("--vsock", type=int, metavar="PORT", help="Listen for virtual machines; 0 takes a free port.")
@click.option(
    "-x",
    "--export-name",
    default="",
    metavar="NAME",
    help="Name of the export.  [default: empty for one IMAGE, the files' names for several]",
)
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
    "--max-connections-per-address",
    type=int,
    default=0,
    metavar="N",
    help="Clients from one address at once, others are closed.  [default: no limit]",
)
@click.option(
    "--grace",
    type=float,
    default=DEFAULT_GRACE,
    show_default=True,
    metavar="SECONDS",
    help="With --directory: close an image so long after its last client.",
)
@click.option(
    "-f", "--format", "format_", type=click.Choice(FORMATS), help="Format of IMAGE.  [default: qcow2]"
)
@click.option("-l", "--load-snapshot", metavar="NAME", help="Serve an internal snapshot (id or name).")
@click.option("--no-backing", is_flag=True, help="Refuse an image that refers to other files.")
@click.option(
    "--backing-root", type=DIRECTORY, metavar="DIR", help="Refuse backing and data files outside of DIR."
)
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
@click.option(
    "--tls",
    type=click.Choice(TLS),
    help="Whether clients may or must use TLS.  [default: off, or require with certificates or keys]",
)
@click.option(
    "--tls-certificates",
    type=DIRECTORY,
    metavar="DIR",
    help="Directory of server-cert.pem, server-key.pem, ca-cert.pem.",
)
@click.option("--tls-verify-peer", is_flag=True, help="Only clients with a certificate of that ca-cert.pem.")
@click.option(
    "--tls-psk", type=FILE, metavar="FILE", help="Pre-shared keys, lines NAME:HEX, instead of certificates."
)
@click.option(
    "--metrics", metavar="[ADDR:]PORT", help="Answer Prometheus here; on this machine only without ADDR."
)
@click.option("--control", type=FILE, metavar="PATH", help="Unix socket that answers nbdbm status.")
@click.option("--pid-file", type=FILE, metavar="FILE", help="Hold the process ID here while serving.")
@click.option(
    "--run", "run_", metavar="CMD", help="Serve while CMD runs, $uri being the export; exit as it does."
)
@click.option("--fork", is_flag=True, help="Return once clients can connect; the server goes on behind.")
@click.option("-t", "--persistent", is_flag=True, help="Accepted for qemu-nbd's sake: always so.")
@click.option(
    "-v", "--verbose", count=True, help="Log more; given twice, all that is said on the wire (slow)."
)
@click.option("-q", "--quiet", is_flag=True, help="Log warnings and errors only, and no connections.")
@click.option(
    "--log-format",
    type=click.Choice(logs.FORMATS),
    default="text",
    show_default=True,
    help="How stderr is written.",
)
def serve(
    images: tuple[str, ...],
    directory: str | None,
    file: str | None,
    socket: str | None,
    socket_mode: int | None,
    socket_owner: str | None,
    bind: str | None,
    port: int | None,
    vsock: int | None,
    max_connections: int,
    max_connections_per_address: int,
    busy_poll: int,
    tls: str | None,
    tls_certificates: str | None,
    tls_verify_peer: bool,
    tls_psk: str | None,
    metrics: str | None,
    control: str | None,
    pid_file: str | None,
    run_: str | None,
    fork: bool,
    persistent: bool,
    verbose: int,
    quiet: bool,
    log_format: str,
    **per_export: Any,
) -> None:
    """Serve IMAGEs and their dirty bitmaps over NBD.

    The export's URI is the first line on stdout, its metadata contexts follow; then it can be connected
    to. SIGTERM and SIGINT end it.

    With several IMAGEs each export has its file's name, or the NAME given.
    """
    logs.set_up(log_format, verbose, quiet, captive=run_ is not None)
    context = click.get_current_context()
    given = {name for name in context.params if _was_given(context, name)}
    listen = ListenConfig(
        socket=socket, socket_mode=socket_mode, socket_owner=socket_owner, host=bind, port=port, vsock=vsock
    )

    secured = TlsConfig.of(tls, tls_certificates, tls_verify_peer, tls_psk)

    def read() -> ServeConfig:
        """The configuration as the command line has it, and the file by now."""
        if file is None:
            config = ServeConfig(
                exports=_exports(images, directory is None, per_export),
                directory=_export(directory, per_export) if directory is not None else None,
            )
        else:
            from nbdbm.configfile import load

            config = load(file, secured if given & {"tls", "tls_certificates", "tls_psk"} else None)
        server: dict[str, Any] = {
            "max_connections": max_connections,
            "max_connections_per_address": max_connections_per_address,
            "busy_poll": busy_poll / 1e6,
            "metrics": metrics,
            "control": control,
        }
        chosen = {name: value for name, value in server.items() if file is None or name in given}
        return replace(
            config,
            pid_file=pid_file,
            run=run_,
            listen=listen if listen.given or file is None else config.listen,
            tls=secured if file is None else config.tls,
            server=replace(config.server, **chosen),
        )

    if file is not None:
        if images or directory is not None:
            raise UsageError("--config excludes IMAGEs and --directory: write them into the file")
        for name in PER_EXPORT:
            if name in given:
                option = next(each for each in context.command.params if each.name == name).opts[-1]
                raise UsageError(
                    f"--config excludes {option}: write it into the file, for the export it concerns"
                )
    elif "grace" in given and directory is None:
        raise BadValue("grace", " is for --directory: other images stay open")

    if fork and run_ is not None:
        raise UsageError("--fork excludes --run, which serves while its command runs")
    if fork and "LISTEN_FDS" in os.environ:
        raise UsageError("--fork: a service manager that passes sockets (LISTEN_FDS) does this itself")

    from nbdbm.cli.serving import run

    try:
        config = read()
        started = None
        if fork:
            from nbdbm.cli.background import fork_off

            started = fork_off()
        status = asyncio.run(run(config, os.environ, read, started))
    except (NbdbmError, OSError) as error:
        if log_format == "text" or context.find_root().params.get("debug"):
            raise
        # Whoever reads JSON from stderr shall find the last line in it, too.
        for line in explain(error).split("\n"):
            log.error("%s", line)
        status = 1
    raise Ended(status)


def _was_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not ParameterSource.DEFAULT


def _exports(images: tuple[str, ...], needed: bool, per_export: dict[str, Any]) -> tuple[ExportConfig, ...]:
    """The exports of the images on the command line: one of any name, or several of different names."""
    if not images and needed:
        raise click.UsageError("Missing argument '[NAME=]IMAGE' (or --directory, or --config).")
    pairs = [_named(text) for text in images]
    if len(images) == 1 and needed:
        name, image = pairs[0]
        chosen = per_export["export_name"]
        if name is not None and chosen:
            raise BadValue("export-name", f" {chosen}: the image has a name already, in {images[0]}")
        return (_export(image, per_export, name=chosen if name is None else name),)
    for option, value in (
        ("export-name", per_export["export_name"]),
        ("description", per_export["description"]),
    ):
        if value:
            raise BadValue(option, f" {value}: is for one image; with several, name them as NAME=IMAGE")
    return tuple(
        _export(image, per_export, name=os.path.basename(image) if name is None else name)
        for name, image in pairs
    )


def _named(text: str) -> tuple[str | None, str]:
    """Name and path of ``NAME=IMAGE`` or ``IMAGE``; a path before "=" makes all of it a path."""
    name, equals, image = text.partition("=")
    named = equals and "/" not in name
    if not (image if named else text):
        raise UsageError(f"IMAGE {text!r}: the path is empty")
    return (name, image) if named else (None, text)


def _export(image: str, options: dict[str, Any], *, name: str = "") -> ExportConfig:
    return ExportConfig(
        image=image,
        name=name,
        description=options["description"],
        format=options["format_"],
        read_only=options["read_only"] or options["load_snapshot"] is not None,  # nobody writes to a snapshot
        snapshot=options["load_snapshot"],
        no_backing=options["no_backing"],
        backing_root=options["backing_root"],
        force_share=options["force_share"],
        discard=options["discard"],
        detect_zeroes=options["detect_zeroes"],
        bitmaps=options["bitmaps"] or None,
        allocation_depth=options["allocation_depth"],
        grace=options["grace"],
    )
