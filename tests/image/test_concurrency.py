"""Many requests at once: neighbours in one cluster, flushes in between, cancelled callers."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from nbdbm.image.image import Image, OpenOptions
from tests.support.marks import requires
from tests.support.qemu import SYSTEM

SIZE = 4 * 1024 * 1024
WORKERS = 12

pytestmark = requires("qemu-img")

KINDS = {
    "default": "compat=1.1",
    "v2": "compat=0.10",
    "small-clusters": "cluster_size=512",
    "large-clusters": "cluster_size=2M",
    "extended-l2": "extended_l2=on",
    "refcount-1": "refcount_bits=1,cluster_size=4k",
}


async def work(image: Image, model: bytearray, number: int, seed: int) -> None:
    """One client with a part of the disk of its own, whose edges lie inside clusters."""
    pick = random.Random(seed * 100 + number)
    part = SIZE // WORKERS
    start = number * part + 300
    stop = start + part
    for _ in range(25):
        offset = pick.randrange(start, stop)
        length = min(stop - offset, SIZE - offset, pick.choice([1, 512, 4096, 9000, 70000]))
        if length <= 0:
            continue
        kind = pick.random()
        if kind < 0.55:
            data = pick.randbytes(length)
            model[offset : offset + length] = data
            await image.write(offset, memoryview(data), fua=pick.random() < 0.1)
        elif kind < 0.75:
            model[offset : offset + length] = bytes(length)
            await image.write_zeroes(offset, length, no_hole=pick.random() < 0.5)
        elif kind < 0.85:
            await image.trim(offset, length)
            seen = bytearray(length)
            await image.read_into(memoryview(seen), offset)
            # Each byte is zero or as it was: where the two differ, what is read is zero.
            was = int.from_bytes(model[offset : offset + length])
            now = int.from_bytes(seen)
            assert not now & (now ^ was)
            model[offset : offset + length] = seen
        else:
            await image.flush()
        seen = bytearray(length)
        await image.read_into(memoryview(seen), offset)
        assert seen == model[offset : offset + length]


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
@pytest.mark.parametrize("kind", KINDS)
def test_workers_do_not_disturb_each_other(tmp_path: Path, kind: str, backing: bool) -> None:
    path = tmp_path / "disk.qcow2"
    model = bytearray(SIZE)
    options = ["-o", KINDS[kind]]
    if backing:
        model[: SIZE // 2] = random.Random(1).randbytes(SIZE // 2)
        (tmp_path / "base.raw").write_bytes(model[: SIZE // 2])
        options += ["-b", "base.raw", "-F", "raw"]
    SYSTEM.img("create", "-q", "-f", "qcow2", *options, str(path), str(SIZE))

    async def run() -> None:
        image = await Image.open(str(path), OpenOptions(read_only=False))
        async with asyncio.TaskGroup() as group:
            for number in range(WORKERS):
                group.create_task(work(image, model, number, len(kind)))
        await image.close()

    asyncio.run(run())
    SYSTEM.img("check", "-q", str(path))
    SYSTEM.img("convert", "-O", "raw", str(path), str(tmp_path / "out.raw"))
    assert (tmp_path / "out.raw").read_bytes() == bytes(model)


def test_cancelled_callers_leave_a_sound_image(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    SYSTEM.img("create", "-q", "-f", "qcow2", str(path), str(SIZE))

    async def run() -> None:
        image = await Image.open(str(path), OpenOptions(read_only=False))
        pick = random.Random(5)
        for _ in range(40):
            tasks = [
                asyncio.create_task(
                    image.write(pick.randrange(SIZE - 400_000), memoryview(pick.randbytes(400_000)), fua=True)
                )
                for _ in range(3)
            ]
            for _ in range(pick.randrange(8)):
                await asyncio.sleep(0)
            tasks[0].cancel()
            cancelled, *others = await asyncio.gather(*tasks, return_exceptions=True)
            assert cancelled is None or isinstance(cancelled, asyncio.CancelledError)
            assert others == [None, None]
        await image.close()

    asyncio.run(run())
    SYSTEM.img("check", "-q", str(path))
