"""Malformed images, each through the command line: a clear refusal, or the right service of the rest.

A refusal is one line on stderr that names the file and what is wrong with it, and status 1. Whatever
can be served is: a bad place in the disk's tables is an error for those who read that place, and a bad
bitmap is left out by name. Either way within bounds of memory and time.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from nbdbm.cli import main
from tests.interop.malformed import ADDRESS_SPACE, MEMORY, Edit, also, copy_of, file_size, put, truncated
from tests.interop.serving import fingerprint
from tests.support import images, libnbd, servers
from tests.support.marks import requires
from tests.support.qcow2edit import patch, peek

pytestmark = [requires("qemu-img", "qemu-io", "qemu-nbd", "libnbd")]

REFUSED_WITHIN = 10
"""Seconds."""


# -- refused as a whole -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    edit: Edit
    says: str
    """A word the message must hold: the field, or the thing refused."""
    base: str = "v3"
    options: tuple[str, ...] = ()


def backing(name: bytes, form: bytes | None = b"qcow2") -> Edit:
    """Refer to a backing file, as a header extension and a name right behind it."""

    def edit(path: Path) -> None:
        at = peek(path, 100, "I")
        if form is not None:
            patch(
                path,
                at,
                struct.pack(">II", 0xE2792ACA, len(form)) + form.ljust((len(form) + 7) // 8 * 8, b"\0"),
            )
            at += 8 + (len(form) + 7) // 8 * 8
        patch(path, at, bytes(8) + name)
        patch(path, 8, struct.pack(">QI", at + 8, len(name)))

    return edit


def loop(path: Path) -> None:
    backing(path.name.encode())(path)


def longer_loop(path: Path) -> None:
    other = path.with_name("other.qcow2")
    shutil.copy(path, other)
    backing(path.name.encode())(other)
    backing(b"other.qcow2")(path)


def deep_chain(path: Path) -> None:
    """Each of a thousand images on the next."""
    for number in range(1000):
        link = path.with_name(f"{number}.qcow2")
        with link.open("wb") as file:
            file.truncate(4 << 16)
            with path.open("rb") as source:
                file.write(source.read(4 << 16))
        backing(b"%d.qcow2" % (number + 1))(link)
    backing(b"0.qcow2")(path)


def extension(kind: int, length: int, data: bytes = b"") -> Edit:
    """A header extension in front of all others, whose length may be a lie."""
    return lambda path: patch(path, peek(path, 100, "I"), struct.pack(">II", kind, length) + data)


def named_feature(path: Path) -> None:
    """Incompatible bit 9, and a feature name table that tells its name."""
    patch(path, 72, struct.pack(">Q", 1 << 9))
    entry = struct.pack(">BB", 0, 9) + b"time travel".ljust(46, b"\0")
    patch(path, peek(path, 100, "I"), struct.pack(">II", 0x6803F857, 48) + entry + bytes(8))


REFUSALS: dict[str, Refusal] = {
    "empty": Refusal(truncated(0), ""),
    "a-few-bytes": Refusal(truncated(50), ""),
    "half-a-header": Refusal(truncated(90), ""),
    "not-qcow2": Refusal(put(0, "I", 0x51464900), "raw"),
    "version-1": Refusal(put(4, "I", 1), "version"),
    "version-4": Refusal(put(4, "I", 4), "version"),
    "cluster-bits-8": Refusal(put(20, "I", 8), "cluster_bits"),
    "cluster-bits-22": Refusal(put(20, "I", 22), "cluster_bits"),
    "cluster-bits-all": Refusal(put(20, "I", 0xFFFFFFFF), "cluster_bits"),
    "size-all": Refusal(put(24, "Q", 0xFFFFFFFFFFFFFFFF), "size"),
    "size-beyond-l1": Refusal(put(24, "Q", 1 << 50), "l1_size"),
    "encrypted-aes": Refusal(put(32, "I", 1), "encrypt"),
    "encrypted-luks": Refusal(put(32, "I", 2), "encrypt"),
    "crypt-method-unknown": Refusal(put(32, "I", 77), "crypt"),
    "l1-size-huge": Refusal(put(36, "I", 0x7FFFFFFF), "l1_size"),
    "l1-size-short": Refusal(put(36, "I", 0), "l1_size"),
    "l1-offset-unaligned": Refusal(put(40, "Q", 0x30001), "l1_table_offset"),
    "l1-offset-outside": Refusal(put(40, "Q", 1 << 40), "l1_table_offset"),
    "l1-offset-wraps": Refusal(put(40, "Q", 0xFFFFFFFFFFFF0000), "l1_table_offset"),
    "refcount-table-unaligned": Refusal(put(48, "Q", 0x10200), "refcount_table_offset"),
    "refcount-table-huge": Refusal(put(56, "I", 0x7FFFFFFF), "refcount_table"),
    "refcount-order-7": Refusal(put(96, "I", 7), "refcount_order"),
    "header-length-short": Refusal(put(100, "I", 40), "header_length"),
    "header-length-odd": Refusal(put(100, "I", 107), "header_length"),
    "header-length-huge": Refusal(put(100, "I", 0x10008), "header_length"),
    "snapshots-too-many": Refusal(put(60, "I", 0x7FFFFFFF), "nb_snapshots"),
    "snapshots-unaligned": Refusal(put(60, "IQ", 1, 0x10010), "snapshots_offset"),
    "snapshots-outside": Refusal(put(60, "IQ", 1, 1 << 40), "snapshots_offset"),
    "feature-named": Refusal(named_feature, "time travel"),
    "feature-unnamed": Refusal(put(72, "Q", 1 << 33), "33"),
    "compression-unknown": Refusal(also(put(72, "Q", 8), put(104, "B", 9)), "compression"),
    "compression-without-its-bit": Refusal(put(104, "B", 1), "compression"),
    "extension-too-long": Refusal(extension(0x11223344, 0xFFFFFFF0), "extension"),
    "backing-name-long": Refusal(put(8, "QI", 512, 1024), "backing_file_size"),
    "backing-name-outside": Refusal(put(8, "QI", 0xFFF0, 100), "backing_file"),
    "backing-absent": Refusal(backing(b"nowhere.qcow2"), "nowhere.qcow2"),
    "backing-loop": Refusal(loop, "loop"),
    "backing-longer-loop": Refusal(longer_loop, "loop"),
    "backing-too-deep": Refusal(deep_chain, "layers"),
    "backing-without-format": Refusal(backing(b"base.qcow2", None), "format is not recorded"),
    "backing-format-contradicted": Refusal(
        backing(b'json:{"driver":"raw","file":{"driver":"file","filename":"x"}}'), "contradicts"
    ),
    "backing-format-unknown": Refusal(backing(b"x.vmdk", b"vmdk"), "vmdk"),
    "backing-url": Refusal(backing(b"nbd://localhost/"), "nbd"),
    "backing-json-driver": Refusal(backing(b'json:{"driver":"qcow2","file":{"driver":"ssh"}}'), "ssh"),
    "backing-json-broken": Refusal(backing(b"json:{{{{"), "json"),
    "backing-json-deep": Refusal(backing(b"json:" + b"[" * 1000), "json"),
    "backing-forbidden": Refusal(backing(b"/etc/passwd", b"raw"), "backing", options=("--no-backing",)),
    "backing-outside-root": Refusal(
        backing(b"/etc/passwd", b"raw"), "/etc/passwd", options=("--backing-root", ".")
    ),
    "backing-climbs-out": Refusal(
        backing(b"../../../../../../../../etc/passwd", b"raw"), "passwd", options=("--backing-root", ".")
    ),
    "data-file-without-name": Refusal(put(72, "Q", 4), "external"),
    "snapshot-absent": Refusal(lambda path: None, "third", "snapshots", ("--load-snapshot", "third")),
    "snapshot-l1-outside": Refusal(
        lambda path: patch(path, peek(path, 64, "Q"), struct.pack(">Q", 1 << 40)),
        "l1_table_offset",
        "snapshots",
        ("--load-snapshot", "first"),
    ),
    "snapshot-l1-huge": Refusal(
        lambda path: patch(path, peek(path, 64, "Q") + 8, struct.pack(">I", 0x7FFFFFFF)),
        "l1_size",
        "snapshots",
        ("--load-snapshot", "first"),
    ),
    "raw-asked-as-qcow2": Refusal(lambda path: None, "", "raw", ("--format", "qcow2")),
    "raw-without-format": Refusal(lambda path: None, "--format raw", "raw"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(gallery: images.Gallery, tmp_path: Path, name: str) -> None:
    bad = REFUSALS[name]
    path = copy_of(gallery, bad.base, tmp_path)
    bad.edit(path)
    before = fingerprint([path])
    options = [str(tmp_path) if option == "." else option for option in bad.options]
    done = servers.limited_run(
        [*servers.NBDBM, "serve", "-r", "-k", str(tmp_path / "s"), *options, str(path)],
        address_space=ADDRESS_SPACE,
        timeout=REFUSED_WITHIN,
    )
    said = done.stderr
    assert done.returncode == 1, f"status {done.returncode}: {done.stdout}{said}"
    assert said.startswith("nbdbm: "), said
    assert len(said.splitlines()) == 1, said
    assert str(tmp_path) in said
    assert bad.says in said, said
    assert not (tmp_path / "s").exists()
    assert fingerprint([path]) == before

    # The other commands judge alike; but what can be said of an image whose reference leads nowhere is said.
    if not bad.options:
        told = CliRunner().invoke(main, ["map", str(path)])
        assert (told.exit_code, len(told.stderr.splitlines())) == (1, 1), told.output
        told = CliRunner().invoke(main, ["info", str(path)])
        leads_nowhere = name.startswith(("backing-", "data-file-")) and not name.startswith("backing-name-")
        assert told.exit_code == (0 if leads_nowhere else 1), told.output
        assert bad.says in told.output


# -- served, but for one place ----------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    edit: Edit
    base: str
    at: int
    """A guest offset that lies in the damaged part."""


def l1_entry(path: Path, index: int) -> int:
    """Where an L1 entry lies in the file."""
    return peek(path, 40, "Q") + 8 * index


def l2_entry(path: Path, offset: int, width: int = 8) -> int:
    """Where the L2 entry for a guest offset lies in the file."""
    bits = peek(path, 20, "I")
    per_table = (1 << bits) // width
    number = offset >> bits
    table = peek(path, l1_entry(path, number // per_table), "Q") & 0x00FFFFFFFFFFFE00
    assert table, "no L2 table there"
    return table + width * (number % per_table)


def first_of(path: Path, wanted: Callable[[int], bool], width: int = 8) -> int:
    """The lowest guest offset whose L2 entry is as wanted."""
    bits = peek(path, 20, "I")
    for offset in range(0, peek(path, 24, "Q"), 1 << bits):
        number = offset >> bits
        if not peek(path, l1_entry(path, number // ((1 << bits) // width)), "Q"):
            continue
        if wanted(peek(path, l2_entry(path, offset, width), "Q")):
            return offset
    raise AssertionError("no such cluster")


def is_data(entry: int) -> bool:
    return entry >> 62 != 1 and entry >> 63 == 1 and entry & 1 == 0


def is_packed(entry: int) -> bool:
    return bool(entry >> 62 & 1)


def set_l1(value: int) -> Edit:
    return lambda path: patch(path, l1_entry(path, 0), struct.pack(">Q", value))


def set_l2(
    change: Callable[[Path, int], int], wanted: Callable[[int], bool] = is_data, width: int = 8
) -> Edit:
    """Replace the L2 entry of the first cluster that is ``wanted``; it is moved to the disk's start.

    Where the cluster is depends on the image; the test wants it at a known place, so entry 0 becomes
    the changed copy of it.
    """

    def edit(path: Path) -> None:
        entry = peek(path, l2_entry(path, first_of(path, wanted, width), width), "Q")
        patch(path, l2_entry(path, 0, width), struct.pack(">Q", change(path, entry)))

    return edit


def garbage(path: Path, entry: int) -> int:
    """Overwrite a compressed cluster's stream; its descriptor stays."""
    bits = peek(path, 20, "I")
    offset = entry & ((1 << (62 - (bits - 8))) - 1)
    patch(path, offset, b"\xff" * 300)
    return entry


