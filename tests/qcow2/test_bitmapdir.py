from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.errors import FormatError
from nbdbm.qcow2.bitmapdir import (
    FLAGS_AT,
    BitmapsExtension,
    DirectoryEntry,
    bitmap_bytes,
    data_runs,
    duplicate_names,
    parse_directory,
    table_entries,
    table_refusal,
)
from nbdbm.qcow2.constants import BitmapFlag, ExtensionType
from nbdbm.qcow2.extensions import HeaderExtension

EXTENSION = bytes.fromhex("00000002 00000000 0000000000000040 0000000000050000")
FIRST = bytes.fromhex("0000000000030000 00000001 00000002 01 10 0002 00000000") + b"b0" + bytes(6)
SECOND = bytes.fromhex("0000000000040000 00000002 00000005 01 09 0003 00000004") + b"XTRAabc" + bytes(1)
DIRECTORY = FIRST + SECOND

ENTRY_0 = DirectoryEntry(0x30000, 1, 2, 1, 16, b"", b"b0")
ENTRY_1 = DirectoryEntry(0x40000, 2, 5, 1, 9, b"XTRA", b"abc")

CLUSTER = 65536
SIZE = 1 << 20
FILE_SIZE = 1 << 20


def entry(**fields: Any) -> DirectoryEntry:
    """A good entry for a disk of SIZE, but for ``fields``."""
    return ENTRY_0._replace(**fields)


def refusal(**fields: Any) -> str | None:
    return entry(**fields).refusal(SIZE, CLUSTER, FILE_SIZE)


# -- extension -------------------------------------------------------------------------------


def test_extension_round_trip() -> None:
    extension = BitmapsExtension.parse(EXTENSION)
    assert extension == BitmapsExtension(2, 64, 0x50000)
    assert extension.pack() == EXTENSION
    assert extension.to_extension() == HeaderExtension(ExtensionType.BITMAPS, EXTENSION)
    extension.validate(CLUSTER, FILE_SIZE)


@pytest.mark.parametrize("length", [*range(24), 25, 32])
def test_extension_of_another_length(length: int) -> None:
    with pytest.raises(FormatError, match="must be 24 bytes"):
        BitmapsExtension.parse(EXTENSION.ljust(length, b"\0")[:length])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ((0, 64, 0x50000), "nb_bitmaps"),
        ((65536, 64, 0x50000), "nb_bitmaps"),
        ((2, 0, 0x50000), "bitmap_directory_size"),
        ((2, 1024 * 65535 + 1, 0x50000), "bitmap_directory_size"),
        ((2, 64, 0), "bitmap_directory_offset"),
        ((2, 64, 0x50008), "bitmap_directory_offset"),
        ((2, 64, FILE_SIZE), "bitmap_directory_offset"),
        ((2, CLUSTER + 1, FILE_SIZE - CLUSTER), "bitmap_directory_offset"),
        ((2, 64, (1 << 64) - CLUSTER), "bitmap_directory_offset"),
    ],
)
def test_extension_refused(fields: tuple[int, int, int], field: str) -> None:
    with pytest.raises(FormatError) as raised:
        BitmapsExtension(*fields).validate(CLUSTER, FILE_SIZE)
    assert raised.value.field == field


def test_extension_at_its_limits() -> None:
    BitmapsExtension(65535, 1024 * 65535, CLUSTER).validate(CLUSTER, CLUSTER + 1024 * 65535)


# -- directory -------------------------------------------------------------------------------


def test_directory_round_trip() -> None:
    entries = parse_directory(DIRECTORY, 2)
    assert entries == [ENTRY_0, ENTRY_1]
    assert b"".join(e.pack() for e in entries) == DIRECTORY
    assert [e.packed_size for e in entries] == [len(FIRST), len(SECOND)]
    assert parse_directory(memoryview(DIRECTORY), 2) == entries


def test_entry_properties() -> None:
    assert (ENTRY_0.name, ENTRY_0.granularity, ENTRY_0.auto, ENTRY_0.in_use) == ("b0", 65536, True, False)
    assert (ENTRY_1.granularity, ENTRY_1.auto, ENTRY_1.in_use) == (512, False, True)
    assert entry(raw_name=b"a\xff").name == "a\\xff"
    assert FIRST[FLAGS_AT : FLAGS_AT + 4] == BitmapFlag.AUTO.to_bytes(4)


