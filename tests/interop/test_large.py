"""Large disks: memory and time depend on what is asked for, not on how large the disk is."""

from __future__ import annotations

import time

from tests.interop.serving import serving
from tests.support import images, libnbd, qemu, servers
from tests.support.images import GIB, KIB, MIB, TIB
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "qemu-nbd", "libnbd", "newer")]

BASE = 96 * MIB
"""Resident bytes of a server on a small disk, with room for an interpreter that takes more."""


def test_sparse_64_tib(gallery: images.Gallery) -> None:
    """Content, the whole map and a bitmap of it, as qemu-nbd tells them."""
    case = gallery.get("huge")
    spots = [[offset, 20000] for offset in (0, 7 * TIB, 32 * TIB - 7000, 64 * TIB - 20000)]
    with serving(case) as server:
        ours = libnbd.probe(server.uri, qemu.newer(), contexts=case.contexts(), digest=False, ranges=spots)
        assert server.peak_rss() < BASE
    with servers.qemu_nbd(case.path, bitmaps=case.bitmaps, tools=qemu.newer()) as oracle:
        theirs = libnbd.probe(oracle.uri, qemu.newer(), contexts=case.contexts(), digest=False, ranges=spots)
    assert ours == theirs
    assert len(ours["maps"]["base:allocation"]) > 4


def test_sparse_64_tib_by_32_bit_requests(gallery: images.Gallery) -> None:
    """A client without extended headers needs thousands of requests for it: each must be cheap."""
    case = gallery.get("huge")
    with serving(case) as server:
        started = time.monotonic()
        ours = libnbd.probe(server.uri, contexts=case.contexts(), digest=False, extended=False)
        assert time.monotonic() - started < 40
    assert sum(length for length, _ in ours["maps"]["base:allocation"]) == case.size


def test_tables_are_never_all_in_memory(gallery: images.Gallery) -> None:
    """Reads all over a 16 TiB disk with 32768 L2 tables."""
    case = gallery.get("huge-full")
    with serving(case) as server:
        h = libnbd.module().NBD()
        h.add_meta_context("base:allocation")
        h.connect_uri(server.uri)
        start = h.pread(4 * KIB, 0)
        assert start.strip(b"\0")
        step = 512 * MIB
        for offset in range(0, case.size, 8 * step):
            # Each L2 table maps 512 MiB, and all say the same.
            assert h.pread(4 * KIB, offset) == start
        seen = []
        for offset in range(0, 256 * GIB, step):
            h.block_status(step, offset, lambda name, at, entries, error: seen.append(tuple(entries[:4])))
        assert len(set(seen)) == 1
        h.shutdown()
        assert server.peak_rss() < BASE
