import asyncio
import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from nbdbm.errors import CorruptError, ImageError, LockedError, UnsupportedError
from nbdbm.image import backing
from nbdbm.image.backing import resolve
from nbdbm.image.image import Image, OpenOptions
from nbdbm.image.locks import lock
from nbdbm.qcow2.constants import IncompatFeature
from tests.support import engine, qcow2build
from tests.support.qcow2build import EXT_BACKING_FORMAT, EXT_DATA_FILE

CLUSTER = 65536
SIZE = 4 * CLUSTER


def make(
    path: Path, fill: bytes = b"", at: int = 0, backing: str = "", format: str = "qcow2", **more: Any
) -> Path:
    """An image with one data cluster, over ``backing``."""
    extensions = [(EXT_BACKING_FORMAT, format.encode())] if backing and format else []
    more.setdefault("size", SIZE)
    image = qcow2build.Image(
        backing=os.fsencode(backing),
        extensions=extensions + more.pop("extensions", []),
        clusters={at: fill * CLUSTER} if fill else {},
        **more,
    )
    path.write_bytes(image.build())
    return path


def refusal(path: Path, **options: Any) -> ImageError:
    """The error with which opening fails; nothing stays open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError) as caught:
        asyncio.run(Image.open(str(path), OpenOptions(**options)))
    caught.value.__traceback__ = None
    assert len(os.listdir("/proc/self/fd")) == before
    return caught.value


def content(path: Path, **options: Any) -> bytes:
    return engine.use(path, engine.read_all, **options)


def letters(path: Path, **options: Any) -> str:
    """The first byte of each cluster, 0 for zero."""
    data = content(path, **options)
    return "".join(chr(data[at] or 48) for at in range(0, len(data), CLUSTER))


# -- names


@pytest.mark.parametrize(
    "name, expected",
    [
        ("base", ("dir/base", None)),
        ("../x/base", ("dir/../x/base", None)),
        ("/abs/base", ("/abs/base", None)),
        ("file:base", ("dir/base", None)),
        ("file:/abs/base", ("/abs/base", None)),
        ("./odd:name", ("dir/./odd:name", None)),
        ('json:{"driver":"qcow2","file":{"driver":"file","filename":"/b"}}', ("/b", "qcow2")),
        ('json:{"driver":"raw","file.driver":"file","file.filename":"b"}', ("dir/b", "raw")),
        ('json:{"driver":"qcow2","file.filename":"b","read-only":true}', ("dir/b", "qcow2")),
        ('json:{"driver":"file","filename":"b","locking":"off"}', ("dir/b", None)),
        ('json:{"file":{"driver":"file","filename":"b","cache":{"direct":true}}}', ("dir/b", None)),
    ],
)
def test_resolve(name: str, expected: tuple[str, str | None]) -> None:
    assert resolve("dir/image", "backing file", name) == expected


@pytest.mark.parametrize(
    "name, text",
    [
        ("nbd:localhost:10809", "protocol 'nbd'"),
        ("nbd://host/x", "protocol 'nbd'"),
        ("http://host/x", "protocol 'http'"),
        ("fat:rw:/tmp", "protocol 'fat'"),
        ("file:", "names no file"),
        ("json:{", "not a JSON object"),
        ("json:[1]", "not a JSON object"),
        ("json:" + "[" * 1000, "not a JSON object"),
        ('json:{"driver":"vmdk","file.filename":"b"}', "driver 'vmdk'"),
        ('json:{"driver":"nbd","host":"h"}', "driver 'nbd'"),
        ('json:{"driver":"host_device","filename":"/dev/sda"}', "driver 'host_device'"),
        ('json:{"driver":["qcow2"],"file.filename":"b"}', "driver"),
        ('json:{"driver":"qcow2","file":{"driver":"http","url":"http://x"}}', "driver 'http'"),
        ('json:{"driver":"raw","offset":512,"file.filename":"b"}', "option 'offset'"),
        ('json:{"driver":"qcow2","backing":null,"file.filename":"b"}', "option 'backing'"),
        ('json:{"driver":"qcow2","file":"node0"}', "option 'file'"),
        ('json:{"driver":"qcow2"}', "no file.filename"),
        ('json:{"driver":"qcow2","file.filename":7}', "no file.filename"),
        ('json:{"driver":"qcow2","file.filename":"a","file":{"filename":"b"}}', "not a JSON object"),
    ],
)
def test_resolve_refuses(name: str, text: str) -> None:
    with pytest.raises(ImageError, match=text) as caught:
        resolve("dir/image", "backing file", name)
    assert str(caught.value).startswith("dir/image: backing file is ")


# -- chains


def test_a_chain_of_both_formats(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/raw").write_bytes(b"r" * SIZE)
    make(tmp_path / "sub/base", b"b", 1, "raw", "raw")
    make(tmp_path / "middle", b"m", 2, str(tmp_path / "sub/base"))
    top = make(tmp_path / "top", b"t", 3, "file:middle")
    assert letters(top) == "rbmt"

    async def chain(image: Image) -> list[tuple[str, str]]:
        return [(layer.path, layer.format) for layer in image.chain]

    assert engine.use(top, chain) == [
        (str(tmp_path / "top"), "qcow2"),
        (str(tmp_path / "middle"), "qcow2"),
        (str(tmp_path / "sub/base"), "qcow2"),
        (str(tmp_path / "sub/raw"), "raw"),
    ]


def test_short_and_long_layers(tmp_path: Path) -> None:
    make(tmp_path / "long", b"l", 2, size=10 * CLUSTER)
    make(tmp_path / "short", b"s", 0, "long", size=2 * CLUSTER - 100)
    make(tmp_path / "top", b"t", 1, "short", size=4 * CLUSTER)
    # What lies under the short layer, past its end, does not show through.
    assert letters(tmp_path / "top") == "st00"
    make(tmp_path / "top", b"t", 1, "long", size=3 * CLUSTER - 7)
    assert letters(tmp_path / "top") == "0tl"


def test_the_format_is_not_probed(tmp_path: Path) -> None:
    """A guest has written a qcow2 header, naming a file of the host, into its raw disk."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * SIZE)
    inner = make(tmp_path / "raw", backing=str(secret), format="raw").read_bytes()
    top = make(tmp_path / "top", backing="raw", format="raw", size=len(inner))
    assert content(top) == inner
    error = refusal(make(tmp_path / "top", backing="raw", format=""))
    assert "format is not recorded" in str(error) and "qemu-img rebase -u -F" in str(error)
    # And the other way round.
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(SIZE))
    assert "magic" in str(refusal(make(tmp_path / "top", backing="plain", format="qcow2")))


