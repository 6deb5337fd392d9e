"""``nbdbm create``: new qcow2 images."""

from __future__ import annotations

import asyncio
import re
from fractions import Fraction

import click

from nbdbm.cli import printable
from nbdbm.cli.options import FILE
from nbdbm.cli.picture import human
from nbdbm.errors import UsageError

VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
"""Compatibility level as qemu-img says it -> qcow2 version."""

_SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)([bkmgtpe]?)", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """A number of bytes, with the suffixes of qemu-img: K, M, G, T, P, E are powers of 1024.

    Raises:
        click.BadParameter: it is none.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise click.BadParameter(
            f"{text!r} is not a size: bytes, or a number with a suffix out of K M G T P E"
        )
    number, suffix = found.groups()
    return int(Fraction(number) * 1024 ** "bkmgtpe".index(suffix.lower() or "b"))


@click.command("create")
@click.argument("image", type=FILE, metavar="IMAGE")
@click.argument("size", type=parse_size, required=False)
@click.option(
    "-f", "--format", "format_", type=click.Choice(("qcow2",)), default="qcow2", help="Format of IMAGE."
)
@click.option("--size", "size_option", type=parse_size, metavar="SIZE", help="Another way to say SIZE.")
@click.option(
    "--cluster-size",
    type=parse_size,
    default="64K",
    metavar="SIZE",
    help="512 to 2M, a power of two (default: 64K).",
)
@click.option(
    "-b",
    "--backing",
    type=FILE,
    metavar="FILE",
    help="Backing file; a relative name begins at IMAGE's directory.",
)
@click.option(
    "-F",
    "--backing-format",
    type=click.Choice(("qcow2", "raw")),
    help="Format of the backing file; required with it.",
)
@click.option("-u", "--unsafe", is_flag=True, help="Do not look at the backing file; it need not exist.")
@click.option("--extended-l2", is_flag=True, help="Subclusters: 32 allocation units in each cluster.")
@click.option("--compat", type=click.Choice(tuple(VERSIONS)), default="1.1", help="Version (default: 1.1).")
@click.option("--lazy-refcounts", is_flag=True, help="Let programs postpone refcount updates.")
@click.option(
    "--refcount-bits", type=int, default=16, metavar="N", help="Width of refcounts: 1 to 64 (default: 16)."
)
@click.option(
    "--compression-type", type=click.Choice(("zlib", "zstd")), default="zlib", help="(default: zlib)"
)
@click.option(
    "--preallocation", type=click.Choice(("off", "metadata")), default="off", help="Map every cluster now."
)
@click.option("--data-file", type=FILE, metavar="FILE", help="Keep guest data in FILE, which is created too.")
@click.option("--data-file-raw", is_flag=True, help="Keep the data file readable as a raw image.")
@click.option("--force", is_flag=True, help="Replace existing files, overwrite a block device.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
def create(
    image: str,
    size: int | None,
    format_: str,
    size_option: int | None,
    cluster_size: int,
    backing: str | None,
    backing_format: str | None,
    unsafe: bool,
    extended_l2: bool,
    compat: str,
    lazy_refcounts: bool,
    refcount_bits: int,
    compression_type: str,
    preallocation: str,
    data_file: str | None,
    data_file_raw: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Create a qcow2 image of SIZE bytes (suffixes K M G T P E), as qemu-img does.

    SIZE may be left out with a backing file, whose size is taken then. Unlike with qemu-img, nothing
    that exists is overwritten without --force.
    """
    assert format_ == "qcow2"
    if size is not None and size_option is not None and size != size_option:
        raise UsageError(f"two sizes were given: {size} and {size_option}")
    if unsafe and backing is None:
        raise UsageError("--unsafe is about the backing file, and there is none")

    from nbdbm.image.create import CreateOptions
    from nbdbm.image.create import create as make

    options = CreateOptions(
        size=size if size is not None else size_option,
        version=VERSIONS[compat],
        cluster_size=cluster_size,
        refcount_bits=refcount_bits,
        extended_l2=extended_l2,
        lazy_refcounts=lazy_refcounts,
        compression_type=compression_type,
        preallocation=preallocation,
        backing_file=backing,
        backing_format=backing_format,
        check_backing=not unsafe,
        data_file=data_file,
        data_file_raw=data_file_raw,
        force=force,
    )
    made = asyncio.run(make(image, options))
    if not quiet:
        assert made.size is not None
        below = f", backed by {backing}" if backing else ""
        click.echo(
            printable(f"created {image}: {human(made.size)}, clusters of {human(cluster_size)}{below}")
        )
