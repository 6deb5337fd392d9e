"""``nbdbm checkpoint``: where the next incremental backup of a machine's disks begins."""

from __future__ import annotations

import asyncio

import click

from nbdbm.cli import PROGRAM, printable
from nbdbm.cli.create import parse_size
from nbdbm.cli.options import FILE


@click.command("checkpoint")
@click.argument("images", type=FILE, metavar="IMAGE...", nargs=-1, required=True)
@click.option("-n", "--name", required=True, metavar="NAME", help="The bitmap that records from now on.")
@click.option("--disable", metavar="PREVIOUS", help="This bitmap ends here: it stays as it is from now on.")
@click.option("--clear", is_flag=True, help="Clear NAME where it exists: a full backup is its new base.")
@click.option(
    "-g",
    "--granularity",
    type=parse_size,
    metavar="SIZE",
    help="Bytes per bit of new bitmaps (default: the cluster size, from 4K to 64K).",
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
def checkpoint(
    images: tuple[str, ...],
    name: str,
    disable: str | None,
    clear: bool,
    granularity: int | None,
    quiet: bool,
) -> None:
    """Begin bitmap NAME on all disks of a machine that is not running: on all, or on none.

    Afterwards NAME is there on every IMAGE, clean, and records every write. An incremental chain is one
    checkpoint after each backup:

    \b
    nbdbm checkpoint vda.qcow2 vdb.qcow2 --name monday
    nbdbm checkpoint vda.qcow2 vdb.qcow2 --name tuesday --disable monday

    If the power fails at a bad moment, some images may have it and some may not; the same command, run
    again before the machine is, completes it and says which had it already.
    """
    if disable is not None and clear:
        raise click.UsageError("--disable begins the next bitmap, --clear begins the same one anew: which?")
    if disable == name:
        raise click.UsageError(f"--disable {disable} is what --name says")
    from nbdbm.image.checkpoint import CheckpointOptions
    from nbdbm.image.checkpoint import checkpoint as make

    options = CheckpointOptions(name=name, disable=disable, clear=clear, granularity=granularity)
    for done in asyncio.run(make(images, options)):
        for notice in done.notices:
            click.echo(f"{PROGRAM}: {printable(f'{done.path}: {notice}')}", err=True)
        if not quiet:
            click.echo(printable(f"{done.path}: bitmap {name!r} {done.outcome.value}"))
