"""The control socket: what is asked, what is answered, and what is not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from nbdbm.client import NbdClient
from nbdbm.control import MAX_LISTED, answer, control
from nbdbm.exports import Export
from nbdbm.metrics import BitmapFigures
from nbdbm.server.listener import UnixListener
from nbdbm.server.responder import MAX_REQUEST, Responder
from nbdbm.server.server import Server
from tests.server.memimage import MemoryImage
from tests.server.running import running

ASK = b'{"execute": "nbdbm-status"}\n'
TIMEOUT = 30


def said(server: Server, line: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads("".join(answer(server, line)))
    return found


class Figured(MemoryImage):
    bitmaps = (BitmapFigures("day", "inconsistent", False, 65536, None),) * 101


def test_status(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(Figured(bytes(1 << 20)), tmp_path, name="disk", description="d") as (server, path):
            client = await NbdClient.connect(f"nbd+unix:///disk?socket={path}")
            for _ in range(5):
                await client.read(0, 4096)
            for connected in (1, 0):
                found: dict[str, Any] = said(server, ASK)["return"]
                (export,) = found["exports"]
                assert (export["name"], export["description"], export["mode"]) == ("disk", "d", "read-only")
                assert (export["size"], export["clients"]) == (1 << 20, connected)
                assert (export["operations"], export["bytes_read"], export["errors"]) == (5, 20480, 0)
                assert len(export["bitmaps"]) == 100 and export["bitmaps_more"] == 1
                assert (
                    export["bitmaps"][0]["state"] == "inconsistent" and export["bitmaps"][0]["dirty"] is None
                )
                assert found["state"] == "serving" and found["connections"] == connected
                if connected:
                    (seen,) = found["clients"]
                    assert seen["export"] == "disk" and seen["operations"] == 5 and seen["in_flight"] == 0
                    assert seen["client"].startswith("unix pid ")
                    await client.close()
                    for _ in range(500):
                        if not server.connections:
                            break
                        await asyncio.sleep(0.01)

    asyncio.run(main())


def test_many_exports_in_many_small_steps(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(Figured(bytes(4096)), tmp_path) as (server, _):
            for number in range(MAX_LISTED + 5):
                server.registry.add(Export.of(Figured(bytes(4096)), name=str(number)))  # type: ignore[arg-type]
            pieces = list(answer(server, ASK))
            found = json.loads("".join(pieces))["return"]
            assert len(found["exports"]) == MAX_LISTED and found["exports_more"] == 6
            assert max(map(len, pieces)) < 20_000, "an export with its bitmaps"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("line", "desc"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 8000, "not JSON"),
        (b"[]", "not an object with"),
        (b'{"execute": 1}', "not an object with"),
        (b'{"execute": "quit"}', "no such command"),
        (b'{"execute": "nbdbm-status", "arguments": {"a": 1}}', "takes no arguments"),
        (b'{"execute": "nbdbm-status", "x": 1}', "takes no arguments"),
    ],
)
def test_refusals(line: bytes, desc: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with running(MemoryImage(bytes(4096)), tmp_path) as (server, _):
            error = said(server, line)["error"]
            assert desc in error["desc"] and error.keys() == {"class", "desc"}
            assert error["class"] == ("CommandNotFound" if "command" in desc else "GenericError")

    asyncio.run(main())


def test_a_conversation(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(MemoryImage(bytes(4096)), tmp_path) as (server, _):
            made = Responder(UnixListener(str(tmp_path / "c")), control(server))
            made.start()
            try:
                for sent, expected in (
                    (ASK + b"\n" + b"x\n" + ASK, ["return", "error", "return"]),
                    (ASK.strip(), ["return"]),
                    (ASK + b"x" * (2 * MAX_REQUEST) + b"\n" + ASK, ["return", "error"]),
                    (b"", []),
                ):
                    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "c"))
                    writer.write(sent)
                    writer.write_eof()
                    lines = (await asyncio.wait_for(reader.read(), TIMEOUT)).splitlines()
                    writer.close()
                    assert [next(iter(json.loads(line))) for line in lines] == expected
            finally:
                await made.close()

    asyncio.run(main())
