"""Malformed bitmaps: each is left out by name, and costs neither the disk nor its neighbours anything."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nbdbm.cli import main
from tests.interop.malformed import ADDRESS_SPACE, MEMORY, Edit, copy_of
from tests.support import images, libnbd, qemu, servers
from tests.support.marks import requires
from tests.support.qcow2edit import BITMAPS_EXTENSION, bitmap_entries, extensions, patch, peek

pytestmark = [requires("qemu-img", "qemu-io", "qemu-nbd", "libnbd")]


def entry_field(at: int, form: str, *values: int) -> Edit:
    """Overwrite part of the middle bitmap's directory entry."""
    return lambda path: patch(path, bitmap_entries(path)["middle"].at + at, struct.pack(">" + form, *values))


def table_entry(index: int, value: int) -> Edit:
    return lambda path: patch(
        path, bitmap_entries(path)["middle"].table + 8 * index, struct.pack(">Q", value)
    )


def table_bits(index: int, value: int) -> Edit:
    """Set bits in one entry of the middle bitmap's table."""

    def edit(path: Path) -> None:
        at = bitmap_entries(path)["middle"].table + 8 * index
        patch(path, at, struct.pack(">Q", peek(path, at, "Q") | value))

    return edit


def renamed(name: bytes) -> Edit:
    return lambda path: patch(path, bitmap_entries(path)["middle"].at + 24, name)


BROKEN_BITMAPS: dict[str, Edit] = {
    "in-use": entry_field(12, "I", 3),
    "flags-reserved": entry_field(12, "I", 0x12),
    "type-unknown": entry_field(16, "B", 2),
    "granularity-small": entry_field(17, "B", 8),
    "granularity-large": entry_field(17, "B", 40),
    "table-unaligned": entry_field(0, "Q", 0x10010),
    "table-outside": entry_field(0, "Q", 1 << 40),
    "table-at-zero": entry_field(0, "Q", 0),
    "table-size-short": entry_field(8, "I", 7),
    "table-size-long": entry_field(8, "I", 9),
    "table-size-huge": entry_field(8, "I", 0xFFFFFFFF),
    "table-entry-reserved-low": table_bits(0, 2),
    "table-entry-reserved-high": table_bits(0, 1 << 60),
    "table-entry-unaligned": table_entry(0, 0x10100),
    "table-entry-outside": table_entry(0, 1 << 45),
    "table-entry-one-and-offset": table_entry(0, 0x10001),
    "name-not-utf8": renamed(b"midd\xff\xfe"),
    "name-with-nul": renamed(b"mi\0dle"),
    "name-twice": lambda path: patch(
        path, bitmap_entries(path)["middle"].at + 18, struct.pack(">HI", 5, 0) + b"first\0"
    ),
}

LATE = {name for name in BROKEN_BITMAPS if name.startswith("table-entry-")}
"""May be found when the bitmap's data is first read: then its status fails, and only its own."""


@pytest.fixture(scope="module")
def sound(gallery: images.Gallery) -> dict[str, Any]:
    """The answers for the image as it was, by qemu-nbd."""
    case = gallery.get("bitmaps-three")
    with servers.qemu_nbd(case.path, bitmaps=case.bitmaps) as server:
        return libnbd.probe(server.uri, contexts=case.contexts())


