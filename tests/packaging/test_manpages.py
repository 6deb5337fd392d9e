"""The manual pages: complete by the words of ``--help``, and sound in the judgement of man and mandoc."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from nbdbm.cli import main
from scripts import manpages
from tests.support import qemu
from tests.support.marks import requires


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("man")
    manpages.write(made)
    return made


def helped(words: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """What ``--help`` prints, for every command it leads to."""
    result = CliRunner().invoke(main, [*words, "--help"], terminal_width=200)
    assert result.exit_code == 0
    found = {words: result.output}
    _, there, listed = result.output.partition("\nCommands:\n")
    if there:
        for line in listed.splitlines():
            if match := re.match(r"  ([a-z][a-z-]*)", line):
                found |= helped((*words, match[1]))
    return found


HELP = helped()


def shown(page: Path) -> str:
    """The page as a reader sees it, in words with one space between them."""
    done = qemu.run(["env", "MANWIDTH=200", "man", "--no-hyphenation", "-E", "UTF-8", "-l", str(page)])
    assert done.stderr == ""
    return " ".join(done.stdout.split())


def page_of(words: tuple[str, ...]) -> str:
    return "-".join(("nbdbm", *words)) + ".1"


def test_there_is_a_page_for_every_command_and_for_nothing_else(directory: Path) -> None:
    assert len(HELP) > 15
    assert sorted(os.listdir(directory)) == sorted(page_of(words) for words in HELP)


@requires("man")
@pytest.mark.parametrize("words", HELP, ids=lambda words: " ".join(("nbdbm", *words)))
def test_a_page_says_all_that_the_help_says(directory: Path, words: tuple[str, ...]) -> None:
    page = shown(directory / page_of(words))
    for heading in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "SEE ALSO"):
        assert heading in page
    usage, _, rest = HELP[words].partition("\n\n")
    assert " ".join(usage.removeprefix("Usage:").split()) in page
    rest = rest.partition("\nCommands:\n")[0]
    text, _, options = rest.partition("\nOptions:\n")
    options, _, epilog = options.partition("\n\n")
    assert " ".join(epilog.split()) in page
    for paragraph in text.split("\n\n"):
        if "Arguments:" not in paragraph:  # those without a help stand in the synopsis alone
            assert " ".join(paragraph.split()) in page
    # ``  -k, --socket PATH   What it does``, continued on lines that begin farther to the right.
    rows = re.split(r"\n  (?=-)", "\n" + options.rstrip())[1:]
    assert rows
    for row in rows:
        names, description = re.split(r"\s{2,}", row, maxsplit=1)
        assert f"{names} {' '.join(description.split())}" in page


@requires("man", "mandoc")
def test_those_who_show_pages_find_nothing_wrong(directory: Path) -> None:
    pages = [str(path) for path in sorted(directory.iterdir())]
    for words in (["mandoc", "-T", "lint", "-W", "style"], ["groff", "-ww", "-man", "-K", "utf8", "-z"]):
        done = qemu.run([*words, *pages], check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    named = qemu.run(["lexgrog", *pages]).stdout
    for page in pages:
        assert f'{page}: "{Path(page).stem} - ' in named


def test_what_a_page_refers_to_of_ours_exists(directory: Path) -> None:
    for path in directory.iterdir():
        text = path.read_text().replace("\\-", "-")
        names = re.findall(r"\\fB(nbdbm[a-z-]*)\\fR\(1\)", text)
        assert names
        for name in names:
            assert (directory / f"{name}.1").exists()


@requires("mandoc")
def test_text_is_never_taken_for_requests(tmp_path: Path) -> None:
    """Whatever a help may say."""
    page = tmp_path / "x.1"
    nasty = r".SH evil\n 'so /etc/passwd \fIx\fR `a` ^~ -- \(em ...and so on' "
    page.write_text(
        '.TH X 1 "2026-01-01"\n.SH NAME\nx \\- y\n.SH DESCRIPTION\n'
        + manpages.filled(nasty)
        + "\n.PP\n"
        + manpages.escape(".TH\n'so x\n\\n(.x")
        + "\n"
    )
    assert qemu.run(["mandoc", "-T", "lint", str(page)]).stdout == ""
    output = " ".join(qemu.run(["mandoc", "-T", "ascii", str(page)]).stdout.split())
    assert re.sub(".\b", "", " ".join(nasty.split()) + r" .TH 'so x \n(.x") in output


def test_the_date_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    pages = manpages.pages()
    assert all(' "1970-01-02" ' in text.splitlines()[0] for text in pages.values())
    assert pages == manpages.pages()
