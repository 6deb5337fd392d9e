"""Check that the tree in README.md names the package's modules, all of them and no others.

The tree is the first code block in README.md whose first line is ``nbdbm/``; two spaces of indentation a
level; the first word of a line is a name, a folder's with a slash. Run by ``make lint`` and by
tests/test_layers.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def documented(readme: str) -> set[str]:
    """The paths that the tree names."""
    block = re.search(r"^```[a-z]*\n(nbdbm/\n.*?)^```", readme, re.MULTILINE | re.DOTALL)
    if block is None:
        return set()
    found: set[str] = set()
    folders: list[str] = []
    for line in block[1].splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        if name.endswith("/"):
            folders[depth:] = [name]
        else:
            found.add("".join(folders[:depth]) + name)
    return found


def complaints(root: Path = ROOT) -> list[str]:
    """One line per module that the README does not name, and per name that is no module."""
    modules = {
        path.relative_to(root).as_posix()
        for path in (root / "nbdbm").rglob("*.py")
        if path.name != "__init__.py" or path.parent.name == "cli"
    }
    named = documented((root / "README.md").read_text())
    found = [f"{path}: not in README.md's tree" for path in sorted(modules - named)]
    found += [f"README.md: {path} is in the tree, but not there" for path in sorted(named - modules)]
    return found


if __name__ == "__main__":
    problems = complaints()
    print("\n".join(problems) or "tree: ok")
    sys.exit(bool(problems))
