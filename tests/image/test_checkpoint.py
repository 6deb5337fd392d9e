"""A checkpoint of several disks: on all, or on none, whatever fails."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdbm.errors import ImageError, LockedError
from nbdbm.image.bitmapedit import Add, Clear, Disable, edit_bitmaps
from nbdbm.image.blockfile import HostFile
from nbdbm.image.checkpoint import Checkpointed, CheckpointOptions, Outcome, checkpoint
from nbdbm.image.image import Image, OpenOptions
from tests.support import qcow2build
from tests.support.bitmapjudge import Seen, after_failure, agreed, sound, we_see
from tests.support.faults import FaultFile, FaultPlan
from tests.support.marks import requires
from tests.support.powercut import CrashState, PowerCutFile, Timeline
from tests.support.qcow2build import Bitmap
from tests.support.qemu import SYSTEM

GRANULARITY = 65536
DIRTY = [(0, GRANULARITY)]
MONDAY = Bitmap(b"monday", bits=b"\x01")


def disk(path: Path, *bitmaps: Bitmap, **fields: object) -> str:
    image = qcow2build.Image(cluster_bits=12, bitmaps=list(bitmaps), **fields)  # type: ignore[arg-type]
    path.write_bytes(image.build())
    return str(path)


@pytest.fixture
def disks(tmp_path: Path) -> list[str]:
    return [disk(tmp_path / f"vd{letter}.qcow2", MONDAY) for letter in "abc"]


def make(paths: Sequence[str], name: str = "tuesday", **options: object) -> list[Checkpointed]:
    return asyncio.run(checkpoint(paths, CheckpointOptions(name=name, **options)))  # type: ignore[arg-type]


def refused(paths: Sequence[str], name: str = "tuesday", **options: object) -> ImageError:
    before = [Path(path).read_bytes() for path in paths]
    with pytest.raises(ImageError) as caught:
        make(paths, name, **options)
    assert [Path(path).read_bytes() for path in paths] == before
    return caught.value


def outcomes(done: list[Checkpointed]) -> list[Outcome]:
    return [one.outcome for one in done]


def see(path: str) -> dict[str, Seen]:
    return we_see(Path(path))


OLD = {"monday": Seen(GRANULARITY, ("auto",), DIRTY)}
NEW = {"monday": Seen(GRANULARITY, (), DIRTY), "tuesday": Seen(4096, ("auto",), [])}


# -- what it does ------------------------------------------------------------------------------


def test_the_next_of_a_chain(disks: list[str]) -> None:
    assert outcomes(make(disks, disable="monday")) == [Outcome.ADDED] * 3
    assert [see(path) for path in disks] == [NEW] * 3
    make(disks, "wednesday", granularity=1 << 20)
    assert see(disks[1]) == NEW | {"wednesday": Seen(1 << 20, ("auto",), [])}


def test_clearing_begins_the_same_one_anew(disks: list[str], tmp_path: Path) -> None:
    disabled = disk(tmp_path / "idle.qcow2", Bitmap(b"monday", bits=b"\x01", flags=0))
    added = disk(tmp_path / "added.qcow2")
    done = make([*disks, disabled, added], "monday", clear=True)
    assert outcomes(done) == [Outcome.CLEARED] * 4 + [Outcome.ADDED]
    clean = {"monday": Seen(GRANULARITY, ("auto",), [])}
    assert [see(path) for path in [*disks, disabled]] == [clean] * 4
    assert see(added) == {"monday": Seen(4096, ("auto",), [])}


@requires("qemu-img", "qemu-io", "qemu-nbd", "libnbd")
def test_a_chain_with_qemu_in_between(tmp_path: Path) -> None:
    paths = [tmp_path / "a.qcow2", tmp_path / "b.qcow2"]
    for path in paths:
        SYSTEM.img("create", "-q", "-f", "qcow2", path, "1M")
    names = [str(path) for path in paths]
    make(names, "one")
    for path in paths:
        SYSTEM.io(path, "write 64k 64k")
    make(names, "two", disable="one")
    SYSTEM.io(paths[0], "write 512k 64k")
    make(names, "three", disable="two")
    one, empty = [(65536, 65536)], list[tuple[int, int]]()
    both = {"one": Seen(65536, (), one), "three": Seen(65536, ("auto",), empty)}
    assert agreed(paths[0]) == both | {"two": Seen(65536, (), [(524288, 65536)])}
    assert agreed(paths[1]) == both | {"two": Seen(65536, (), empty)}


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "options", "says"),
    [
        ([], {"disable": "monday"}, "bitmap 'monday': there is no such bitmap"),
        ([Bitmap(b"monday", flags=3)], {"disable": "monday"}, "inconsistent"),
        ([MONDAY, Bitmap(b"tuesday", bits=b"\x01")], {}, "exists already (recording, with 65536 dirty bytes"),
        ([MONDAY, Bitmap(b"tuesday", flags=0)], {}, "exists already (disabled, clean"),
        ([MONDAY, Bitmap(b"tuesday")], {"disable": "monday"}, "exists already (recording, clean"),
        (
            [MONDAY, Bitmap(b"tuesday")],
            {"granularity": 4096},
            "exists already (recording, clean, granularity 65536)",
        ),
        ([MONDAY, Bitmap(b"tuesday", flags=1)], {}, "inconsistent"),
        ([MONDAY, Bitmap(b"tuesday", flags=1)], {"clear": True}, "inconsistent"),
        ([MONDAY], {"granularity": 100}, "granularity is 100"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_disk_that_cannot_stops_all(
    last: list[Bitmap], options: dict[str, object], says: str, disks: list[str], tmp_path: Path
) -> None:
    odd = disk(tmp_path / "odd.qcow2", *last)
    if "granularity is" in says:
        odd = disks[0]
    error = refused([*disks, odd] if odd not in disks else disks, **options)
    assert error.path == odd and says in error.reason


def test_a_disk_that_cannot_be_opened(disks: list[str], tmp_path: Path) -> None:
    old = disk(tmp_path / "old.qcow2", version=2)
    assert refused([*disks, old]).path == old
    with pytest.raises(ImageError, match="No such file"):
        make([*disks, str(tmp_path / "none")])
    assert [see(path) for path in disks] == [OLD] * 3


def test_a_disk_that_is_in_use(disks: list[str]) -> None:
    async def main() -> None:
        held = await Image.open(disks[2], OpenOptions())
        with pytest.raises(LockedError) as caught:
            await checkpoint(disks, CheckpointOptions(name="tuesday"))
        assert caught.value.path == disks[2]
        await held.close()

    asyncio.run(main())
    assert [see(path) for path in disks] == [OLD] * 3


def test_a_disk_that_is_given_twice(disks: list[str], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(disks[0])
    assert "given twice" in str(refused([*disks, str(link)]))


# -- run again ---------------------------------------------------------------------------------


def test_run_again_after_some_have_it(disks: list[str]) -> None:
    make(disks[:2], disable="monday")
    kept = [Path(path).read_bytes() for path in disks[:2]]
    assert outcomes(make(disks, disable="monday")) == [Outcome.THERE, Outcome.THERE, Outcome.ADDED]
    assert [Path(path).read_bytes() for path in disks[:2]] == kept
    assert [see(path) for path in disks] == [NEW] * 3
    assert outcomes(make(disks, disable="monday")) == [Outcome.THERE] * 3


def test_not_after_the_machine_has_been_running(disks: list[str]) -> None:
    make(disks[:2], disable="monday")

    async def guest() -> None:
        image = await Image.open(disks[0], OpenOptions(read_only=False))
        await image.write(0, memoryview(b"x"))
        await image.close()

    asyncio.run(guest())
    error = refused(disks, disable="monday")
    assert error.path == disks[0] and "dirty" in error.reason


# -- failures ----------------------------------------------------------------------------------


class Bench:
    """The disks in memory, on one timeline."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.timeline = Timeline()
        self.files: dict[str, HostFile] = {
            path: PowerCutFile(self.timeline, Path(path).read_bytes(), path=path) for path in paths
        }

    def open(self, path: str, writable: bool) -> HostFile:
        file = self.files[path]
        assert isinstance(file, PowerCutFile)
        file.closed = False
        return file

    async def sees(self) -> list[dict[str, Seen]]:
        return [await sound(self.open(path, False)) for path in self.files]


