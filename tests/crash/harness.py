"""Running a workload on recorded files, and judging what power failures leave of it."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pytest import MonkeyPatch

from nbdbm.errors import ImageError
from nbdbm.image.blockfile import HostFile, ThreadedFile
from nbdbm.image.check import check
from nbdbm.image.image import Image, OpenOptions
from tests.crash.scenarios import BACKING, DATA_FILE, SNAPSHOT, Action, Kind, Workload
from tests.support.crashfile import NEVER, Base, CrashFile, Scratch
from tests.support.guestmodel import GuestModel
from tests.support.powercut import CrashState, PowerCutFile, Timeline
from tests.support.qemu import SYSTEM, run

CLEAN = (0, 3)
"""Exit statuses of qemu-img check: no errors, leaks only."""

TALLY = Counter[str]()
"""How many states have been judged, for the summary at the end."""

ROUND = 40
"""States that are drawn at a time when one bad state is looked for."""

T = TypeVar("T")


def drive(work: Coroutine[object, object, T]) -> T:
    """``asyncio.run`` without the suite's debug mode, which makes a state three times as dear."""
    return asyncio.run(work, debug=False)


@dataclass
class Recording:
    """One run: the timeline, what the guest did, and where the files belong."""

    kind: Kind
    timeline: Timeline
    model: GuestModel
    files: list[PowerCutFile]
    failures: list[str] = field(default_factory=list)
    """Requests that were answered with an error, with the error."""
    closed: list[tuple[int, int]] = field(default_factory=list)
    """Ticks (first, last) between which the image was closed."""
    leaky: bool = False
    """Clusters may be leaked even while it is closed."""

    async def open(self, files: Iterable[HostFile], *, read_only: bool, snapshot: str | None = None) -> Image:
        """The image in ``files``, which are this recording's or stand for them."""
        options = OpenOptions(read_only=read_only, format=self.kind.format, snapshot=snapshot)
        return await Image.open(self.files[0].path, options, opener(files))

    def now(self) -> CrashState:
        """What there is without a power failure."""
        files = [
            CrashFile(Base(bytes(file.data), garbage=self.timeline.garbage), file.path) for file in self.files
        ]
        return CrashState(self.timeline.now, files, [], [])

    def states(self, **options: object) -> Iterator[CrashState]:
        """Crash states, see ``Timeline.states``."""
        return self.timeline.states(**options)  # type: ignore[arg-type]


def opener(files: Iterable[HostFile]) -> Callable[[str, bool], HostFile]:
    """Opens ``files`` by their names, and everything else (backing files) on the host."""
    known = {os.path.basename(file.path): file for file in files}

    def open_file(path: str, writable: bool) -> HostFile:
        file = known.get(os.path.basename(path))
        return ThreadedFile.open(path, writable=writable) if file is None else file

    return open_file


def load(kind: Kind, place: Path, *, seed: int | None = None) -> Recording:
    """Recorded files with the content of the image that ``kind.make`` made in ``place``."""
    # A raw disk shows what the host makes of a trim; holes, here. In qcow2 what is trimmed is unmapped.
    timeline = Timeline(garbage=kind.format != "raw")
    rng = None if seed is None else random.Random(seed)
    names = [kind.file_name, DATA_FILE] if kind.data_file else [kind.file_name]
    files = [
        PowerCutFile(timeline, (place / name).read_bytes(), path=str(place / name), rng=rng) for name in names
    ]
    return Recording(kind, timeline, GuestModel(timeline, kind.size, kind.content()), files)


async def perform(image: Image, action: Action) -> None:
    """One request."""
    match action.kind:
        case "write":
            await image.write(action.offset, memoryview(action.data), fua=action.fua)
        case "zeroes":
            await image.write_zeroes(action.offset, action.length, no_hole=action.no_hole, fua=action.fua)
        case "trim":
            await image.trim(action.offset, action.length, fua=action.fua)
        case "flush":
            await image.flush()


