"""Exports: what the engine says, in the wire's words."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm import exports
from nbdbm.errors import BitmapError
from nbdbm.exports import Export
from nbdbm.nbd.constants import TransmissionFlag
from tests.server.memimage import MemoryImage, WritableImage

K64 = 65536
CONTENT = b"a" * K64 + bytes(2 * K64) + b"b" * K64 + bytes(1000)


def export_of(image: MemoryImage, **options: Any) -> Export:
    return Export.of(image, **options)  # type: ignore[arg-type]


def status(
    export: Export, names: list[str], offset: int, length: int, **options: Any
) -> list[list[tuple[int, int]]]:
    answers = asyncio.run(export.block_status(list(enumerate(names, 5)), offset, length, **options))
    assert [ident for ident, _ in answers] == list(range(5, 5 + len(names)))
    return [[tuple(extent) for extent in extents] for _, extents in answers]  # type: ignore[misc]


def read(export: Export, offset: int, length: int, *, sparse: bool) -> tuple[bytes, list[tuple[int, bool]]]:
    view = memoryview(bytearray(b"\xdd" * length))
    chunks = asyncio.run(export.read(view, offset, sparse=sparse))
    data = b"".join(bytes(part) if part is not None else bytes(count) for count, part in chunks)
    return data, [(count, part is not None) for count, part in chunks]


class TestInfo:
    def test_of_a_read_only_export(self) -> None:
        image = MemoryImage(CONTENT, bitmaps={"b0": [], "b1": []}, refused={"bad": "in use"})
        info = export_of(image, name="disk", description="d").info
        assert (info.name, info.description, info.size) == ("disk", "d", len(CONTENT))
        assert info.flags == (
            TransmissionFlag.HAS_FLAGS
            | TransmissionFlag.READ_ONLY
            | TransmissionFlag.SEND_FLUSH
            | TransmissionFlag.SEND_FUA
            | TransmissionFlag.SEND_CACHE
            | TransmissionFlag.CAN_MULTI_CONN
        )
        assert info.contexts == (
            "base:allocation",
            "qemu:allocation-depth",
            "qemu:dirty-bitmap:b0",
            "qemu:dirty-bitmap:b1",
        )

    def test_of_a_writable_export(self) -> None:
        info = export_of(WritableImage(CONTENT)).info
        assert (
            info.flags
            == exports.WRITABLE_FLAGS
            == (
                TransmissionFlag.HAS_FLAGS
                | TransmissionFlag.SEND_FLUSH
                | TransmissionFlag.SEND_FUA
                | TransmissionFlag.SEND_TRIM
                | TransmissionFlag.SEND_WRITE_ZEROES
                | TransmissionFlag.SEND_FAST_ZERO
                | TransmissionFlag.SEND_CACHE
                | TransmissionFlag.CAN_MULTI_CONN
            )
        )

    @pytest.mark.parametrize(("cluster", "preferred"), [(512, 4096), (65536, 65536), (1 << 21, 1 << 21)])
    def test_preferred_block(self, cluster: int, preferred: int) -> None:
        assert export_of(MemoryImage(b"", cluster_size=cluster)).info.preferred_block == preferred

    def test_contexts_narrowed(self) -> None:
        image = MemoryImage(b"", bitmaps={"b0": [], "b1": []})
        info = export_of(image, bitmaps=("b1", "b1"), allocation_depth=False).info
        assert info.contexts == ("base:allocation", "qemu:dirty-bitmap:b1")

    def test_missing_bitmap(self) -> None:
        with pytest.raises(BitmapError, match="'b9': there is no such bitmap in the image"):
            export_of(MemoryImage(b"", bitmaps={"b0": []}), bitmaps=("b0", "b9"))

    def test_refused_bitmap(self) -> None:
        with pytest.raises(BitmapError, match="'b0': cannot be served: in use"):
            export_of(MemoryImage(b"", refused={"b0": "in use"}), bitmaps=("b0",))


def test_changes_reach_the_image() -> None:
    image = WritableImage(CONTENT)
    export = export_of(image)

    async def main() -> None:
        assert export.try_write(0, memoryview(b"x")) is False
        await export.write(1, memoryview(b"xyz"), fua=True)
        await export.write_zeroes(0, 2, no_hole=True, fast=True, fua=True)
        await export.trim(K64, 512, fua=False)
        await export.flush()

    asyncio.run(main())
    assert image.changes == [
        ("write", 1, 3, "fua"),
        ("zeroes", 0, 2, "no_hole", "fast", "fua"),
        ("trim", K64, 512),
    ]
    assert image.flushes == 1 and image.content[:5] == b"\0\0yza"


class TestRead:
    def test_whole(self) -> None:
        export = export_of(MemoryImage(CONTENT))
        assert read(export, 10, 3 * K64, sparse=False) == (CONTENT[10 : 10 + 3 * K64], [(3 * K64, True)])

    def test_sparse(self) -> None:
        data, chunks = read(export_of(MemoryImage(CONTENT)), 0, len(CONTENT), sparse=True)
        assert data == CONTENT
        assert chunks == [(K64, True), (2 * K64, False), (K64 + 1000, True)]  # the last zeroes are few

    @pytest.mark.parametrize(("offset", "length", "is_data"), [(5, 100, True), (K64, 7, False)])
    def test_sparse_of_one_kind(self, offset: int, length: int, is_data: bool) -> None:
        export = export_of(MemoryImage(CONTENT))
        assert read(export, offset, length, sparse=True) == (
            CONTENT[offset : offset + length],
            [(length, is_data)],
        )

    @given(st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=12), st.booleans())
    def test_any_parts_read_as_their_content(self, parts: list[tuple[int, bool]], sparse: bool) -> None:
        content = b"".join((b"x" if is_data else b"\0") * (512 * count) for count, is_data in parts)
        data, chunks = read(export_of(MemoryImage(content, cluster_size=512)), 0, len(content), sparse=sparse)
        assert data == content
        if len(chunks) > 1:
            assert all(is_data or length >= exports.MIN_HOLE for length, is_data in chunks)
        assert all(a[1] != b[1] for a, b in pairwise(chunks))

    def test_try_read(self) -> None:
        view = memoryview(bytearray(4))
        assert export_of(MemoryImage(CONTENT)).try_read(view, 0)
        assert view == b"aaaa"


class TestBlockStatus:
    IMAGE = MemoryImage(CONTENT, bitmaps={"b": [(0, 2 * K64), (3 * K64, K64)]})
    NAMES = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b")

    def test_every_context(self) -> None:
        assert status(export_of(self.IMAGE), list(self.NAMES), 0, len(CONTENT)) == [
            [(K64, 0), (2 * K64, 3), (K64, 0), (1000, 3)],
            [(K64, 1), (2 * K64, 0), (K64, 1), (1000, 0)],
            [(2 * K64, 1), (K64, 0), (K64, 1), (1000, 0)],
        ]

    @pytest.mark.parametrize("names", [NAMES[:1], NAMES[1:2], NAMES[2:], NAMES[::-1]])
    def test_contexts_alone_or_in_any_order(self, names: tuple[str, ...]) -> None:
        every = dict(zip(self.NAMES, status(export_of(self.IMAGE), list(self.NAMES), 9, K64), strict=True))
        assert status(export_of(self.IMAGE), list(names), 9, K64) == [every[name] for name in names]

    def test_req_one(self) -> None:
        assert status(export_of(self.IMAGE), list(self.NAMES), 100, 3 * K64, req_one=True) == [
            [(K64 - 100, 0)],
            [(K64 - 100, 1)],
            [(2 * K64 - 100, 1)],
        ]

    def test_req_one_stays_in_the_range(self) -> None:
        assert status(export_of(self.IMAGE), list(self.NAMES), K64, 512, req_one=True) == [
            [(512, 3)],
            [(512, 0)],
            [(512, 1)],
        ]

    def test_capped(self) -> None:
        answers = status(export_of(self.IMAGE), list(self.NAMES), 0, len(CONTENT), limit=2)
        assert [len(extents) for extents in answers] == [2, 2, 2]

    @pytest.mark.parametrize("names", [NAMES[:1], NAMES[1:2], NAMES[:2]])
    def test_short_status_answers_are_joined(self, names: tuple[str, ...]) -> None:
        image = MemoryImage(CONTENT)
        image.status_runs = 1
        assert status(export_of(image), list(names), 0, len(CONTENT)) == status(
            export_of(MemoryImage(CONTENT)), list(names), 0, len(CONTENT)
        )
        assert image.status_calls == 4

    def test_work_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exports, "MAX_STATUS_STEPS", 2)
        monkeypatch.setattr(exports, "STEPS_PER_TURN", 1)
        image = MemoryImage(CONTENT)
        image.status_runs = 1
        assert status(export_of(image), ["base:allocation"], 0, len(CONTENT)) == [[(K64, 0), (2 * K64, 3)]]

    def test_bitmaps_alone_ask_for_no_status(self) -> None:
        image = MemoryImage(CONTENT, bitmaps={"b": []})
        assert status(export_of(image), ["qemu:dirty-bitmap:b"], 0, 10) == [[(10, 0)]]
        assert image.status_calls == 0


class TestCache:
    def test_reads_the_range(self) -> None:
        image = MemoryImage(bytes(3 << 20))
        asyncio.run(export_of(image).cache(5, (2 << 20) + 1))
        assert image.reads == [(5, 1 << 20), (5 + (1 << 20), 1 << 20), (5 + (2 << 20), 1)]

    def test_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exports, "MAX_PREFETCH", 1000)
        image = MemoryImage(CONTENT)
        asyncio.run(export_of(image).cache(0, len(CONTENT)))
        assert image.reads == [(0, 1000)]

    def test_any_number_takes_the_memory_of_one(self) -> None:
        held: list[object] = []

        class Waiting(MemoryImage):
            async def read_sparse(self, view: memoryview, offset: int) -> list[tuple[int, bool]]:
                held.append(view.obj)
                await asyncio.sleep(0.001)
                return await super().read_sparse(view, offset)

        async def main() -> None:
            image = Waiting(bytes(3 << 20))
            export = export_of(image)
            await asyncio.gather(*(export.cache(0, 3 << 20) for _ in range(100)))
            assert len(held) == 300
            assert len({id(each) for each in held}) == 1

        asyncio.run(main())


def test_flush() -> None:
    image = MemoryImage(b"")
    asyncio.run(export_of(image).flush())
    assert image.flushes == 1


class SlowImage(WritableImage):
    """Zeroing and trimming wait until they are let go."""

    def __init__(self) -> None:
        super().__init__(bytes(4096))
        self.begun: list[tuple[str, int]] = []
        self.go = asyncio.Semaphore(0)

    async def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool = False, fast: bool = False, fua: bool = False
    ) -> None:
        self.begun.append(("zero", length))
        await self.go.acquire()

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self.begun.append(("trim", length))
        await self.go.acquire()


def test_long_zeroes_and_trims_take_turns() -> None:
    async def main() -> None:
        image = SlowImage()
        export = export_of(image)
        long = exports.LONG

        def zero(length: int) -> asyncio.Task[None]:
            return asyncio.create_task(export.write_zeroes(0, length, no_hole=False, fast=False, fua=False))

        def trim(length: int) -> asyncio.Task[None]:
            return asyncio.create_task(export.trim(0, length, fua=False))

        tasks = [zero(long), trim(long), zero(long + 1), zero(long - 1), trim(1), trim(1 << 40)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        # The short ones do not wait, not even for the long one that is being carried out.
        assert image.begun == [("zero", long), ("zero", long - 1), ("trim", 1)]
        for _ in tasks:
            image.go.release()
        await asyncio.gather(*tasks)
        assert image.begun[3:] == [("trim", long), ("zero", long + 1), ("trim", 1 << 40)]

    asyncio.run(main())
