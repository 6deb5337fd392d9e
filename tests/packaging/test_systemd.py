"""The systemd units: sound by systemd's judgement, and in step with the program that they start."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from nbdbm.cli import main
from tests.support import qemu, servers
from tests.support.marks import requires

PACKAGING = Path(__file__).resolve().parent.parent.parent / "packaging"
UNITS = ("nbdbm.service", "nbdbm.socket", "nbdbm@.service")
SERVICES = tuple(name for name in UNITS if name.endswith(".service"))

EXPOSURE = 20
"""In tenths: what systemd-analyze calls OK begins at 20 and ends at 50; we are below it."""


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units in a directory, with a program in the place of one that is not installed here."""
    for name in UNITS:
        text = (PACKAGING / "systemd" / name).read_text()
        # A template is judged by an instance of it.
        copy = tmp_path / name.replace("@", "@vda")
        copy.write_text(text.replace("/usr/bin/nbdbm", "/bin/true"))
    return tmp_path


def judged(units: Path, *words: str) -> subprocess.CompletedProcess[str]:
    names = [str(units / name.replace("@", "@vda")) for name in UNITS]
    return qemu.run(["systemd-analyze", *words, *names], check=False)


def directives(name: str) -> dict[str, list[str]]:
    """Key -> its values, over all sections."""
    found: dict[str, list[str]] = {}
    for line in (PACKAGING / "systemd" / name).read_text().splitlines():
        if not line.startswith(("#", "[")) and "=" in line:
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@requires("systemd-analyze")
def test_systemd_finds_nothing_wrong(units: Path) -> None:
    done = judged(units, "verify", "--man=no")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@requires("systemd-analyze")
def test_systemd_would_find_it(units: Path) -> None:
    """The test above can fail."""
    unit = units / "nbdbm.service"
    unit.write_text(unit.read_text().replace("ProtectSystem=strict", "ProtectSystem=stricter"))
    assert "stricter" in judged(units, "verify", "--man=no").stderr


@requires("systemd-analyze")
@pytest.mark.parametrize("name", SERVICES)
def test_little_is_exposed(units: Path, name: str) -> None:
    unit = units / name.replace("@", "@vda")
    words = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", "--no-pager"]
    done = qemu.run([*words, str(unit)], check=False)
    assert done.returncode == 0, done.stdout
    assert "Overall exposure level" in done.stdout


@pytest.mark.parametrize("name", SERVICES)
def test_the_program_has_these_options(name: str) -> None:
    [line] = directives(name)["ExecStart"]
    program, command, *rest = shlex.split(line)
    assert program == "/usr/bin/nbdbm"
    found = main.get_command(click.Context(main), command)
    assert found is not None
    known = {text for parameter in found.params for text in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in rest if word.startswith("--")} <= known
    # NBDBM_OPTIONS in the example of the comment, too.
    text = (PACKAGING / "systemd" / name).read_text()
    assert set(re.findall(r"(?<= )--[a-z-]+", text.partition("[Unit]")[0])) <= known


@pytest.mark.parametrize("name", SERVICES)
def test_the_bitmaps_get_time_to_be_stored(name: str) -> None:
    found = directives(name)
    assert found["Type"] == ["notify"]
    assert found["TimeoutStopSec"] == ["15min"]
    # A second SIGTERM does not wait for clients, so it must not come from systemd at once.
    assert found["KillMode"] == ["mixed"]
    assert "KillSignal" not in found


def test_both_services_are_confined_alike() -> None:
    own = {
        "ExecStart",
        "ExecReload",
        "Description",
        "After",
        "Wants",
        "Environment",
        "EnvironmentFile",
        "AssertPathExists",
    }
    one, other = ({k: v for k, v in directives(name).items() if k not in own} for name in SERVICES)
    assert one == other


@requires("nbdinfo")
def test_the_configuration_that_is_shipped(tmp_path: Path) -> None:
    """It is accepted, and exports what is in the directory."""
    images = tmp_path / "images"
    images.mkdir()
    servers.nbdbm_run("create", "-q", images / "vda.qcow2", "1M", check=True)
    text = (PACKAGING / "nbdbm.toml").read_text()
    text = text.replace("/var/lib/nbdbm", str(images)).replace("/run/nbdbm", str(tmp_path))
    config = tmp_path / "nbdbm.toml"
    config.write_text(text)
    uri = f"nbd+unix:///?socket={tmp_path}/nbdbm.sock"
    with subprocess.Popen(
        [*servers.NBDBM, "serve", "--config", str(config)],
        stdout=subprocess.PIPE,
        text=True,
        env=qemu.environment(),
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() != ""
            listed = qemu.run(["nbdinfo", "--list", uri]).stdout
            assert 'export="vda.qcow2"' in listed
        finally:
            server.terminate()
        assert server.wait(timeout=50) == 0
