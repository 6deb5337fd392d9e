"""Check that imports follow the layers; exits 1 and names each arrow that does not.

Run by ``make lint`` and by tests/test_layers.py.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "nbdbm"

LEAVES = {"errors", "extents", "inline", "runs", "metrics", "access", "config", "peer", "tunnel", "uri"}
PURE_FORBIDDEN = {"asyncio", "os", "socket", "time", "threading", "selectors", "concurrent"}
PURE = {"nbd", "qcow2", "bitmaps"}

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "extents": set(),
    "inline": set(),
    "runs": {"_speed"},
    "metrics": set(),
    "access": {"errors", "peer"},
    "config": {"errors", "access"},
    "configfile": {"errors", "access", "config"},
    "peer": set(),
    # The exports of one server; the handshake's catalog, and leases for the shell.
    "registry": {"errors", "access", "exports", "peer", "nbd.constants", "nbd.catalog"},
    "tlsfiles": {"errors", "tunnel"},
    "tunnel": set(),
    "uri": {"errors"},
    "nbd": {"errors", "extents", "runs"},
    "qcow2": {"errors", "runs"},
    "bitmaps": {"errors", "extents", "runs"},
    "image": {"errors", "extents", "inline", "runs", "metrics", "qcow2", "bitmaps"},
    # The one bilingual module: it may use the wire's vocabulary (three modules of it) and the engine.
    "exports": {
        "errors",
        "extents",
        "metrics",
        "peer",
        "image",
        "bitmaps",
        "nbd.constants",
        "nbd.catalog",
        "nbd.metacontext",
    },
    "server": {
        "errors",
        "extents",
        "inline",
        "metrics",
        "nbd",
        "exports",
        "registry",
        "config",
        "peer",
        "tlsfiles",
        "tunnel",
        "uri",
    },
    "client": {"errors", "extents", "nbd", "uri", "clientlink"},
    "clientlink": {"errors", "nbd", "uri", "clienttls", "tunnel"},
    "clienttls": {"errors", "uri", "tlsfiles"},
    "control": {"errors", "server", "exports", "registry", "metrics", "peer"},
    # A shell like ``cli``, with which it shares how images are opened and errors are told.
    "nbdkit": {"errors", "config", "exports", "cli", "nbd.constants"},
    "cli": {
        "errors",
        "extents",
        "metrics",
        "access",
        "config",
        "configfile",
        "control",
        "server",
        "exports",
        "registry",
        "image",
        "client",
        "uri",
        # The context names and extent flags that people see are the protocol's.
        "nbd.constants",
    },
    "__main__": {"cli"},
    "__init__": set(),
}


def imports(tree: ast.Module) -> list[tuple[int, str]]:
    """Every absolute module imported anywhere in the tree, with its line."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append((node.lineno, f"{PACKAGE}.<relative>"))
            elif node.module == PACKAGE:
                found += [(node.lineno, f"{PACKAGE}.{alias.name}") for alias in node.names]
            elif node.module:
                found.append((node.lineno, node.module))
    return found


def complaints(root: Path = ROOT) -> list[str]:
    """One line per import that breaks the layers."""
    found: list[str] = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        layer = parts[0]
        where = path.relative_to(root)
        if layer not in ALLOWED:
            found.append(f"{where}: no layer is declared for {layer!r}")
            continue
        for line, name in imports(ast.parse(path.read_text())):
            head, *rest = name.split(".")
            if head != PACKAGE:
                if layer in PURE and head in PURE_FORBIDDEN:
                    found.append(f"{where}:{line}: pure layer {layer} imports {name}")
                continue
            target = rest[0] if rest else "__init__"
            if target in (layer, "__version__") or target == "__init__":
                continue
            allowed = ALLOWED[layer]
            if target not in allowed and ".".join(rest[:2]) not in allowed:
                found.append(f"{where}:{line}: layer {layer} must not import {name}")
    return found


if __name__ == "__main__":
    problems = complaints()
    print("\n".join(problems) or "layers: ok")
    sys.exit(bool(problems))
