"""The soak test can fail: servers with one mistake each do not get through it."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import pytest

from tests.soak import broken, test_soak, watchers
from tests.soak.world import World

pytestmark = test_soak.pytestmark
place = test_soak.place

SECONDS = 20
"""In which a mistake must show; each does in a quarter of it."""


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        ("forgetful", "claims to be consistent and misses"),
        ("idle_flush", "sectors lost|ERROR|corrupt"),
        ("unarmed", "claims to be consistent and misses|should be all, after a kill"),
        ("leaky", "not within|before Counter"),
        ("old_certificate", "is not the one in the file"),
    ],
)
@pytest.mark.timeout(240)
def test_it_is_found(place: Path, mistake: str, complaint: str) -> None:
    asyncio.run(soak(place, mistake, complaint), debug=False)


async def soak(place: Path, mistake: str, complaint: str) -> None:
    world = World(place, random.Random(mistake), [sys.executable, broken.__file__, mistake])
    try:
        with pytest.raises(AssertionError, match=complaint):
            if mistake == "leaky":
                await test_soak.one_server_stays(world, 4, patience=3)
            elif mistake == "old_certificate":
                await world.start()
                await watchers.renew(world)
            else:
                await test_soak.servers_come_and_go(world, SECONDS)
    finally:
        world.end()
