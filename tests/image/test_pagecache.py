"""What the kernel says of a file's pages, against what has just been done with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbm.image import pagecache
from nbdbm.image.pagecache import PAGE, cached, supported

PAGES = 64


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(PAGES * PAGE))
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    yield number
    os.close(number)


needs_cachestat = pytest.mark.skipif(not supported(), reason="this kernel has no cachestat(2) (Linux 6.5)")


@needs_cachestat
def test_what_was_written_is_cached(fd: int) -> None:
    assert cached(fd, 0, PAGES * PAGE)
    assert cached(fd, 5, 1)
    assert cached(fd, PAGE - 1, 2)


@needs_cachestat
def test_what_was_dropped_is_not(fd: int) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(fd, 0, PAGE):
        pytest.skip("this file system keeps pages that it is told to drop (tmpfs)")
    assert not cached(fd, 0, PAGES * PAGE)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, 1, 7 * PAGE)
    assert cached(fd, 7 * PAGE, PAGE)
    assert not cached(fd, 7 * PAGE, PAGES * PAGE - 7 * PAGE)


@needs_cachestat
def test_nothing_lies_past_the_end(fd: int) -> None:
    assert not cached(fd, PAGES * PAGE, 1)
    assert not cached(fd, (PAGES - 1) * PAGE, PAGE + 1)


def test_a_kernel_that_cannot_say(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagecache, "CACHESTAT", 100_000)
    pagecache._cachestat.cache_clear()
    try:
        assert not supported()
        assert not cached(fd, 0, PAGE)
    finally:
        pagecache._cachestat.cache_clear()
