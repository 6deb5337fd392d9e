"""The images that mutations begin with, one of each kind, and where the numbers in them are.

Made by tests/support/qcow2build.py, small and sound (tests/fuzz/test_seeds.py has them checked).
"""

from __future__ import annotations

import functools
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import zstandard

from tests.fuzz.script import Script
from tests.support import qcow2build
from tests.support.qcow2build import AUTO, COPIED, IN_USE, Bitmap, Image, get_field

OFFSET = 0x00FF_FFFF_FFFF_FE00
COMPRESSED = 1 << 62

Spot = tuple[int, str]
"""Where a number is in the file, and its format."""


@dataclass(frozen=True)
class Seed:
    """An image with the files that it names."""

    name: str
    data: bytes
    others: dict[str, bytes] = field(default_factory=dict)

    @functools.cached_property
    def spots(self) -> list[list[Spot]]:
        """The numbers of each kind of structure; kinds that the image does not have are left out."""
        return [spots for spots in (list(kind(self.data)) for kind in KINDS) if spots]

    @functools.cached_property
    def places(self) -> list[int]:
        """Offsets at which something is."""
        found = {0, len(self.data), len(self.data) - (1 << get_field(self.data, "cluster_bits"))}
        for kind in self.spots[1:]:
            found |= {at for at, _ in kind[:1]}
            found |= {
                struct.unpack_from(form, self.data, at)[0] & OFFSET for at, form in kind if form == ">Q"
            }
        return sorted(place for place in found if place <= len(self.data))


def damaged(seed: Seed, script: Script) -> bytearray:
    """The image after the edits that the script says; none at all is likely, too."""
    data = bytearray(seed.data)
    for _ in range(script.byte() % 16):
        kind = script.byte()
        if kind < 0xE0:
            at, form = script.pick(script.pick(seed.spots))
            width = struct.calcsize(form)
            if at + width > len(data):
                continue
            old = struct.unpack_from(form, data, at)[0]
            new = script.value(old, seed.places) & (1 << 8 * width) - 1
            struct.pack_into(form, data, at, new)
        elif kind < 0xF0:
            at = script.number(3) % len(seed.data)
            piece = script.bytes(kind & 15)
            data[at : at + len(piece)] = piece
        elif kind < 0xF8:
            del data[script.number(3) % len(seed.data) :]
        else:
            data += bytes(script.number(2))
    return data


# -- where the numbers are


def _header(data: bytes) -> Iterator[Spot]:
    length = 72 if get_field(data, "version") == 2 else 112
    for at, form in qcow2build.FIELDS.values():
        if at + struct.calcsize(form) <= length:
            yield at, form


def _extensions(data: bytes) -> Iterator[Spot]:
    for kind, at, length in qcow2build.extensions(data):
        yield at - 8, ">I"
        yield at - 4, ">I"
        if kind == qcow2build.EXT_BITMAPS:
            yield from [(at, ">I"), (at + 4, ">I"), (at + 8, ">Q"), (at + 16, ">Q")]
        else:
            yield from ((at + index, ">B") for index in range(length))


def _name(data: bytes) -> Iterator[Spot]:
    at = get_field(data, "backing_file_offset")
    yield from ((at + index, ">B") for index in range(get_field(data, "backing_file_size")))


def _l1(data: bytes) -> Iterator[Spot]:
    at = get_field(data, "l1_table_offset")
    yield from ((at + 8 * index, ">Q") for index in range(get_field(data, "l1_size")))


def l2_entries(data: bytes) -> Iterator[tuple[int, int]]:
    """Guest cluster and place of its L2 entry, for those that say something."""
    width = 16 if get_field(data, "incompatible_features") & 0x10 and get_field(data, "version") > 2 else 8
    per_table = (1 << get_field(data, "cluster_bits")) // width
    for number, (at, _) in enumerate(_l1(data)):
        table = struct.unpack_from(">Q", data, at)[0] & OFFSET
        for index in range(per_table if table else 0):
            place = table + width * index
            if any(data[place : place + width]):
                yield number * per_table + index, place


def _l2(data: bytes) -> Iterator[Spot]:
    wide = get_field(data, "version") > 2 and get_field(data, "incompatible_features") & 0x10
    for _, at in l2_entries(data):
        yield at, ">Q"
        if wide:
            yield from [(at + 8, ">I"), (at + 12, ">I")]


def _compressed(data: bytes) -> Iterator[Spot]:
    """The first bytes of compressed clusters."""
    shift = 62 - (get_field(data, "cluster_bits") - 8)
    for _, at in l2_entries(data):
        entry = struct.unpack_from(">Q", data, at)[0]
        if entry & COMPRESSED:
            host = entry & (1 << shift) - 1
            yield from ((host + index, ">B") for index in range(24))


