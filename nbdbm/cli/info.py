"""``nbdbm info``: everything worth knowing about an image before it is served."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import click

from nbdbm.cli import printable
from nbdbm.cli.bitmap import bitmap_entries, bitmap_table, remarks
from nbdbm.cli.options import FILE, LookOptions, image_options
from nbdbm.cli.picture import human
from nbdbm.errors import ImageError

if TYPE_CHECKING:
    from nbdbm.image.image import Image

COMPAT = {2: "0.10", 3: "1.1"}
"""qcow2 version -> what ``qemu-img`` calls it."""


@click.command("info")
@click.argument("image", type=FILE, metavar="IMAGE")
@click.option("--json", "as_json", is_flag=True, help="A JSON object.")
@click.option("--dirty", is_flag=True, help="Count dirty bytes even where that takes long.")
@image_options(snapshot=False)
def info(image: str, as_json: bool, dirty: bool, look: LookOptions) -> None:
    """Show format, sizes, features, backing chain, snapshots and bitmaps of an image.

    Nothing is changed. An image that a virtual machine is writing to is refused without --force-share.
    """

    async def run() -> dict[str, Any]:
        from nbdbm.image.image import Image

        try:
            opened = await Image.open(image, look.for_engine())
            missing = None
        except ImageError as error:
            if look.no_backing or look.backing_root is not None:
                raise
            # Perhaps it is only what it refers to; if it is the file itself, the same is raised again.
            opened = await Image.open(image, look.for_engine(chain=False))
            missing = error
        try:
            facts = await gather(opened, count_all=dirty)
        finally:
            await opened.close()
        if missing is not None:
            facts["notices"].append(f"the files that it refers to cannot be used: {missing}")
        return facts

    facts = asyncio.run(run())
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        show(facts)


async def gather(image: Image, *, count_all: bool) -> dict[str, Any]:
    """What ``--json`` prints. Sizes are bytes; keys are only ever added.

    ==================== ==============================================================================
    ``file``             the image, as given
    ``format``           ``qcow2`` or ``raw``
    ``virtual_size``     of the disk that is served
    ``disk_size``        allocated on the host by the image and its data file
    ``cluster_size``     null for raw images, as all the following down to ``backing_file``
    ``version``          of the qcow2 format, 2 or 3
    ``compat``           the same in qemu-img's words, ``0.10`` or ``1.1``
    ``compression``      ``zlib`` or ``zstd``
    ``refcount_bits``    width of a refcount
    ``features``         list of those in use: ``dirty``, ``corrupt``, ``data-file``, ``data-file-raw``,
                         ``compression-type``, ``extended-l2``, ``lazy-refcounts``, ``bitmaps``
    ``data_file``        external data file, as recorded, or null
    ``backing_file``     as recorded, or null
    ``backing_chain``    list of ``file``, ``format``, ``virtual_size``, ``disk_size``, ``data_file``:
                         the files under the image, the nearest first; empty if one cannot be used
    ``snapshots``        list of ``id``, ``name``, ``date`` (seconds since 1970), ``virtual_size`` (or
                         null), ``vm_state_size``
    ``bitmaps``          list, see ``bitmap_entries``
    ``notices``          list of what the user should hear about although the image can be served
    ==================== ==============================================================================
    """
    header = image.header
    layers = [
        {
            "file": layer.path,
            "format": layer.format,
            "virtual_size": layer.size,
            "disk_size": layer.allocated,
            "data_file": layer.data_file,
        }
        for layer in image.chain
    ]
    return {
        "file": image.path,
        "format": image.format,
        "virtual_size": image.size,
        "disk_size": layers[0]["disk_size"],
        "cluster_size": header and header.cluster_size,
        "version": header and header.version,
        "compat": header and COMPAT[header.version],
        "compression": header and ("zstd" if header.compression_type else "zlib"),
        "refcount_bits": header and header.refcount_bits,
        "features": _features(image),
        "data_file": header and header.data_file,
        "backing_file": header and header.backing_file,
        "backing_chain": layers[1:],
        "snapshots": [
            {
                "id": snapshot.id,
                "name": snapshot.name,
                "date": snapshot.date_sec,
                "virtual_size": snapshot.disk_size,
                "vm_state_size": snapshot.vm_state_size,
            }
            for snapshot in image.snapshots
        ],
        "bitmaps": await bitmap_entries(image, count_all=count_all),
        "notices": list(image.notices),
    }


def _features(image: Image) -> list[str] | None:
    header = image.header
    if header is None:
        return None
    found = {
        "dirty": header.dirty,
        "corrupt": header.corrupt,
        "data-file": header.has_data_file,
        "data-file-raw": header.raw_data_file,
        "compression-type": header.compression_type != 0,
        "extended-l2": header.extended_l2,
        "lazy-refcounts": header.lazy_refcounts,
        "bitmaps": header.bitmaps is not None,
    }
    return [name for name, present in found.items() if present]


def show(facts: dict[str, Any]) -> None:
    """Print what ``gather`` returned for people."""
    from nbdbm.cli import tables

    def size(count: int | None) -> str:
        return (
            "-" if count is None else f"{human(count)} ({count} bytes)" if count >= 1024 else f"{count} bytes"
        )

    out = tables.console()
    main = tables.facts()
    main.add_row("image", printable(facts["file"]))
    main.add_row("format", facts["format"] + (f" (compat {facts['compat']})" if facts["compat"] else ""))
    main.add_row("virtual size", size(facts["virtual_size"]))
    main.add_row("disk size", size(facts["disk_size"]))
    if facts["version"] is not None:
        main.add_row("cluster size", size(facts["cluster_size"]))
        main.add_row("compression", facts["compression"])
        main.add_row("refcount bits", str(facts["refcount_bits"]))
        main.add_row("features", ", ".join(facts["features"]) or "-")
    if facts["data_file"] is not None:
        main.add_row("data file", printable(facts["data_file"]))
    if facts["backing_file"] is not None and not facts["backing_chain"]:
        main.add_row("backing file", printable(facts["backing_file"]))
    out.print(main)

    if facts["backing_chain"]:
        chain = tables.table("backing file", "format", "virtual size:r", "disk size:r")
        for layer in facts["backing_chain"]:
            chain.add_row(
                printable(layer["file"]),
                layer["format"],
                human(layer["virtual_size"]),
                human(layer["disk_size"]),
            )
        out.print("", chain, sep="\n")
    if facts["snapshots"]:
        from datetime import UTC, datetime

        snapshots = tables.table("snapshot", "name", "taken", "virtual size:r", "machine state:r")
        for entry in facts["snapshots"]:
            snapshots.add_row(
                printable(entry["id"]),
                printable(entry["name"]),
                f"{datetime.fromtimestamp(entry['date'], UTC):%Y-%m-%d %H:%M:%S} UTC",
                "-" if entry["virtual_size"] is None else human(entry["virtual_size"]),
                human(entry["vm_state_size"]),
            )
        out.print("", snapshots, sep="\n")
    if facts["bitmaps"]:
        out.print("", bitmap_table(facts["bitmaps"]), *remarks(facts["bitmaps"]), sep="\n")
    for notice in facts["notices"]:
        out.print(f"\nnote: {printable(notice)}")
