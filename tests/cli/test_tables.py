"""Tables: nothing is wrapped off a terminal, nothing is taken for markup."""

from __future__ import annotations

import pytest

from nbdbm.cli import tables


def test_rows_stay_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    shown = tables.table("name", "size:r")
    long = "x" * 500
    shown.add_row(long, "1 MiB")
    shown.add_row("[red]short[/red] :smile:", "12 MiB")
    tables.console().print(shown)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) == 4 and "\x1b" not in out
    assert lines[0].split() == ["name", "size"]
    assert lines[2].split() == [long, "1", "MiB"]
    assert lines[3].startswith("[red]short[/red] :smile: ")
    # Numbers end at the same column.
    assert len(lines[2].rstrip()) == len(lines[3].rstrip())


def test_facts(capsys: pytest.CaptureFixture[str]) -> None:
    shown = tables.facts()
    shown.add_row("image", "a[1].qcow2")
    shown.add_row("disk size", "1 MiB")
    tables.console().print(shown)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in lines] == ["image      a[1].qcow2", "disk size  1 MiB"]
