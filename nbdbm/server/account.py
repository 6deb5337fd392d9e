"""What is kept of one connection for the log and the metrics: who, what, how much, and how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

from nbdbm.metrics import GOOD, UNKNOWN_EXPORT, Ending, Metrics, Tally, total
from nbdbm.nbd.constants import Cmd, NbdErrno
from nbdbm.peer import Peer

log = logging.getLogger(__name__)

SHOWN = 16
"""Contexts of one connection that are named in its line; a client can select thousands."""

BURST = 1000
"""Lines of connections that had an export that the log takes in ten seconds; of others it takes fewer."""

_NAMES: dict[int, str] = {
    Cmd.READ: "read",
    Cmd.WRITE: "write",
    Cmd.WRITE_ZEROES: "zero",
    Cmd.TRIM: "trim",
    Cmd.FLUSH: "flush",
    Cmd.CACHE: "cache",
    Cmd.BLOCK_STATUS: "status",
}


class Account:
    """Begins with the connection; ``enter`` when it has an export, ``end`` at every cause, ``close`` last."""

    __slots__ = (
        "_ending",
        "_metrics",
        "_reason",
        "_turned_away",
        "began",
        "closed",
        "contexts",
        "export",
        "tally",
    )

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._ending: Ending | None = None
        self._reason = ""
        self._turned_away = False
        self.closed = False
        """Its Tally is part of its export's."""
        self.began = time.monotonic()
        self.export: str | None = None
        """Its name, one of ours; None until the handshake is over."""
        self.contexts: Sequence[str] = ()
        self.tally: Tally | None = None

    def enter(self, export: str) -> Tally:
        """The handshake is over: what is done from now on is counted in the Tally returned."""
        self.export = export
        self.tally = Tally()
        return self.tally

    def refused(self, command: int, error: NbdErrno) -> None:
        """The wire refused a request as the protocol demands."""
        if self.tally is not None:
            self.tally.commands[_NAMES.get(command, "other")].refuse(error.name)

    def turn_away(self) -> None:
        """It asked for an export that it cannot have; it may ask for another one."""
        self._turned_away = True

    def end(self, ending: Ending, reason: str = "") -> None:
        """Why the connection is coming to its end; of several causes the first is the cause."""
        if self._ending is None:
            self._ending, self._reason = ending, reason

    def close(self, peer: Peer) -> None:
        """Nothing is left of the connection: add it to the sums, and log it. Idempotent."""
        if self.closed:
            return
        self.closed = True
        ending = self._ending or Ending.DISCONNECTED
        self._metrics.ends[ending.value] += 1
        seconds = time.monotonic() - self.began
        fields: dict[str, object] = {
            "client": str(peer),
            "export": self.export,
            "seconds": round(seconds, 3),
            "ended": ending.value,
        }
        if self._reason:
            fields["reason"] = self._reason
        if peer.tls is not None:
            fields["tls"] = peer.tls.version
        how = ending.value + (f": {self._reason}" if self._reason else "")
        tally = self.tally
        if tally is None or self.export is None:
            kind = UNKNOWN_EXPORT if self._turned_away else ending.value
            what = "asked for no export that it may use" if self._turned_away else "used no export"
            if ending not in GOOD or self._turned_away:
                self._metrics.handshake_failures[kind] += 1
                fields["handshake"] = kind
            log.info("%s: %s, %.3g s, %s", peer, what, seconds, how, extra={"fields": fields})
            return
        self._metrics.export(self.export).add(tally)
        read, written = tally.commands["read"].bytes, tally.commands["write"].bytes
        fields["contexts"] = [*self.contexts[:SHOWN]]
        if len(self.contexts) > SHOWN:
            fields["contexts_more"] = len(self.contexts) - SHOWN
        fields |= {"operations": tally.operations, "bytes_read": read, "bytes_written": written}
        fields |= {"errors": tally.errors}
        log.info(
            "%s: export %r, %d contexts, %d operations (%d failed), read %d bytes, wrote %d, %.3g s, %s",
            peer,
            self.export,
            len(self.contexts),
            tally.operations,
            tally.errors,
            read,
            written,
            seconds,
            how,
            extra={"fields": fields, "burst": BURST},
        )


class Totals:
    """What was done with each export by connections that have ended, and by those that have not.

    May be asked over several turns of the event loop: a connection that ends meanwhile is counted once.
    """

    def __init__(self, metrics: Metrics, accounts: Iterable[Account]) -> None:
        self._metrics = metrics
        self._users: dict[str, list[Account]] = {}
        for account in accounts:
            if account.export is not None:
                self._users.setdefault(account.export, []).append(account)

    def of(self, export: str) -> tuple[Tally, int]:
        """The sum, and how many connections there are."""
        past = self._metrics.exports.get(export)
        present = [
            account.tally
            for account in self._users.get(export, ())
            if account.tally is not None and not account.closed
        ]
        tallies = present if past is None else [past, *present]
        return (tallies[0] if len(tallies) == 1 else total(tallies)), len(present)
