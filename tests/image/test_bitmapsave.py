"""IN_USE before the first write, and bits that are stored in one step; what QEMU reads of it."""

from __future__ import annotations

import asyncio
import errno
import logging
from pathlib import Path

import pytest

from nbdbm.bitmaps.tracker import BitmapState
from nbdbm.errors import ImageError
from nbdbm.image import bitmapsave
from nbdbm.image.image import Image, OpenOptions
from tests.image.bitmapbench import BITMAPS, CLUSTER, MIB, WRITING, Bench, built
from tests.support import qcow2build
from tests.support.bitmapjudge import Seen, agreed, assert_clean, qemu_sees, seen_in, sound, we_see
from tests.support.faults import CHANGING, FaultPlan
from tests.support.marks import requires
from tests.support.powercut import PowerCutFile, Timeline
from tests.support.qcow2build import AUTO, IN_USE, Bitmap
from tests.support.qemu import SYSTEM

needs_qemu = requires("qemu-img", "qemu-io", "qemu-nbd", "libnbd")


# -- arm ---------------------------------------------------------------------------------------


def test_arming_changes_nothing_but_flags() -> None:
    async def main() -> None:
        bench = Bench(built(*BITMAPS))
        entries = bench.entries()
        image = await bench.open()
        changed = bench.changed()
        assert changed == [entries[name] + 15 for name in (b"recording", b"idle", b"coarse")]
        assert [bench.file.data[at] for at in changed] == [IN_USE | AUTO, IN_USE, IN_USE | AUTO]
        # Each flags field is a write of its own, in one sector, and all of them are synced.
        assert [(op.kind, op.length) for op in bench.timeline.ops] == [("write", 4)] * 3 + [("sync", 0)]
        assert all(op.offset // 512 == (op.offset + 3) // 512 for op in bench.writes())
        states = {b.name: b.state for b in image.tracker}
        assert states.pop("torn") is BitmapState.INCONSISTENT
        assert set(states.values()) == {BitmapState.IN_USE}
        await image.close()

    asyncio.run(main())


@pytest.mark.parametrize("bitmaps", [[], [Bitmap(b"torn", flags=IN_USE)]], ids=["none", "inconsistent"])
def test_nothing_is_written_when_no_bitmap_changes_state(bitmaps: list[Bitmap]) -> None:
    async def main() -> None:
        bench = Bench(built(*bitmaps))
        image = await bench.open()
        assert not bench.timeline.ops
        await image.close()
        assert not bench.writes()
        assert bytes(bench.file.data) == bench.before

    asyncio.run(main())


def test_a_bitmap_that_is_refused_must_not_go_on_claiming() -> None:
    async def main() -> None:
        bench = Bench(built(Bitmap(b"odd", type=7), Bitmap(b"good")))
        odd = bench.entry(b"odd")
        image = await bench.open()
        await image.write(0, memoryview(b"x"))
        await image.close()
        assert bench.entry(b"odd") == odd[:15] + bytes((odd[15] | IN_USE,)) + odd[16:]
        assert (await sound(bench.file))["good"] == Seen(65536, ("auto",), [(0, 65536)])

    asyncio.run(main())


def test_bitmaps_that_cannot_be_found_are_given_up() -> None:
    async def main() -> None:
        bench = Bench(built(Bitmap(b"a"), nb_bitmaps=3))
        image = await bench.open()
        # Durable before any write can happen.
        assert bench.timeline.ops[-1].kind == "sync"
        assert qcow2build.get_field(bench.file.data, "autoclear_features") == 0
        await image.close()

    asyncio.run(main())


def test_a_failure_to_arm_is_a_failure_to_open() -> None:
    async def attempt(nth: int) -> None:
        bench = Bench(built(*BITMAPS))
        with pytest.raises(ImageError, match=r"cannot be opened for writing|sync"):
            await bench.open(FaultPlan(nth))
        # Some may have the flag by now. None has it for no reason, and nothing else has changed.
        entries = bench.entries().values()
        assert set(bench.changed()) <= {at + 15 for at in entries}

    async def main() -> None:
        for nth in range(4):
            await attempt(nth)

    logging.disable(logging.CRITICAL)
    try:
        asyncio.run(main())
    finally:
        logging.disable(logging.NOTSET)


# -- store -------------------------------------------------------------------------------------


async def session(bench: Bench, *ranges: tuple[int, int], plan: FaultPlan | None = None) -> None:
    """Open, write, close."""
    image = await bench.open(plan)
    for offset, length in ranges:
        await image.write(offset, memoryview(b"\x5a" * length))
    await image.close()


def test_a_session_without_writes_takes_the_flags_off_in_place() -> None:
    async def main() -> None:
        bench = Bench(built(*BITMAPS))
        await session(bench)
        assert bytes(bench.file.data) == bench.before
        assert all(op.length == 4 for op in bench.writes())

    asyncio.run(main())


def test_inconsistent_entries_stay_as_they_are_and_autoclear_stays_set() -> None:
    async def main() -> None:
        bench = Bench(built(*BITMAPS))
        torn, table = bench.entry(b"torn"), bench.table(b"torn")
        data = bytes(bench.file.data[table[0] : table[0] + CLUSTER])
        await session(bench, (8192, 1), (500_000, 70_000))
        assert bench.entry(b"torn") == torn
        assert bytes(bench.file.data[table[0] : table[0] + CLUSTER]) == data
        found = await sound(bench.file)
        assert found["recording"].dirty == [(0, 12288), (499712, 573440 - 499712)]
        assert found["coarse"].dirty == [(0, 65536), (458752, 131072)]
        assert found["idle"].dirty == [(0, 65536)]
        assert found["torn"] == Seen(65536, ("auto", "in-use"), None)
        for state in bench.timeline.states(random=60, seed=1):
            assert qcow2build.get_field(state.files[0].read(0, 512), "autoclear_features") == 1

    asyncio.run(main())


def test_what_has_not_changed_stays_where_it_is() -> None:
    async def main() -> None:
        bench = Bench(built(*BITMAPS))
        idle, table = bench.entry(b"idle"), bench.table(b"idle")
        await session(bench, (8192, 1))
        assert (bench.entry(b"idle"), bench.table(b"idle")) == (idle, table)

    asyncio.run(main())


def test_clusters_of_zeroes_and_of_ones_are_no_clusters() -> None:
    async def main() -> None:
        # 512 byte granules: 2 MiB of disk in 512 bytes of bits, one cluster of them.
        size = 8 * MIB
        bench = Bench(built(Bitmap(b"fine", granularity_bits=9), size=size, cluster_bits=9))
        image = await bench.open()
        await image.write_zeroes(2 * MIB, 2 * MIB)
        await image.write(4 * MIB, memoryview(b"x"))
        await image.close()
        none, full, some, last = bench.table(b"fine")
        assert (none, full, last) == (0, 1, 0) and some % 512 == 0 and some
        assert (await sound(bench.file))["fine"].dirty == [(2 * MIB, 2 * MIB + 512)]
        # All of it dirty, then none of it: no cluster of bits at all.
        image = await bench.open()
        await image.write_zeroes(0, size)
        await image.close()
        assert bench.table(b"fine") == (1, 1, 1, 1)

    asyncio.run(main())


@needs_qemu
def test_qemu_reads_what_we_store(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(built(*BITMAPS))

    async def write(offset: int, length: int) -> None:
        image = await Image.open(str(path), WRITING)
        await image.write(offset, memoryview(b"\x5a" * length))
        await image.close()

    asyncio.run(write(100_000, 1))
    assert agreed(path)["recording"].dirty == [(0, 8192), (98304, 4096)]
    SYSTEM.io(path, "write 200k 4k", "write -z 1020k 1k")
    asyncio.run(write(MIB - 1, 1))
    found = agreed(path)
    assert found["recording"].dirty == [(0, 8192), (98304, 4096), (204800, 4096), (1044480, 4096)]
    assert found["coarse"].dirty == [(65536, 65536), (196608, 65536), (983040, 65536)]
    assert found["torn"].dirty is None and found["idle"].dirty == [(0, 65536)]


@needs_qemu
def test_ones_that_we_store_are_read_by_qemu(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    size = 64 * MIB
    path.write_bytes(built(Bitmap(b"fine", granularity_bits=9), size=size, cluster_bits=12))

    async def main() -> None:
        image = await Image.open(str(path), WRITING)
        await image.write_zeroes(0, size - 512)
        await image.close()

    asyncio.run(main())
    table = Bench(path.read_bytes()).table(b"fine")
    assert table[:-1] == (1, 1, 1) and table[-1] > 1
    assert agreed(path)["fine"].dirty == [(0, size - 512)]
    # QEMU stores them in its own way; we read that.
    SYSTEM.io(path, f"write {size - 512} 512")
    assert agreed(path)["fine"].dirty == [(0, size)]


def test_of_blank_clusters_only_what_is_not_zero_is_written() -> None:
    async def main() -> None:
        # One cluster of bits tells of 16 MiB.
        bench = Bench(built(Bitmap(b"fine", granularity_bits=9), size=64 * MIB))
        place, end = 24 * MIB, len(bench.before)
        await session(bench, (place, 1024), (place + 8192, 512))
        _, bits, *_ = bench.table(b"fine")
        assert bits >= end
        inside = [op for op in bench.writes() if bits <= op.offset < bits + CLUSTER]
        assert [(op.offset - bits, op.length) for op in inside] == [(CLUSTER // 2, 3)]
        assert len(bench.file.data) >= bits + CLUSTER
        assert (await sound(bench.file))["fine"].dirty == [(place, 1024), (place + 8192, 512)]

    asyncio.run(main())


def test_clusters_that_are_used_again_keep_nothing_of_what_they_held() -> None:
    async def main() -> None:
        bench = Bench(built(Bitmap(b"fine", granularity_bits=9), size=64 * MIB))
        expected: list[tuple[int, int]] = []
        held = again = 0
        freed: set[int] = set()
        for place in range(24 * MIB, 32 * MIB, MIB):
            image = await bench.open()
            await image.write_zeroes(place, 512)
            await image.close()
            expected.append((place, 512))
            _, bits, *_ = bench.table(b"fine")
            again += bits in freed
            assert (await sound(bench.file))["fine"].dirty == expected
            if held:
                # Free since this session, and full of ones.
                bench.file.data[held : held + CLUSTER] = b"\xff" * CLUSTER
                freed.add(held)
            held = bits
        assert again

    asyncio.run(main())


def test_the_file_ends_behind_its_last_cluster_of_bits() -> None:
    async def main() -> None:
        bench = Bench(built(size=64 * MIB))
        image = await bench.open()
        assert image._metadata is not None
        new = bitmapsave._Clusters(image._metadata)
        place = await new.write_bits(bytes(100) + b"\x10" + bytes(20))
        assert len(bench.file.data) == place + 101
        await new.finish()
        assert len(bench.file.data) == place + CLUSTER
        assert bench.file.data[place:] == bytes(100) + b"\x10" + bytes(CLUSTER - 101)
        await new.give_back()
        await image.close()

    asyncio.run(main())


def test_the_refcount_table_may_have_moved() -> None:
    async def main() -> None:
        # The table's one cluster describes 64 * 64 clusters of 512 bytes, most of which are taken.
        clusters: dict[int, bytes | int] = {n: bytes(512) for n in range(3960)}
        bitmaps = [Bitmap(b"a", granularity_bits=12)]
        bench = Bench(built(*bitmaps, size=4 * MIB, cluster_bits=9, refcount_order=6, clusters=clusters))
        before = qcow2build.get_field(bench.file.data, "refcount_table_offset")
        await session(bench, (3 * MIB, 65536))
        assert qcow2build.get_field(bench.file.data, "refcount_table_offset") != before
        assert (await sound(bench.file))["a"].dirty == [(3 * MIB, 65536)]

    asyncio.run(main())


# -- failures ----------------------------------------------------------------------------------


def test_power_failures() -> None:
    """Whatever is left: a bitmap that claims to be true has not missed a write, and none gets lost."""

    async def main() -> None:
        bench = Bench(built(*BITMAPS))
        image = await bench.open()
        armed = bench.timeline.now
        old = {b.name: b.granularity for b in image.tracker}
        await image.write(8192, memoryview(b"x"))
        await image.flush()
        await image.write(500_000, memoryview(b"y" * 70_000))
        await image.close()
        stored = bench.timeline.now
        final = await sound(bench.file)
        first = await sound(PowerCutFile(Timeline(), bench.before))
        consistent = set()
        for state in bench.timeline.states(random=500, seed=2):
            found = await sound(state.files[0])
            assert {name: seen.granularity for name, seen in found.items()} == old
            assert found["torn"] == final["torn"]
            for name in ("recording", "coarse", "idle"):
                if "in-use" in found[name].flags:
                    assert state.tick < stored
                    continue
                # Before it was armed, or after it was stored: never in between.
                assert found[name] in (final[name], first[name])
                if found[name] != final[name]:
                    assert state.tick <= armed
                consistent.add((name, state.tick <= armed))
        assert len(consistent) == 6

    asyncio.run(main())


@needs_qemu
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_when_storing_fails_the_bitmaps_stay_in_use(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    path = tmp_path / "disk.qcow2"
    left: list[bytes] = []

    async def attempt(nth: int | None) -> FaultPlan:
        bench = Bench(built(*BITMAPS))
        plan = FaultPlan(None, errno=number)
        image = await bench.open(plan)
        await image.write(8192, memoryview(b"x"))
        await image.write(500_000, memoryview(b"y" * 70_000))
        await image.flush()
        plan.seen, plan.nth = 0, nth
        failed = False
        try:
            await image.close()
        except (OSError, ImageError) as error:
            failed = True
            assert error.errno == number
        bench.file.closed = False
        found = await sound(bench.file)
        names = ("recording", "coarse")
        kept = ["in-use" in found[name].flags for name in names]
        assert kept in ([True, True], [False, False])
        if not kept[0]:
            assert found["recording"].dirty == [(0, 12288), (499712, 573440 - 499712)]
        assert failed or not kept[0]
        assert found["torn"].flags == ("auto", "in-use")
        left.append(bytes(bench.file.data))
        # The data is there, whatever becomes of the bitmaps.
        image = await bench.open()
        view = bytearray(70_000)
        await image.read_into(memoryview(view), 500_000)
        assert view == b"y" * 70_000
        await image.close()
        return plan

    async def main() -> None:
        total = (await attempt(None)).seen
        assert total >= 10
        for nth in range(total):
            assert (await attempt(nth)).failed

    asyncio.run(main())
    for data in left[::4]:
        path.write_bytes(data)
        SYSTEM.img("check", "-q", "-r", "leaks", path)
        assert qemu_sees(path) == we_see(path)


@pytest.mark.parametrize("kinds", [CHANGING, {"sync"}], ids=["any", "syncs"])
def test_what_was_not_flushed_is_safe_or_said_to_be_lost(
    kinds: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever fails in closing: unless it is said, nothing is lost by a power failure right after that."""
    caplog.set_level(logging.CRITICAL)
    content = b"y" * 70_000

    async def attempt(nth: int | None) -> tuple[FaultPlan, str]:
        bench = Bench(built(*BITMAPS))
        plan = FaultPlan(None, kinds)
        image = await bench.open(plan)
        await image.write(500_000, memoryview(content))
        plan.seen, plan.nth = 0, nth
        said = ""
        try:
            await image.close()
        except (OSError, ImageError) as error:
            said = str(error)
        end = bench.timeline.mark()
        if "what was written since the last flush" in said:
            return plan, "lost"
        assert not said or "the data is safe" in said
        for state in bench.timeline.states(random=6, seed=nth or 0, window=(end, end)):
            file = state.files[0]
            image = await Image.open(file.path, OpenOptions(), lambda path, writable, file=file: file)
            view = bytearray(len(content))
            await image.read_into(memoryview(view), 500_000)
            assert view == content, said
            await image.close()
        return plan, "safe" if said else "told nothing"

    async def main() -> None:
        total = (await attempt(None))[0].seen
        outcomes = {(await attempt(nth))[1] for nth in range(total)}
        assert outcomes == {"lost", "safe", "told nothing"}

    asyncio.run(main())


@needs_qemu
def test_new_bitmaps_are_stored_and_removed_ones_are_gone(tmp_path: Path) -> None:
    """What is done to the tracker while the image is open for writing is in the directory in the end."""

    async def main() -> None:
        bench = Bench(built(*BITMAPS))
        image = await bench.open()
        image.tracker.add("late", 4096)
        await image.write(0, memoryview(b"x"))
        image.tracker.remove("coarse")
        image.tracker.disable("recording")
        await image.write(65536, memoryview(b"x"))
        await image.close()
        found = await sound(bench.file)
        assert list(found) == ["recording", "torn", "idle", "late"]
        assert found["late"] == Seen(4096, ("auto",), [(0, 4096), (65536, 4096)])
        assert found["recording"] == Seen(4096, (), [(0, 8192)])
        path = tmp_path / "disk.qcow2"
        path.write_bytes(bench.file.data)
        assert_clean(path)

    asyncio.run(main())


def test_the_engine_shows_the_same_open_as_closed() -> None:
    async def main() -> None:
        bench = Bench(built(Bitmap(b"only", granularity_bits=12)))
        image = await bench.open()
        await image.write(4096, memoryview(b"x"))
        shown = await seen_in(image)
        await image.close()
        assert await sound(bench.file) == shown

    asyncio.run(main())
