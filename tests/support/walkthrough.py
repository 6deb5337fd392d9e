"""A page of the documentation as a script: its commands are run as they stand there, in order.

What is run, in one directory that is empty at first:

- blocks fenced as ``console``: each line ``$ COMMAND`` (continued after a backslash at the end of the line),
  and below it what it prints, on stdout and stderr, up to the next command. ``...`` stands for any text,
  alone on a line for any lines. The exit status must be 0, unless the command ends in ``# status N``;
- blocks fenced as ``python`` whose first line is ``# NAME.py: ...`` are saved under that name.

All else on a page is for reading only.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import qemu

ROOT = Path(__file__).resolve().parent.parent.parent

_BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([a-z_]+\.py): ")
_STATUS = re.compile(r"# status (\d+)$")


@dataclass(frozen=True)
class SavedFile:
    """A file that the page has its reader save."""

    name: str
    content: str


@dataclass(frozen=True)
class Command:
    """A command, what the page says it prints, and the status it ends with."""

    text: str
    output: str
    status: int
    line: int
    """Where it stands in the page, from 1."""


def steps(page: str) -> Iterator[SavedFile | Command]:
    """What a reader does, from top to bottom."""
    for block in _BLOCK.finditer(page):
        if block[1] == "python":
            if named := _FILE.match(block[2]):
                yield SavedFile(named[1], block[2])
            continue
        yield from _commands(block[2], page.count("\n", 0, block.start(2)) + 1)


def _commands(block: str, line: int) -> Iterator[Command]:
    lines = block.splitlines()
    assert lines and lines[0].startswith("$ "), f"line {line}: a console block begins with a command"
    at = 0
    while at < len(lines):
        first = at
        text = lines[at].removeprefix("$ ")
        while text.endswith("\\"):
            at += 1
            text += "\n" + lines[at]
        at += 1
        output = []
        while at < len(lines) and not lines[at].startswith("$ "):
            output.append(lines[at] + "\n")
            at += 1
        status = _STATUS.search(text)
        yield Command(text, "".join(output), int(status[1]) if status else 0, line + first)


def matches(shown: str, printed: str) -> bool:
    """Whether a command printed what the page shows; blanks at the ends of lines do not count."""
    pattern = "".join(
        r"(?:.*\n)*" if line == "..." else re.escape(line.rstrip()).replace(r"\.\.\.", ".*") + r" *\n"
        for line in shown.splitlines()
    )
    return re.fullmatch(pattern, printed) is not None


def run(page: Path, place: Path) -> list[Command]:
    """Do what the page says, in the empty directory ``place``; return the commands, all run and compared.

    ``nbdbm`` is found on PATH as a user's is: a link to the command, not a virtual environment whose
    Python would hide the system's.
    """
    command = Path(sys.executable).with_name("nbdbm")
    assert command.exists(), f"{command}: the package is not installed in this environment"
    found = place / ".bin"
    found.mkdir()
    (found / "nbdbm").symlink_to(command)
    environment = qemu.environment()
    environment["PATH"] = os.pathsep.join([str(found), environment["PATH"]])
    done = []
    for step in steps(page.read_text()):
        if isinstance(step, SavedFile):
            (place / step.name).write_text(step.content)
            continue
        ended = subprocess.run(
            ["bash", "-c", step.text],
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
            timeout=qemu.TIMEOUT,
            check=False,
        )
        printed, status = ended.stdout, ended.returncode
        if status < 0:  # as the shell says it that people type into
            printed, status = printed + "Killed\n" * (status == -signal.SIGKILL), 128 - status
        where = f"{page.name}, line {step.line}:\n$ {step.text}\n"
        assert status == step.status, f"{where}ended with status {status}, not {step.status}:\n{printed}"
        assert matches(step.output, printed), f"{where}should print:\n{step.output}but prints:\n{printed}"
        done.append(step)
    return done
