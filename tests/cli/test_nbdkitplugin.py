"""``nbdbm nbdkit-plugin``: the path of a script that nbdkit takes."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from nbdbm.cli import main
from tests.support import nbdkit, qemu
from tests.support.marks import requires


def printed() -> str:
    result = CliRunner().invoke(main, ["nbdkit-plugin"])
    assert result.exit_code == 0
    return result.output.removesuffix("\n")


def test_it_is_there() -> None:
    assert Path(printed()).is_absolute() and Path(printed()).samefile(nbdkit.PLUGIN)


@requires("nbdkit-python")
def test_nbdkit_takes_it() -> None:
    done = qemu.run(nbdkit.argv("python", printed(), "--dump-plugin"))
    known = done.stdout.splitlines()
    assert "thread_model=parallel" in known and "has_extents=1" in known and "has_can_fua=1" in known
