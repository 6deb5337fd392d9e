"""Header edits: every torn state of every step, on every layout, means the old or the new state."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nbdbm.errors import FormatError, UnsupportedFormat
from nbdbm.qcow2.bitmapdir import BitmapsExtension
from nbdbm.qcow2.constants import AutoclearFeature, ExtensionType, IncompatFeature
from nbdbm.qcow2.extensions import FeatureName, HeaderExtension
from nbdbm.qcow2.header import Header
from nbdbm.qcow2.headeredit import PADDING, SECTOR, Step, ignores_bitmaps, meaning, plan
from tests.support.marks import requires
from tests.support.qemu import SYSTEM

OLD = BitmapsExtension(2, 96, 0x50000)
NEW = BitmapsExtension(3, 136, 0x90000)
MOVED = OLD._replace(directory_offset=0x90000)
UNKNOWN_AUTOCLEAR = 1 << 40

FORMAT = HeaderExtension(ExtensionType.BACKING_FORMAT, b"qcow2")
SHORT_FILE = HeaderExtension(ExtensionType.DATA_FILE, b"disk.raw")
LONG_FILE = HeaderExtension(ExtensionType.DATA_FILE, b"/very/long" * 50)
FEATURES = HeaderExtension(
    ExtensionType.FEATURE_NAMES, b"".join(FeatureName(0, i, f"feature {i}").pack() for i in range(7))
)
UNKNOWN = HeaderExtension(0x12345678, b"abc")
LARGE = HeaderExtension(0x12345679, bytes(range(256)) * 2 + b"tail")


# -- an independent view: the rules by which QEMU walks a header, the mistakes it would stop at ----


def view(cluster: bytes) -> tuple[object, object]:
    """What QEMU would make of the cluster: (all but bitmaps, bitmaps). AssertionError where it refuses."""
    version, backing_at, backing_size, cluster_bits = struct.unpack_from(">4xIQII", cluster)
    incompatible, autoclear, header_length = 0, 0, 72
    if version == 3:
        incompatible, autoclear, header_length = struct.unpack_from(">Q8xQ4xI", cluster, 72)
    end = backing_at or 1 << cluster_bits
    assert header_length <= end and backing_at + backing_size <= len(cluster)
    at = header_length
    extensions = []
    while at < end:
        assert at + 8 <= end, "QEMU: header extension too large"
        type_, length = struct.unpack_from(">II", cluster, at)
        if type_ == 0:
            break
        assert length <= end - at - 8, "QEMU: header extension too large"
        extensions.append((type_, cluster[at + 8 : at + 8 + length]))
        at += 8 + (length + 7 & ~7)
    bitmaps = [data for type_, data in extensions if type_ == ExtensionType.BITMAPS]
    assert len(bitmaps) <= 1, "which one counts depends on the program"
    current = None
    if bitmaps:
        assert len(bitmaps[0]) == 24
        if autoclear & 1:
            number, reserved, _, directory = struct.unpack(">IIQQ", bitmaps[0])
            assert number > 0 and not reserved and directory % 512 == 0
            current = bitmaps[0]
    hidden = (ExtensionType.BITMAPS, ExtensionType.FEATURE_NAMES, PADDING)
    rest = (
        cluster[:8],
        cluster[backing_at : backing_at + backing_size],
        cluster[16:72],
        incompatible,
        autoclear & ~1,
        cluster[96:header_length] if version == 3 else b"",
        sorted(e for e in extensions if e[0] not in hidden),
    )
    return rest, current


def subsets(count: int) -> Iterator[tuple[int, ...]]:
    assert count <= 12, "too many sectors to try all"
    return itertools.chain.from_iterable(
        itertools.combinations(range(count), size) for size in range(count + 1)
    )


def torn_states(cluster: bytes, steps: list[Step]) -> Iterator[bytes]:
    """Every state the cluster can be in, if power fails at any time during the steps."""
    image = bytearray(cluster)
    for offset, data in steps:
        assert data and offset >= 0 and offset + len(data) <= len(cluster)
        after = bytearray(image)
        after[offset : offset + len(data)] = data
        first, last = offset // SECTOR, (offset + len(data) - 1) // SECTOR
        for subset in subsets(last - first + 1):
            torn = bytearray(image)
            for sector in subset:
                a = (first + sector) * SECTOR
                torn[a : a + SECTOR] = after[a : a + SECTOR]
            yield bytes(torn)
        image = after
    yield bytes(image)


def layout(
    cluster_bits: int,
    extensions: tuple[HeaderExtension, ...],
    *,
    name: bytes = b"",
    gap: int = 0,
    version: int = 3,
    header_length: int = 112,
    autoclear: int | None = None,
    end: bool = True,
) -> bytes | None:
    """A header cluster laid out as told, or None if it does not fit; the free bytes are garbage."""
    size = 1 << cluster_bits
    header_length = header_length if version == 3 else 72
    chain = b"".join(e.pack() for e in extensions) + (bytes(8) if end else b"")
    name_at = header_length + len(chain) + gap if name else 0
    if header_length + len(chain) + gap + len(name) > size:
        return None
    has_bitmaps = any(e.type == ExtensionType.BITMAPS for e in extensions)
    header = Header(
        version=version,
        backing_file_size=len(name),
        cluster_bits=cluster_bits,
        size=1 << 30,
        l1_size=2,
        l1_table_offset=0x30000,
        refcount_table_offset=0x10000,
        refcount_table_clusters=1,
        autoclear_features=int(has_bitmaps) if autoclear is None else autoclear,
        header_length=header_length,
        unknown_fields=bytes(i % 251 for i in range(header_length - 105)) if header_length > 105 else b"",
    )
    fields = bytearray(header.pack()[:header_length])
    struct.pack_into(">QI", fields, 8, name_at, len(name))
    used = bytes(fields) + chain + b"\xa5" * gap + name
    return used + b"\x5a" * (size - len(used))


def check_plan(cluster: bytes, new: Header, *, lossy: bool = False) -> list[Step]:
    """Plan, try every torn state, and compare the end with what was asked for.

    ``lossy`` allows that the bitmaps are ignored in between.
    """
    steps = plan(cluster, new)
    final = bytearray(cluster)
    for offset, data in steps:
        final[offset : offset + len(data)] = data
    before, after = view(cluster), view(bytes(final))
    allowed = [before, after]
    ignoring = ignores_bitmaps(cluster, steps)
    assert lossy or not ignoring
    if lossy:
        allowed += [(before[0], None), (after[0], None)]
    for state in torn_states(cluster, steps):
        assert view(state) in allowed
        Header.parse(state)
    parsed = Header.parse(bytes(final))
    expected = new.bitmaps.pack() if new.bitmaps and new.autoclear_features & 1 else None
    assert after[1] == expected
    assert parsed.extension(ExtensionType.BITMAPS) == new.extension(ExtensionType.BITMAPS)
    assert meaning(bytes(final)).guest == replace(
        new,
        backing_file_offset=0,
        autoclear_features=new.autoclear_features & ~1,
        extensions=meaning(cluster).guest.extensions,
    )
    return steps


# -- the changes, as functions from the old header to the new one ---------------------------------


def with_bitmaps(header: Header, extension: BitmapsExtension) -> Header:
    changed = header.with_extension(extension.to_extension())
    return replace(changed, autoclear_features=header.autoclear_features | AutoclearFeature.BITMAPS)


def without_bitmaps(header: Header) -> Header:
    changed = header.without_extension(ExtensionType.BITMAPS)
    return replace(changed, autoclear_features=header.autoclear_features & ~1)


def resized(header: Header) -> Header:
    return replace(header, size=1 << 40, l1_size=2048, l1_table_offset=0x7_0000_0000)


FIELD_CHANGES = {
    "resize": resized,
    "refcount_table": lambda h: replace(h, refcount_table_offset=0xFF0000, refcount_table_clusters=9),
    "snapshots": lambda h: replace(h, nb_snapshots=3, snapshots_offset=0xAB0000),
    "dirty": lambda h: replace(h, incompatible_features=h.incompatible_features | IncompatFeature.DIRTY),
    "corrupt": lambda h: replace(h, incompatible_features=h.incompatible_features | IncompatFeature.CORRUPT),
    "clear_autoclear": lambda h: replace(h, autoclear_features=h.autoclear_features & 3),
}
WITH_BITMAPS = {
    "move": lambda h: with_bitmaps(h, MOVED),
    "replace": lambda h: with_bitmaps(h, NEW),
    "remove": without_bitmaps,
    "resize_with_bitmaps": lambda h: with_bitmaps(resized(h), NEW),
    "resize_and_remove": lambda h: without_bitmaps(resized(h)),
}
WITHOUT_BITMAPS = {
    "add": lambda h: with_bitmaps(h, NEW),
    "resize_and_add": lambda h: with_bitmaps(resized(h), NEW),
}

NAMES = [b"", b"b", b"base.qcow2", b"n" * 401, b"m" * 1023]


def combinations(bitmaps: bool) -> list[tuple[HeaderExtension, ...]]:
    """Extension areas: what QEMU writes, in its order, and other orders of the same."""
    found = []
    for file, table, unknown in itertools.product(
        (None, SHORT_FILE, LONG_FILE), (None, FEATURES), (None, UNKNOWN, LARGE)
    ):
        before = [e for e in (FORMAT, file, table) if e is not None]
        mine = [OLD.to_extension()] if bitmaps else []
        after = [] if unknown is None else [unknown]
        found.append((*before, *mine, *after))
        if bitmaps:
            found.append((*mine, *before, *after))
            found.append((*before, *after, *mine))
    return list(dict.fromkeys(found))


def roomy(cluster_bits: int) -> bool:
    return cluster_bits >= 13


@pytest.mark.parametrize("cluster_bits", [9, 10, 11, 12, 13, 16])
@pytest.mark.parametrize("change", WITH_BITMAPS)
def test_bitmaps_change_in_every_layout(change: str, cluster_bits: int) -> None:
    tried = 0
    for extensions, name in itertools.product(combinations(bitmaps=True), NAMES):
        cluster = layout(cluster_bits, extensions, name=name)
        if cluster is None:
            continue
        tried += 1
        new = WITH_BITMAPS[change](Header.parse(cluster))
        # A cluster that is nearly full of extensions and name may leave no room for a second copy.
        check_plan(cluster, new, lossy=not roomy(cluster_bits))
    assert tried >= 10


@pytest.mark.parametrize("cluster_bits", [9, 10, 11, 12, 13, 16])
@pytest.mark.parametrize("change", WITHOUT_BITMAPS)
def test_bitmaps_are_added_in_every_layout(change: str, cluster_bits: int) -> None:
    tried = refused = 0
    for extensions, name in itertools.product(combinations(bitmaps=False), NAMES):
        cluster = layout(cluster_bits, extensions, name=name)
        if cluster is None:
            continue
        tried += 1
        new = WITHOUT_BITMAPS[change](Header.parse(cluster))
        try:
            check_plan(cluster, new)
        except FormatError as error:
            assert "no room" in str(error)
            assert not roomy(cluster_bits)
            refused += 1
    assert tried >= 4 and refused <= tried // 2


@pytest.mark.parametrize("at", range(408, 520, 8))
@pytest.mark.parametrize("name", [b"", b"base.qcow2"])
@pytest.mark.parametrize("gap", [0, 8, 32, 64])
def test_the_extension_at_every_place_around_the_sector_boundary(at: int, name: bytes, gap: int) -> None:
    filler = HeaderExtension(0x55555555, bytes(at - 112 - 8))
    for behind in ((), (UNKNOWN,)):
        cluster = layout(12, (filler, OLD.to_extension(), *behind), name=name, gap=gap)
        assert cluster is not None
        header = Header.parse(cluster)
        for change in WITH_BITMAPS.values():
            check_plan(cluster, change(header))
        assert len(plan(cluster, with_bitmaps(header, MOVED))) == 1
        cluster = layout(12, (filler, *behind), name=name, gap=gap)
        assert cluster is not None
        for change in WITHOUT_BITMAPS.values():
            check_plan(cluster, change(Header.parse(cluster)))


@pytest.mark.parametrize("change", FIELD_CHANGES)
def test_fields_change_in_one_write(change: str) -> None:
    for version, name in itertools.product((2, 3), NAMES):
        for extensions in ((), (FORMAT, FEATURES, UNKNOWN), (LONG_FILE, OLD.to_extension())):
            autoclear = 0 if version == 2 else UNKNOWN_AUTOCLEAR | 1
            cluster = layout(12, extensions, name=name, version=version, autoclear=autoclear)
            assert cluster is not None
            header = Header.parse(cluster)
            new = FIELD_CHANGES[change](header)
            if version == 2 and new.incompatible_features | new.autoclear_features:
                continue
            steps = check_plan(cluster, new)
            assert len(steps) == (new != header)
            assert all(step.offset + len(step.data) <= SECTOR for step in steps)


def test_nothing_to_do() -> None:
    cluster = layout(16, (FORMAT, FEATURES, OLD.to_extension()), name=b"base")
    assert cluster is not None
    assert plan(cluster, Header.parse(cluster)) == []


def test_a_new_directory_offset_is_eight_bytes_in_one_sector() -> None:
    cluster = layout(16, (FORMAT, FEATURES, OLD.to_extension()), name=b"base")
    assert cluster is not None
    (step,) = plan(cluster, with_bitmaps(Header.parse(cluster), MOVED))
    at = 112 + len(FORMAT.pack()) + len(FEATURES.pack()) + 8 + 16
    assert at <= step.offset and step.offset + len(step.data) <= at + 8


def test_version_2_has_no_bitmaps() -> None:
    cluster = layout(16, (FORMAT,), name=b"base", version=2)
    assert cluster is not None
    with pytest.raises(UnsupportedFormat, match="version is 0x2: bitmaps need version 3"):
        plan(cluster, Header.parse(cluster).with_extension(NEW.to_extension()))


def test_version_2_loses_a_stray_extension() -> None:
    cluster = layout(16, (FORMAT, OLD.to_extension(), UNKNOWN), name=b"base", version=2)
    assert cluster is not None
    check_plan(cluster, Header.parse(cluster).without_extension(ExtensionType.BITMAPS))


@pytest.mark.parametrize("change", [with_bitmaps, lambda h, _: without_bitmaps(h)])
def test_a_stale_extension(change: object) -> None:
    """Autoclear bit 0 is clear: what the extension says is ignored, so it may be torn."""
    for extensions in combinations(bitmaps=True):
        cluster = layout(13, extensions, name=b"base", autoclear=0)
        assert cluster is not None
        assert view(cluster)[1] is None
        check_plan(cluster, change(Header.parse(cluster), NEW))  # type: ignore[operator]


def test_an_extension_of_a_wrong_length_is_replaced() -> None:
    stray = HeaderExtension(ExtensionType.BITMAPS, bytes(16))
    cluster = layout(13, (FORMAT, FEATURES, stray, UNKNOWN), name=b"base", autoclear=0)
    assert cluster is not None
    steps = plan(cluster, without_bitmaps(Header.parse(cluster)))
    final = bytearray(cluster)
    for offset, data in steps:
        final[offset : offset + len(data)] = data
    kept = [e for e in Header.parse(final).extensions if e.type != PADDING]
    assert view(bytes(final))[1] is None and kept == [FORMAT, FEATURES, UNKNOWN]


def test_the_feature_names_survive_where_there_is_room() -> None:
    for extensions, name in itertools.product(combinations(bitmaps=False), NAMES):
        cluster = layout(13, extensions, name=name)
        assert cluster is not None
        image = bytearray(cluster)
        for change in (WITHOUT_BITMAPS["add"], WITH_BITMAPS["replace"], without_bitmaps):
            for offset, data in plan(bytes(image), change(Header.parse(image))):
                image[offset : offset + len(data)] = data
        after = Header.parse(image).extension(ExtensionType.FEATURE_NAMES)
        assert after == Header.parse(cluster).extension(ExtensionType.FEATURE_NAMES)


def test_the_feature_names_go_where_there_is_none() -> None:
    cluster = layout(9, (FORMAT, FEATURES), name=b"base")
    assert cluster is not None
    steps = check_plan(cluster, with_bitmaps(Header.parse(cluster), NEW))
    assert len(steps) == 1


def test_bitmaps_are_ignored_in_between_only_without_any_room() -> None:
    filler = HeaderExtension(0x55555555, bytes(488 - 112 - 8))
    cluster = layout(10, (filler, OLD.to_extension()), name=b"n" * (1024 - 528))
    assert cluster is not None
    new = with_bitmaps(Header.parse(cluster), NEW)
    steps = check_plan(cluster, new, lossy=True)
    assert ignores_bitmaps(cluster, steps) and len(steps) == 3
    # The frequent change, the offset alone, never needs that.
    assert not ignores_bitmaps(cluster, plan(cluster, with_bitmaps(Header.parse(cluster), MOVED)))


def test_no_room_to_add() -> None:
    cluster = layout(10, (UNKNOWN, LARGE), name=b"n" * (1024 - 112 - 16 - 528 - 8))
    assert cluster is not None
    with pytest.raises(FormatError, match=r"no room to change them safely in the first cluster \(1024"):
        plan(cluster, with_bitmaps(Header.parse(cluster), NEW))


def test_a_header_longer_than_a_sector() -> None:
    """Fields that came after us may push the extensions out of the first sector."""
    for header_length in (496, 504, 512, 520, 720):
        cluster = layout(13, (FORMAT, OLD.to_extension(), UNKNOWN), name=b"base", header_length=header_length)
        assert cluster is not None
        for name, change in WITH_BITMAPS.items():
            # Size in one sector, the only way to the bitmaps in another: not both at once.
            apart = name.startswith("resize") and header_length >= SECTOR
            steps = check_plan(cluster, change(Header.parse(cluster)), lossy=apart)
            assert ignores_bitmaps(cluster, steps) == (apart and name == "resize_with_bitmaps")


def test_a_chain_without_end() -> None:
    cluster = layout(12, (FORMAT, UNKNOWN), name=b"base", end=False)
    assert cluster is not None
    check_plan(cluster, with_bitmaps(Header.parse(cluster), NEW))
    cluster = layout(12, (FORMAT, OLD.to_extension()), name=b"base", end=False)
    assert cluster is not None
    for change in WITH_BITMAPS.values():
        check_plan(cluster, change(Header.parse(cluster)))


def test_the_chain_does_not_grow_with_every_change() -> None:
    """Padding left by one change is used by the next."""
    for extensions, name in itertools.product(combinations(bitmaps=True), (b"", b"base", b"n" * 401)):
        cluster = layout(16, extensions, name=name)
        assert cluster is not None
        image = bytearray(cluster)
        used = []
        for turn in range(12):
            header = Header.parse(image)
            if turn % 4 == 2:
                new = without_bitmaps(header)
            elif turn % 2:
                new = with_bitmaps(replace(header, size=header.size + SECTOR), NEW)
            else:
                new = with_bitmaps(header, OLD._replace(nb_bitmaps=turn + 1))
            for offset, data in check_plan(bytes(image), new):
                image[offset : offset + len(data)] = data
            used.append(sum(len(e.pack()) for e in Header.parse(image).extensions))
        assert used[-1] <= used[3] + 64, used


@requires("qemu-img")
@pytest.mark.parametrize("cluster_size", [512, 1024, 4096, 65536])
@pytest.mark.parametrize("name", ["", "b.qcow2", "n" * 200 + ".qcow2"])
@pytest.mark.parametrize("data_file", [False, True])
def test_headers_of_qemu(tmp_path: Path, cluster_size: int, name: str, data_file: bool) -> None:
    if name:
        SYSTEM.img("create", "-f", "qcow2", tmp_path / name, "4M")
    image = tmp_path / "image.qcow2"
    options = f"cluster_size={cluster_size}" + (f",data_file={tmp_path}/d.raw" if data_file else "")
    backing = ("-b", name, "-F", "qcow2") if name else ()
    SYSTEM.img("create", "-f", "qcow2", "-o", options, *backing, image, "4M")
    try:
        cluster = image.read_bytes()[:cluster_size]
        for change in WITHOUT_BITMAPS.values():
            check_plan(cluster, change(Header.parse(cluster)))
    except FormatError as error:
        assert cluster_size == 512 and "no room" in str(error)
        return
    try:
        SYSTEM.img("bitmap", "--add", image, "one")
        SYSTEM.img("bitmap", "--add", image, "two")
    except AssertionError:
        # QEMU itself found no room.
        assert cluster_size == 512
        return
    cluster = image.read_bytes()[:cluster_size]
    for change in WITH_BITMAPS.values():
        check_plan(cluster, change(Header.parse(cluster)), lossy=cluster_size < 4096)

    # What we lay out, QEMU reads: the second bitmap leaves the directory, then the first.
    header = Header.parse(cluster)
    assert header.bitmaps is not None and header.bitmaps.nb_bitmaps == 2
    one = header.bitmaps._replace(nb_bitmaps=1, directory_size=header.bitmaps.directory_size // 2)
    for new, expected in ((with_bitmaps(header, one), ["one"]), (without_bitmaps(header), [])):
        final = bytearray(image.read_bytes())
        for offset, data in plan(cluster, new):
            final[offset : offset + len(data)] = data
        edited = tmp_path / "edited.qcow2"
        edited.write_bytes(final)
        info = SYSTEM.img_json("info", edited)
        found = [b["name"] for b in info["format-specific"]["data"].get("bitmaps", [])]
        assert found == expected
        assert info.get("backing-filename", "") == name
