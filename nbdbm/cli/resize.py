"""``nbdbm resize``: larger disks, with their bitmaps."""

from __future__ import annotations

import asyncio

import click

from nbdbm.cli import printable, say_notices
from nbdbm.cli.create import parse_size
from nbdbm.cli.options import FILE
from nbdbm.cli.picture import human
from nbdbm.config import FORMATS
from nbdbm.errors import BitmapError, ImageError


def parse_new_size(text: str) -> tuple[int, bool]:
    """A size in bytes, and whether it is to be added to what there is (``+1G``).

    Raises:
        click.BadParameter: it is none.
    """
    return parse_size(text.removeprefix("+")), text.startswith("+")


@click.command("resize")
@click.argument("image", type=FILE, metavar="IMAGE")
@click.argument("size", metavar="[+]SIZE", type=parse_new_size)
@click.option(
    "-f", "--format", "format_", type=click.Choice(FORMATS), help="Format of IMAGE.  [default: qcow2]"
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
def resize(image: str, size: tuple[int, bool], format_: str | None, quiet: bool) -> None:
    """Make the disk of IMAGE, which nobody uses, larger: SIZE bytes, or as many more with a plus sign.

    SIZE takes the suffixes K M G T P E. The new range reads as zeroes. Bitmaps stay valid: it is dirty in
    those that record, and clean in disabled ones. Internal snapshots keep the size they have.
    """
    from nbdbm.image.resize import resize as grow

    number, relative = size
    try:
        done = asyncio.run(grow(image, number, relative=relative, format=format_))
    except BitmapError as error:
        raise ImageError(image, str(error), errno=error.errno) from error
    say_notices(image, done.notices)
    if not quiet:
        news = f"{human(done.before)} before, {human(done.after)} now"
        if done.before == done.after:
            news = f"{human(done.before)} already"
        click.echo(printable(f"{image}: {news}"))
