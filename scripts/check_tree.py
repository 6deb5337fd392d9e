"""Check that the tree in README.md is the tree: every module of the package, with its own first line.

The tree is the first code block in README.md whose first line is ``nbdbm/``. What stands there is made
from the modules' docstrings, so it can be wrong in no way but by being old: ``--write`` renews it. Run by
``make lint`` and by tests/test_layers.py.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(^```[a-z]*\n)(nbdbm/\n.*?)(^```)", re.MULTILINE | re.DOTALL)
COLUMN = 24


def said(path: Path) -> str:
    """The first sentence of a module's docstring, without the name it may begin with."""
    text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    text = " ".join(text.split())
    name, colon, rest = text.partition(": ")
    if colon and (" " not in name or name.startswith("``nbdbm")):
        text = rest
    return text[:1].upper() + text[1:].rstrip(".")


def tree(root: Path) -> str:
    """The package as an indented list of names, each with what it says of itself."""
    lines = ["nbdbm/"]

    def walk(folder: Path, depth: int) -> None:
        indent = "  " * depth
        for path in sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name)):
            if path.is_dir() and (path / "__init__.py").exists():
                lines.append(f"{indent}{path.name + '/':{COLUMN - len(indent)}}{said(path / '__init__.py')}")
                walk(path, depth + 1)
            elif path.suffix == ".py" and path.name != "__init__.py":
                lines.append(f"{indent}{path.name:{COLUMN - len(indent)}}{said(path)}")

    walk(root / "nbdbm", 1)
    return "\n".join(lines) + "\n"


def complaints(root: Path = ROOT) -> list[str]:
    """One line per line of the README's tree that is not true, and per one that is missing."""
    block = BLOCK.search((root / "README.md").read_text())
    if block is None:
        return ["README.md: there is no tree of nbdbm/"]
    there, wanted = block[2].splitlines(), tree(root).splitlines()
    found = [f"README.md: not (or no longer) so: {line}" for line in there if line not in wanted]
    found += [f"README.md: missing in the tree: {line}" for line in wanted if line not in there]
    if not found and there != wanted:
        found.append("README.md: the tree is in another order")
    return found


def write(root: Path = ROOT) -> None:
    """Renew the tree."""
    readme = root / "README.md"
    text = readme.read_text()
    readme.write_text(BLOCK.sub(lambda block: block[1] + tree(root) + block[3], text, count=1))


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    problems = complaints()
    if problems:
        problems.append("(scripts/check_tree.py --write renews the tree)")
    print("\n".join(problems) or "tree: ok")
    sys.exit(bool(problems))
