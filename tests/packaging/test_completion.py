"""Completion in the shells themselves: bash and zsh on a terminal, fish by its own ``complete -C``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdbm.cli import COMMANDS
from nbdbm.cli.completion import SHELLS
from tests.packaging.terminal import PROMPT, Shell
from tests.support import qemu
from tests.support.marks import requires

STARTS = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}
"""How a shell is started that reads no files of the user's or the system's."""

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A directory that holds ``nbdbm``, to be put into $PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    nbdbm = directory / "nbdbm"
    nbdbm.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from nbdbm.cli import program\nprogram()\n"
    )
    nbdbm.chmod(0o755)
    return directory


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A directory with one image and one more directory in it."""
    directory = tmp_path / "here"
    (directory / "images").mkdir(parents=True)
    subprocess.run(
        [sys.executable, "-m", "nbdbm", "create", "-q", str(directory / "vda.qcow2"), "1M"],
        check=True,
        timeout=50,
        env=qemu.environment(),
    )
    return directory


@contextmanager
def completing(name: str, directory: Path, path: Path) -> Iterator[Shell]:
    """The shell, with completion set up as the help says."""
    with Shell(STARTS[name], directory, path) as shell:
        shell.expect(PROMPT)
        if name == "zsh":
            shell.type("autoload -U compinit && compinit -u -D\n")
            shell.expect(PROMPT)
        shell.type(f'eval "$(nbdbm completion {name})"\n')
        shell.expect(PROMPT)
        yield shell


@pytest.mark.parametrize("name", [pytest.param(name, marks=requires(name)) for name in STARTS])
class TestOnATerminal:
    def test_words_options_and_files(self, name: str, disk: Path, program: Path) -> None:
        """What is typed is completed to a command that then does what it says."""
        with completing(name, disk, program) as shell:
            shell.type("nbdbm inf\t")
            shell.expect("info ")
            shell.type("--js\t")
            shell.expect("on ")
            shell.type("vd\t")
            shell.expect(r"a\.qcow2 ")
            shell.type("\n")
            assert shell.expect('"virtual.size": [0-9]+') == '"virtual_size": 1048576'

    def test_choices_and_nested_commands(self, name: str, disk: Path, program: Path) -> None:
        with completing(name, disk, program) as shell:
            shell.type("nbdbm bitmap ren\t")
            shell.expect("rename ")
            shell.type("\x15nbdbm check --repair le\t")
            shell.expect("aks ")
            shell.type("\x15nbdbm completion fi\t")
            shell.expect("sh ")

    def test_directories_where_one_is_wanted(self, name: str, disk: Path, program: Path) -> None:
        """``--backing-root`` takes no file, and the only directory is completed at once."""
        with completing(name, disk, program) as shell:
            shell.type("nbdbm info --backing-root \t")
            shell.expect("images/?")

    def test_the_list_of_commands(self, name: str, disk: Path, program: Path) -> None:
        with completing(name, disk, program) as shell:
            shell.type("nbdbm c\t\t")
            wanted = [command for command in COMMANDS if command.startswith("c")]
            shell.expect("(?s)" + "".join(rf"(?=.*\s{command}\s)" for command in wanted))


@requires("fish")
@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("nbdbm ", set(COMMANDS)),
        ("nbdbm bitmap re", {"remove", "rename"}),
        ("nbdbm check --repair ", {"leaks", "all"}),
        ("nbdbm serve --no-b", {"--no-backing"}),
        ("nbdbm info vd", {"vda.qcow2"}),
        ("nbdbm info --backing-root ", {"images/"}),
        ("nbdbm completion ", set(SHELLS)),
    ],
)
def test_fish(typed: str, wanted: set[str], disk: Path, program: Path) -> None:
    script = f"nbdbm completion fish | source; complete -C {json.dumps(typed)}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", script],
        cwd=disk,
        env=qemu.environment() | {"PATH": f"{program}:{qemu.SEARCH_PATH}", "HOME": str(disk)},
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert {line.partition("\t")[0] for line in done.stdout.splitlines()} == wanted
