"""The table of internal snapshots.

Specification: "Snapshots". A snapshot is an L1 table of its own with a name; its entry in the table has
variable length, so how long the table is shows only while it is parsed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from nbdbm.errors import FormatError
from nbdbm.qcow2.constants import MAX_L1_SIZE, MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE
from nbdbm.qcow2.extensions import Buffer

ENTRY = struct.Struct(">QIHHIIQII")
"""An entry's fixed part."""


class SnapshotEntry(NamedTuple):
    """One snapshot as the table describes it; offsets and sizes in bytes."""

    l1_table_offset: int
    l1_size: int
    """Entries."""
    id: str
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size_32: int
    """The field of the fixed part; ``vm_state_size`` is the one to use."""
    extra_data: bytes
    """Verbatim, with what came after us."""

    @classmethod
    def parse(cls, buf: Buffer, at: int = 0) -> tuple[SnapshotEntry, int] | None:
        """Read the entry at ``at``; return it and where the next one begins, None if ``buf`` is too short.

        Raises:
            FormatError: more extra data than any program writes.
        """
        if len(buf) - at < ENTRY.size:
            return None
        (
            l1_table_offset,
            l1_size,
            id_size,
            name_size,
            date_sec,
            date_nsec,
            vm_clock_nsec,
            vm_state_size,
            extra_size,
        ) = ENTRY.unpack_from(buf, at)
        if extra_size > MAX_SNAPSHOT_EXTRA:
            raise FormatError("extra_data_size of a snapshot", extra_size, f"at most {MAX_SNAPSHOT_EXTRA}")
        id_at = at + ENTRY.size + extra_size
        name_at = id_at + id_size
        end = name_at + name_size
        if end > len(buf):
            return None
        entry = cls(
            l1_table_offset,
            l1_size,
            bytes(buf[id_at:name_at]).decode("utf-8", "surrogateescape"),
            bytes(buf[name_at:end]).decode("utf-8", "surrogateescape"),
            date_sec,
            date_nsec,
            vm_clock_nsec,
            vm_state_size,
            bytes(buf[at + ENTRY.size : id_at]),
        )
        return entry, end + -(end - at) % 8

    @classmethod
    def parse_table(cls, buf: Buffer, nb_snapshots: int) -> list[SnapshotEntry] | None:
        """Every entry of the table that ``buf`` begins with; None if it goes on behind ``buf``.

        The padding of the last entry may be missing. Callers read more until they get a list; one of
        ``MAX_SNAPSHOT_TABLE`` bytes is refused here, so they need no limit of their own.

        Raises:
            FormatError: an entry breaks a limit, or the table is larger than any may be.
        """
        entries: list[SnapshotEntry] = []
        at = 0
        for _ in range(nb_snapshots):
            parsed = cls.parse(buf, at)
            if parsed is None:
                if len(buf) >= MAX_SNAPSHOT_TABLE:
                    raise FormatError("snapshot table", None, f"longer than {MAX_SNAPSHOT_TABLE} bytes")
                return None
            entry, at = parsed
            entries.append(entry)
        return entries

    def pack(self) -> bytes:
        """The entry, padded with zeroes to a multiple of 8 bytes."""
        id_ = self.id.encode("utf-8", "surrogateescape")
        name = self.name.encode("utf-8", "surrogateescape")
        packed = (
            ENTRY.pack(
                self.l1_table_offset,
                self.l1_size,
                len(id_),
                len(name),
                self.date_sec,
                self.date_nsec,
                self.vm_clock_nsec,
                self.vm_state_size_32,
                len(self.extra_data),
            )
            + self.extra_data
            + id_
            + name
        )
        return packed + bytes(-len(packed) % 8)

    def _extra(self, index: int) -> int | None:
        """The ``index``-th 64-bit field of the extra data, None if it is not there."""
        if len(self.extra_data) < 8 * index + 8:
            return None
        return int.from_bytes(self.extra_data[8 * index : 8 * index + 8])

    @property
    def vm_state_size(self) -> int:
        """Size of the saved machine state, 0 if there is none."""
        large = self._extra(0)
        return self.vm_state_size_32 if large is None else large

    @property
    def disk_size(self) -> int | None:
        """The virtual disk's size when the snapshot was taken, None where old images do not say."""
        return self._extra(1)

    def validate(self, size: int, cluster_size: int, l2_entry_size: int, file_size: int) -> None:
        """Judge the L1 table before it is read to serve a disk of ``size`` bytes.

        A table shorter than that is well-formed: the disk has grown since, and the rest is unallocated.

        Raises:
            FormatError: the table cannot be read.
        """
        what = f"of snapshot {self.name!r}"
        if 8 * self.l1_size > MAX_L1_SIZE:
            raise FormatError(f"l1_size {what}", self.l1_size, f"at most {MAX_L1_SIZE // 8} entries (32 MiB)")
        if self.disk_size is not None:
            per_table = cluster_size // l2_entry_size * cluster_size
            needed = -(-min(self.disk_size, size) // per_table)
            if self.l1_size < needed:
                raise FormatError(
                    f"l1_size {what}",
                    self.l1_size,
                    f"too small: a disk of {self.disk_size} bytes needs {needed}",
                )
        offset = self.l1_table_offset
        if offset % cluster_size or (not offset and self.l1_size):
            raise FormatError(
                f"l1_table_offset {what}", offset, f"must be a multiple of the cluster size ({cluster_size})"
            )
        if offset + 8 * self.l1_size > file_size:
            raise FormatError(
                f"l1_table_offset {what}", offset, f"the table reaches past the file's end ({file_size})"
            )


def find_snapshot(entries: Iterable[SnapshotEntry], wanted: str) -> SnapshotEntry | None:
    """The snapshot of this id, else the one of this name (QEMU's order), else None."""
    entries = list(entries)
    by_id = next((e for e in entries if e.id == wanted), None)
    return by_id or next((e for e in entries if e.name == wanted), None)
