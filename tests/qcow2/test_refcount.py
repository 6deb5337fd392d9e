import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.qcow2.refcount import RefcountBlock


@pytest.mark.parametrize(
    ("order", "data", "counts"),
    [
        (0, "b1", [1, 0, 0, 0, 1, 1, 0, 1]),
        (1, "e4", [0, 1, 2, 3]),
        (2, "21 43", [1, 2, 3, 4]),
        (3, "01 ff", [1, 255]),
        (4, "0001 ff00", [1, 0xFF00]),
        (5, "00000001 80000000", [1, 1 << 31]),
        (6, "0000000000000001 8000000000000000", [1, 1 << 63]),
    ],
)
def test_by_hand(order: int, data: str, counts: list[int]) -> None:
    block = RefcountBlock(bytes.fromhex(data), order)
    assert len(block) == len(counts)
    assert list(block) == counts
    assert [block.get(i) for i in range(len(block))] == counts


@given(order=st.integers(0, 6), data=st.data())
def test_set_changes_one_count(order: int, data: st.DataObject) -> None:
    buffer = bytearray(data.draw(st.binary(min_size=16, max_size=16)))
    block = RefcountBlock(memoryview(buffer), order)
    counts = list(block)
    index = data.draw(st.integers(0, len(block) - 1))
    value = data.draw(st.one_of(st.integers(0, block.maximum), st.just(block.maximum)))
    block.set(index, value)
    counts[index] = value
    assert list(block) == counts
    assert block.get(index) == value


@pytest.mark.parametrize("order", range(7))
def test_limits(order: int) -> None:
    block = RefcountBlock(bytearray(64), order)
    assert block.bits == 2**order
    assert block.maximum == 2**block.bits - 1
    for index, value in ((-1, 0), (len(block), 0), (0, -1), (0, block.maximum + 1)):
        with pytest.raises(AssertionError):
            block.set(index, value)
    with pytest.raises(AssertionError):
        block.get(len(block))
    with pytest.raises(AssertionError):
        RefcountBlock(bytes(64), order).set(0, 0)
