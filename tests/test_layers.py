"""The checks that ``make lint`` runs, once more as tests; and that each of them can fail."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from scripts import check_layers, check_mirror, check_tree, layer_picture

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "check", [check_layers, check_mirror, check_tree, layer_picture], ids=lambda check: check.__name__
)
def test_nothing_to_complain_about(check) -> None:  # type: ignore[no-untyped-def]
    assert check.complaints(ROOT) == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the checks look at."""
    for part in ("nbdbm", "tests"):
        shutil.copytree(
            ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", ".mypy_cache")
        )
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / layer_picture.PICTURE, tmp_path / "docs")
    return tmp_path


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("nbd/messages.py", "import asyncio"),
        ("nbd/messages.py", "from nbdbm.qcow2 import header"),
        ("qcow2/header.py", "import os.path"),
        ("bitmaps/dirty.py", "from nbdbm.image.image import Image"),
        ("image/image.py", "from nbdbm.nbd.constants import Cmd"),
        ("server/server.py", "from nbdbm import image"),
        ("errors.py", "def f():\n    import nbdbm.extents"),
        ("exports.py", "from . import errors"),
    ],
)
def test_a_wrong_import_is_found(tree: Path, module: str, line: str) -> None:
    path = tree / "nbdbm" / module
    path.write_text(path.read_text() + f"\n{line}\n")
    (complaint,) = check_layers.complaints(tree)
    assert complaint.startswith(f"nbdbm/{module}:")


def test_a_module_without_a_test_is_found(tree: Path) -> None:
    (tree / "nbdbm/image/lonely.py").write_text("X = 1\n")
    (complaint,) = check_mirror.complaints(tree)
    assert "nbdbm/image/lonely.py" in complaint
    assert "tests/image/test_lonely.py" in complaint


def test_a_test_of_nothing_is_found(tree: Path) -> None:
    (tree / "tests/image/test_gone.py").write_text("def test_x():\n    pass\n")
    (complaint,) = check_mirror.complaints(tree)
    assert "tests/image/test_gone.py" in complaint


def test_a_tree_in_the_readme_that_is_not_the_tree_is_found(tree: Path) -> None:
    (tree / "nbdbm/image/lonely.py").write_text('"""What is alone."""\n')
    (tree / "nbdbm/errors.py").unlink()
    complaints = check_tree.complaints(tree)
    assert len(complaints) == 2
    assert any("lonely.py" in complaint and "What is alone" in complaint for complaint in complaints)
    assert any("errors.py" in complaint for complaint in complaints)
    check_tree.write(tree)
    assert check_tree.complaints(tree) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("image/lonely.py", "X = 1"),
        ("bitmaps/dirty.py", "import nbdbm.qcow2.constants"),
        ("lonely/__init__.py", "from nbdbm.nbd import protocol"),
    ],
)
def test_a_picture_of_other_code_is_found(tree: Path, module: str, line: str) -> None:
    path = tree / "nbdbm" / module
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    (complaint,) = layer_picture.complaints(tree)
    assert "make picture" in complaint
    layer_picture.write(tree)
    assert layer_picture.complaints(tree) == []


def test_the_picture_stays_when_nothing_that_it_shows_has_changed(tree: Path) -> None:
    path = tree / "nbdbm/image/image.py"
    path.write_text(path.read_text() + "\nimport json\nfrom nbdbm.qcow2 import header as another\n")
    assert layer_picture.complaints(tree) == []


def test_arrows_point_down_and_boxes_do_not_touch() -> None:
    layers = layer_picture.modules(ROOT)
    edges = layer_picture.arrows(ROOT, layers)
    boxes = {name: layer_picture.Box(name, found) for name, found in layers.items() if name in sum(edges, ())}
    rows, _ = layer_picture.rows_of(boxes, edges)
    layer_picture.place(rows)
    assert ("exports", "image") in edges and ("image", "exports") not in edges
    for upper, lower in edges:
        assert boxes[upper].y + boxes[upper].height < boxes[lower].y
    for row in rows:
        for left, right in pairwise(row):
            assert left.x + left.width / 2 < right.x - right.width / 2
