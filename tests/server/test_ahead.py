"""Block status answered ahead: always what the export would say, and only where nothing can change."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.exports import Export
from nbdbm.metrics import Tally
from nbdbm.nbd.constants import CmdFlag
from nbdbm.nbd.events import BlockStatus
from nbdbm.nbd.transmission import ExtendedReplies, Output, StructuredReplies
from nbdbm.server import ahead as module
from nbdbm.server.ahead import StatusAhead
from nbdbm.server.buffers import BufferPool
from nbdbm.server.fastpath import FastPath
from nbdbm.server.misses import Calm, Misses
from tests.server.memimage import MemoryImage, WritableImage
from tests.server.rawclient import BLOCK_STATUS, READ, RawClient
from tests.server.twoways import SIZE as DISK
from tests.server.twoways import Request, connect, make, serving
from tests.support.marks import requires

SIZE = 1 << 20
B0, B1, ALLOCATION = (1, "qemu:dirty-bitmap:b0"), (2, "qemu:dirty-bitmap:b1"), (0, "base:allocation")
DIRTY = [(at, 4096) for at in range(0, SIZE, 16384)]


class Protocol:
    """What is needed of the protocol: the cap on extents, and how replies look."""

    def __init__(self, replies: StructuredReplies) -> None:
        self.replies = replies

    def extent_limit(self, event: BlockStatus) -> int:
        return 1 if event.flags & CmdFlag.REQ_ONE else 1000


def made(
    image: type[MemoryImage] = MemoryImage, replies: type[StructuredReplies] = StructuredReplies
) -> tuple[Export, StatusAhead | None]:
    export = Export.of(image(b"x" * SIZE, bitmaps={"b0": DIRTY, "b1": [(0, SIZE)]}))  # type: ignore[arg-type]
    return export, StatusAhead.of(export, Protocol(replies()))  # type: ignore[arg-type]


def request(
    offset: int, length: int, *contexts: tuple[int, str], flags: int = 0, cookie: int = 7
) -> BlockStatus:
    return BlockStatus(cookie, offset, length, CmdFlag(flags), contexts or (B0,))


async def plain(export: Export, event: BlockStatus) -> list[Any]:
    return await export.block_status(
        event.contexts, event.offset, event.length, limit=Protocol(StructuredReplies()).extent_limit(event)
    )


def wire(
    event: BlockStatus, answers: list[Any], replies: type[StructuredReplies] = StructuredReplies
) -> bytes:
    """The reply as it is made when nothing was made ahead."""
    out: Output = []
    replies().status(out, event.cookie, event.offset, answers)
    return b"".join(out)


def test_not_where_somebody_may_write() -> None:
    assert made(WritableImage)[1] is None


@pytest.mark.parametrize("replies", [StructuredReplies, ExtendedReplies])
@pytest.mark.parametrize("contexts", [(B0,), (B0, B1)])
def test_the_second_in_order_is_made_before_it_is_asked_for(
    replies: type[StructuredReplies], contexts: tuple[tuple[int, str], ...]
) -> None:
    async def main() -> None:
        export, ahead = made(replies=replies)
        assert ahead is not None
        first = request(0, 65536, *contexts)
        assert ahead.reply(first) is None and not ahead.wanted
        ahead.note(first, await plain(export, first))
        for number in range(1, 16):
            assert ahead.wanted
            ahead.work()
            assert not ahead.wanted
            event = request(number * 65536, 65536, *contexts, cookie=number << 60 | number)
            assert ahead.reply(event) == wire(event, await plain(export, event), replies)
            assert ahead.reply(event) is None, "once"
            if not ahead.wanted:  # asked for twice: the chain begins anew
                ahead._expected = event.offset
                ahead.note(event, await plain(export, event))
        assert not ahead.wanted, "the disk has ended"

    asyncio.run(main())


@pytest.mark.parametrize(
    "event",
    [request(0, 65536, ALLOCATION), request(16384, 65536), request(0, SIZE), request(0, 65536, *[B0] * 5)],
    ids=["allocation", "not in order", "to the end", "many contexts"],
)
def test_what_is_not_made_ahead(event: BlockStatus) -> None:
    async def main() -> None:
        export, ahead = made()
        assert ahead is not None
        ahead.note(event, await plain(export, event))
        assert not ahead.wanted

    asyncio.run(main())


def test_large_answers_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        export, ahead = made()
        assert ahead is not None
        first = request(0, 32768)
        monkeypatch.setattr(module, "MAX_EXTENTS", 6)
        ahead.note(first, await plain(export, first))
        assert ahead.wanted
        monkeypatch.setattr(module, "MAX_EXTENTS", 3)
        ahead.work()
        assert ahead.reply(request(32768, 32768)) is None

    asyncio.run(main())


def test_what_would_have_to_wait_or_fails_is_left_to_the_request() -> None:
    async def main() -> None:
        export, ahead = made()
        assert ahead is not None
        first = request(0, 65536)
        answers = await plain(export, first)

        async def waits(*_: Any, **__: Any) -> Any:
            await asyncio.sleep(0)

        async def fails(*_: Any, **__: Any) -> Any:
            raise OSError(5, "broken")

        for replaced in (waits, fails):
            export.block_status = replaced  # type: ignore[method-assign]
            ahead._expected = 0
            ahead.note(first, answers)
            ahead.work()
            assert not ahead.wanted and ahead.reply(request(65536, 65536)) is None

    asyncio.run(main())


BLOCKS = st.integers(0, SIZE // 512 - 1)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("next"), st.integers(1, 300)),
            st.tuples(st.just("jump"), BLOCKS),
            st.tuples(st.just("one"), st.integers(1, 300)),
            st.tuples(st.just("other"), st.integers(1, 300)),
        ),
        max_size=12,
    ),
    st.booleans(),
)
def test_any_stream_gets_the_same_answers(steps: list[tuple[str, int]], works: bool) -> None:
    async def main() -> None:
        export, ahead = made()
        assert ahead is not None
        position, length = 0, 65536
        for kind, number in steps:
            if kind == "jump":
                position = number * 512
            elif kind != "next":
                length = number * 512
            if position >= SIZE:
                position = 0
            event = request(
                position,
                min(length, SIZE - position),
                *((B0, B1) if kind == "other" else (B0,)),
                flags=CmdFlag.REQ_ONE if kind == "one" else 0,
            )
            expected = await plain(export, event)
            reply = ahead.reply(event)
            if reply is not None:
                assert reply == wire(event, expected)
            elif not event.flags:
                ahead.note(event, expected)
            if works and ahead.wanted:
                ahead.work()
            position = max(extents.position for _, extents in expected)

    asyncio.run(main())


# -- as it is served


async def chunks(client: RawClient, count: int) -> bytes:
    """The bytes of the next ``count`` chunks of replies."""
    found = b""
    for _ in range(count):
        head = await client.reader.readexactly(20)
        if head[:4] == b"\x6e\x8a\x27\x8c":
            head += await client.reader.readexactly(12)
            length = int.from_bytes(head[24:], "big")
        else:
            assert head[:4] == b"\x66\x8e\x33\xef"
            length = int.from_bytes(head[16:], "big")
        found += head + await client.reader.readexactly(length)
    return found


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("contexts", [("fine",), ("coarse", "fine")])
@pytest.mark.parametrize("style", ["structured", "extended"])
def test_a_client_sees_no_difference(
    tmp_path: Path, style: str, contexts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client is answered ahead; the other one, as if the socket were not ours, never."""
    path = make(tmp_path, "plain")
    names = [f"qemu:dirty-bitmap:{context}" for context in contexts]
    ahead = 0
    reply = StatusAhead.reply

    def counted(self: StatusAhead, event: BlockStatus) -> bytearray | None:
        nonlocal ahead
        made = reply(self, event)
        ahead += made is not None
        return made

    monkeypatch.setattr(StatusAhead, "reply", counted)

    async def ask(*, fast: bool, reads: bool) -> list[bytes]:
        async with serving(path) as (server, _):
            client = await connect(server, style, fast=fast, contexts=names)
            told = []
            for number in range(DISK // 65536):
                asked = Request(BLOCK_STATUS, number << 50 | number, number * 65536, 65536).pack(style)
                before = Request(READ, 1, number * 512, 512).pack(style) if reads else b""
                client.send(before + asked)
                told.append(await chunks(client, len(names) + reads))
            await client.close()
            return told

    async def main() -> None:
        for reads in (False, True):
            expected = await ask(fast=False, reads=reads)
            assert ahead == 0
            assert await ask(fast=True, reads=reads) == expected
            # All but the first, which has the bitmap loaded, and the second.
            assert ahead == DISK // 65536 - 2
            forget()

    def forget() -> None:
        nonlocal ahead
        ahead = 0

    asyncio.run(main())


def test_a_client_that_takes_only_a_part() -> None:
    async def main() -> None:
        export, status = made()
        assert status is not None
        first = request(0, 65536)
        status.note(first, await plain(export, first))
        status.work()
        status._reply = bytearray(8 + 8) + bytes(range(256)) * 4096  # a megabyte
        status._places = [8]
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            protocol = Protocol(StructuredReplies())
            protocol.settle = None  # type: ignore[attr-defined]
            tally = Tally()
            misses = Misses(export, None, Calm(), lambda: None)  # type: ignore[arg-type]
            fast = FastPath(export, protocol, ours, BufferPool(), tally, misses, status, None)  # type: ignore[arg-type]
            second, third = request(65536, 65536, cookie=5), request(131072, 65536)
            left, ahead, unsent = fast.serve([second, third], 16)
            assert left == [] and ahead == [third] and unsent
            got = b""
            while len(got) + len(unsent) < 16 + (1 << 20):
                got += theirs.recv(1 << 20)
            assert got + unsent == bytes(8) + (5).to_bytes(8, "big") + bytes(range(256)) * 4096
            assert tally.commands["status"].operations == 1
            # What waits to be sent goes first: the third is not even looked at.
            theirs.close()
            left, ahead, unsent = fast.serve([third], 16)
            assert (left, ahead, unsent) == ([third], [], b"")

    asyncio.run(main())
