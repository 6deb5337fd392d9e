"""GuestModel: which contents are permitted after a power failure, and which clean bits are false."""

from __future__ import annotations

import random
from itertools import permutations

import pytest

from nbdbm.bitmaps.dirty import DirtyBitmap
from tests.support.guestmodel import GuestModel, GuestOp
from tests.support.powercut import SECTOR, Timeline

SIZE = 16 * SECTOR
A, B, C = (bytes([letter]) * SECTOR for letter in b"ABC")
ZERO = bytes(SECTOR)


@pytest.fixture
def model() -> GuestModel:
    return GuestModel(Timeline(), SIZE, C * 16)


def done(model: GuestModel, *args: object, **options: object) -> GuestOp:
    op = model.begin(*args, **options)  # type: ignore[arg-type]
    model.end(op)
    return op


def sector(model: GuestModel, number: int = 0, tick: int | None = None) -> set[bytes]:
    """What sector ``number`` may hold, by the lists and, as a cross-check, by the checker's verdict."""
    tick = model.timeline.now if tick is None else tick
    at = number * SECTOR
    permitted = {model.initial(at, SECTOR)}
    for start, end, contents in model.permitted(tick):
        if start <= at < end:
            permitted = {c[at - start : at - start + SECTOR] for c in contents}
    for content in {A, B, C, ZERO} | permitted:
        disk = bytearray(C * 16)
        for start, end, contents in model.permitted(tick):
            disk[start:end] = contents[0]
        disk[at : at + SECTOR] = content
        wrong = model.content_violations(tick, lambda o, n, disk=disk: bytes(disk[o : o + n]))
        assert bool(wrong) == (content not in permitted)
    return permitted


def test_an_unanswered_write_may_be_there(model: GuestModel) -> None:
    op = model.begin("write", 0, data=A)
    assert sector(model) == {A, C}
    assert sector(model, tick=op.begun - 1) == {C}
    assert sector(model, 1) == {C}


def test_an_answered_write_is_not_yet_promised(model: GuestModel) -> None:
    done(model, "write", 0, data=A)
    assert sector(model) == {A, C}


def test_a_flush_promises_what_was_answered_before_it(model: GuestModel) -> None:
    done(model, "write", 0, data=A)
    flush = model.begin("flush")
    assert sector(model) == {A, C}
    model.end(flush)
    assert sector(model) == {A}
    assert sector(model, tick=flush.ended - 1) == {A, C}


def test_a_flush_promises_nothing_of_what_was_under_way(model: GuestModel) -> None:
    op = model.begin("write", 0, data=A)
    flush = model.begin("flush")
    model.end(op)
    model.end(flush)
    assert sector(model) == {A, C}


def test_fua_promises_itself_only(model: GuestModel) -> None:
    done(model, "write", SECTOR, data=B)
    done(model, "write", 0, data=A, fua=True)
    assert sector(model) == {A}
    assert sector(model, 1) == {B, C}


def test_later_writes_come_on_top_in_any_part(model: GuestModel) -> None:
    done(model, "write", 0, data=A, fua=True)
    done(model, "write", 0, data=B)
    model.begin("zeroes", 0, SECTOR)
    assert sector(model) == {A, B, ZERO}


def test_sectors_stand_for_themselves(model: GuestModel) -> None:
    done(model, "write", 0, data=A + A)
    assert not model.content_violations(model.timeline.now, lambda o, n: (A + C * 15)[o : o + n])
    assert not model.content_violations(model.timeline.now, lambda o, n: (C + A + C * 14)[o : o + n])
    assert model.content_violations(model.timeline.now, lambda o, n: (A[:9] + C * 16)[o : o + n])


def test_a_trim_is_the_old_or_zeroes(model: GuestModel) -> None:
    done(model, "write", 0, data=A, fua=True)
    done(model, "trim", 0, SECTOR)
    done(model, "flush")
    assert sector(model) == {A, ZERO}


def test_write_zeroes_is_a_promise(model: GuestModel) -> None:
    done(model, "zeroes", 0, SECTOR)
    done(model, "flush")
    assert sector(model) == {ZERO}


def test_requests_that_overlap_in_time_come_in_either_order(model: GuestModel) -> None:
    one = model.begin("write", 0, data=A)
    two = model.begin("write", 0, data=B)
    model.end(two)
    model.end(one)
    done(model, "flush")
    assert sector(model) == {A, B}