CHAIN = CheckpointOptions(name="tuesday", disable="monday")


def test_power_failures(disks: list[str]) -> None:
    """Each disk has the old or the new state; run again, all have the new one."""

    async def complete(state: CrashState) -> None:
        files = dict(zip(disks, state.files, strict=True))

        def reopen(path: str, writable: bool) -> HostFile:
            files[path].closed = False
            return files[path]

        await checkpoint(disks, CHAIN, reopen)
        for number, path in enumerate(disks):
            reopen(path, False)
            assert await after_failure(state, number) == NEW

    async def main() -> None:
        bench = Bench(disks)
        await checkpoint(disks, CHAIN, bench.open)
        assert await bench.sees() == [NEW] * 3
        mixed = 0
        for state in bench.timeline.states(random=80, seed=3):
            found = [await after_failure(state, number) for number in range(len(disks))]
            assert all(one in (OLD, NEW) for one in found), str(state)
            # In order: the disks that have it are the first ones.
            assert found == sorted(found, key=lambda one: one == OLD)
            mixed += OLD in found and NEW in found
            await complete(state)
        assert mixed

    asyncio.run(main())


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failure_anywhere_leaves_all_or_none(
    number: int, disks: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)

    async def attempt(nth: int | None, faulty: str) -> FaultPlan:
        bench = Bench(disks)
        plan = FaultPlan(nth, errno=number)

        def open_file(path: str, writable: bool) -> HostFile:
            file = bench.open(path, writable)
            return FaultFile(file, plan) if path == faulty else file

        expected = NEW
        try:
            await checkpoint(disks, CHAIN, open_file)
        except ImageError as error:
            assert error.path == faulty and os.strerror(number) in str(error)
            assert "could not be switched back" not in str(error)
            expected = OLD
        assert await bench.sees() == [expected] * 3
        return plan

    async def main() -> None:
        for faulty in disks:
            total = (await attempt(None, faulty)).seen
            assert total >= 8
            for nth in range(total):
                assert (await attempt(nth, faulty)).failed

    asyncio.run(main())


