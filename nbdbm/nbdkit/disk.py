"""One image for callers in many threads that wait: the engine, in an event loop of its own.

    nbdkit's threads   call ... wait | call ... wait
    our thread                 loop: the engine's coroutines, many at a time

The image is open while anybody uses it. After the last one it is closed, its bitmaps stored.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from nbdbm.cli import explain, printable
from nbdbm.cli.opening import open_image
from nbdbm.config import BadValue, ExportConfig
from nbdbm.errors import NbdbmError, UsageError
from nbdbm.exports import Export
from nbdbm.nbd.constants import CONTEXT_ALLOCATION

T = TypeVar("T")

PATHS = ("image", "backing-root")
FLAGS = ("no-backing",)
PARAMETERS = ("image", "format", "snapshot", *FLAGS, "backing-root", "discard", "detect-zeroes")
"""What nbdkit's command line may say, as ``key=value``; each means what it does for ``nbdbm serve``."""

BOOLEANS = {
    **dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True),
    **dict.fromkeys(("0", "false", "f", "no", "n", "off"), False),
}
"""As nbdkit itself reads them."""


def configured(given: Mapping[str, str]) -> ExportConfig:
    """The parameters as a checked value; paths are made absolute, as nbdkit leaves its directory to serve.

    Raises UsageError for an unknown parameter, a value that it cannot have, and where ``image`` is missing.
    """
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in PARAMETERS:
            raise UsageError(f"{key}: unknown parameter; there are {', '.join(PARAMETERS)}")
        if not value:
            raise UsageError(f"{key}: the value is empty")
        if key in FLAGS and value.lower() not in BOOLEANS:
            raise UsageError(f"{key}={value}: must be true or false")
        field = key.replace("-", "_")
        if key in FLAGS:
            values[field] = BOOLEANS[value.lower()]
        else:
            values[field] = os.path.abspath(value) if key in PATHS else value
    if "image" not in values:
        raise UsageError("image=FILE is missing")
    try:
        return ExportConfig(**values, bitmaps=(), allocation_depth=False)
    except BadValue as error:
        raise UsageError(f"{error.option}{error.reason}".replace(" --", " ")) from error


class Disk:
    """The image, shared by all connections. Its methods may be called by any thread, and wait."""

    def __init__(self, config: ExportConfig) -> None:
        self._config = config
        # Locks in the order in which they are taken.
        self._users_lock = threading.Lock()
        self._calls_lock = threading.Lock()
        self._users = 0
        self._export: Export | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: set[concurrent.futures.Future[Any]] = set()
        self._ended = False

    def probe(self) -> list[str]:
        """Open and close the image for reading in a child process; return what the user should hear.

        For a program that forks before it serves: what is wrong is then said while somebody listens. In a
        child, because neither threads nor loops outlive that fork.

        Raises:
            NbdbmError: the image cannot be opened; the text says why.
        """
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                told = asyncio.run(self._look())
                status = 0
            except (NbdbmError, OSError) as error:
                told = [explain(error)]
            except BaseException as error:
                told = [f"{self._config.image}: {error!r}"]
            try:
                with os.fdopen(write_end, "w") as pipe:
                    pipe.write("\n".join(map(printable, told)))
            finally:
                os._exit(status)
        os.close(write_end)
        with os.fdopen(read_end) as pipe:
            lines = pipe.read().splitlines()
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
            raise NbdbmError("; ".join(lines) or f"{self._config.image}: could not be looked at")
        return lines

    async def _look(self) -> list[str]:
        image = await open_image(replace(self._config, read_only=True))
        try:
            path = self._config.image
            # Those about another file of the chain begin with its name.
            told = [text if text.startswith(f"{path}: ") else f"{path}: {text}" for text in image.notices]
            for bitmap in image.tracker.refused():
                told.append(f"{path}: bitmap {bitmap.name!r} cannot be used: {bitmap.refusal}")
            return told
        finally:
            await image.close()

    def acquire(self, *, read_only: bool) -> Export:
        """The image for one more user; opened for the first of them, who says whether for reading only.

        Raises:
            NbdbmError, OSError: it cannot be opened.
        """
        with self._users_lock:
            if self._export is None:
                read_only = read_only or self._config.snapshot is not None
                self._export = self.call(_open(replace(self._config, read_only=read_only)))
            self._users += 1
            return self._export

    def release(self) -> None:
        """One user less. After the last one the image is closed, its bitmaps stored.

        Raises:
            ImageError, OSError: something could not be stored; the bitmaps stay marked as in use.
        """
        with self._users_lock:
            self._users -= 1
            if self._users == 0 and self._export is not None:
                export, self._export = self._export, None
                self.call(export.close())

    def shut(self) -> None:
        """Close the image whoever uses it, after the calls that are under way; idempotent.

        Later calls are refused. Raises what ``release`` does.
        """
        with self._calls_lock:
            self._ended = True
            pending = list(self._pending)
        concurrent.futures.wait(pending)
        with self._users_lock:
            export, self._export = self._export, None
            loop, self._loop = self._loop, None
        if loop is None:
            return
        try:
            if export is not None:
                asyncio.run_coroutine_threadsafe(export.close(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Carry out ``work`` in the loop, wait, and return what it returns or raise what it raises."""
        with self._calls_lock:
            if self._ended:
                work.close()
                raise NbdbmError(f"{self._config.image}: the server ends")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run, args=(self._loop,), name="nbdbm-loop", daemon=True).start()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._pending.add(future)
        try:
            return future.result()
        finally:
            with self._calls_lock:
                self._pending.discard(future)

    def extents(self, export: Export, offset: int, length: int, *, one: bool) -> list[tuple[int, int, int]]:
        """What is where, from ``offset`` on: (offset, length, hole 1 | zero 2), at least one."""
        contexts = [(0, CONTEXT_ALLOCATION)]
        [(_, found)] = self.call(export.block_status(contexts, offset, length, req_one=one))
        answer = []
        for extent in found:
            answer.append((offset, extent.length, extent.flags))
            offset += extent.length
        return answer


async def _open(config: ExportConfig) -> Export:
    """No bitmap is exported, as nbdkit has no contexts of its plugins; all of them record."""
    return Export.of(await open_image(config), bitmaps=(), allocation_depth=False)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """The thread of the loop."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()
