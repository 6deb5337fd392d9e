"""What a server counts: plain values, no I/O, and no library.

Each connection counts for itself, in a Tally; when it ends, its Tally is added to that of its export. So a
request is counted in one place only, and an export's sums are its own Tally plus those of its clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

OTHER = "other"
"""A command that NBD does not know."""

COMMANDS = ("read", "write", "zero", "trim", "flush", "cache", "status", OTHER)

BUCKETS = 64
"""Latencies are sorted by how many bits their nanoseconds have: nothing costs less. 2^63 ns are 300 years."""


class Figures:
    """What was done of one command."""

    __slots__ = ("buckets", "bytes", "errors", "nanoseconds", "operations")

    def __init__(self) -> None:
        self.operations = 0
        """Requests answered, well or not."""
        self.bytes = 0
        """Of the ranges they were about, where they succeeded; none for flush and status."""
        self.nanoseconds = 0
        """That carrying them out took, added up."""
        self.buckets = [0] * BUCKETS
        """How many took less than 1, 2, 4, 8 ... nanoseconds, each in the first of these that holds it. Those
        that were refused without being begun are in none."""
        self.errors: dict[str, int] = {}
        """NBD's name of the error -> how often."""

    def record(self, count: int, size: int, nanoseconds: int) -> None:
        """``count`` requests, about ``size`` bytes in all, were answered ``nanoseconds`` after they began."""
        self.operations += count
        self.bytes += size
        self.nanoseconds += nanoseconds * count
        self.buckets[nanoseconds.bit_length()] += count

    def fail(self, error: str) -> None:
        """One of the requests recorded has failed."""
        self.errors[error] = self.errors.get(error, 0) + 1

    def refuse(self, error: str) -> None:
        """A request was refused without being begun."""
        self.operations += 1
        self.fail(error)

    def add(self, other: Figures) -> None:
        """Add what somebody else has counted."""
        self.operations += other.operations
        self.bytes += other.bytes
        self.nanoseconds += other.nanoseconds
        for bucket, count in enumerate(other.buckets):
            self.buckets[bucket] += count
        for error, count in other.errors.items():
            self.errors[error] = self.errors.get(error, 0) + count


class Tally:
    """What was done by command: for one connection, or for one export."""

    __slots__ = ("commands", "general")

    def __init__(self) -> None:
        self.commands = {command: Figures() for command in COMMANDS}
        self.general = 0
        """Operations among them that took the general way, or waited for the disk."""

    def add(self, other: Tally) -> None:
        """Add what somebody else has counted."""
        self.general += other.general
        for command, figures in self.commands.items():
            figures.add(other.commands[command])

    @property
    def operations(self) -> int:
        """Requests answered, whatever the command."""
        return sum(figures.operations for figures in self.commands.values())

    @property
    def at_once(self) -> int:
        """Those among them that the fast path carried out."""
        return sum(sum(figures.buckets) for figures in self.commands.values()) - self.general

    @property
    def errors(self) -> int:
        """Those among them that failed."""
        return sum(sum(figures.errors.values()) for figures in self.commands.values())


def total(tallies: Iterable[Tally]) -> Tally:
    """The sum, as a Tally of its own."""
    made = Tally()
    for tally in tallies:
        made.add(tally)
    return made


class Ending(StrEnum):
    """How a connection came to its end."""

    GOODBYE = "goodbye"
    """The client said so (NBD_CMD_DISC, NBD_OPT_ABORT)."""
    DISCONNECTED = "disconnected"
    """The client was gone without a word."""
    TIME_OUT = "time-out"
    """It took too long to ask for an export, or to take the last replies."""
    PROTOCOL = "protocol error"
    TLS = "TLS failure"
    """There was no agreement on TLS, or no proof of who it is."""
    REFUSED = "refused"
    """It may not come in: too many connections, or not from there."""
    SHUTDOWN = "server shutdown"
    WITHDRAWN = "export withdrawn"
    """A reload removed or changed the export, or its rules no longer let the client in."""
    FAILED = "internal error"
    """A bug of ours."""


GOOD = frozenset({Ending.GOODBYE, Ending.SHUTDOWN, Ending.WITHDRAWN})
"""Ends of a handshake that are nobody's failure."""

UNKNOWN_EXPORT = "unknown export"
"""A kind of failed handshake beside those: the client asked for no export that exists for it."""


class Metrics:
    """What a server has counted since it began. It outlives exports and connections."""

    def __init__(self) -> None:
        self.exports: dict[str, Tally] = {}
        """By name: what connections that have ended did. The names are ours, never a client's."""
        self.accepted = 0
        """Connections."""
        self.refused = 0
        """Connections that were not let in, and are not among those accepted."""
        self.ends: Counter[str] = Counter()
        """Connections that have ended, by how."""
        self.handshake_failures: Counter[str] = Counter()
        """Handshakes that came to nothing, by kind: an Ending, or UNKNOWN_EXPORT."""

    def export(self, name: str) -> Tally:
        """The Tally of the export of this name."""
        tally = self.exports.get(name)
        if tally is None:
            tally = self.exports[name] = Tally()
        return tally


# What is looked up when somebody asks for it.


@dataclass(frozen=True, slots=True)
class BitmapFigures:
    """One bitmap of an open image."""

    name: str
    state: str
    enabled: bool
    """It records what is written."""
    granularity: int
    """Bytes."""
    dirty: int | None
    """Bytes in dirty granules; None while its bits are not in memory."""


@dataclass(frozen=True, slots=True)
class CacheFigures:
    """One cache of an open image, since it was opened."""

    name: str
    hits: int
    misses: int
    bytes: int
    """That it holds now."""
