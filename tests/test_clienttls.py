"""Our client by TLS to our server: whom it believes, what it shows, and one clear line for what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import shutil
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdbm.client import NbdClient
from nbdbm.clienttls import ClientTls
from nbdbm.config import TlsConfig
from nbdbm.errors import NbdError, UsageError
from nbdbm.nbd.constants import Opt, Rep
from nbdbm.nbd.messages import CLIENT_FLAGS, Greeting, OptionReply
from nbdbm.server.tls import Credentials
from nbdbm.uri import NbdUri, UriTls, parse
from tests.server.memimage import WritableImage
from tests.server.running import run, running
from tests.support import diskserver
from tests.support.certificates import Authority, Pki, openssl

DATA = bytes(range(256)) * 16384
"""4 MiB: several pieces of what TLS encrypts at a time."""


@contextlib.asynccontextmanager
async def serving(
    place: Path, certificates: Path, mode: str = "require", *, verify_peer: bool = False
) -> AsyncIterator[NbdUri]:
    credentials = Credentials(TlsConfig(mode=mode, certificates=str(certificates), verify_peer=verify_peer))
    async with running(WritableImage(DATA), place) as (server, path):
        server.tls = credentials
        yield NbdUri("nbds+unix", socket=path)


def trusting(uri: NbdUri, directory: Path | None, **options: Any) -> NbdUri:
    named = None if directory is None else str(directory)
    return replace(uri, tls=UriTls(certificates=named, **options))


async def refused(uri: NbdUri, kind: type[Exception] = NbdError) -> str:
    """What the client says, without the URI; the connection, too, is gone."""
    with pytest.raises(kind) as caught:
        await NbdClient.connect(uri, timeout=20)
    text = str(caught.value)
    assert text.startswith(f"{uri}: ") and "\n" not in text
    return text.removeprefix(f"{uri}: ")


@pytest.mark.parametrize("mode", ["on", "require"])
def test_reads_and_writes(pki: Pki, tmp_path: Path, mode: str) -> None:
    async def main() -> None:
        async with serving(tmp_path, pki.server, mode) as uri:
            uri = trusting(uri, pki.anonymous, hostname="localhost")
            async with await NbdClient.connect(str(uri), contexts=["base:allocation"]) as client:
                assert client._link._tunnel is not None
                assert client._link._tunnel.tls.version() in ("TLSv1.2", "TLSv1.3")
                assert bytes(await client.read(0, len(DATA))) == DATA
                await client.write(1000, DATA[:3_000_000])
                await client.flush()
                parts = await asyncio.gather(*(client.read(at, 65536) for at in range(0, 1 << 20, 65536)))
                assert b"".join(parts) == DATA[:1000] + DATA[: (1 << 20) - 1000]
                (extents,) = (await client.block_status(0, len(DATA))).values()
                assert sum(extent.length for extent in extents) == len(DATA)

    run(main)


def test_over_tcp_the_host_is_the_name(pki: Pki, tmp_path: Path) -> None:
    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def main() -> None:
        async with serving(tmp_path, pki.server) as uri:

            async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                there = await asyncio.open_unix_connection(uri.socket)
                await asyncio.gather(pipe(reader, there[1]), pipe(there[0], writer))

            async with await asyncio.start_server(forward, "127.0.0.1", 0) as proxy:
                port = proxy.sockets[0].getsockname()[1]
                for host in ("localhost", "127.0.0.1"):
                    target = trusting(NbdUri("nbds", host, port), pki.anonymous)
                    async with await NbdClient.connect(target) as client:
                        assert client.size == len(DATA)
                wrong = trusting(NbdUri("nbds", "127.0.0.1", port), pki.anonymous, hostname="vault.example")
                assert "not valid for 'vault.example'" in await refused(wrong)

    run(main)


def test_our_certificate(pki: Pki, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, pki.server, verify_peer=True) as uri:
            async with await NbdClient.connect(trusting(uri, pki.client)) as client:
                assert bytes(await client.read(0, 4)) == DATA[:4]
            text = await refused(trusting(uri, pki.anonymous))
            assert "certificate required" in text or "may want a client's certificate" in text

    run(main)


class TestWhomItBelieves:
    def told(self, place: Path, server: Path, directory: Path | None, **options: Any) -> str:
        found = ""

        async def main() -> None:
            nonlocal found
            async with serving(place, server) as uri:
                uri = trusting(uri, directory, **options)
                try:
                    async with await NbdClient.connect(uri, timeout=20) as client:
                        assert bytes(await client.read(0, 4)) == DATA[:4]
                except NbdError:
                    found = await refused(uri)

        run(main)
        return found

    def test_another_authority(self, pki: Pki, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        (other / "ca-cert.pem").write_text(Authority(tmp_path / "authority", "Another").certificate)
        text = self.told(tmp_path, pki.server, other)
        assert text.startswith("TLS: certificate verify failed: ")
        assert text.endswith(f"; trusted: {other}/ca-cert.pem")
        assert self.told(tmp_path, pki.server, other, verify_peer=False) == ""

    def test_the_systems_authorities(self, pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text = self.told(tmp_path, pki.server, None)
        assert text.endswith("; trusted: the system's authorities (tls-certificates=DIR names others)")
        # As an administrator would add one.
        monkeypatch.setenv("SSL_CERT_FILE", str(pki.anonymous / "ca-cert.pem"))
        assert self.told(tmp_path, pki.server, None) == ""

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"end": "20250101000000Z"}, "certificate has expired"),
            ({"start": "20900101000000Z"}, "certificate is not yet valid"),
        ],
        ids=["expired", "not-yet"],
    )
    def test_out_of_date(self, pki: Pki, tmp_path: Path, options: dict[str, str], says: str) -> None:
        server = pki.authority.issue("server", tmp_path / "late", **options)
        assert self.told(tmp_path, server, pki.anonymous) == f"TLS: certificate verify failed: {says}"
        assert self.told(tmp_path, server, pki.anonymous, verify_peer=False) == ""

    def test_the_name(self, pki: Pki, tmp_path: Path) -> None:
        """On a Unix socket any name will do, unless one is given."""
        server = pki.authority.issue("server", tmp_path / "vault", names="DNS:vault.example")
        assert self.told(tmp_path, server, pki.anonymous) == ""
        assert self.told(tmp_path, server, pki.anonymous, hostname="vault.example") == ""
        text = self.told(tmp_path, server, pki.anonymous, hostname="localhost")
        assert text.startswith("TLS: certificate verify failed: Hostname mismatch")
        assert self.told(tmp_path, server, pki.anonymous, hostname="localhost", verify_peer=False) == ""

    def test_a_clients_certificate_is_no_servers(self, pki: Pki, tmp_path: Path) -> None:
        server = Path(shutil.copytree(pki.client, tmp_path / "posing"))
        for kind in ("cert", "key"):
            (server / f"client-{kind}.pem").rename(server / f"server-{kind}.pem")
        assert "certificate verify failed" in self.told(tmp_path, server, pki.anonymous)

    def test_revoked(self, tmp_path: Path) -> None:
        authority = Authority(tmp_path / "authority")
        server = authority.issue("server", tmp_path / "server")
        trusted = tmp_path / "trusted"
        trusted.mkdir()
        (trusted / "ca-cert.pem").write_text(authority.certificate)
        (trusted / "ca-crl.pem").write_text(authority.revoke())
        assert self.told(tmp_path, server, trusted) == ""
        (trusted / "ca-crl.pem").write_text(authority.revoke(server / "server-cert.pem"))
        assert self.told(tmp_path, server, trusted) == "TLS: certificate verify failed: certificate revoked"


def made(directory: Path | str, **options: Any) -> str:
    """What is wrong with a URI's files."""
    uri = NbdUri("nbds", "h", 1, tls=UriTls(certificates=str(directory), **options))
    with pytest.raises(UsageError) as caught:
        ClientTls(uri)
    text = str(caught.value)
    assert text.startswith(f"{uri}: ") and "\n" not in text
    return text.removeprefix(f"{uri}: ")


