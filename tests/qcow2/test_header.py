import struct
from dataclasses import replace
from typing import Any

import pytest

from nbdbm.errors import FormatError, UnsupportedFormat
from nbdbm.qcow2.bitmapdir import BitmapsExtension
from nbdbm.qcow2.constants import ExtensionType, IncompatFeature
from nbdbm.qcow2.extensions import FeatureName, HeaderExtension
from nbdbm.qcow2.header import Header
from tests.support import qcow2build
from tests.support.qcow2build import FIELDS, Bitmap, Image

# Written by hand from the specification: version 3, clusters of 512 bytes, a disk of 1 MiB.
V3_HEAD = bytes.fromhex(
    "514649fb 00000003"  # magic, version
    "0000000000000000 00000000"  # no backing file
    "00000009"  # cluster_bits
    "0000000000100000"  # size
    "00000000"  # crypt_method
    "00000020 0000000000000600"  # l1: 32 entries at 3 * 512
    "0000000000000200 00000001"  # refcount table at 512, 1 cluster
    "00000000 0000000000000000"  # no snapshots
    "0000000000000000 0000000000000001 0000000000000000"  # lazy refcounts
    "00000004 00000070"  # refcount_order, header_length 112
    "00 00000000000000"  # compression_type, padding
)
CLUSTER = (V3_HEAD + bytes(8)).ljust(512, b"\0")
FILE_SIZE = 4 * 512


def parse(image: Image) -> Header:
    data = image.build()
    return Header.parse(data[: 1 << image.cluster_bits])


def judge(image: Image) -> None:
    data = image.build()
    Header.parse(data[: 1 << image.cluster_bits]).validate(len(data))


def test_by_hand() -> None:
    header = Header.parse(CLUSTER)
    assert header == Header(
        version=3,
        cluster_bits=9,
        size=1 << 20,
        l1_size=32,
        l1_table_offset=1536,
        refcount_table_offset=512,
        refcount_table_clusters=1,
        compatible_features=1,
        unknown_fields=bytes(7),
    )
    header.validate(FILE_SIZE)
    assert header.pack() == CLUSTER[: 112 + 8]
    assert header.cluster_size == 512
    assert header.lazy_refcounts
    assert header.refcount_bits == 16
    assert header.l1_entries_needed == 32
    assert header.backing_file is header.backing_format is header.data_file is None
    assert header.bitmaps is None
    assert not (header.dirty or header.corrupt or header.extended_l2 or header.has_data_file)


def test_trailing_bytes_are_ignored() -> None:
    assert Header.parse(CLUSTER + b"\xff" * 99) == Header.parse(memoryview(CLUSTER)) == Header.parse(CLUSTER)


@pytest.mark.parametrize("length", range(105))
def test_peek_byte_by_byte(length: int) -> None:
    if length < 72:
        with pytest.raises(FormatError, match="too short for a qcow2 header"):
            Header.peek_cluster_size(CLUSTER[:length])
    else:
        assert Header.peek_cluster_size(CLUSTER[:length]) == 512


@pytest.mark.parametrize(
    ("field", "value", "error", "text"),
    [
        ("magic", 0x514649FA, FormatError, "magic is 0x514649fa: not a qcow2 image"),
        ("version", 1, UnsupportedFormat, "version is 0x1: only 2 and 3"),
        ("version", 4, UnsupportedFormat, "version is 0x4: only 2 and 3"),
        ("cluster_bits", 8, FormatError, "cluster_bits is 0x8: must be 9 to 21"),
        ("cluster_bits", 22, FormatError, "cluster_bits is 0x16"),
        ("cluster_bits", 0xFFFFFFFF, FormatError, "cluster_bits"),
        ("header_length", 103, FormatError, "header_length is 0x67"),
        ("header_length", 96, FormatError, "header_length"),
        ("header_length", 106, FormatError, "header_length is 0x6a: must be a multiple of 8"),
        ("header_length", 520, FormatError, "header_length is 0x208: must fit the first cluster"),
        ("backing_file_offset", 104, FormatError, "backing_file_offset is 0x68: must lie behind the header"),
        ("backing_file_offset", 512, FormatError, "backing_file_offset is 0x200"),
        ("backing_file_offset", 1 << 63, FormatError, "backing_file_offset"),
    ],
)
def test_unreadable(field: str, value: int, error: type[FormatError], text: str) -> None:
    data = bytearray(CLUSTER)
    at, format_ = FIELDS[field]
    struct.pack_into(format_, data, at, value)
    with pytest.raises(error, match=text) as raised:
        Header.parse(data)
    assert type(raised.value) is error
    assert raised.value.field == field
    assert raised.value.value == value


