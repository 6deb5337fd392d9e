"""What the soak test serves: images, a configuration file that changes, and a server that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from nbdbm.client import NbdClient
from nbdbm.uri import NbdUri, UriTls
from nbdbm.uri import parse as parse_uri
from tests.soak.disk import SIZE, Disk, create
from tests.support import qemu, servers
from tests.support.certificates import Pki
from tests.support.images import KIB

PATIENCE = 60
"""Seconds that anything may take which the test waits for."""

URI = re.compile(r"^(nbd(?:\+unix)?://\S+)\n", re.MULTILINE)
METRICS = re.compile(r"metrics: http://127\.0\.0\.1:(\d+)/metrics")

GRACE = 0.3
STATIC = "static"
TARGET = "target"
"""An export that is copied to, as a whole."""
SECRET = "secret"
"""The same as STATIC, for clients with TLS."""


class World:
    """One configuration file, the images in it, and a server now and then."""

    def __init__(
        self, place: Path, rng: random.Random, program: Sequence[str] = tuple(servers.NBDBM)
    ) -> None:
        """``program``: what is run as ``nbdbm``."""
        self.place = place
        self.rng = rng
        self._program = program
        self.pki = Pki(place / "pki")
        self.certificates = Path(shutil.copytree(self.pki.server, place / "tls"))
        """The server's."""
        self.control = place / "control"
        self.metrics_port = 0
        self.config = place / "nbdbm.toml"
        self.log = place / "log"
        self.log.touch()
        self.process: subprocess.Popen[bytes] | None = None
        self.up = asyncio.Event()
        """Clients may come."""
        self.over = False
        """Clients shall end."""
        self.changes = 0
        """Ends of servers, counted when they begin and once clients may come again."""
        self.served = 0
        self.address: NbdUri | None = None
        self.counts: Counter[str] = Counter()
        self.generation = 0
        """Stands in a description: tells which configuration is in force."""
        self.discard = "unmap"
        self._images()

    def _images(self) -> None:
        place, rng = self.place, self.rng
        base, middle, top = (place / f"{name}.qcow2" for name in ("base", "middle", "top"))
        create(base, {})
        qemu.SYSTEM.img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", middle)
        qemu.SYSTEM.io(middle, "write -P 9 1M 300k")
        qemu.SYSTEM.img("create", "-q", "-f", "qcow2", "-b", middle.name, "-F", "qcow2", top)
        qemu.SYSTEM.img("bitmap", "--add", "-g", 65536, top, "since")
        qemu.SYSTEM.io(top, "write -P 11 3M 100k", "write -z 0 64k")
        self.raw = place / "static.raw"
        qemu.SYSTEM.img("convert", "-f", "qcow2", "-O", "raw", top, self.raw)
        self.content = self.raw.read_bytes()
        self.top = top

        overlay = ("-b", base, "-F", "qcow2")
        fine, coarse = {"fine": 4 * KIB}, {"coarse": 256 * KIB}
        both = {**fine, **coarse}
        kinds: list[tuple[str, Path, dict[str, int], tuple[object, ...], bool]] = [
            ("plain", place / "plain" / "plain.qcow2", {"dense": 512, **both}, (), True),
            (
                "subclusters",
                place / "subclusters" / "subclusters.qcow2",
                both,
                ("-o", "extended_l2=on"),
                False,
            ),
            ("demand", place / "demand" / "demand.qcow2", both, overlay, False),
            ("changing", place / "changing" / "changing.qcow2", coarse, ("-o", "cluster_size=4096"), False),
            ("moving-0", place / "moving" / "moving.qcow2", fine, (), False),
            ("extra", place / "extra" / "extra.qcow2", both, (), False),
            ("found.qcow2", place / "images" / "found.qcow2", both, (), True),
        ]
        self.disks: list[Disk] = []
        for name, path, bitmaps, options, broken in kinds:
            path.parent.mkdir()
            create(path, bitmaps, *options, broken=broken)
            self.disks.append(Disk(name, path, bitmaps, rng, broken=broken))
        self.target = place / "target.qcow2"
        qemu.SYSTEM.img("create", "-q", "-f", "qcow2", self.target, SIZE)
        qemu.SYSTEM.img("bitmap", "--add", "-g", 65536, self.target, "since")

    def disk(self, name: str) -> Disk:
        """By the name of its image."""
        return next(disk for disk in self.disks if disk.path.stem == name)

    # -- the configuration

    def write_config(self, mistake: str = "") -> None:
        listen = f'socket = "{self.place}/s"' if self.served % 2 else 'bind = "127.0.0.1"\nport = 0'
        text = [
            f"[listen]\n{listen}\n[server]\nmax-connections = 300\n{mistake}"
            'metrics = "127.0.0.1:0"\ncontrol = "control"\n'
            '[tls]\ntls = "on"\ntls-certificates = "tls"\ntls-verify-peer = true\n'
        ]
        exports: list[tuple[str, Path, str]] = [
            (STATIC, self.top, "read-only = true"),
            (SECRET, self.top, "read-only = true\nrequire-tls = true"),
            (TARGET, self.target, ""),
        ]
        for disk in self.disks:
            if disk.offered and disk.path.stem != "found":
                more = (
                    f'on-demand = true\ngrace = {GRACE}\n"format" = "qcow2"' if disk.name == "demand" else ""
                )
                if disk.name == "changing":
                    more = f'discard = "{self.discard}"'
                exports.append((disk.name, disk.path, more))
        for name, path, more in exports:
            text.append(
                f'[[export]]\nname = "{name}"\nimage = "{path.relative_to(self.place)}"\n'
                f'description = "{self.generation}"\n{more}\n'
            )
        text.append(f'[directory]\npath = "images"\ngrace = {GRACE}\n')
        temporary = self.config.with_suffix(".new")
        temporary.write_text("".join(text))
        temporary.rename(self.config)

    def uri(self, name: str, *, tls: bool = False) -> str:
        assert self.address is not None
        if self.address.socket:
            uri = NbdUri.unix(self.address.socket, name)
        else:
            uri = NbdUri.tcp("127.0.0.1", self.address.port, name)
        if tls:
            uri = replace(uri.with_tls(), tls=UriTls(certificates=str(self.pki.client)))
        return str(uri)

    async def listed(self) -> dict[str, str]:
        """Names and descriptions as a client sees them."""
        client = await NbdClient.open(self.uri(""))
        try:
            return {export.name: export.description for export in await client.list_exports()}
        finally:
            await client.close()

    async def reload(self, *touched: Disk, change: Callable[[], None] = lambda: None) -> None:
        """Change the configuration; the clients of ``touched`` disks lose their connections, no others do."""
        for disk in touched:
            disk.window = True
            disk.changes += 1
        change()
        self.generation += 1
        self.write_config()
        self._hangup()
        generation = str(self.generation)

        async def reloaded() -> bool:
            return (await self.listed()).get(STATIC) == generation

        await self.until(reloaded, "the configuration is in force")
        for disk in touched:
            disk.window = False
            disk.changes += 1
        self.counts["reloads"] += 1

    async def mistake(self) -> None:
        """A file that cannot be used changes nothing."""
        before = self.said().count("not reloaded: ")
        self.write_config(mistake="max-clients = 7\n")
        self._hangup()

        async def refused() -> bool:
            return self.said().count("not reloaded: ") > before

        await self.until(refused, "the mistake is reported")
        self.write_config()
        self.counts["reloads refused"] += 1

    def _hangup(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    # -- the server

    def said(self) -> str:
        return self.log.read_text(errors="backslashreplace")

    async def start(self) -> None:
        """Start a server, on another kind of socket than the last; clients may come when this returns."""
        self.served += 1
        self.write_config()
        before = len(self.said())
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: ASYNC220 (it is only begun here)
                [*self._program, "serve", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=qemu.environment(),
            )

        async def printed() -> bool:
            assert self.process is not None and self.process.poll() is None, self.said()[before:]
            return URI.search(self.said(), before) is not None

        await self.until(printed, "the server serves")
        line, metrics = (found.search(self.said(), before) for found in (URI, METRICS))
        assert line is not None and metrics is not None
        self.address, self.metrics_port = parse_uri(line[1]), int(metrics[1])
        self.changes += 1
        self.up.set()

    async def until(self, condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
        """Wait for a coroutine function to return something true."""
        deadline = time.monotonic() + patience
        while True:
            result = condition()
            if await result if asyncio.iscoroutine(result) else result:
                return
            assert time.monotonic() < deadline, f"not within {patience} s: {what}\n{self.said()[-4000:]}"
            await asyncio.sleep(0.02)

    async def stop(self, *, kill: bool) -> dict[Disk, bool]:
        """End the server; returns which disks had been written to through it since they were opened."""
        assert self.process is not None and self.process.poll() is None, self.said()
        process, wrote = self.process, {disk: disk.written_to for disk in self.disks}
        self.up.clear()
        self.changes += 1
        for disk in self.disks:
            disk.window = True
            disk.changes += 1
        if kill:
            process.kill()
        else:
            process.terminate()
        await self.until(lambda: process.poll() is not None, "the server has ended")
        assert process.returncode == (-signal.SIGKILL if kill else 0), (process.returncode, self.said())
        self.counts["kills" if kill else "restarts"] += 1
        return wrote

    def end(self) -> None:
        """Whatever has happened: no server is left."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    async def judge(self, wrote: dict[Disk, bool], *, killed: bool) -> None:
        """All clients have ended, and so has the server: look at the images."""
        said = self.said()
        assert "Traceback" not in said and "unexpected" not in said, said
        limit = asyncio.Semaphore(3)

        async def one(disk: Disk) -> None:
            async with limit:
                await asyncio.to_thread(disk.judge, killed=killed, wrote=wrote[disk])
            disk.window = False
            disk.changes += 1

        await asyncio.gather(*map(one, self.disks))
        await asyncio.to_thread(self._judge_others)

    def _judge_others(self) -> None:
        qemu.SYSTEM.img("check", "-q", self.top)
        assert qemu.SYSTEM.img("compare", "-f", "qcow2", "-F", "raw", self.top, self.raw)
        status = qemu.run(qemu.SYSTEM.argv("qemu-img", "check", "-q", self.target), check=False).returncode
        assert status in (0, 3), f"target: {status}"
        qemu.run(qemu.SYSTEM.argv("qemu-img", "check", "-q", "-r", "leaks", self.target), check=False)
        shown = qemu.SYSTEM.img_json("info", self.target)["format-specific"]["data"]["bitmaps"]
        if "in-use" in shown[0]["flags"]:
            qemu.SYSTEM.img("bitmap", "--remove", self.target, "since")
            qemu.SYSTEM.img("bitmap", "--add", "-g", 65536, self.target, "since")

    # -- what the server holds

    def descriptors(self) -> Counter[str]:
        """What its descriptors lead to; sockets are all the same."""
        assert self.process is not None
        found: Counter[str] = Counter()
        place = f"/proc/{self.process.pid}/fd"
        for name in os.listdir(place):
            try:
                found[re.sub(r"(?<=^socket:)\[\d+\]$", "", os.readlink(f"{place}/{name}"))] += 1
            except FileNotFoundError:
                continue
        return found

    def status(self, field: str) -> int:
        """A number of /proc/PID/status: Threads, VmRSS (kB)."""
        assert self.process is not None
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
        raise AssertionError(field)


async def outcome(argv: Sequence[str]) -> tuple[int, str]:
    """Run a program: its status and what it said. Ended, and its pipe closed, whatever happens to us."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=qemu.environment(),
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(PATIENCE):
            output, _ = await process.communicate()
    except BaseException:
        # All of the group, since one that is left would hold the pipe.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()
        raise
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace")
