import errno
import inspect

import pytest

from nbdbm import errors
from nbdbm.errors import (
    BitmapError,
    CorruptError,
    FormatError,
    ImageError,
    LockedError,
    NbdbmError,
    NbdError,
    UnsupportedError,
    UnsupportedFormat,
    UsageError,
)


def test_tree_in_docstring_names_every_class() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, NbdbmError)]
    assert len(classes) == 11
    for cls in classes:
        assert cls.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize(
    ("error", "text", "number"),
    [
        (UsageError("no"), "no", errno.EINVAL),
        (ImageError("a.qcow2", "is odd"), "a.qcow2: is odd", errno.EIO),
        (ImageError("a.qcow2", "is gone", errno=errno.ENOENT), "a.qcow2: is gone", errno.ENOENT),
        (UnsupportedError("a", "b"), "a: b", errno.ENOTSUP),
        (CorruptError("a", "b"), "a: b", errno.EIO),
        (LockedError("a", "b"), "a: b", errno.EAGAIN),
        (FormatError("size", 4096, "too small"), "size is 0x1000: too small", errno.EIO),
        (FormatError("name", "x\n", "bad"), "name is 'x\\n': bad", errno.EIO),
        (FormatError("table", None, "broken"), "table: broken", errno.EIO),
        (UnsupportedFormat("version", 1, "no"), "version is 0x1: no", errno.ENOTSUP),
        (BitmapError("b0", "gone"), "bitmap 'b0': gone", errno.EINVAL),
        (NbdError("bad magic"), "bad magic", errno.EPROTO),
        (NbdError("server said no", errno.EPERM), "server said no", errno.EPERM),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_text_and_errno(error: NbdbmError, text: str, number: int) -> None:
    assert str(error) == text
    assert error.errno == number


def test_fields() -> None:
    error = FormatError("l1_size", 7, "too small")
    assert (error.field, error.value, error.rule) == ("l1_size", 7, "too small")
    image = CorruptError("disk", "why")
    assert (image.path, image.reason) == ("disk", "why")
    bitmap = BitmapError("b", "why")
    assert (bitmap.name, bitmap.reason) == ("b", "why")
