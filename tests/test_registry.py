"""The registry: exports come and go, open when asked for, and close when nobody is left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from nbdbm import registry as registries
from nbdbm.access import EVERYBODY, Access
from nbdbm.errors import ImageError, UsageError
from nbdbm.exports import Export
from nbdbm.nbd.catalog import Absent
from nbdbm.nbd.constants import Rep
from nbdbm.peer import UNKNOWN, Peer, TlsPeer
from nbdbm.registry import ExportRegistry, Lease, Refused, Source
from tests.server.memimage import MemoryImage

TIMEOUT = 30


def export_of(image: MemoryImage, **options: Any) -> Export:
    return Export.of(image, **options)  # type: ignore[arg-type]


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), TIMEOUT))


async def settle() -> None:
    """Let everything happen that waits for nothing but its turn."""
    for _ in range(20):
        await asyncio.sleep(0)


class TestRegistry:
    def test_lookup(self) -> None:
        registry = ExportRegistry()
        a, b = export_of(MemoryImage(b""), name="a"), export_of(MemoryImage(b""), name="")
        registry.add(a)
        registry.add(b)
        assert registry.listing() == (("a", ""), ("", ""))
        assert registry.get("") is b and registry.info("a") is a.info
        assert registry.get("c") is None and registry.info("c") is None

    def test_names_are_unique(self) -> None:
        registry = ExportRegistry()
        registry.add(export_of(MemoryImage(b""), name="a"))
        with pytest.raises(UsageError, match="'a' is used twice"):
            registry.add(export_of(MemoryImage(b""), name="a"))

    def test_close_once(self) -> None:
        image = MemoryImage(b"")
        registry = ExportRegistry()
        registry.add(export_of(image))

        async def close_twice() -> None:
            await registry.close()
            await registry.close()

        asyncio.run(close_twice())
        assert image.closes == 1
        assert registry.listing() == ()

    def test_close_goes_on_after_a_failure(self) -> None:
        class Failing(MemoryImage):
            async def close(self) -> None:
                raise OSError(5, "broken")

        last = MemoryImage(b"")
        registry = ExportRegistry()
        registry.add(export_of(Failing(b""), name="a"))
        registry.add(export_of(last, name="b"))
        with pytest.raises(OSError, match="broken"):
            asyncio.run(registry.close())
        assert last.closes == 1


class Disk:
    """An image that can be opened and closed any number of times, and notes it."""

    def __init__(
        self, name: str, *, access: Access = EVERYBODY, grace: float | None = 0.0, key: object = None
    ) -> None:
        self.log: list[str] = []
        self.fails: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.source = Source(name=name, open=self.open, access=access, grace=grace, key=key or name)

    async def open(self) -> Export:
        await self.gate.wait()
        if self.fails is not None:
            self.log.append("failed")
            raise self.fails
        self.log.append("open")
        disk = self

        class Image(MemoryImage):
            async def close(self) -> None:
                disk.log.append("close")

        return export_of(Image(b"x" * 512), name=self.source.name)


def nothing(why: str) -> None:
    """A connection that does not mind."""


async def leased(registry: ExportRegistry, name: str, peer: Peer = UNKNOWN) -> Lease:
    return await registry.lease(name, peer, nothing)


class TestOnDemand:
    def test_opened_once_and_closed_after_the_last(self) -> None:
        async def main() -> None:
            registry, disk = ExportRegistry(), Disk("a")
            registry.offer(disk.source)
            assert registry.listing() == (("a", ""),)
            assert registry.info("a") is Absent.UNOPENED and disk.log == []
            first, second = await asyncio.gather(leased(registry, "a"), leased(registry, "a"))
            assert first.export is second.export is registry.get("a")
            assert registry.info("a") is first.export.info
            first.release()
            first.release()
            await settle()
            assert disk.log == ["open"]
            second.release()
            await asyncio.sleep(0.01)
            assert disk.log == ["open", "close"]
            assert registry.info("a") is Absent.UNOPENED
            (await leased(registry, "a")).release()
            await registry.close()
            assert disk.log == ["open", "close", "open", "close"]

        run(main)

    def test_a_new_client_within_the_grace_time(self) -> None:
        async def main() -> None:
            registry, disk = ExportRegistry(), Disk("a", grace=0.05)
            registry.offer(disk.source)
            (await leased(registry, "a")).release()
            lease = await leased(registry, "a")
            await asyncio.sleep(0.1)
            assert disk.log == ["open"]
            lease.release()
            await asyncio.sleep(0.1)
            assert disk.log == ["open", "close"]

        run(main)

    def test_what_cannot_be_opened_is_said_once_and_tried_again(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(registries, "RETRY_AFTER", 0.05)

        async def main() -> None:
            registry, disk = ExportRegistry(), Disk("a")
            registry.offer(disk.source)
            disk.fails = ImageError("/secret/a.qcow2", "broken")
            for _ in range(3):
                with pytest.raises(Refused, match="'a' cannot be opened") as caught:
                    await leased(registry, "a")
                assert caught.value.rep is Rep.ERR_UNKNOWN and "secret" not in str(caught.value)
            assert disk.log == ["failed"]
            assert [record.message for record in caplog.records] == [
                "export 'a' cannot be opened: /secret/a.qcow2: broken"
            ]
            disk.fails = None
            await asyncio.sleep(0.06)
            (await leased(registry, "a")).release()
            await registry.close()

        run(main)

    def test_what_cannot_be_closed_is_named(self, caplog: pytest.LogCaptureFixture) -> None:
        tried = asyncio.Event()

        class Failing(MemoryImage):
            async def close(self) -> None:
                tried.set()
                raise ImageError("/images/a.qcow2", "bitmaps cannot be stored")

        async def opened() -> Export:
            return export_of(Failing(b""), name="a")

        async def main() -> None:
            registry = ExportRegistry()
            registry.offer(Source(name="a", open=opened, grace=0.0))
            (await leased(registry, "a")).release()
            await tried.wait()
            await registry.close()

        run(main)
        assert caplog.messages == ["export 'a': closing failed: /images/a.qcow2: bitmaps cannot be stored"]

    def test_only_so_many_stay_open_without_clients(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registries, "MAX_IDLE", 2)

        async def main() -> None:
            registry = ExportRegistry()
            disks = [Disk(name, grace=1000) for name in "abcd"]
            for disk in disks:
                registry.offer(disk.source)
                (await leased(registry, disk.source.name)).release()
            await settle()
            assert [disk.log[-1] for disk in disks] == ["close", "close", "open", "open"]
            await registry.close()
            assert all(disk.log == ["open", "close"] for disk in disks)

        run(main)

    def test_a_client_that_comes_while_it_closes_gets_it_anew(self) -> None:
        async def main() -> None:
            registry, disk = ExportRegistry(), Disk("a")
            slot = registry.offer(disk.source)
            (await leased(registry, "a")).release()
            slot.close_soon()
            (await leased(registry, "a")).release()
            await registry.close()
            assert disk.log in (["open", "close"], ["open", "close", "open", "close"])

        run(main)


class TestDirectory:
    def test_files_come_and_go(self) -> None:
        async def main() -> None:
            registry, a, b = ExportRegistry(), Disk("a"), Disk("b")
            files = {"a": a.source}
            registry.directory = lambda: files
            assert registry.listing() == (("a", ""),) and registry.info("b") is None
            with pytest.raises(Refused):
                await leased(registry, "b")
            files["b"] = b.source
            lease = await leased(registry, "b")
            assert [slot.source.name for slot in registry.slots()] == ["b"]
            del files["b"]
            assert registry.info("b") is lease.export.info, "still open"
            lease.release()
            await asyncio.sleep(0.01)
            assert b.log == ["open", "close"] and not list(registry.slots())
            assert registry.info("b") is None
            await registry.close()

        run(main)

    def test_who_comes_while_it_closes_and_who_comes_then_share_it(self) -> None:
        """Were it forgotten between the two, it would be opened twice, and refused by its own locks."""

        async def main() -> None:
            registry, disk, closing = ExportRegistry(), Disk("a"), asyncio.Event()
            registry.directory = lambda: {"a": disk.source}

            class Slow(MemoryImage):
                async def close(self) -> None:
                    await closing.wait()
                    disk.log.append("close")

            lease = await leased(registry, "a")
            lease.export._image = Slow(b"")  # type: ignore[assignment]
            lease.release()
            await asyncio.sleep(0.01)
            disk.gate.clear()
            second = asyncio.ensure_future(leased(registry, "a"))
            await settle()
            closing.set()
            await settle()
            third = asyncio.ensure_future(leased(registry, "a"))
            await settle()
            disk.gate.set()
            assert (await second).export is (await third).export
            assert disk.log == ["open", "close", "open"]
            second.result().release()
            third.result().release()
            await asyncio.sleep(0.01)
            assert not list(registry.slots())
            await registry.close()

        run(main)

    def test_who_waits_in_vain_is_forgotten(self) -> None:
        async def main() -> None:
            registry, disk = ExportRegistry(), Disk("a")
            registry.directory = lambda: {"a": disk.source}
            disk.gate.clear()
            waiting = asyncio.ensure_future(leased(registry, "a"))
            await settle()
            waiting.cancel()
            await asyncio.wait((waiting,))
            await settle()
            assert not list(registry.slots()) and disk.log == []
            await registry.close()

        run(main)

    def test_what_cannot_be_opened_is_not_remembered_for_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registries, "RETRY_AFTER", 0.01)

        async def main() -> None:
            registry, disk = ExportRegistry(), Disk("a")
            disk.fails = OSError(5, "broken", "a")
            registry.directory = lambda: {"a": disk.source}
            with pytest.raises(Refused):
                await leased(registry, "a")
            assert list(registry.slots())
            await asyncio.sleep(0.05)
            assert not list(registry.slots())

        run(main)


class TestAccess:
    def test_what_a_client_may_not_use_does_not_exist_for_it(self) -> None:
        async def main() -> None:
            registry, disk = ExportRegistry(), Disk("a", access=Access(networks=("unix",)))
            registry.offer(disk.source)
            foreign = Peer(address="192.0.2.7:1", host="192.0.2.7")
            view = registry.view(lambda: foreign)
            assert list(view.listing()) == [None] and view.info("a") is None
            with pytest.raises(Refused, match="no export 'a'"):
                await leased(registry, "a", foreign)
            assert disk.log == []
            lease = await leased(registry, "a", Peer(address="unix"))
            with pytest.raises(Refused):
                registry.lease_now("a", foreign, nothing)
            lease.release()
            await registry.close()

        run(main)

    def test_tls(self) -> None:
        async def main() -> None:
            registry, disk = ExportRegistry(), Disk("a", access=Access(subjects=("alice",)))
            registry.offer(disk.source)
            peer = Peer(address="192.0.2.7:1", host="192.0.2.7")
            view = registry.view(lambda: peer)
            assert list(view.listing()) == [("a", "")], "it may find out who may"
            assert view.info("a") is Absent.NEEDS_TLS
            peer = Peer(address="192.0.2.7:1", tls=TlsPeer(version="v", cipher="c", identity="alice"))
            assert view.info("a") is Absent.UNOPENED
            peer = Peer(address="192.0.2.7:1", tls=TlsPeer(version="v", cipher="c", identity="bob"))
            assert view.info("a") is None

        run(main)

    def test_connections_of_one_export(self) -> None:
        async def main() -> None:
            registry, disk = ExportRegistry(), Disk("a", access=Access(max_connections=1))
            registry.offer(disk.source)
            first, second = await leased(registry, "a"), await leased(registry, "a")
            first.count()
            with pytest.raises(Refused, match="1 connections, which is its limit") as caught:
                second.count()
            assert caught.value.rep is Rep.ERR_POLICY
            first.release()
            second.count()
            second.release()
            await registry.close()

        run(main)


class TestUpdate:
    def test_only_what_changes_is_touched(self) -> None:
        async def main() -> None:
            registry = ExportRegistry()
            stays, goes, changes, comes = Disk("stays"), Disk("goes"), Disk("changes"), Disk("comes")
            for disk in (stays, goes, changes):
                registry.offer(disk.source)
            leases: dict[str, Lease] = {}
            told: dict[str, str] = {}

            async def use(name: str) -> None:
                def leave(why: str) -> None:
                    told[name] = why
                    leases[name].release()

                leases[name] = await registry.lease(name, UNKNOWN, leave)

            for name in ("stays", "goes", "changes"):
                await use(name)
            changed = Disk("changes", key="another")
            fresh = registry.update([stays.source, changed.source, comes.source])
            assert [slot.source.name for slot in fresh] == ["changes", "comes"]
            assert [name for name, _ in registry.listing()] == ["stays", "changes", "comes"]
            await settle()
            assert told == {"goes": registries.REMOVED, "changes": registries.CHANGED}
            assert stays.log == ["open"]
            assert goes.log == changes.log == ["open", "close"]
            assert registry.info("goes") is None
            (await leased(registry, "changes")).release()
            assert changed.log == ["open"]
            await registry.close()

        run(main)

    def test_the_successor_waits_for_the_image(self) -> None:
        async def main() -> None:
            registry, old, new = ExportRegistry(), Disk("a"), Disk("a", key="new")
            registry.offer(old.source)
            told = asyncio.Event()
            lease = await registry.lease("a", UNKNOWN, lambda why: told.set())
            registry.update([new.source])
            await asyncio.wait_for(told.wait(), 5)
            opening = asyncio.ensure_future(leased(registry, "a"))
            await settle()
            assert not opening.done() and new.log == [] and old.log == ["open"]
            lease.release()
            second = await opening
            assert old.log == ["open", "close"] and new.log == ["open"]
            assert registry.get("a") is second.export
            second.release()
            await registry.close()

        run(main)

    def test_an_image_that_moves_to_another_name(self) -> None:
        async def main() -> None:
            registry, old, new = ExportRegistry(), Disk("old"), Disk("new")
            other = Disk("other")
            source = Source(name="other", open=other.open, file="another file")
            registry.offer(old.source)
            lease = await leased(registry, "old")
            registry.update([new.source, source])
            (await leased(registry, "other")).release()
            opening = asyncio.ensure_future(leased(registry, "new"))
            await settle()
            assert not opening.done()
            lease.release()
            (await opening).release()
            await registry.close()
            assert old.log == ["open", "close"] and new.log == ["open", "close"]

        run(main)

    def test_who_may_use_it_changes_while_it_is_open(self) -> None:
        async def main() -> None:
            registry, disk = ExportRegistry(), Disk("a")
            registry.offer(disk.source)
            asked: list[str] = []
            near = await registry.lease("a", Peer(address="unix"), lambda why: asked.append("unix"))
            far = await registry.lease("a", Peer(address="192.0.2.7:1", host="192.0.2.7"), asked.append)
            tighter = Disk("a", access=Access(networks=("unix",)))
            assert registry.update([tighter.source]) == []
            assert len(asked) == 1 and "rules have changed" in asked[0] and disk.log == ["open"]
            near.release()
            far.release()
            await registry.close()

        run(main)

    def test_another_description(self) -> None:
        async def main() -> None:
            registry, disk = ExportRegistry(), Disk("a")
            registry.offer(disk.source)
            lease = await leased(registry, "a")
            registry.update([Source(name="a", open=disk.open, description="new", key="a")])
            info = registry.info("a")
            assert not isinstance(info, Absent) and info is not None and info.description == "new"
            lease.release()
            await registry.close()
            assert disk.log == ["open", "close"]

        run(main)

    def test_another_directory(self) -> None:
        async def main() -> None:
            registry, disk = ExportRegistry(), Disk("a")
            registry.directory = lambda: {"a": disk.source}
            lease = await leased(registry, "a")
            registry.directory = None
            registry.withdraw_found()
            assert registry.info("a") is None and disk.log == ["open"]
            lease.release()
            await registry.close()
            assert disk.log == ["open", "close"]

        run(main)


def test_nothing_is_leased_once_it_is_closed() -> None:
    async def main() -> None:
        registry, disk = ExportRegistry(), Disk("a")
        registry.offer(disk.source)
        await registry.close()
        with pytest.raises(Refused, match="no export"):
            await leased(registry, "a")
        assert disk.log == []

    run(main)