def test_backing_name() -> None:
    header = parse(Image(backing=b"../base \xff.raw", extensions=[(qcow2build.EXT_BACKING_FORMAT, b"raw")]))
    assert header.backing_file == "../base \udcff.raw"
    assert header.backing_format == "raw"
    longest = parse(Image(backing=b"n" * 1023))
    assert longest.backing_file == "n" * 1023
    with pytest.raises(FormatError, match="backing_file_size is 0x400: must be at most 1023"):
        parse(Image(backing=b"n" * 1024))
    with pytest.raises(FormatError, match="backing_file_size"):
        parse(Image(cluster_bits=9, backing=b"n" * 20, header={"backing_file_offset": 500}))
    with pytest.raises(FormatError, match=r"backing file name is 'a.x00b': must not contain a NUL"):
        parse(Image(backing=b"a\0b"))


def test_empty_backing_name_is_none() -> None:
    header = parse(Image(header={"backing_file_offset": 120, "backing_file_size": 0}))
    assert header.backing_file is None


def test_version_2_extensions_end_at_the_backing_name() -> None:
    image = Image(version=2, backing=b"base", end=False)
    header = parse(image)
    assert (header.backing_file_offset, header.header_length, header.refcount_order) == (72, 72, 4)
    assert header.backing_file == "base"
    assert header.extensions == ()
    judge(image)


def test_version_2_ignores_what_version_3_added() -> None:
    data = bytearray(Image(version=2).build())
    data[72:76] = bytes(4)  # type END: everything behind it is free space
    data[80:112] = b"\xff" * 32
    header = Header.parse(data[:65536])
    assert header.incompatible_features == header.autoclear_features == header.compression_type == 0
    header.validate(len(data))


def test_additional_fields() -> None:
    shortest = parse(Image(header_length=104, compression_type=1))
    assert (shortest.compression_type, shortest.unknown_fields) == (0, b"")
    image = Image(header_length=128, unknown_fields=b"future things")
    header = parse(image)
    assert header.unknown_fields == b"future things".ljust(128 - 105, b"\0")
    assert image.build().startswith(header.pack())


IMAGES = {
    "v2": Image(version=2),
    "v2_backing": Image(version=2, backing=b"base.img", extensions=[(0xE2792ACA, b"qcow2")]),
    "v3_short": Image(header_length=104),
    "v3_512": Image(cluster_bits=9, backing=b"b"),
    "v3_unknown_extension": Image(extensions=[(0xABCD, b"\1\2\3"), (0xABCD, b""), (0x44415441, b"data.raw")]),
    "bitmaps": Image(bitmaps=[Bitmap(b"b0", b"\xff")], backing=b"/a/b", autoclear=1 | 1 << 40),
    "2M": Image(cluster_bits=21, refcount_order=6, size=1 << 40),
}


@pytest.mark.parametrize("name", IMAGES)
def test_round_trip(name: str) -> None:
    image = IMAGES[name]
    data = image.build()
    cluster = data[: 1 << image.cluster_bits]
    header = Header.parse(cluster)
    header.validate(len(data))
    assert header.pack().ljust(len(cluster), b"\0") == cluster


