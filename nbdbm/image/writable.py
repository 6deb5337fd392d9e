"""Opening the active layer of a qcow2 image for writing, and changing its header."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from nbdbm.errors import CorruptError, FormatError, ImageError, UnsupportedError
from nbdbm.image.allocator import Allocator
from nbdbm.image.backing import Layer
from nbdbm.image.blockfile import BlockFile
from nbdbm.image.cache import TableCache
from nbdbm.image.commit import Metadata
from nbdbm.image.occupied import Occupied
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
        CorruptError: the refcount table is broken, or pieces of metadata overlap.
        OSError: it cannot be read.
    """
    header = layer.header
    assert header is not None and layer.map is not None
    allocator = await Allocator.load(layer.file, header)
    _protect(allocator, layer, header)
    metadata = Metadata(layer.map, cache, allocator, header.l1_table_offset, punch=punch)
    metadata.claim_tables()
    return metadata


class _Part(NamedTuple):
    """One piece of metadata: host clusters [first, end)."""

    first: int
    end: int
    name: str


def _protect(allocator: Allocator, layer: Layer, header: Header) -> None:
    """Tell the allocator where metadata is, but for L2 tables.

    Raises:
        CorruptError: two pieces lie in the same place: changing one would destroy the other.
    """
    parts = sorted(_parts(layer, header))
    last = parts[0]
    for part in parts[1:]:
        if part.first < last.end and not part.name == last.name == _SNAPSHOT:
            raise _overlap(layer, part.first, last.name, part.name)
        last = max(last, part, key=lambda p: p.end)
    allocator.occupied.protect(*((part.first, part.end) for part in parts))
    for part in parts:
        if part.name == _DIRECTORY:
            allocator.spared.update(range(part.first, part.end))
    others = Occupied()
    others.protect(*((part.first, part.end) for part in parts))
    blocks = {entry >> header.cluster_bits for entry in allocator.table if entry}
    for block in others.among(blocks):
        raise _overlap(layer, block, "a refcount block", "other metadata")


_SNAPSHOT = "a snapshot's L1 table"
_DIRECTORY = "the bitmap directory"


def _parts(layer: Layer, header: Header) -> Iterator[_Part]:
    def part(name: str, offset: int, length: int) -> Iterator[_Part]:
        if length:
            yield _Part(offset >> header.cluster_bits, -(-(offset + length) >> header.cluster_bits), name)

    yield from part("the header", 0, header.cluster_size)
    yield from part("the L1 table", header.l1_table_offset, 8 * header.l1_size)
    table = header.refcount_table_clusters << header.cluster_bits
    yield from part("the refcount table", header.refcount_table_offset, table)
    if header.nb_snapshots:
        length = sum(len(snapshot.pack()) for snapshot in layer.snapshots)
        yield from part("the snapshot table", header.snapshots_offset, length)
    for snapshot in layer.snapshots:
        # One that cannot be loaded is not made worse by what is written there.
        with suppress(FormatError):
            snapshot.validate(header.size, header.cluster_size, header.l2_entry_size, layer.file.size)
            yield from part(_SNAPSHOT, snapshot.l1_table_offset, 8 * snapshot.l1_size)
    bitmaps = header.bitmaps
    if bitmaps is not None and header.autoclear_features & AutoclearFeature.BITMAPS:
        yield from part(_DIRECTORY, bitmaps.directory_offset, bitmaps.directory_size)


def _overlap(layer: Layer, cluster: int, one: str, other: str) -> CorruptError:
    assert layer.header is not None
    place = cluster << layer.header.cluster_bits
    return CorruptError(
        layer.path, f"cannot be written to: {one} and {other} lie in the same place, {place:#x}"
    )
