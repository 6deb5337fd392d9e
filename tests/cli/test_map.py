"""``nbdbm map``: what it prints for files and servers, compared with nbdinfo where that is installed."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nbdbm.cli import main
from nbdbm.cli import map as map_module
from nbdbm.cli.map import describe
from nbdbm.uri import NbdUri
from tests.support.diskserver import DIRTY, DiskServer, serving
from tests.support.marks import requires
from tests.support.qemu import SYSTEM
from tests.support.sample import EXPECTED, unpack

SIZE = EXPECTED["size"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return unpack(tmp_path)


def run(*arguments: object, status: int = 0, env: dict[str, str] | None = None) -> Result:
    result = CliRunner().invoke(main, ["map", *(str(argument) for argument in arguments)], env=env)
    assert result.exit_code == status, (result.output, result.exception)
    return result


@contextmanager
def background(directory: Path, server: DiskServer) -> Iterator[NbdUri]:
    """``server`` in a thread of its own: the commands run an event loop themselves."""
    started = threading.Event()
    addresses: list[NbdUri] = []

    async def serve() -> None:
        async with serving(directory, server) as uri:
            addresses.append(uri)
            started.set()
            await stop.wait()

    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert started.wait(10)
        yield addresses[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def dirty_extents() -> list[dict[str, object]]:
    """The sample's bitmap ``monday``, as --json shows it."""
    extents: list[dict[str, object]] = []
    position = 0
    for offset, length in [*EXPECTED["dirty"]["monday"], (SIZE, 0)]:
        if offset > position:
            extents.append(
                {"offset": position, "length": offset - position, "type": 0, "description": "clean"}
            )
        if length:
            extents.append({"offset": offset, "length": length, "type": 1, "description": "dirty"})
        position = offset + length
    return extents


@pytest.mark.parametrize("context", ["monday", "qemu:dirty-bitmap:monday"])
def test_dirty_extents_as_json(image: Path, context: str) -> None:
    assert json.loads(run(image, "--json", "--context", context).stdout) == dirty_extents()


def test_text_has_fixed_columns(image: Path) -> None:
    lines = run(image, "-c", "archive").stdout
    assert lines == f"         0  {SIZE:10}    0  clean\n"
    lines = run(image).stdout
    offset = 0
    for line in lines.splitlines():
        found, length, flags, word = line.split()
        assert (int(found), word) == (offset, describe("base:allocation", int(flags)))
        offset += int(length)
    assert offset == SIZE


def test_totals(image: Path) -> None:
    dirty = sum(length for _, length in EXPECTED["dirty"]["monday"])
    assert run(image, "--totals", "-c", "monday").stdout == (
        f"{SIZE - dirty:10} {100 * (SIZE - dirty) / SIZE:5.1f}%   0 clean\n"
        f"{dirty:10} {100 * dirty / SIZE:5.1f}%   1 dirty\n"
    )
    rows = json.loads(run(image, "--totals", "--json", "-c", "monday").stdout)
    assert rows[1] == {"size": dirty, "percent": 100 * dirty / SIZE, "type": 1, "description": "dirty"}


@pytest.mark.parametrize(
    ("context", "flags", "words"),
    [
        ("base:allocation", 0, "data"),
        ("base:allocation", 1, "hole"),
        ("base:allocation", 2, "zero"),
        ("base:allocation", 3, "hole,zero"),
        ("base:allocation", 4, None),
        (DIRTY, 0, "clean"),
        (DIRTY, 1, "dirty"),
        (DIRTY, 2, None),
        ("qemu:allocation-depth", 0, "absent"),
        ("qemu:allocation-depth", 1, "local"),
        ("qemu:allocation-depth", 2, "backing depth 2"),
        ("x:other", 0, None),
    ],
)
def test_words(context: str, flags: int, words: str | None) -> None:
    assert describe(context, flags) == words


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-c", "nothing"], "no context 'nothing'; there are: base:allocation, qemu:allocation-depth"),
        (["-c", "sunday"], "bitmap 'sunday': it is inconsistent"),
        (["-c", "qemu:dirty-bitmap:sunday"], "bitmap 'sunday': it is inconsistent"),
        (["--picture", "--json"], "--picture excludes --json and --totals"),
        (["--no-backing", "--backing-root", "/"], "--no-backing excludes --backing-root"),
    ],
)
def test_what_cannot_be(image: Path, arguments: list[str], says: str) -> None:
    result = run(image, *arguments, status=1)
    # With the suite's debugging, asyncio may complain of a loaded machine as well.
    said = [line for line in result.stderr.splitlines() if "Executing <" not in line]
    assert len(said) == 1 and says in said[0]
    assert result.stdout == ""


