"""``nbdbm serve --fork``: the command returns when clients can connect, and the server goes on without it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

STARTED = b"+"


def fork_off() -> Callable[[], None]:
    """Return in a child process; its parent ends when the child calls what is returned, or ends.

    The child's exit status is the parent's if it comes to that. Nothing may run in threads yet.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        _await(child, reading)
    os.close(reading)

    def started() -> None:
        _detach()
        os.write(writing, STARTED)
        os.close(writing)

    return started


def _await(child: int, reading: int) -> None:
    """The parent's rest: it ends without taking anything down that is the child's now."""
    status = 1
    try:
        if os.read(reading, 1) == STARTED:
            status = 0
        else:
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            status = ended if ended >= 0 else 128 - ended
    finally:
        os._exit(status)


def _detach() -> None:
    """Leave the terminal, and whoever waits for the end of our output. A log that is a file goes on."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        if number < 2 or not stat.S_ISREG(os.fstat(number).st_mode):
            os.dup2(null, number)
    os.close(null)
