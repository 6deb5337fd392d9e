"""repair: make refcounts, COPIED flags and feature bits agree with what the image refers to.

What is repaired, in this order:

1. entries that promise zeroes at a place where no cluster can be lose that place     (all)
   references past the end of a file that was not closed cleanly: the file grows     (all)
2. refcounts: changed in place, or a new refcount structure written beside the old    (leaks: only lowered)
3. COPIED flags                                                                       (all)
4. the dirty bit and the corrupt bit, once nothing is left to repair

No data is invented and no entry with data is dropped: an entry that points to a wrong place stays, and
stays reported. While part of the image could not be followed, no refcount is lowered: what nothing seems
to refer to may be what the lost part referred to.
"""

from __future__ import annotations

import itertools
import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import replace

from nbdbm.errors import CorruptError, ImageError
from nbdbm.image.blockfile import BlockFile
from nbdbm.image.check import Progress, Survey, survey
from nbdbm.image.checkreport import CheckReport
from nbdbm.image.counts import CHUNK
from nbdbm.qcow2.constants import (
    COMPRESSED,
    COPIED,
    MAX_REFTABLE_SIZE,
    OFFSET_MASK,
    ZERO,
    IncompatFeature,
)
from nbdbm.qcow2.geometry import Geometry
from nbdbm.qcow2.header import Header
from nbdbm.qcow2.refcount import RefcountBlock, pack_counts

SECTOR = 512
"""Bytes that a power failure leaves either old or new."""
REFTABLE_AT = 48
"""Where refcount_table_offset and, behind it, refcount_table_clusters are: 12 bytes in the first sector."""
REFTABLE = struct.Struct(">QI")
FEATURES_AT = 72
"""Where incompatible_features is: 8 bytes in the first sector (version 3)."""
NOT_REPAIRED = "not repaired: "
MAX_GROWTH = 1 << 30
"""Bytes by which a file may grow beyond its disk's size to take in references past its end."""


async def repair(
    file: BlockFile,
    header: Header,
    *,
    errors: bool,
    progress: Progress | None = None,
) -> tuple[Header, CheckReport]:
    """Check and repair; return the header as it is now, and what is left, with the numbers of what was fixed.

    The file must be locked for writing, and nobody may have its metadata in memory.

    Args:
        errors: repair all; else only leaks.
        progress: told about each walk in turn.

    Raises:
        OSError: a write failed; the image is no worse than before.
        UnsupportedError: see ``check``.
    """
    walk = first = await survey(file, header, progress=progress)
    if errors and await _settle_entries(walk):
        await file.sync()  # Disk: the same content; the refcounts that this makes needless still there.
        walk = await survey(file, header, progress=progress)
    changed = False
    obstacle = None
    if errors and walk.rebuild:
        obstacle = _obstacle(walk)
        if obstacle is None:
            header = await _rebuild(walk)
            changed = True
    elif not walk.rebuild:
        # Refcounts raised protect more than before, those lowered belong to clusters that nothing uses:
        # no order among them, or against the flags below, is worse than what is there now.
        changed = await _correct_in_place(walk, errors)
    if changed:
        walk = await survey(file, header, progress=progress)
    if errors and walk.flagged and not walk.rebuild and await _correct_flags(walk):
        # A flag set is true whatever the refcount says by then, and one cleared costs a copy at most.
        changed = True
        walk = await survey(file, header, progress=progress)
    if changed:
        await file.sync()  # Disk: all refcounts and flags that could be right are right.
    report = walk.report
    if obstacle is not None:
        report.say(f"{NOT_REPAIRED}the refcounts are damaged, but {obstacle}")
    report.leaks_fixed = max(0, first.report.leaks - report.leaks)
    report.corruptions_fixed = max(0, first.report.corruptions - report.corruptions)
    if not report.corruptions and not report.check_errors:
        header = await _clear_bits(file, header)
    return header, report


async def rebuild_refcounts(file: BlockFile, header: Header) -> Header:
    """Make the refcounts of an image with the dirty bit true, and clear the bit; return the new header.

    The file must be writable and locked. Call it before any of the metadata is cached.

    Raises:
        CorruptError: something is wrong that cannot be repaired: writing would put data at risk.
        OSError: a write failed; the image is no worse than before.
    """
    header, report = await repair(file, header, errors=True)
    if report.check_errors + report.corruptions == report.bitmap_faults:
        # Broken bitmaps are believed by nobody; as they could not be followed, no count was lowered.
        header = await _clear_bits(file, header)
    else:
        # The last line may be about the repair itself; else the first is as good as any.
        lines = report.problems or ["the refcounts cannot be made true"]
        what = lines[-1] if lines[-1].startswith(NOT_REPAIRED) else lines[0]
        raise CorruptError(file.path, f"was not closed cleanly, and cannot be repaired: {what}")
    return header


