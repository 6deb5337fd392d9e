import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.errors import FormatError
from nbdbm.qcow2.constants import MAX_SNAPSHOT_TABLE
from nbdbm.qcow2.snapshots import SnapshotEntry, find_snapshot

# Two entries by hand: one of version 3 with 24 bytes of extra data, one of an old image without any.
FIRST = (
    bytes.fromhex("0000000000050000 00000002 0001 0005 5f5e1000 00000007 000000000000000a 00000000 00000018")
    + bytes.fromhex("0000000100000000 0000000000100000 ffffffffffffffff")
    + b"1base1"
    + bytes(2)
)
SECOND = (
    bytes.fromhex("0000000000060000 00000001 0001 0001 00000000 00000000 0000000000000000 00000200 00000000")
    + b"2x"
    + bytes(6)
)
TABLE = FIRST + SECOND

ENTRY_0 = SnapshotEntry(0x50000, 2, "1", "base1", 0x5F5E1000, 7, 10, 0, FIRST[40:64])
ENTRY_1 = SnapshotEntry(0x60000, 1, "2", "x", 0, 0, 0, 0x200, b"")


def test_round_trip() -> None:
    assert SnapshotEntry.parse_table(TABLE, 2) == [ENTRY_0, ENTRY_1]
    assert ENTRY_0.pack() + ENTRY_1.pack() == TABLE
    assert SnapshotEntry.parse_table(memoryview(TABLE + b"trailing"), 2) == [ENTRY_0, ENTRY_1]
    assert SnapshotEntry.parse_table(TABLE, 1) == [ENTRY_0]
    assert SnapshotEntry.parse_table(b"", 0) == []


def test_extra_data() -> None:
    assert (ENTRY_0.vm_state_size, ENTRY_0.disk_size) == (1 << 32, 1 << 20)
    assert (ENTRY_1.vm_state_size, ENTRY_1.disk_size) == (0x200, None)
    short = ENTRY_0._replace(extra_data=ENTRY_0.extra_data[:15])
    assert (short.vm_state_size, short.disk_size) == (1 << 32, None)


@pytest.mark.parametrize("length", range(len(TABLE)))
def test_byte_by_byte(length: int) -> None:
    """Until the last name is whole, more is wanted; the last padding may be missing."""
    found = SnapshotEntry.parse_table(TABLE[:length], 2)
    assert found == ([ENTRY_0, ENTRY_1] if length >= len(TABLE) - 6 else None)


def test_limits() -> None:
    data = bytearray(FIRST)
    struct.pack_into(">I", data, 36, 1025)
    with pytest.raises(FormatError, match="extra_data_size of a snapshot is 0x401: at most 1024"):
        SnapshotEntry.parse_table(data, 1)
    struct.pack_into(">I", data, 36, 1024)
    assert SnapshotEntry.parse_table(data, 1) is None
    # 1000 entries of 64 KiB names: by its end, the largest table there may be has not shown all of them.
    large = ENTRY_1._replace(name="n" * 65535).pack() * 1024
    with pytest.raises(FormatError, match="snapshot table: longer than 67108864 bytes"):
        SnapshotEntry.parse_table(memoryview(large)[:MAX_SNAPSHOT_TABLE], 1024)


@given(
    st.lists(
        st.builds(
            SnapshotEntry,
            st.integers(0, 2**64 - 1),
            st.integers(0, 2**32 - 1),
            st.binary(max_size=9).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
            st.binary(max_size=9).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
            st.integers(0, 2**32 - 1),
            st.integers(0, 2**32 - 1),
            st.integers(0, 2**64 - 1),
            st.integers(0, 2**32 - 1),
            st.binary(max_size=30),
        ),
        max_size=4,
    )
)
def test_any_table_round_trips(entries: list[SnapshotEntry]) -> None:
    packed = b"".join(entry.pack() for entry in entries)
    assert len(packed) % 8 == 0
    assert SnapshotEntry.parse_table(packed, len(entries)) == entries


def judge(entry: SnapshotEntry, *, size: int = 1 << 20, file_size: int = 0x70000) -> None:
    entry.validate(size, 65536, 8, file_size)


def test_valid() -> None:
    judge(ENTRY_0)
    judge(ENTRY_1)
    judge(ENTRY_0, file_size=0x50010)
    # The disk has grown since: what the table does not cover is unallocated.
    judge(ENTRY_0, size=1 << 50)
    judge(ENTRY_1._replace(l1_size=0, l1_table_offset=0))


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        (ENTRY_0._replace(l1_size=(4 << 20) + 1), "l1_size of snapshot 'base1' is 0x400001: at most 4194304"),
        (ENTRY_0._replace(l1_size=0), "l1_size of snapshot 'base1' is 0x0: too small"),
        (
            ENTRY_0._replace(l1_table_offset=0x50008),
            "l1_table_offset of snapshot 'base1' is 0x50008: must",
        ),
        (ENTRY_0._replace(l1_table_offset=0), "l1_table_offset of snapshot 'base1' is 0x0"),
        (ENTRY_0._replace(l1_table_offset=0x70000), "past the file's end"),
        (ENTRY_0._replace(l1_table_offset=(1 << 64) - 65536), "past the file's end"),
    ],
)
def test_refused(entry: SnapshotEntry, rule: str) -> None:
    with pytest.raises(FormatError, match=rule):
        judge(entry)


def test_find() -> None:
    by_name = ENTRY_1._replace(id="7", name="1")
    entries = [by_name, ENTRY_0, ENTRY_1]
    assert find_snapshot(entries, "1") is ENTRY_0
    assert find_snapshot(entries, "base1") is ENTRY_0
    assert find_snapshot(entries[:1], "1") is by_name
    assert find_snapshot(entries, "3") is None
