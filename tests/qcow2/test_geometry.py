import pytest

from nbdbm.qcow2.constants import IncompatFeature
from nbdbm.qcow2.geometry import Geometry
from nbdbm.qcow2.header import Header

EXTENDED = int(IncompatFeature.EXTENDED_L2)


def test_default_clusters() -> None:
    geometry = Geometry(Header(cluster_bits=16))
    assert geometry.cluster_size == 65536
    assert geometry.l2_entries == geometry.slice_entries == 8192
    assert geometry.slices_per_table == 1
    assert geometry.l1_shift == geometry.slice_shift == 29
    assert geometry.subclusters == 1
    assert geometry.subcluster_size == 65536
    assert geometry.refcount_block_entries == 32768
    assert geometry.compressed_sectors_shift == 54
    offset = (3 << 29) + (77 << 16) + 5
    assert geometry.l1_index(offset) == 3
    assert geometry.l2_index(offset) == 77


def test_smallest_clusters() -> None:
    geometry = Geometry(Header(cluster_bits=9, refcount_order=6))
    assert geometry.l2_entries == geometry.slice_entries == 64
    assert geometry.l1_shift == 15
    assert geometry.refcount_block_entries == 64
    assert geometry.misaligned_mask == 0


def test_largest_clusters_are_cut_into_slices() -> None:
    geometry = Geometry(Header(cluster_bits=21, incompatible_features=EXTENDED))
    assert geometry.l2_entries == 131072
    assert geometry.slice_bytes == 65536
    assert geometry.slice_entries == 4096
    assert geometry.slices_per_table == 32
    assert geometry.slice_shift == 21 + 12
    assert geometry.l1_shift == 21 + 17
    assert geometry.subcluster_size == 65536
    assert geometry.words_per_entry == 2


@pytest.mark.parametrize(
    "size, entries", [(0, 0), (1, 1), (1 << 29, 1), ((1 << 29) + 1, 2), (64 << 40, 131072)]
)
def test_l1_entries(size: int, entries: int) -> None:
    assert Geometry(Header()).l1_entries(size) == entries


@pytest.mark.parametrize("order", range(7))
def test_refcount_indices(order: int) -> None:
    geometry = Geometry(Header(cluster_bits=12, refcount_order=order))
    for cluster in (0, 1, 511, 512, 32767, 32768, 1_000_000):
        table, block = divmod(cluster, geometry.refcount_block_entries)
        assert geometry.refcount_table_index(cluster << 12) == table
        assert geometry.refcount_block_index((cluster << 12) + 7) == block


def test_clusters_rounds_up() -> None:
    geometry = Geometry(Header(cluster_bits=12))
    assert [geometry.clusters(n) for n in (0, 1, 4096, 4097)] == [0, 1, 1, 2]