# -- entries ------------------------------------------------------------------------------------


async def _settle_entries(walk: Survey) -> bool:
    """Step 1; return whether something was written."""
    file, size = walk.file, walk.size
    changed = False
    for l1_index in walk.zeroable:
        l1 = (await _read_words(file, walk.header.l1_table_offset + 8 * l1_index, 8))[0]
        offset = l1 & OFFSET_MASK
        if walk.counted[offset >> walk.bits] != 1:
            continue  # Shared, or overlapped: not ours alone to change.
        words = await _read_words(file, offset, size)
        before = words[:]
        _zero_misaligned(words, walk.geometry)
        changed |= await _write_changes(file, offset, before, words)
    # Metadata reached the disk, but not the file's new length: what was never written reads as zeroes,
    # before and after. In a file that was closed cleanly, such references are damage, and stay reported.
    if walk.header.dirty and walk.references_end > walk.clusters:
        end = walk.references_end * size
        if end - file.size <= walk.header.size + MAX_GROWTH:
            await file.truncate(end)
            changed = True
    return changed


def _zero_misaligned(words: array[int], geometry: Geometry) -> None:
    """Entries that read as zeroes anyway, but name an impossible cluster: keep the zeroes only."""
    step = geometry.words_per_entry
    for at in range(0, len(words), step):
        entry = words[at]
        if entry & COMPRESSED or not entry & geometry.misaligned_mask:
            continue
        assert geometry.version >= 3
        if step == 2:
            # Nothing allocated: what is not zero shows the backing file, and goes on doing so.
            if not words[at + 1] & 0xFFFF_FFFF:
                words[at] = 0
        elif entry & ZERO:
            words[at] = ZERO


async def _correct_flags(walk: Survey) -> bool:
    """Step 3: COPIED exactly where the refcount is one; return whether something was written."""
    file, header, geometry = walk.file, walk.header, walk.geometry
    changed = False
    for l1_index in dict.fromkeys(walk.flagged):
        at = header.l1_table_offset + 8 * l1_index
        before = await _read_words(file, at, 8)
        entry = before[0]
        offset = entry & OFFSET_MASK
        cluster = offset >> walk.bits
        if offset and (offset & (walk.size - 1) or cluster >= walk.clusters):
            continue
        if at >> walk.bits not in walk.overlapped:
            copied = bool(offset) and _alone(walk, cluster)
            changed |= await _write_changes(file, at, before, array("Q", (_flag(entry, copied),)))
        if not offset or cluster in walk.overlapped:
            continue
        words = await _read_words(file, offset, walk.size)
        old = words[:]
        for index in range(0, len(words), geometry.words_per_entry):
            entry = words[index]
            if entry & COMPRESSED:
                words[index] = _flag(entry, False)
            elif geometry.external_data:
                if entry & OFFSET_MASK:
                    words[index] = _flag(entry, True)
            elif entry & OFFSET_MASK and (host := (entry & OFFSET_MASK) >> walk.bits) < walk.clusters:
                words[index] = _flag(entry, _alone(walk, host))
        changed |= await _write_changes(file, offset, old, words)
    return changed


def _alone(walk: Survey, cluster: int) -> bool:
    """Whether one entry alone uses the cluster: by its refcount, and by the walk (refcounts may be too
    narrow to tell)."""
    return walk.stored[cluster] == 1 and walk.counted[cluster] <= 1


def _flag(entry: int, copied: bool) -> int:
    return entry | COPIED if copied else entry & ~COPIED


# -- refcounts ----------------------------------------------------------------------------------


