"""Many exports in one process: from the command line, a file, a directory; reloads."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbdbm.client import NbdClient
from nbdbm.errors import NbdError
from nbdbm.uri import NbdUri
from tests.cli.program import (
    SERVE,
    TIMEOUT,
    ended,
    eventually,
    first_byte,
    qcow2,
    raw,
    served,
    started,
    write_byte,
)
from tests.support.servers import nbdbm_run


def reload(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGHUP)


class TestCommandLine:
    def test_several_images(self, tmp_path: Path) -> None:
        a, b, path = raw(tmp_path / "a.img", "a"), raw(tmp_path / "b.img", "b"), tmp_path / "s"
        command = (*SERVE, "-r", "-f", "raw", "-k", str(path), str(a), f"second={b}")
        with started(*command, lines=6) as (process, said):
            assert said == [
                f"nbd+unix:///a.img?socket={path}",
                "context: base:allocation",
                "context: qemu:allocation-depth",
                f"nbd+unix:///second?socket={path}",
                "context: base:allocation",
                "context: qemu:allocation-depth",
            ]
            assert first_byte(path, "a.img") == b"a" and first_byte(path, "second") == b"b"
            with pytest.raises(NbdError, match="no export"):
                first_byte(path, str(a))
            assert ended(process) == (0, "")

    def test_a_name_for_the_only_one(self, tmp_path: Path) -> None:
        image, path = raw(tmp_path / "a=b.img", "a"), tmp_path / "s"
        with started(*SERVE, "-r", "-f", "raw", "-k", str(path), f"n={image}", lines=1) as (_, said):
            assert said == [f"nbd+unix:///n?socket={path}"]
        with started(*SERVE, "-r", "-f", "raw", "-k", str(path), str(image), lines=1) as (_, said):
            assert said == [f"nbd+unix:///?socket={path}"]

    @pytest.mark.parametrize(
        ("arguments", "status", "text"),
        [
            ([], 2, "Missing argument"),
            (["x="], 1, "IMAGE 'x=': the path is empty"),
            (["a", "sub/a"], 1, "export name 'a' is used twice; NAME=IMAGE gives another one"),
            (["x=a", "-x", "y"], 1, "--export-name y: the image has a name already, in x=a"),
            (["a", "b", "-x", "y"], 1, "--export-name y: is for one image; with several, name them"),
            (["a", "--grace", "3"], 1, "--grace is for --directory"),
            (["a", "--config", "c"], 1, "--config excludes IMAGEs and --directory"),
            (["--config", "c", "-r"], 1, "--config excludes --read-only: write it into the file"),
            (["--config", "c"], 1, "c: No such file or directory"),
            (["-p", "0", "--directory", "nowhere"], 1, "nowhere: No such file or directory"),
            (["a", "-k", "@s"], 1, "--socket @s: abstract sockets are not supported"),
            (["a", "-k", "s", "--socket-mode", "9"], 2, "'9': not permissions in octal"),
            (["a", "-k", "s", "--socket-owner", "nobody-of-this-name"], 1, "no user 'nobody-of-this-name'"),
        ],
    )
    def test_refusals(self, arguments: list[str], status: int, text: str) -> None:
        result = nbdbm_run("serve", *arguments)
        assert result.returncode == status and text in result.stderr
        assert "Traceback" not in result.stderr

    def test_mode_and_owner_of_the_socket(self, tmp_path: Path) -> None:
        image, path = raw(tmp_path / "a", "a"), tmp_path / "s"
        options = ("--socket-mode", "0640", "--socket-owner", f"{os.getuid()}:{os.getgid()}")
        with started(*SERVE, "-r", "-f", "raw", "-k", str(path), *options, str(image)):
            found = path.stat()
            assert stat.S_IMODE(found.st_mode) == 0o640
            assert (found.st_uid, found.st_gid) == (os.getuid(), os.getgid())


def test_a_public_address_without_encryption_is_warned_of(tmp_path: Path) -> None:
    image = raw(tmp_path / "a", "a")
    with started(*SERVE, "-r", "-f", "raw", "-b", "*", "-p", "0", str(image), lines=1) as (process, said):
        status, errors = ended(process)
    assert status == 0
    assert errors.startswith(f"nbdbm: {said[0]}: other machines can reach this")


class TestDirectory:
    def test_opened_when_asked_for_and_closed_afterwards(self, tmp_path: Path) -> None:
        place, path = tmp_path / "images", tmp_path / "s"
        place.mkdir()
        image = qcow2(place / "disk.qcow2", "b0")
        before = image.read_bytes()
        command = (*SERVE, "-k", str(path), "--directory", str(place), "--grace", "0")
        with started(*command, lines=1) as (process, said):
            assert said == [f"nbd+unix:///?socket={path}"]
            assert image.read_bytes() == before
            write_byte(path, "disk.qcow2")
            # Closed: somebody else may write to it, and the bitmap was stored.
            eventually(lambda: nbdbm_run("bitmap", "clear", image, "b0").returncode == 0)
            qcow2(place / "second.qcow2")
            eventually(lambda: served(path, "second.qcow2"))
            for name in ("", "../disk.qcow2", str(image), "images/disk.qcow2", "disk.qcow2/"):
                assert not served(path, name)
            assert ended(process) == (0, "")

    def test_a_broken_image_is_one_line_and_the_others_are_served(self, tmp_path: Path) -> None:
        place, path = tmp_path / "images", tmp_path / "s"
        place.mkdir()
        qcow2(place / "good.qcow2")
        (place / "bad.qcow2").write_bytes(b"QFI\xfb" + bytes(200))
        with started(*SERVE, "-k", str(path), "--directory", str(place), lines=1) as (process, _):
            assert not served(path, "bad.qcow2") and served(path, "good.qcow2")
            status, errors = ended(process)
        assert status == 0
        assert errors.startswith(f"nbdbm: export 'bad.qcow2' cannot be opened: {place}/bad.qcow2: ")
        assert errors.count("\n") == 1


class TestConfig:
    def test_reload_adds_removes_and_changes(self, tmp_path: Path) -> None:
        for letter in "abc":
            raw(tmp_path / letter, letter)
        config, path = tmp_path / "nbdbm.toml", tmp_path / "s"

        def write(*exports: str) -> None:
            tables = "".join(f'[[export]]\nformat = "raw"\n{export}\n' for export in exports)
            config.write_text(f'[listen]\nsocket = "{path}"\n{tables}')

        write('name = "stays"\nimage = "a"', 'name = "goes"\nimage = "b"\nread-only = true')
        with started(*SERVE, "--config", str(config), lines=6) as (process, said):
            assert said[0] == f"nbd+unix:///stays?socket={path}"

            async def main() -> None:
                """A client of the one that stays; one of the other is sent away."""
                uri = NbdUri.unix
                async with await NbdClient.connect(str(uri(str(path), "stays"))) as stays:
                    goes = await NbdClient.connect(str(uri(str(path), "goes")))
                    assert await goes.read(0, 1) == b"b"
                    write('name = "stays"\nimage = "a"\ndescription = "new"', 'name = "comes"\nimage = "c"')
                    reload(process)
                    with pytest.raises(NbdError):
                        while True:
                            await goes.read(0, 1)
                            await asyncio.sleep(0.01)
                    await goes.close()
                    assert await stays.read(0, 1) == b"a"

            asyncio.run(asyncio.wait_for(main(), TIMEOUT))
            eventually(lambda: served(path, "comes"))
            assert not served(path, "goes") and first_byte(path, "comes") == b"c"
            # With a mistake, everything stays as it is.
            write('name = "comes"\nimage = 5')
            reload(process)
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line == f"nbdbm: not reloaded: {config}: line 6: export.1.image: must be a string\n"
            assert first_byte(path, "comes") == b"c"
            write('name = "stays"\nimage = "c"\nread-only = true')
            reload(process)
            eventually(lambda: not served(path, "comes"))
            eventually(lambda: served(path, "stays") and first_byte(path, "stays") == b"c")
            assert ended(process) == (0, "")

    def test_one_bad_image_does_not_keep_the_others_from_being_served(self, tmp_path: Path) -> None:
        config, path = tmp_path / "nbdbm.toml", tmp_path / "s"
        good = qcow2(tmp_path / "good.qcow2")
        config.write_text(
            f'[listen]\nsocket = "{path}"\n[[export]]\nname = "bad"\nimage = "missing.qcow2"\n'
            f'[[export]]\nname = "good"\nimage = "{good}"\n'
        )
        with started(*SERVE, "--config", str(config), lines=2) as (process, said):
            assert said == [f"nbd+unix:///bad?socket={path}", f"nbd+unix:///good?socket={path}"]
            assert served(path, "good") and not served(path, "bad")
            qcow2(tmp_path / "missing.qcow2")
            eventually(lambda: served(path, "bad"))
            status, errors = ended(process)
        assert status == 0
        assert errors == (
            f"nbdbm: export 'bad' cannot be opened: {tmp_path}/missing.qcow2: "
            "cannot be opened: No such file or directory\n"
        )

    def test_the_event_loop_does_not_wait_for_a_reload(self, tmp_path: Path) -> None:
        """Reading anew hangs here until a client has come and been served."""
        config, path = tmp_path / "nbdbm.toml", tmp_path / "s"
        raw(tmp_path / "a", "a")
        config.write_text(
            f'[listen]\nsocket = "{path}"\n[[export]]\nimage = "a"\nformat = "raw"\nread-only = true\n'
        )
        script = (
            "import os, sys, time; import nbdbm.configfile as file; load = file.load; begun = []\n"
            "def slow(*values):\n"
            "    while begun and not os.path.exists('go'):\n"
            "        open('waits', 'w').close()\n"
            "        time.sleep(0.01)\n"
            "    begun.append(1)\n"
            "    return load(*values)\n"
            "file.load = slow\n"
            "os.chdir(sys.argv.pop(1))\n"
            "from nbdbm.cli import program\n"
            "program()\n"
        )
        command = (sys.executable, "-c", script, str(tmp_path), "serve", "--config", str(config))
        with started(*command, lines=1) as (process, _):
            reload(process)
            eventually((tmp_path / "waits").exists)
            assert first_byte(path, "") == b"a"
            (tmp_path / "go").touch()
            status, errors = ended(process)
        assert status == 0 and "Traceback" not in errors

    def test_options_of_the_command_line_go_first(self, tmp_path: Path) -> None:
        config = tmp_path / "nbdbm.toml"
        raw(tmp_path / "a", "a")
        config.write_text('[listen]\nport = 1\n[[export]]\nimage = "a"\nformat = "raw"\nread-only = true\n')
        with started(*SERVE, "--config", str(config), "-k", str(tmp_path / "s"), lines=1) as (_, said):
            assert said == [f"nbd+unix:///?socket={tmp_path}/s"]

    def test_mistakes_are_named_with_their_lines(self, tmp_path: Path) -> None:
        config = tmp_path / "nbdbm.toml"
        config.write_text("[[export]]\nimage = 5\n[server]\nport = 1\n")
        result = nbdbm_run("serve", "--config", config)
        assert result.returncode == 1
        first, second = result.stderr.splitlines()
        assert first == f"nbdbm: {config}: line 2: export.1.image: must be a string"
        assert second.startswith(f"nbdbm: {config}: line 4: server.port: unknown; keys are ")

    def test_hangup_without_a_file_changes_nothing(self, tmp_path: Path) -> None:
        image, path = raw(tmp_path / "a", "a"), tmp_path / "s"
        with started(*SERVE, "-r", "-f", "raw", "-k", str(path), str(image)) as (process, _):
            reload(process)
            assert first_byte(path, "") == b"a"
            assert ended(process) == (0, "")

    def test_clients_of_what_a_reload_takes_away_are_told_why(self, tmp_path: Path) -> None:
        raw(tmp_path / "a", "a")
        config, path = tmp_path / "nbdbm.toml", tmp_path / "s"
        head = f'[listen]\nsocket = "{path}"\n'
        tables = [f'[[export]]\nname = "{name}"\nimage = "a"\nformat = "raw"\n' for name in ("one", "two")]
        tables = [f"{table}read-only = true\n" for table in tables]
        config.write_text(head + "".join(tables))
        serve = (sys.executable, "-m", "nbdbm", "serve", "--config", str(config), "--log-format", "json")
        with started(*serve, lines=6) as (process, _):

            async def main() -> None:
                clients = [
                    await NbdClient.connect(str(NbdUri.unix(str(path), name))) for name in ("one", "two")
                ]
                config.write_text(head + tables[0].replace("true", 'true\ndiscard = "ignore"'))
                reload(process)
                for client in clients:
                    with pytest.raises(NbdError):
                        while True:
                            await client.read(0, 1)
                            await asyncio.sleep(0.01)
                    await client.close()

            asyncio.run(asyncio.wait_for(main(), TIMEOUT))
            status, errors = ended(process)
        assert status == 0
        lines = [json.loads(line) for line in errors.splitlines()]
        told = {line["export"]: (line["ended"], line["reason"]) for line in lines if line.get("export")}
        assert told == {
            "one": ("export withdrawn", "the export was changed by a reload"),
            "two": ("export withdrawn", "the export was removed by a reload"),
        }

    def test_hangups_while_it_starts_are_seen_to_when_it_serves(self, tmp_path: Path) -> None:
        image, config, path = qcow2(tmp_path / "a", "b0"), tmp_path / "nbdbm.toml", tmp_path / "s"
        names = [shutil.copy(image, tmp_path / str(number)).name for number in range(100)]
        tables = "".join(f'[[export]]\nname = "{name}"\nimage = "{name}"\n' for name in names)
        config.write_text(f'[listen]\nsocket = "{path}"\n{tables}')
        with started(*SERVE, "--config", str(config), lines=0) as (process, _):
            # Bound under another name, and not listening yet: images are being opened.
            eventually(lambda: bool(list(tmp_path.glob(".nbdbm-*"))))
            config.write_text(f'{config.read_text()}[[export]]\nname = "late"\nimage = "{image}"\n')
            sent = 0
            while not path.exists() and process.poll() is None:
                reload(process)
                sent += 1
                time.sleep(0.001)
            assert sent and process.poll() is None
            eventually(lambda: served(path, names[-1]))
            eventually(lambda: served(path, "late"))
            assert ended(process)[0] == 0

    def test_hangups_while_it_ends_cost_no_bitmap(self, tmp_path: Path) -> None:
        image, config, path = qcow2(tmp_path / "a", "b0"), tmp_path / "nbdbm.toml", tmp_path / "s"
        config.write_text(f'[listen]\nsocket = "{path}"\n[[export]]\nimage = "{image}"\n')
        with started(*SERVE, "--config", str(config), lines=1) as (process, _):
            write_byte(path, "")
            config.write_text(config.read_text() + 'detect-zeroes = "on"\n')
            process.send_signal(signal.SIGTERM)
            for _ in range(100):
                if process.poll() is None:
                    process.send_signal(signal.SIGHUP)
                    time.sleep(0.001)
            status, errors = process.wait(TIMEOUT), process.stderr.read() if process.stderr else ""
        assert (status, errors) == (0, "")
        listed = nbdbm_run("bitmap", "list", image, check=True).stdout
        assert "inconsistent" not in listed and "usable" in listed
