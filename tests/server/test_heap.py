"""Memory that is freed and taken again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from nbdbm.server.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        # Together more than the allocator keeps by default, each too small to be mapped by itself.
        kept = [bytearray(b"x") * 100_000 for _ in range(40)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
usual = faults()
keep_freed_memory()
faults()
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's allocator")
def test_pages_are_taken_once() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    usual, kept = map(int, done.stdout.split())
    assert usual > 10_000
    assert kept < 1000
