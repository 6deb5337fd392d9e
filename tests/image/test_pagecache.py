"""What the kernel says of a file's pages, against what has just been done with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbm.image import pagecache
from nbdbm.image.pagecache import PAGE, cached, page, supported

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
    assert page(fd, 7 * PAGE) == (True, False)
    assert page(fd, 0) == (False, False)


@needs_cachestat
def test_what_was_written_is_dirty_until_it_is_on_the_disk(tmp_path: Path) -> None:
    number = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(number, bytes(2 * PAGE), 0)
        if page(number, 0) == (True, False):
            pytest.skip("this file system has nothing to be written to (tmpfs)")
        assert page(number, PAGE) == (True, True)
        os.fsync(number)
        assert page(number, 0) == page(number, PAGE + 5) == (True, False)
        assert page(number, 2 * PAGE) == (False, False)
    finally:
        os.close(number)


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
        assert page(fd, 0) == (False, False)
    finally:
        pagecache._cachestat.cache_clear()