def test_pack_places_the_name_behind_changed_extensions() -> None:
    header = parse(Image(backing=b"base", extensions=[(0xABCD, b"x" * 5)]))
    where = BitmapsExtension(2, 64, 5 << 16)
    grown = header.with_extension(where.to_extension())
    again = Header.parse(grown.pack().ljust(65536, b"\0"))
    assert again.backing_file == "base"
    assert again.bitmaps == where
    assert again.backing_file_offset == header.backing_file_offset + 32
    changed = grown.with_extension(BitmapsExtension(3, 96, 7 << 16).to_extension())
    assert changed.bitmaps == BitmapsExtension(3, 96, 7 << 16)
    assert len(changed.extensions) == len(grown.extensions) == 2
    assert changed.without_extension(ExtensionType.BITMAPS).pack() == header.pack()


def test_pack_refuses_more_than_a_cluster() -> None:
    header = parse(Image(cluster_bits=9, backing=b"n" * 300))
    with pytest.raises(FormatError, match=r"length of header and extensions is 0x2[0-9a-f]+: at most one"):
        replace(header, extensions=(HeaderExtension(0xABCD, b"x" * 100),)).pack()


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (
            {"extensions": [(0xE2792ACA, b"raw"), (0xE2792ACA, b"qcow2")]},
            "BACKING_FORMAT: appears more than once",
        ),
        ({"extensions": [(0xE2792ACA, b"x" * 16)]}, "length of header extension BACKING_FORMAT is 0x10"),
        ({"extensions": [(0xE2792ACA, b"raw\0x")]}, "BACKING_FORMAT is .*NUL"),
        ({"extensions": [(0x44415441, b"a"), (0x44415441, b"a")]}, "DATA_FILE: appears more than once"),
        ({"extensions": [(0x44415441, b"x" * 1024)]}, "length of header extension DATA_FILE"),
    ],
    ids=["format_twice", "format_long", "format_nul", "data_file_twice", "data_file_long"],
)
def test_ambiguous_strings(image: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError, match=text):
        parse(Image(**image))


def test_malformed_bitmaps_extension_does_not_concern_the_image() -> None:
    image = Image(extensions=[(qcow2build.EXT_BITMAPS, b"short")])
    header = parse(image)
    assert header.bitmaps is None
    assert header.extension(ExtensionType.BITMAPS) == HeaderExtension(ExtensionType.BITMAPS, b"short")
    judge(image)


TiB = 1 << 40


@pytest.mark.parametrize(
    ("image", "field", "rule"),
    [
        ({"header": {"crypt_method": 1}}, "crypt_method", r"encrypted \(AES\)"),
        ({"header": {"crypt_method": 2}}, "crypt_method", r"encrypted \(LUKS\)"),
        ({"header": {"crypt_method": 3}}, "crypt_method", r"encrypted \(unknown method\)"),
        ({"compression_type": 1}, "compression_type", "bit 3 .* is not set"),
        ({"incompatible": 8}, "compression_type", "bit 3 .* is set"),
        ({"incompatible": 8, "compression_type": 2}, "compression_type", "only 0 .* and 1"),
        ({"incompatible": 16, "cluster_bits": 13}, "cluster_bits", "at least 14 with extended L2"),
        ({"header": {"refcount_order": 7}}, "refcount_order", "at most 6"),
        (
            {"incompatible": 4, "autoclear": 2, "backing": b"b"},
            "autoclear_features",
            "excludes a backing file",
        ),
        ({"header": {"size": 1 << 63}}, "size", "less than 2\\^63"),
        ({"header": {"size": 1 << 62}}, "l1_size", "too small"),
        ({"header": {"l1_size": 0}}, "l1_size", "too small: a disk of 1048576 bytes needs 1 "),
        ({"header": {"l1_size": (4 << 20) + 1}}, "l1_size", "at most 4194304"),
        ({"header": {"l1_table_offset": 0}}, "l1_table_offset", "overlap the header"),
        ({"header": {"l1_table_offset": 65537}}, "l1_table_offset", "multiple of the cluster size"),
        ({"header": {"l1_table_offset": 1 << 40}}, "l1_table_offset", "past the file's end"),
        ({"header": {"l1_table_offset": (1 << 64) - 65536}}, "l1_table_offset", "past the file's end"),
        ({"header": {"l1_size": 4 << 20}}, "l1_table_offset", "33554432 bytes from there reach past"),
        ({"header": {"refcount_table_clusters": 0}}, "refcount_table_clusters", "must be 1 to 128"),
        ({"header": {"refcount_table_clusters": 129}}, "refcount_table_clusters", "must be 1 to 128"),
        ({"header": {"refcount_table_offset": 512}}, "refcount_table_offset", "multiple"),
        ({"header": {"refcount_table_offset": 0}}, "refcount_table_offset", "overlap the header"),
        ({"header": {"refcount_table_offset": 1 << 50}}, "refcount_table_offset", "past the file's end"),
        ({"header": {"nb_snapshots": 65537}}, "nb_snapshots", "at most 65536"),
        ({"header": {"nb_snapshots": 1, "snapshots_offset": 0}}, "snapshots_offset", "overlap"),
        ({"header": {"nb_snapshots": 1, "snapshots_offset": 8}}, "snapshots_offset", "multiple"),
        (
            {"header": {"nb_snapshots": 9999, "snapshots_offset": 65536}},
            "snapshots_offset",
            "past the file's end",
        ),
    ],
)
def test_refused(image: dict[str, Any], field: str, rule: str) -> None:
    with pytest.raises(FormatError, match=rule) as raised:
        judge(Image(**image))
    assert raised.value.field == field


