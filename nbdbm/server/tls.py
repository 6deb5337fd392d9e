"""What the server proves itself with, and clients: certificates or keys from files, read again on demand.

A directory of certificates is laid out as for QEMU and nbdkit:

    server-cert.pem, server-key.pem     ours
    ca-cert.pem                         who vouches for clients (with ``verify_peer``)
    ca-crl.pem                          of whom it no longer does (if it is there)
"""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nbdbm.config import TlsConfig
from nbdbm.errors import NbdError, UsageError
from nbdbm.nbd.handshake import TlsMode
from nbdbm.peer import Peer, TlsPeer
from nbdbm.tlsfiles import PSK_CIPHERS, load_authorities, load_pair, parse_keys, read
from nbdbm.tunnel import explain

log = logging.getLogger(__name__)

MODES = {"off": TlsMode.OFF, "on": TlsMode.ON, "require": TlsMode.REQUIRE}


class Credentials:
    """What TLS connections are begun with, as configured; ``reload`` reads the files anew.

    Raises UsageError or OSError, one line, naming the file, if they are of no use.
    """

    def __init__(self, config: TlsConfig) -> None:
        self._context: ssl.SSLContext | None = None
        self._keys: dict[str, bytes] = {}
        self.reload(config)

    def reload(self, config: TlsConfig) -> None:
        """Read the files again, for what begins from now on. If it raises, all stays as it was."""
        if config.psk is not None:
            if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
                raise UsageError("--tls-psk: needs Python 3.13 or newer; --tls-certificates does not")
            self._keys = parse_keys(config.psk, read(config.psk, secret=True))
            self._context = None
        else:
            assert config.certificates is not None
            context = _new_context()
            _use_certificates(context, config.certificates, config.verify_peer)
            self._context = context
        self.mode = MODES[config.mode]

    def begin(self) -> Upgrade:
        """What one connection begins TLS with."""
        if self._context is not None:
            return Upgrade(self._context)
        return KeyUpgrade(self._keys)


class Upgrade:
    """One connection's way to TLS: its context, and afterwards, who the client is."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context

    def peer(self, peer: Peer, tls: ssl.SSLObject) -> Peer:
        """The client, and what it has proved by TLS. Raises NbdError if that is not enough."""
        subject, names = _names(tls.getpeercert() or {})
        return replace(peer, tls=_tls_peer(tls, subject=subject, names=names))


class KeyUpgrade(Upgrade):
    """The same with pre-shared keys: a context of its own, since that alone is told the client's name."""

    def __init__(self, keys: dict[str, bytes]) -> None:
        context = _new_context()
        context.set_ciphers(PSK_CIPHERS)
        # Who resumes a session gives no name.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        self._name = ""

        def find(name: str | None) -> bytes:
            self._name = name or ""
            return keys.get(self._name, b"")

        context.set_psk_server_callback(find)  # type: ignore[attr-defined]  # Python 3.13
        super().__init__(context)

    def peer(self, peer: Peer, tls: ssl.SSLObject) -> Peer:
        if not self._name:
            raise NbdError("a client that proved no key")
        return replace(peer, tls=_tls_peer(tls, identity=self._name))


def _new_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # What was agreed upon stays: a client cannot keep us busy with handshakes.
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


def _tls_peer(
    tls: ssl.SSLObject, *, subject: str = "", names: tuple[str, ...] = (), identity: str = ""
) -> TlsPeer:
    cipher = tls.cipher()
    return TlsPeer(
        version=tls.version() or "",
        cipher=cipher[0] if cipher else "",
        subject=subject,
        names=names,
        identity=identity,
    )


def _use_certificates(context: ssl.SSLContext, directory: str, verify_peer: bool) -> None:
    certificate = load_pair(context, directory, "server")
    _try_out(context, certificate)
    if verify_peer:
        load_authorities(context, directory)
        context.verify_mode = ssl.CERT_REQUIRED


def _try_out(context: ssl.SSLContext, certificate: str) -> None:
    """Connect to ourselves as a client that trusts this very certificate: what it finds, others will too."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        context.wrap_bio(to_server, to_client, server_side=True),
    ]
    try:
        for end in (*ends, *ends):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        log.warning("%s: clients will refuse it: %s", certificate, error.verify_message)
    except ssl.SSLError as error:
        raise UsageError(f"{certificate}: cannot be used: {explain(error)}") from error


SHORT = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "emailAddress": "EMAIL",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
    "streetAddress": "STREET",
    "userId": "UID",
}
"""Attributes of a distinguished name, as GnuTLS and so QEMU's access lists write them."""


def _names(certificate: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Subject and names of a verified certificate, in the form that ``ssl.getpeercert`` gives."""
    parts: list[str] = []
    names: list[str] = []
    for group in certificate.get("subject", ()):
        parts.append("+".join(f"{SHORT.get(key, key)}={_escaped(value)}" for key, value in group))
        names += [value for key, value in group if key == "commonName"]
    names += [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    # The most specific comes first (RFC 4514), while the certificate has it last.
    return ",".join(reversed(parts)), tuple(dict.fromkeys(names))


def _escaped(value: str) -> str:
    """An attribute's value, so that it cannot be taken for several (RFC 4514)."""
    escaped = "".join(f"\\{char}" if char in '\\,+"<>;' else char for char in value)
    if escaped[:1] in ("#", " "):
        escaped = "\\" + escaped
    if value.endswith(" ") and len(value) > 1:
        escaped = escaped[:-1] + "\\ "
    return escaped
