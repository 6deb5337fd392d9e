import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nbdbm.bitmaps.dirty import DirtyBitmap
from nbdbm.bitmaps.tracker import (
    INCONSISTENT_REASON,
    RECORDING,
    REMEDY,
    TRANSITIONS,
    USABLE,
    BitmapState,
    BitmapTracker,
    Step,
    TrackedBitmap,
)
from nbdbm.errors import BitmapError

SIZE = 1 << 20


def make(state: BitmapState, name: str = "b0", *, enabled: bool = True, loaded: bool = True) -> TrackedBitmap:
    usable = state in USABLE
    return TrackedBitmap(
        name,
        65536,
        enabled=enabled,
        state=state,
        refusal=None if usable else "it is broken",
        bits=DirtyBitmap(SIZE, 65536) if usable and loaded else None,
    )


def tracker_of(*bitmaps: TrackedBitmap) -> BitmapTracker:
    tracker = BitmapTracker(SIZE)
    tracker.attach(*bitmaps)
    return tracker


# -- states ---------------------------------------------------------------------------------


def test_table_is_complete() -> None:
    assert TRANSITIONS.keys() == set(BitmapState)
    assert {after for row in TRANSITIONS.values() for after in row.values()} <= set(BitmapState)


@given(state=st.sampled_from(BitmapState), step=st.sampled_from(Step))
def test_every_step_in_every_state(state: BitmapState, step: Step) -> None:
    """A step leads to the state in the table, or is refused and changes nothing."""
    bitmap = make(state)
    after = TRANSITIONS[state].get(step)
    if after is None:
        with pytest.raises(BitmapError, match=f"cannot {step.value} while it is {state.value}"):
            bitmap.apply(step)
        after = state
    else:
        bitmap.apply(step)
    assert bitmap.state is after
    assert bitmap.usable is (bitmap.refusal is None) is (after in USABLE)
    assert after in USABLE or bitmap.bits is None


