"""The errors that cross layers.

    NbdbmError                  anything this program reports in one line; carries an errno
    +-- UsageError              a request that cannot be carried out as asked (name, option, state)
    |   +-- Mistakes            several of them at once, each in its line
    +-- ImageError              a file cannot be served as asked; names file, field and value
    |   +-- UnsupportedError    well-formed, but uses a feature we do not have
    |   +-- CorruptError        breaks the format's rules
    |   +-- LockedError         somebody else holds the file
    +-- FormatError             a pure parser's verdict (field, value, rule); the engine adds the file
    |   +-- UnsupportedFormat   the same, for a feature we do not have
    +-- BitmapError             a bitmap cannot do what was asked (missing, inconsistent, read-only, ...)
    +-- NbdError                the NBD peer broke the protocol or answered with an error

Errors that only one module raises and catches live in that module. The true cause is always chained
(``raise ... from``), and logged before the wire narrows it to an NBD errno.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Sequence


class NbdbmError(Exception):
    """Base of every error that ends as one line on stderr, or as an errno on the wire."""

    errno: int = _errno.EIO


class UsageError(NbdbmError):
    """What was asked for cannot be done as asked; the text says why and what would work."""

    errno = _errno.EINVAL


class Mistakes(UsageError):
    """Everything that is wrong with a file that somebody wrote by hand."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = tuple(lines)


class ImageError(NbdbmError):
    """A file that cannot be served or changed as asked.

    The text is ``FILE: reason``; ``reason`` names the field and the value where there is one.
    """

    def __init__(self, path: str, reason: str, *, errno: int | None = None) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        if errno is not None:
            self.errno = errno


class UnsupportedError(ImageError):
    """A well-formed file that uses something this program does not support."""

    errno = _errno.ENOTSUP


class CorruptError(ImageError):
    """A file that breaks its format's rules."""


class LockedError(ImageError):
    """The file is in use by somebody who does not share it."""

    errno = _errno.EAGAIN


class FormatError(NbdbmError):
    """A structure breaks the format's rules; raised by the pure parsers, which know no file name.

    Args:
        field: the specification's name of the field, e.g. ``l1_table_offset``.
        value: the offending value, or None when the structure as a whole is at fault.
        rule: what the value should have been, as a phrase ("must be a multiple of 65536").
    """

    def __init__(self, field: str, value: object, rule: str) -> None:
        shown = "" if value is None else f" is {value:#x}" if isinstance(value, int) else f" is {value!r}"
        super().__init__(f"{field}{shown}: {rule}")
        self.field = field
        self.value = value
        self.rule = rule


class UnsupportedFormat(FormatError):
    """A structure is well-formed but asks for a feature we do not have."""

    errno = _errno.ENOTSUP


class BitmapError(NbdbmError):
    """A bitmap cannot do what was asked of it."""

    errno = _errno.EINVAL

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"bitmap {name!r}: {reason}")
        self.name = name
        self.reason = reason


class NbdError(NbdbmError):
    """The NBD peer broke the protocol, went away, or answered a request with an error."""

    def __init__(self, reason: str, errno: int = _errno.EPROTO) -> None:
        super().__init__(reason)
        self.errno = errno