async def play(
    recording: Recording,
    workload: Workload,
    *,
    wrap: Callable[[HostFile], HostFile] = lambda file: file,
    close: bool = True,
    during: Callable[[Image], Awaitable[None]] | None = None,
) -> None:
    """Open the image for writing, run the workload on it, and close it.

    ``wrap`` may put something (faults) between the engine and the files. A request that fails is noted
    in ``failures``; its outcome is open, as far as the model is concerned.
    """
    files = [wrap(file) for file in recording.files]
    image = await recording.open(files, read_only=False)

    async def request(action: Action) -> None:
        data = action.data if action.kind == "write" else b""
        op = recording.model.begin(action.kind, action.offset, action.length, data=data, fua=action.fua)
        try:
            await perform(image, action)
        except (OSError, ImageError) as error:
            recording.failures.append(f"{op}: {error}")
        else:
            recording.model.end(op)

    for group in workload.groups:
        if group[0].kind == "reopen":
            await _close(recording, image)
            first, _ = recording.closed.pop()
            recording.closed.append((first, recording.timeline.now))
            image = await recording.open(files, read_only=False)
        else:
            await asyncio.gather(*(request(action) for action in group))
    if during is not None:
        await during(image)
    if close:
        await _close(recording, image)


async def _close(recording: Recording, image: Image) -> None:
    """Close the image: no request can tell any more, but all that was written is durable by then."""
    flush = recording.model.begin("flush")
    await image.close()
    recording.model.end(flush)
    recording.closed.append((recording.timeline.now, NEVER))
    for file in recording.files:
        file.closed = False


async def record(
    kind: Kind,
    place: Path,
    workload: Workload,
    *,
    seed: int | None = 1,
    mutant: Callable[[MonkeyPatch], None] | None = None,
    wrap: Callable[[HostFile], HostFile] = lambda file: file,
) -> Recording:
    """``load`` and ``play``; by an engine that ``mutant`` has changed for as long as that takes."""
    recording = load(kind, place, seed=seed)
    with MonkeyPatch.context() as patch:
        if mutant is not None:
            mutant(patch)
        await play(recording, workload, wrap=wrap)
    return recording


async def read_disk(image: Image) -> bytes:
    """The whole disk."""
    disk = bytearray(image.size)
    await image.read_into(memoryview(disk), 0)
    return bytes(disk)


async def judge(recording: Recording, state: CrashState, *, reopen: bool = False) -> list[str]:
    """What is wrong with the state; empty if nothing.

    It must open, hold what was promised and nothing else, be sound but for leaks, have its snapshot
    untouched, and no bitmap that claims to be true and has missed something. While the image was closed:
    without leaks, and with all its bitmaps. With ``reopen`` all that again after it was opened for writing,
    which repairs what needs repair, and closed. The state is changed by that.
    """
    TALLY["states"] += 1
    problems = await _judge_once(recording, state)
    if reopen and not problems:
        try:
            image = await recording.open(_unclosed(state), read_only=False)
            await image.close()
        except (OSError, ImageError) as error:
            return [f"does not open for writing: {error}"]
        problems = [f"after opening for writing: {p}" for p in await _judge_once(recording, state)]
    return problems


def _unclosed(state: CrashState) -> list[CrashFile]:
    for file in state.files:
        file.closed = False
    return state.files


async def _judge_once(recording: Recording, state: CrashState) -> list[str]:
    problems = []
    closed = any(first <= state.tick <= last for first, last in recording.closed)
    try:
        image = await recording.open(_unclosed(state), read_only=True)
    except ImageError as error:
        return [f"does not open: {error}"]
    try:
        disk = await read_disk(image)
        problems += recording.model.content_violations(state.tick, lambda o, n: disk[o : o + n])
        if closed:
            problems += [f"bitmap {b.name} is lost" for b in image.tracker if not b.usable]
        for bitmap in image.tracker.usable():
            if bitmap.enabled:
                missed = recording.model.false_clean(state.tick, await image.bits(bitmap.name))
                problems += [f"bitmap {bitmap.name}: granule at {at:#x} is falsely clean" for at in missed]
        if image.header is not None and not image.header.dirty:
            report = await check(state.files[0], image.header)
            if report.corruptions or report.check_errors or (closed and report.leaks and not recording.leaky):
                problems += report.problems
    except (OSError, ImageError) as error:
        problems.append(f"cannot be read: {error}")
    finally:
        await image.close()
    if recording.kind.snapshot and not problems:
        problems += await _judge_snapshot(recording, state)
    return problems


