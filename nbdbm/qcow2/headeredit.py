"""Changing the header cluster so that no power failure can leave a header that means anything else.

Specification: "Header", "Header extensions". A header larger than one sector cannot be rewritten at once:
the extensions and the backing file's name may end up half old, half new, and the name may have to move.
``plan`` therefore splits a change into steps. Each step is one write, and is followed by a sync; its
sectors (512 bytes, each written whole or not at all) may reach the disk in any combination. Whatever
subset does, the cluster parses, and means exactly the old or exactly the new state.

What makes that possible:

- the fixed fields lie in the first sector, so all of them change at once;
- bytes that nothing refers to (behind END, behind the name, in padding) can be written at leisure;
- an extension begins with 8 bytes, 8-aligned, that never straddle sectors: rewriting just those as a
  padding extension of some length makes the chain jump to bytes prepared elsewhere.

        ... | format | features | BITMAPS old | END | free                      |
   1.   ... | format | features | BITMAPS old | END | BITMAPS new | END         |   behind END: nothing yet
   2.   ... | format | features | padding ----------> BITMAPS new | END         |   8 bytes in one sector

A plan is proposed by simple means, then *proved*: every torn state of every step is parsed and compared
before it is returned. Of the proposals that pass, the least lossy and the shortest wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import NamedTuple

from nbdbm.errors import FormatError, UnsupportedFormat
from nbdbm.qcow2.constants import MAGIC, V2_HEADER_LENGTH, AutoclearFeature, ExtensionType
from nbdbm.qcow2.extensions import EXTENSION, HeaderExtension, pack_extensions
from nbdbm.qcow2.header import V2, V3, Header

SECTOR = 512
"""Bytes; what a disk writes whole or not at all."""
PADDING = 0x4E425047
"""Type of the extension that covers unused bytes of the chain; other programs keep it as unknown."""
BACKING_OFFSET_AT = 8
"""Where the header has backing_file_offset: 8 bytes."""
BITMAPS_VALID = int(AutoclearFeature.BITMAPS)
"""As a plain int: the complement of an IntFlag has no unknown bits, and would clear those."""
PROVE_ALL = 8
"""Up to this many sectors of one step every subset is tried; beyond, the subsets of one, of all but one,
and the prefixes. Steps that large only write bytes that nothing refers to yet."""


class Step(NamedTuple):
    """One write into the first cluster, to be followed by a sync; ``offset`` in bytes."""

    offset: int
    data: bytes


class Meaning(NamedTuple):
    """What a header says, however it is laid out."""

    guest: Header
    """All that decides what the disk reads as; unknown extensions included, layout excluded."""
    bitmaps: bytes | None
    """The bitmaps extension's data; None without one, or when it is to be ignored."""


def meaning(cluster: bytes | bytearray) -> Meaning:
    """Parse the header cluster and strip what does not matter: layout, padding, feature names.

    Raises:
        FormatError: it does not parse.
    """
    return _meaning(Header.parse(cluster))