async def _correct_in_place(walk: Survey, errors: bool) -> bool:
    """Step 2 where the refcount structure is sound; return whether something was written."""
    per_block = walk.geometry.refcount_block_entries
    maximum = (1 << (1 << walk.header.refcount_order)) - 1
    wanted: dict[int, dict[int, int]] = {}
    for cluster in walk.stored.differences(walk.counted):
        if not walk.block_exists(cluster):
            continue
        target = min(walk.target(cluster), maximum)
        if target < walk.stored[cluster] or (errors and target > walk.stored[cluster]):
            wanted.setdefault(cluster // per_block, {})[cluster % per_block] = target
    for index, values in wanted.items():
        offset = walk.reftable[index]
        raw = await walk.file.pread(offset, walk.size)
        block = RefcountBlock(bytearray(raw), walk.header.refcount_order)
        for at, value in values.items():
            block.set(at, value)
        await _write_sectors(walk.file, offset, raw, bytes(block.buffer))
    return bool(wanted)


def _obstacle(walk: Survey) -> str | None:
    """Why no new refcount structure can be made, or None."""
    if walk.lost_refcounts and not walk.complete:
        return "what is in use cannot be told either, as part of the image could not be followed"
    if walk.haunted:
        return "entries refer to the space behind the file's end, where new ones would go"
    return None


async def _rebuild(walk: Survey) -> Header:
    """Step 2 where it is not: a new refcount structure behind everything in use, then the switch to it.

    Clusters of the old structure count for what else uses them, which mostly means that they are free.
    """
    file, header = walk.file, walk.header
    order, size, bits = header.refcount_order, walk.size, walk.bits
    counts = walk.counted
    if not walk.complete:
        for cluster in walk.stored.differences(counts):
            counts[cluster] = max(counts[cluster], walk.stored[cluster])
    # Behind the old structure too: it is in force until the switch.
    end = max(walk.stored.end(), counts.end())
    for cluster in _old_structure(walk):
        counts[cluster] = max(0, counts[cluster] - 1)
    per_block = walk.geometry.refcount_block_entries
    limit = end + walk.window
    last_block = limit // per_block
    table_clusters = -(-8 * (last_block + 1) // size)
    if table_clusters * size > MAX_REFTABLE_SIZE:
        raise ImageError(file.path, "its new refcount table would exceed 8 MiB")
    counts.grow(limit)

    # The table first: it must be in one piece.
    table_at = end
    for cluster in range(table_at, table_at + table_clusters):
        counts[cluster] = 1
    free = itertools.count(table_at + table_clusters)
    places: dict[int, int] = {}
    waiting = {b for b in range(last_block + 1) if any(counts.low[b * per_block : (b + 1) * per_block])}
    while waiting:
        block = waiting.pop()
        place = places[block] = next(free)
        counts[place] = 1
        if (own := place // per_block) not in places:
            waiting.add(own)

    maximum = (1 << (1 << order)) - 1
    for block, place in places.items():
        values = counts.slice(block * per_block, (block + 1) * per_block)
        packed = array("BBBBHIQ"[order], (min(value, maximum) for value in values))
        await file.pwrite(place << bits, pack_counts(packed, order))
    table = array("Q", bytes(table_clusters * size))
    for block, place in places.items():
        table[block] = place << bits
    await file.pwrite(table_at << bits, _pack(table))
    await file.sync()  # Disk: the old structure in force, as it was; the new one beside it, unreferenced.
    header = replace(header, refcount_table_offset=table_at << bits, refcount_table_clusters=table_clusters)
    await file.pwrite(
        REFTABLE_AT, REFTABLE.pack(header.refcount_table_offset, header.refcount_table_clusters)
    )
    # Disk, until the caller's sync: either the old structure in force or the new one, each complete.
    return header


def _old_structure(walk: Survey) -> Iterator[int]:
    """The clusters of the refcount structure in force, as often as the walk counted them for it."""
    first = walk.header.refcount_table_offset >> walk.bits
    yield from range(first, first + walk.header.refcount_table_clusters)
    for entry in walk.reftable:
        if entry and not entry & (walk.size - 1) and entry >> walk.bits < walk.clusters:
            yield entry >> walk.bits


# -- the header's bits --------------------------------------------------------------------------


async def _clear_bits(file: BlockFile, header: Header) -> Header:
    """Step 4."""
    clean = header.incompatible_features & ~(IncompatFeature.DIRTY | IncompatFeature.CORRUPT)
    if header.version < 3 or clean == header.incompatible_features:
        return header
    await file.pwrite(FEATURES_AT, clean.to_bytes(8))
    await file.sync()  # Disk: the repaired image, declared sound. Before: the same, not yet declared so.
    return replace(header, incompatible_features=clean)


# -- words and sectors --------------------------------------------------------------------------


async def _read_words(file: BlockFile, offset: int, length: int) -> array[int]:
    words = array("Q", await file.pread(offset, length))
    if sys.byteorder == "little":
        words.byteswap()
    return words


def _pack(words: array[int]) -> bytes:
    if sys.byteorder == "little":
        words = words[:]
        words.byteswap()
    return words.tobytes()


async def _write_changes(file: BlockFile, offset: int, before: array[int], after: array[int]) -> bool:
    """Write what differs; return whether anything did."""
    return await _write_sectors(file, offset, _pack(before), _pack(after))


async def _write_sectors(file: BlockFile, offset: int, before: bytes, after: bytes) -> bool:
    """Write the sectors that differ, and no other: those are as they should be."""
    changed = False
    for chunk in range(0, len(after), CHUNK):
        if before[chunk : chunk + CHUNK] == after[chunk : chunk + CHUNK]:
            continue
        for at in range(chunk, min(chunk + CHUNK, len(after)), SECTOR):
            if before[at : at + SECTOR] != after[at : at + SECTOR]:
                await file.pwrite(offset + at, after[at : at + SECTOR])
                changed = True
    return changed
