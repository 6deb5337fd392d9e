"""An image with bitmaps in memory, and what a session with it changes and writes."""

from __future__ import annotations

import struct

from nbdbm.image.image import Image, OpenOptions
from tests.support import qcow2build
from tests.support.faults import FaultFile, FaultPlan
from tests.support.powercut import Op, PowerCutFile, Timeline
from tests.support.qcow2build import AUTO, IN_USE, Bitmap

MIB = 1 << 20
CLUSTER = 4096
WRITING = OpenOptions(read_only=False)

BITMAPS = [
    Bitmap(b"recording", bits=b"\x03", granularity_bits=12),
    Bitmap(b"torn", flags=IN_USE | AUTO, bits=b"\x01"),
    Bitmap(b"idle", flags=0, bits=b"\x01"),
    Bitmap(b"coarse"),
]


def built(*bitmaps: Bitmap, **more: object) -> bytes:
    fields: dict[str, object] = {"cluster_bits": 12, "bitmaps": list(bitmaps), **more}
    return qcow2build.Image(**fields).build()  # type: ignore[arg-type]


class Bench:
    """An image in memory, whose life is recorded."""

    def __init__(self, data: bytes, path: str = "disk.qcow2") -> None:
        self.timeline = Timeline()
        self.file = PowerCutFile(self.timeline, data, path=path)
        self.before = data

    async def open(self, plan: FaultPlan | None = None) -> Image:
        self.file.closed = False
        file = self.file if plan is None else FaultFile(self.file, plan)
        return await Image.open(self.file.path, WRITING, lambda path, writable: file)

    def changed(self) -> list[int]:
        """Offsets of the bytes that differ from the first ones."""
        now = bytes(self.file.data)
        assert len(now) >= len(self.before)
        return [n for n, byte in enumerate(self.before) if now[n] != byte]

    def writes(self) -> list[Op]:
        return [op for op in self.timeline.ops if op.kind != "sync"]

    def entries(self) -> dict[bytes, int]:
        return qcow2build.bitmap_entries(self.file.data)

    def entry(self, name: bytes) -> bytes:
        at = self.entries()[name]
        return bytes(self.file.data[at : at + 24 + len(name)])

    def table(self, name: bytes) -> tuple[int, ...]:
        offset, count = struct.unpack_from(">QI", self.entry(name))
        return struct.unpack_from(f">{count}Q", self.file.data, offset)