def plan(cluster: bytes, new: Header) -> list[Step]:
    """Steps that turn the header in ``cluster`` (the whole first cluster) into ``new``.

    ``new`` is the parsed header with changes: numbers in the fixed fields, feature bits, and the bitmaps
    extension replaced, added or removed. Name, format, data file and unknown extensions must be the
    old ones; the extensions' order and backing_file_offset are decided here. The feature name table is
    dropped, and only then, where nothing else makes room. The cluster's other bytes are free.

    In every intermediate state the header means the old or the new state. One case cannot be had: the
    bitmaps extension changes in a cluster without room for a second copy of it (and of what follows),
    and either straddles sectors, or lies outside the first sector while other fields change with it.
    Then the bitmaps are ignored (autoclear bit 0) in between; see ``ignores_bitmaps``.

    Raises:
        UnsupportedFormat: bitmaps in a version 2 image, which has no autoclear bit to protect them.
        FormatError: the bitmaps extension does not fit the first cluster.
    """
    old = Header.parse(cluster)
    extension = new.extension(ExtensionType.BITMAPS)
    if new.version < 3 and extension is not None and old.extension(ExtensionType.BITMAPS) != extension:
        raise UnsupportedFormat("version", new.version, "bitmaps need version 3 (compat=1.1)")
    assert _same_names(old, new), "headeredit changes numbers and the bitmaps extension only"
    before, after = _meaning(old), _meaning(new)
    for patches in _proposals(cluster, old, new):
        if _proved(cluster, patches, new, {before, after}):
            return _steps(cluster, patches)
    # The bitmaps are ignored from the first sync to the last: the one way that needs no room.
    patches = _with_bitmaps_off(cluster, old, new)
    off = {before._replace(bitmaps=None), after._replace(bitmaps=None)}
    if patches and _proved(cluster, patches, new, {before, after} | off):
        return _steps(cluster, patches)
    raise FormatError(
        "length of header and extensions",
        len(_fields(new, 0)) + len(pack_extensions(_kept(new.extensions))),
        f"no room to change them safely in the first cluster ({new.cluster_size} bytes)",
    )


def ignores_bitmaps(cluster: bytes, steps: Iterable[Step]) -> bool:
    """Whether the bitmaps, there before and after ``steps``, are ignored somewhere in between."""
    image = bytearray(cluster)
    seen = [meaning(image).bitmaps]
    for offset, data in steps:
        image[offset : offset + len(data)] = data
        seen.append(meaning(image).bitmaps)
    return seen[0] is not None and seen[-1] is not None and None in seen


# -- what a header means ----------------------------------------------------------------------


def _meaning(header: Header) -> Meaning:
    extension = header.extension(ExtensionType.BITMAPS)
    valid = header.autoclear_features & BITMAPS_VALID
    guest = replace(
        header,
        backing_file_offset=0,
        autoclear_features=header.autoclear_features & ~BITMAPS_VALID,
        extensions=_names(header),
    )
    return Meaning(guest, extension.data if extension is not None and valid else None)


def _names(header: Header) -> tuple[HeaderExtension, ...]:
    """The extensions that must survive, in an order that does not depend on the layout."""
    skipped = (ExtensionType.BITMAPS, ExtensionType.FEATURE_NAMES, PADDING)
    return tuple(sorted(e for e in header.extensions if e.type not in skipped))


def _same_names(old: Header, new: Header) -> bool:
    def fixed(h: Header) -> tuple[object, ...]:
        return (h.version, h.cluster_bits, h.header_length, h.unknown_fields, h.refcount_order)

    return (fixed(old), old.backing_file, _names(old)) == (fixed(new), new.backing_file, _names(new))


def _kept(extensions: Iterable[HeaderExtension]) -> list[HeaderExtension]:
    return [e for e in extensions if e.type != PADDING]


# -- proposals --------------------------------------------------------------------------------

Patch = tuple[int, bytes]
"""Offset and bytes. A step is proposed as a list of them, and becomes one write."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things are in one cluster image, and the steps that led from the original to it."""

    image: bytes
    led: tuple[tuple[Patch, ...], ...]
    extensions: tuple[tuple[int, HeaderExtension], ...]
    """Each with the offset of its first byte."""
    end: int | None
    """Offset of END; None where the chain stops at the name or the cluster's end instead."""
    area_end: int
    """Where the name begins, else the cluster size: the chain cannot be longer."""

    @classmethod
    def scan(cls, image: bytes, led: tuple[tuple[Patch, ...], ...] = ()) -> _Layout:
        header = Header.parse(image)
        at = _header_length(header)
        area_end = header.backing_file_offset or header.cluster_size
        found = []
        for extension in header.extensions:
            found.append((at, extension))
            at += len(extension.pack())
        end = at if at + EXTENSION.size <= area_end else None
        return cls(image, led, tuple(found), end, area_end)

    def changed(self, *patches: Patch) -> _Layout:
        """The layout after one more step."""
        image = bytearray(self.image)
        for offset, data in patches:
            image[offset : offset + len(data)] = data
        return self.scan(bytes(image), (*self.led, patches))

    def free(self) -> list[tuple[int, int]]:
        """Ranges (start, end) that nothing refers to and that the chain can be led to."""
        ranges = [
            (at + EXTENSION.size, at + len(extension.pack()))
            for at, extension in self.extensions
            if extension.type == PADDING
        ]
        if self.end is not None:
            ranges.append((self.end + EXTENSION.size, self.area_end))
        return ranges

    def boundaries(self) -> list[int]:
        """Where an extension or END begins."""
        return [at for at, _ in self.extensions] + ([] if self.end is None else [self.end])


