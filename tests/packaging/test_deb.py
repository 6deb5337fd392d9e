"""The Debian package: built as ``make deb`` does, unpacked, and used from where it was unpacked."""

from __future__ import annotations

import argparse
import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbdbm import __version__
from scripts import deb, manpages
from tests.support import qemu
from tests.support.marks import requires

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = [ROOT / "packaging/debian" / name for name in deb.MAINTAINER_SCRIPTS]

MAINTAINER = "Jane O. Doe <jane@example.org>"

BUILD_TIME = 200
"""Seconds; alone it takes 13, most of them for bytecode and compression."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_shell_can_read_the_maintainer_scripts(script: Path) -> None:
    done = subprocess.run(["sh", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_maintainer() -> None:
    assert deb.maintainer({}) == deb.maintainer({"authors": [{"name": "No Mail"}]}) == deb.MAINTAINER
    somebody = {"name": "A", "email": "a@b.c"}
    assert deb.maintainer({"authors": [{"name": "No Mail"}, somebody]}) == "A <a@b.c>"
    assert deb.maintainer({"authors": [somebody], "maintainers": [{**somebody, "name": "M"}]}) == "M <a@b.c>"
    for good in (deb.MAINTAINER, MAINTAINER, deb.maintainer({"authors": [somebody]})):
        assert deb.judge_maintainer(good) == good
    for bad in ("", "Jane", "jane@example.org", "<jane@example.org>", "Jane <jane>", "A <a@b.c>\nX: y"):
        with pytest.raises(argparse.ArgumentTypeError):
            deb.judge_maintainer(bad)


def the_list_is_tidy(package: Path) -> None:
    """All is root's, writable by root only, and of one moment."""
    lines = qemu.run(["dpkg-deb", "-c", str(package)]).stdout.splitlines()
    assert len(lines) > 100
    told = {tuple(line.split()[index] for index in (0, 1, 3, 4)) for line in lines}
    modes, owners, *moments = (set(column) for column in zip(*told, strict=True))
    assert modes == {"drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x"}
    assert owners == {"root/root"}
    assert [len(moment) for moment in moments] == [1, 1]
    executable = [line.split()[-1] for line in lines if line.startswith("-rwx")]
    assert executable == ["./usr/bin/nbdbm"]


def the_control_files_are_true(package: Path, root: Path, scratch: Path) -> None:
    names = ["Version", "Architecture", "Maintainer", "Depends"]
    fields = qemu.run(["dpkg-deb", "-f", str(package), *names]).stdout
    architecture = qemu.run(["dpkg", "--print-architecture"]).stdout.strip()
    minor = int(qemu.run(["/usr/bin/python3", "-c", "import sys; print(sys.version_info[1])"]).stdout)
    assert f"Version: {__version__}\nArchitecture: {architecture}\nMaintainer: {MAINTAINER}\n" in fields
    assert f"python3 (>= 3.{minor}), python3 (<< 3.{minor + 1}), libc6 (>= " in fields
    qemu.run(["dpkg-deb", "-e", str(package), str(scratch)])
    assert (scratch / "conffiles").read_text() == "/etc/nbdbm/nbdbm.toml\n"
    assert all(os.access(scratch / name, os.X_OK) for name in deb.MAINTAINER_SCRIPTS)
    done = subprocess.run(["md5sum", "-c", "--quiet", scratch / "md5sums"], cwd=root, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert len((scratch / "md5sums").read_text().splitlines()) == sum(
        path.is_file() for path in root.rglob("*")
    )


def everything_has_its_place(root: Path) -> None:
    for name, text in manpages.pages().items():
        packed = gzip.decompress((root / f"usr/share/man/man1/{name}.gz").read_bytes()).decode()
        # The dates differ.
        assert packed.splitlines()[1:] == text.splitlines()[1:]
    for name in deb.COMPLETIONS.values():
        assert "_NBDBM_COMPLETE" in (root / name).read_text()
    assert (root / deb.COMPLETIONS["zsh"]).read_text().startswith("#compdef nbdbm\n")
    units = list((root / "usr/lib/systemd/system").iterdir())
    assert {unit.name for unit in units} == {"nbdbm.service", "nbdbm.socket", "nbdbm@.service"}
    for unit in units:
        for name in re.findall(r"/(?:usr/bin|etc)/[\w./]+\w(?=\s)", unit.read_text()):
            assert (root / name.removeprefix("/")).is_file() or name.endswith("vda.env"), name
    assert (root / "usr/lib/sysusers.d/nbdbm.conf").read_text().count("u nbdbm") == 1
    documents = root / deb.DOCUMENTS
    assert "MIT License" in (documents / "copyright").read_text()
    for document in documents.glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+\.md)[)#]", document.read_text()):
            assert (documents / link).is_file(), f"{document.name}: {link}"


def nothing_tells_where_it_was_made(root: Path) -> None:
    here = [str(ROOT).encode(), str(Path(sys.executable).parent).encode()]
    for path in root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [name for name in here if name in content], path


def it_serves(root: Path, scratch: Path) -> None:
    """By the system's Python, which finds nothing of this test's environment."""
    (scratch / "click.py").write_text("raise SystemExit('not this one')\n")
    environment = qemu.environment() | {"PYTHONPATH": str(scratch)}

    def run(*words: str) -> str:
        return subprocess.run(
            [root / "usr/bin/nbdbm", *words],
            cwd=scratch,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=50,
        ).stdout

    assert run("--version") == f"nbdbm {__version__}\n"
    run("create", "-q", "disk.qcow2", "3M")
    run("bitmap", "add", "disk.qcow2", "b0")
    assert "3145728" in run("serve", "disk.qcow2", "--run", 'nbdinfo --size "$uri"').splitlines()
    assert "b0" in run("serve", "disk.qcow2", "--run", 'nbdinfo --list "$uri"')


@requires("dpkg-deb", "nbdinfo", "compiled")
@pytest.mark.slow
@pytest.mark.timeout(BUILD_TIME + 60)
def test_the_package(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.deb", "--maintainer", MAINTAINER, str(tmp_path / "dist")]
    done = qemu.run(command, timeout=BUILD_TIME)
    [package] = (tmp_path / "dist").iterdir()
    assert done.stdout.splitlines() == [str(package)]
    root = tmp_path / "root"
    qemu.run(["dpkg-deb", "-x", str(package), str(root)])
    (tmp_path / "control").mkdir()
    (tmp_path / "scratch").mkdir()

    the_list_is_tidy(package)
    the_control_files_are_true(package, root, tmp_path / "control")
    everything_has_its_place(root)
    nothing_tells_where_it_was_made(root)
    assert (root / deb.LIBRARY / "nbdbm/_speed.abi3.so").is_file()
    it_serves(root, tmp_path / "scratch")