def test_a_missing_file(tmp_path: Path) -> None:
    result = run(tmp_path / "none.qcow2", status=1)
    assert result.stderr.startswith(f"nbdbm: {tmp_path}/none.qcow2: ")
    assert "No such file" in result.stderr


# Servers


@pytest.mark.parametrize("context", ["b", DIRTY])
def test_a_server(tmp_path: Path, context: str) -> None:
    server = DiskServer(size=2 << 20)
    with background(tmp_path, server) as uri:
        extents = json.loads(run(uri, "--json", "-c", context).stdout)
        assert extents == [
            {
                "offset": i * 65536,
                "length": 65536,
                "type": i % 2,
                "description": "dirty" if i % 2 else "clean",
            }
            for i in range(32)
        ]
        assert run(uri).stdout == ("         0     1048576    0  data\n   1048576     1048576    1  hole\n")


def test_extents_are_joined_over_the_ends_of_answers(tmp_path: Path) -> None:
    # One extent to an answer, and the first answer ends in the middle of what is alike.
    with background(tmp_path, DiskServer(size=1 << 20, extent_cap=1, answer_length=300_000)) as uri:
        assert run(uri).stdout == "         0     1048576    0  data\n"


def test_what_a_server_does_not_have(tmp_path: Path) -> None:
    with background(tmp_path, DiskServer()) as uri:
        result = run(uri, "-c", "nothing", status=1)
        assert result.stderr == (f"nbdbm: {uri}: no context 'nothing'; there are: base:allocation, {DIRTY}\n")
        assert "--force-share is for image files" in run(uri, "-U", status=1).stderr
    assert "cannot connect" in run(uri, status=1).stderr
    nowhere = "nbds://localhost:1/?tls-certificates=/nowhere"
    result = run(nowhere, status=1)
    assert result.stderr == f"nbdbm: {nowhere}: /nowhere/ca-cert.pem: No such file or directory\n"


def test_types_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_module, "MAX_KINDS", 1)
    with background(tmp_path, DiskServer()) as uri:
        assert "more than 1 different types" in run(uri, "--totals", "-c", DIRTY, status=1).stderr


# The picture


def test_the_picture_shows_the_disk_and_its_bitmaps(image: Path) -> None:
    shown = run(image, "--picture", env={"COLUMNS": "80"}).stdout.splitlines()
    assert shown[0] == f"{image}: 32 MiB, base:allocation"
    rows = shown[1:17]
    assert [row.split()[0] for row in rows] == [str(2 * i) for i in range(16)]
    data, rest = rows[0].split()[2].rstrip("·"), rows[1].split()[2]
    assert set(data) <= {"█", "▒"} and data and set(rest) == {"·"} and len(rest) == 64
    assert "· hole" in shown[17] and "one character is 32 KiB" in shown[17]
    assert shown[18:20] == ["bitmap archive", "0 B " + "·" * 64]
    dirty = sum(length for _, length in EXPECTED["dirty"]["monday"])
    assert shown[21:23] == ["bitmap monday", "0 B ▒▒" + "·" * 62]
    assert f"dirty {dirty // 1024} KiB" in shown[23]
    assert len(shown) == 24
    assert not any("\x1b" in line for line in shown)


def test_the_picture_of_one_bitmap(image: Path) -> None:
    shown = run(image, "--picture", "-c", "monday", env={"COLUMNS": "80"}).stdout.splitlines()
    assert shown[0].endswith("32 MiB, qemu:dirty-bitmap:monday")
    # 32 KiB to a character; some dirty granules (16 KiB) are half of one.
    assert shown[1].split(" B ")[1] == "█▒" + "·" * 11 + "▒" + "·" * 8 + "███▒" + "·" * 38
    assert len(shown) == 18