DAMAGES: dict[str, Damage] = {
    "l1-entry-unaligned": Damage(set_l1(1 << 63 | 0x50200), "v3", 0),
    "l1-entry-outside": Damage(set_l1(1 << 63 | 1 << 45), "v3", 0),
    "l1-entry-reserved-bits": Damage(set_l1(1 << 63 | 1 << 60 | 0x50000), "v3", 0),
    "l2-entry-unaligned": Damage(set_l2(lambda _, entry: entry | 0x200), "v3", 0),
    "l2-entry-reserved-bits": Damage(set_l2(lambda _, entry: entry | 1 << 57), "v3", 0),
    "compressed-garbage": Damage(set_l2(garbage, is_packed), "zlib", 0),
    "compressed-garbage-zstd": Damage(set_l2(garbage, is_packed), "zstd", 0),
    "compressed-outside": Damage(set_l2(lambda _, entry: 1 << 62 | 1 << 50, is_packed), "zlib", 0),
    "subclusters-zero-and-allocated": Damage(
        lambda path: patch(path, l2_entry(path, 0, 16) + 8, b"\xff" * 8), "extl2", 0
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged(gallery: images.Gallery, tmp_path: Path, name: str) -> None:
    """Reading the damaged place fails, as does its status; the rest and the server go on."""
    damage = DAMAGES[name]
    path = copy_of(gallery, damage.base, tmp_path)
    damage.edit(path)
    nbd = libnbd.module()
    with servers.nbdbm(path, address_space=ADDRESS_SPACE) as server:
        h = nbd.NBD()
        h.add_meta_context("base:allocation")
        h.connect_uri(server.uri)
        with pytest.raises(nbd.Error) as failed:
            h.pread(512, damage.at)
        assert failed.value.errno == "EIO"
        size = h.get_size()
        if not name.startswith("l1-"):
            content = gallery.content(gallery.get(damage.base))
            half = size // 2
            assert h.pread(size - half, half) == content[half:]
        h.shutdown()
        assert libnbd.probe(server.uri, digest=False)["size"] == size
        assert server.peak_rss() < MEMORY


def bomb(path: Path) -> None:
    """A compressed cluster that unpacks to 512 MiB of zeroes: only a cluster of it may be unpacked."""
    import zlib

    packer = zlib.compressobj(1, zlib.DEFLATED, -12)
    stream = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(512)), packer.flush()])
    end = (file_size(path) + 511) // 512 * 512
    with path.open("r+b") as file:
        file.seek(end)
        file.write(stream)
    bits = peek(path, 20, "I")
    sectors = (1 << (bits - 8)) - 1
    patch(path, l2_entry(path, 0), struct.pack(">Q", 1 << 62 | sectors << (62 - (bits - 8)) | end))