class Life(RuleBasedStateMachine):
    """Whatever happens to a bitmap, what the disk says of it stays on the safe side.

    ``saved``: the disk claims that the bitmap is saved and complete.
    ``truth``: the bits can be had, from disk or from memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bitmap = make(BitmapState.READ_ONLY)
        self.saved, self.truth = True, True

    @rule(step=st.sampled_from(Step))
    def take(self, step: Step) -> None:
        before = self.bitmap.state
        try:
            self.bitmap.apply(step)
        except BitmapError:
            assert step not in TRANSITIONS[before]
            return
        if step is Step.ARM:
            self.saved = False
        elif step is Step.STORE:
            self.saved = self.truth
        elif step is Step.LOSE:
            self.truth = False

    @invariant()
    def states_tell_the_truth(self) -> None:
        state = self.bitmap.state
        # Once lost, never used again, and never called saved again after it was armed.
        assert (state in USABLE) is self.truth
        if state in RECORDING:
            assert not self.saved
        if state in (BitmapState.READ_ONLY, BitmapState.VALID, BitmapState.REFUSED):
            assert self.saved
        if state is BitmapState.INCONSISTENT:
            assert not self.saved


TestLife = Life.TestCase


def test_losing_needs_a_reason_to_show() -> None:
    bitmap = make(BitmapState.IN_USE)
    bitmap.apply(Step.LOSE)
    assert bitmap.refusal == INCONSISTENT_REASON
    bitmap = make(BitmapState.READ_ONLY)
    bitmap.apply(Step.LOSE, "its table is gone")
    assert bitmap.refusal == "its table is gone"
    bitmap.apply(Step.LOSE)
    assert bitmap.refusal == "its table is gone"


def test_refusal_belongs_to_the_state() -> None:
    with pytest.raises(AssertionError):
        TrackedBitmap("b", 512, enabled=True, state=BitmapState.REFUSED)
    with pytest.raises(AssertionError):
        TrackedBitmap("b", 512, enabled=True, state=BitmapState.VALID, refusal="why")


# -- lookups --------------------------------------------------------------------------------


def test_lookups() -> None:
    good, bad = make(BitmapState.READ_ONLY, "good"), make(BitmapState.INCONSISTENT, "bad")
    tracker = tracker_of(good, bad)
    assert list(tracker) == [good, bad]
    assert len(tracker) == 2
    assert tracker.usable() == [good]
    assert tracker.refused() == [bad]
    assert tracker.get("bad") is bad
    assert tracker.get("none") is None
    assert tracker.find("good") is good
    with pytest.raises(BitmapError) as raised:
        tracker.find("bad")
    assert str(raised.value) == f"bitmap 'bad': it is broken; {REMEDY}"
    with pytest.raises(BitmapError, match="bitmap 'none': there is no such bitmap"):
        tracker.find("none")
    assert repr(good) == "<TrackedBitmap 'good' read-only enabled>"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_refused_one_never_hides_a_usable_one(order: tuple[int, int]) -> None:
    pair = make(BitmapState.REFUSED, "a\\xff"), make(BitmapState.READ_ONLY, "a\\xff")
    tracker = tracker_of(*(pair[i] for i in order))
    assert tracker.find("a\\xff") is pair[1]
    assert len(tracker) == 2


def test_removing_uncovers_the_next_of_the_name() -> None:
    first, second = make(BitmapState.REFUSED), make(BitmapState.REFUSED)
    tracker = tracker_of(first, second)
    assert tracker.remove("b0") is first
    assert tracker.get("b0") is second
    assert tracker.remove("b0") is second
    with pytest.raises(BitmapError, match="no such bitmap"):
        tracker.remove("b0")
    assert len(tracker) == 0


def test_dropping_one_of_a_name() -> None:
    first, second = make(BitmapState.REFUSED), make(BitmapState.REFUSED)
    tracker = tracker_of(first, second)
    tracker.drop(second)
    assert list(tracker) == [first] and tracker.get("b0") is first


# -- recording ------------------------------------------------------------------------------


def test_mark() -> None:
    recording = make(BitmapState.IN_USE, "recording")
    new = make(BitmapState.NEW, "new")
    disabled = make(BitmapState.IN_USE, "disabled", enabled=False)
    lost = make(BitmapState.INCONSISTENT, "lost")
    tracker = tracker_of(recording, new, disabled, lost)
    assert tracker.recording
    tracker.mark(65535, 2)
    for bitmap, count in ((recording, 2), (new, 2), (disabled, 0)):
        assert bitmap.bits is not None
        assert bitmap.bits.count() == count


def test_mark_without_bitmaps() -> None:
    tracker = BitmapTracker(SIZE)
    assert not tracker.recording
    tracker.mark(0, SIZE)


@pytest.mark.parametrize(
    "bitmap",
    [
        make(BitmapState.VALID),
        make(BitmapState.READ_ONLY),
        make(BitmapState.REFUSED),
        make(BitmapState.REFUSED, enabled=False),
        make(BitmapState.IN_USE, loaded=False),
    ],
    ids=repr,
)
def test_no_write_before_the_disk_says_in_use(bitmap: TrackedBitmap) -> None:
    tracker = tracker_of(bitmap)
    with pytest.raises(AssertionError):
        tracker.mark(0, 1)


def test_a_valid_disabled_bitmap_needs_no_arming() -> None:
    tracker = tracker_of(make(BitmapState.VALID, enabled=False))
    tracker.mark(0, 1)
    assert not tracker.recording


def test_arming_all() -> None:
    bitmaps = [
        make(BitmapState.VALID, "a"),
        make(BitmapState.REFUSED, "b"),
        make(BitmapState.INCONSISTENT, "c"),
    ]
    tracker = tracker_of(*bitmaps)
    tracker.apply(Step.ARM, *bitmaps)
    assert [b.state.value for b in tracker] == ["in use", "inconsistent", "inconsistent"]
    tracker.mark(0, 1)
    assert bitmaps[0].bits is not None and bitmaps[0].bits.count() == 1


def test_an_illegal_step_keeps_mark_in_step() -> None:
    good, bad = make(BitmapState.VALID, "good"), make(BitmapState.READ_ONLY, "bad", enabled=False)
    tracker = tracker_of(good, bad)
    with pytest.raises(BitmapError, match="bitmap 'bad': cannot arm while it is read-only"):
        tracker.apply(Step.ARM, good, bad)
    assert good.state is BitmapState.IN_USE
    tracker.mark(0, 1)
    assert good.bits is not None and good.bits.count() == 1


# -- managing -------------------------------------------------------------------------------


def test_add() -> None:
    tracker = tracker_of(make(BitmapState.INCONSISTENT))
    with pytest.raises(BitmapError, match="there is a bitmap of this name already"):
        tracker.add("b0", 65536)
    bitmap = tracker.add("b1", 512, enabled=False)
    assert (bitmap.state, bitmap.granularity) == (BitmapState.NEW, 512)
    tracker.mark(0, 1)
    assert bitmap.bits is not None
    assert not bitmap.bits.any()
    tracker.enable("b1")
    tracker.mark(0, 1)
    assert bitmap.bits.count() == 1
    tracker.disable("b1")
    tracker.mark(0, SIZE)
    assert bitmap.bits.count() == 1


def test_clear_leaves_readers_what_they_have() -> None:
    tracker = tracker_of(make(BitmapState.IN_USE))
    tracker.mark(0, SIZE)
    before = tracker.find("b0").bits
    tracker.clear("b0")
    tracker.mark(0, 1)
    after = tracker.find("b0").bits
    assert before is not None and after is not None
    assert (before.count(), after.count()) == (16, 1)


def test_rename() -> None:
    tracker = tracker_of(make(BitmapState.IN_USE, "a"), make(BitmapState.INCONSISTENT, "b"))
    with pytest.raises(BitmapError, match="bitmap 'b': there is a bitmap of this name"):
        tracker.rename("a", "b")
    tracker.rename("a", "c")
    assert tracker.get("a") is None
    assert tracker.find("c").name == "c"


def test_merge() -> None:
    tracker = tracker_of(make(BitmapState.IN_USE))
    source = DirtyBitmap(SIZE, 512)
    source.set(65536, 1)
    tracker.merge("b0", source)
    bits = tracker.find("b0").bits
    assert bits is not None
    assert list(bits.runs(0, SIZE)) == [(65536, False), (65536, True), (SIZE - 131072, False)]
    with pytest.raises(BitmapError, match="cannot merge: the source covers 512 bytes, the disk has 1048576"):
        tracker.merge("b0", DirtyBitmap(512, 512))


@pytest.mark.parametrize("state", [BitmapState.INCONSISTENT, BitmapState.REFUSED, BitmapState.READ_ONLY])
@pytest.mark.parametrize("change", ["enable", "disable", "clear", "rename", "merge"])
def test_what_cannot_be_changed(state: BitmapState, change: str) -> None:
    tracker = tracker_of(make(state))
    extra = {"rename": ("c",), "merge": (DirtyBitmap(SIZE, 512),)}.get(change, ())
    with pytest.raises(BitmapError, match="read-only" if state in USABLE else "it is broken"):
        getattr(tracker, change)("b0", *extra)
    assert [b.name for b in tracker] == ["b0"]
