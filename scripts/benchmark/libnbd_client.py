"""What fio and nbdcopy cannot do, by libnbd's Python binding; run by the system's Python, prints JSON.

libnbd_client.py status URI CONTEXT     the whole disk's block status: seconds, extents, requests
libnbd_client.py write URI OFFSET       one write of 4 KiB and a flush: seconds
libnbd_client.py idle URI COUNT         hold COUNT connections until standard input ends
libnbd_client.py stall URI COUNT        the same, each with large reads asked for, whose replies nobody takes
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import nbd  # type: ignore[import-not-found,unused-ignore]

STEP = 0xFFFF0000
"""Bytes asked about at once: the most that 32-bit requests can say, in whole clusters."""

LARGE = 1 << 20
"""Bytes of each read whose reply is not taken."""

REQUESTS = 16
"""Of them per connection: as many as qemu-nbd works on at once."""


def status(uri: str, context: str) -> dict[str, float]:
    handle = nbd.NBD()
    handle.add_meta_context(context)
    handle.connect_uri(uri)
    size = handle.get_size()
    position = extents = requests = 0
    flags: int | None = None

    def take(_context: str, offset: int, entries: list[int], _error: Any) -> int:
        nonlocal position, extents, flags
        position = offset + sum(entries[::2])
        # An extent cut in two by the end of a request counts once.
        extents += len(entries) // 2 - (entries[1] == flags)
        flags = entries[-1]
        return 0

    begin = time.perf_counter()
    while position < size:
        handle.block_status(min(STEP, size - position), position, take)
        requests += 1
    seconds = time.perf_counter() - begin
    handle.shutdown()
    return {"seconds": seconds, "extents": extents, "requests": requests}


def write(uri: str, offset: int) -> dict[str, float]:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    begin = time.perf_counter()
    handle.pwrite(bytearray(b"x" * 4096), offset)
    handle.flush()
    seconds = time.perf_counter() - begin
    handle.shutdown()
    return {"seconds": seconds}


def idle(uri: str, count: int) -> dict[str, float]:
    handles = [connected(uri) for _ in range(count)]
    print(json.dumps({"connections": len(handles)}), flush=True)
    sys.stdin.read()
    for handle in handles:
        handle.shutdown()
    return {}


def stall(uri: str, count: int) -> dict[str, float]:
    handles = [connected(uri) for _ in range(count)]
    buffer = nbd.Buffer(LARGE)
    for handle in handles:
        for number in range(REQUESTS):
            # Sent at once; libnbd takes replies only when it is polled.
            handle.aio_pread(buffer, number * LARGE)
    print(json.dumps({"connections": len(handles)}), flush=True)
    sys.stdin.read()
    # Gone without a word, as stalled clients go.
    return {}


def connected(uri: str) -> Any:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


if __name__ == "__main__":
    what, uri, argument = sys.argv[1:]
    if what == "status":
        answer = status(uri, argument)
    else:
        answer = {"write": write, "idle": idle, "stall": stall}[what](uri, int(argument))
    print(json.dumps(answer))