def test_entry_with_trailing_bytes() -> None:
    assert DirectoryEntry.parse(b"12345678" + DIRECTORY + b"more", 8) == (ENTRY_0, 8 + len(FIRST))


@pytest.mark.parametrize("length", range(len(DIRECTORY)))
def test_directory_byte_by_byte(length: int) -> None:
    with pytest.raises(FormatError):
        parse_directory(DIRECTORY[:length], 2)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_directory_of_another_number(count: int) -> None:
    with pytest.raises(FormatError, match="entries"):
        parse_directory(DIRECTORY, count)


@pytest.mark.parametrize("trailing", [1, 8, 24, 64])
def test_directory_with_trailing_bytes(trailing: int) -> None:
    with pytest.raises(FormatError, match=f"{trailing} bytes are left after all 2 entries"):
        parse_directory(DIRECTORY + bytes(trailing), 2)


def test_entry_longer_than_what_is_left() -> None:
    huge = bytearray(FIRST)
    huge[20:24] = b"\xff\xff\xff\xff"
    with pytest.raises(FormatError, match="the entry at byte 0 is 4294967328 bytes long, but 32 are left"):
        parse_directory(huge, 1)


@given(
    st.lists(
        st.builds(
            DirectoryEntry,
            st.integers(0, 2**64 - 1),
            st.integers(0, 2**32 - 1),
            st.integers(0, 2**32 - 1),
            st.integers(0, 255),
            st.integers(0, 255),
            st.binary(max_size=20),
            st.binary(max_size=20),
        ),
        max_size=5,
    )
)
def test_any_directory_round_trips(entries: list[DirectoryEntry]) -> None:
    packed = b"".join(e.pack() for e in entries)
    assert len(packed) == sum(e.packed_size for e in entries)
    assert parse_directory(packed, len(entries)) == entries


def test_duplicate_names() -> None:
    entries = [entry(raw_name=name) for name in (b"a", b"b", b"a", b"c", b"a", b"c")]
    assert duplicate_names(entries) == {b"a", b"c"}
    assert duplicate_names(entries[:2]) == set()


# -- judging an entry -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"raw_name": b"n" * 1023},
        {"raw_name": "Grün ✓".encode()},
        {"flags": 0},
        {"flags": 4},
        {"flags": 4, "extra_data": b"anything"},
        {"granularity_bits": 9},
        {"granularity_bits": 31},
        {"table_offset": FILE_SIZE - CLUSTER},
        # IN_USE: whatever the table is said to be.
        {"flags": 1, "table_size": 0, "table_offset": 0},
        {"flags": 1, "table_size": 0xFFFFFFFF, "table_offset": 12345},
    ],
    ids=str,
)
def test_accepted(fields: dict[str, Any]) -> None:
    assert refusal(**fields) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"raw_name": b""}, "its name is 0 bytes long"),
        ({"raw_name": b"n" * 1024}, "its name is 1024 bytes long"),
        ({"raw_name": b"a\xff"}, "its name is not UTF-8"),
        ({"raw_name": b"\xed\xa0\x80"}, "its name is not UTF-8"),
        ({"raw_name": b"a\0b"}, "its name contains a NUL byte"),
        ({"type": 0}, "its type is 0"),
        ({"type": 2}, "its type is 2"),
        ({"flags": 8}, "reserved flags are set (0x8)"),
        ({"flags": 1 << 31 | 1}, "reserved flags are set (0x80000000)"),
        ({"extra_data": b"12345"}, "it has 5 bytes of extra data"),
        ({"extra_data": b"12345", "flags": 1}, "it has 5 bytes of extra data"),
        ({"granularity_bits": 8}, "granularity_bits is 8"),
        ({"granularity_bits": 32}, "granularity_bits is 32"),
        ({"granularity_bits": 255}, "granularity_bits is 255"),
        ({"table_size": 0}, "bitmap_table_size is 0, but a disk of 1048576 bytes needs 1 "),
        ({"table_size": 2}, "bitmap_table_size is 2"),
        ({"table_offset": 0}, "bitmap_table_offset is 0x0"),
        ({"table_offset": 0x30008}, "bitmap_table_offset is 0x30008"),
        ({"table_offset": FILE_SIZE}, "the table reaches past the file's end"),
        ({"table_offset": (1 << 64) - CLUSTER}, "the table reaches past the file's end"),
    ],
    ids=str,
)
def test_refused(fields: dict[str, Any], reason: str) -> None:
    assert reason in (refusal(**fields) or "")