def _header_length(header: Header) -> int:
    return V2_HEADER_LENGTH if header.version == 2 else header.header_length


def _fields(header: Header, backing_file_offset: int) -> bytes:
    """The fixed fields of ``header``, as far as they are named in the specification's first table."""
    fields = V2.pack(
        MAGIC,
        header.version,
        backing_file_offset,
        header.backing_file_size,
        header.cluster_bits,
        header.size,
        header.crypt_method,
        header.l1_size,
        header.l1_table_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.nb_snapshots,
        header.snapshots_offset,
    )
    if header.version >= 3:
        fields += V3.pack(
            header.incompatible_features,
            header.compatible_features,
            header.autoclear_features,
            header.refcount_order,
            header.header_length,
        )
    return fields


def _fields_in(image: bytes, new: Header) -> Patch:
    """``new``'s fixed fields for an image whose name stays where it is."""
    return 0, _fields(new, Header.parse(image).backing_file_offset)


def _proposals(cluster: bytes, old: Header, new: Header) -> Iterator[list[tuple[Patch, ...]]]:
    """Lists of steps that might do, the best first."""
    layout = _Layout.scan(cluster)
    fields = _fields_in(cluster, new)
    was, now = old.extension(ExtensionType.BITMAPS), new.extension(ExtensionType.BITMAPS)
    if was is None and now is None:
        yield [(fields,)]
        return
    if was is not None and now is not None and len(was.data) == len(now.data):
        at = next(at for at, e in layout.extensions if e.type == ExtensionType.BITMAPS) + EXTENSION.size
        yield [(fields, (at, now.data))]
        # An extension that is ignored until the fields say otherwise can be torn.
        yield [((at, now.data),), (fields,)]
    yield from _repacked(new)
    yield from _ranked(_roomy(layout, new), new)
    yield from _repacked(replace(new, extensions=_without_feature_names(new)))
    yield from _ranked(_roomy(_without_names(layout), new), new)


def _ranked(layouts: list[_Layout], new: Header) -> list[list[tuple[Patch, ...]]]:
    """Every switch that the layouts offer: few steps before little waste."""
    found = [entry for layout in layouts for entry in _switches(layout, new)]
    return [steps for _, steps in sorted(found, key=lambda entry: entry[0])]


def _repacked(new: Header) -> Iterator[list[tuple[Patch, ...]]]:
    """All of it in the first sector, if it fits there: one write."""
    tidy = replace(new, extensions=tuple(_kept(new.extensions)))
    try:
        packed = tidy.pack()
    except FormatError:
        return
    if len(packed) <= SECTOR:
        yield [((0, packed + bytes(SECTOR - len(packed))),)]


def _without_feature_names(header: Header) -> tuple[HeaderExtension, ...]:
    return tuple(e for e in header.extensions if e.type != ExtensionType.FEATURE_NAMES)


def _without_names(layout: _Layout) -> _Layout:
    """The layout after the feature name tables became padding; 8 bytes each, harmless if torn."""
    tables = [(at, e) for at, e in layout.extensions if e.type == ExtensionType.FEATURE_NAMES]
    if not tables:
        return layout
    return layout.changed(*((at, EXTENSION.pack(PADDING, len(e.data))) for at, e in tables))