@pytest.mark.parametrize("name", BROKEN_BITMAPS)
def test_a_broken_bitmap_does_not_hurt_its_neighbours(
    gallery: images.Gallery, sound: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """Its neighbours and the disk are served as if nothing had happened; it is not, and that is said."""
    path = copy_of(gallery, "bitmaps-three", tmp_path)
    BROKEN_BITMAPS[name](path)
    contexts = [context for context in sound["contexts"] if not context.endswith(":middle")]
    if name == "name-twice":
        # Neither can be told from the other.
        contexts = [context for context in contexts if not context.endswith(":first")]
    with servers.nbdbm(path, address_space=ADDRESS_SPACE) as server:
        answer = libnbd.probe(server.uri, contexts=contexts)
        assert answer["digest"] == sound["digest"]
        assert answer["contexts"] == contexts
        assert answer["maps"] == {context: sound["maps"][context] for context in contexts}
        listed = json.loads(qemu.SYSTEM.run("nbdinfo", "--no-content", "--json", server.uri))["exports"][0][
            "contexts"
        ]
        if name not in LATE:
            assert sorted(listed) == sorted(contexts)
            assert "is not served" in server.output()
        elif "qemu:dirty-bitmap:middle" in listed:
            refuse_late(server)
        assert server.peak_rss() < MEMORY


def refuse_late(server: servers.Server) -> None:
    """A listed bitmap whose data proves bad: its status is an error, never a wrong answer."""
    nbd = libnbd.module()
    h = nbd.NBD()
    h.add_meta_context("qemu:dirty-bitmap:middle")
    h.connect_uri(server.uri)
    with pytest.raises(nbd.Error) as failed:
        h.block_status(16 << 20, 0, lambda *_: 0)
    assert failed.value.errno == "EIO"
    h.shutdown()


def directory(field: int, form: str, *values: int) -> Edit:
    """Overwrite part of the bitmaps extension."""
    return lambda path: patch(
        path, extensions(path)[BITMAPS_EXTENSION][0] + field, struct.pack(">" + form, *values)
    )


BROKEN_DIRECTORIES: dict[str, Edit] = {
    "no-bitmaps": directory(0, "I", 0),
    "one-too-few": directory(0, "I", 2),
    "one-too-many": directory(0, "I", 4),
    "far-too-many": directory(0, "I", 0xFFFFFFFF),
    "size-zero": directory(8, "Q", 0),
    "size-short": directory(8, "Q", 88),
    "size-long": directory(8, "Q", 1 << 20),
    "size-huge": directory(8, "Q", 1 << 60),
    "offset-unaligned": directory(16, "Q", 0x10010),
    "offset-outside": directory(16, "Q", 1 << 40),
    "name-too-long": entry_field(18, "H", 0xFFFF),
    "name-empty": entry_field(18, "H", 0),
    "extra-data-huge": entry_field(20, "I", 0xFFFFFFF0),
}


@pytest.mark.parametrize("name", BROKEN_DIRECTORIES)
def test_a_broken_directory_does_not_hurt_the_disk(
    gallery: images.Gallery, sound: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """The disk is served, with whatever bitmaps can still be told apart, and true ones only."""
    path = copy_of(gallery, "bitmaps-three", tmp_path)
    BROKEN_DIRECTORIES[name](path)
    with servers.nbdbm(path, address_space=ADDRESS_SPACE) as server:
        answer = libnbd.probe(server.uri, contexts=sound["contexts"])
        assert answer["digest"] == sound["digest"]
        for context in answer["contexts"]:
            assert answer["maps"][context] == sound["maps"][context]
        assert answer["contexts"] != sound["contexts"]
        assert "bitmap" in server.output().replace("qemu:dirty-bitmap:", "")
        assert server.peak_rss() < MEMORY


def test_reserved_bytes_of_the_extension(
    gallery: images.Gallery, sound: dict[str, Any], tmp_path: Path
) -> None:
    """They mean nothing yet: whoever sets them is not kept from a single bitmap."""
    path = copy_of(gallery, "bitmaps-three", tmp_path)
    directory(4, "I", 1)(path)
    with servers.nbdbm(path) as server:
        answer = libnbd.probe(server.uri, contexts=sound["contexts"])
    assert answer["maps"] == sound["maps"]


def test_info_and_bitmap_list_on_every_broken_bitmap(gallery: images.Gallery, tmp_path: Path) -> None:
    for name, edit in {**BROKEN_BITMAPS, **BROKEN_DIRECTORIES}.items():
        path = copy_of(gallery, "bitmaps-three", tmp_path)
        edit(path)
        for command in (["info"], ["info", "--json"], ["bitmap", "list"]):
            told = CliRunner().invoke(main, [*command, str(path)])
            assert told.exit_code == 0, (name, command, told.output)
