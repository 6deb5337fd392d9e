"""The script that nbdkit loads: ``nbdkit python .../nbdbm_plugin.py image=disk.qcow2``.

The functions are nbdkit's callbacks, so their names and arguments are given (nbdkit-python-plugin(3)).
nbdkit's Python knows nothing of where this lies: the directory of the package, and with it what pip has
installed beside it, is put on its path first.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, TypeVar

import nbdkit  # type: ignore[import-not-found]  # nbdkit itself offers it to what it loads

if TYPE_CHECKING:
    from collections.abc import Coroutine

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

try:
    from nbdbm.cli import explain
    from nbdbm.cli.logs import TextLines
    from nbdbm.errors import NbdbmError, UsageError
    from nbdbm.exports import Export
    from nbdbm.nbd.constants import TransmissionFlag
    from nbdbm.nbdkit.disk import Disk, configured
except (ImportError, SyntaxError) as failure:  # a syntax that an older Python does not know
    sys.exit(
        f"nbdbm: {failure}; this nbdkit has Python {sys.version_info[0]}.{sys.version_info[1]}:"
        " install nbdbm for the same version (3.11 or newer), or name the directory of its dependencies in"
        " PYTHONPATH"
    )

T = TypeVar("T")
Handle = Export

API_VERSION = 2

log = logging.getLogger("nbdbm")
_handler = logging.StreamHandler()
_handler.setFormatter(TextLines())
log.addHandler(_handler)

PASSED = (
    errno.EPERM,
    errno.EROFS,
    errno.ENOMEM,
    errno.EINVAL,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTSUP,
    errno.ESHUTDOWN,
)
"""What nbdkit tells a client under its own name; anything else would become EINVAL, and is EIO."""

_given: dict[str, str] = {}
_disk: Disk | None = None

_format_exception = traceback.format_exception


def _one_line(*args: Any, **options: Any) -> list[str]:
    """``traceback.format_exception`` as nbdkit calls it: errors that a user can act on become one line."""
    error = args[1] if len(args) > 1 else args[0] if args else None
    if isinstance(error, NbdbmError | OSError):
        return [explain(error)]
    return _format_exception(*args, **options)


traceback.format_exception = _one_line


def _opened() -> Disk:
    assert _disk is not None
    return _disk


def _call(work: Coroutine[Any, Any, T]) -> T:
    """Carry out ``work``; the client hears why it failed."""
    try:
        return _opened().call(work)
    except (NbdbmError, OSError) as error:
        nbdkit.set_error(error.errno if error.errno in PASSED else errno.EIO)
        raise


# -- the life of the server --------------------------------------------------------------------


def thread_model() -> int:
    """Requests of all connections at the same time: they wait for the loop, which handles many."""
    model: int = nbdkit.THREAD_MODEL_PARALLEL
    return model


def config(key: str, value: str) -> None:
    """One ``key=value`` of the command line."""
    key = key.replace("_", "-")
    if key in _given:
        raise UsageError(f"{key}: is given twice")
    _given[key] = value


def config_complete() -> None:
    """All parameters are there."""
    global _disk
    _disk = Disk(configured(_given))


def get_ready() -> None:
    """The last moment at which somebody sees what is said: find out whether the image can be opened."""
    for line in _opened().probe():
        log.warning("%s", line)


def cleanup() -> None:
    """The server ends; connections that it did not wait for have left the image open."""
    if _disk is not None:
        _disk.shut()


# -- connections -------------------------------------------------------------------------------


def open(readonly: bool) -> Handle:
    """One more connection."""
    return _opened().acquire(read_only=readonly)


def close(h: Handle) -> None:
    """One less; the last one leaves the image closed and its bitmaps stored."""
    _opened().release()


def get_size(h: Handle) -> int:
    return h.info.size


def block_size(h: Handle) -> tuple[int, int, int]:
    """Minimum, preferred, maximum."""
    return 1, h.info.preferred_block, 0xFFFFFFFF


def can_write(h: Handle) -> bool:
    return not h.info.flags & TransmissionFlag.READ_ONLY


def can_flush(h: Handle) -> bool:
    return True


def can_trim(h: Handle) -> bool:
    return can_write(h)


def can_zero(h: Handle) -> bool:
    return can_write(h)


def can_fast_zero(h: Handle) -> bool:
    return can_write(h)


def can_fua(h: Handle) -> int:
    native: int = nbdkit.FUA_NATIVE
    return native


def can_multi_conn(h: Handle) -> bool:
    """All connections share the image, and a flush makes durable what was written by any of them."""
    return True


def can_cache(h: Handle) -> int:
    native: int = nbdkit.CACHE_NATIVE
    return native


def can_extents(h: Handle) -> bool:
    return True


def is_rotational(h: Handle) -> bool:
    return False


# -- requests ----------------------------------------------------------------------------------


def pread(h: Handle, buf: Any, offset: int, flags: int) -> None:
    _call(h.read(memoryview(buf), offset, sparse=False))


def pwrite(h: Handle, buf: Any, offset: int, flags: int) -> None:
    _call(h.write(offset, memoryview(buf), fua=bool(flags & nbdkit.FLAG_FUA)))


def flush(h: Handle, flags: int) -> None:
    _call(h.flush())


def trim(h: Handle, count: int, offset: int, flags: int) -> None:
    _call(h.trim(offset, count, fua=bool(flags & nbdkit.FLAG_FUA)))


def zero(h: Handle, count: int, offset: int, flags: int) -> None:
    _call(
        h.write_zeroes(
            offset,
            count,
            no_hole=not flags & nbdkit.FLAG_MAY_TRIM,
            fast=bool(flags & nbdkit.FLAG_FAST_ZERO),
            fua=bool(flags & nbdkit.FLAG_FUA),
        )
    )


def cache(h: Handle, count: int, offset: int, flags: int) -> None:
    _call(h.cache(offset, count))


def extents(h: Handle, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """(offset, length, type), from ``offset`` on; a prefix of the range will do."""
    try:
        return _opened().extents(h, offset, count, one=bool(flags & nbdkit.FLAG_REQ_ONE))
    except (NbdbmError, OSError):
        nbdkit.set_error(errno.EIO)
        raise
