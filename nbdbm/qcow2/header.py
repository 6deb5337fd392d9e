"""The image header: versions 2 and 3, with its extensions and the backing file's name.

Specification: "Header", "Additional fields", "Header extensions". All of it lies in the first cluster:

    0        72 (v2) / header_length (v3)                               cluster_size
    | fields | unknown fields | extensions ... END | backing file name | free       |
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from nbdbm.errors import FormatError, UnsupportedFormat
from nbdbm.qcow2.bitmapdir import BitmapsExtension
from nbdbm.qcow2.constants import (
    KNOWN_AUTOCLEAR,
    KNOWN_INCOMPATIBLE,
    MAGIC,
    MAX_BACKING_FORMAT,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_DATA_FILE_NAME,
    MAX_L1_SIZE,
    MAX_REFCOUNT_ORDER,
    MAX_REFTABLE_SIZE,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_L2_CLUSTER_BITS,
    V2_HEADER_LENGTH,
    V2_REFCOUNT_ORDER,
    V3_MIN_HEADER_LENGTH,
    AutoclearFeature,
    CompatFeature,
    CompressionType,
    CryptMethod,
    ExtensionType,
    FeatureKind,
    IncompatFeature,
)
from nbdbm.qcow2.extensions import (
    Buffer,
    HeaderExtension,
    name_features,
    pack_extensions,
    parse_extensions,
)

V2 = struct.Struct(">IIQIIQIIQQIIQ")
V3 = struct.Struct(">QQQII")
"""What version 3 adds, at byte 72."""
COMPRESSION_TYPE_AT = V3_MIN_HEADER_LENGTH
UNKNOWN_AT = COMPRESSION_TYPE_AT + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The header of one image, fields under the specification's names; offsets and sizes in bytes.

    A parsed header is well-formed as far as its own bytes go; ``validate`` judges it against the file.
    Names are decoded as UTF-8 with surrogate escapes, so that any bytes survive a round trip.
    """

    version: int = 3
    backing_file_offset: int = 0
    backing_file_size: int = 0
    cluster_bits: int = 16
    size: int = 0
    """The virtual disk's size."""
    crypt_method: int = CryptMethod.NONE
    l1_size: int = 0
    """Entries."""
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = V2_REFCOUNT_ORDER
    header_length: int = 112
    compression_type: int = CompressionType.ZLIB
    unknown_fields: bytes = b""
    """Bytes 105 to header_length, verbatim: padding, or fields that came after us."""
    extensions: tuple[HeaderExtension, ...] = ()
    """In file order, unknown ones verbatim, without the closing END."""
    backing_file: str | None = None

    @staticmethod
    def peek_cluster_size(buf: Buffer) -> int:
        """The cluster size, from the first 104 bytes of the file: how much ``parse`` wants to see.

        Raises:
            FormatError: not a qcow2 image, or the cluster size is out of range.
            UnsupportedFormat: a version other than 2 and 3.
        """
        if len(buf) < V2_HEADER_LENGTH:
            raise FormatError("length of the file", len(buf), "too short for a qcow2 header")
        magic, version, _, _, cluster_bits = struct.unpack_from(">IIQII", buf)
        if magic != MAGIC:
            raise FormatError("magic", magic, "not a qcow2 image")
        if version not in (2, 3):
            raise UnsupportedFormat("version", version, "only 2 and 3 are supported")
        if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
            raise FormatError(
                "cluster_bits", cluster_bits, "must be 9 to 21 (clusters of 512 bytes to 2 MiB)"
            )
        return 1 << int(cluster_bits)

    @classmethod
    def parse(cls, buf: Buffer) -> Header:
        """Read the header from the whole first cluster (bytes behind it are ignored).

        Raises:
            FormatError: a field makes the rest unreadable; it is named with its value.
            UnsupportedFormat: the version, or an unknown incompatible feature in an image whose
                extensions cannot be walked.
        """
        cluster_size = cls.peek_cluster_size(buf)
        assert len(buf) >= cluster_size
        (
            _,
            version,
            backing_file_offset,
            backing_file_size,
            cluster_bits,
            size,
            crypt_method,
            l1_size,
            l1_table_offset,
            refcount_table_offset,
            refcount_table_clusters,
            nb_snapshots,
            snapshots_offset,
        ) = V2.unpack_from(buf)
        incompatible = compatible = autoclear = 0
        refcount_order, header_length = V2_REFCOUNT_ORDER, V2_HEADER_LENGTH
        compression_type = 0
        unknown_fields = b""
        if version >= 3:
            incompatible, compatible, autoclear, refcount_order, header_length = V3.unpack_from(buf, V2.size)
            if header_length < V3_MIN_HEADER_LENGTH or header_length % 8:
                raise FormatError("header_length", header_length, "must be a multiple of 8, at least 104")
            if header_length > cluster_size:
                raise FormatError(
                    "header_length", header_length, f"must fit the first cluster ({cluster_size} bytes)"
                )
            if header_length > COMPRESSION_TYPE_AT:
                compression_type = buf[COMPRESSION_TYPE_AT]
                unknown_fields = bytes(buf[UNKNOWN_AT:header_length])

        backing_file = None
        area_end = cluster_size
        if backing_file_offset:
            if not header_length <= backing_file_offset < cluster_size:
                raise FormatError(
                    "backing_file_offset",
                    backing_file_offset,
                    f"must lie behind the header ({header_length} bytes) in the first cluster",
                )
            if backing_file_size > min(MAX_BACKING_NAME, cluster_size - backing_file_offset):
                raise FormatError(
                    "backing_file_size",
                    backing_file_size,
                    "must be at most 1023 and end inside the first cluster",
                )
            area_end = backing_file_offset
            name = bytes(buf[backing_file_offset : backing_file_offset + backing_file_size])
            # QEMU treats an empty name as no backing file.
            backing_file = _decode(name, "backing file name") if name else None
        try:
            extensions = parse_extensions(buf, header_length, area_end)
        except FormatError as error:
            if unknown := incompatible & ~KNOWN_INCOMPATIBLE:
                # What we cannot know may well have moved the extensions: that is the better message.
                raise _unknown_feature(unknown, ()) from error
            raise
        header = cls(
            version=version,
            backing_file_offset=backing_file_offset,
            backing_file_size=backing_file_size,
            cluster_bits=cluster_bits,
            size=size,
            crypt_method=crypt_method,
            l1_size=l1_size,
            l1_table_offset=l1_table_offset,
            refcount_table_offset=refcount_table_offset,
            refcount_table_clusters=refcount_table_clusters,
            nb_snapshots=nb_snapshots,
            snapshots_offset=snapshots_offset,
            incompatible_features=incompatible,
            compatible_features=compatible,
            autoclear_features=autoclear,
            refcount_order=refcount_order,
            header_length=header_length,
            compression_type=compression_type,
            unknown_fields=unknown_fields,
            extensions=extensions,
            backing_file=backing_file,
        )
        header._check_strings()
        return header

    # -- what the fields mean ------------------------------------------------------------------

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def dirty(self) -> bool:
        """Refcounts may be wrong (lazy refcounts, not closed cleanly); reading is not affected."""
        return bool(self.incompatible_features & IncompatFeature.DIRTY)

    @property
    def corrupt(self) -> bool:
        """Some program found the image damaged; it must not be written to."""
        return bool(self.incompatible_features & IncompatFeature.CORRUPT)

    @property
    def extended_l2(self) -> bool:
        """L2 entries are 128 bits wide and clusters have subclusters."""
        return bool(self.incompatible_features & IncompatFeature.EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """Guest data lies in an external file."""
        return bool(self.incompatible_features & IncompatFeature.DATA_FILE)

    @property
    def raw_data_file(self) -> bool:
        """The external data file is, by itself, a raw image of the disk."""
        return self.has_data_file and bool(self.autoclear_features & AutoclearFeature.RAW_DATA_FILE)

    @property
    def lazy_refcounts(self) -> bool:
        """Refcount updates may be postponed behind the dirty bit."""
        return bool(self.compatible_features & CompatFeature.LAZY_REFCOUNTS)

    @property
    def refcount_bits(self) -> int:
        """Width of a refcount."""
        return 1 << self.refcount_order

    @property
    def l2_entry_size(self) -> int:
        """Bytes."""
        return 16 if self.extended_l2 else 8

    @property
    def unknown_autoclear(self) -> int:
        """Bits of autoclear_features to be cleared before the first write."""
        return self.autoclear_features & ~KNOWN_AUTOCLEAR

    @property
    def l1_entries_needed(self) -> int:
        """L1 entries that the disk takes."""
        per_table = self.cluster_size // self.l2_entry_size * self.cluster_size
        return -(-self.size // per_table)

    def extension(self, type_: ExtensionType) -> HeaderExtension | None:
        """The extension of this type, if there is one."""
        return next((e for e in self.extensions if e.type == type_), None)

    @property
    def backing_format(self) -> str | None:
        """The driver that the backing file is to be opened with, as recorded."""
        extension = self.extension(ExtensionType.BACKING_FORMAT)
        return _decode(extension.data) if extension else None

    @property
    def data_file(self) -> str | None:
        """The recorded name of the external data file."""
        extension = self.extension(ExtensionType.DATA_FILE)
        return _decode(extension.data) if extension else None

    @property
    def bitmaps(self) -> BitmapsExtension | None:
        """The bitmaps extension if there is a well-formed one, stale or not (see AutoclearFeature)."""
        extension = self.extension(ExtensionType.BITMAPS)
        try:
            return BitmapsExtension.parse(extension.data) if extension else None
        except FormatError:
            return None

    # -- judging -------------------------------------------------------------------------------

    def _check_strings(self) -> None:
        """Judge the string extensions: which file is opened, and as what, must not be ambiguous."""
        for type_, limit in (
            (ExtensionType.BACKING_FORMAT, MAX_BACKING_FORMAT),
            (ExtensionType.DATA_FILE, MAX_DATA_FILE_NAME),
        ):
            found = [e for e in self.extensions if e.type == type_]
            if len(found) > 1:
                raise FormatError(f"header extension {type_.name}", None, "appears more than once")
            for extension in found:
                if len(extension.data) > limit:
                    raise FormatError(
                        f"length of header extension {type_.name}",
                        len(extension.data),
                        f"at most {limit} bytes",
                    )
                _decode(extension.data, f"header extension {type_.name}")

    def validate(self, file_size: int) -> None:
        """Judge every field that reading relies on, against a file of ``file_size`` bytes.

        The dirty and corrupt bits pass: whether they matter depends on what the image is opened for.

        Raises:
            FormatError: a field breaks a rule or a limit.
            UnsupportedFormat: encryption, an unknown incompatible feature or compression.
        """
        if unknown := self.incompatible_features & ~KNOWN_INCOMPATIBLE:
            raise _unknown_feature(unknown, self.extensions)
        if self.crypt_method:
            names: dict[int, str] = {CryptMethod.AES: "AES", CryptMethod.LUKS: "LUKS"}
            how = names.get(self.crypt_method, "unknown method")
            raise UnsupportedFormat(
                "crypt_method", self.crypt_method, f"the image is encrypted ({how}), which is not supported"
            )
        self._check_compression()
        if self.extended_l2 and self.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS:
            raise FormatError(
                "cluster_bits", self.cluster_bits, "must be at least 14 with extended L2 entries"
            )
        if self.refcount_order > MAX_REFCOUNT_ORDER:
            raise FormatError("refcount_order", self.refcount_order, "must be at most 6 (64 bits)")
        if self.raw_data_file and self.backing_file is not None:
            raise FormatError(
                "autoclear_features",
                self.autoclear_features,
                "a raw external data file excludes a backing file",
            )
        self._check_tables(file_size)

    def _check_compression(self) -> None:
        flagged = bool(self.incompatible_features & IncompatFeature.COMPRESSION)
        if self.compression_type not in (CompressionType.ZLIB, CompressionType.ZSTD):
            raise UnsupportedFormat(
                "compression_type", self.compression_type, "only 0 (zlib) and 1 (zstd) are supported"
            )
        if flagged != (self.compression_type != CompressionType.ZLIB):
            state = "set" if flagged else "not set"
            raise FormatError(
                "compression_type",
                self.compression_type,
                f"contradicts incompatible feature bit 3 (compression type), which is {state}",
            )

    def _check_tables(self, file_size: int) -> None:
        cluster_size = self.cluster_size
        if self.size >= 1 << 63:
            raise FormatError("size", self.size, "must be less than 2^63 bytes")
        if 8 * self.l1_size > MAX_L1_SIZE:
            raise FormatError("l1_size", self.l1_size, f"at most {MAX_L1_SIZE // 8} entries (32 MiB)")
        if self.l1_size < self.l1_entries_needed:
            raise FormatError(
                "l1_size",
                self.l1_size,
                f"too small: a disk of {self.size} bytes needs {self.l1_entries_needed} entries",
            )
        # A table beyond the end of the file would read as "nothing allocated": a truncated image must
        # not be served as an empty one.
        _check_offset("l1_table_offset", self.l1_table_offset, 8 * self.l1_size, cluster_size, file_size)
        table = self.refcount_table_clusters * cluster_size
        if not 0 < table <= MAX_REFTABLE_SIZE:
            raise FormatError(
                "refcount_table_clusters",
                self.refcount_table_clusters,
                f"must be 1 to {MAX_REFTABLE_SIZE // cluster_size} (8 MiB)",
            )
        _check_offset("refcount_table_offset", self.refcount_table_offset, table, cluster_size, file_size)
        if self.nb_snapshots > MAX_SNAPSHOTS:
            raise FormatError("nb_snapshots", self.nb_snapshots, f"at most {MAX_SNAPSHOTS}")
        if self.nb_snapshots:
            # 40 bytes is the shortest an entry can be; how long they are is for the table's parser.
            least = 40 * self.nb_snapshots
            _check_offset("snapshots_offset", self.snapshots_offset, least, cluster_size, file_size)

    # -- writing -------------------------------------------------------------------------------

    def pack(self) -> bytes:
        """The bytes of the header, its extensions, END, and the backing file's name right behind.

        ``backing_file_offset`` and ``backing_file_size`` are computed. Whoever writes the result
        zeroes the rest of the first cluster: no other data may lie there.

        Raises:
            FormatError: all of it does not fit the first cluster.
        """
        extensions = pack_extensions(self.extensions)
        name = (self.backing_file or "").encode("utf-8", "surrogateescape")
        length = V2_HEADER_LENGTH if self.version == 2 else self.header_length
        name_at = length + len(extensions)
        fields = V2.pack(
            MAGIC,
            self.version,
            name_at if name else 0,
            len(name),
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        if self.version >= 3:
            fields += V3.pack(
                self.incompatible_features,
                self.compatible_features,
                self.autoclear_features,
                self.refcount_order,
                length,
            )
            if length > COMPRESSION_TYPE_AT:
                fields += bytes((self.compression_type,)) + self.unknown_fields
                fields += bytes(length - len(fields))
        assert len(fields) == length
        packed = fields + extensions + name
        if len(packed) > self.cluster_size:
            raise FormatError(
                "length of header and extensions",
                len(packed),
                f"at most one cluster ({self.cluster_size} bytes)",
            )
        return packed

    def with_extension(self, extension: HeaderExtension) -> Header:
        """This header with ``extension`` in place of the one of its type, or as the last one."""
        if self.extension(ExtensionType(extension.type)) is None:
            return replace(self, extensions=(*self.extensions, extension))
        changed = tuple(extension if e.type == extension.type else e for e in self.extensions)
        return replace(self, extensions=changed)

    def without_extension(self, type_: ExtensionType) -> Header:
        """This header without extensions of this type."""
        return replace(self, extensions=tuple(e for e in self.extensions if e.type != type_))


def _decode(raw: bytes, field: str | None = None) -> str:
    """A name from the file. With ``field``, a NUL inside is refused: no file has such a name, and what
    different programs make of it differs."""
    if field is not None and b"\0" in raw:
        raise FormatError(field, raw.decode("utf-8", "backslashreplace"), "must not contain a NUL byte")
    return raw.decode("utf-8", "surrogateescape")


def _unknown_feature(bits: int, extensions: tuple[HeaderExtension, ...]) -> UnsupportedFormat:
    names = name_features(bits, FeatureKind.INCOMPATIBLE, extensions)
    return UnsupportedFormat("incompatible_features", bits, f"this image needs unsupported features: {names}")


def _check_offset(field: str, offset: int, length: int, cluster_size: int, file_size: int) -> None:
    """Judge where a table of ``length`` bytes begins."""
    if offset % cluster_size:
        raise FormatError(field, offset, f"must be a multiple of the cluster size ({cluster_size})")
    if not length:
        return
    if not offset:
        raise FormatError(field, offset, "the table would overlap the header")
    if offset + length > file_size:
        raise FormatError(field, offset, f"{length} bytes from there reach past the file's end ({file_size})")
