"""``nbdbm serve`` with clients that write: what is left in the file, and how the process ends."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nbdbm.cli import main
from nbdbm.client import NbdClient
from nbdbm.errors import NbdError
from nbdbm.nbd.constants import CONTEXT_ALLOCATION, AllocationFlag
from tests.cli.program import TIMEOUT, ended, environment, run, started

SIZE = 4 << 20
CLUSTER = 65536
GRANULARITY = 65536


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty qcow2 disk with a recording bitmap and a disabled one."""
    path = tmp_path / "disk.qcow2"
    command("create", path, SIZE)
    command("bitmap", "add", path, "b")
    command("bitmap", "add", "--disabled", path, "frozen")
    return path


def command(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def argv(image: object, *options: object) -> list[str]:
    return [sys.executable, "-m", "nbdbm", "serve", "-q", *map(str, options), str(image)]


def listed(image: Path, *options: str) -> dict[str, dict[str, Any]]:
    """The bitmaps of the image, by name."""
    return {
        entry["name"]: entry for entry in json.loads(command("bitmap", "list", "--json", *options, image))
    }


def state(image: Path, *options: str) -> dict[str, tuple[str, int | None]]:
    return {name: (entry["state"], entry["dirty_bytes"]) for name, entry in listed(image, *options).items()}


CLEAN_STATE = {"b": ("usable", 0), "frozen": ("usable", 0)}


def talk(path: Path, work: Callable[[NbdClient], Coroutine[Any, Any, None]], *contexts: str) -> None:
    """``work`` with a client of the server on ``path``."""

    async def session() -> None:
        async with await NbdClient.connect(f"nbd+unix:///?socket={path}", contexts=contexts) as client:
            await work(client)

    asyncio.run(asyncio.wait_for(session(), TIMEOUT))


async def write_two(client: NbdClient) -> None:
    """Two granules become dirty; one of the writes is never flushed."""
    await client.write(100, b"x" * 10, fua=True)
    await client.write(SIZE - 5, b"y" * 5)


def content(image: Path, offset: int, length: int) -> bytes:
    """What the disk holds, by a read-only server of its own."""
    code = (
        "import asyncio, sys; from nbdbm.client import NbdClient\n"
        "async def main():\n"
        "    async with await NbdClient.connect(sys.argv[1]) as client:\n"
        "        sys.stdout.buffer.write(await client.read(int(sys.argv[2]), int(sys.argv[3])))\n"
        "asyncio.run(main())"
    )
    client = f"{sys.executable} -c '{code}' \"$uri\" {offset} {length}"
    done = run(*argv(image, "-r", "--run", client))
    assert done.returncode == 0, done.stderr
    return done.stdout.encode()


class TestCleanEnd:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_by_signal(self, image: Path, tmp_path: Path, number: signal.Signals) -> None:
        """What was written is there, flushed or not, and the bitmaps know of it."""
        assert state(image) == CLEAN_STATE
        with started(*argv(image, "-k", tmp_path / "s"), lines=5) as (process, said):
            assert said[3:] == ["context: qemu:dirty-bitmap:b", "context: qemu:dirty-bitmap:frozen"]
            talk(tmp_path / "s", write_two)
            # Whoever looks now, or after a crash, is told not to trust them.
            assert {name for name, (kind, _) in state(image, "-U").items() if kind == "usable"} == set()
            assert ended(process, number) == (0, "")
        assert state(image) == {"b": ("usable", 2 * GRANULARITY), "frozen": ("usable", 0)}
        assert content(image, 98, 14) == b"\0\0" + b"x" * 10 + b"\0\0"
        assert content(image, SIZE - 6, 6) == b"\0" + b"y" * 5
        assert command("check", image).startswith("no errors")

    def test_by_the_end_of_a_command(self, image: Path) -> None:
        code = (
            "import asyncio, os; from nbdbm.client import NbdClient\n"
            "async def main():\n"
            "    async with await NbdClient.connect(os.environ['uri']) as client:\n"
            "        await client.write(3 * 65536, b'z' * 65537)\n"
            "asyncio.run(main())"
        )
        done = run(*argv(image, "--run", f'{sys.executable} -c "{code}" && exit 7'))
        assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
        assert state(image)["b"] == ("usable", 2 * GRANULARITY)
        assert content(image, 3 * 65536, 65538) == b"z" * 65537 + b"\0"

    def test_with_a_client_still_there(self, image: Path, tmp_path: Path) -> None:
        with started(*argv(image, "-k", tmp_path / "s"), lines=5) as (process, _):

            async def work(client: NbdClient) -> None:
                await write_two(client)
                process.send_signal(signal.SIGTERM)
                with pytest.raises(NbdError):
                    while True:
                        await client.read(0, 512)
                        await asyncio.sleep(0.01)

            talk(tmp_path / "s", work)
            assert ended(process) == (0, "")
        assert state(image)["b"] == ("usable", 2 * GRANULARITY)

    @pytest.mark.parametrize("delay", [0, 0.02, 0.04, 0.06, 0.08, 0.12])
    def test_a_second_signal_while_it_ends(self, image: Path, tmp_path: Path, delay: float) -> None:
        with started(*argv(image, "-k", tmp_path / "s"), lines=5) as (process, _):
            talk(tmp_path / "s", write_two)
            process.send_signal(signal.SIGTERM)
            time.sleep(delay)  # into storing, closing, and the end of the interpreter
            assert ended(process) == (0, "")
        assert state(image)["b"] == ("usable", 2 * GRANULARITY)

    def test_nothing_written_nothing_dirty(self, image: Path, tmp_path: Path) -> None:
        with started(*argv(image, "-k", tmp_path / "s"), lines=5) as (process, _):
            assert ended(process) == (0, "")
        assert state(image) == CLEAN_STATE

    def test_a_raw_image(self, tmp_path: Path) -> None:
        raw = tmp_path / "disk.raw"
        raw.write_bytes(b"." * SIZE)
        with started(*argv(raw, "-k", tmp_path / "s", "-f", "raw")) as (process, _):

            async def work(client: NbdClient) -> None:
                await write_two(client)
                await client.write_zeroes(CLUSTER, CLUSTER)

            talk(tmp_path / "s", work)
            assert ended(process) == (0, "")
        data = raw.read_bytes()
        assert len(data) == SIZE
        assert data[99:111] == b".xxxxxxxxxx." and data[-6:] == b".yyyyy"
        assert data[CLUSTER - 1 : 2 * CLUSTER + 1] == b"." + bytes(CLUSTER) + b"."


class TestOptions:
    def zeroes_written(self, image: Path, tmp_path: Path, *options: str) -> list[int]:
        """Allocation flags of two clusters: written with zeroes, and trimmed."""
        found: list[int] = []

        async def work(client: NbdClient) -> None:
            await client.write(0, b"x" * 2 * CLUSTER)
            await client.write(0, bytes(CLUSTER))
            await client.trim(CLUSTER, CLUSTER)
            for at in (0, CLUSTER):
                extents = await client.block_status(at, CLUSTER)
                found.append(extents[CONTEXT_ALLOCATION][0].flags)

        with started(*argv(image, "-k", tmp_path / "s", *options), lines=5) as (process, _):
            talk(tmp_path / "s", work, CONTEXT_ALLOCATION)
            assert ended(process) == (0, "")
        assert command("check", image).startswith("no errors")
        return found

    HOLE = AllocationFlag.HOLE | AllocationFlag.ZERO

    def test_by_default(self, image: Path, tmp_path: Path) -> None:
        assert self.zeroes_written(image, tmp_path) == [0, self.HOLE]

    def test_discard_ignored(self, image: Path, tmp_path: Path) -> None:
        assert self.zeroes_written(image, tmp_path, "--discard", "ignore") == [0, 0]

    def test_zeroes_detected(self, image: Path, tmp_path: Path) -> None:
        flags, _ = self.zeroes_written(image, tmp_path, "--detect-zeroes", "on")
        assert flags & AllocationFlag.ZERO

    def test_zeroes_detected_and_given_back(self, image: Path, tmp_path: Path) -> None:
        assert self.zeroes_written(image, tmp_path, "--detect-zeroes", "unmap") == [self.HOLE, self.HOLE]

    def test_read_only(self, image: Path, tmp_path: Path) -> None:
        """Writes are refused one by one, and the file stays as it is."""
        before = image.read_bytes(), image.stat().st_mtime_ns

        async def work(client: NbdClient) -> None:
            for request in (
                client.write(0, b"x" * 100_000),
                client.write_zeroes(0, CLUSTER),
                client.trim(0, CLUSTER),
            ):
                with pytest.raises(NbdError) as refused:
                    await request
                assert refused.value.errno == errno.EPERM
            assert await client.read(0, 10) == bytes(10)
            await client.flush()

        with started(*argv(image, "-r", "-k", tmp_path / "s"), lines=5) as (process, _):
            talk(tmp_path / "s", work)
            assert ended(process) == (0, "")
        assert (image.read_bytes(), image.stat().st_mtime_ns) == before


class TestFullDisk:
    """The host refuses to let the file grow: a limit on the process stands in for a full disk."""

    def limit(self, process: subprocess.Popen[str], size: int) -> None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def test_only_what_needs_space_fails(self, image: Path, tmp_path: Path) -> None:
        with started(*argv(image, "-k", tmp_path / "s"), lines=5) as (process, _):

            async def work(client: NbdClient) -> None:
                await client.write(0, b"a" * CLUSTER)
                await client.flush()
                self.limit(process, image.stat().st_size)
                with pytest.raises(NbdError) as refused:
                    await client.write(20 * CLUSTER, b"b" * 4 * CLUSTER)
                assert refused.value.errno == errno.ENOSPC
                # What is there can be read, and written in place.
                await client.write(10, b"c", fua=True)
                assert await client.read(0, 20) == b"a" * 10 + b"c" + b"a" * 9
                assert await client.read(20 * CLUSTER, 4 * CLUSTER) == bytes(4 * CLUSTER)
                # And once there is space again, it works again.
                self.limit(process, resource.RLIM_INFINITY)
                await client.write(20 * CLUSTER, b"d" * CLUSTER, fua=True)

            talk(tmp_path / "s", work)
            status, errors = ended(process)
        assert status == 0
        (line,) = errors.splitlines()
        who = f"unix pid {os.getpid()} uid {os.getuid()}: export ''"
        assert line.startswith(f"nbdbm: {who}: Write at {20 * CLUSTER} of {4 * CLUSTER} bytes failed: ")
        # A write that failed counts as dirty: part of it may have been done.
        assert state(image)["b"] == ("usable", 5 * GRANULARITY)
        assert command("check", image).startswith("no errors")
        assert content(image, 20 * CLUSTER, 1) == b"d"

    def test_bitmaps_that_cannot_be_stored(self, image: Path, tmp_path: Path) -> None:
        """The data is safe, the bitmaps stay marked as in use, and the status says it."""
        with started(*argv(image, "-k", tmp_path / "s"), lines=5) as (process, _):

            async def work(client: NbdClient) -> None:
                await client.write(0, b"a" * CLUSTER)
                await client.flush()
                self.limit(process, image.stat().st_size)

            talk(tmp_path / "s", work)
            status, errors = ended(process)
        assert status == 1
        (line,) = errors.splitlines()
        assert line == (
            f"nbdbm: {image}: the bitmaps could not be stored: File too large; they stay marked as in use,"
            " the data is safe"
        )
        assert {kind for kind, _ in state(image).values()} == {"inconsistent"}
        assert content(image, 0, CLUSTER) == b"a" * CLUSTER
        done = run(*argv(image, "--run", "true"))
        assert "bitmap 'b' is not served" in done.stderr
        assert f"nbdbm bitmap remove {image} b" in done.stderr


def without_privileges() -> None:
    """In the child: permissions hold for root too (PR_CAPBSET_DROP of CAP_DAC_OVERRIDE)."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


class TestRefusals:
    def test_a_file_that_may_only_be_read(self, image: Path, tmp_path: Path) -> None:
        image.chmod(0o400)

        def tried(*options: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                argv(image, "--run", "true", *options),
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                env=environment(),
                preexec_fn=without_privileges,
            )

        done = tried()
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"nbdbm: {image}: cannot be opened for writing: Permission denied;"
            " --read-only serves it as it is\n"
        )
        assert tried("--read-only").returncode == 0

    def test_an_image_that_is_being_written(self, image: Path, tmp_path: Path) -> None:
        with started(*argv(image, "-k", tmp_path / "s"), lines=5) as (process, _):
            for options in ([], ["-r"]):
                done = run(*argv(image, "-k", tmp_path / "other", *options))
                assert (done.returncode, done.stdout) == (1, "")
                assert done.stderr.startswith(
                    f"nbdbm: {image}: in use for writing by process {process.pid} (python"
                )
                assert done.stderr.count("\n") == 1
                assert not (tmp_path / "other").exists()
            result = CliRunner().invoke(main, ["bitmap", "remove", str(image), "b"])
            assert result.exit_code == 1 and "in use for writing by" in result.stderr
            # The one that holds it goes on undisturbed.
            talk(tmp_path / "s", write_two)
            assert ended(process) == (0, "")
        assert state(image)["b"] == ("usable", 2 * GRANULARITY)

    def test_an_image_that_is_being_read(self, image: Path, tmp_path: Path) -> None:
        with started(*argv(image, "-r", "-k", tmp_path / "s"), lines=5) as (process, _):
            done = run(*argv(image, "-k", tmp_path / "other"))
            assert done.returncode == 1
            assert f"by process {process.pid} (python" in done.stderr and done.stderr.count("\n") == 1
            assert run(*argv(image, "-r", "--run", "true")).returncode == 0
            assert ended(process) == (0, "")

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (["-p", "0", "-U"], "--force-share is for reading only; say --read-only"),
            (["--detect-zeroes", "unmap", "--discard", "ignore"], "--detect-zeroes unmap excludes"),
        ],
    )
    def test_one_line(self, image: Path, options: list[str], text: str) -> None:
        done = run(*argv(image, *options))
        assert (done.returncode, done.stdout) == (1, "")
        assert text in done.stderr and done.stderr.count("\n") == 1


def test_killed(image: Path, tmp_path: Path) -> None:
    """Nothing was stored: the next server keeps the disk and distrusts the bitmaps."""
    with started(*argv(image, "-k", tmp_path / "s"), lines=5) as (process, _):
        talk(tmp_path / "s", write_two)
        process.kill()
        process.wait(TIMEOUT)
    assert (tmp_path / "s").exists()
    assert {kind for kind, _ in state(image).values()} == {"inconsistent"}
    # On the same path, over the socket that was left behind.
    with started(*argv(image, "-k", tmp_path / "s")) as (process, said):
        assert said[1:] == ["context: base:allocation", "context: qemu:allocation-depth"]

        async def work(client: NbdClient) -> None:
            assert await client.read(100, 10) == b"x" * 10

        talk(tmp_path / "s", work)
        status, errors = ended(process)
        assert status == 0 and errors.count("is not served: it is inconsistent") == 2
