"""What README.md and docs/ show works as shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import images, libnbd, qemu, servers, walkthrough
from tests.support.marks import requires

ROOT = walkthrough.ROOT

pytestmark = [requires("openssl", "qemu-img", "qemu-io", "qemu-nbd", "nbdcopy", "nbdinfo", "libnbd")]

PAGES = {"README.md": 10, "docs/backup.md": 10, "docs/recovery.md": 20, "docs/tls.md": 20}
"""The pages that can be followed in an empty directory, and about how many commands each has at least."""


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_followed(page: str, tmp_path: Path) -> None:
    done = walkthrough.run(ROOT / page, tmp_path)
    assert len(done) >= PAGES[page]


@pytest.mark.parametrize("page", PAGES)
def test_no_command_of_a_page_is_left_out(page: str) -> None:
    text = (ROOT / page).read_text()
    shown = re.findall(r"^ *\$ ", text, re.MULTILINE)
    run = [step for step in walkthrough.steps(text) if isinstance(step, walkthrough.Command)]
    assert len(shown) == len(run)
    # Those for people in a hurry, without a prompt, stand further down as well.
    hurried = re.findall(r"^    (nbdbm .*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert set(hurried) <= {step.text for step in run}


def test_pages_with_commands_to_follow_are_followed() -> None:
    pages = {str(p.relative_to(ROOT)) for p in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]}
    assert {page for page in pages if "```console" in (ROOT / page).read_text()} == set(PAGES)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("", "", True),
        ("", "a\n", False),
        ("a.b\n", "a.b  \n", True),
        ("a.b\n", "axb\n", False),
        ("a ... b\n", "a (1) b\n", True),
        ("a ... b\n", "a\nb\n", False),
        ("a\n...\nb\n", "a\n1\n2\nb\n", True),
        ("a\n...\nb\n", "a\n1\n2\n", False),
    ],
)
def test_what_is_shown_is_compared(shown: str, printed: str, same: bool) -> None:
    assert walkthrough.matches(shown, printed) is same


@pytest.mark.parametrize(
    "block",
    ["$ echo a", "$ echo a\nb", "$ false\n", "$ true  # status 1", "$ echo a; kill -9 $$  # status 137\na"],
)
def test_a_page_that_is_not_true_is_found(block: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Text\n\n```console\n{block}\n```\n")
    (place := tmp_path / "place").mkdir()
    with pytest.raises(AssertionError, match=r"page.md, line 4:"):
        walkthrough.run(page, place)


def test_the_program_for_python(gallery: images.Gallery, tmp_path: Path) -> None:
    text = (ROOT / "docs/backup.md").read_text()
    found = re.search(r"^```python\n(import asyncio\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    program = tmp_path / "dirty.py"
    program.write_text(found[1])
    with servers.nbdbm(gallery.get("bitmaps-inconsistent").path) as server:
        done = subprocess.run(
            [sys.executable, program, server.uri, "good"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            env=qemu.environment(),
        )
        answer = libnbd.probe(server.uri, contexts=["qemu:dirty-bitmap:good"], digest=False)
    expected, at = [], 0
    for length, flags in answer["maps"]["qemu:dirty-bitmap:good"]:
        if flags & 1:
            expected.append(f"{at} {length}")
        at += length
    assert expected
    assert done.stdout.splitlines() == expected
