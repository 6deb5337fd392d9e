"""The options by which commands open an image for looking."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from nbdbm.cli.options import LookOptions, image_options
from nbdbm.errors import UsageError
from nbdbm.image.image import OpenOptions


def parsed(*arguments: str, snapshot: bool = True) -> LookOptions:
    """What a command with these options is given."""
    given: list[LookOptions] = []

    @click.command()
    @image_options(snapshot=snapshot)
    def command(look: LookOptions) -> None:
        given.append(look)

    result = CliRunner().invoke(command, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return given[0]


def test_defaults_only_read() -> None:
    assert parsed().for_engine() == OpenOptions(read_only=True)


def test_each_option_reaches_the_engine() -> None:
    look = parsed("-f", "raw", "-U", "-l", "s1", "--backing-root", "/srv")
    assert look.for_engine() == OpenOptions(
        format="raw", read_only=True, snapshot="s1", backing_root="/srv", force_share=True
    )
    assert parsed("--no-backing").for_engine().no_backing
    assert parsed("--load-snapshot", "x").load_snapshot == "x"


def test_no_snapshots_where_they_mean_nothing() -> None:
    with pytest.raises(AssertionError, match="No such option"):
        parsed("--load-snapshot", "x", snapshot=False)
    assert parsed("-U", snapshot=False) == LookOptions(force_share=True)


def test_what_excludes_what() -> None:
    with pytest.raises(UsageError, match="--no-backing excludes --backing-root"):
        parsed("--no-backing", "--backing-root", "/srv")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["-f", "qcow2"], "--format"),
        (["-U"], "--force-share"),
        (["-l", "x"], "--load-snapshot"),
        (["--no-backing"], "--no-backing"),
        (["--backing-root", "x"], "--backing-root"),
    ],
)
def test_none_of_them_is_for_servers(arguments: list[str], option: str) -> None:
    parsed().refuse_for("nbd://h")
    with pytest.raises(UsageError, match=f"^nbd://h: {option} is for image files"):
        parsed(*arguments).refuse_for("nbd://h")
