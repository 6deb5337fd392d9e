"""The files under an image: its data file and its backing chain, opened without trusting the image.

What an image names is untrusted input: a file is opened only as the format that the image records for
it (a guest could write a qcow2 header into a raw disk, and name any file of the host in it), only if it is
a regular file or block device, and only where ``Confinement`` allows.
"""

from __future__ import annotations

import errno
import json
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nbdbm.errors import CorruptError, FormatError, ImageError, UnsupportedError, UnsupportedFormat
from nbdbm.image.blockfile import BlockFile, HostFile, ThreadedFile
from nbdbm.image.cache import TableCache
from nbdbm.image.clusters import ClusterMap, load_l1
from nbdbm.qcow2.compressed import Decompressor, decompressor
from nbdbm.qcow2.constants import MAGIC, MAX_SNAPSHOT_TABLE, V3_MIN_HEADER_LENGTH
from nbdbm.qcow2.geometry import Geometry
from nbdbm.qcow2.header import Header
from nbdbm.qcow2.snapshots import SnapshotEntry, find_snapshot

MAX_CHAIN = 200
"""Layers of a chain. Real ones have a few dozens; each costs a file descriptor or two, and every read of
unallocated space a look into each."""

MAX_L1_TOTAL = 256 * 1024 * 1024
"""Bytes of L1 tables of a chain, all held in memory: a chain of sparse files may ask for 32 MiB each."""

FORMATS = ("qcow2", "raw")

HARMLESS_OPTIONS = {
    "read-only",
    "auto-read-only",
    "cache",
    "aio",
    "discard",
    "detect-zeroes",
    "node-name",
    "locking",
}
"""Options of a ``json:`` name that do not change what is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """Where an image's references may lead."""

    no_backing: bool = False
    root: str | None = None
    """A directory; None: anywhere."""
    force_share: bool = False

    def check_reference(self, path: str, what: str, name: str) -> None:
        """Refuse that ``path`` refers to another file at all.

        Raises:
            ImageError: --no-backing was given.
        """
        if self.no_backing:
            raise ImageError(path, f"{what} is {name!r}: refused by --no-backing", errno=errno.EPERM)

    def check_place(self, file: HostFile, path: str, what: str, name: str) -> None:
        """Refuse an open file that lies elsewhere, links resolved.

        Raises:
            ImageError: it is outside of --backing-root.
        """
        if self.root is None:
            return
        root = os.path.realpath(self.root)
        real = file.real_path()
        if os.path.commonpath((root, real)) != root:
            raise ImageError(
                path,
                f"{what} is {name!r}, really {real}: outside of --backing-root {root}",
                errno=errno.EPERM,
            )


@dataclass(slots=True, kw_only=True)
class Layer:
    """One image of the chain, open."""

    path: str
    format: str
    file: HostFile
    size: int
    """Of its virtual disk, bytes."""
    header: Header | None = None
    map: ClusterMap | None = None
    """None: raw, every byte lies at its own offset of ``file``."""
    data_file: HostFile | None = None
    decompress: Decompressor | None = None
    snapshots: list[SnapshotEntry] = field(default_factory=list)
    sparse: bool = False
    """The file is raw and has holes, or may have."""

    @property
    def data(self) -> BlockFile:
        """Where the guest's bytes lie."""
        return self.data_file or self.file

    def close(self) -> None:
        """Close the files; idempotent."""
        self.file.close()
        if self.data_file is not None:
            self.data_file.close()


FileOpener = Callable[[str, bool], HostFile]
"""(path, writable) -> the file, open. Raises ImageError."""


def _open_host_file(path: str, writable: bool) -> HostFile:
    return ThreadedFile.open(path, writable=writable)


class Reference(NamedTuple):
    """A file that an image names."""

    path: str
    format: str | None
    """As the name itself says (``json:``); None if it does not."""


# -- names -------------------------------------------------------------------------------------


def resolve(image: str, what: str, name: str) -> Reference:
    """The file that ``image`` means by ``name``: a path, ``file:PATH`` or ``json:{...}``.

    Relative paths begin at the image's directory.

    Raises:
        ImageError: the name means something other than a local file, or cannot be understood.
    """
    format_ = None
    if name.startswith("json:"):
        target, format_ = _parse_json(image, what, name)
    elif name.startswith("file:"):
        target = name.removeprefix("file:")
    else:
        target = name
        protocol, colon, _ = name.partition(":")
        if colon and "/" not in protocol:
            raise UnsupportedError(
                image, f"{what} is {name!r}: protocol {protocol!r} is not supported, only files"
            )
    if not target:
        raise ImageError(image, f"{what} is {name!r}: it names no file", errno=errno.EINVAL)
    return Reference(os.path.join(os.path.dirname(image), target), format_)


