import pytest

from nbdbm.errors import FormatError
from nbdbm.qcow2.constants import ExtensionType, FeatureKind
from nbdbm.qcow2.extensions import (
    FeatureName,
    HeaderExtension,
    name_features,
    pack_extensions,
    parse_extensions,
    type_name,
)

BACKING = bytes.fromhex("e2792aca 00000005") + b"qcow2\0\0\0"
UNKNOWN = bytes.fromhex("12345678 00000009") + b"123456789" + bytes(7)
END = bytes(8)
AREA = BACKING + UNKNOWN + END

PARSED = (
    HeaderExtension(ExtensionType.BACKING_FORMAT, b"qcow2"),
    HeaderExtension(0x12345678, b"123456789"),
)


def test_round_trip() -> None:
    assert parse_extensions(AREA, 0, len(AREA)) == PARSED
    assert pack_extensions(PARSED) == AREA


def test_start_and_what_follows_end() -> None:
    assert parse_extensions(b"x" * 72 + AREA + b"\xff" * 50, 72, 72 + len(AREA) + 50) == PARSED


def test_every_truncation() -> None:
    """Cut anywhere, the area holds fewer extensions, or one that reaches past its end."""
    outcomes = set()
    for cut in range(len(AREA)):
        try:
            found = parse_extensions(AREA[:cut], 0, cut)
        except FormatError as error:
            assert error.field.startswith("length of header extension")
            outcomes.add("refused")
        else:
            assert found == PARSED[: len(found)]
            outcomes.add(str(len(found)))
    assert outcomes == {"refused", "0", "1", "2"}


def test_end_of_area_bounds_an_extension() -> None:
    with pytest.raises(FormatError, match=r"BACKING_FORMAT at byte 0 is 0x5: only 4 bytes are left"):
        parse_extensions(AREA, 0, 12)


def test_padding_is_not_looked_at() -> None:
    assert parse_extensions(BACKING[:-3] + b"abc" + END, 0, 24) == PARSED[:1]


def test_names() -> None:
    assert type_name(0xE2792ACA) == "BACKING_FORMAT"
    assert type_name(0x12) == "0x00000012"
    assert str(PARSED[0]) == "BACKING_FORMAT, 5 bytes"


def test_feature_table() -> None:
    table = [FeatureName(0, 0, "dirty bit"), FeatureName(0, 9, "time travel"), FeatureName(1, 9, "other")]
    data = b"".join(entry.pack() for entry in table)
    assert len(data) == 3 * 48
    assert FeatureName.parse_table(data) == table
    assert FeatureName.parse_table(data + b"odd") == table
    assert FeatureName.parse_table(data[:-1]) == table[:2]
    full = FeatureName.parse_table(bytes([2, 63]) + b"n" * 46)
    assert full == [FeatureName(2, 63, "n" * 46)]


def test_name_features() -> None:
    data = FeatureName(0, 9, "time travel").pack() + FeatureName(0, 10, "evil\x1b[31m").pack()
    extensions = [HeaderExtension(ExtensionType.FEATURE_NAMES, data)]
    named = name_features(1 << 9 | 1 << 10 | 1 << 63, FeatureKind.INCOMPATIBLE, extensions)
    assert named == "bit 9 (time travel), bit 10, bit 63"
    assert name_features(1 << 9, FeatureKind.COMPATIBLE, extensions) == "bit 9"
