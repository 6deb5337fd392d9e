"""create: new, empty qcow2 images.

Layout, one cluster each unless said otherwise; everything up to ``data`` is written:

    | header | refcount table.. | refcount blocks.. | L1 table.. | L2 tables.. | data..            |
                                                                 '- with preallocation=metadata ---'

A file appears under its name complete and durable, or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import stat
import sys
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from nbdbm.errors import ImageError, UsageError
from nbdbm.image.backing import FORMATS, resolve
from nbdbm.image.blockfile import BlockFile, ThreadedFile
from nbdbm.image.locks import lock
from nbdbm.image.threads import in_thread
from nbdbm.qcow2.constants import (
    COPIED,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_DATA_FILE_NAME,
    MAX_L1_SIZE,
    MAX_REFTABLE_SIZE,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_L2_CLUSTER_BITS,
    AutoclearFeature,
    CompatFeature,
    CompressionType,
    ExtensionType,
    FeatureKind,
    IncompatFeature,
)
from nbdbm.qcow2.extensions import FeatureName, HeaderExtension
from nbdbm.qcow2.geometry import Geometry
from nbdbm.qcow2.header import Header
from nbdbm.qcow2.refcount import pack_counts

SECTOR = 512
"""Bytes; the unit of a disk's size, as in QEMU."""
MAX_SIZE = (1 << 63) - SECTOR
"""Bytes of virtual disk: no program can address more."""
FEATURE_NAMES_FROM = 8192
"""Bytes; smaller clusters have no room to spare for the feature name table (QEMU's rule too)."""
CHUNK = 1 << 20
"""Bytes written at a time."""

FEATURE_NAMES = (
    FeatureName(FeatureKind.INCOMPATIBLE, 0, "dirty bit"),
    FeatureName(FeatureKind.INCOMPATIBLE, 1, "corrupt bit"),
    FeatureName(FeatureKind.INCOMPATIBLE, 2, "external data file"),
    FeatureName(FeatureKind.INCOMPATIBLE, 3, "compression type"),
    FeatureName(FeatureKind.INCOMPATIBLE, 4, "extended L2 entries"),
    FeatureName(FeatureKind.COMPATIBLE, 0, "lazy refcounts"),
    FeatureName(FeatureKind.AUTOCLEAR, 0, "bitmaps"),
    FeatureName(FeatureKind.AUTOCLEAR, 1, "raw external data"),
)
"""The specification's names: what a program that does not know a feature says about it."""

