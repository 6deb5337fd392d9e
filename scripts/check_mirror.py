"""Check that each module has its twin test at the same path, and each such test its module.

``nbdbm/nbd/messages.py`` and ``tests/nbd/test_messages.py``. Run by ``make lint`` and by
tests/test_layers.py.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

WITHOUT = {
    "nbd/constants.py": "numbers only; every test of the wire uses them",
    "nbd/catalog.py": "a value and a protocol class",
    "nbd/events.py": "values only",
    "nbd/clientevents.py": "values only",
    "nbd/limits.py": "numbers only; the tests of who keeps to them use them",
    "qcow2/constants.py": "numbers only; every test of the format uses them",
    "__main__.py": "calls the command line",
}
"""Modules that need no test of their own, and why."""

ELSEWHERE = {"interop", "support", "property", "fuzz", "crash", "soak", "data", "packaging"}
"""Folders of tests that mirror no folder of the package."""

EXTRA = {
    "test_layers.py": "the project's own checks",
    "test_security.py": "SECURITY.md",
    "test_bench.py": "scripts/bench.py and scripts/benchmark",
    "image/test_concurrency.py": "requests at the same time, through the whole engine",
    "image/test_reopen.py": "read-only to writable and back, through the whole engine",
}
"""Tests that belong to no one module, and to what instead."""


def is_empty(path: Path) -> bool:
    """Whether a module holds nothing but its docstring."""
    return all(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for node in ast.parse(path.read_text()).body
    )


def twin(module: Path) -> Path:
    """Where the test of a module belongs, relative to tests/; a package's own code is tested as ``main``."""
    name = "main" if module.stem == "__init__" else module.stem
    return module.parent / f"test_{name}.py"


def complaints(root: Path = ROOT) -> list[str]:
    """One line per module without a test, and per test without a module."""
    package, tests = root / "nbdbm", root / "tests"
    found: list[str] = []
    twins: set[Path] = set()
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package)
        twins.add(twin(module))
        if module.as_posix() in WITHOUT or (module.name == "__init__.py" and is_empty(path)):
            continue
        if module == Path("__init__.py"):
            continue
        variants = sorted((tests / module.parent).glob(f"{twin(module).stem}*.py"))
        if not variants:
            found.append(f"nbdbm/{module}: no test at tests/{twin(module)}")
    for path in sorted(tests.rglob("test_*.py")):
        test = path.relative_to(tests)
        if test.parts[0] in ELSEWHERE or test.as_posix() in EXTRA or test in twins:
            continue
        # A module with much to test may have several: test_header.py, test_header_edit.py.
        if not any(test.parent == other.parent and test.stem.startswith(f"{other.stem}_") for other in twins):
            found.append(f"tests/{test}: there is no module that it tests")
    return found


if __name__ == "__main__":
    problems = complaints()
    print("\n".join(problems) or "mirror: ok")
    sys.exit(bool(problems))
