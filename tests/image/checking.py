"""Images that are checked: what we and qemu-img find in them, and patients, to be damaged first."""

from __future__ import annotations

import asyncio
import json
import struct
from pathlib import Path
from typing import Any

from nbdbm.image.check import check, open_locked
from nbdbm.image.checkreport import CheckReport
from tests.support.qcow2build import get_field
from tests.support.qemu import SYSTEM, run


def report_of(path: Path) -> CheckReport:
    async def look() -> CheckReport:
        file, header, _ = await open_locked(str(path), writable=False)
        try:
            return await check(file, header)
        finally:
            file.close()

    return asyncio.run(look())


def qemu_check(path: Path) -> tuple[dict[str, Any], int]:
    """What qemu-img says, and its exit status."""
    done = run(SYSTEM.argv("qemu-img", "check", "-f", "qcow2", "--output=json", path), check=False)
    return json.loads(done.stdout), done.returncode


def assert_same(path: Path) -> CheckReport:
    """Our findings are qemu-img's, number by number."""
    theirs, status = qemu_check(path)
    report = report_of(path)
    ours = report.to_json()
    for key in ("allocated-clusters", "fragmented-clusters", "compressed-clusters", "total-clusters"):
        theirs.setdefault(key, 0)  # left out where they are 0
    assert ours == theirs, report.problems
    assert report.exit_status == status
    return report


class Patient:
    """An image in a buffer, to be damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())
        self.cluster = 1 << get_field(self.data, "cluster_bits")
        l1 = get_field(self.data, "l1_table_offset")
        self.reftable = get_field(self.data, "refcount_table_offset")
        three = get_field(self.data, "version") == 3
        self.order = get_field(self.data, "refcount_order") if three else 4
        self.wide = 2 if three and get_field(self.data, "incompatible_features") & 16 else 1
        self.clusters = -(-len(self.data) // self.cluster)
        entries = range(l1, l1 + 8 * get_field(self.data, "l1_size"), 8)
        self.l1 = max(entries, key=lambda at: self._entries_below(at))
        """The L1 entry with most below it."""

    def _entries_below(self, at: int) -> int:
        table = self.word(at) & 0xFFFFFFFFFFFE00
        return sum(1 for n in range(table, table + self.cluster, 8) if table and self.word(n))

    def word(self, at: int) -> int:
        value: int = struct.unpack_from(">Q", self.data, at)[0]
        return value

    def put(self, at: int, value: int) -> None:
        struct.pack_into(">Q", self.data, at, value)

    def l2(self) -> int:
        """Offset of the L2 table below."""
        return self.word(self.l1) & 0xFFFFFFFFFFFE00

    def used(self) -> list[int]:
        """Places of the L2 entries with a host cluster of their own in it."""
        step = 8 * self.wide
        table = range(self.l2(), self.l2() + self.cluster, step)
        return [at for at in table if self.word(at) & 0xFFFFFFFFFFFE00 and not self.word(at) >> 62 & 1]

    def drop(self, at: int) -> None:
        """Clear an L2 entry."""
        self.data[at : at + 8 * self.wide] = bytes(8 * self.wide)

    def refcount(self, cluster: int, value: int) -> None:
        block = self.word(self.reftable)
        if self.order >= 3:
            width = 1 << (self.order - 3)
            at = block + cluster * width
            self.data[at : at + width] = value.to_bytes(width, "big")
            return
        bits = 1 << self.order
        at, shift = block + cluster * bits // 8, cluster * bits % 8
        mask = (1 << bits) - 1 << shift
        self.data[at] = self.data[at] & ~mask & 0xFF | value << shift

    def save(self) -> Path:
        self.path.write_bytes(self.data)
        return self.path
