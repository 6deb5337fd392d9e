"""What a server has to say in a handshake, worked out from the client's bytes alone.

Written from the protocol's specification, and sharing no code with nbdbm.nbd: who changes one of the two only
is found out. Where the specification leaves a choice, several answers are right.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from tests.fuzz import wire

ACK, SERVER, INFO, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, TOO_BIG, EXT_HEADER_REQD = (
    1 << 31 | number for number in (1, 2, 3, 5, 6, 9, 10)
)

WITHOUT_DATA = (wire.LIST, wire.STARTTLS, wire.STRUCTURED, wire.EXTENDED)
LONGEST_STRING = 4096
MOST_OPTION_BYTES = 32 << 20
DF, STATUS_PAYLOAD = 1 << 7, 1 << 12
"""Transmission flags that depend on what was agreed upon."""


class Export(NamedTuple):
    """As much of an export as a handshake shows."""

    name: bytes
    size: int
    contexts: tuple[bytes, ...]
    secret: bool = False
    """Only for clients with TLS."""
    asleep: bool = False
    """Opened when it is asked for."""


class Answered(NamedTuple):
    """What one option's answer may be: replies of these kinds and then, or at once, one of these."""

    code: int
    finals: tuple[int, ...]
    export: Export | None = None
    """The one that INFO and GO describe, or whose contexts these are."""
    must: frozenset[bytes] = frozenset()
    """Contexts that are among them."""
    may: frozenset[bytes] = frozenset()
    """Contexts beside which there are no others."""
    style: int = 0
    """0 simple, 1 structured, 2 extended."""


@dataclass
class Expected:
    """The whole handshake."""

    answers: list[Answered] = field(default_factory=list)
    go: Export | None = None
    """Transmission begins, on this one."""
    bare: int = 0
    """It was asked for in the old way, whose answer has no head and so many bytes."""
    style: int = 0
    selected: int = -1
    """Which of ``answers`` has the contexts that hold; -1: none."""
    secure_from: int = -1
    """How many answers were given before TLS began; -1: it did not."""


