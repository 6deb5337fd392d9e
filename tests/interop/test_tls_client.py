"""Our own client by TLS to servers of others: ``nbdbm map`` for ``nbds`` URIs; and to our own."""

from __future__ import annotations

import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support import images, qemu, servers
from tests.support.certificates import Authority, Pki
from tests.support.marks import requires

pytestmark = [requires("openssl", "qemu-img", "qemu-io", "qemu-nbd", "nbdkit", "newer")]

CONTEXTS = ["base:allocation", "qemu:dirty-bitmap:fine"]


def secured(uri: str, directory: Path, **parameters: str) -> str:
    """A plain Unix socket's URI by TLS, with certificates of the ``directory``."""
    asked = {"tls-certificates": str(directory)} | {
        key.replace("_", "-"): value for key, value in parameters.items()
    }
    return (
        "nbds" + uri.removeprefix("nbd") + "".join(f"&{key}={quote(value)}" for key, value in asked.items())
    )


def mapped(target: object, *options: object) -> str:
    done = servers.nbdbm_run("map", "--json", *options, target)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def refused(uri: str) -> str:
    """The one line that says why not, behind the URI."""
    done = servers.nbdbm_run("map", uri)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"nbdbm: {uri}: ")
    return line.removeprefix(f"nbdbm: {uri}: ")


def credentials(directory: Path, *, verify: bool = False) -> tuple[str, ...]:
    """qemu-nbd's options for TLS."""
    peer = "yes" if verify else "no"
    made = f"tls-creds-x509,id=tls,dir={directory},endpoint=server,verify-peer={peer}"
    return "--object", made, "--tls-creds", "tls"


def test_qemu_nbd(gallery: images.Gallery, pki: Pki, tools: qemu.Tools) -> None:
    """It asks for a certificate, and has bitmaps."""
    case = gallery.get("bitmaps")
    options = credentials(pki.server, verify=True)
    with servers.qemu_nbd(case.path, *options, bitmaps=case.bitmaps, tools=tools) as server:
        uri = secured(server.uri, pki.client, tls_hostname="localhost")
        for context in CONTEXTS:
            assert mapped(uri, "--context", context) == mapped(case.path, "--context", context)
        text = refused(secured(server.uri, pki.anonymous))
        assert "certificate required" in text or "may want a client's certificate" in text
        assert "TLS" in refused(server.uri)


def test_qemu_nbd_that_is_not_to_be_believed(gallery: images.Gallery, pki: Pki, tmp_path: Path) -> None:
    case = gallery.get("bitmaps")
    other = tmp_path / "other"
    other.mkdir()
    (other / "ca-cert.pem").write_text(Authority(tmp_path / "authority", "Another").certificate)
    with servers.qemu_nbd(case.path, *credentials(pki.server)) as server:
        text = refused(secured(server.uri, other))
        assert text.startswith("TLS: certificate verify failed: ") and text.endswith(f"{other}/ca-cert.pem")
        wrong = secured(server.uri, pki.anonymous, tls_hostname="vault.example")
        assert "not valid for 'vault.example'" in refused(wrong)
        unverified = secured(server.uri, other, tls_hostname="vault.example", tls_verify_peer="false")
        assert mapped(unverified) == mapped(case.path)


def test_qemu_nbd_without_tls(gallery: images.Gallery, pki: Pki) -> None:
    with servers.qemu_nbd(gallery.get("bitmaps").path) as server:
        assert refused(secured(server.uri, pki.anonymous)).startswith("the server refuses TLS: ")


def nbdkit(*options: object) -> list[str]:
    return qemu.SYSTEM.argv("nbdkit", "-f", "-r", *options)