def test_more_bitmaps_than_a_picture_holds(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_module, "MAX_STRIPS", 1)
    shown = run(image, "--picture").stdout
    assert "bitmap archive" in shown and "bitmap monday" not in shown
    assert "and 1 more bitmaps" in shown


def on_a_terminal(image: Path, **environment: str) -> bytes:
    """What ``nbdbm map`` prints when its standard output is a terminal."""
    controller, terminal = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    env |= {"TERM": "xterm-256color", "COLUMNS": "80", **environment}
    try:
        process = subprocess.Popen([sys.executable, "-m", "nbdbm", "map", image], stdout=terminal, env=env)
        os.close(terminal)
        shown = b""
        while True:
            try:
                piece = os.read(controller, 65536)
            except OSError:  # Linux says EIO once the last writer has closed the terminal
                break
            if not piece:
                break
            shown += piece
        assert process.wait(30) == 0
    finally:
        os.close(controller)
    return shown


def test_a_terminal_gets_the_picture(image: Path) -> None:
    shown = on_a_terminal(image, PYTHONIOENCODING="utf-8")
    assert b"one character is" in shown and "█".encode() in shown and b"\x1b[34m" in shown
    shown = on_a_terminal(image, NO_COLOR="1", PYTHONIOENCODING="utf-8")
    assert "█".encode() in shown and b"\x1b[3" not in shown
    shown = on_a_terminal(image, NO_COLOR="1", PYTHONIOENCODING="ascii")
    assert b"#" in shown and shown.isascii()


# Beside nbdinfo


@pytest.mark.parametrize("context", ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:monday"])
@requires("nbdinfo", "qemu-nbd")
def test_the_same_as_nbdinfo_prints(image: Path, context: str) -> None:
    def nbdinfo(*options: str) -> str:
        command = SYSTEM.argv("qemu-nbd", "-r", "-f", "qcow2", "-A", "-B", "monday", image)
        return SYSTEM.run("nbdinfo", *options, f"--map={context}", "--", "[", *command, "]")

    assert run(image, "-c", context).stdout == nbdinfo()
    assert run(image, "-c", context, "--totals").stdout == nbdinfo("--totals")
    assert json.loads(run(image, "-c", context, "--json").stdout) == json.loads(nbdinfo("--json"))
    ours = json.loads(run(image, "-c", context, "--json", "--totals").stdout)
    for mine, theirs in zip(ours, json.loads(nbdinfo("--json", "--totals")), strict=True):
        assert mine.pop("percent") == pytest.approx(theirs.pop("percent"), abs=1e-3)
        assert mine == theirs


@requires("qemu-img", "qemu-io")
def test_layers_holes_and_an_empty_disk(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    SYSTEM.img("create", "-q", "-f", "qcow2", base, "4M")
    SYSTEM.io(base, "write 1M 1M")
    SYSTEM.img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    SYSTEM.io(top, "write 2M 1M", "write -z 3M 64k")
    assert [
        line.split(None, 3)[3] for line in run(top, "-c", "qemu:allocation-depth").stdout.splitlines()
    ] == [
        "absent",
        "backing depth 2",
        "local",
        "absent",
    ]
    assert "--no-backing" in run(top, "--no-backing", status=1).stderr
    empty = tmp_path / "empty.qcow2"
    SYSTEM.img("create", "-q", "-f", "qcow2", empty, "0")
    assert run(empty).stdout == ""
    assert json.loads(run(empty, "--json").stdout) == []
    assert json.loads(run(empty, "--json", "--totals").stdout) == []
    assert "0 B" in run(empty, "--picture").stdout


@requires("qemu-img")
def test_64_tebibytes(tmp_path: Path) -> None:
    huge = tmp_path / "huge.qcow2"
    SYSTEM.img("create", "-q", "-f", "qcow2", huge, "64T")
    assert run(huge).stdout == f"         0  {64 << 40:10}    3  hole,zero\n"
    shown = run(huge, "--picture", env={"COLUMNS": "80"}).stdout
    assert "one character is 64 GiB" in shown and "60 TiB" in shown
