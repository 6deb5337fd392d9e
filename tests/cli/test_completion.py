"""``nbdbm completion``: what is printed; the shells judge it in tests/packaging/test_completion.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from nbdbm.cli import main
from nbdbm.cli.completion import SHELLS, VARIABLE
from tests.cli.program import environment


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_asks_by_the_variable_that_the_program_listens_to(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert f"{VARIABLE}={shell}_complete" in result.output
    assert "nbdbm" in result.output


def test_only_shells_that_we_know() -> None:
    result = CliRunner().invoke(main, ["completion", "csh"])
    assert result.exit_code == 2
    assert "csh" in result.output


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("info ", ["file,"]),
        ("map ", ["file,"]),
        ("serve ", ["file,"]),
        ("serve --backing-root ", ["dir,"]),
        ("bitmap add ", ["file,"]),
        ("bitmap edit x --merge a b --source-format q", ["plain,qcow2"]),
        ("serve --format ", ["plain,qcow2", "plain,raw"]),
    ],
)
def test_what_bash_is_told(words: str, wanted: list[str]) -> None:
    typed = f"nbdbm {words}".split(" ")
    script = "import sys; sys.argv = ['nbdbm']; from nbdbm.cli import program; program()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment()
        | {
            VARIABLE: "bash_complete",
            "COMP_WORDS": "\n".join(typed),
            "COMP_CWORD": str(len(typed) - 1),
        },
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert done.stdout.splitlines() == wanted