def test_a_failed_request_may_still_come(model: GuestModel) -> None:
    model.begin("write", 0, data=A)
    done(model, "flush")
    assert sector(model) == {A, C}
    done(model, "write", 0, data=B, fua=True)
    # It was never answered: nothing says that it will not reach the disk after its successor.
    assert sector(model) == {A, B}


def test_parts_of_sectors(model: GuestModel) -> None:
    done(model, "write", 100, data=b"x" * SECTOR, fua=True)
    done(model, "write", 0, data=b"y" * 200)
    x = C[:100] + b"x" * 412
    assert sector(model) == {x, b"y" * 200 + x[200:]}
    assert sector(model, 1) == {b"x" * 100 + C[100:]}


def test_the_untouched_part_must_not_change(model: GuestModel) -> None:
    done(model, "write", 0, data=A, fua=True)
    disk = bytearray(A + C * 15)
    disk[5000] ^= 1
    (problem,) = model.content_violations(model.timeline.now, lambda o, n: bytes(disk[o : o + n]))
    assert problem == "byte 0x1388 was never written to and changed"


def test_against_a_slow_model_byte_by_byte() -> None:
    """A disk that took every request in full is permitted at all times; one wrong sector is not."""
    rng = random.Random(3)
    for _ in range(30):
        model = GuestModel(Timeline(), SIZE)
        disk = bytearray(SIZE)
        for _ in range(12):
            offset = rng.randrange(SIZE - 1)
            length = rng.randrange(1, SIZE - offset + 1)
            if rng.random() < 0.5:
                data = rng.randbytes(length)
                done(model, "write", offset, data=data, fua=rng.random() < 0.3)
                disk[offset : offset + length] = data
            else:
                done(model, "zeroes", offset, length)
                disk[offset : offset + length] = bytes(length)
            now = model.timeline.now
            assert not model.content_violations(now, lambda o, n, d=disk: bytes(d[o : o + n]))
        done(model, "flush")
        now = model.timeline.now
        assert all(len(contents) == 1 for _, _, contents in model.permitted(now))
        assert not model.content_violations(now, lambda o, n, d=disk: bytes(d[o : o + n]))
        disk[rng.randrange(SIZE)] ^= 0xFF
        assert model.content_violations(now, lambda o, n, d=disk: bytes(d[o : o + n]))


def test_false_clean_bits(model: GuestModel) -> None:
    first = done(model, "write", 0, data=A * 2)
    done(model, "trim", 5 * SECTOR, SECTOR + 1)
    now = model.timeline.now
    bitmap = DirtyBitmap(SIZE, 1024)
    assert model.false_clean(now, bitmap) == [0, 2048, 3072]
    assert model.false_clean(now, bitmap, since=first.begun) == [2048, 3072]
    assert model.expected_dirty(now, 1024) == {0, 2, 3}
    bitmap.set(0, 1)
    bitmap.set(5 * SECTOR, 1)
    assert model.false_clean(now, bitmap) == [3072]
    bitmap.set(6 * SECTOR, 1)
    assert model.false_clean(now, bitmap) == []


def test_requests_at_the_same_time_take_effect_in_any_order() -> None:
    """Nothing flushed: parts of one sector may come from each, whichever began first."""
    timeline = Timeline()
    model = GuestModel(timeline, SECTOR, bytes(SECTOR))
    whole = [
        model.begin("write", 0, data=bytes([letter]) * (256 + 64 * n)) for n, letter in enumerate(b"ABC")
    ]
    for op in whole:
        model.end(op)
    ((_, _, contents),) = model.permitted(timeline.now)

    def applied(order: str) -> bytes:
        content = bytes(SECTOR)
        for letter in order:
            op = whole["ABC".index(letter)]
            content = op.data + content[len(op.data) :]
        return content

    orders = ["".join(order) for n in range(4) for order in permutations("ABC", n)]
    assert set(contents) == {applied(order) for order in orders}
    later = model.begin("write", 0, data=b"D" * 100)
    model.end(later)
    ((_, _, contents),) = model.permitted(timeline.now)
    # After them all, but not flushed either.
    assert set(contents) == {
        done for order in orders for done in (applied(order), b"D" * 100 + applied(order)[100:])
    }
