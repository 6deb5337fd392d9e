"""What the server proves itself with, and clients: certificates or keys from files, read again on demand.

A directory of certificates is laid out as for QEMU and nbdkit:

    server-cert.pem, server-key.pem     ours
    ca-cert.pem                         who vouches for clients (with ``verify_peer``)
    ca-crl.pem                          of whom it no longer does (if it is there)
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import stat
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nbdbm.config import TlsConfig
from nbdbm.errors import NbdError, UsageError
from nbdbm.nbd.handshake import TlsMode
from nbdbm.peer import Peer, TlsPeer
from nbdbm.tunnel import explain

log = logging.getLogger(__name__)

MODES = {"off": TlsMode.OFF, "on": TlsMode.ON, "require": TlsMode.REQUIRE}

MAX_FILE = 16 * 1024 * 1024
"""Longest file of certificates or keys, bytes: some hundred thousand clients' keys."""

MAX_KEY = 256
"""Longest pre-shared key, bytes: as long as Python's ssl takes."""

PSK_CIPHERS = "ECDHE-PSK-CHACHA20-POLY1305:ECDHE-PSK-AES256-CBC-SHA384:ECDHE-PSK-AES128-CBC-SHA256"
"""For TLS 1.2: what keeps a recording secret from those who learn the key later. (TLS 1.3 has its own.)"""


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
            self._keys = parse_keys(config.psk, _read(config.psk, secret=True))
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
    certificate = os.path.join(directory, "server-cert.pem")
    key = os.path.join(directory, "server-key.pem")
    _need(certificate, _read(certificate), "-----BEGIN CERTIFICATE-----")
    _need(key, _read(key, secret=True), "PRIVATE KEY-----")

    def no_password() -> str:
        raise UsageError(f"{key}: is encrypted, and there is nobody to ask for the password")

    try:
        context.load_cert_chain(certificate, key, no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"{key}: does not belong to the certificate in {certificate}") from error
        raise UsageError(f"{certificate}, {key}: cannot be used: {explain(error)}") from error
    _try_out(context, certificate)
    if not verify_peer:
        return
    authority = os.path.join(directory, "ca-cert.pem")
    _load_authority(context, authority)
    context.verify_mode = ssl.CERT_REQUIRED
    revoked = os.path.join(directory, "ca-crl.pem")
    if os.path.lexists(revoked):
        _need(revoked, _read(revoked), "-----BEGIN X509 CRL-----")
        _load_authority(context, revoked)
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF


def _load_authority(context: ssl.SSLContext, path: str) -> None:
    _read(path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise UsageError(f"{path}: cannot be used: {explain(error)}") from error


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


def parse_keys(path: str, text: str) -> dict[str, bytes]:
    """The keys by name: lines ``NAME:HEX``, or ``#HEX:HEX`` for a name that may have any character."""
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        # The line is not shown: it may hold a key.
        name, separator, digits = line.rpartition(":")
        if not separator or not name:
            raise UsageError(f"{where}: not NAME:KEY")
        try:
            if name.startswith("#"):
                name = bytes.fromhex(name[1:]).decode()
            key = bytes.fromhex(digits)
        except ValueError:
            raise UsageError(f"{where}: not hexadecimal") from None
        if not 0 < len(key) <= MAX_KEY:
            raise UsageError(f"{where}: a key of {len(key)} bytes; it must have 1 to {MAX_KEY}")
        if name in keys:
            raise UsageError(f"{where}: {name!r} has a key already")
        keys[name] = key
    if not keys:
        raise UsageError(f"{path}: holds no key")
    return keys


def _read(path: str, *, secret: bool = False) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            raise UsageError(f"{path}: not a file of at most {MAX_FILE} bytes")
        if secret and status.st_mode & (stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(status.st_mode)
            log.warning("%s: others have access to it (mode %o); chmod 600 keeps it secret", path, mode)
        return file.read()


def _need(path: str, text: str, mark: str) -> None:
    if mark not in text:
        raise UsageError(f"{path}: holds no {mark.strip('-').removeprefix('BEGIN ').lower()} in PEM")


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
