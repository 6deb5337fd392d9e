"""The command group: what errors look like, and what a start costs."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from nbdbm import __version__
from nbdbm.cli import COMMANDS, LazyGroup, explain, main, printable
from nbdbm.errors import ImageError, UsageError
from tests.cli.program import environment

TIMEOUT = 50


def python(*argv: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        **options,  # type: ignore[call-overload]
    )


def failing(error: BaseException, *argv: str) -> Result:
    """Run a subcommand that raises ``error``."""

    @click.command()
    def command() -> None:
        raise error

    class Group(LazyGroup):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            return command

    group = Group("nbdbm", params=list(main.params), callback=main.callback)
    return CliRunner().invoke(group, [*argv, "command"])


def test_version() -> None:
    result = python("-m", "nbdbm", "--version")
    assert (result.returncode, result.stdout) == (0, f"nbdbm {__version__}\n")


def test_every_subcommand_is_where_the_table_says() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name in COMMANDS:
        assert name in result.output
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0


def test_importing_the_group_is_cheap() -> None:
    script = (
        "import sys, nbdbm.cli; "
        "heavy = ('asyncio', 'rich', 'bitarray', 'nbdbm.image.image', 'nbdbm.cli.serve'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    result = python("-c", script)
    assert result.stdout == "[]\n", result.stderr


def test_serving_needs_no_decompressor_and_no_rich() -> None:
    script = (
        "import sys, nbdbm.cli.serve, nbdbm.exports, nbdbm.image.image, nbdbm.server.server; "
        "heavy = ('rich', 'deflate', 'zstandard', 'backports.zstd', 'uvloop', 'multiprocessing'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    result = python("-c", script)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize("argv", [["frobnicate"], ["--frobnicate"], ["serve"], ["serve", "--port", "x", "i"]])
def test_usage_errors(argv: list[str]) -> None:
    result = CliRunner().invoke(main, argv)
    assert result.exit_code == 2
    assert "Usage:" in result.output


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UsageError("cannot do this"), "nbdbm: cannot do this"),
        (ImageError("a.qcow2", "l1_size is 0x5: too large"), "nbdbm: a.qcow2: l1_size is 0x5: too large"),
        (FileNotFoundError(2, "No such file or directory", "x"), "nbdbm: x: No such file or directory"),
        (FileNotFoundError(2, "No such file", b"x\xff"), r"nbdbm: x\udcff: No such file"),
        (OSError(5, "Broken", "a", None, "b"), "nbdbm: a: b: Broken"),
        (OSError("bare"), "nbdbm: bare"),
        (OSError(), "nbdbm: OSError"),
        (ImageError("a\nb", "\x1b[31mred"), r"nbdbm: a\nb: \x1b[31mred"),
    ],
)
def test_errors_are_one_line(error: Exception, line: str) -> None:
    result = failing(error)
    assert result.exit_code == 1
    assert result.stderr == line + "\n"
    assert result.stdout == ""


def test_an_interrupt_while_it_starts_is_silent() -> None:
    script = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'click':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from nbdbm.__main__ import main\n"
        "main()"
    )
    result = python("-c", script)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


def test_standard_streams_that_are_closed(tmp_path: Path) -> None:
    """Nothing that is opened later may get their numbers."""
    image = tmp_path / "disk.qcow2"
    script = (
        'exec <&- >&- 2>&-; "$0" -m nbdbm create "$1" 1M && "$0" -m nbdbm info "$1" && '
        '"$0" -m nbdbm serve "$1" --run "readlink /proc/\\$PPID/fd/[012] >$1.fds"'
    )
    command = ["bash", "-c", script, sys.executable, str(image)]
    assert subprocess.run(command, timeout=TIMEOUT, env=environment()).returncode == 0
    assert (tmp_path / "disk.qcow2.fds").read_text().split() == ["/dev/null"] * 3


def test_names_that_the_locale_has_no_characters_for(tmp_path: Path) -> None:
    image = str(tmp_path / "disk.qcow2")
    for argv in (["create", image, "1M"], ["bitmap", "add", image, "\u2603"]):
        assert CliRunner().invoke(main, argv).exit_code == 0
    result = python("-m", "nbdbm", "bitmap", "list", image, env=environment(PYTHONIOENCODING="latin-1"))
    assert result.returncode == 0, result.stderr
    assert "\\u2603 " in result.stdout


def test_debug_shows_the_traceback() -> None:
    result = failing(UsageError("cannot do this"), "--debug")
    assert isinstance(result.exception, UsageError)


def test_a_broken_pipe_is_quiet() -> None:
    result = failing(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert result.exit_code == 1
    assert result.output == ""


@pytest.mark.parametrize(("argv", "status"), [([], 130), (["--debug"], 1)])
def test_interrupted(argv: list[str], status: int) -> None:
    result = failing(KeyboardInterrupt(), *argv)
    assert result.exit_code == status
    assert "Traceback" not in result.output


def test_bugs_are_not_hidden() -> None:
    assert isinstance(failing(ZeroDivisionError("bug")).exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain é 日", "plain é 日"), ("a\tb\x07", r"a\tb\x07"), ("\udcff", r"\udcff"), ("‮", r"\u202e")],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_explain_names_both_files() -> None:
    assert explain(OSError(18, "Invalid cross-device link", "from", None, "to")) == (
        "from: to: Invalid cross-device link"
    )


class TestProgram:
    """What the process does once ``serve`` has ended."""

    def run(self, tmp_path: Path, call: str) -> subprocess.CompletedProcess[str]:
        image = tmp_path / "disk.raw"
        image.write_bytes(bytes(4096))
        script = (
            "import atexit, sys, nbdbm.cli\n"
            "class Kept:\n"
            "    def __del__(self):\n"
            "        print('taken apart')\n"
            "kept = Kept()\n"
            "atexit.register(print, 'at exit')\n"
            "print('before')\n" + call
        )
        options = ("-r", "-f", "raw", "--run", "exit 7")
        return python("-c", script, "serve", *options, str(image), env=environment())

    def test_it_ends_at_once(self, tmp_path: Path) -> None:
        """With the status, exit handlers and streams as ever, but without taking memory apart."""
        done = self.run(tmp_path, "nbdbm.cli.program()")
        assert (done.returncode, done.stdout, done.stderr) == (7, "before\nat exit\n", "")

    def test_whoever_calls_the_command_line_goes_on(self, tmp_path: Path) -> None:
        call = "try:\n    nbdbm.cli.main()\nexcept SystemExit as ended:\n    print('status', ended.code)"
        done = self.run(tmp_path, call)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "before\nstatus 7\nat exit\ntaken apart\n"

    def test_nobody_reads_the_output(self, tmp_path: Path) -> None:
        closed = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1); nbdbm.cli.program()"
        assert self.run(tmp_path, closed).returncode == 7


# -- docs/cli.md -------------------------------------------------------------------------------

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs/cli.md"


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by the words that call it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def options_of(command: click.Command) -> list[set[str]]:
    """Its options, each as the long names that mean the same."""
    found = []
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            found += [parameter.opts, parameter.secondary_opts]
    return [{name for name in names if name.startswith("--")} for names in found if names]


def sections() -> dict[str, str]:
    """What docs/cli.md says, by the commands that a heading names; the words above them all, too."""
    found = {}
    for part in re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]:
        heading, text = part.split("\n", 1)
        for name in heading.split(", "):
            found[name.removeprefix("nbdbm ")] = text
    return found


@pytest.mark.parametrize("name", dict(commands()))
def test_every_option_is_documented(name: str) -> None:
    command = dict(commands())[name]
    text = sections()
    section = text.get(name) or text.get(name.split()[0])
    assert section is not None, f"docs/cli.md has no section 'nbdbm {name}'"
    said = set(re.findall(r"--[a-z][a-z0-9-]*", section))
    missing = [names for names in options_of(command) if not names & said]
    assert missing == [], f"docs/cli.md, section 'nbdbm {name}'"


def test_nothing_is_documented_that_is_not_there() -> None:
    known = {name for _, command in commands() for names in options_of(command) for name in names}
    known |= {name for names in options_of(main) for name in names} | {"--help"}
    assert set(re.findall(r"--[a-z][a-z0-9-]*", DOCUMENT.read_text())) <= known


def options(command: click.Command, *above: str) -> Iterator[tuple[str, set[str]]]:
    """The names of each option of the program, with the command that has it."""
    for each in command.params:
        if isinstance(each, click.Option) and "--help" not in each.opts:
            yield " ".join(above), {*each.opts, *each.secondary_opts}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from options(below, *above, name)


def test_the_reference_has_every_option_and_no_other() -> None:
    text = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    shown = set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z0-9-]*", text))
    known = {"-h", "-m"}  # help; Python's
    for command, names in options(main):
        known |= names
        assert names & shown, f"{command} {names} is not in docs/cli.md"
    assert shown <= known, f"docs/cli.md has options that are not there: {shown - known}"


def test_options_of_qemu_nbd_that_are_said_to_be_the_same() -> None:
    text = (Path(__file__).parents[2] / "docs/interop.md").read_text()
    begin = "These options of qemu-nbd are the same"
    sentence = text[text.index(begin) : text.index("Instead of the others")]
    same = set(re.findall(r"`(--?[a-z-]+|-[A-Z])`", sentence))
    serve = set().union(*(names for command, names in options(main) if command == "serve"))
    assert len(same) == 17 and same <= serve