def test_a_disk_that_dies_for_good(disks: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """The others are led back; the message names the one that could not be, if that is so."""
    caplog.set_level(logging.CRITICAL)

    async def attempt(nth: int) -> str:
        bench = Bench(disks)
        plan = FaultPlan(nth, sticky=True, short=False)

        def open_file(path: str, writable: bool) -> HostFile:
            file = bench.open(path, writable)
            return FaultFile(file, plan) if path == disks[1] else file

        says = ""
        try:
            await checkpoint(disks, CHAIN, open_file)
        except ImageError as error:
            says = str(error)
        found = await bench.sees()
        if says:
            assert found[0] == found[2] == OLD
            assert found[1] == OLD or disks[1] in says.partition("switched back")[2]
        else:
            assert found == [NEW] * 3
        return says

    async def main() -> None:
        said = [await attempt(nth) for nth in range(8)]
        assert any("could not be switched back" in says for says in said)
        assert not said[-1]

    asyncio.run(main())


def test_interrupted(disks: list[str]) -> None:
    """Cancelled at any moment: all or none."""

    async def attempt(turns: int) -> bool:
        bench = Bench(disks)
        task = asyncio.ensure_future(checkpoint(disks, CHAIN, bench.open))
        for _ in range(turns):
            await asyncio.sleep(0)
        ended = not task.cancel()
        await asyncio.wait((task,))
        assert await bench.sees() in ([OLD] * 3, [NEW] * 3)
        return ended

    async def main() -> None:
        turns = 1
        while not await attempt(turns):
            turns += 7
        assert turns > 90

    asyncio.run(main())


def test_the_parts_are_those_of_editing(disks: list[str]) -> None:
    """A checkpoint is what the operations would do to each disk by itself."""
    make(disks[:1], disable="monday")
    operations = [Add("tuesday"), Disable("monday"), Clear("tuesday")]
    asyncio.run(edit_bitmaps(disks[1], operations))
    assert see(disks[0]) == see(disks[1]) == NEW