def test_bits_of_512_mib_at_most() -> None:
    size = 1 << 41  # 2^32 bits of 512 bytes
    good = entry(granularity_bits=9, table_size=(1 << 29) // CLUSTER)
    assert good.refusal(size, CLUSTER, FILE_SIZE) is None
    assert good.refusal(size + 1, CLUSTER, FILE_SIZE) == "its bits take more than 512 MiB"


def test_empty_disk_needs_no_table() -> None:
    assert entry(table_size=0, table_offset=0).refusal(0, CLUSTER, FILE_SIZE) is None


@pytest.mark.parametrize(
    ("size", "granularity", "in_bytes", "in_clusters"),
    [
        (0, 512, 0, 0),
        (1, 65536, 1, 1),
        (8 * 512, 512, 1, 1),
        (8 * 512 + 1, 512, 2, 1),
        (1 << 46, 65536, 1 << 27, 2048),
    ],
)
def test_sizes(size: int, granularity: int, in_bytes: int, in_clusters: int) -> None:
    assert bitmap_bytes(size, granularity) == in_bytes
    assert table_entries(size, granularity, CLUSTER) == in_clusters


# -- tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ((), None),
        ((0, 1, CLUSTER), None),
        ((0, FILE_SIZE - CLUSTER), None),
        ((0, 2), "entry 1 of its table is 0x2: reserved bits are set"),
        ((0x100,), "entry 0 of its table is 0x100: reserved bits are set"),
        ((CLUSTER | 1,), "entry 0 of its table is 0x10001: reserved bits are set"),
        ((1 << 56 | CLUSTER,), "reserved bits are set"),
        ((1 << 63,), "reserved bits are set"),
        ((1 << 63 | 1,), "reserved bits are set"),
        ((0x8000,), "entry 0 of its table is 0x8000: not a multiple of the cluster size"),
        ((FILE_SIZE,), "past the file's end"),
        ((1 << 55,), "past the file's end"),
    ],
    ids=str,
)
def test_table(table: tuple[int, ...], reason: str | None) -> None:
    found = table_refusal(table, CLUSTER, len(table) * CLUSTER, FILE_SIZE)
    assert found is None if reason is None else reason in (found or "")


def test_table_of_a_truncated_file() -> None:
    """The last cluster may end early, but not before the bits do: those would read as clean."""
    table = (CLUSTER, 2 * CLUSTER)
    total = CLUSTER + 100
    assert table_refusal(table, CLUSTER, total, 2 * CLUSTER + 100) is None
    assert "entry 1" in (table_refusal(table, CLUSTER, total, 2 * CLUSTER + 99) or "")
    assert "entry 0" in (table_refusal(table[::-1], CLUSTER, total, 2 * CLUSTER + 100) or "")


def test_data_runs_by_hand() -> None:
    table = (0, 0x5000, 0x6000, 0x7000, 1, 1, 0x9000, 0x8000, 0)
    assert list(data_runs(table, 0x1000, 9 * 0x1000, 0x10000)) == [
        (0x1000, 0x3000, 0x5000),
        (0x4000, 0x2000, None),
        (0x6000, 0x1000, 0x9000),
        (0x7000, 0x1000, 0x8000),
    ]
    assert list(data_runs(table[:3], 0x1000, 0x2001, 0x1000)) == [
        (0x1000, 0x1000, 0x5000),
        (0x2000, 1, 0x6000),
    ]


@given(
    table=st.lists(st.sampled_from([0, 1, 0x200, 0x400, 0x600, 0x800, 0xA00]), max_size=30).map(tuple),
    missing=st.integers(0, 0x1FF),
    limit=st.sampled_from([1, 0x200, 0x400, 0x1000]),
)
def test_data_runs_cover_what_is_not_zero(table: tuple[int, ...], missing: int, limit: int) -> None:
    total = max(0, len(table) * 0x200 - missing)
    covered: dict[int, int] = {}
    for at, length, host in data_runs(table, 0x200, total, limit):
        assert length > 0 and at + length <= total
        assert host is None or length <= max(limit, 0x200)
        for i in range(0, length, 0x200):
            assert at + i not in covered
            covered[at + i] = 1 if host is None else host + i
    assert covered == {i * 0x200: e for i, e in enumerate(table) if e and i * 0x200 < total}
