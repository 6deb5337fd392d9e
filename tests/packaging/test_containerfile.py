"""The Containerfile, which no container engine builds here: in step with the tree and with the program."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import click

from nbdbm.cli import main
from nbdbm.nbd.constants import DEFAULT_PORT

ROOT = Path(__file__).resolve().parent.parent.parent


def instructions() -> list[tuple[str, str]]:
    """(keyword, the rest), continued lines joined."""
    text = (ROOT / "packaging/Containerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(keyword, rest) for keyword, _, rest in (line.partition(" ") for line in lines)]


def said(keyword: str) -> str:
    [rest] = [rest for word, rest in instructions() if word == keyword]
    return rest


def copied() -> list[str]:
    """What comes from the checkout."""
    lines = [rest.split() for word, rest in instructions() if word == "COPY" and not rest.startswith("--")]
    return [name for line in lines for name in line[:-1]]


def test_what_is_copied_is_there_and_enough() -> None:
    assert [name for name in copied() if not (ROOT / name).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # What pip needs to make the package.
    assert {"nbdbm", "pyproject.toml", "setup.py", project["readme"]} <= set(copied())


def test_no_more_is_sent_to_the_engine_than_is_copied() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied())
    # Compiled for this machine, not for that one.
    assert "**/*.so" in lines


def test_the_program_has_this_entry_point_and_these_options() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    [program] = json.loads(said("ENTRYPOINT"))
    assert program in scripts
    assert f"/opt/nbdbm/bin/{program} /usr/local/bin/{program}" in " ".join(r for _, r in instructions())
    command, *words = json.loads(said("CMD"))
    # As the program has it: click remembers what the options for help are called.
    above = click.Context(main, **main.context_settings)
    found = main.get_command(above, command)
    assert found is not None
    context = found.make_context(command, list(words), above, resilient_parsing=True)
    assert context.params["bind"] == "0.0.0.0"
    assert str(context.params["directory"]) == said("VOLUME") == said("WORKDIR")
    assert said("EXPOSE") == str(DEFAULT_PORT)
    assert said("STOPSIGNAL") == "SIGTERM"


def test_it_does_not_run_as_root() -> None:
    assert re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", said("USER"))
    user, group = said("USER").split(":")
    made = " ".join(rest for word, rest in instructions() if word == "RUN")
    assert f"--uid {user} --gid {group} " in made