async def _judge_snapshot(recording: Recording, state: CrashState) -> list[str]:
    try:
        image = await recording.open(_unclosed(state), read_only=True, snapshot=SNAPSHOT)
        disk = await read_disk(image)
        await image.close()
    except (OSError, ImageError) as error:
        return [f"the snapshot cannot be read: {error}"]
    return [] if disk == recording.kind.content() else ["the snapshot has changed"]


async def first_problem(recording: Recording, *, states: int = 1000, reopen: bool = False) -> list[str]:
    """What is wrong with the first bad state among that many; empty if none is bad.

    In rounds, as the states of one draw come in order of time.
    """
    for seed in range(-(-states // ROUND)):
        for state in recording.states(random=ROUND, seed=seed):
            problems = await judge(recording, state, reopen=reopen)
            if problems:
                return problems
    return []


async def is_needed(recording: Recording, number: int, *, states: int) -> bool:
    """Whether some state is bad if sync ``number`` did nothing, among that many of the time in which that
    can matter: until two later syncs of the file have ended."""
    syncs = recording.timeline.syncs
    later = [s.ended for s in syncs[number + 1 :] if s.file == syncs[number].file]
    window = (syncs[number].begun, later[1] + 2 if len(later) > 1 else NEVER)
    for seed in range(-(-states // ROUND)):
        for state in recording.states(random=ROUND, seed=seed, dropped={number}, window=window):
            if await judge(recording, state):
                return True
    return False


class OutsideJudge:
    """qemu-img check on crash states; leaks are permitted, corruption is not."""

    def __init__(self, place: Path, recording: Recording) -> None:
        place.mkdir()
        if recording.kind.backing:
            os.symlink(Path(recording.files[0].path).with_name(BACKING), place / BACKING)
        self._format = recording.kind.format
        self._scratch = [Scratch(place / os.path.basename(file.path)) for file in recording.files]

    def check(self, state: CrashState) -> list[str]:
        """What qemu-img check calls corrupt."""
        if self._format != "qcow2":
            return []
        paths = [scratch.show(file) for scratch, file in zip(self._scratch, state.files, strict=True)]
        target = ["-f", "qcow2", str(paths[0])]
        if len(paths) > 1:
            names = f"driver=qcow2,file.filename={paths[0]},data-file.filename={paths[1]}"
            target = ["--image-opts", names]
        done = run(SYSTEM.argv("qemu-img", "check", *target), check=False)
        return [] if done.returncode in CLEAN else [done.stdout + done.stderr]


@dataclass
class Verdict:
    """How many states were judged, and the first few that were found bad."""

    states: int = 0
    bad: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, state: CrashState, problems: list[str]) -> None:
        """Count one state."""
        self.states += 1
        if problems:
            self.bad += 1
            if len(self.examples) < 3:
                self.examples.append("\n".join([str(state), *problems]))


async def judge_all(
    recording: Recording,
    states: Iterable[CrashState],
    *,
    outside: OutsideJudge | None = None,
    every: int = 50,
    reopen: bool = True,
) -> Verdict:
    """Judge each state; every ``every``-th also by ``outside``, every fifth also opened for writing."""
    verdict = Verdict()
    for state in states:
        problems = await judge(recording, state, reopen=reopen and verdict.states % 5 == 0)
        if outside is not None and verdict.states % every == 0:
            problems += outside.check(state)
        verdict.add(state, problems)
    return verdict