class Client:
    """Follows a client's stream, which comes in flights: between two of them everything is answered.

    Args:
        tls: 0 it is refused, 1 as the client likes, 2 required.
        no: numbers, from 1, of the shell's decisions that are a refusal.
        longest: option data that is looked at, bytes.
    """

    def __init__(
        self, exports: Sequence[Export], tls: int, no: Sequence[bool], longest: int, flights: Sequence[bytes]
    ) -> None:
        self._exports = exports
        self._tls = tls
        self._no = no
        self._longest = longest
        self._awake = False
        self._decisions = 0
        self._selected_of: Export | None = None
        self._flags = 0
        self._over = False
        self.found = Expected()
        self._follow(b"".join(flights), set(accumulate(map(len, flights))))

    def _follow(self, stream: bytes, ends: set[int]) -> None:
        if len(stream) < 4:
            return
        self._flags = struct.unpack_from(">I", stream)[0]
        at, used = 4, 0
        self._over = bool(self._flags & ~3)
        while not self._over and self.found.go is None and len(stream) - at >= 16:
            magic, code, length = struct.unpack_from(">8sII", stream, at)
            used += length if code != wire.ABORT else 0
            if magic != b"IHAVEOPT" or used > MOST_OPTION_BYTES or (not self._flags & 1 and code != 1):
                return
            at += 16
            if code == wire.ABORT:
                self._answer(code, ACK)
                return
            if code == wire.EXPORT_NAME and (length > LONGEST_STRING or self._bare or self.found.style == 2):
                return
            if len(stream) - at < length:
                return
            begins = self._option(code, stream[at : at + length])
            at += length
            if begins:
                if at not in ends:
                    return  # plain text where TLS has to begin
                self.found.secure_from = len(self.found.answers)
                self.found.style, self.found.selected = 0, -1

    @property
    def _bare(self) -> bool:
        """TLS is required, and has not begun."""
        return self._tls == 2 and self.found.secure_from < 0

    def _answer(self, code: int, *finals: int, **more: object) -> None:
        self.found.answers.append(Answered(code, finals, style=self.found.style, **more))  # type: ignore[arg-type]

    def _option(self, code: int, data: bytes) -> bool:
        """Note the answer; whether TLS begins."""
        if self._bare and code != wire.STARTTLS:
            self._answer(code, TLS_REQD)
            return False
        if code == wire.SET_META:
            self.found.selected = -1
        if code not in wire.OPTIONS or code in (4, 12, 99):
            self._answer(code, UNSUP)
        elif data and code in WITHOUT_DATA:
            self._answer(code, INVALID)
        elif len(data) > self._longest:
            self._answer(code, TOO_BIG)
        elif code == wire.STARTTLS:
            if self._tls and self.found.secure_from < 0:
                self._answer(code, ACK)
                return True
            self._answer(code, INVALID if self._tls else POLICY)
        elif code == wire.LIST:
            self._answer(code, ACK)
        elif code in (wire.STRUCTURED, wire.EXTENDED):
            self._headers(code)
        elif code in (wire.LIST_META, wire.SET_META):
            self._contexts(code, data)
        else:
            self._export(code, data)
        return False

    def _headers(self, code: int) -> None:
        wanted = 1 if code == wire.STRUCTURED else 2
        if self.found.style == wanted:
            self._answer(code, INVALID)
        elif self.found.style > wanted:
            self._answer(code, EXT_HEADER_REQD)
        else:
            self.found.style = wanted
            self._answer(code, ACK)

    def _find(self, code: int, name: bytes) -> Export | int:
        """The export, once it is open; or the error to answer with."""
        export = next((each for each in self._exports if each.name == (name or self._exports[0].name)), None)
        if export is None:
            return UNKNOWN
        if export.secret and self.found.secure_from < 0:
            # In answer to others it would say that nothing at all goes without.
            return TLS_REQD if code in (wire.INFO, wire.GO) else POLICY
        if export.asleep and not self._awake:
            if not self._granted():
                return UNKNOWN
            self._awake = True
        return export

    def _granted(self) -> bool:
        self._decisions += 1
        return not self._no[self._decisions % 2]

    def _export(self, code: int, data: bytes) -> None:
        name: bytes | None = data
        if code != wire.EXPORT_NAME:
            name, at = _string(data, 0)
            count = int.from_bytes(data[at : at + 2])
            if name is None or len(name) > LONGEST_STRING or len(data) != at + 2 + 2 * count:
                self._answer(code, INVALID)
                return
        assert name is not None
        export = self._find(code, name)
        if not isinstance(export, int) and code != wire.INFO and not self._granted():
            export = UNKNOWN
        if code == wire.EXPORT_NAME:
            self._over = isinstance(export, int)
            self.found.bare = 10 if self._flags & 2 else 134
        elif isinstance(export, int):
            self._answer(code, export)
        else:
            self._answer(code, ACK, export=export)
        if isinstance(export, Export) and code != wire.INFO:
            self.found.go = export
            if self._selected_of is not export:
                self.found.selected = -1

    def _contexts(self, code: int, data: bytes) -> None:
        if code == wire.SET_META and not self.found.style:
            self._answer(code, INVALID)
            return
        name, at = _string(data, 0)
        queries: list[bytes] = []
        if name is not None and len(data) >= at + 4:
            count, at = struct.unpack_from(">I", data, at)[0], at + 4
            while len(queries) < count and at <= len(data):
                query, at = _string(data, at)
                if query is None:
                    break
                queries.append(query)
            if len(queries) == count and at == len(data) and len(name) <= LONGEST_STRING:
                self._select(code, name, queries)
                return
            if count > 4096:
                self._answer(code, INVALID, TOO_BIG)
                return
        self._answer(code, INVALID)

    def _select(self, code: int, name: bytes, queries: list[bytes]) -> None:
        export = self._find(code, name)
        if isinstance(export, int):
            self._answer(code, export)
            return
        known = frozenset(export.contexts)
        must = may = known & frozenset(queries)
        if code == wire.LIST_META and not queries:
            must = may = known
        elif code == wire.LIST_META:
            families = tuple(query for query in queries if query.endswith(b":"))
            may |= {each for each in known if each.startswith(families)}
        finals = (ACK,) if code == wire.LIST_META else (ACK, TOO_BIG)
        if code == wire.SET_META:
            self.found.selected = len(self.found.answers)
            self._selected_of = export
        self._answer(code, *finals, export=export, must=must, may=may)


def _string(data: bytes, at: int) -> tuple[bytes | None, int]:
    """A counted string, and where it ends; None if it is not there as a whole, or holds a zero byte."""
    if len(data) < at + 4:
        return None, at
    length = struct.unpack_from(">I", data, at)[0]
    found = data[at + 4 : at + 4 + length]
    too_long = length > LONGEST_STRING
    return (found if len(found) == length and (too_long or b"\0" not in found) else None), at + 4 + length