def test_recorded_formats(tmp_path: Path) -> None:
    make(tmp_path / "base", b"b")
    error = refusal(make(tmp_path / "top", backing="base", format="vmdk"))
    assert isinstance(error, UnsupportedError) and "'vmdk'" in str(error)
    json_name = 'json:{"driver":"qcow2","file.filename":"base"}'
    assert letters(make(tmp_path / "top", backing=json_name, format="")) == "b000"
    assert "contradicts" in str(refusal(make(tmp_path / "top", backing=json_name, format="raw")))
    bare = 'json:{"driver":"file","filename":"base"}'
    assert letters(make(tmp_path / "top", backing=bare, format="qcow2")) == "b000"
    assert "not recorded" in str(refusal(make(tmp_path / "top", backing=bare, format="")))


def test_loops(tmp_path: Path) -> None:
    top = make(tmp_path / "top", backing="top")
    assert refusal(top).errno == errno.ELOOP
    make(tmp_path / "one", backing="two")
    (tmp_path / "link").symlink_to(tmp_path / "one")
    make(tmp_path / "two", backing="link")
    error = refusal(tmp_path / "one")
    assert error.errno == errno.ELOOP and "link" in str(error) and "loop" in str(error)


def test_depth(tmp_path: Path) -> None:
    for number in range(backing.MAX_CHAIN + 1):
        below = f"{number - 1}" if number else ""
        make(
            tmp_path / f"{number}",
            bytes([65 + number % 26]) if number < 3 else b"",
            number,
            below,
            cluster_bits=16,
        )
    assert letters(tmp_path / f"{backing.MAX_CHAIN - 1}") == "ABC0"
    error = refusal(tmp_path / f"{backing.MAX_CHAIN}")
    assert "more than 200 layers" in str(error)


