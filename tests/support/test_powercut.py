"""The power-cut harness, proved on a file whose states can be counted by hand, and on a toy journal."""

from __future__ import annotations

import asyncio
import random
import struct
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.guestmodel import GuestModel
from tests.support.powercut import GARBAGE, SECTOR, CrashState, PowerCutFile, Scratch, Timeline

A, B, C, D = (bytes([letter]) * SECTOR for letter in b"ABCD")


def record(run: Callable[[PowerCutFile], Awaitable[None]], data: bytes = b"") -> Timeline:
    timeline = Timeline()
    asyncio.run(run(PowerCutFile(timeline, data)))  # type: ignore[arg-type]
    return timeline


def images(timeline: Timeline, **options: object) -> set[bytes]:
    """The distinct contents of the first file over all crash states."""
    options = options or {"exhaustive": True}
    return {state.files[0].to_bytes() for state in timeline.states(**options)}  # type: ignore[arg-type]


# -- the states themselves --------------------------------------------------------------------


def test_unsynced_writes_arrive_in_any_combination() -> None:
    async def run(file: PowerCutFile) -> None:
        await file.pwrite(0, A)
        await file.pwrite(SECTOR, B)

    zero = bytes(SECTOR)
    assert images(record(run, zero * 2)) == {zero * 2, A + zero, zero + B, A + B}


