"""What fio and nbdcopy cannot do, by libnbd's Python binding; run by the system's Python, prints JSON.

libnbd_client.py status URI CONTEXT     the whole disk's block status: seconds, extents, requests
libnbd_client.py write URI OFFSET       one write of 4 KiB and a flush
libnbd_client.py idle URI COUNT         hold COUNT connections until standard input ends
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import nbd  # type: ignore[import-not-found,unused-ignore]

STEP = 0xFFFF0000
"""Bytes asked about at once: the most that 32-bit requests can say, in whole clusters."""


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
    handle.pwrite(bytearray(b"x" * 4096), offset)
    handle.flush()
    handle.shutdown()
    return {}


def idle(uri: str, count: int) -> dict[str, float]:
    handles = []
    for _ in range(count):
        handle = nbd.NBD()
        handle.connect_uri(uri)
        handles.append(handle)
    print(json.dumps({"connections": len(handles)}), flush=True)
    sys.stdin.read()
    for handle in handles:
        handle.shutdown()
    return {}


if __name__ == "__main__":
    what, uri, argument = sys.argv[1:]
    if what == "status":
        answer = status(uri, argument)
    else:
        answer = {"write": write, "idle": idle}[what](uri, int(argument))
    print(json.dumps(answer))
