"""The writing side's parts on a file in memory, without an image around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbdbm.image.allocator import Allocator
from nbdbm.image.backing import Layer
from nbdbm.image.cache import TableCache
from nbdbm.image.clusters import ClusterMap, load_l1
from nbdbm.image.commit import Metadata
from nbdbm.image.read import Reader
from nbdbm.image.write import Writer
from nbdbm.qcow2.compressed import decompressor
from nbdbm.qcow2.geometry import Geometry
from nbdbm.qcow2.header import Header
from tests.support.memfile import MemoryFile
from tests.support.qcow2build import Image as Built


@dataclass
class Parts:
    """One image in memory, open for writing."""

    file: MemoryFile
    header: Header
    clusters: ClusterMap
    cache: TableCache
    allocator: Allocator
    metadata: Metadata
    reader: Reader
    writer: Writer

    async def count(self, offset: int) -> int:
        """The refcount, in memory, of the cluster at a host offset."""
        return await self.allocator.count(offset >> self.header.cluster_bits)

    def stored_count(self, offset: int) -> int:
        """The refcount in the file of the cluster at a host offset; of whole bytes."""
        header, data = Header.parse(bytes(self.file.data[: self.header.cluster_size])), self.file.data
        width = 1 << header.refcount_order - 3
        per_block = header.cluster_size // width
        block, index = divmod(offset >> header.cluster_bits, per_block)
        at = header.refcount_table_offset + 8 * block
        place = int.from_bytes(data[at : at + 8], "big")
        if not place:
            return 0
        return int.from_bytes(data[place + width * index : place + width * (index + 1)], "big")

    def stored_entry(self, guest: int) -> int:
        """The L2 entry's first word in the file, 0 without a table."""
        geometry, data = self.clusters.geometry, self.file.data
        at = self.header.l1_table_offset + 8 * geometry.l1_index(guest)
        table = int.from_bytes(data[at : at + 8], "big") & ((1 << 56) - 512)
        at = table + geometry.l2_entry_size * geometry.l2_index(guest)
        return int.from_bytes(data[at : at + 8], "big") if table else 0

    async def read(self, offset: int, length: int) -> bytes:
        """What the disk shows."""
        buffer = bytearray(b"\xaa" * length)
        await self.reader.read_into(memoryview(buffer), offset)
        return bytes(buffer)


async def opened(
    built: Built,
    *,
    punch: bool = True,
    limit: int | None = None,
    has_backing: bool = False,
    edit: Callable[[bytearray], None] = lambda data: None,
) -> Parts:
    """Open what ``built`` builds, after ``edit``; ``limit`` of the table cache in bytes."""
    data = bytearray(built.build())
    edit(data)
    file = MemoryFile(data)
    header = Header.parse(bytes(file.data[: 1 << built.cluster_bits]))
    cache = TableCache() if limit is None else TableCache(limit)
    l1 = await load_l1(file, header.l1_table_offset, header.l1_size)
    clusters = ClusterMap(file, file, Geometry(header), l1, header.size, cache, 0)
    allocator = await Allocator.load(file, header)
    allocator.protect(header.l1_table_offset, 8 * header.l1_size)
    metadata = Metadata(clusters, cache, allocator, header.l1_table_offset, punch=punch)
    metadata.claim_tables()
    host: Any = file  # the layer's file is never asked for more than a BlockFile has
    layer = Layer(
        path=file.path,
        format="qcow2",
        file=host,
        size=header.size,
        header=header,
        map=clusters,
        decompress=decompressor(header.compression_type),
    )
    reader = Reader([layer])
    writer = Writer(metadata, reader, header.size, has_backing=has_backing, raw_data=False)
    file.log.clear()
    return Parts(file, header, clusters, cache, allocator, metadata, reader, writer)
