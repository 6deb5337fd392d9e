"""The outside tools (QEMU's, libnbd's), one wrapper each, in two generations.

``SYSTEM`` runs what the system has installed; ``newer()`` what scripts/unpack_peers.sh unpacked beside it
(QEMU 10, libnbd 1.22). What is unpacked runs through its own dynamic loader, in the same file system, so
a path means the same for both. Every run is bounded in time, and only processes started here are ended.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent

SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
"""Some of the tools live where only root's PATH looks."""

TIMEOUT = 50
"""Seconds for one run of a tool: below the 60 s a test has, so that the tool gets named."""


class ToolFailed(AssertionError):
    """A tool's exit status was not 0: an assertion failure, with what the tool said."""


def environment() -> dict[str, str]:
    """The environment for subprocesses: in English, and without the suite's own settings."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONASYNCIODEBUG", "LISTEN_FDS", "LISTEN_PID")}
    return env | {"LC_ALL": "C.UTF-8", "PATH": SEARCH_PATH}


def run(
    argv: list[str],
    *,
    check: bool = True,
    timeout: float = TIMEOUT,
    preexec: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end with captured output; ToolFailed if ``check`` and the status is not 0.

    ``preexec`` is called in the new process before the program.
    """
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=timeout,
        check=False,
        env=environment(),
        preexec_fn=preexec,
    )
    if check and done.returncode != 0:
        raise ToolFailed(f"{' '.join(argv)}\nstatus {done.returncode}\n{done.stdout}{done.stderr}")
    return done


@dataclass(frozen=True)
class Tools:
    """One generation of the tools.

    Args:
        name: for test ids.
        root: the tree they were unpacked into, or None for the system's own.
    """

    name: str
    root: Path | None = None

    def argv(self, tool: str, *args: object) -> list[str]:
        """The command line that runs ``tool``."""
        rest = [str(arg) for arg in args]
        if self.root is None:
            return [shutil.which(tool, path=SEARCH_PATH) or tool, *rest]
        loader, libraries = _loader(self.root)
        places = [self.root / "usr/bin" / tool, self.root / "usr/sbin" / tool]
        program = next((path for path in places if path.exists()), places[0])
        return [str(loader), "--library-path", str(libraries), str(program), *rest]

    def run(self, tool: str, *args: object, check: bool = True, timeout: float = TIMEOUT) -> str:
        """Run ``tool`` and return what it printed on stdout."""
        return run(self.argv(tool, *args), check=check, timeout=timeout).stdout

    def img(self, *args: object) -> str:
        """qemu-img."""
        return self.run("qemu-img", *args)

    def img_json(self, *args: object) -> Any:
        """qemu-img with ``--output json``, parsed."""
        return json.loads(self.run("qemu-img", *args, "--output", "json"))

    def io(self, path: Path, *commands: str, options: tuple[str, ...] = ("-f", "qcow2")) -> str:
        """qemu-io: run ``commands`` in order on one opened image."""
        words = [word for command in commands for word in ("-c", command)]
        out = self.run("qemu-io", *options, *words, path)
        # qemu-io reports a failed command and goes on to exit with 0.
        if "failed" in out or "error" in out.lower():
            raise ToolFailed(f"qemu-io {path}: {out}")
        return out

    def python(self) -> list[str]:
        """The interpreter that goes with this generation's libnbd binding."""
        if self.root is None:
            return ["/usr/bin/python3"]
        return self.argv("python3")

    def python_environment(self) -> dict[str, str]:
        """What ``python()`` needs in its environment."""
        return environment() | ({"PYTHONHOME": str(self.root / "usr")} if self.root else {})


SYSTEM = Tools("system")


@cache
def unpacked(suite: str) -> Path:
    """Where what scripts/unpack_peers.sh unpacks from a Debian ``suite`` is, or would be."""
    done = run([str(ROOT / "scripts/unpack_peers.sh"), "--where", suite])
    return Path(done.stdout.strip())


def newer() -> Tools:
    """The newer generation; ``newer_missing`` says whether it is there."""
    return Tools("newer", unpacked("trixie"))


def newer_missing() -> str | None:
    """Why the newer generation cannot be used, or None if it can."""
    place = unpacked("trixie")
    if not (place / "usr/bin/nbdinfo").exists():
        return f"QEMU 10 and libnbd 1.22 are not at {place} (scripts/unpack_peers.sh puts them there)"
    done = run(newer().argv("nbdinfo", "--version"), check=False)
    if done.returncode != 0:
        return f"the programs at {place} do not run here: {done.stderr.strip()}"
    return None


PYTHON_313 = Path(sys.prefix) / "python3.13"
"""What nbdbm needs for the newer generation's Python (scripts/newer_python.sh)."""


def newer_python_missing() -> str | None:
    """Why nbdbm cannot be run by Python 3.13, or None if it can."""
    reason = newer_missing()
    if reason is None and not (PYTHON_313 / "click").exists():
        reason = f"what Python 3.13 needs is not at {PYTHON_313} (scripts/newer_python.sh puts it there)"
    return reason


def nbdbm_by_newer_python() -> tuple[list[str], dict[str, str]]:
    """How to run nbdbm by Python 3.13: words, and what they need in the environment."""
    environment = newer().python_environment() | {"PYTHONPATH": f"{PYTHON_313}{os.pathsep}{ROOT}"}
    return [*newer().python(), "-m", "nbdbm"], environment


@cache
def _loader(root: Path) -> tuple[Path, Path]:
    """The dynamic loader under ``root`` and the directory of its libraries."""
    # Not the one in lib64, which may be a link to the system's own.
    loaders = sorted([*root.glob("usr/lib/*/ld-linux-*.so.*"), *root.glob("usr/lib/ld-linux-*.so.*")])
    libraries = sorted(root.glob("usr/lib/*/libc.so.6"))
    assert loaders and libraries, f"{root}: no dynamic loader or no C library"
    return loaders[0], libraries[0].parent
