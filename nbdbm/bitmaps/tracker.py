"""The bitmaps of one image, and the life of each: what the disk says of it and what memory may do with it.

A bitmap's worth is that it never misses a write. So before the first write can reach the image, the disk
must say IN_USE of every bitmap that memory will change, and it says so until the bits are stored: whoever
finds IN_USE after a crash knows that bits may be missing. Which step is legal when is the table
``TRANSITIONS``; executing the steps on disk is the engine's part (image/bitmapstore.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum

from nbdbm.bitmaps.dirty import DirtyBitmap
from nbdbm.errors import BitmapError


class BitmapState(Enum):
    """What disk and memory make of one bitmap together."""

    READ_ONLY = "read-only"
    """The disk calls it saved, the image is open for reading: its bits can be read and never change."""
    VALID = "valid"
    """The disk calls it saved, the image is open for writing, and nothing has been written yet."""
    IN_USE = "in use"
    """The disk says IN_USE, and memory has the truth."""
    NEW = "new"
    """The disk does not know it yet; lost, and rightly so, unless it is stored."""
    REFUSED = "refused"
    """The disk calls it saved, but it cannot be used: what describes it is broken, or its bits are."""
    INCONSISTENT = "inconsistent"
    """The disk says IN_USE, and nobody has the truth. Kept as it is until somebody removes it."""


class Step(Enum):
    """What happens to a bitmap."""

    ARM = "arm"
    """IN_USE is durable on disk (where there is an entry to say it of)."""
    STORE = "store"
    """Its bits are durable on disk and its entry, without IN_USE, is what the header leads to."""
    LOSE = "lose"
    """Its bits cannot be had, or cannot be trusted any more."""
    REOPEN_WRITABLE = "reopen for writing"
    REOPEN_READ_ONLY = "reopen read-only"


_S = BitmapState
TRANSITIONS: dict[BitmapState, dict[Step, BitmapState]] = {
    _S.READ_ONLY: {
        Step.LOSE: _S.REFUSED,
        Step.REOPEN_WRITABLE: _S.VALID,
        Step.REOPEN_READ_ONLY: _S.READ_ONLY,
    },
    _S.VALID: {
        Step.ARM: _S.IN_USE,
        Step.STORE: _S.VALID,
        Step.LOSE: _S.REFUSED,
        Step.REOPEN_WRITABLE: _S.VALID,
        Step.REOPEN_READ_ONLY: _S.READ_ONLY,
    },
    _S.IN_USE: {
        Step.ARM: _S.IN_USE,
        Step.STORE: _S.VALID,
        Step.LOSE: _S.INCONSISTENT,
        Step.REOPEN_WRITABLE: _S.IN_USE,
        # REOPEN_READ_ONLY is illegal: the bits are stored first.
    },
    _S.NEW: {
        Step.ARM: _S.NEW,
        Step.STORE: _S.VALID,
        Step.REOPEN_WRITABLE: _S.NEW,
        # LOSE is illegal: the bits are nowhere but in memory.
    },
    # Claims to be saved, and a write that it misses would make that a lie: it gets IN_USE as well.
    _S.REFUSED: {
        Step.ARM: _S.INCONSISTENT,
        Step.LOSE: _S.REFUSED,
        Step.REOPEN_WRITABLE: _S.REFUSED,
        Step.REOPEN_READ_ONLY: _S.REFUSED,
    },
    _S.INCONSISTENT: dict.fromkeys(Step, _S.INCONSISTENT),
}

USABLE = frozenset({_S.READ_ONLY, _S.VALID, _S.IN_USE, _S.NEW})
"""The bits can be had."""
RECORDING = frozenset({_S.IN_USE, _S.NEW})
"""The bits may change as the disk does, if the bitmap is enabled."""

INCONSISTENT_REASON = (
    "it is inconsistent: it was in use when the image was last open for writing and was never saved"
    " (a crash or a kill), or it is in use now, so writes may be missing from it"
)
REMEDY = "remove the bitmap, add a new one, and take a full backup"
"""The one way out for every refused bitmap: nothing can tell any more what it missed."""


class TrackedBitmap:
    """One bitmap of an image.

    ``granularity`` (bytes) and ``enabled`` are as the disk says and may be outdated or absurd where the
    state is not usable; ``refusal`` then says why it is not, and is None otherwise.
    """

    __slots__ = ("bits", "enabled", "granularity", "name", "refusal", "state")

    def __init__(
        self,
        name: str,
        granularity: int,
        *,
        enabled: bool,
        state: BitmapState,
        refusal: str | None = None,
        bits: DirtyBitmap | None = None,
    ) -> None:
        assert (state in USABLE) is (refusal is None)
        self.name = name
        self.granularity = granularity
        self.enabled = enabled
        """Every write is to be recorded in it (the AUTO flag)."""
        self.state = state
        self.refusal = refusal
        self.bits = bits
        """None until they are loaded."""

    def __repr__(self) -> str:
        return f"<TrackedBitmap {self.name!r} {self.state.value}{' enabled' if self.enabled else ''}>"

    @property
    def usable(self) -> bool:
        """Whether its bits can be had."""
        return self.state in USABLE

    def apply(self, step: Step, reason: str | None = None) -> None:
        """Take ``step``, which has just happened; ``reason`` is the refusal if it ends in an unusable state.

        Raises:
            BitmapError: the step is illegal in this state; nothing has changed.
        """
        after = TRANSITIONS[self.state].get(step)
        if after is None:
            raise BitmapError(self.name, f"cannot {step.value} while it is {self.state.value}")
        if after not in USABLE:
            self.bits = None
            self.refusal = reason or self.refusal or INCONSISTENT_REASON
        self.state = after


class BitmapTracker:
    """All bitmaps of one image, in directory order, whatever their state.

    Names may repeat among refused bitmaps only; the usable ones are found by name.

    Args:
        size: of the disk, bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._all: list[TrackedBitmap] = []
        self._by_name: dict[str, TrackedBitmap] = {}
        self._recording: tuple[Callable[[int, int], None], ...] = ()
        self._unarmed = False

    def __iter__(self) -> Iterator[TrackedBitmap]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def get(self, name: str) -> TrackedBitmap | None:
        """The bitmap of this name, usable or not, or None; of several, the usable one, else the first."""
        return self._by_name.get(name)

    def usable(self) -> list[TrackedBitmap]:
        """Those whose bits can be had."""
        return [b for b in self._all if b.state in USABLE]

    def refused(self) -> list[TrackedBitmap]:
        """The others; each has its ``refusal``."""
        return [b for b in self._all if b.state not in USABLE]

    def find(self, name: str) -> TrackedBitmap:
        """The usable bitmap of this name.

        Raises:
            BitmapError: there is none of this name, or it cannot be used (and why, and the remedy).
        """
        bitmap = self._by_name.get(name)
        if bitmap is None:
            raise BitmapError(name, "there is no such bitmap in the image")
        if bitmap.refusal is not None:
            raise BitmapError(name, f"{bitmap.refusal}; {REMEDY}")
        return bitmap

    def attach(self, *bitmaps: TrackedBitmap) -> None:
        """Take in bitmaps that the disk has, behind those there are."""
        for bitmap in bitmaps:
            other = self._by_name.get(bitmap.name)
            assert other is None or not (other.usable and bitmap.usable)
            # A usable one is never hidden by a refused one whose unprintable name reads the same.
            if other is None or bitmap.usable:
                self._by_name[bitmap.name] = bitmap
        self._all += bitmaps
        self._refresh()

    def apply(self, step: Step, *bitmaps: TrackedBitmap, reason: str | None = None) -> None:
        """``TrackedBitmap.apply`` for each in turn, with what ``mark`` does kept in step.

        Raises:
            BitmapError: the step is illegal for one of them; those before it have taken it.
        """
        try:
            for bitmap in bitmaps:
                bitmap.apply(step, reason)
        finally:
            self._refresh()

    # -- recording -----------------------------------------------------------------------------

    def mark(self, offset: int, length: int) -> None:
        """Record that the range is about to change; called before it can.

        Every bitmap that must record was armed before, and has bits to record in: asserted.
        """
        assert not self._unarmed, "a write before the bitmaps were armed"
        for record in self._recording:
            record(offset, length)

    def begin(self, *bitmaps: TrackedBitmap) -> None:
        """Have these record in new, clean bits; what the disk has of them is added to those later."""
        for bitmap in bitmaps:
            assert bitmap.usable and bitmap.bits is None
            bitmap.bits = DirtyBitmap(self.size, bitmap.granularity)
        self._refresh()

    @property
    def recording(self) -> bool:
        """Whether ``mark`` changes anything."""
        return bool(self._recording)

    def _refresh(self) -> None:
        """Find out anew what ``mark`` does: it runs once per write, this once per change of state."""
        record: list[Callable[[int, int], None]] = []
        self._unarmed = False
        for bitmap in self._all:
            if bitmap.state is BitmapState.INCONSISTENT:
                continue
            if bitmap.state in RECORDING:
                if bitmap.enabled and bitmap.bits is not None:
                    record.append(bitmap.bits.set)
                elif bitmap.enabled:
                    self._unarmed = True
            elif bitmap.enabled or bitmap.state is BitmapState.REFUSED:
                # Refused ones too: they would go on claiming that they missed nothing.
                self._unarmed = True
        self._recording = tuple(record)

    # -- managing ------------------------------------------------------------------------------

    def add(self, name: str, granularity: int, *, enabled: bool = True) -> TrackedBitmap:
        """Begin a new, clean bitmap; the caller has judged name and granularity.

        Raises:
            BitmapError: the name is taken, by a refused bitmap too.
        """
        if name in self._by_name:
            raise BitmapError(name, "there is a bitmap of this name already")
        bits = DirtyBitmap(self.size, granularity)
        bitmap = TrackedBitmap(name, granularity, enabled=enabled, state=BitmapState.NEW, bits=bits)
        self.attach(bitmap)
        return bitmap

    def remove(self, name: str) -> TrackedBitmap:
        """Drop the bitmap of this name; the one thing that can be done with a refused one.

        Raises:
            BitmapError: there is none.
        """
        bitmap = self._by_name.get(name)
        if bitmap is None:
            raise BitmapError(name, "there is no such bitmap in the image")
        self.drop(bitmap)
        return bitmap

    def drop(self, bitmap: TrackedBitmap) -> None:
        """Drop this very bitmap, of several with one name."""
        self._all.remove(bitmap)
        if self._by_name[bitmap.name] is bitmap:
            del self._by_name[bitmap.name]
            for other in self._all:
                if other.name == bitmap.name:
                    self._by_name[other.name] = other
                    break
        self._refresh()

    def rename(self, name: str, new: str) -> None:
        """Give a bitmap another name.

        Raises:
            BitmapError: it cannot be changed, or the new name is taken.
        """
        bitmap = self._changeable(name)
        if new in self._by_name:
            raise BitmapError(new, "there is a bitmap of this name already")
        del self._by_name[name]
        bitmap.name = new
        self._by_name[new] = bitmap

    def enable(self, name: str) -> None:
        """Record from now on.

        Raises:
            BitmapError: it cannot be changed.
        """
        self._changeable(name).enabled = True
        self._refresh()

    def disable(self, name: str) -> None:
        """Stay as it is from now on.

        Raises:
            BitmapError: it cannot be changed.
        """
        self._changeable(name).enabled = False
        self._refresh()

    def clear(self, name: str) -> None:
        """Make all of it clean.

        Raises:
            BitmapError: it cannot be changed.
        """
        bitmap = self._changeable(name)
        # A new one, not the old one emptied: who reads the bits meanwhile keeps what it began with.
        bitmap.bits = DirtyBitmap(self.size, bitmap.granularity)
        self._refresh()

    def merge(self, name: str, source: DirtyBitmap) -> None:
        """Add what is dirty in ``source`` to the bitmap; its bits must be loaded.

        Raises:
            BitmapError: it cannot be changed, or the sizes differ.
        """
        bitmap = self._changeable(name)
        if source.size != self.size:
            raise BitmapError(
                name, f"cannot merge: the source covers {source.size} bytes, the disk has {self.size}"
            )
        assert bitmap.bits is not None
        bitmap.bits.merge(source)

    def _changeable(self, name: str) -> TrackedBitmap:
        bitmap = self.find(name)
        if bitmap.state is BitmapState.READ_ONLY:
            raise BitmapError(name, "the image is open read-only")
        return bitmap
