"""Certificates and keys from files, for both sides of TLS: read with care, refused in one line."""

from __future__ import annotations

import logging
import os
import ssl
import stat

from nbdbm.errors import UsageError
from nbdbm.tunnel import explain

log = logging.getLogger(__name__)

MAX_FILE = 16 * 1024 * 1024
"""Longest file of certificates or keys, bytes: some hundred thousand clients' keys."""

MAX_KEY = 256
"""Longest pre-shared key, bytes: as long as Python's ssl takes."""

PSK_CIPHERS = "ECDHE-PSK-CHACHA20-POLY1305:ECDHE-PSK-AES256-CBC-SHA384:ECDHE-PSK-AES128-CBC-SHA256"
"""For TLS 1.2: what keeps a recording secret from those who learn the key later. (TLS 1.3 has its own.)"""


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


def load_pair(context: ssl.SSLContext, directory: str, kind: str) -> str:
    """Load KIND-cert.pem and KIND-key.pem; the path of the former. Raises UsageError or OSError."""
    certificate = os.path.join(directory, f"{kind}-cert.pem")
    key = os.path.join(directory, f"{kind}-key.pem")
    need(certificate, read(certificate), "-----BEGIN CERTIFICATE-----")
    need(key, read(key, secret=True), "PRIVATE KEY-----")

    def no_password() -> str:
        raise UsageError(f"{key}: is encrypted, and there is nobody to ask for the password")

    try:
        context.load_cert_chain(certificate, key, no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"{key}: does not belong to the certificate in {certificate}") from error
        raise UsageError(f"{certificate}, {key}: cannot be used: {explain(error)}") from error
    return certificate


def load_authorities(context: ssl.SSLContext, directory: str) -> str:
    """Trust ca-cert.pem, whose path is returned, but not whom ca-crl.pem (if it is there) lists."""
    authority = os.path.join(directory, "ca-cert.pem")
    load_authority(context, authority)
    revoked = os.path.join(directory, "ca-crl.pem")
    if os.path.lexists(revoked):
        need(revoked, read(revoked), "-----BEGIN X509 CRL-----")
        load_authority(context, revoked)
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    return authority


def load_authority(context: ssl.SSLContext, path: str) -> None:
    """Load authorities' certificates, or their lists of revoked ones."""
    read(path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise UsageError(f"{path}: cannot be used: {explain(error)}") from error


def read(path: str, *, secret: bool = False) -> str:
    """The text of a file; a ``secret`` one that others have access to is warned about."""
    # Without O_NONBLOCK, opening a pipe waits for somebody who writes to it.
    with open(path, encoding="utf-8", errors="replace", opener=_open) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            raise UsageError(f"{path}: not a file of at most {MAX_FILE} bytes")
        if secret and status.st_mode & (stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(status.st_mode)
            log.warning("%s: others have access to it (mode %o); chmod 600 keeps it secret", path, mode)
        return file.read()


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def need(path: str, text: str, mark: str) -> None:
    """Raise UsageError unless ``mark``, the beginning of something in PEM, is in the file's text."""
    if mark not in text:
        raise UsageError(f"{path}: holds no {mark.strip('-').removeprefix('BEGIN ').lower()} in PEM")