def test_l1_tables_are_limited_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "MAX_L1_TOTAL", 20)
    make(tmp_path / "base", size=1 << 30)
    assert letters(make(tmp_path / "mid", b"m")) == "m000"
    error = refusal(make(tmp_path / "top", backing="base"))
    assert error.path == str(tmp_path / "base") and "L1" in str(error)


def test_missing_and_strange_files(tmp_path: Path) -> None:
    error = refusal(make(tmp_path / "top", backing="gone"))
    assert error.errno == errno.ENOENT
    assert error.path == str(tmp_path / "top") and "backing file is 'gone'" in str(error)
    assert str(tmp_path / "gone") in str(error)
    os.mkfifo(tmp_path / "fifo")
    assert "a FIFO" in str(refusal(make(tmp_path / "top", backing="fifo", format="raw")))
    assert "a character device" in str(refusal(make(tmp_path / "top", backing="/dev/zero", format="raw")))
    assert "a directory" in str(refusal(make(tmp_path / "top", backing="..", format="raw")))


def test_a_damaged_backing_file_is_named(tmp_path: Path) -> None:
    base = make(tmp_path / "base", b"b")
    qcow2build.patch(base, l1_table_offset=77)
    error = refusal(make(tmp_path / "top", backing="base"))
    assert isinstance(error, CorruptError)
    assert error.path == str(base) and "l1_table_offset" in str(error)


def test_every_layer_is_locked(tmp_path: Path) -> None:
    make(tmp_path / "base", b"b")
    top = make(tmp_path / "top", backing="base")
    fd = os.open(tmp_path / "base", os.O_RDWR)
    lock(fd, "base", writable=True)
    error = refusal(top)
    assert isinstance(error, LockedError) and error.path == str(tmp_path / "base")
    assert letters(top, force_share=True) == "b000"
    os.close(fd)
    assert letters(top) == "b000"


# -- confinement


def test_no_backing(tmp_path: Path) -> None:
    make(tmp_path / "base", b"b")
    error = refusal(make(tmp_path / "top", backing="base"), no_backing=True)
    assert error.errno == errno.EPERM and "--no-backing" in str(error) and "'base'" in str(error)
    assert letters(tmp_path / "base", no_backing=True) == "b000"


def test_no_backing_is_about_data_files_too(tmp_path: Path) -> None:
    top = with_data_file(tmp_path)
    assert "--no-backing" in str(refusal(top, no_backing=True))