class TestFiles:
    def test_missing(self, pki: Pki, tmp_path: Path) -> None:
        nowhere = tmp_path / "nowhere"
        assert made(nowhere) == f"{nowhere}/ca-cert.pem: No such file or directory"
        assert made(nowhere, verify_peer=False) == f"{nowhere}: no directory of certificates"
        place = Path(shutil.copytree(pki.client, tmp_path / "half"))
        (place / "client-key.pem").unlink()
        assert made(place) == f"{place}/client-key.pem: No such file or directory"

    def test_an_empty_directory_does_where_nothing_is_verified(self, tmp_path: Path) -> None:
        tls = ClientTls(NbdUri("nbds", "h", 1, tls=UriTls(certificates=str(tmp_path), verify_peer=False)))
        assert tls.context.verify_mode is ssl.CERT_NONE

    def test_garbage(self, pki: Pki, tmp_path: Path) -> None:
        place = Path(shutil.copytree(pki.client, tmp_path / "garbage"))
        (place / "client-cert.pem").write_text("garbage\n")
        assert made(place) == f"{place}/client-cert.pem: holds no certificate in PEM"
        (place / "ca-cert.pem").write_text("garbage\n")
        assert made(place).startswith(f"{place}/ca-cert.pem: cannot be used: ")

    def test_encrypted_key(self, pki: Pki, tmp_path: Path) -> None:
        place = Path(shutil.copytree(pki.client, tmp_path / "locked"))
        key = str(place / "client-key.pem")
        openssl(tmp_path, "pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", "locked.pem")
        shutil.copyfile(tmp_path / "locked.pem", key)
        assert made(place).startswith(f"{key}: is encrypted")

    def test_what_is_no_name(self, pki: Pki) -> None:
        assert made(pki.anonymous, hostname=".example") == "'.example' cannot be the name in a certificate"