def test_a_cluster_that_unpacks_to_too_much(gallery: images.Gallery, tmp_path: Path) -> None:
    """The cluster's worth of it is the cluster, as in QEMU; no more is ever in memory."""
    path = copy_of(gallery, "zlib", tmp_path)
    bomb(path)
    with servers.nbdbm(path, address_space=ADDRESS_SPACE) as server:
        h = libnbd.module().NBD()
        h.connect_uri(server.uri)
        assert h.pread(65536, 0) == bytes(65536)
        h.shutdown()
        assert server.peak_rss() < MEMORY


def all_entries(value: Callable[[Path], int]) -> Edit:
    def edit(path: Path) -> None:
        patch(path, peek(path, 40, "Q"), struct.pack(">Q", value(path)) * peek(path, 36, "I"))

    return edit


@pytest.mark.parametrize(
    "target",
    [
        lambda path: 1 << 63,
        lambda path: 1 << 63 | peek(path, 40, "Q"),
        lambda path: 1 << 63 | peek(path, 48, "Q"),
    ],
    ids=["header", "itself", "refcounts"],
)
def test_tables_that_are_no_tables(
    gallery: images.Gallery, tmp_path: Path, target: Callable[[Path], int]
) -> None:
    """L1 entries that lead to the header, to the L1 table or to refcounts: nonsense, but bounded."""
    path = copy_of(gallery, "cluster-512", tmp_path)
    all_entries(target)(path)
    nbd = libnbd.module()
    with servers.nbdbm(path, address_space=ADDRESS_SPACE) as server:
        h = nbd.NBD()
        h.add_meta_context("base:allocation")
        h.connect_uri(server.uri)
        for offset in range(0, 2 << 20, 65536):
            for ask in (lambda: h.pread(65536, offset), lambda: h.block_status(65536, offset, lambda *_: 0)):  # noqa: B023
                try:
                    ask()
                except nbd.Error as error:
                    assert error.errno == "EIO"
        h.shutdown()
        assert server.peak_rss() < MEMORY


def test_data_past_the_end_of_the_file(gallery: images.Gallery, tmp_path: Path) -> None:
    """A file cut short reads like QEMU reads it, or fails; it does not invent."""
    path = copy_of(gallery, "v3", tmp_path)
    content = gallery.content(gallery.get("v3"))
    truncated(file_size(path) // 2)(path)
    nbd = libnbd.module()
    with servers.nbdbm(path, address_space=ADDRESS_SPACE) as server:
        h = nbd.NBD()
        h.connect_uri(server.uri)
        outcomes = set()
        for offset in range(0, 8 << 20, 65536):
            try:
                data = h.pread(65536, offset)
            except nbd.Error as error:
                assert error.errno == "EIO"
                outcomes.add("error")
                continue
            expected = content[offset : offset + 65536]
            same = data == expected
            outcomes.add("same" if same else "zero")
            assert same or all(a == b or a == 0 for a, b in zip(data, expected, strict=True))
        assert "same" in outcomes
        h.shutdown()
