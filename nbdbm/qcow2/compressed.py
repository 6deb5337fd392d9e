"""Compressed clusters: the descriptor, and taking zlib and zstd apart without trusting them.

Specification: "Compressed Clusters Descriptor".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

from nbdbm.errors import FormatError
from nbdbm.qcow2.constants import COMPRESSED, COMPRESSED_SECTOR, OFFSET_MASK, CompressionType
from nbdbm.qcow2.geometry import Geometry

HIGHEST_OFFSET = OFFSET_MASK | (COMPRESSED_SECTOR - 1)
"""Bits 0-55: where compressed data may begin; higher bits of the field must be zero."""

MAX_FRAMES = 16
"""zstd frames in one cluster. QEMU writes one and reads any number; thousands of empty frames would cost
a copy of the rest each."""

Data = bytes | memoryview

Content = bytes | bytearray

Decompressor = Callable[[Data, int], Content]
"""(compressed bytes, trailing garbage included; cluster size) -> exactly one cluster."""


class CompressedDescriptor(NamedTuple):
    """Where one cluster's compressed bytes lie: ``length`` bytes from ``host_offset``.

    ``length`` counts to the end of the last 512-byte sector: the data may end earlier, the file too.
    """

    host_offset: int
    length: int

    @classmethod
    def parse(cls, geometry: Geometry, entry: int) -> CompressedDescriptor:
        """Read the descriptor of an L2 entry that has the COMPRESSED flag.

        Raises:
            FormatError: the offset lies beyond 2^56.
        """
        assert entry & COMPRESSED
        offset = entry & geometry.compressed_offset_mask
        if offset > HIGHEST_OFFSET:
            raise FormatError("L2 entry", entry, "its compressed data begins beyond 2^56")
        more = (entry & (COMPRESSED - 1)) >> geometry.compressed_sectors_shift
        return cls(offset, (more + 1) * COMPRESSED_SECTOR - offset % COMPRESSED_SECTOR)

    def pack(self, geometry: Geometry) -> int:
        """The L2 entry for this descriptor."""
        last = self.host_offset + self.length - 1
        more = last // COMPRESSED_SECTOR - self.host_offset // COMPRESSED_SECTOR
        return COMPRESSED | more << geometry.compressed_sectors_shift | self.host_offset


def decompressor(compression_type: int) -> Decompressor:
    """The function for a header's (validated) compression_type; imports its library now."""
    if compression_type == CompressionType.ZSTD:
        return _zstd()
    assert compression_type == CompressionType.ZLIB
    return _zlib()


def _zlib() -> Decompressor:
    """The short way for what everybody writes, a stream that ends where the cluster is full; ``_zlib_exact``
    judges everything else, in its words. (Of damaged streams libdeflate takes one in many thousands that
    zlib refuses; no checksum would tell that the others are damaged.)"""
    exact = _zlib_exact()
    try:
        import deflate
    except ImportError:
        return exact

    def decompress(data: Data, cluster_size: int) -> Content:
        try:
            # Never more than this is allocated; a stream that goes on is an error here.
            out = deflate.deflate_decompress(data, cluster_size)
            if len(out) == cluster_size:
                return out
        except deflate.DeflateError:
            pass
        return exact(data, cluster_size)

    return decompress


def _zlib_exact() -> Decompressor:
    import zlib

    def decompress(data: Data, cluster_size: int) -> Content:
        try:
            # Raw deflate with the largest window: QEMU writes with 4 KiB, others may not.
            # The stream need not end where the cluster is full (QEMU accepts that too).
            out = zlib.decompressobj(-15).decompress(data, cluster_size)
        except zlib.error as error:
            raise FormatError("compressed cluster", None, f"damaged zlib data ({error})") from error
        if len(out) != cluster_size:
            raise FormatError("compressed cluster", None, f"zlib data ends after {len(out)} bytes")
        return out

    return decompress


def _zstd() -> Decompressor:
    """The short way for what QEMU writes, one frame that says it holds a cluster; ``_zstd_exact`` judges
    everything else, so that verdicts do not depend on what is installed."""
    exact = _zstd_exact()
    try:
        import zstandard
    except ImportError:
        return exact
    idle: list[zstandard.ZstdDecompressor] = []
    """Making one takes longer than decompressing most clusters. One thread at a time may use it."""

    def decompress(data: Data, cluster_size: int) -> Content:
        try:
            # What the frame says it holds is allocated before anything is decompressed; its history takes
            # no more than that either.
            if zstandard.frame_content_size(data) == cluster_size:
                try:
                    context = idle.pop()
                except IndexError:
                    context = zstandard.ZstdDecompressor()
                out = context.decompress(data)
                idle.append(context)
                if len(out) == cluster_size:
                    return out
        except zstandard.ZstdError:
            pass
        return exact(data, cluster_size)

    return decompress


def _zstd_exact() -> Decompressor:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    def decompress(data: Data, cluster_size: int) -> Content:
        out = b""
        try:
            for _ in range(MAX_FRAMES):
                stream = zstd.ZstdDecompressor()
                out += stream.decompress(data, cluster_size - len(out))
                # Full, but the frame is not over: either its last bytes are still to be looked at, or it
                # holds more than a cluster.
                if not stream.eof and not stream.needs_input and stream.decompress(b"", 1):
                    raise FormatError("compressed cluster", None, "zstd data exceeds the cluster")
                if not stream.eof:
                    raise FormatError("compressed cluster", None, f"zstd data ends after {len(out)} bytes")
                if len(out) == cluster_size:
                    return out
                # QEMU accepts a cluster in several frames.
                data = stream.unused_data
                if not data:
                    raise FormatError("compressed cluster", None, f"zstd data ends after {len(out)} bytes")
            raise FormatError("compressed cluster", None, f"more than {MAX_FRAMES} zstd frames")
        except zstd.ZstdError as error:
            raise FormatError("compressed cluster", None, f"damaged zstd data ({error})") from error

    return decompress
