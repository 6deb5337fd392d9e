"""Header extensions: type, length, data; kept verbatim, the known ones also understood.

Specification: "Header extensions", "String header extensions", "Feature name table".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from nbdbm.errors import FormatError
from nbdbm.qcow2.constants import ExtensionType, FeatureKind

Buffer = bytes | bytearray | memoryview


EXTENSION = struct.Struct(">II")
"""Type and length in bytes, before the data. The data is padded to a multiple of 8 bytes."""
FEATURE_NAME = struct.Struct(">BB46s")


class HeaderExtension(NamedTuple):
    """One extension: its type and its data without padding."""

    type: int
    data: bytes

    def pack(self) -> bytes:
        """Type, length, data, and zeroes up to the next multiple of 8."""
        return EXTENSION.pack(self.type, len(self.data)) + self.data + bytes(-len(self.data) % 8)

    def __str__(self) -> str:
        return f"{type_name(self.type)}, {len(self.data)} bytes"


def type_name(type_: int) -> str:
    """The specification's name of a type, or its number."""
    try:
        return ExtensionType(type_).name
    except ValueError:
        return f"{type_:#010x}"


def parse_extensions(buf: Buffer, start: int, end: int) -> tuple[HeaderExtension, ...]:
    """Every extension in ``buf[start:end]``, in file order, without the END that closes them.

    The area may also end without END, exactly at ``end`` or too close to it for another extension
    (version 2 images of old programs have no extensions, and their backing name begins right there).

    Raises:
        FormatError: an extension reaches past ``end``.
    """
    found: list[HeaderExtension] = []
    at = start
    while at + EXTENSION.size <= end:
        type_, length = EXTENSION.unpack_from(buf, at)
        if type_ == ExtensionType.END:
            break
        at += EXTENSION.size
        if length > end - at:
            raise FormatError(
                f"length of header extension {type_name(type_)} at byte {at - EXTENSION.size}",
                length,
                f"only {end - at} bytes are left for it",
            )
        found.append(HeaderExtension(type_, bytes(buf[at : at + length])))
        at += length + -length % 8
    return tuple(found)


def pack_extensions(extensions: Iterable[HeaderExtension]) -> bytes:
    """The extension area, closed by END."""
    return b"".join(e.pack() for e in (*extensions, HeaderExtension(ExtensionType.END, b"")))


class FeatureName(NamedTuple):
    """An entry of the feature name table: what bit ``bit`` of the features of ``kind`` is called."""

    kind: int
    bit: int
    name: str

    @classmethod
    def parse_table(cls, data: bytes) -> list[FeatureName]:
        """Every whole entry of the table; it only serves messages, so odd bytes at its end are ignored."""
        whole = len(data) - len(data) % FEATURE_NAME.size
        return [
            cls(kind, bit, name.rstrip(b"\0").decode("utf-8", "replace"))
            for kind, bit, name in FEATURE_NAME.iter_unpack(data[:whole])
        ]

    def pack(self) -> bytes:
        """One 48-byte entry."""
        return FEATURE_NAME.pack(self.kind, self.bit, self.name.encode())


def name_features(bits: int, kind: FeatureKind, extensions: Iterable[HeaderExtension]) -> str:
    """The set bits of ``bits`` in words, by the image's own feature name table where it knows them."""
    names = {
        entry.bit: entry.name
        for extension in extensions
        if extension.type == ExtensionType.FEATURE_NAMES
        for entry in FeatureName.parse_table(extension.data)
        if entry.kind == kind and entry.name.isprintable() and entry.name
    }
    return ", ".join(
        f"bit {bit} ({names[bit]})" if bit in names else f"bit {bit}" for bit in range(64) if bits >> bit & 1
    )
