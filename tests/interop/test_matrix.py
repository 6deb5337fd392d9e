"""Every kind of image: content, allocation and bitmaps, as QEMU reads them from the same file.

Content is compared with ``qemu-img convert`` of the file, by digest; maps with what qemu-nbd answers for
it, extent by extent. Read through libnbd, nbdcopy and qemu-img, of Debian 12 and of Debian 13.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.interop.serving import UNDER_TEST, clip, digest, fingerprint, serving
from tests.support import images, libnbd, qemu, servers
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "qemu-nbd", "nbdcopy", "libnbd", "newer")]


class Served(NamedTuple):
    case: images.Case
    server: servers.Server
    expected: str
    """SHA-256 of the disk."""


@pytest.fixture(scope="module", params=[name for name in images.RECIPES if name not in images.LARGE])
def served(request: pytest.FixtureRequest, gallery: images.Gallery) -> Iterator[Served]:
    """One image, served once for all the tests on it; its files must be the same afterwards."""
    case = gallery.get(request.param)
    if UNDER_TEST == "qemu-nbd" and case.size % 512:
        pytest.skip("QEMU serves whole sectors")
    expected = gallery.expected(case)
    before = fingerprint(case.files)
    with serving(case) as server:
        yield Served(case, server, expected)
    assert fingerprint(case.files) == before, "serving changed a file"


def test_content_structured(served: Served) -> None:
    answer = libnbd.probe(served.server.uri, extended=False)
    assert (answer["structured"], answer["read_only"]) == (True, True)
    assert (answer["size"], answer["digest"]) == (served.case.size, served.expected)


def test_content_simple(served: Served) -> None:
    answer = libnbd.probe(served.server.uri, structured=False)
    assert answer["structured"] is False
    assert (answer["size"], answer["digest"]) == (served.case.size, served.expected)


def test_content_by_nbdcopy(served: Served, tmp_path: Path) -> None:
    qemu.SYSTEM.run("nbdcopy", served.server.uri, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size == served.case.size
    assert digest(tmp_path / "copy") == served.expected


def test_content_by_convert(served: Served, tmp_path: Path) -> None:
    qemu.SYSTEM.img("convert", "-f", "raw", "-O", "raw", served.server.uri, tmp_path / "copy")
    # QEMU reads whole sectors, and fills the last with zeroes.
    assert digest(tmp_path / "copy", served.case.size) == served.expected


def test_maps(served: Served) -> None:
    """Structured replies, beside Debian 12's qemu-nbd."""
    case = served.case
    ours = libnbd.probe(served.server.uri, contexts=case.contexts(), digest=False, extended=False)
    assert ours["contexts"] == case.contexts()
    assert ours["maps"] == maps_by_qemu(case, qemu.SYSTEM)


def test_newer_maps_and_content(served: Served) -> None:
    """Extended headers, beside QEMU 10's qemu-nbd."""
    case = served.case
    ours = libnbd.probe(served.server.uri, qemu.newer(), contexts=case.contexts())
    assert ours["digest"] == served.expected
    assert (ours["size"], ours["contexts"]) == (case.size, case.contexts())
    assert ours["maps"] == maps_by_qemu(case, qemu.newer())


def maps_by_qemu(case: images.Case, tools: qemu.Tools) -> dict[str, list[list[int]]]:
    """What qemu-nbd answers for the same file, for every context we are to offer."""
    path = case.reference or case.path
    with servers.qemu_nbd(
        path, *case.qemu_options, bitmaps=case.bitmaps, image_format=case.format, tools=tools
    ) as server:
        answer = libnbd.probe(server.uri, tools, contexts=case.contexts(), digest=False)
    assert answer["contexts"] == case.contexts()
    return {context: clip(extents, case.size) for context, extents in answer["maps"].items()}