def _parse_json(image: str, what: str, name: str) -> tuple[str, str | None]:
    """File name and format of a ``json:`` pseudo-protocol name."""

    def refuse(why: str) -> ImageError:
        return UnsupportedError(image, f"{what} is {name!r}: {why}")

    try:
        options = _flatten(json.loads(name.removeprefix("json:")))
    except (ValueError, RecursionError) as error:
        raise refuse(f"not a JSON object ({type(error).__name__})") from error
    for key in [
        key for key in options if key.rpartition(".")[2] in HARMLESS_OPTIONS or ".cache." in f".{key}"
    ]:
        del options[key]
    driver = options.pop("driver", None)
    if driver == "file":
        # A protocol node by itself: the format is the one that the header records.
        options = {f"file.{key}": value for key, value in options.items()}
        format_ = None
    elif driver is None or driver in FORMATS:
        protocol = options.pop("file.driver", "file")
        if protocol != "file":
            raise refuse(f"driver {protocol!r} is not supported, only 'file'")
        format_ = driver
    else:
        raise refuse(f"driver {driver!r} is not supported, only qcow2 and raw images in files")
    target = options.pop("file.filename", None)
    if options:
        raise refuse(f"option {next(iter(options))!r} is not supported")
    if not isinstance(target, str) or "\0" in target:
        raise refuse("it has no file.filename")
    return target, format_


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as dotted keys. Raises ValueError for what is not an object, or says a key twice."""
    if not isinstance(value, dict):
        raise ValueError("not an object")
    flat: dict[str, Any] = {}
    for key, item in value.items():
        for name, leaf in (
            _flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
        ).items():
            if name in flat:
                raise ValueError(f"{name} appears twice")
            flat[name] = leaf
    return flat


# -- opening -----------------------------------------------------------------------------------


class ChainOpener:
    """Opens one image with everything under it; keeps what concerns the chain as a whole."""

    def __init__(
        self,
        confinement: Confinement,
        cache: TableCache,
        notices: list[str],
        open_file: FileOpener | None = None,
    ) -> None:
        self._open_host_file = open_file or _open_host_file
        self._confinement = confinement
        self._cache = cache
        self._notices = notices
        self._seen: dict[tuple[int, int], str] = {}
        self._l1_total = 0
        self._chain = True

    async def open(
        self,
        path: str,
        format_: str | None,
        snapshot: str | None,
        *,
        writable: bool = False,
        chain: bool = True,
    ) -> list[Layer]:
        """The layers from the active one down; that one and its data file ``writable``.

        Without ``chain`` the active one's own file is all that is opened: its metadata can be used then,
        and no data can be read.

        Raises:
            ImageError: any file of the chain cannot be used; nothing stays open then.
        """
        layers: list[Layer] = []
        try:
            file = self._open_file(path, path, None, writable=writable)
            self._chain = chain
            layers.append(await self._open_layer(file, format_ or await self._probe(file), 0, snapshot))
            while (header := layers[-1].header) is not None and header.backing_file is not None:
                if not chain:
                    self._confinement.check_reference(path, "backing file", header.backing_file)
                    break
                if len(layers) == MAX_CHAIN:
                    raise UnsupportedError(path, f"its backing chain has more than {MAX_CHAIN} layers")
                layers.append(await self._open_backing(layers[-1].path, header, len(layers)))
        except BaseException:
            for layer in layers:
                layer.close()
            raise
        return layers

    async def _probe(self, file: HostFile) -> str:
        """The format of the active image when nobody has said it: qcow2, or a refusal."""
        try:
            if await file.pread(0, 4) == MAGIC.to_bytes(4):
                return "qcow2"
            file_is = "not a qcow2 image (magic); if it is a raw image, say --format raw"
            raise ImageError(file.path, file_is, errno=errno.EINVAL)
        except BaseException:
            file.close()
            raise

    def _open_file(
        self, path: str, image: str, reference: tuple[str, str] | None, *, writable: bool = False
    ) -> HostFile:
        """Open and lock one file for reading; ``reference``: (what, name) by which ``image`` refers to it."""
        try:
            file = self._open_host_file(path, writable)
        except ImageError as error:
            if reference is None:
                raise
            what, name = reference
            raise ImageError(
                image, f"{what} is {name!r}: {path} {error.reason}", errno=error.errno
            ) from error
        try:
            if reference is not None:
                self._confinement.check_place(file, image, *reference)
            if reference is not None and file.identity in self._seen:
                what, name = reference
                again = self._seen[file.identity]
                raise ImageError(
                    image,
                    f"{what} is {name!r}: that is {again} again, the chain is a loop",
                    errno=errno.ELOOP,
                )
            self._seen[file.identity] = path
            notice = file.lock(writable=writable, force_share=self._confinement.force_share)
            if notice is not None:
                self._notices.append(notice)
        except BaseException:
            file.close()
            raise
        return file

    async def _open_backing(self, image: str, header: Header, place: int) -> Layer:
        name = header.backing_file
        assert name is not None
        what = "backing file"
        self._confinement.check_reference(image, what, name)
        reference = resolve(image, what, name)
        recorded = header.backing_format
        format_ = reference.format or recorded
        if not format_:
            raise UnsupportedError(
                image,
                f"{what} is {name!r}, and its format is not recorded; record it: "
                f"qemu-img rebase -u -F FORMAT -b {name!r} {image!r}",
            )
        if format_ not in FORMATS:
            raise UnsupportedError(
                image, f"{what} is {name!r}: format {format_!r} is not supported, only qcow2 and raw"
            )
        if recorded and recorded != format_:
            raise ImageError(
                image,
                f"{what} is {name!r}: backing_format is {recorded!r}, which contradicts it",
                errno=errno.EINVAL,
            )
        return await self._open_layer(
            self._open_file(reference.path, image, (what, name)), format_, place, None
        )

    async def _open_layer(self, file: HostFile, format_: str, place: int, snapshot: str | None) -> Layer:
        """The layer in ``file``, which is closed if that fails."""
        layer = Layer(path=file.path, format=format_, file=file, size=file.size)
        try:
            if format_ == "qcow2":
                await self._load_qcow2(layer, place, snapshot)
            elif format_ == "raw":
                if snapshot is not None:
                    raise ImageError(file.path, "a raw image has no snapshots", errno=errno.EINVAL)
                layer.sparse = file.allocated() < file.size
            else:
                raise UnsupportedError(file.path, f"format {format_!r} is not supported, only qcow2 and raw")
        except FormatError as error:
            layer.close()
            kind = UnsupportedError if isinstance(error, UnsupportedFormat) else CorruptError
            raise kind(file.path, str(error)) from error
        except OSError as error:
            layer.close()
            raise ImageError(file.path, f"cannot be read: {error.strerror}", errno=error.errno) from error
        except BaseException:
            layer.close()
            raise
        return layer

    async def _load_qcow2(self, layer: Layer, place: int, snapshot: str | None) -> None:
        file = layer.file
        start = await file.pread(0, min(V3_MIN_HEADER_LENGTH, file.size))
        header = Header.parse(await file.pread(0, Header.peek_cluster_size(start)))
        header.validate(file.size)
        layer.header = header
        layer.size = header.size
        geometry = Geometry(header)
        layer.snapshots = await _load_snapshots(file, header)
        l1_offset, l1_size = header.l1_table_offset, header.l1_size
        if snapshot is not None:
            entry = find_snapshot(layer.snapshots, snapshot)
            if entry is None:
                names = ", ".join(repr(e.name) for e in layer.snapshots[:10]) or "none"
                raise ImageError(
                    file.path, f"there is no snapshot {snapshot!r} (there are: {names})", errno=errno.ENOENT
                )
            # The disk as the guest knew it then; it may have been resized since.
            layer.size = header.size if entry.disk_size is None else entry.disk_size
            entry.validate(layer.size, header.cluster_size, header.l2_entry_size, file.size)
            l1_offset, l1_size = entry.l1_table_offset, entry.l1_size
        if header.has_data_file and self._chain:
            layer.data_file = self._open_data_file(file.path, header, writable=file.writable)
        layer.decompress = decompressor(header.compression_type)

        # Entries beyond the disk hold a snapshot's machine state, and are no concern of ours.
        l1_size = min(l1_size, geometry.l1_entries(layer.size))
        self._l1_total += 8 * l1_size
        if self._l1_total > MAX_L1_TOTAL:
            raise UnsupportedError(
                file.path, f"with its L1 table those of the chain exceed {MAX_L1_TOTAL >> 20} MiB"
            )
        l1 = await load_l1(file, l1_offset, l1_size) if l1_size else array("Q")
        layer.map = ClusterMap(file, layer.data, geometry, l1, layer.size, self._cache, place)

    def _open_data_file(self, image: str, header: Header, *, writable: bool) -> HostFile:
        name = header.data_file
        what = "data file"
        if not name:
            raise ImageError(image, "its data lies in an external file, whose name is not recorded")
        self._confinement.check_reference(image, what, name)
        reference = resolve(image, what, name)
        if reference.format not in (None, "raw"):
            raise UnsupportedError(
                image, f"{what} is {name!r}: it must be a plain file, not {reference.format}"
            )
        return self._open_file(reference.path, image, (what, name), writable=writable)


async def _load_snapshots(file: BlockFile, header: Header) -> list[SnapshotEntry]:
    """The snapshot table, whose length shows only while it is parsed."""
    if not header.nb_snapshots:
        return []
    offset = header.snapshots_offset
    length = 64 * 1024
    while True:
        whole = offset + length >= file.size
        table = await file.pread(offset, max(0, min(length, file.size - offset)))
        entries = SnapshotEntry.parse_table(table, header.nb_snapshots)
        if entries is not None:
            return entries
        if whole:
            raise FormatError("snapshot table", None, f"reaches past the file's end ({file.size})")
        length = min(4 * length, MAX_SNAPSHOT_TABLE)