def _roomy(layout: _Layout, new: Header) -> list[_Layout]:
    """The layout as it is and, where there is a name behind the chain, with the name moved up."""
    header = Header.parse(layout.image)
    start, size = header.backing_file_offset, header.backing_file_size
    if not start or layout.end is None:
        return [layout]
    chain = len(pack_extensions(_kept(new.extensions)))
    place = max(_aligned(start + size), _aligned(layout.end + EXTENSION.size + chain))
    if place + size > header.cluster_size:
        place = (header.cluster_size - size) & ~7
    if place < start + size:
        return [layout]
    name = layout.image[start : start + size]
    # Until the pointer moves nothing refers to the copy; from then on nothing refers to the original.
    moved = layout.changed((place, name)).changed((BACKING_OFFSET_AT, place.to_bytes(8, "big")))
    return [layout, moved]


def _aligned(offset: int) -> int:
    return offset + -offset % 8


def _switches(layout: _Layout, new: Header) -> Iterator[tuple[tuple[int, int, int], list[tuple[Patch, ...]]]]:
    """Ways to lead the chain, at one boundary, over newly written extensions; each with its rank.

    The extensions from boundary ``x`` to boundary ``y`` (or to the end) are written anew at ``place``,
    with the bitmaps extension changed, then the 8 bytes at ``x`` are switched:

        | ... x            place           y ... END |
        | ... padding ---> new chain, pad  old chain |
    """
    wanted = new.extension(ExtensionType.BITMAPS)
    present = [at for at, e in layout.extensions if e.type == ExtensionType.BITMAPS]
    boundaries = layout.boundaries()
    free = layout.free()
    fields = _fields_in(layout.image, new)
    for x in boundaries:
        for y in (None, *(b for b in boundaries if b > x)):
            if not all(x <= at and (y is None or at < y) for at in present):
                continue
            inside = [e for at, e in layout.extensions if x <= at and (y is None or at < y)]
            chain = _edited(inside, wanted)
            for place in _places(x, free):
                written = _written(chain, place, y)
                if written is None:
                    continue
                head = written[:8] if place == x else EXTENSION.pack(PADDING, place - x - EXTENSION.size)
                behind = (x + 8, written[8:]) if place == x else (place, written)
                if not _inside(behind, free):
                    continue
                steps = [*layout.led, *([(behind,)] if behind[1] else []), (fields, (x, head))]
                unused = sum(_padding_in(written)) + (place - x)
                kept_padding = sum(
                    len(e.pack())
                    for at, e in layout.extensions
                    if e.type == PADDING and (at < x or (y is not None and at >= y))
                )
                yield (len(steps), unused + kept_padding, len(written)), steps


def _edited(inside: list[HeaderExtension], wanted: HeaderExtension | None) -> list[HeaderExtension]:
    """The extensions without padding, and with ``wanted`` as the only bitmaps extension."""
    chain: list[HeaderExtension] = []
    for extension in _kept(inside):
        if extension.type != ExtensionType.BITMAPS:
            chain.append(extension)
        elif wanted is not None:
            chain.append(wanted)
            wanted = None
    return chain if wanted is None else [*chain, wanted]


def _places(x: int, free: list[tuple[int, int]]) -> Iterator[int]:
    yield x
    for start, end in free:
        place = _aligned(max(start, x + EXTENSION.size))
        if place < end:
            yield place


def _written(chain: list[HeaderExtension], place: int, y: int | None) -> bytes | None:
    """The chain's bytes at ``place``, closed by END or by padding up to ``y``; None if it reaches past."""
    if y is None:
        return pack_extensions(chain)
    packed = b"".join(e.pack() for e in chain)
    gap = y - place - len(packed)
    if gap < 0 or 0 < gap < EXTENSION.size or not packed + bytes(gap):
        return None
    # Only the padding's head is written: what it covers is free or belongs to the old chain.
    return packed + (EXTENSION.pack(PADDING, gap - EXTENSION.size) if gap else b"")