@pytest.mark.parametrize(
    "image",
    [
        {"incompatible": 1 | 2},
        {"incompatible": 8, "compression_type": 1},
        {"incompatible": 16},
        {"incompatible": 16, "cluster_bits": 14},
        {"incompatible": 4, "autoclear": 2},
        {"autoclear": 1 << 63},
        {"compatible": (1 << 64) - 1},
        {"size": 0},
        {"size": 1000},
        {"cluster_bits": 9, "size": 64 << 20},
        {"cluster_bits": 21, "size": 64 * TiB},
        {"refcount_order": 0},
        {"refcount_order": 6, "cluster_bits": 9},
        {"backing": b"base"},
        {"backing": b"base", "incompatible": 4},
    ],
    ids=str,
)
def test_accepted(image: dict[str, Any]) -> None:
    judge(Image(**image))


def test_flags() -> None:
    header = parse(Image(incompatible=0x1F, autoclear=1 | 2 | 4, compression_type=1))
    assert header.dirty and header.corrupt and header.has_data_file and header.raw_data_file
    assert header.extended_l2 and header.l2_entry_size == 16
    assert header.unknown_autoclear == 4
    # Without the external data file the raw bit means nothing.
    assert not replace(header, incompatible_features=0).raw_data_file


def test_truncated_file_is_not_an_empty_disk() -> None:
    data = Image(clusters={0: b"x" * 65536}).build()
    header = Header.parse(data[:65536])
    header.validate(len(data))
    with pytest.raises(FormatError, match="past the file's end"):
        header.validate(header.l1_table_offset + 8 * header.l1_size - 1)


def test_unknown_incompatible_feature_is_named() -> None:
    names = FeatureName(0, 5, "time travel").pack() + FeatureName(1, 6, "not this one").pack()
    image = Image(incompatible=1 << 5 | 1 << 6 | IncompatFeature.DIRTY, extensions=[(0x6803F857, names)])
    with pytest.raises(UnsupportedFormat, match=r"features: bit 5 \(time travel\), bit 6$"):
        judge(image)


def test_unknown_feature_is_the_reason_even_if_extensions_cannot_be_walked() -> None:
    extensions = [(0xABCD, b"")]
    data = bytearray(Image(incompatible=1 << 20, extensions=extensions).build())
    struct.pack_into(">I", data, 116, 1 << 31)
    with pytest.raises(UnsupportedFormat, match="bit 20"):
        Header.parse(data[:65536])
    struct.pack_into(">Q", data, 72, 0)
    with pytest.raises(FormatError, match="length of header extension 0x0000abcd"):
        Header.parse(data[:65536])
