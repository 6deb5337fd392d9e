"""Opening the active layer of a qcow2 image for writing, and changing its header."""

from __future__ import annotations

import errno
from dataclasses import replace

from nbdbm.errors import FormatError, ImageError, UnsupportedError
from nbdbm.image.allocator import Allocator
from nbdbm.image.backing import Layer
from nbdbm.image.blockfile import BlockFile
from nbdbm.image.cache import TableCache
from nbdbm.image.commit import Metadata
from nbdbm.qcow2.constants import KNOWN_AUTOCLEAR, AutoclearFeature
from nbdbm.qcow2.header import Header
from nbdbm.qcow2.headeredit import plan


async def rewrite_header(file: BlockFile, new: Header) -> Header:
    """Change the header cluster to say ``new``; returns what it says now, layout included.

    Durable when this returns. After each step the disk holds the old or the new header (headeredit.py).
    The refcount table stays where the file says that it is: the allocator moves it on its own.

    Raises:
        UnsupportedError: the header cluster has no room for it; nothing has changed.
        OSError: a write or sync failed; the file has the old or the new header.
    """
    cluster = await file.pread(0, new.cluster_size)
    new = _with_refcounts_of(new, Header.parse(cluster))
    try:
        steps = plan(cluster, new)
    except FormatError as error:
        raise UnsupportedError(file.path, f"the header cannot be changed: {error}") from error
    for step in steps:
        await file.pwrite(step.offset, step.data)
        await file.sync()
    return Header.parse(await file.pread(0, new.cluster_size))


def _with_refcounts_of(header: Header, other: Header) -> Header:
    return replace(
        header,
        refcount_table_offset=other.refcount_table_offset,
        refcount_table_clusters=other.refcount_table_clusters,
    )


async def prepare(layer: Layer, notices: list[str]) -> None:
    """Make the header of a layer that was opened for writing fit to be written behind.

    Raises:
        ImageError: the image is marked as corrupt, or its refcounts cannot be rebuilt.
    """
    header = layer.header
    assert header is not None and layer.map is not None
    # If we have written to it before, the refcount table may have moved since.
    header = _with_refcounts_of(header, Header.parse(await layer.file.pread(0, header.cluster_size)))
    if header.corrupt:
        raise ImageError(
            layer.path,
            "incompatible_features: the corrupt bit is set; repair it with: nbdbm check --repair all",
            errno=errno.EROFS,
        )
    if header.dirty:
        # Lazy refcounts, and whoever wrote last did not get to updating them: counted anew.
        from nbdbm.image.repair import rebuild_refcounts  # with all of the check; rarely needed

        header = await rebuild_refcounts(layer.file, header)
        notices.append(f"{layer.path}: was not closed cleanly (dirty bit): its refcounts have been rebuilt")
    unknown = header.unknown_autoclear
    if unknown:
        # What these features describe is about to become outdated: say so before it does.
        kept = AutoclearFeature(header.autoclear_features & int(KNOWN_AUTOCLEAR))
        header = await rewrite_header(layer.file, replace(header, autoclear_features=kept))
        notices.append(f"{layer.path}: unknown autoclear features {unknown:#x} have been cleared")
    layer.header = header


async def load_metadata(layer: Layer, cache: TableCache, *, punch: bool) -> Metadata:
    """What changes the layer's mapping.

    Raises:
        CorruptError: the refcount table is broken.
        OSError: it cannot be read.
    """
    header = layer.header
    assert header is not None and layer.map is not None
    allocator = await Allocator.load(layer.file, header)
    allocator.protect(header.l1_table_offset, 8 * header.l1_size)
    if header.nb_snapshots:
        allocator.protect(header.snapshots_offset, 1)
    if header.bitmaps is not None and header.autoclear_features & AutoclearFeature.BITMAPS:
        allocator.protect(header.bitmaps.directory_offset, header.bitmaps.directory_size)
    return Metadata(layer.map, cache, allocator, header.l1_table_offset, punch=punch)