class TestServers:
    """That have no TLS, or break it."""

    def test_without_tls(self, pki: Pki, tmp_path: Path) -> None:
        async def main() -> None:
            async with running(WritableImage(DATA), tmp_path) as (_, path):
                text = await refused(trusting(NbdUri("nbds+unix", socket=path), pki.anonymous))
                assert text.startswith("the server refuses TLS: ")

        run(main)

    def test_it_wants_tls_and_we_do_not(self, pki: Pki, tmp_path: Path) -> None:
        async def main() -> None:
            async with serving(tmp_path, pki.server) as uri:
                text = await refused(NbdUri.unix(uri.socket))
                assert text == "the server requires TLS: nbds:// or nbds+unix://"

        run(main)

    @pytest.mark.parametrize(
        ("after", "says"),
        [
            (None, "handshake: no answer within 0.3 s"),
            (b"", "TLS: the peer closed the connection during TLS's handshake"),
            (b"\x15\x03\x03\x00\x02\x02\x28", "TLS: "),
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "TLS: "),
        ],
        ids=["silence", "closed", "alert", "garbage"],
    )
    def test_broken(self, pki: Pki, tmp_path: Path, after: bytes | None, says: str) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(Greeting.newstyle(3).pack())
            await reader.readexactly(CLIENT_FLAGS.size + 16)
            writer.write(OptionReply.pack(Opt.STARTTLS, Rep.ACK))
            await reader.read(5)
            if after is not None:
                writer.write(after)
                writer.write_eof()
            await reader.read()

        async def main() -> None:
            async with diskserver.serving(tmp_path, serve) as plain:
                uri = trusting(plain.with_tls(), pki.anonymous)
                with pytest.raises(NbdError) as caught:
                    await NbdClient.connect(uri, timeout=0.3 if after is None else 20)
                assert str(caught.value).startswith(f"{uri}: {says}")
                assert "\n" not in str(caught.value)

        run(main)

    def test_plain_text_before_tls(self, pki: Pki, tmp_path: Path) -> None:
        """Somebody on the way adds an answer to what we have not asked yet."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(Greeting.newstyle(3).pack())
            await reader.readexactly(CLIENT_FLAGS.size + 16)
            answers = [OptionReply.pack(option, Rep.ACK) for option in (Opt.STARTTLS, Opt.EXTENDED_HEADERS)]
            writer.write(b"".join(answers))
            assert await reader.read() == b"", "the client went on"

        async def main() -> None:
            async with diskserver.serving(tmp_path, serve) as plain:
                text = await refused(trusting(plain.with_tls(), pki.anonymous))
                assert "plain text after it agreed to TLS" in text

        run(main)


def test_the_server_goes_away(pki: Pki, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, pki.server) as uri:
            client = await NbdClient.connect(trusting(uri, pki.anonymous))
        with pytest.raises(NbdError) as caught:
            await client.read(0, 4)
        assert str(caught.value).startswith(f"{client.uri}: ")
        await client.close()

    run(main)


class TestKeys:
    def made(self, path: Path, user: str = "") -> str:
        uri = parse(f"nbds://{user}h/?tls-psk-file={path}")
        with pytest.raises(UsageError) as caught:
            ClientTls(uri)
        return str(caught.value).removeprefix(f"{uri}: ")

    def test_python_without_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(ssl.SSLContext, "set_psk_client_callback", raising=False)
        text = self.made(tmp_path / "keys")
        assert text == "tls-psk-file: needs Python 3.13 or newer; tls-certificates does not"

    def test_whose(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[Any] = []

        def take(context: ssl.SSLContext, callback: Any) -> None:
            given.append(callback(None))

        monkeypatch.setattr(ssl.SSLContext, "set_psk_client_callback", take, raising=False)
        keys = tmp_path / "keys"
        keys.write_text(f"alice:00ff\n{getpass.getuser()}:01\n")
        keys.chmod(0o600)
        for user in ("alice@", ""):
            tls = ClientTls(parse(f"nbds://{user}h/?tls-psk-file={keys}"))
            # A server that shows a certificate instead is believed nothing.
            assert tls.context.verify_mode is ssl.CERT_REQUIRED
            assert tls.context.cert_store_stats()["x509"] == 0
        assert given == [("alice", b"\0\xff"), (getpass.getuser(), b"\1")]
        assert self.made(keys, "bob@") == f"{keys}: holds no key of 'bob'"
        assert self.made(tmp_path / "none") == f"{tmp_path}/none: No such file or directory"
