"""SECURITY.md names tests for what it promises: they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_test_it_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)((?:::\w+)*)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 20
    missing = []
    for path, inside in named:
        if not (ROOT / path).is_file():
            missing.append(path)
            continue
        body: list[ast.stmt] = ast.parse((ROOT / path).read_text()).body
        for name in filter(None, inside.split("::")):
            found = next((each for each in body if getattr(each, "name", None) == name), None)
            if found is None:
                missing.append(path + inside)
                break
            body = found.body if isinstance(found, ast.ClassDef) else []
    assert not missing
