"""The manual pages, one a command, from the objects that make ``--help``: manpages.py DIRECTORY

What is added to the help are the names of other pages, exit statuses and environment; run by ``make man``.
The date is that of $SOURCE_DATE_EPOCH where it is set, so that two builds can be alike.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import click

from nbdbm import __version__
from nbdbm.cli import PROGRAM, main

SECTION = 1

STATUSES = {
    "": [
        ("0", "It is done."),
        ("1", "It could not be done; one line on stderr says why, and names the file."),
        ("2", "The command line makes no sense."),
    ],
    "serve": [
        ("0", "Ended by SIGTERM or SIGINT in good order, with the bitmaps stored."),
        ("1", "It could not serve, or something could not be stored; one line on stderr says what."),
        ("2", "The command line makes no sense."),
        ("other", "With --run: the status of its command; 128 + N if signal N ended that."),
    ],
}
"""Exit statuses: of every command, and of those that differ. Those that a help tells of stand there."""

ENVIRONMENT = {
    "serve": [
        ("LISTEN_FDS", "and LISTEN_PID: sockets that a service manager passes in, sd_listen_fds(3)."),
        ("NOTIFY_SOCKET", "where a service manager is told READY=1 and STOPPING=1, sd_notify(3)."),
    ]
}

OTHERS = {
    "serve": ["nbd-client(8)", "nbdcopy(1)", "nbdinfo(1)", "qemu-nbd(8)", "systemd.socket(5)"],
    "map": ["nbdinfo(1)"],
    "create": ["qemu-img(1)"],
    "check": ["qemu-img(1)"],
}
"""Pages of other programs that a page leads to."""


def escape(text: str) -> str:
    """``text`` as roff shows it unchanged: its escape character, and the hyphens that are minus signs."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("^", "\\(ha").replace("~", "\\(ti")
    text = text.replace("`", "\\(ga").replace('"', "\\(dq")
    # At the start of a line these two begin a request.
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)


def filled(text: str) -> str:
    """``text`` escaped, in lines that people can read in the page's source."""
    # Each minus sign takes two characters there.
    return escape(textwrap.fill(" ".join(text.split()), 72, break_long_words=False, break_on_hyphens=False))


def bold(text: str) -> str:
    return f"\\fB{escape(text)}\\fR"


def italic(text: str) -> str:
    return f"\\fI{escape(text)}\\fR"


def page_name(path: tuple[str, ...]) -> str:
    """The page's name: ``nbdbm-bitmap-add`` for ("bitmap", "add")."""
    return "-".join((PROGRAM, *path))


def reference(name: str) -> str:
    """Another page, ``name(section)``."""
    name, _, section = name.partition("(")
    return f"\\fB{escape(name)}\\fR({section.rstrip(')') or SECTION})"


def commands(
    command: click.Command = main, path: tuple[str, ...] = (), parent: click.Context | None = None
) -> Iterator[tuple[tuple[str, ...], click.Command, click.Context]]:
    """Every command that is not hidden, groups before what is in them: its words, itself, its context."""
    context = click.Context(
        command, parent, info_name=path[-1] if path else PROGRAM, **command.context_settings
    )
    yield path, command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            if not found.hidden:
                yield from commands(found, (*path, name), context)


def paragraphs(text: str) -> list[str]:
    """Help as roff: paragraphs filled, those under click's backspace mark as they are."""
    lines: list[str] = []
    for number, block in enumerate(text.split("\n\n")):
        if number:
            lines.append(".PP")
        if block.startswith("\b"):
            lines += [".RS 4", ".nf", escape(block.removeprefix("\b\n")), ".fi", ".RE"]
        else:
            lines.append(filled(block))
    return lines


def usage(command: click.Command, context: click.Context) -> list[str]:
    """The synopsis: the words of the command bold, what is to be put in italic."""
    pieces = [piece for piece in command.collect_usage_pieces(context) if piece]
    return [" ".join([bold(context.command_path), *(italic(piece) for piece in pieces)])]


def names(record: str) -> str:
    """An option's names as ``--help`` writes them, ``-k, --socket PATH``: names bold, values italic."""
    return " ".join(
        piece if piece in ("/", ",") else _name(piece) if piece.startswith("-") else italic(piece)
        for piece in record.split()
    )


def _name(piece: str) -> str:
    return bold(piece.rstrip(",")) + ("," if piece.endswith(",") else "")


def options(command: click.Command, context: click.Context) -> list[str]:
    """Arguments that have a help, and options, in the order of ``--help`` and with its words."""
    lines: list[str] = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and (record[1] or isinstance(parameter, click.Option)):
            lines += [".TP", names(record[0]), filled(record[1])]
    return lines


def pairs(rows: list[tuple[str, str]]) -> list[str]:
    """A list of terms and what they mean."""
    return [line for term, text in rows for line in (".TP", bold(term), filled(text))]


def see_also(path: tuple[str, ...], others: list[tuple[str, ...]]) -> list[str]:
    """The page above, those beside, those below, and other programs'."""
    found = [
        page_name(other)
        for other in others
        if other != path and (other == path[:-1] or (other and other[:-1] in (path, path[:-1])))
    ]
    found += OTHERS.get(" ".join(path), [])
    return [", ".join(reference(name) for name in sorted(set(found)))]


def page(
    path: tuple[str, ...], command: click.Command, context: click.Context, others: list[tuple[str, ...]]
) -> str:
    """One page. ``others`` are the words of all commands."""
    name = page_name(path)
    text = inspect.cleandoc(command.help or "")
    summary = " ".join(text.split("\n\n")[0].split()).rstrip(".")
    date = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    lines = [
        f'.TH {escape(name.upper())} {SECTION} "{date}" "{PROGRAM} {__version__}" "User Commands"',
        ".\\\" Made by scripts/manpages.py from the program's own help.",
        ".SH NAME",
        f"{escape(name)} \\-\n{filled(summary[:1].lower() + summary[1:])}",
        ".SH SYNOPSIS",
        *usage(command, context),
        ".SH DESCRIPTION",
        *paragraphs(text),
    ]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for other in others:
            if other[:-1] == path and other:
                found = command.get_command(context, other[-1])
                assert found is not None
                lines += [".TP", reference(page_name(other)), filled(found.get_short_help_str(300))]
    lines += [".SH OPTIONS", *options(command, context)]
    epilog = inspect.cleandoc(command.epilog or "")
    told = epilog.lstrip("\b\n").lower().startswith("exit status")
    if epilog:
        lines += [".SH EXIT STATUS" if told else ".SH NOTES", *paragraphs(epilog)]
    if path and not isinstance(command, click.Group) and not told:
        lines += [".SH EXIT STATUS", *pairs(STATUSES.get(" ".join(path), STATUSES[""]))]
    if variables := ENVIRONMENT.get(" ".join(path)):
        lines += [".SH ENVIRONMENT", *pairs(variables)]
    lines += [".SH SEE ALSO", *see_also(path, others)]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """File name -> content, for every command."""
    every = list(commands())
    others = [path for path, _, _ in every]
    return {f"{page_name(path)}.{SECTION}": page(path, *rest, others) for path, *rest in every}


def write(directory: Path) -> list[Path]:
    """Write all pages, and nothing else, into ``directory``; return them."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob(f"{PROGRAM}*.{SECTION}"):
        old.unlink()
    written = []
    for name, text in pages().items():
        (directory / name).write_text(text, encoding="utf-8")
        written.append(directory / name)
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} DIRECTORY")
    print(f"{len(write(Path(sys.argv[1])))} pages in {sys.argv[1]}")
