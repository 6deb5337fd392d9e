"""Certificates and keys from files, and connections that upgrade to TLS, spoken by Python's own ssl."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdbm.config import ServerConfig, TlsConfig
from nbdbm.errors import NbdError, UsageError
from nbdbm.peer import Peer
from nbdbm.server.server import Server
from nbdbm.server.tls import Credentials, KeyUpgrade, _names
from tests.server.memimage import MemoryImage, WritableImage
from tests.server.rawclient import RawClient
from tests.server.running import run, running, until
from tests.support.certificates import Authority, Pki

STARTTLS = 5
TLS_REQD = 1 << 31 | 5


def copy_of(directory: Path, place: Path) -> Path:
    return Path(shutil.copytree(directory, place / "certificates"))


def config(directory: Path, mode: str = "require", *, verify_peer: bool = False) -> TlsConfig:
    return TlsConfig(mode=mode, certificates=str(directory), verify_peer=verify_peer)


# files


class TestCertificates:
    def refused(self, directory: Path, *, verify_peer: bool = False) -> str:
        with pytest.raises(UsageError) as caught:
            Credentials(config(directory, verify_peer=verify_peer))
        text = str(caught.value)
        assert text.startswith(str(directory)) and "\n" not in text
        return text.removeprefix(str(directory))

    def test_good(self, pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
        Credentials(config(pki.server, verify_peer=True))
        assert caplog.messages == []

    @pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem", "ca-cert.pem"])
    def test_missing(self, pki: Pki, tmp_path: Path, name: str) -> None:
        place = copy_of(pki.server, tmp_path)
        (place / name).unlink()
        with pytest.raises(FileNotFoundError) as caught:
            Credentials(config(place, verify_peer=True))
        assert caught.value.filename == str(place / name)

    def test_authority_is_needed_for_clients_only(self, pki: Pki, tmp_path: Path) -> None:
        place = copy_of(pki.server, tmp_path)
        (place / "ca-cert.pem").unlink()
        Credentials(config(place))

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("server-cert.pem", "/server-cert.pem: holds no certificate in PEM"),
            ("server-key.pem", "/server-key.pem: holds no private key in PEM"),
            ("ca-cert.pem", "/ca-cert.pem: cannot be used: "),
            ("ca-crl.pem", "/ca-crl.pem: holds no x509 crl in PEM"),
        ],
    )
    def test_garbage(self, pki: Pki, tmp_path: Path, name: str, text: str) -> None:
        place = copy_of(pki.server, tmp_path)
        (place / name).write_text("garbage\n")
        (place / name).chmod(0o600)
        assert self.refused(place, verify_peer=True).startswith(text)

    @pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem", "ca-crl.pem"])
    def test_broken_base64(self, pki: Pki, tmp_path: Path, name: str) -> None:
        place = copy_of(pki.server, tmp_path)
        kind = {"server-cert.pem": "CERTIFICATE", "server-key.pem": "PRIVATE KEY", "ca-crl.pem": "X509 CRL"}[
            name
        ]
        (place / name).write_text(f"-----BEGIN {kind}-----\nAAAA\n-----END {kind}-----\n")
        (place / name).chmod(0o600)
        assert "cannot be used: " in self.refused(place, verify_peer=True)

    def test_key_of_another_certificate(self, pki: Pki, tmp_path: Path) -> None:
        place = copy_of(pki.server, tmp_path)
        shutil.copy(pki.client / "client-key.pem", place / "server-key.pem")
        text = self.refused(place)
        assert text == f"/server-key.pem: does not belong to the certificate in {place}/server-cert.pem"

    def test_encrypted_key(self, pki: Pki, tmp_path: Path) -> None:
        place = copy_of(pki.server, tmp_path)
        key = place / "server-key.pem"
        from tests.support.certificates import openssl

        openssl(tmp_path, "pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", "locked")
        shutil.copy(tmp_path / "locked", key)
        assert "is encrypted" in self.refused(place)

    def test_not_a_file(self, pki: Pki, tmp_path: Path) -> None:
        place = copy_of(pki.server, tmp_path)
        (place / "server-key.pem").unlink()
        os.symlink("/dev/zero", place / "server-key.pem")
        assert self.refused(place) == f"/server-key.pem: not a file of at most {16 << 20} bytes"

    def test_key_that_others_can_read(
        self, pki: Pki, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        place = copy_of(pki.server, tmp_path)
        (place / "server-key.pem").chmod(0o640)
        Credentials(config(place))
        (text,) = caplog.messages
        assert (
            text == f"{place}/server-key.pem: others have access to it (mode 640); chmod 600 keeps it secret"
        )

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"end": "20250101000000Z"}, "certificate has expired"),
            ({"start": "20900101000000Z"}, "certificate is not yet valid"),
        ],
        ids=["expired", "not-yet"],
    )
    def test_out_of_date(
        self, pki: Pki, tmp_path: Path, options: dict[str, str], text: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It may be the clock that is wrong: said, and used."""
        place = pki.authority.issue("server", tmp_path / "late", **options)
        Credentials(config(place))
        assert caplog.messages == [f"{place}/server-cert.pem: clients will refuse it: {text}"]

    def test_certificate_for_another_purpose(
        self, pki: Pki, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        place = tmp_path / "wrong"
        place.mkdir()
        for name in ("cert", "key"):
            shutil.copy(pki.client / f"client-{name}.pem", place / f"server-{name}.pem")
        Credentials(config(place))
        (text,) = caplog.messages
        assert "clients will refuse it" in text and "purpose" in text

    def test_reload_keeps_what_is_good(self, pki: Pki, tmp_path: Path) -> None:
        place = copy_of(pki.server, tmp_path)
        credentials = Credentials(config(place))
        before = credentials.begin().context
        (place / "server-cert.pem").write_text("half of a new cert")
        with pytest.raises(UsageError):
            credentials.reload(config(place))
        assert credentials.begin().context is before
        shutil.copy(pki.server / "server-cert.pem", place / "server-cert.pem")
        credentials.reload(config(place))
        assert credentials.begin().context is not before


class TestKeys:
    def test_python_without_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(ssl.SSLContext, "set_psk_server_callback", raising=False)
        with pytest.raises(UsageError, match=r"--tls-psk: needs Python 3\.13 or newer"):
            Credentials(TlsConfig(mode="on", psk=str(tmp_path / "keys")))

    def test_who_names_nobody_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only a resumed session could come to this, and there is none to resume."""

        def nothing(context: ssl.SSLContext, find: object) -> None:
            pass

        monkeypatch.setattr(ssl.SSLContext, "set_psk_server_callback", nothing, raising=False)
        upgrade = KeyUpgrade({"alice": b"k"})
        assert upgrade.context.num_tickets == 0 and upgrade.context.options & ssl.OP_NO_TICKET
        with pytest.raises(NbdError, match="proved no key"):
            upgrade.peer(
                Peer(address="unix"),
                ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="h"),
            )


def test_names() -> None:
    certificate = {
        "subject": (
            (("countryName", "DE"),),
            (("organizationName", "Backup, Inc"), ("organizationalUnitName", "#1")),
            (("commonName", 'a+b"'),),
            (("unknownAttribute", "x "),),
        ),
        "subjectAltName": (("DNS", "b.example"), ("IP Address", "::1"), ("DNS", 'a+b"')),
    }
    subject = r"unknownAttribute=x\ ,CN=a\+b\",O=Backup\, Inc+OU=\#1,C=DE"
    assert _names(certificate) == (subject, ('a+b"', "b.example"))
    assert _names({}) == ("", ())


# connections


CLIENTS: list[RawClient] = []
"""Of the test that runs; gone when its server is."""


async def connect(path: str) -> RawClient:
    client = await RawClient.connect(path)
    CLIENTS.append(client)
    return client


@contextlib.asynccontextmanager
async def serving(
    place: Path, tls: TlsConfig, image: MemoryImage | None = None, **options: float
) -> AsyncIterator[tuple[Server, str]]:
    credentials = Credentials(tls)
    made = ServerConfig(**options) if options else None  # type: ignore[arg-type]
    async with running(image or MemoryImage(bytes(range(256)) * 4096), place, made) as (server, path):
        server.tls = credentials
        try:
            yield server, path
        finally:
            for client in CLIENTS:
                # Of one that is over already, asyncio's own TLS in Python 3.11.2 knows no protocol any more.
                with contextlib.suppress(AttributeError):
                    client.writer.transport.abort()
            CLIENTS.clear()
            await until(lambda: server.connections == 0)


def trusting(pki: Pki, *, known: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(pki.anonymous / "ca-cert.pem"))
    if known:
        context.load_cert_chain(pki.client / "client-cert.pem", pki.client / "client-key.pem")
    return context


async def upgraded(path: str, context: ssl.SSLContext) -> RawClient:
    client = await connect(path)
    assert await client.option(STARTTLS) == [(1, b"")]
    await client.writer.start_tls(context, server_hostname="localhost")
    return client


def test_reads_and_writes(pki: Pki, tmp_path: Path) -> None:
    async def main() -> None:
        image = WritableImage(bytes(8 << 20))
        async with serving(tmp_path, config(pki.server), image) as (server, path):
            client = await upgraded(path, trusting(pki))
            assert (await client.go())[-1][0] == 1
            data = os.urandom(4 << 20)
            client.send(struct.pack(">IHHQQI", 0x25609513, 0, 1, 7, 4096, len(data)) + data)
            assert (await client.reply()).error == 0
            for cookie in range(20):
                client.read(cookie, 4096 + cookie * 100, 100_000)
            replies = await client.replies(20)
            for cookie, reply in replies.items():
                assert reply.data == data[cookie * 100 : cookie * 100 + 100_000]
            client.send(struct.pack(">IHHQQI", 0x25609513, 0, 2, 1, 0, 0))
            assert await client.ended() == b""
            await until(lambda: server.connections == 0)

    run(main)


def test_nothing_without_it(pki: Pki, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, config(pki.server)) as (_, path):
            client = await connect(path)
            for option in (3, 6, 7, 8, 9, 10, 11, 99):
                ((kind, _),) = await client.option(option)
                assert kind == TLS_REQD
            client.send(struct.pack(">QII", 0x49484156454F5054, 1, 0))
            assert await client.ended() == b""

    run(main)


def test_clients_with_and_without_side_by_side(pki: Pki, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, config(pki.server, "on")) as (_, path):
            plain = await connect(path)
            secret = await upgraded(path, trusting(pki))
            for client in (plain, secret):
                assert (await client.go())[-1][0] == 1
                client.read(1, 0, 256)
            assert (await plain.reply()).data == (await secret.reply()).data == bytes(range(256))

    run(main)


def test_who_it_is(pki: Pki, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, config(pki.server, verify_peer=True)) as (server, path):
            await upgraded(path, trusting(pki, known=True))
            await until(lambda: all(each.peer.tls is not None for each in server.clients))
            (connection,) = server.clients
            assert connection.peer.uid == os.getuid()
            tls = connection.peer.tls
            assert tls is not None and tls.version == "TLSv1.3" and tls.cipher
            assert tls.subject == "CN=backup,O=Example"
            assert tls.names == ("backup", "backup.example")

    run(main)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_without_certificate(
    pki: Pki, tmp_path: Path, caplog: pytest.LogCaptureFixture, version: ssl.TLSVersion
) -> None:
    caplog.set_level(logging.INFO, "nbdbm")

    async def main() -> None:
        async with serving(tmp_path, config(pki.server, verify_peer=True)) as (server, path):
            context = trusting(pki)
            context.maximum_version = version
            with contextlib.suppress(ssl.SSLError, ConnectionError, asyncio.IncompleteReadError):
                client = await upgraded(path, context)
                await client.option(3)
                raise AssertionError("it was let in")
            await until(lambda: server.connections == 0)

    run(main)
    (text,) = (each for each in caplog.messages if "no TLS" in each)
    assert text.endswith(": no TLS: peer did not return a certificate")


def test_a_revoked_client(pki: Pki, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nbdbm")
    authority = Authority(tmp_path / "authority")
    place = authority.issue("server", tmp_path / "server")
    good = authority.issue("client", tmp_path / "good", subject="/CN=good")
    bad = authority.issue("client", tmp_path / "bad", subject="/CN=bad")
    (place / "ca-crl.pem").write_text(authority.revoke(bad / "client-cert.pem"))

    async def main() -> None:
        async with serving(tmp_path, config(place, verify_peer=True)) as (server, path):
            for directory, welcome in ((good, True), (bad, False)):
                context = ssl.create_default_context(cafile=str(place / "ca-cert.pem"))
                context.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
                client = await upgraded(path, context)
                try:
                    found = await client.option(3)
                except (ssl.SSLError, ConnectionError, asyncio.IncompleteReadError):
                    found = []
                assert bool(found) == welcome, directory
                await client.close()
            await until(lambda: server.connections == 0)

    with contextlib.suppress(ssl.SSLError):
        run(main)
    (text,) = (each for each in caplog.messages if "no TLS" in each)
    assert text.endswith("certificate revoked")


def test_old_versions_are_refused(pki: Pki, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, config(pki.server)) as (server, path):
            context = trusting(pki)
            context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
            context.maximum_version = ssl.TLSVersion.TLSv1_1
            context.set_ciphers("ALL:@SECLEVEL=0")
            client = await connect(path)
            await client.option(STARTTLS)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await client.writer.start_tls(context, server_hostname="localhost")
            await until(lambda: server.connections == 0)

    with pytest.warns(DeprecationWarning):
        run(main)


def test_injected_plain_text(pki: Pki, tmp_path: Path) -> None:
    """What somebody on the way puts behind STARTTLS is never taken for what comes through TLS."""

    async def main() -> None:
        async with serving(tmp_path, config(pki.server)) as (server, path):
            client = await connect(path)
            starttls = struct.pack(">QII", 0x49484156454F5054, STARTTLS, 0)
            client.send(starttls + struct.pack(">QII", 0x49484156454F5054, 3, 0))
            rest = await client.ended()
            assert rest in (b"", struct.pack(">QIII", 0x0003E889045565A9, STARTTLS, 1, 0))
            await until(lambda: server.connections == 0)

    run(main)


@pytest.mark.parametrize("sent", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"], ids=["silent", "byte", "part"])
def test_a_client_that_never_finishes_the_handshake(pki: Pki, tmp_path: Path, sent: bytes) -> None:
    async def main() -> None:
        async with serving(tmp_path, config(pki.server), handshake_timeout=0.3) as (server, path):
            client = await connect(path)
            await client.option(STARTTLS)
            client.send(sent)
            assert await client.ended() == b""
            await until(lambda: server.connections == 0)

    run(main)


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(200_000)], ids=["http", "zeroes"])
def test_garbage(pki: Pki, tmp_path: Path, garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nbdbm")

    async def main() -> None:
        async with serving(tmp_path, config(pki.server)) as (server, path):
            client = await connect(path)
            await client.option(STARTTLS)
            client.send(garbage)
            await client.ended()
            await until(lambda: server.connections == 0)

    run(main)
    (record,) = (each for each in caplog.records if "no TLS" in each.message)
    assert record.levelno == logging.INFO and record.exc_info is None


def test_resets(pki: Pki, tmp_path: Path) -> None:
    """At any moment; nothing is left of the connection, and nothing is logged but debugging."""

    async def main() -> None:
        async with serving(tmp_path, config(pki.server), MemoryImage(bytes(32 << 20))) as (server, path):
            for moment in range(4):
                client = await connect(path)
                await client.option(STARTTLS)
                if moment:
                    await client.writer.start_tls(trusting(pki), server_hostname="localhost")
                if moment > 1:
                    await client.go()
                if moment > 2:
                    for cookie in range(4):
                        client.read(cookie, 0, 8 << 20)
                    await client.reader.readexactly(1)
                client.writer.transport.abort()
                await until(lambda: server.connections == 0)
            assert server.budget.used == 0

    run(main)


def test_a_client_that_never_reads(pki: Pki, tmp_path: Path) -> None:
    """It holds what the limits say, as without TLS."""

    async def main() -> None:
        async with serving(tmp_path, config(pki.server), MemoryImage(bytes(32 << 20))) as (server, path):
            client = await upgraded(path, trusting(pki))
            await client.go()
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            for cookie in range(64):
                client.read(cookie, 0, 16 << 20)
            (connection,) = server.clients
            await until(lambda: connection._outbox.blocked)
            await asyncio.sleep(0.2)
            assert server.budget.used <= 65 << 20
            assert connection._transport is not None
            assert connection._transport.get_write_buffer_size() <= 65 << 20
            client.writer.transport.abort()
            await until(lambda: server.connections == 0)
            assert server.budget.used == 0

    run(main)


def test_shutting_down_during_the_handshake(pki: Pki, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, config(pki.server)) as (server, path):
            client = await connect(path)
            await client.option(STARTTLS)
            await server.close()
            assert await client.ended() == b""

    run(main)


def test_new_certificates_for_new_connections(pki: Pki, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "Other authority")
    fresh = other.issue("server", tmp_path / "fresh")

    async def main() -> None:
        place = copy_of(pki.server, tmp_path)
        async with serving(tmp_path, config(place)) as (server, path):
            old = await upgraded(path, trusting(pki))
            assert (await old.go())[-1][0] == 1
            shutil.copytree(fresh, place, dirs_exist_ok=True)
            assert server.tls is not None
            server.tls.reload(config(place))
            new = await upgraded(path, ssl.create_default_context(cafile=str(fresh / "ca-cert.pem")))
            for client in (old, new):
                if client is new:
                    await client.go()
                client.read(1, 0, 256)
                assert (await client.reply()).data == bytes(range(256))
            with pytest.raises(ssl.SSLCertVerificationError):
                await upgraded(path, trusting(pki))

    run(main)
