"""What the client begins TLS with, and whom it believes: as the ``tls-`` parameters of a URI say.

A directory of certificates is laid out as for libnbd and QEMU:

    ca-cert.pem                         who vouches for servers; without a directory, the system's authorities
    ca-crl.pem                          of whom it no longer does (if it is there)
    client-cert.pem, client-key.pem     ours, for servers that want to know us (if they are there)
"""

from __future__ import annotations

import getpass
import os
import ssl

from nbdbm.errors import UsageError
from nbdbm.tlsfiles import PSK_CIPHERS, load_authorities, load_pair, parse_keys, read
from nbdbm.uri import NbdUri


class ClientTls:
    """One connection's way to TLS. Raises UsageError, one line, if the URI's files are of no use."""

    def __init__(self, uri: NbdUri) -> None:
        self.hostname = uri.tls.hostname or uri.host or None
        """Whom we mean to talk to. None on a Unix socket: whoever the authority vouches for."""
        self._trusted = "the system's authorities (tls-certificates=DIR names others)"
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.options |= ssl.OP_NO_RENEGOTIATION
        try:
            if uri.tls.psk_file is not None:
                self._use_key(uri.tls.psk_file, uri.tls.username)
            else:
                self._use_certificates(uri.tls.certificates, uri.tls.verify_peer)
            # Some names are none to Python; found out here rather than in the middle of a handshake.
            self.context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=self.hostname)
        except UsageError as error:
            raise UsageError(f"{uri}: {error}") from error
        except OSError as error:
            raise UsageError(f"{uri}: {error.filename}: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"{uri}: {self.hostname!r} cannot be the name in a certificate") from error

    def _use_certificates(self, directory: str | None, verify: bool) -> None:
        if verify:
            self.context.check_hostname = self.hostname is not None
            if directory is None:
                self.context.load_default_certs(ssl.Purpose.SERVER_AUTH)
            else:
                self._trusted = load_authorities(self.context, directory)
        else:
            self.context.check_hostname = False
            self.context.verify_mode = ssl.CERT_NONE
        if directory is None:
            return
        ours = [os.path.join(directory, name) for name in ("client-cert.pem", "client-key.pem")]
        if any(map(os.path.lexists, ours)):
            load_pair(self.context, directory, "client")
        elif not os.path.isdir(directory):
            raise UsageError(f"{directory}: no directory of certificates")

    def _use_key(self, path: str, username: str | None) -> None:
        if not hasattr(ssl.SSLContext, "set_psk_client_callback"):
            raise UsageError("tls-psk-file: needs Python 3.13 or newer; tls-certificates does not")
        name = username or getpass.getuser()
        key = parse_keys(path, read(path, secret=True)).get(name)
        if key is None:
            raise UsageError(f"{path}: holds no key of {name!r}")
        # No authority is loaded and one is required: a server that shows a certificate instead of proving
        # that it has the key is believed nothing.
        self._trusted = f"the key of {name!r} alone"
        self.context.check_hostname = False
        self.context.set_ciphers(PSK_CIPHERS)
        self.context.set_psk_client_callback(lambda hint: (name, key))  # type: ignore[attr-defined]  # 3.13

    def explain(self, reason: str) -> str:
        """What went wrong in the handshake, and what was trusted if it is about that."""
        if "issuer" in reason or "self-signed" in reason or "self signed" in reason:
            return f"TLS: {reason}; trusted: {self._trusted}"
        return f"TLS: {reason}"
