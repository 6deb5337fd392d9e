"""Samples of one work, and how one contender's compare with another's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Better(Enum):
    """Which of two values is the better one."""

    HIGHER = "higher"
    LOWER = "lower"


@dataclass(frozen=True)
class Sample:
    """What one contender did in one round."""

    value: float
    """In the work's unit."""
    cpu: float = 0.0
    """Seconds of processor time that the server took."""
    ops: int = 1
    """Operations that it took them for."""
    peak: int = 0
    """Greatest resident memory of the server, bytes."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Further figures, for the JSON only."""

    @property
    def cpu_per_op(self) -> float:
        """Seconds."""
        return self.cpu / self.ops if self.ops else 0.0


@dataclass(frozen=True)
class Summary:
    """The samples of one contender in one work."""

    median: float
    spread: float
    """Half the range of the values, as a fraction of the median."""
    cpu_per_op: float
    """Median, seconds."""
    peak: int
    """Greatest, bytes."""

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Summary:
        """Raises ValueError if there is no sample."""
        if not samples:
            raise ValueError("no samples")
        values = [sample.value for sample in samples]
        median = statistics.median(values)
        return cls(
            median=median,
            spread=(max(values) - min(values)) / 2 / median if median else 0.0,
            cpu_per_op=statistics.median(sample.cpu_per_op for sample in samples),
            peak=max(sample.peak for sample in samples),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample], better: Better) -> float | None:
    """How many times better ours are: the median of the rounds' ratios, above 1 if we are ahead.

    Rounds are paired in order, since what disturbs the machine disturbs neighbours alike. None if no
    round has both, or if a value is 0 and so nothing can be said.
    """
    ratios = []
    for mine, other in zip(ours, theirs, strict=False):
        over, under = (mine.value, other.value) if better is Better.HIGHER else (other.value, mine.value)
        if over <= 0 or under <= 0:
            return None
        ratios.append(over / under)
    return statistics.median(ratios) if ratios else None


@dataclass(frozen=True)
class Verdict:
    """Ours against the best of the others."""

    best: str
    """The peer that is hardest to beat."""
    ratio: float


def verdict(ours: Sequence[Sample], peers: Mapping[str, Sequence[Sample]], better: Better) -> Verdict | None:
    """Compare with every peer and keep the one that does best against us; None if there is none."""
    ratios = {
        name: found for name, samples in peers.items() if (found := ratio(ours, samples, better)) is not None
    }
    if not ratios:
        return None
    best = min(ratios, key=lambda name: ratios[name])
    return Verdict(best, ratios[best])
