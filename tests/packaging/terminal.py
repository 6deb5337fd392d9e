"""A shell on a terminal of its own, typed into like by a person."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType

from tests.support import qemu

PATIENCE = 50
"""Seconds for one expectation: completion starts Python, on a busy machine."""

PROMPT = "ready> "


class Shell:
    """An interactive shell in ``directory``, with ``path`` in front of $PATH; nobody's settings are read."""

    def __init__(self, argv: list[str], directory: Path, path: Path) -> None:
        self._master, slave = pty.openpty()
        environment = qemu.environment() | {
            "TERM": "dumb",
            "HOME": str(directory),
            "PS1": PROMPT,
            "PATH": f"{path}:{qemu.SEARCH_PATH}",
            "COLUMNS": "200",
        }
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=directory,
            env=environment,
        )
        os.close(slave)
        self._seen = ""

    def __enter__(self) -> Shell:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    def expect(self, pattern: str) -> str:
        """Wait until the terminal shows ``pattern``, after what was expected before; return what it shows."""
        deadline = time.monotonic() + PATIENCE
        while (found := re.search(pattern, self._seen)) is None:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._master], [], [], max(0, left))
            assert ready, f"{pattern!r} was not shown, but {self._seen!r}"
            try:
                shown = os.read(self._master, 65536)
            except OSError:  # the shell has ended
                shown = b""
            assert shown, f"the shell ended after {self._seen!r}"
            self._seen += shown.decode(errors="replace").replace("\r", "")
        self._seen = self._seen[found.end() :]
        return found[0]
