"""``nbdbm bitmap``: what can be done with the bitmaps of an image."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from nbdbm.cli import printable, say_notices
from nbdbm.cli.create import parse_size
from nbdbm.cli.options import FILE, LookOptions, image_options
from nbdbm.cli.picture import human
from nbdbm.config import FORMATS
from nbdbm.errors import BitmapError, ImageError

if TYPE_CHECKING:
    from rich.table import Table

    from nbdbm.image.bitmapedit import Operation
    from nbdbm.image.image import Image

CHEAP_BITS = 1 << 27
"""Bits (16 MiB) that are read and counted unasked, over all bitmaps of an image: 8 TiB at 64 KiB each.
Beyond that an image could keep a mere listing busy for minutes."""


@click.group("bitmap")
def bitmap() -> None:
    """Look after the dirty bitmaps of an image.

    All commands but ``list`` change an image that nobody else uses; its backing file is not needed. What
    one command is to do happens as one step: all of it, or nothing, even if the power fails.
    """


@bitmap.command("list")
@click.argument("image", type=FILE, metavar="IMAGE")
@click.option("--json", "as_json", is_flag=True, help="A JSON list.")
@click.option("--dirty", is_flag=True, help="Count dirty bytes even where that takes long.")
@image_options(snapshot=False)
def list_command(image: str, as_json: bool, dirty: bool, look: LookOptions) -> None:
    """List every bitmap, what it is good for, and how much is dirty in it."""

    async def run() -> tuple[list[dict[str, Any]], list[str]]:
        from nbdbm.image.image import Image

        opened = await Image.open(image, look.for_engine(chain=False))
        try:
            return await bitmap_entries(opened, count_all=dirty), list(opened.notices)
        finally:
            await opened.close()

    entries, notices = asyncio.run(run())
    say_notices(image, notices)
    if as_json:
        click.echo(json.dumps(entries, indent=2))
    elif not entries:
        click.echo("no bitmaps")
    else:
        from nbdbm.cli.tables import console

        console().print(bitmap_table(entries), *remarks(entries), sep="\n")


async def bitmap_entries(image: Image, *, count_all: bool) -> list[dict[str, Any]]:
    """Every bitmap of the image as ``--json`` shows it, in directory order.

    Keys: ``name``; ``granularity`` in bytes; ``flags``, those set on disk of ``in-use`` and ``auto``;
    ``state``: ``usable``, ``inconsistent`` (IN_USE: some program never saved it) or ``refused`` (its
    description or data are broken); ``reason`` and ``remedy``, null where usable; ``dirty_bytes``, null
    where it is not known: not usable, or large and not asked for.
    """
    from nbdbm.cli import remedy

    budget = None if count_all else CHEAP_BITS
    entries: list[dict[str, Any]] = []
    for found in image.tracker:
        dirty_bytes: int | None = None
        failure: str | None = None
        bits = -(-image.size // found.granularity) if found.usable else 0
        if found.usable and (budget is None or bits <= budget):
            if budget is not None:
                budget -= bits
            try:
                dirty_bytes = (await image.bits(found.name)).dirty_bytes()
            except (BitmapError, ImageError, OSError) as error:
                failure = getattr(error, "reason", None) or str(error)
        usable = found.usable and failure is None
        inconsistent = found.state.name == "INCONSISTENT"
        entries.append(
            {
                "name": found.name,
                "granularity": found.granularity,
                "flags": ["in-use"] * inconsistent + ["auto"] * found.enabled,
                "state": "usable" if usable else "inconsistent" if inconsistent else "refused",
                "reason": None if usable else failure or found.refusal,
                "remedy": None if usable else remedy(image.path, found.name),
                "dirty_bytes": dirty_bytes,
            }
        )
    return entries


def bitmap_table(entries: list[dict[str, Any]]) -> Table:
    """The entries for people."""
    from nbdbm.cli.tables import table

    shown = table("bitmap", "granularity:r", "flags", "state", "dirty:r")
    for entry in entries:
        dirty = entry["dirty_bytes"]
        shown.add_row(
            printable(entry["name"]),
            human(entry["granularity"]),
            ", ".join(entry["flags"]) or "-",
            entry["state"],
            "-" if entry["state"] != "usable" else "not counted" if dirty is None else human(dirty),
            style=None if entry["state"] == "usable" else "yellow",
        )
    return shown


def remarks(entries: list[dict[str, Any]]) -> list[str]:
    """Why some bitmaps are of no use, and what to do about each."""
    return [
        f"bitmap {printable(entry['name'])!r} cannot be used: {printable(entry['reason'])}\n"
        f"  remedy: {printable(entry['remedy'])}"
        for entry in entries
        if entry["reason"] is not None
    ]


# -- changing ----------------------------------------------------------------------------------


def change(image: str, operations: list[Operation]) -> None:
    """Carry out the operations: all, or none. What the user should hear of goes to stderr."""
    from nbdbm.image.bitmapedit import edit_bitmaps

    try:
        done = asyncio.run(edit_bitmaps(image, operations))
    except BitmapError as error:
        raise ImageError(image, str(error), errno=error.errno) from error
    say_notices(image, done.notices)


_IMAGE = click.argument("image", type=FILE, metavar="IMAGE")
_NAMES = click.argument("names", metavar="NAME...", nargs=-1, required=True)
_GRANULARITY = click.option(
    "-g",
    "--granularity",
    type=parse_size,
    metavar="SIZE",
    help="Bytes per bit, 512 to 2G, a power of two (default: the cluster size, from 4K to 64K).",
)


@bitmap.command("add")
@_IMAGE
@_NAMES
@_GRANULARITY
@click.option("--disabled", "--disable", "disabled", is_flag=True, help="Do not record writes yet.")
def add_command(image: str, names: tuple[str, ...], granularity: int | None, disabled: bool) -> None:
    """Begin clean bitmaps that record every write from now on."""
    from nbdbm.image.bitmapedit import Add

    change(image, [Add(name, granularity, not disabled) for name in names])


@bitmap.command("remove")
@_IMAGE
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--inconsistent", is_flag=True, help="All that are inconsistent, whatever their names.")
def remove_command(image: str, names: tuple[str, ...], inconsistent: bool) -> None:
    """Remove bitmaps, whatever their state."""
    from nbdbm.image.bitmapedit import Remove, RemoveInconsistent

    if not names and not inconsistent:
        raise click.UsageError("say which bitmaps to remove: their names, or --inconsistent")
    operations: list[Operation] = [Remove(name) for name in names]
    change(image, operations + ([RemoveInconsistent()] if inconsistent else []))


@bitmap.command("clear")
@_IMAGE
@_NAMES
def clear_command(image: str, names: tuple[str, ...]) -> None:
    """Make bitmaps clean: nothing is dirty in them afterwards."""
    from nbdbm.image.bitmapedit import Clear

    change(image, [Clear(name) for name in names])


@bitmap.command("enable")
@_IMAGE
@_NAMES
def enable_command(image: str, names: tuple[str, ...]) -> None:
    """Have bitmaps record every write from now on."""
    from nbdbm.image.bitmapedit import Enable

    change(image, [Enable(name) for name in names])


@bitmap.command("disable")
@_IMAGE
@_NAMES
def disable_command(image: str, names: tuple[str, ...]) -> None:
    """Have bitmaps stay as they are from now on."""
    from nbdbm.image.bitmapedit import Disable

    change(image, [Disable(name) for name in names])


@bitmap.command("merge")
@_IMAGE
@click.argument("name", metavar="NAME")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("-b", "--source-file", type=FILE, metavar="FILE", help="The SOURCEs are bitmaps of this image.")
@click.option("-F", "--source-format", type=click.Choice(FORMATS), help="Format of FILE.")
def merge_command(
    image: str, name: str, sources: tuple[str, ...], source_file: str | None, source_format: str | None
) -> None:
    """Add to bitmap NAME what is dirty in the SOURCEs, which stay as they are.

    Where granularities differ, more may become dirty, never less.
    """
    from nbdbm.image.bitmapedit import Merge

    if source_format is not None and source_file is None:
        raise click.UsageError("--source-format is about --source-file, which was not given")
    change(image, [Merge(name, source, source_file, source_format) for source in sources])


@bitmap.command("rename")
@_IMAGE
@click.argument("name", metavar="NAME")
@click.argument("new", metavar="NEW")
def rename_command(image: str, name: str, new: str) -> None:
    """Give a bitmap another name."""
    from nbdbm.image.bitmapedit import Rename

    change(image, [Rename(name, new)])


class InOrder(click.Command):
    """A command whose options mean something by their order; ``ctx.meta[ORDER]`` has it.

    A list of (parameter's name, value as given or None for flags), one for each that was given.
    """

    ORDER = "nbdbm.order"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        values, _, order = self.make_parser(ctx).parse_args(list(args))
        given = {name: iter(value) for name, value in values.items() if isinstance(value, list)}
        ctx.meta[self.ORDER] = [(p.name, next(given[p.name]) if p.name in given else None) for p in order]
        return super().parse_args(ctx, args)


@bitmap.command("edit", cls=InOrder)
@_IMAGE
@click.option("--add", multiple=True, metavar="NAME", help="Begin a clean bitmap ...")
@click.option("-g", "--granularity", multiple=True, metavar="SIZE", help="... with so many bytes per bit.")
@click.option("--disabled", count=True, help="... that does not record writes yet.")
@click.option("--remove", multiple=True, metavar="NAME", help="Remove a bitmap.")
@click.option("--remove-inconsistent", count=True, help="Remove all that are inconsistent.")
@click.option("--clear", multiple=True, metavar="NAME", help="Make a bitmap clean.")
@click.option("--enable", multiple=True, metavar="NAME", help="Record every write from now on.")
@click.option("--disable", multiple=True, metavar="NAME", help="Stay as it is from now on.")
@click.option(
    "--merge", multiple=True, nargs=2, metavar="NAME SOURCE", help="Add what is dirty in SOURCE ..."
)
@click.option(
    "-b",
    "--source-file",
    multiple=True,
    type=FILE,
    metavar="FILE",
    help="... which is a bitmap of this image.",
)
@click.option(
    "-F", "--source-format", multiple=True, type=click.Choice(FORMATS), help="... which has this format."
)
@click.option("--rename", multiple=True, nargs=2, metavar="NAME NEW", help="Give a bitmap another name.")
@click.pass_context
def edit_command(ctx: click.Context, /, image: str, **_: object) -> None:
    """Carry out several operations, in the order in which they are given, as one step.

    Options whose help begins with dots belong to the operation before them.

    \b
    nbdbm bitmap edit disk.qcow2 --disable monday --add tuesday -g 16K --remove sunday
    """
    change(image, operations_of(ctx.meta[InOrder.ORDER]))


def operations_of(order: list[tuple[str, Any]]) -> list[Operation]:
    """The operations that options, in this order, stand for.

    Raises:
        click.UsageError: there is none, or one has an option that does not belong to it.
    """
    from nbdbm.image import bitmapedit as edit

    simple: dict[str, Callable[[str], Operation]]
    simple = {"remove": edit.Remove, "clear": edit.Clear, "enable": edit.Enable, "disable": edit.Disable}
    operations: list[Operation] = []
    for name, value in order:
        last = operations[-1] if operations else None
        if name in simple:
            operations.append(simple[name](value))
        elif name == "add":
            operations.append(edit.Add(value))
        elif name == "remove_inconsistent":
            operations.append(edit.RemoveInconsistent())
        elif name == "merge":
            operations.append(edit.Merge(*value))
        elif name == "rename":
            operations.append(edit.Rename(*value))
        elif name in ("granularity", "disabled"):
            if not isinstance(last, edit.Add):
                raise click.UsageError(f"--{name} belongs to an --add right before it")
            changed = {"granularity": parse_size(value)} if name == "granularity" else {"enabled": False}
            operations[-1] = last._replace(**changed)
        elif name in ("source_file", "source_format"):
            if not isinstance(last, edit.Merge):
                raise click.UsageError(f"--{name.replace('_', '-')} belongs to a --merge right before it")
            operations[-1] = last._replace(**{name.removeprefix("source_"): value})
    if not operations:
        raise click.UsageError("say what to do with the bitmaps: nbdbm bitmap edit -h lists the operations")
    for operation in operations:
        if isinstance(operation, edit.Merge) and operation.format is not None and operation.file is None:
            raise click.UsageError("--source-format is about --source-file, which was not given")
    return operations