def test_backing_root(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    make(inside / "base", b"i")
    make(outside / "base", b"o")
    (inside / "link").symlink_to(outside / "base")
    (outside / "link").symlink_to(inside / "base")
    top = tmp_path / "top"
    for name, answer in [
        ("in/base", "i"),
        ("out/link", "i"),
        ("out/base", None),
        ("in/link", None),
        ("in/../out/base", None),
        (str(outside / "base"), None),
    ]:
        make(top, backing=name)
        if answer:
            assert letters(top, backing_root=str(inside)) == f"{answer}000"
        else:
            error = refusal(top, backing_root=str(inside))
            assert error.errno == errno.EPERM
            assert f"really {outside}/base" in str(error) and "--backing-root" in str(error)
    # The root may itself be reached by a link; a sibling that begins alike is outside.
    (tmp_path / "root").symlink_to(inside)
    make(top, backing="in/base")
    assert letters(top, backing_root=str(tmp_path / "root")) == "i000"
    (tmp_path / "in2").mkdir()
    make(tmp_path / "in2/base", b"x")
    refusal(make(top, backing="in2/base"), backing_root=str(inside))


# -- external data files


def with_data_file(tmp_path: Path, name: str = "data", **more: Any) -> Path:
    (tmp_path / "data").write_bytes(b"0" * CLUSTER + b"1" * CLUSTER + b"2" * (CLUSTER // 2))
    # Clusters 0 and 2 are there, at their own offsets.
    return make(
        tmp_path / "top",
        incompatible=int(IncompatFeature.DATA_FILE),
        extensions=[(EXT_DATA_FILE, name.encode())] if name else [],
        **more,
    )


def set_entries(path: Path, entries: dict[int, int]) -> None:
    """Give an image without an L2 table one, at the file's end."""
    data = path.read_bytes()
    at = len(data)
    table = bytearray(CLUSTER)
    for index, entry in entries.items():
        struct.pack_into(">Q", table, 8 * index, entry)
    path.write_bytes(data + table)
    l1 = qcow2build.get_field(data, "l1_table_offset")
    qcow2build.patch_bytes(path, l1, struct.pack(">Q", at | 1 << 63))


@pytest.mark.parametrize("name", ["data", "file:data", 'json:{"driver":"file","filename":"data"}'])
def test_data_file(tmp_path: Path, name: str) -> None:
    top = with_data_file(tmp_path, name)
    copied = 1 << 63
    set_entries(top, {0: copied, 2: copied | 2 * CLUSTER, 3: 1})
    # The data file may be shorter than the disk: zeroes follow.
    assert content(top) == b"0" * CLUSTER + bytes(CLUSTER) + (b"2" * (CLUSTER // 2)).ljust(2 * CLUSTER, b"\0")


def test_data_file_refusals(tmp_path: Path) -> None:
    assert "not recorded" in str(refusal(with_data_file(tmp_path, "")))
    assert "protocol 'nbd'" in str(refusal(with_data_file(tmp_path, "nbd:x:1")))
    assert "must be a plain file" in str(
        refusal(with_data_file(tmp_path, 'json:{"driver":"qcow2","file.filename":"data"}'))
    )
    assert refusal(with_data_file(tmp_path, "top")).errno == errno.ELOOP
    (tmp_path / "root").mkdir()
    assert "--backing-root" in str(refusal(with_data_file(tmp_path), backing_root=str(tmp_path / "root")))


# -- the active image


def test_unknown_formats(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"x" * 1000)
    assert "--format raw" in str(refusal(raw))
    assert content(raw, format="raw") == b"x" * 1000
    assert "'vmdk'" in str(refusal(raw, format="vmdk"))
    assert "magic" in str(refusal(raw, format="qcow2"))
    assert "no snapshots" in str(refusal(raw, format="raw", snapshot="s"))
    raw.write_bytes(b"")
    assert "--format raw" in str(refusal(raw))
    assert content(raw, format="raw") == b""


@pytest.mark.parametrize("length", [0, 3, 4, 71, 72, 100, 104, 511, 65535, 65536, 70000])
def test_a_truncated_image(tmp_path: Path, length: int) -> None:
    data = make(tmp_path / "disk", b"d").read_bytes()
    (tmp_path / "disk").write_bytes(data[:length])
    assert str(refusal(tmp_path / "disk", format="qcow2")).startswith(str(tmp_path / "disk"))


def test_json_names_are_short_of_harm() -> None:
    """A name as long as a header may hold, of the worst shape."""
    name = "json:" + json.dumps({"driver": "qcow2", "file": {"filename": "x" * 900}})
    assert resolve("i", "backing file", name).path == "x" * 900


def test_an_image_alone_needs_none_of_its_other_files(tmp_path: Path) -> None:
    named = {"extensions": [(EXT_DATA_FILE, b"missing.data")], "incompatible": int(IncompatFeature.DATA_FILE)}
    for path in (
        make(tmp_path / "top.qcow2", backing="missing.qcow2", bitmaps=[qcow2build.Bitmap(b"monday")]),
        make(tmp_path / "split.qcow2", bitmaps=[qcow2build.Bitmap(b"monday")], **named),
    ):
        assert "missing" in str(refusal(path))

        async def look(image: Image) -> None:
            assert len(image.chain) == 1
            assert (await image.bits("monday")).count() == 0
            with pytest.raises(AssertionError):
                await image.read_into(memoryview(bytearray(1)), 0)

        engine.use(path, look, chain=False)
    assert "--no-backing" in str(refusal(tmp_path / "top.qcow2", chain=False, no_backing=True))
