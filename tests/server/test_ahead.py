"""Block status answered ahead: always what the export would say, and only where nothing can change."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm.exports import Export
from nbdbm.nbd.constants import CmdFlag
from nbdbm.nbd.events import BlockStatus
from nbdbm.server import ahead as module
from nbdbm.server.ahead import StatusAhead
from tests.server.memimage import MemoryImage, WritableImage

SIZE = 1 << 20
B0, B1, ALLOCATION = (1, "qemu:dirty-bitmap:b0"), (2, "qemu:dirty-bitmap:b1"), (0, "base:allocation")
DIRTY = [(at, 4096) for at in range(0, SIZE, 16384)]


class Protocol:
    """What is needed of the protocol: the cap on extents."""

    def extent_limit(self, event: BlockStatus) -> int:
        return 1 if event.flags & CmdFlag.REQ_ONE else 1000


def made(image: type[MemoryImage] = MemoryImage) -> tuple[Export, StatusAhead | None]:
    export = Export.of(image(b"x" * SIZE, bitmaps={"b0": DIRTY, "b1": [(0, SIZE)]}))  # type: ignore[arg-type]
    return export, StatusAhead.of(export, Protocol())  # type: ignore[arg-type]


def request(offset: int, length: int, *contexts: tuple[int, str], flags: int = 0) -> BlockStatus:
    return BlockStatus(7, offset, length, CmdFlag(flags), contexts or (B0,))


async def plain(export: Export, event: BlockStatus) -> list[Any]:
    return await export.block_status(
        event.contexts, event.offset, event.length, limit=Protocol().extent_limit(event)
    )


def flat(answers: list[Any]) -> list[Any]:
    return [(number, extents.offset, list(extents.flat)) for number, extents in answers]


def test_not_where_somebody_may_write() -> None:
    assert made(WritableImage)[1] is None


def test_the_second_in_order_is_made_before_it_is_asked_for() -> None:
    async def main() -> None:
        export, ahead = made()
        assert ahead is not None
        first = request(0, 65536)
        assert ahead.take(first) is None and not ahead.wanted
        ahead.note(first, await plain(export, first))
        assert ahead.wanted
        ahead.work()
        assert not ahead.wanted
        second = request(65536, 65536)
        answers = ahead.take(second)
        assert answers is not None and flat(answers) == flat(await plain(export, second))
        assert ahead.take(second) is None, "once"

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
        assert ahead.take(request(32768, 32768)) is None

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
            assert not ahead.wanted and ahead.take(request(65536, 65536)) is None

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
            answers = ahead.take(event)
            if answers is None:
                answers = await plain(export, event)
            assert flat(answers) == flat(expected)
            if not event.flags:
                ahead.note(event, answers)
            if works and ahead.wanted:
                ahead.work()
            position = max(extents.position for _, extents in expected)

    asyncio.run(main())