def _padding_in(written: bytes) -> Iterator[int]:
    """Bytes that each padding extension of a written chain covers."""
    at = 0
    while at + EXTENSION.size <= len(written):
        type_, length = EXTENSION.unpack_from(written, at)
        at += EXTENSION.size + length + -length % 8
        if type_ == PADDING:
            yield EXTENSION.size + length


def _inside(patch: Patch, free: list[tuple[int, int]]) -> bool:
    offset, data = patch
    return not data or any(start <= offset and offset + len(data) <= end for start, end in free)


def _with_bitmaps_off(cluster: bytes, old: Header, new: Header) -> list[tuple[Patch, ...]]:
    """The bitmaps extension rewritten or dropped in place while the autoclear bit says to ignore it."""
    was, now = old.extension(ExtensionType.BITMAPS), new.extension(ExtensionType.BITMAPS)
    if was is None or (now is not None and len(was.data) != len(now.data)):
        return []
    at = next(at for at, e in _Layout.scan(cluster).extensions if e.type == ExtensionType.BITMAPS)
    off = replace(old, autoclear_features=old.autoclear_features & ~BITMAPS_VALID)
    first, last = (_fields_in(cluster, off),), _fields_in(cluster, new)
    if now is None:
        return [first, (last, (at, EXTENSION.pack(PADDING, len(was.data))))]
    return [first, ((at + EXTENSION.size, now.data),), (last,)]


# -- proof ------------------------------------------------------------------------------------


def _steps(cluster: bytes, patches: list[tuple[Patch, ...]]) -> list[Step]:
    """Each step as the one write from its first to its last changed byte; those without are left out."""
    image = bytearray(cluster)
    steps: list[Step] = []
    for step in patches:
        low, high = min(o for o, _ in step), max(o + len(d) for o, d in step)
        before = bytes(image[low:high])
        for offset, data in step:
            image[offset : offset + len(data)] = data
        changed = [i for i in range(high - low) if before[i] != image[low + i]]
        if changed:
            first, last = low + changed[0], low + changed[-1] + 1
            steps.append(Step(first, bytes(image[first:last])))
    return steps


def _proved(cluster: bytes, patches: list[tuple[Patch, ...]], new: Header, allowed: set[Meaning]) -> bool:
    """Whether every torn state of the steps means something allowed, and the last one is ``new``."""
    image = bytearray(cluster)
    for offset, data in _steps(cluster, patches):
        pieces = _pieces(offset, data)
        for subset in _subsets(len(pieces)):
            torn = bytearray(image)
            for index in subset:
                at, piece = pieces[index]
                torn[at : at + len(piece)] = piece
            try:
                if meaning(torn) not in allowed:
                    return False
            except FormatError:
                return False
        image[offset : offset + len(data)] = data
    final = Header.parse(image)
    return (
        final.autoclear_features == new.autoclear_features
        and final.extension(ExtensionType.BITMAPS) == new.extension(ExtensionType.BITMAPS)
        and _meaning(final) == _meaning(new)
    )


def _pieces(offset: int, data: bytes) -> list[Patch]:
    """The write, cut where sectors begin."""
    cuts = [offset, *range(offset + SECTOR - offset % SECTOR, offset + len(data), SECTOR), offset + len(data)]
    return [(a, data[a - offset : b - offset]) for a, b in pairwise(cuts)]


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    """Which of ``count`` sectors reached the disk: all possibilities, or the telling ones if many."""
    every = tuple(range(count))
    if count <= PROVE_ALL:
        for size in range(count + 1):
            yield from combinations(every, size)
        return
    for index in every:
        yield (index,)
        yield every[:index]
        yield every[:index] + every[index + 1 :]
    yield every
