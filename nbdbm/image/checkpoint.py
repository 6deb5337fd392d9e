"""Checkpoint: the same bitmap begins on all disks of a machine that is not running, or on none.

A chain of incremental backups with one disk missing is worthless, so:

    look     all images are opened, locked and judged, the changes made in memory     nothing written
    stage    each image's new directory is written and synced beside the old one      old everywhere
    switch   one header after the other is led to the new directory, and synced       old, or new: see below
    free     what only the old directories needed                                     new everywhere

A failure while looking or staging leaves all as it was. One while switching has those that were switched
led back to their old directories, which are still there: nothing is freed before the last switch.

Only a power failure between two switches can leave some images with the checkpoint and some without.
Each is sound, and nothing is lost: the previous bitmaps are there, and the machine was not running. Run
again, the checkpoint sees that an image has exactly what it is to have (the bitmap recording and clean,
the previous one disabled), leaves it, and completes the others. A bitmap that is not clean is never taken
for the work of an earlier run: the machine has been running since, or the name was used before.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from nbdbm.errors import BitmapError, ImageError, NbdbmError, UnsupportedError
from nbdbm.image.backing import FileOpener
from nbdbm.image.bitmapedit import Add, BitmapEditor, Clear, Disable, Enable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """What every image is to have afterwards."""

    name: str
    """Of the bitmap that records from now on, and is clean."""
    disable: str | None = None
    """This bitmap stays as it is from now on."""
    clear: bool = False
    """A bitmap of that name that exists is cleared; without it, it must not exist."""
    granularity: int | None = None
    """Bytes; of bitmaps that are added. None: as the image's cluster size has it."""


class Outcome(Enum):
    """What was done to an image."""

    ADDED = "added"
    CLEARED = "cleared"
    THERE = "there already"
    """By an earlier run that did not get to the other images."""


class Checkpointed(NamedTuple):
    """One image, and what was done to it."""

    path: str
    outcome: Outcome
    notices: list[str]


async def checkpoint(
    paths: Sequence[str], options: CheckpointOptions, open_file: FileOpener | None = None
) -> list[Checkpointed]:
    """Begin the bitmap on every image; all of them, or none.

    Raises:
        ImageError: it cannot be done, or failed; the text names the image. No image has changed, unless
            the text says so.
    """
    assert paths and options.disable != options.name and not (options.disable and options.clear)
    editors: list[BitmapEditor] = []
    try:
        outcomes: list[Outcome] = []
        for path in paths:
            twice = next((e.path for e in editors if e.is_file(path)), None)
            if twice is not None:
                raise ImageError(path, f"is given twice (it is {twice})", errno=errno.EINVAL)
            editors.append(await BitmapEditor.open(path, open_file=open_file))
        for editor in editors:
            outcomes.append(await _plan(editor, options))
        await _commit(editors)
        return [
            Checkpointed(editor.path, outcome, editor.notices)
            for editor, outcome in zip(editors, outcomes, strict=True)
        ]
    finally:
        for editor in editors:
            await editor.close()


async def _plan(editor: BitmapEditor, options: CheckpointOptions) -> Outcome:
    """Make the changes in memory.

    Raises:
        ImageError: they cannot be made.
    """
    try:
        return await _apply(editor, options)
    except BitmapError as error:
        raise ImageError(editor.path, str(error), errno=error.errno) from error


async def _apply(editor: BitmapEditor, options: CheckpointOptions) -> Outcome:
    name, previous = options.name, options.disable
    existing = editor.tracker.get(name)
    if existing is not None and options.clear:
        await editor.apply(Clear(name))
        await editor.apply(Enable(name))
        outcome = Outcome.CLEARED
    elif existing is not None:
        found = editor.tracker.find(name)
        dirty = (await editor.bits(name)).dirty_bytes()
        ended = previous is None or not editor.tracker.find(previous).enabled
        granularity = options.granularity or found.granularity
        if dirty or not (found.enabled and ended and found.granularity == granularity):
            state = f"with {dirty} dirty bytes" if dirty else "clean"
            raise BitmapError(
                name,
                f"exists already ({'recording' if found.enabled else 'disabled'}, {state}, granularity"
                f" {found.granularity}), and not as this checkpoint would begin it; take another name, or"
                " --clear it",
            )
        outcome = Outcome.THERE
    else:
        await editor.apply(Add(name, options.granularity))
        outcome = Outcome.ADDED
    if previous is not None:
        await editor.apply(Disable(previous))
    return outcome


async def _commit(editors: list[BitmapEditor]) -> None:
    """Have the disks say what memory says: all, or none."""
    staged: list[BitmapEditor] = []
    try:
        for editor in editors:
            # Every disk has the old directory until the loop below.
            with _naming(editor):
                if await editor.stage():
                    staged.append(editor)
    except BaseException:
        for editor in staged:
            await editor.abandon()
        raise
    switched: list[BitmapEditor] = []
    try:
        for editor in staged:
            switched.append(editor)
            with _naming(editor):
                await editor.switch()
            # Disk: this one and those before it have the checkpoint, the others have not.
    except BaseException as error:
        await _roll_back(switched, staged, error)
        raise
    # Disk: all have it. What fails from here on leaks clusters and nothing else.
    for editor in staged:
        await editor.free()


async def _roll_back(switched: list[BitmapEditor], staged: list[BitmapEditor], error: BaseException) -> None:
    """Lead the images of ``switched`` back; the last one is that whose switch failed.

    Raises:
        ImageError: some could not be led back; the text names them.
    """
    stuck: list[str] = []
    for editor in switched:
        try:
            if editor is switched[-1] and isinstance(error, UnsupportedError):
                await editor.abandon()
            else:
                await editor.revert()
        except (OSError, NbdbmError) as failure:
            log.error("%s: going back to the old bitmaps failed: %s", editor.path, failure)
            stuck.append(editor.path)
    for editor in staged[len(switched) :]:
        await editor.abandon()
    if stuck and isinstance(error, ImageError):
        raise ImageError(
            error.path,
            f"{error.reason}; and these could not be switched back, so they may have the checkpoint while"
            f" the others have not: {', '.join(stuck)}",
            errno=error.errno,
        ) from error


@contextmanager
def _naming(editor: BitmapEditor) -> Iterator[None]:
    """Have an OSError name the image."""
    try:
        yield
    except OSError as error:
        raise ImageError(
            editor.path, f"writing its bitmaps failed: {error.strerror or error}", errno=error.errno
        ) from error
