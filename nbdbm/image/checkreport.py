"""CheckReport: the findings of a check."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_PROBLEMS = 1000
"""Messages kept; a damaged L2 table of a large cluster alone could make a hundred thousand."""


@dataclass(slots=True)
class CheckReport:
    """What a check found. Counts under the names that ``qemu-img check --output=json`` gives them."""

    filename: str
    format: str = "qcow2"
    check_errors: int = 0
    """Places that could not be read."""
    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    """Bytes; no cluster from here on is in use."""
    total_clusters: int = 0
    """Of the virtual disk."""
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    bitmap_faults: int = 0
    """How many of the corruptions and errors are bitmaps that cannot be followed: no data depends on them."""
    problems: list[str] = field(default_factory=list)
    """One line each, at most MAX_PROBLEMS; what could be repaired is not in it any more."""
    more_problems: int = 0
    """How many lines did not fit."""

    @property
    def exit_status(self) -> int:
        """0 clean, 1 the check could not be completed, 2 corrupt, 3 leaks only."""
        if self.check_errors:
            return 1
        if self.corruptions:
            return 2
        return 3 if self.leaks else 0

    def say(self, problem: str) -> None:
        """Note a line."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)
        else:
            self.more_problems += 1

    def corrupt(self, problem: str) -> None:
        """Note a corruption."""
        self.corruptions += 1
        self.say(f"corrupt: {problem}")

    def failed(self, problem: str) -> None:
        """Note a place that could not be checked."""
        self.check_errors += 1
        self.say(f"not checked: {problem}")

    def to_json(self) -> dict[str, object]:
        """With qemu-img's keys; numbers of fixes only where something was fixed, as there."""
        found: dict[str, object] = {
            "filename": self.filename,
            "format": self.format,
            "check-errors": self.check_errors,
            "image-end-offset": self.image_end_offset,
            "total-clusters": self.total_clusters,
            "allocated-clusters": self.allocated_clusters,
            "fragmented-clusters": self.fragmented_clusters,
            "compressed-clusters": self.compressed_clusters,
        }
        for key, value in (
            ("corruptions", self.corruptions),
            ("leaks", self.leaks),
            ("corruptions-fixed", self.corruptions_fixed),
            ("leaks-fixed", self.leaks_fixed),
        ):
            if value:
                found[key] = value
        return found