def _reftable(data: bytes) -> Iterator[Spot]:
    at = get_field(data, "refcount_table_offset")
    yield from ((at + 8 * index, ">Q") for index in range(4))


def _refcounts(data: bytes) -> Iterator[Spot]:
    bits = 1 << (get_field(data, "refcount_order") if get_field(data, "version") > 2 else 4)
    clusters = len(data) >> get_field(data, "cluster_bits")
    table = get_field(data, "refcount_table_offset")
    block = struct.unpack_from(">Q", data, table)[0]
    form, width = {16: (">H", 2), 32: (">I", 4), 64: (">Q", 8)}.get(bits, (">B", 1))
    count = min(-(-clusters * bits // 8), 1 << get_field(data, "cluster_bits"))
    yield from ((block + at, form) for at in range(0, count - width + 1, width))


def _directory(data: bytes) -> Iterator[Spot]:
    if any(kind == qcow2build.EXT_BITMAPS for kind, _, _ in qcow2build.extensions(data)):
        for name, at in qcow2build.bitmap_entries(data).items():
            for skip, form in ((0, "Q"), (8, "I"), (12, "I"), (16, "B"), (17, "B"), (18, "H"), (20, "I")):
                yield at + skip, ">" + form
            yield from ((at + 24 + index, ">B") for index in range(len(name)))


def _bitmap_tables(data: bytes) -> Iterator[Spot]:
    if any(kind == qcow2build.EXT_BITMAPS for kind, _, _ in qcow2build.extensions(data)):
        for at in qcow2build.bitmap_entries(data).values():
            table, size = struct.unpack_from(">QI", data, at)
            yield from ((table + 8 * index, ">Q") for index in range(size))


SNAPSHOT = ((0, "Q"), (8, "I"), (12, "H"), (14, "H"), (32, "I"), (36, "I"), (40, "Q"), (48, "Q"))


def _snapshot(data: bytes) -> Iterator[Spot]:
    if get_field(data, "nb_snapshots"):
        at = get_field(data, "snapshots_offset")
        yield from ((at + skip, ">" + form) for skip, form in SNAPSHOT)
        table, size = struct.unpack_from(">QI", data, at)
        yield from ((table + 8 * index, ">Q") for index in range(size))


KINDS: list[Callable[[bytes], Iterator[Spot]]] = [
    _header,
    _extensions,
    _name,
    _l1,
    _l2,
    _compressed,
    _reftable,
    _refcounts,
    _directory,
    _bitmap_tables,
    _snapshot,
]


# -- the images


def _filling(number: int, length: int) -> bytes:
    """Content of a cluster: text, so that it can be packed, and different each."""
    return (b"cluster %d. " % number * (length // 10)).ljust(length, b".")[:length]


def _clusters(count: int, span: int, length: int) -> dict[int, bytes | int]:
    """``count`` clusters of data somewhere among ``span``."""
    chosen = random.Random(count * span).sample(range(span), count)
    return {number: _filling(number, length) for number in chosen}


def _pack(data: bytearray, count: int, packer: Callable[[bytes], bytes]) -> None:
    """Compress every third data cluster, ``count`` of them, in its own place."""
    bits = get_field(data, "cluster_bits")
    shift = 62 - (bits - 8)
    wide = bool(get_field(data, "incompatible_features") & 0x10)
    full = [at for _, at in l2_entries(data) if data[at] & 0x80]
    for at in full[: 3 * count : 3]:
        host = struct.unpack_from(">Q", data, at)[0] & OFFSET
        packed = packer(bytes(data[host : host + (1 << bits)]))
        assert len(packed) <= 1 << bits
        data[host : host + (1 << bits)] = packed.ljust(1 << bits, b"\0")
        sectors = (len(packed) - 1) // 512
        struct.pack_into(">Q", data, at, COMPRESSED | sectors << shift | host)
        if wide:
            struct.pack_into(">Q", data, at + 8, 0)


def _zlib(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def _bitmaps(size: int, granularity_bits: int, **more: int) -> list[Bitmap]:
    bits = random.Random(size).randbytes(-(-size >> granularity_bits + 3))
    return [
        Bitmap(b"recording", bits[: len(bits) // 2], granularity_bits, AUTO),
        Bitmap(b"stopped", bits, granularity_bits + 1, 0),
        Bitmap(b"broken", bits, granularity_bits, AUTO | IN_USE),
        Bitmap(b"full", b"\xff" * len(bits), granularity_bits, AUTO),
    ]


def _with_snapshot(image: Image) -> bytearray:
    """The image with a snapshot of all that it holds. Guest clusters 0 and 1 lend their places to it."""
    size = 1 << image.cluster_bits
    image.clusters |= {0: bytes(size), 1: bytes(size)}
    data = bytearray(image.build())
    entries = dict(l2_entries(data))
    place = []
    for guest in (0, 1):
        place.append(struct.unpack_from(">Q", data, entries[guest])[0] & OFFSET)
        struct.pack_into(">Q", data, entries[guest], 0)
    shared = [at for at, _ in _l1(data)] + [at for _, at in l2_entries(data)]
    block = struct.unpack_from(">Q", data, get_field(data, "refcount_table_offset"))[0]
    for at in shared:
        entry = struct.unpack_from(">Q", data, at)[0]
        if host := entry & OFFSET:
            struct.pack_into(">Q", data, at, entry & ~COPIED)
            struct.pack_into(">H", data, block + 2 * (host >> image.cluster_bits), 2)
    at, count = get_field(data, "l1_table_offset"), get_field(data, "l1_size")
    assert 8 * count <= size
    data[place[0] : place[0] + 8 * count] = data[at : at + 8 * count]
    entry = struct.pack(">QIHHIIQIIQQ", place[0], count, 1, 5, 1, 2, 3, 0, 16, 0, image.size) + b"1first"
    data[place[1] : place[1] + len(entry)] = entry
    struct.pack_into(">IQ", data, 60, 1, place[1])
    return data


@functools.cache
def seeds() -> list[Seed]:
    """Every seed."""
    small = 512
    plain = Image(
        size=128 << 10,
        cluster_bits=9,
        clusters=_clusters(40, 256, small) | {7: 1, 8: 1},
        bitmaps=_bitmaps(128 << 10, 9),
        extensions=[(qcow2build.EXT_FEATURES, struct.pack(">BB46s", 0, 0, b"dirty bit"))],
    )
    data = bytearray(plain.build())
    _pack(data, 6, _zlib)
    found = [Seed("plain", bytes(data))]

    with_snapshot = Image(
        size=64 << 10, cluster_bits=9, clusters=_clusters(20, 128, small), bitmaps=_bitmaps(64 << 10, 10)
    )
    found.append(Seed("snapshot", bytes(_with_snapshot(with_snapshot))))

    old = Image(size=(64 << 10) + 512, version=2, cluster_bits=10, clusters=_clusters(20, 64, 1024))
    old.backing = b"base.raw"
    old.extensions.append((qcow2build.EXT_BACKING_FORMAT, b"raw"))
    found.append(Seed("old", old.build(), {"base.raw": _filling(7, 50000)}))

    wide = Image(
        size=(1 << 20) + 1024,
        cluster_bits=14,
        incompatible=0x10 | 8,
        compression_type=1,
        clusters=_clusters(6, 65, 1 << 14) | {3: 0},
        bitmaps=_bitmaps((1 << 20) + 1024, 12)[:2],
    )
    data = bytearray(wide.build())
    _pack(data, 2, zstandard.ZstdCompressor().compress)
    # Some subclusters of one are zero, some unallocated.
    at = dict(l2_entries(data))[max(dict(l2_entries(data)))]
    struct.pack_into(">II", data, at + 8, 0x0000FF00, 0x00FF00FF)
    found.append(Seed("wide", bytes(data)))

    lazy = Image(
        size=64 << 10,
        cluster_bits=9,
        refcount_order=0,
        incompatible=1,
        compatible=1,
        clusters=_clusters(20, 128, small),
        bitmaps=_bitmaps(64 << 10, 9),
    )
    found.append(Seed("lazy", lazy.build()))

    base = Image(size=40 << 10, cluster_bits=9, refcount_order=6, clusters=_clusters(30, 80, small))
    overlay = Image(
        size=64 << 10,
        cluster_bits=9,
        refcount_order=5,
        backing=b"base.qcow2",
        extensions=[(qcow2build.EXT_BACKING_FORMAT, b"qcow2")],
        clusters=_clusters(20, 128, small) | {20: 1},
        bitmaps=_bitmaps(64 << 10, 9)[:3],
    )
    found.append(Seed("overlay", overlay.build(), {"base.qcow2": base.build()}))

    outside = Image(
        size=64 << 10,
        cluster_bits=9,
        incompatible=4,
        extensions=[(qcow2build.EXT_DATA_FILE, b"data.raw")],
        clusters={number: COPIED | number << 9 for number in range(0, 120, 3)},
        bitmaps=_bitmaps(64 << 10, 9)[:3],
    )
    found.append(Seed("outside", outside.build(), {"data.raw": _filling(3, 64 << 10)}))
    return found
