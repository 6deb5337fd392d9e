import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.errors import FormatError
from nbdbm.qcow2.compressed import CompressedDescriptor, Decompressor, decompressor
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


def test_zlib_without_deflate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deflate", None)
    unpack = decompressor(CompressionType.ZLIB)
    assert unpack(deflate(CLUSTER) + bytes(100), len(CLUSTER)) == CLUSTER
    with pytest.raises(FormatError):
        unpack(b"\xff" * 512, 512)


@pytest.mark.parametrize("level", [0, 1, 6, 9])
@pytest.mark.parametrize("trailing", [b"", b"\xff" * 511])
def test_zlib_goes_the_short_way(level: int, trailing: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What QEMU writes does, whatever follows it."""
    unpack = decompressor(CompressionType.ZLIB)

    def never(*args: object) -> None:
        raise AssertionError("the exact way")

    monkeypatch.setattr(zlib, "decompressobj", never)
    stream = zlib.compressobj(level, zlib.DEFLATED, -12)
    packed = stream.compress(CLUSTER) + stream.flush() + trailing
    assert unpack(memoryview(packed), len(CLUSTER)) == CLUSTER
    with pytest.raises(AssertionError):
        unpack(deflate(CLUSTER + b"more"), len(CLUSTER))


@given(st.binary(max_size=600), st.integers(0, 1200))
def test_zlib_ways_agree(content: bytes, cut: int) -> None:
    """On streams that are cut, end early, or go on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deflate", None)
        strict = decompressor(CompressionType.ZLIB)
    packed = deflate(content)[:cut]
    assert outcome(decompressor(CompressionType.ZLIB), packed, 512) == outcome(strict, packed, 512)


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


# -- the short way for zstd


def exact(monkeypatch: pytest.MonkeyPatch) -> Decompressor:
    """The decompressor where ``zstandard`` is missing."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "zstandard", None)
        return decompressor(CompressionType.ZSTD)


def outcome(unpack: Decompressor, data: bytes, size: int) -> bytes | str:
    try:
        return bytes(unpack(data, size))
    except FormatError as error:
        return str(error)


SMALL = CLUSTER[:1500] + CLUSTER[-548:]
P = zstd.CompressionParameter
FRAMES: dict[str, bytes] = {
    "plain": zstd.compress(SMALL),
    "checksum": zstd.compress(SMALL, options={P.checksum_flag: 1}),
    "size not told": zstd.compress(SMALL, options={P.content_size_flag: 0}),
    "two": zstd.compress(SMALL[:100]) + zstd.compress(SMALL[100:]),
    "skippable first": struct.pack("<II", 0x184D2A50, 3) + b"abc" + zstd.compress(SMALL),
    "too much": zstd.compress(SMALL + b"!"),
    "too much, size not told": zstd.compress(SMALL + b"!", options={P.content_size_flag: 0}),
    "too little": zstd.compress(SMALL[1:]),
    "empty": zstd.compress(b""),
    "one after it": zstd.compress(SMALL) + zstd.compress(b"!"),
    # A frame of 2048 bytes by its header, of 2049 by its blocks: window, size, a block of one byte repeated.
    "header lies": struct.pack("<IBBHI", 0xFD2FB528, 0x40, 0, 2048 - 256, 2049 << 3 | 3)[:-1] + b"x",
    # One that claims 2^62 bytes.
    "huge": struct.pack("<IBBQ", 0xFD2FB528, 0xC0, 0x70, 1 << 62) + b"\1\0\0",
}


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("trailing", [b"", bytes(300), b"\xff" * 511], ids=["", "zeroes", "ones"])
def test_zstd_ways_agree(name: str, trailing: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack, strict = decompressor(CompressionType.ZSTD), exact(monkeypatch)
    data = FRAMES[name] + trailing
    assert outcome(unpack, data, len(SMALL)) == outcome(strict, data, len(SMALL))
    for cut in range(0, len(FRAMES[name]), 7):
        assert outcome(unpack, data[:cut], len(SMALL)) == outcome(strict, data[:cut], len(SMALL))


@given(st.sampled_from(sorted(FRAMES)), st.integers(0, 10_000), st.integers(0, 7))
def test_zstd_ways_agree_on_damage(name: str, at: int, bit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        unpack, strict = decompressor(CompressionType.ZSTD), exact(patch)
    data = bytearray(FRAMES[name])
    data[at % len(data)] ^= 1 << bit
    assert outcome(unpack, bytes(data), len(SMALL)) == outcome(strict, bytes(data), len(SMALL))


def test_zstd_goes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """What QEMU writes does: one frame with its size, trailing garbage or not."""
    unpack = decompressor(CompressionType.ZSTD)

    def never(*args: object) -> None:
        raise AssertionError("the exact way")

    monkeypatch.setattr(zstd, "ZstdDecompressor", never)
    for _ in range(3):
        assert unpack(memoryview(FRAMES["plain"] + bytes(100)), len(SMALL)) == SMALL
    with pytest.raises(AssertionError):
        unpack(FRAMES["two"], len(SMALL))


def test_zstd_in_threads() -> None:
    """A context is used by one thread at a time."""
    clusters = [bytes((n,)) * 1000 + CLUSTER[1000:] for n in range(32)]
    packed = [zstd.compress(cluster) for cluster in clusters]
    unpack = decompressor(CompressionType.ZSTD)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            assert list(pool.map(unpack, packed, [len(CLUSTER)] * 32)) == clusters


def test_zstd_what_a_frame_claims_is_not_allocated() -> None:
    unpack = decompressor(CompressionType.ZSTD)
    claim = struct.pack("<IBBQ", 0xFD2FB528, 0xC0, 0x70, 1 << 28) + b"\1\0\0"
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            unpack(claim, len(SMALL))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
