"""``nbdbm bitmap``: what can be done with the bitmaps of an image."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import click

from nbdbm.cli import printable
from nbdbm.cli.options import LookOptions, image_options
from nbdbm.cli.picture import human
from nbdbm.errors import BitmapError, ImageError

if TYPE_CHECKING:
    from rich.table import Table

    from nbdbm.image.image import Image

CHEAP_BITS = 1 << 27
"""Bits (16 MiB) that are read and counted unasked, over all bitmaps of an image: 8 TiB at 64 KiB each.
Beyond that an image could keep a mere listing busy for minutes."""


@click.group("bitmap")
def bitmap() -> None:
    """Look after the dirty bitmaps of an image."""


@bitmap.command("list")
@click.argument("image", metavar="IMAGE")
@click.option("--json", "as_json", is_flag=True, help="A JSON list.")
@click.option("--dirty", is_flag=True, help="Count dirty bytes even where that takes long.")
@image_options(snapshot=False)
def list_command(image: str, as_json: bool, dirty: bool, look: LookOptions) -> None:
    """List every bitmap, what it is good for, and how much is dirty in it."""

    async def run() -> list[dict[str, Any]]:
        from nbdbm.image.image import Image

        opened = await Image.open(image, look.for_engine())
        try:
            return await bitmap_entries(opened, count_all=dirty)
        finally:
            await opened.close()

    entries = asyncio.run(run())
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
    from nbdbm.cli.serve import remedy

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
