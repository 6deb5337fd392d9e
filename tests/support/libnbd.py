"""libnbd's Python binding: Debian's package, loaded into a virtual environment that does not see it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from tests.support import probe as probe_module
from tests.support import qemu

DIST_PACKAGES = Path("/usr/lib/python3/dist-packages")


@cache
def _load() -> Any:
    """The module ``nbd``, or the reason (a str) why there is none.

    The directory is on the path during this import only: nothing else of the system's Python may be
    found by accident.
    """
    if importlib.util.find_spec("nbd") is not None:
        return importlib.import_module("nbd")
    if not (DIST_PACKAGES / "nbd.py").exists():
        return "the package python3-libnbd is not installed"
    sys.path.append(str(DIST_PACKAGES))
    try:
        return importlib.import_module("nbd")
    except ImportError as error:
        version = ".".join(map(str, sys.version_info[:2]))
        return f"python3-libnbd is not built for this Python ({version}): {error}"
    finally:
        sys.path.remove(str(DIST_PACKAGES))


def missing() -> str | None:
    """Why the binding cannot be used, or None if it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def module() -> Any:
    """The module ``nbd``; tests that call this carry ``requires("libnbd")``."""
    loaded = _load()
    assert not isinstance(loaded, str), loaded
    return loaded


def probe(uri: str, tools: qemu.Tools = qemu.SYSTEM, **options: Any) -> dict[str, Any]:
    """Ask a server everything (tests/support/probe.py), with the binding of ``tools``."""
    options["uri"] = uri
    if tools.root is None:
        return probe_module.probe(module(), options)
    done = subprocess.run(
        [*tools.python(), probe_module.__file__, json.dumps(options)],
        env=tools.python_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=qemu.TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        raise qemu.ToolFailed(f"probe {options}: {done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