def test_a_write_is_torn_at_sectors() -> None:
    async def run(file: PowerCutFile) -> None:
        await file.pwrite(SECTOR // 2, A[: SECTOR // 2] + B + C[:100])

    old = bytes(3 * SECTOR)
    pieces = [(256, A[:256]), (512, B), (1024, C[:100])]
    expected = set()
    for subset in range(8):
        image = bytearray(old)
        for bit, (offset, data) in enumerate(pieces):
            if subset >> bit & 1:
                image[offset : offset + len(data)] = data
        expected.add(bytes(image))
    assert images(record(run, old)) == expected


def test_a_sync_makes_what_had_ended_certain() -> None:
    async def run(file: PowerCutFile) -> None:
        await file.pwrite(0, A)
        await file.sync()
        await file.pwrite(0, B)

    timeline = record(run, bytes(SECTOR))
    assert images(timeline) == {bytes(SECTOR), A, B}
    late = [s.files[0].to_bytes() for s in timeline.states(exhaustive=True) if s.tick == timeline.now]
    assert set(late) == {A, B}
    assert images(timeline, exhaustive=True, dropped={0}) == {bytes(SECTOR), A, B}
    dropped = timeline.states(exhaustive=True, dropped={0})
    assert bytes(SECTOR) in {s.files[0].to_bytes() for s in dropped if s.tick == timeline.now}


def test_a_sync_says_nothing_about_what_was_under_way() -> None:
    async def run(file: PowerCutFile) -> None:
        await file.pwrite(SECTOR, B)
        # Begun before the sync, ended after the sync began: nothing is promised.
        await asyncio.gather(file.pwrite(0, A), file.sync())

    timeline = record(run, bytes(SECTOR) + B)
    _, write, sync = timeline.ops
    assert write.begun < sync.begun < write.ended
    assert {s.files[0].to_bytes() for s in timeline.states(exhaustive=True) if s.tick == timeline.now} == {
        bytes(SECTOR) + B,
        A + B,
    }


def test_a_sync_with_nothing_to_do_is_not_recorded() -> None:
    async def run(file: PowerCutFile) -> None:
        await file.sync()
        await file.pwrite(0, A)
        await file.sync()
        await file.sync()
        await file.zero(0, SECTOR, punch=False)
        await file.sync()

    timeline = record(run, bytes(SECTOR))
    assert [op.kind for op in timeline.ops] == ["write", "sync", "zero", "sync"]


def test_a_sync_covers_its_own_file_only() -> None:
    timeline = Timeline()
    one, two = PowerCutFile(timeline, bytes(SECTOR)), PowerCutFile(timeline, bytes(SECTOR))

    async def run() -> None:
        await one.pwrite(0, A)
        await two.pwrite(0, B)
        await one.sync()

    asyncio.run(run())
    late = [s for s in timeline.states(exhaustive=True) if s.tick == timeline.now]
    assert {tuple(f.to_bytes() for f in s.files) for s in late} == {(A, bytes(SECTOR)), (A, B)}


def test_later_writes_to_the_same_sector_win() -> None:
    async def run(file: PowerCutFile) -> None:
        await file.pwrite(0, A)
        await file.pwrite(0, B)

    assert images(record(run, C)) == {A, B, C}


def test_lengths() -> None:
    async def run(file: PowerCutFile) -> None:
        await file.pwrite(2 * SECTOR, A)
        await file.sync()
        await file.truncate(SECTOR)
        await file.truncate(3 * SECTOR)

    timeline = record(run, B)
    # What a truncate cut off is never seen again, even if a later one makes room for it.
    assert images(timeline) == {
        B,
        B + bytes(SECTOR) + A,
        B + bytes(2 * SECTOR),
    }


def test_an_extending_write_may_leave_its_length_only() -> None:
    async def run(file: PowerCutFile) -> None:
        await file.pwrite(SECTOR, A)

    assert images(record(run, B), random=200, seed=1) == {B, B + A, B + bytes(SECTOR)}


def test_a_cut_inside_a_sector() -> None:
    async def run(file: PowerCutFile) -> None:
        await file.truncate(100)
        await file.pwrite(200, b"x")

    assert images(record(run, A)) == {
        A,
        A[:100],
        A[:200] + b"x" + A[201:],
        A[:100] + bytes(100) + b"x",
    }


def test_zeroes_and_discards() -> None:
    async def run(file: PowerCutFile) -> None:
        await file.zero(0, SECTOR, punch=True)
        await file.discard(SECTOR, SECTOR)
        assert file.data == bytes(SECTOR) + GARBAGE

    timeline = record(run, A + B)
    zero = bytes(SECTOR)
    assert images(timeline) == {a + b for a in (A, zero) for b in (B, GARBAGE)}
    assert images(timeline, random=300, seed=2) == {a + b for a in (A, zero) for b in (B, zero, GARBAGE)}


def test_a_punched_hole_is_the_old_or_zeroes() -> None:
    timeline = Timeline(garbage=False)
    file = PowerCutFile(timeline, A)
    asyncio.run(file.discard(0, SECTOR))
    assert file.data == bytes(SECTOR)
    assert images(timeline) == images(timeline, random=100, seed=1) == {A, bytes(SECTOR)}


def test_a_write_that_does_not_wait_is_recorded() -> None:
    timeline = Timeline()
    file = PowerCutFile(timeline, A)
    assert file.try_pwrite(0, memoryview(B)) and file.data == B
    assert images(timeline) == {A, B}


def test_a_crash_state_can_be_written_to_without_harm_to_the_next() -> None:
    async def run(file: PowerCutFile) -> None:
        await file.pwrite(0, A)

    async def scribble(state: CrashState) -> None:
        (file,) = state.files
        before = await file.pread(0, 2 * SECTOR)
        await file.pwrite(100, b"scribble")
        await file.zero(SECTOR, 10, punch=False)
        await file.truncate(5 * SECTOR)
        assert await file.pread(100, 8) == b"scribble" and file.size == 5 * SECTOR
        view = bytearray(4)
        assert file.try_pread_into(memoryview(view), 0) and view == before[:4]

    timeline = record(run, C + D)
    found = set()
    for state in timeline.states(exhaustive=True):
        found.add(state.files[0].to_bytes())
        asyncio.run(scribble(state))
    assert found == {C + D, A + D}


def test_a_file_takes_on_one_state_after_the_other(tmp_path: Path) -> None:
    rng = random.Random(5)

    async def run(file: PowerCutFile) -> None:
        for _ in range(60):
            offset, length = rng.randrange(20000), rng.randrange(1, 3000)
            match rng.randrange(6):
                case 0:
                    await file.sync()
                case 1:
                    await file.truncate(offset)
                case 2:
                    await file.zero(offset, length, punch=False)
                case 3:
                    await file.discard(offset, length)
                case _:
                    await file.pwrite(offset, rng.randbytes(length))

    timeline = record(run, rng.randbytes(9999))
    scratch = Scratch(tmp_path / "state")
    for state in timeline.states(random=300, seed=3):
        if rng.random() < 0.3:
            state.files[0].put(rng.randrange(15000), b"changed afterwards")
        assert scratch.show(state.files[0]).read_bytes() == state.files[0].to_bytes()


def test_random_states_are_all_among_the_exhaustive_ones() -> None:
    async def run(file: PowerCutFile) -> None:
        await file.pwrite(0, A + B)
        await file.sync()
        await file.pwrite(SECTOR, C + D)
        await file.pwrite(0, D)

    timeline = record(run, bytes(4 * SECTOR))
    every = images(timeline)
    assert images(timeline, random=3000, seed=4) == every


def test_the_same_seed_draws_the_same_states() -> None:
    async def run(file: PowerCutFile) -> None:
        for at in range(8):
            await file.pwrite(at * 4096, bytes([at]) * 4096)

    timeline = record(run, bytes(32768))
    one, two = ([str(s) for s in timeline.states(random=50, seed=9)] for _ in range(2))
    assert one == two and len(set(one)) > 25
    assert one[25:] != [str(s) for s in timeline.states(random=50, seed=10)][25:]


def test_a_search_without_end_is_refused() -> None:
    async def run(file: PowerCutFile) -> None:
        for at in range(17):
            await file.pwrite(at * SECTOR, A)

    with pytest.raises(ValueError, match="131072 states at tick"):
        next(record(run).states(exhaustive=True))


def test_states_are_described() -> None:
    async def run(file: PowerCutFile) -> None:
        await file.pwrite(0, A + B + C)

    texts = {str(state).splitlines()[-1].split(": ")[1] for state in record(run).states(exhaustive=True)}
    assert {"lost", "arrived", "sectors 0,2", "sectors 1-2"} <= texts


def test_thousands_of_states_of_a_large_image_are_cheap() -> None:
    async def run(file: PowerCutFile) -> None:
        rng = random.Random(1)
        for turn in range(200):
            await file.pwrite(rng.randrange(1 << 23), rng.randbytes(4096))
            if turn % 10 == 9:
                await file.sync()

    timeline = record(run, bytes(1 << 23))
    count = 0
    for state in timeline.states(random=3000, seed=6):
        count += len(state.files[0].sectors) < 200
    assert count == 3000


# -- a toy journal: where every barrier is needed ----------------------------------------------


class Journal:
    """Two sectors that change together. Sector 0: header (sequence, checksum); 1 and 2: the journal's
    copies; 3 and 4: their home. ``careless`` names a barrier that is left out.

        write copies, SYNC, header says valid, SYNC, write home, SYNC, header says empty, SYNC
    """

    HEADER = struct.Struct(">4sII")

    def __init__(self, file: PowerCutFile) -> None:
        self.file = file

    async def put(self, one: bytes, two: bytes, sequence: int) -> None:
        copies = one + two
        await self.file.pwrite(SECTOR, copies)
        await self.file.sync()
        await self.file.pwrite(0, self.HEADER.pack(b"full", sequence, 0))
        await self.file.sync()
        await self.file.pwrite(3 * SECTOR, copies)
        await self.file.sync()
        await self.file.pwrite(0, self.HEADER.pack(b"none", sequence, 0))
        await self.file.sync()

    @classmethod
    def recover(cls, read: Callable[[int, int], bytes]) -> bytes:
        state, _, _ = cls.HEADER.unpack(read(0, cls.HEADER.size))
        return read(SECTOR if state == b"full" else 3 * SECTOR, 2 * SECTOR)


def journal_run() -> tuple[Timeline, GuestModel]:
    timeline = Timeline()
    file = PowerCutFile(timeline, Journal.HEADER.pack(b"none", 0, 0).ljust(5 * SECTOR, b"\0"))
    model = GuestModel(timeline, 2 * SECTOR)

    async def run() -> None:
        journal = Journal(file)
        for sequence, (one, two) in enumerate(((A, B), (C, D)), 1):
            op = model.begin("write", 0, data=one + two, fua=True)
            await journal.put(one, two, sequence)
            model.end(op)

    asyncio.run(run())
    return timeline, model


def journal_verdict(timeline: Timeline, model: GuestModel, **options: object) -> int:
    """How many states break a promise: content, or that both sectors change together."""
    bad = 0
    for state in timeline.states(**options):  # type: ignore[arg-type]
        content = Journal.recover(state.files[0].read)

        def read(offset: int, length: int, content: bytes = content) -> bytes:
            return content[offset : offset + length]

        together = content in (bytes(2 * SECTOR), A + B, C + D)
        bad += bool(model.content_violations(state.tick, read)) or not together
    return bad


@pytest.mark.parametrize("options", [{"exhaustive": True}, {"random": 2000, "seed": 11}])
def test_the_journal_holds(options: dict[str, object]) -> None:
    assert journal_verdict(*journal_run(), **options) == 0


@pytest.mark.parametrize("dropped", range(8))
def test_each_missing_barrier_of_the_journal_is_noticed(dropped: int) -> None:
    timeline, model = journal_run()
    assert len(timeline.syncs) == 8
    exhaustive = journal_verdict(timeline, model, exhaustive=True, dropped={dropped})
    drawn = journal_verdict(timeline, model, random=2000, seed=12, dropped={dropped})
    # The very last one protects nothing: full and home say the same, and nothing comes after.
    assert (exhaustive > 0) == (drawn > 0) == (dropped != 7)


@pytest.mark.parametrize("dropped", [None, 0, 1])
def test_an_external_file_needs_its_own_barrier(dropped: int | None) -> None:
    """Data in one file, the flag that exposes it in another: the flag's sync does not cover the data."""
    timeline = Timeline()
    meta = PowerCutFile(timeline, bytes(SECTOR), path="meta")
    data = PowerCutFile(timeline, b"?" * SECTOR, path="data")
    model = GuestModel(timeline, SECTOR)

    async def run() -> None:
        op = model.begin("write", 0, data=A, fua=True)
        await data.pwrite(0, A)
        await data.sync()
        await meta.pwrite(0, b"\1")
        await meta.sync()
        model.end(op)

    asyncio.run(run())
    bad = 0
    for state in timeline.states(exhaustive=True, dropped=() if dropped is None else {dropped}):
        meta_now, data_now = state.files
        assert (meta_now.path, data_now.path) == ("meta", "data")
        content = data_now.to_bytes() if meta_now.to_bytes()[0] else bytes(SECTOR)
        bad += bool(model.content_violations(state.tick, lambda o, n, c=content: c[o : o + n]))
    assert (bad > 0) == (dropped is not None)


def test_a_checksum_needs_no_barrier() -> None:
    """The harness does not cry wolf: an order that a checksum makes unimportant passes without syncs."""
    timeline = Timeline()
    file = PowerCutFile(timeline, bytes(2 * SECTOR))
    model = GuestModel(timeline, SECTOR)

    async def run() -> None:
        op = model.begin("write", 0, data=A, fua=True)
        await file.pwrite(SECTOR, A)
        await file.pwrite(0, zlib.crc32(A).to_bytes(4, "big"))
        await file.sync()
        model.end(op)

    asyncio.run(run())
    for state in timeline.states(exhaustive=True):
        raw = state.files[0].to_bytes()
        valid = zlib.crc32(raw[SECTOR:]).to_bytes(4, "big") == raw[:4]
        content = raw[SECTOR:] if valid else bytes(SECTOR)
        assert not model.content_violations(state.tick, lambda o, n, c=content: c[o : o + n])


def test_random_states_of_a_window() -> None:
    async def run(file: PowerCutFile) -> None:
        for number in range(8):
            await file.pwrite(number * SECTOR, A)

    timeline = record(run, b"")
    ticks = {state.tick for state in timeline.states(random=50, window=(5, 9))}
    assert ticks <= set(range(5, 10)) and len(ticks) > 3