COMPRESSION = {"zlib": CompressionType.ZLIB, "zstd": CompressionType.ZSTD}


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """What the new image is to be; the defaults are qemu-img's. Sizes in bytes.

    Raises:
        UsageError: values that exclude each other, or that no image can have.
    """

    size: int | None = None
    """Of the virtual disk, rounded up to 512; None: the backing file's."""
    version: int = 3
    cluster_size: int = 65536
    refcount_bits: int = 16
    extended_l2: bool = False
    lazy_refcounts: bool = False
    compression_type: str = "zlib"
    preallocation: str = "off"
    """``off``, or ``metadata``: every cluster mapped, to a hole of the file."""
    backing_file: str | None = None
    """As recorded; a relative name begins at the image's directory."""
    backing_format: str | None = None
    check_backing: bool = True
    """Refuse a backing file that cannot be opened."""
    data_file: str | None = None
    """External data file, as recorded; created too. A relative name begins at the image's directory."""
    data_file_raw: bool = False
    """The data file is to be a raw image by itself; implies preallocation=metadata."""
    force: bool = False
    """Replace what is there."""

    def __post_init__(self) -> None:
        for wrong, why in self._objections():
            if wrong:
                raise UsageError(why)
        if self.size is not None:
            object.__setattr__(self, "size", -(-self.size // SECTOR) * SECTOR)
            check_size(self.header(), self.size)

    def _objections(self) -> list[tuple[bool, str]]:
        bits = self.cluster_size.bit_length() - 1
        two = self.version == 2
        backed = self.backing_file is not None
        return [
            (
                self.version not in (2, 3),
                f"version {self.version}: must be 2 (compat 0.10) or 3 (compat 1.1)",
            ),
            (
                self.cluster_size != 1 << max(bits, 0) or not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS,
                f"cluster size {self.cluster_size}: must be a power of two from 512 to 2M",
            ),
            (
                self.refcount_bits not in (1, 2, 4, 8, 16, 32, 64),
                f"refcount bits {self.refcount_bits}: must be a power of two from 1 to 64",
            ),
            (two and self.refcount_bits != 16, "compat 0.10 has 16 refcount bits only"),
            (two and self.lazy_refcounts, "lazy refcounts need compat 1.1"),
            (two and self.extended_l2, "extended L2 entries need compat 1.1"),
            (two and self.data_file is not None, "an external data file needs compat 1.1"),
            (
                self.compression_type not in COMPRESSION,
                f"compression type {self.compression_type!r}: zlib or zstd",
            ),
            (two and self.compression_type != "zlib", "compat 0.10 has compression type zlib only"),
            (
                self.extended_l2 and bits < MIN_EXTENDED_L2_CLUSTER_BITS,
                f"cluster size {self.cluster_size}: extended L2 entries need at least 16K",
            ),
            (
                self.preallocation not in ("off", "metadata"),
                f"preallocation {self.preallocation!r}: off or metadata",
            ),
            (
                self.preallocation == "metadata" and backed and not self.extended_l2,
                "preallocation would hide the backing file; with extended L2 entries it does not",
            ),
            (self.data_file_raw and self.data_file is None, "a raw data file needs a data file's name"),
            (self.data_file_raw and backed, "a raw data file excludes a backing file"),
            (self.data_file == "", "the data file's name is empty"),
            (
                self.data_file is not None and len(os.fsencode(self.data_file)) > MAX_DATA_FILE_NAME,
                f"the data file's name is longer than {MAX_DATA_FILE_NAME} bytes",
            ),
            (self.backing_file == "", "the backing file's name is empty"),
            (
                backed and len(os.fsencode(self.backing_file or "")) > MAX_BACKING_NAME,
                f"the backing file's name is longer than {MAX_BACKING_NAME} bytes",
            ),
            (
                backed and self.backing_format is None,
                "a backing file needs its format (--backing-format): a guest could make raw look like qcow2",
            ),
            (
                self.backing_format is not None and self.backing_format not in FORMATS,
                f"backing format {self.backing_format!r}: must be one of {', '.join(FORMATS)}",
            ),
            (self.backing_format is not None and not backed, "a backing format needs a backing file"),
            (self.size is None and not backed, "the size is missing (only a backing file can give it)"),
            (self.size is not None and self.size < 0, "the size is negative"),
            ("\0" in (self.backing_file or "") + (self.data_file or ""), "a file name contains a NUL byte"),
        ]

    def header(self) -> Header:
        """The header of such an image, without tables and size."""
        incompatible = 0
        extensions: list[HeaderExtension] = []
        if self.backing_format is not None:
            extensions.append(HeaderExtension(ExtensionType.BACKING_FORMAT, self.backing_format.encode()))
        if self.data_file is not None:
            incompatible |= IncompatFeature.DATA_FILE
            extensions.append(HeaderExtension(ExtensionType.DATA_FILE, os.fsencode(self.data_file)))
        if self.compression_type != "zlib":
            incompatible |= IncompatFeature.COMPRESSION
        if self.extended_l2:
            incompatible |= IncompatFeature.EXTENDED_L2
        if self.version >= 3 and self.cluster_size >= FEATURE_NAMES_FROM:
            table = b"".join(name.pack() for name in FEATURE_NAMES)
            extensions.append(HeaderExtension(ExtensionType.FEATURE_NAMES, table))
        return Header(
            version=self.version,
            cluster_bits=self.cluster_size.bit_length() - 1,
            refcount_order=self.refcount_bits.bit_length() - 1,
            incompatible_features=int(incompatible),
            compatible_features=int(CompatFeature.LAZY_REFCOUNTS) if self.lazy_refcounts else 0,
            autoclear_features=int(AutoclearFeature.RAW_DATA_FILE) if self.data_file_raw else 0,
            header_length=72 if self.version == 2 else 112,
            compression_type=COMPRESSION[self.compression_type],
            extensions=tuple(extensions),
            backing_file=self.backing_file,
        )


def check_size(header: Header, size: int) -> None:
    """Judge the size of a disk against what an image with such clusters can map.

    Raises:
        UsageError: too large.
    """
    if size > MAX_SIZE:
        raise UsageError(f"size {size}: must be less than 2^63 bytes")
    per_table = Geometry(header).l2_entries << header.cluster_bits
    limit = MAX_L1_SIZE // 8 * per_table
    if size > limit:
        raise UsageError(
            f"size {size}: clusters of {header.cluster_size} bytes allow at most {limit} (take larger ones)"
        )


async def create(path: str, options: CreateOptions) -> CreateOptions:
    """Create the image, and its data file if it is to have one; return the options with the size known.

    What is there already stays unless ``options.force``: a non-empty file or a device is refused. A file is
    replaced as a whole, when the new one is complete; a device is written in place, its header last.

    Raises:
        ImageError: it exists, is in use, or the backing file cannot be used.
        LockedError: what is to be replaced is in use.
        OSError: the host refused; nothing is left behind, and what was there before still is.
    """
    if options.backing_file is not None:
        options = await _with_backing(path, options)
    assert options.size is not None
    data_path = None
    existed = False
    if options.data_file is not None:
        data_path = resolve(path, "data_file", options.data_file).path
        if _same_place(data_path, path):
            raise ImageError(path, "cannot be its own data file", errno=errno.EINVAL)
        size = options.size
        existed = _refuse_existing(data_path, options.force) is not None

        async def fill(file: BlockFile) -> None:
            if file.size < size:
                await file.truncate(size)
            elif file.size:
                await file.zero(0, size, punch=True)
            await file.sync()

        _refuse_existing(path, options.force)
        await _place(data_path, fill, force=options.force)
    try:
        await _place(path, lambda file: create_on(file, options), force=options.force)
    except BaseException:
        if data_path is not None and not existed:
            with contextlib.suppress(OSError):
                os.unlink(data_path)
        raise
    return options


async def create_on(file: BlockFile, options: CreateOptions) -> Header:
    """Write a new image over ``file`` and return its header; ``options.size`` must be known.

    Until the last sector is written, which is the header's first, the file is no image.

    Raises:
        UsageError: the tables exceed a limit of the format, or the header its cluster.
        OSError: the host refused; the file is no image then.
    """
    assert options.size is not None
    plan = _Plan(options, options.size)
    size = plan.header.cluster_size
    packed = plan.header.pack().ljust(size, b"\0")
    used_before = file.size
    if used_before:
        await file.pwrite(0, bytes(min(SECTOR, size)))
        await file.sync()  # Disk: no image any more, and not yet one.
    await plan.write(file, used_before)
    if size > SECTOR:
        await file.pwrite(SECTOR, packed[SECTOR:])
    await file.sync()  # Disk: all of the new image but its magic.
    await file.pwrite(0, packed[:SECTOR])
    await file.sync()  # Disk: the new image.
    return plan.header


class _Plan:
    """Where everything goes. Units are clusters."""

    def __init__(self, options: CreateOptions, size: int) -> None:
        header = options.header()
        check_size(header, size)
        self.geometry = geometry = Geometry(header)
        self.external = options.data_file is not None
        mapped = options.preallocation == "metadata" or options.data_file_raw
        l1_size = geometry.l1_entries(size)
        self.guest_clusters = geometry.clusters(size) if mapped else 0
        self.l2_tables = l1_size if mapped else 0
        self.l1_clusters = geometry.clusters(8 * l1_size)
        data = 0 if self.external else self.guest_clusters
        rest = 1 + self.l1_clusters + self.l2_tables + data
        per_block = geometry.refcount_block_entries
        table = blocks = 0
        while True:
            self.total = rest + table + blocks
            needed = -(-self.total // per_block)
            if (needed, geometry.clusters(8 * needed)) == (blocks, table):
                break
            # Neither ever shrinks, so this ends.
            blocks, table = needed, geometry.clusters(8 * needed)
        if table << geometry.cluster_bits > MAX_REFTABLE_SIZE:
            raise UsageError(
                f"size {size}: preallocated in clusters of {geometry.cluster_size} bytes, it needs a "
                "refcount table of more than 8 MiB (take larger clusters)"
            )
        self.table_clusters, self.blocks = table, blocks
        self.l1_at = 1 + table + blocks
        self.l2_at = self.l1_at + self.l1_clusters
        self.data_at = self.l2_at + self.l2_tables
        bits = geometry.cluster_bits
        self.header = replace(
            header,
            size=size,
            l1_size=l1_size,
            l1_table_offset=self.l1_at << bits if l1_size else 0,
            refcount_table_offset=1 << bits,
            refcount_table_clusters=table,
        )
        self.header.pack()  # Raises now, not half-way, if it does not fit.

    async def write(self, file: BlockFile, used_before: int) -> None:
        """Everything but the header; ``used_before``: bytes of the file that may not be zero."""
        bits, size = self.geometry.cluster_bits, self.geometry.cluster_size
        if file.size < self.total << bits:
            await file.truncate(self.total << bits)
        stale = min(used_before, self.total << bits)
        # What is not written below must read as zeroes: preallocated clusters.
        if stale > size:
            await file.zero(size, stale - size, punch=True)
        # All tables get space on the host now, empty as they are: on a disk that has become full, a flush can
        # carry out what was written before.
        for at in range(size, self.l2_at << bits, CHUNK):
            await file.pwrite(at, bytes(min(CHUNK, (self.l2_at << bits) - at)))
        await _write_words(file, size, range(1 + self.table_clusters << bits, self.l1_at << bits, size))
        for block in range(self.blocks):
            per_block = self.geometry.refcount_block_entries
            ones = min(per_block, self.total - block * per_block)
            order = self.geometry.refcount_order
            # Narrow counts share bytes.
            counts = array("BBBBHIQ"[order], [1] * ones + [0] * (-ones % max(1, 8 >> order)))
            await file.pwrite((1 + self.table_clusters + block) << bits, pack_counts(counts, order))
        if self.l2_tables:
            first = self.l2_at << bits | COPIED
            await _write_words(file, self.l1_at << bits, range(first, first + (self.l2_tables << bits), size))
            await self._write_l2(file)

    async def _write_l2(self, file: BlockFile) -> None:
        bits, entries = self.geometry.cluster_bits, self.geometry.l2_entries
        step = self.geometry.words_per_entry
        base = 0 if self.external else self.data_at
        for table in range(self.l2_tables):
            first = table * entries
            count = min(entries, self.guest_clusters - first)
            start = (base + first) << bits | COPIED
            words = array("Q", range(start, start + (count << bits), 1 << bits))
            if step == 2:
                # No subcluster is allocated: they read from below, the place is only set aside.
                wide = array("Q", bytes(16 * count))
                wide[::2] = words
                if self.external and self.header.raw_data_file:
                    wide[1::2] = array("Q", [0xFFFF_FFFF]) * count
                words = wide
            await file.pwrite((self.l2_at + table) << bits, _big_endian(words))
            if not table % 256:
                await asyncio.sleep(0)


async def _write_words(file: BlockFile, offset: int, values: range) -> None:
    """Write 64-bit numbers from ``offset`` on."""
    per_chunk = CHUNK // 8
    for at in range(0, len(values), per_chunk):
        await file.pwrite(offset + 8 * at, _big_endian(array("Q", values[at : at + per_chunk])))


def _big_endian(words: array[int]) -> bytes:
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()


# -- files --------------------------------------------------------------------------------------


async def _with_backing(path: str, options: CreateOptions) -> CreateOptions:
    """The options with the size filled in from the backing file, after opening it if that is wanted."""
    from nbdbm.image.image import Image, OpenOptions

    assert options.backing_file is not None
    if options.size is not None and not options.check_backing:
        return options
    reference = resolve(path, "backing_file", options.backing_file)
    if _same_place(reference.path, path):
        raise ImageError(path, "cannot be its own backing file", errno=errno.EINVAL)
    # Nothing of it is read but its size, so that a user of it does no harm, nor we to it.
    below = await Image.open(reference.path, OpenOptions(format=options.backing_format, force_share=True))
    try:
        size = below.size if options.size is None else options.size
        if any(_same_file(layer.path, path) for layer in below.chain):
            raise ImageError(path, "is part of its own backing chain", errno=errno.EINVAL)
    finally:
        await below.close()
    return replace(options, size=size)


def _real(path: str) -> str:
    """Where a link leads: what it names is replaced, not the link."""
    return os.path.realpath(path)


def _same_place(one: str, other: str) -> bool:
    """Whether two paths, of which nothing need exist yet, mean the same file."""
    return _real(one) == _real(other)


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _refuse_existing(path: str, force: bool) -> os.stat_result | None:
    """Judge what is there already; None if nothing is."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ImageError(path, f"cannot be created: {error.strerror}", errno=error.errno) from error
    if stat.S_ISREG(status.st_mode):
        if status.st_size and not force:
            raise ImageError(path, "exists and is not empty (--force replaces it)", errno=errno.EEXIST)
    elif stat.S_ISBLK(status.st_mode):
        if not force:
            raise ImageError(path, "is a block device (--force overwrites it)", errno=errno.EEXIST)
    else:
        raise ImageError(path, "exists and is neither a file nor a block device", errno=errno.EEXIST)
    return status


async def _place(path: str, build: Callable[[BlockFile], Awaitable[object]], *, force: bool) -> None:
    """Have ``build`` write a file and give it its name when it is complete and durable."""
    path = _real(path)
    status = _refuse_existing(path, force)
    old: ThreadedFile | None = None
    try:
        if status is not None:
            old = ThreadedFile.open(path, writable=True)
            old.lock(writable=True, force_share=False)
            if stat.S_ISBLK(status.st_mode):
                await build(old)
                return
        await _build_beside(path, build, status)
    finally:
        if old is not None:
            old.close()


async def _build_beside(
    path: str, build: Callable[[BlockFile], Awaitable[object]], status: os.stat_result | None
) -> None:
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name[:200]}.{secrets.token_hex(4)}.new")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ImageError(path, f"cannot be created: {error.strerror}", errno=error.errno) from error
    file = ThreadedFile(temporary, fd, writable=True)
    try:
        # From here on a virtual machine that is quick to find the name waits until it is whole.
        lock(fd, path, writable=True)
        if status is not None:
            os.fchmod(fd, stat.S_IMODE(status.st_mode))
        await build(file)
        await in_thread(os.fsync, fd)  # Disk: the whole file, under its temporary name.
        _name(temporary, path, replacing=status is not None)
        await in_thread(_sync_directory, directory)  # Disk: the whole file, under its name.
    finally:
        file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _name(temporary: str, path: str, *, replacing: bool) -> None:
    """Rename; somebody else's file that came up meanwhile is not replaced."""
    if not replacing:
        try:
            os.link(temporary, path)
            return
        except FileExistsError as error:
            raise ImageError(path, "was created by somebody else meanwhile", errno=errno.EEXIST) from error
        except OSError as error:
            # File systems without hard links.
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
    os.replace(temporary, path)


def _sync_directory(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
