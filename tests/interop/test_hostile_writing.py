"""Writers that vanish: a write is carried out whole or not at all, and no bitmap misses it."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from pathlib import Path

import pytest

from nbdbm.nbd.constants import Cmd, Opt
from tests.interop.hostile import Peer, extended, request
from tests.interop.writing import check, content_by_qemu, dirty_by_qemu, granules
from tests.support import images, servers
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "libnbd")]

SLOT = 1 << 20
ROUNDS = 24
GRANULARITIES = {"fine": 512, "coarse": 65536}


@pytest.mark.parametrize("style", ["simple", "extended"])
def test_resets_in_and_after_a_write(tmp_path: Path, style: str) -> None:
    """Each client has one write acknowledged, then sends another, all of it or a part, and resets."""
    maker = images.Maker("disk", tmp_path)
    path = maker.create(ROUNDS * SLOT)
    maker.io(path, f"write -q -P 1 0 {ROUNDS * SLOT // 2}")  # half of the writes overwrite, half allocate
    for name, granularity in GRANULARITIES.items():
        maker.bitmap(path, name, granularity)
    case = maker.case(path, bitmaps=list(GRANULARITIES))
    content = content_by_qemu(case)
    rng = random.Random(style)
    head = request if style == "simple" else extended
    flags = 0 if style == "simple" else 1 << 5
    done: list[tuple[int, bytes]] = []
    unknown: list[tuple[int, bytes]] = []

    def write(offset: int, data: bytes) -> bytes:
        return head(Cmd.WRITE, offset, len(data), cookie=offset, flags=flags) + data

    with servers.nbdbm_on_tcp(path, tmp_path) as (process, port):
        for number in range(ROUNDS):
            one = Peer(socket.create_connection(("127.0.0.1", port), 20))
            one.go(*[(Opt.EXTENDED_HEADERS, b"")] * (style == "extended"))
            start = number * SLOT
            first = b"\xa1" * rng.randrange(1, SLOT // 4)
            one.send(write(start, first))
            if style == "simple":
                assert struct.unpack(">IIQ", one.receive(16))[1:] == (0, start)
            else:
                assert one.extended_chunk()[1:3] == (0, start)
            done.append((start, first))
            second = b"\xb2" * rng.randrange(1, SLOT // 2)
            message = write(start + SLOT // 2, second)
            whole = number % 2 == 0
            with contextlib.suppress(ConnectionError):
                one.send(message if whole else message[: rng.randrange(28, len(message))])
            one.reset()
            if whole:
                unknown.append((start + SLOT // 2, second))
        assert process.poll() is None

    status, said = check(path)
    assert status == 0, said
    found = content_by_qemu(case)
    expected = bytearray(content)
    for offset, data in done:
        expected[offset : offset + len(data)] = data
    for offset, data in unknown:
        end = offset + len(data)
        assert found[offset:end] in (data, content[offset:end]), f"part of the write at {offset:#x}"
        expected[offset:end] = found[offset:end]
    assert found == expected
    bits = dirty_by_qemu(case)
    for name, granularity in GRANULARITIES.items():
        must = {granule for offset, data in done for granule in granules(offset, len(data), granularity)}
        may = {granule for offset, data in unknown for granule in granules(offset, len(data), granularity)}
        must |= {
            granule
            for offset, data in unknown
            if found[offset : offset + len(data)] != content[offset : offset + len(data)]
            for granule in granules(offset, len(data), granularity)
        }
        assert must <= bits[name] <= must | may, name
