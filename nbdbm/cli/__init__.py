"""The command line: one subcommand a file, imported only when it is called.

Errors that a user can act on end as one line on stderr, ``nbdbm: FILE: what``, and status 1; wrong usage
is status 2 (click's); a traceback appears with ``--debug`` only.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import IO, Any

import click

from nbdbm import __version__
from nbdbm.errors import Mistakes, NbdbmError

PROGRAM = "nbdbm"

INTERRUPTED = 130
"""Exit status after SIGINT, as shells report it: 128 + 2."""

COMMANDS = {
    "serve": "nbdbm.cli.serve:serve",
    "info": "nbdbm.cli.info:info",
    "map": "nbdbm.cli.map:map_command",
    "bitmap": "nbdbm.cli.bitmap:bitmap",
    "checkpoint": "nbdbm.cli.checkpoint:checkpoint",
    "resize": "nbdbm.cli.resize:resize",
    "create": "nbdbm.cli.create:create",
    "check": "nbdbm.cli.check:check",
    "status": "nbdbm.cli.status:status",
    "completion": "nbdbm.cli.completion:completion",
    "nbdkit-plugin": "nbdbm.cli.nbdkitplugin:nbdkit_plugin",
}
"""Subcommand -> where it is: start-up time is what a backup script feels a hundred times a night."""


class Failure(click.ClickException):
    """An error in the user's words: one line, status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        for line in self.format_message().split("\n"):
            click.echo(f"{PROGRAM}: {line}", file=file, err=file is None)


class Ended(SystemExit):
    """A command has done all that it had to do, no thread of it is at work; its status is ``code``."""


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is asked for, and turns its errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = COMMANDS.get(cmd_name)
        if found is None:
            return None
        module, _, name = found.partition(":")
        command = getattr(import_module(module), name)
        if "logging" in sys.modules:  # then it may have something to say on its way
            from nbdbm.cli.logs import say_warnings

            say_warnings()
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (NbdbmError, OSError) as error:
            if ctx.params.get("debug") or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise  # click ends quietly on a broken pipe
            raise Failure(explain(error)) from error
        except KeyboardInterrupt:
            if ctx.params.get("debug"):
                raise
            sys.exit(INTERRUPTED)


def explain(error: NbdbmError | OSError) -> str:
    """The error as one line, ``FILE: what`` where it concerns a file; a line for each of several mistakes."""
    if isinstance(error, Mistakes):
        return "\n".join(map(printable, error.lines))
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
        for name in (error.filename2, error.filename):
            if name is not None:
                shown = name.decode(errors="surrogateescape") if isinstance(name, bytes) else str(name)
                text = f"{shown}: {text}"
    return printable(text) or type(error).__name__


def printable(text: str) -> str:
    """``text`` safe for a terminal and for scripts that read lines: control characters escaped.

    Names come from images and servers that may mean harm.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def remedy(image: str, bitmap: str) -> str:
    """The shell command that removes a bitmap which can be used for nothing else."""
    import shlex

    end = ["--"] if image.startswith("-") or bitmap.startswith("-") else []
    return shlex.join([PROGRAM, "bitmap", "remove", *end, image, bitmap])


def say_notices(image: str, notices: list[str]) -> None:
    """What the user should hear of, on stderr: such as why there are no bitmaps."""
    for notice in notices:
        # Those about another file of the chain begin with its name.
        named = notice if notice.startswith(f"{image}: ") else f"{image}: {notice}"
        click.echo(f"{PROGRAM}: {printable(named)}", err=True)


@click.command(
    PROGRAM, cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, "-V", "--version", prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Serve qcow2 images and their dirty bitmaps over NBD."""


def program() -> None:
    """``main`` for a process that runs nothing else: it ends where a command raises Ended."""
    _standard_streams()
    try:
        main()
    except Ended as ended:
        _leave(int(ended.code or 0))


def _standard_streams() -> None:
    """Have three of them, whatever the process began with, and have them take every character.

    Otherwise an image could become descriptor 2, where the C library writes when it gives up. A name that
    the locale's encoding does not have is escaped, as it is on stderr anyway.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _leave(status: int) -> None:
    """End the process. Taking its memory apart object by object would take longer than to store twenty
    bitmaps; everything else that the interpreter does at its end is done here."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):  # nobody is left to read it
                stream.flush()
    os._exit(status)
