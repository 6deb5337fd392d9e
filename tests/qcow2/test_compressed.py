import sys
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.errors import FormatError
from nbdbm.qcow2 import compressed
from nbdbm.qcow2.compressed import CompressedDescriptor, decompressor
from nbdbm.qcow2.constants import COMPRESSED, CompressionType
from nbdbm.qcow2.geometry import Geometry
from nbdbm.qcow2.header import Header

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CLUSTER = bytes(range(256)) * 200 + bytes(65536 - 51200)


def deflate(data: bytes, window: int = -12) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, window)
    return stream.compress(data) + stream.flush()


PACK: dict[CompressionType, Callable[[bytes], bytes]] = {
    CompressionType.ZLIB: deflate,
    CompressionType.ZSTD: zstd.compress,
}
both = pytest.mark.parametrize("kind", list(CompressionType))


# -- descriptor


def test_descriptor_by_hand() -> None:
    # 64 KiB clusters: x = 54. Offset 0x50010, two more sectors.
    entry = COMPRESSED | 2 << 54 | 0x50010
    where = CompressedDescriptor.parse(Geometry(Header()), entry)
    assert where == (0x50010, 3 * 512 - 0x10)
    assert where.pack(Geometry(Header())) == entry


@given(st.integers(9, 21), st.data())
def test_descriptor_round_trip(bits: int, data: st.DataObject) -> None:
    geometry = Geometry(Header(cluster_bits=bits))
    highest = min(geometry.compressed_offset_mask, (1 << 56) - 1)
    offset = data.draw(st.integers(0, highest))
    more = data.draw(st.integers(0, (1 << (bits - 8)) - 1))
    entry = COMPRESSED | more << geometry.compressed_sectors_shift | offset
    where = CompressedDescriptor.parse(geometry, entry)
    assert where.host_offset == offset
    assert (where.host_offset + where.length) % 512 == 0
    assert 1 <= where.length <= (more + 1) * 512
    assert where.pack(geometry) == entry


def test_descriptor_beyond_56_bits() -> None:
    geometry = Geometry(Header(cluster_bits=9))
    with pytest.raises(FormatError, match="2\\^56"):
        CompressedDescriptor.parse(geometry, COMPRESSED | 1 << 56)


# -- data


@both
@pytest.mark.parametrize("trailing", [b"", b"\0" * 300, b"\xff" * 511])
def test_whole(kind: CompressionType, trailing: bytes) -> None:
    assert decompressor(kind)(PACK[kind](CLUSTER) + trailing, len(CLUSTER)) == CLUSTER


@both
def test_every_cut_is_damage(kind: CompressionType) -> None:
    data = CLUSTER[:512]
    packed = PACK[kind](data)
    unpack = decompressor(kind)
    for cut in range(len(packed)):
        # What is missing at the end of a deflate stream may be its mere end marker.
        try:
            assert unpack(packed[:cut], 512) == data
            assert kind is CompressionType.ZLIB and cut >= len(packed) - 5
        except FormatError as error:
            assert error.field == "compressed cluster"


@both
def test_too_short(kind: CompressionType) -> None:
    with pytest.raises(FormatError, match="ends after 65535 bytes"):
        decompressor(kind)(PACK[kind](CLUSTER[:-1]), len(CLUSTER))


@both
def test_garbage(kind: CompressionType) -> None:
    with pytest.raises(FormatError):
        decompressor(kind)(b"\xff" * 512, 512)


def test_zlib_takes_what_fills_the_cluster() -> None:
    """As QEMU does: the stream may go on."""
    assert decompressor(CompressionType.ZLIB)(deflate(CLUSTER + b"more"), len(CLUSTER)) == CLUSTER


def test_zlib_large_window() -> None:
    data = zlib.compress(CLUSTER)[:200].ljust(30000, b"a") + CLUSTER[:35536]
    assert decompressor(CompressionType.ZLIB)(deflate(data, -15), len(data)) == data


def test_zlib_without_isal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)
    unpack = compressed.decompressor(CompressionType.ZLIB)
    assert unpack(deflate(CLUSTER) + bytes(100), len(CLUSTER)) == CLUSTER
    with pytest.raises(FormatError):
        unpack(b"\xff" * 512, 512)


def test_zstd_more_than_a_cluster() -> None:
    with pytest.raises(FormatError):
        decompressor(CompressionType.ZSTD)(zstd.compress(CLUSTER + b"more"), len(CLUSTER))


def test_zstd_checksum_behind_the_data() -> None:
    packed = zstd.compress(CLUSTER, options={zstd.CompressionParameter.checksum_flag: 1})
    unpack = decompressor(CompressionType.ZSTD)
    assert unpack(packed + bytes(100), len(CLUSTER)) == CLUSTER
    with pytest.raises(FormatError):
        unpack(packed[:-1] + bytes((packed[-1] ^ 1,)), len(CLUSTER))


def test_zstd_several_frames() -> None:
    packed = zstd.compress(CLUSTER[:100]) + zstd.compress(CLUSTER[100:])
    assert decompressor(CompressionType.ZSTD)(packed + bytes(9), len(CLUSTER)) == CLUSTER


def test_zstd_frames_without_end() -> None:
    with pytest.raises(FormatError, match="frames"):
        decompressor(CompressionType.ZSTD)(zstd.compress(b"") * 1000, len(CLUSTER))


@both
def test_a_bomb_yields_no_more_than_a_cluster(kind: CompressionType) -> None:
    packed = PACK[kind](bytes(64 << 20))
    try:
        assert len(decompressor(kind)(packed, 65536)) == 65536
    except FormatError:
        assert kind is CompressionType.ZSTD
