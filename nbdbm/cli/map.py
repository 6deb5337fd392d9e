"""``nbdbm map``: what lies where on a disk, as text, JSON, totals or a picture.

Text and JSON have the columns and keys of ``nbdinfo --map``, so scripts may read either.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator

import click

from nbdbm import uri
from nbdbm.cli import printable
from nbdbm.cli.mapsource import ImageSource, MapSource, ServerSource, choose, merged
from nbdbm.cli.options import FILE, LookOptions, image_options
from nbdbm.cli.picture import Picture, Span, human, palette
from nbdbm.errors import NbdbmError, UsageError
from nbdbm.nbd.constants import CONTEXT_ALLOCATION, CONTEXT_BITMAP, CONTEXT_DEPTH

MAX_KINDS = 65536
"""Different flags values (a number) that ``--totals`` sums up; a hostile server may send 2^32 of them."""

MAX_STRIPS = 16
"""Bitmaps (a number) that a picture shows unasked; more would bury the picture."""

PICTURE_ROWS = 16
STRIP_ROWS = 1
MAX_ROW = 128
"""Characters; longer rows are hard to follow."""
LABEL = 10
"""Characters before each row."""

_ALLOCATION_WORDS = ("data", "hole", "zero", "hole,zero")
_DIRTY_WORDS = ("clean", "dirty")
_DEPTH_WORDS = ("absent", "local")


def describe(context: str, flags: int) -> str | None:
    """The words for an extent's flags, or None where none are agreed upon."""
    if context == CONTEXT_ALLOCATION:
        words: tuple[str, ...] = _ALLOCATION_WORDS
    elif context.startswith(CONTEXT_BITMAP):
        words = _DIRTY_WORDS
    elif context == CONTEXT_DEPTH:
        if flags >= len(_DEPTH_WORDS):
            return f"backing depth {flags}"
        words = _DEPTH_WORDS
    else:
        return None
    return words[flags] if flags < len(words) else None


@click.command("map")
@click.argument("target", type=FILE, metavar="IMAGE|URI")
@click.option(
    "-c",
    "--context",
    metavar="NAME",
    help="What to map: a metadata context (base:allocation is the default; qemu:allocation-depth; "
    "qemu:dirty-bitmap:NAME), or just the name of a bitmap.",
)
@click.option("--json", "as_json", is_flag=True, help="Extents as JSON.")
@click.option("--totals", is_flag=True, help="Only how much there is of each type.")
@click.option(
    "--picture/--no-picture",
    default=None,
    help="Draw the disk, rather than list its extents (the default on a terminal).",
)
@image_options(snapshot=True)
def map_command(
    target: str,
    context: str | None,
    as_json: bool,
    totals: bool,
    picture: bool | None,
    look: LookOptions,
) -> None:
    """Show which parts of a disk are data, zero or dirty.

    The disk is an image file, or an export of an NBD server given by its URI (nbd://, nbd+unix://, and
    with TLS nbds://, nbds+unix://). Extents are listed as offset, length, type and description; on a
    terminal the disk is drawn, its bitmaps below it.
    """
    if picture and (as_json or totals):
        raise UsageError("--picture excludes --json and --totals")
    if picture is None:
        picture = not as_json and not totals and sys.stdout.isatty()

    async def run() -> None:
        source: MapSource
        if uri.is_uri(target):
            look.refuse_for(target)
            source = await ServerSource.open(target)
        else:
            source = await ImageSource.open(target, look.for_engine())
        try:
            if picture:
                await _draw(source, target, context)
                return
            name = choose(context or CONTEXT_ALLOCATION, await source.contexts(), source, target)
            await source.select([name])
            extents = merged(source.extents(name))
            if totals:
                await _print_totals(extents, name, source.size, as_json)
            elif as_json:
                await _print_json(extents, name)
            else:
                await _print_text(extents, name)
        finally:
            await source.close()

    asyncio.run(run())


async def _print_text(extents: AsyncIterator[tuple[int, int, int]], context: str) -> None:
    write = sys.stdout.write
    async for offset, length, flags in extents:
        text = describe(context, flags)
        write(f"{offset:10}  {length:10} {flags:4}{'  ' + text if text else ''}\n")


async def _print_json(extents: AsyncIterator[tuple[int, int, int]], context: str) -> None:
    """One extent a line, written as it comes: the whole may be longer than memory."""
    write = sys.stdout.write
    separator = "[\n"
    async for offset, length, flags in extents:
        entry: dict[str, object] = {"offset": offset, "length": length, "type": flags}
        if (text := describe(context, flags)) is not None:
            entry["description"] = text
        write(separator + json.dumps(entry))
        separator = ",\n"
    write("[]\n" if separator == "[\n" else "\n]\n")


async def _print_totals(
    extents: AsyncIterator[tuple[int, int, int]], context: str, size: int, as_json: bool
) -> None:
    sums: dict[int, int] = {}
    async for _, length, flags in extents:
        sums[flags] = sums.get(flags, 0) + length
        if len(sums) > MAX_KINDS:
            raise NbdbmError(f"{context}: more than {MAX_KINDS} different types of extents")
    rows = [(sums[flags], 100 * sums[flags] / size, flags) for flags in sorted(sums)]
    if as_json:
        entries: list[dict[str, object]] = []
        for total, percent, flags in rows:
            entries.append({"size": total, "percent": percent, "type": flags})
            if (text := describe(context, flags)) is not None:
                entries[-1]["description"] = text
        click.echo(json.dumps(entries, indent=2))
        return
    for total, percent, flags in rows:
        text = describe(context, flags)
        click.echo(f"{total:10} {percent:5.1f}% {flags:3}{' ' + text if text else ''}")


async def _draw(source: MapSource, target: str, context: str | None) -> None:
    """Draw one context; unasked, the allocation and under it a strip for each of the bitmaps."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    plain = not (console.encoding or "").lower().startswith("utf")
    # A power of two, so that rows begin at round offsets.
    width = min(MAX_ROW, 1 << max(console.width - LABEL, 8).bit_length() - 1)

    def show(spans: list[Span]) -> None:
        console.print(Text.assemble(*((span.text, span.style) for span in spans)), soft_wrap=True)

    available = await source.contexts()
    bitmaps = [name for name in available if name.startswith(CONTEXT_BITMAP)]
    main = choose(context or CONTEXT_ALLOCATION, available, source, target)
    strips = [] if context else bitmaps[:MAX_STRIPS]
    await source.select([main, *strips])

    for name in [main, *strips]:
        rows = PICTURE_ROWS if name == main else STRIP_ROWS
        picture = Picture(source.size, width * rows, palette(name))
        async for offset, length, flags in merged(source.extents(name)):
            picture.add(offset, length, flags)
        if name == main:
            show([Span(f"{printable(target)}: {human(source.size)}, {printable(main)}", "bold")])
        else:
            show([Span(f"bitmap {printable(name.removeprefix(CONTEXT_BITMAP))}", "bold")])
        for row in picture.rows(width, plain=plain):
            show(row)
        show(picture.legend(plain=plain))
    if not context and len(bitmaps) > MAX_STRIPS:
        show([Span(f"and {len(bitmaps) - MAX_STRIPS} more bitmaps: --context NAME shows one")])