def test_nbdkit_on_tcp(pki: Pki, unused_port: int, tmp_path: Path) -> None:
    """The name in the certificate is the host's, or its address."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20) + b"x" * (1 << 20))
    tls = ["--tls=require", f"--tls-certificates={pki.server}", "--tls-verify-peer"]
    argv = nbdkit("-i", "127.0.0.1", "-p", unused_port, *tls, "file", disk)
    with servers.on_tcp(argv, unused_port):
        for host in ("localhost", "127.0.0.1"):
            uri = f"nbds://{host}:{unused_port}/?tls-certificates={pki.client}"
            assert mapped(uri) == mapped(disk, "--format", "raw")
        assert "requires TLS" in refused(f"nbd://127.0.0.1:{unused_port}")


@pytest.mark.parametrize("late", [False, True], ids=["foreign", "expired"])
def test_nbdkit_that_is_not_to_be_believed(pki: Pki, tmp_path: Path, late: bool) -> None:
    place = tmp_path / "server"
    if late:
        pki.authority.issue("server", place, start="20200101000000Z", end="20210101000000Z")
    else:
        Authority(tmp_path / "authority", "Another").issue("server", place)

    def argv(path: str) -> list[str]:
        return nbdkit("-U", path, "--tls=require", f"--tls-certificates={place}", "memory", "1M")

    with servers.started(argv) as server:
        text = refused(secured(server.uri, pki.anonymous))
        assert text.startswith("TLS: certificate verify failed: ")
        if late:
            assert text.endswith("certificate has expired")
        assert mapped(secured(server.uri, pki.anonymous, tls_verify_peer="false"))


def test_our_own(gallery: images.Gallery, pki: Pki, unused_port: int) -> None:
    """By TLS the map is what it is in plain text, and what the image's own is."""
    case = gallery.get("bitmaps")
    options = ["--read-only", "--tls-certificates", pki.server, "--tls-verify-peer", case.path]
    listen = ["--bind", "127.0.0.1", "--port", unused_port]
    with (
        servers.nbdbm(case.path) as plain,
        servers.on_tcp([*servers.NBDBM, "serve", *map(str, [*listen, *options])], unused_port),
    ):
        uri = f"nbds://localhost:{unused_port}/?tls-certificates={pki.client}"
        for context in CONTEXTS:
            expected = mapped(case.path, "--context", context)
            assert mapped(uri, "--context", context) == mapped(plain.uri, "--context", context) == expected
        for form in ((), ("--totals",), ("--picture",)):
            found = [
                servers.nbdbm_run("map", *form, target, check=True).stdout for target in (uri, plain.uri)
            ]
            assert found[0].replace(uri, plain.uri) == found[1]


CONNECT = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from nbdbm.client import NbdClient
async def main():
    async with await NbdClient.connect(sys.argv[2], timeout=20) as client:
        print(client.size)
try:
    asyncio.run(main())
except Exception as error:
    print(error)
"""


def test_a_key_instead_of_certificates(pki: Pki, tmp_path: Path) -> None:
    """With Debian 13's Python. Who has no such key is not believed, whatever certificate it shows."""
    tools = qemu.newer()
    for name, key in (("keys", "00112233445566778899aabbccddeeff"), ("wrong", "ff" * 16)):
        (tmp_path / name).write_text(f"alice:{key}\n")
        (tmp_path / name).chmod(0o600)
    found = {}
    for kind in (f"--tls-psk={tmp_path}/keys", f"--tls-certificates={pki.server}"):
        with servers.started(
            lambda path, kind=kind: nbdkit("-U", path, "--tls=require", kind, "memory", "1M")
        ) as s:  # type: ignore[misc]
            for name in ("keys", "wrong"):
                uri = f"nbds+unix://alice@/?socket={s.socket}&tls-psk-file={tmp_path}/{name}"
                done = subprocess.run(
                    [*tools.python(), "-c", CONNECT, str(Path(__file__).parents[2]), uri],
                    env=tools.python_environment(),
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=False,
                )
                found[kind[:9], name] = done.stdout.removeprefix(f"{uri}: ")
    assert found.pop(("--tls-psk", "keys")) == "1048576\n"
    assert len(found) == 3 and all(text.startswith("TLS: ") for text in found.values()), found
