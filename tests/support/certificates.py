"""Certificates for tests, made by openssl(1): an authority, a server, clients, and what can be wrong."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support import qemu

SETTINGS = """
[req]
distinguished_name = name
prompt = no
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = ${ENV::NAMES}
[client]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = clientAuth
subjectAltName = ${ENV::NAMES}
[ca]
default_ca = default
[default]
database = ${ENV::PLACE}/index
serial = ${ENV::PLACE}/serial
new_certs_dir = ${ENV::PLACE}
default_md = sha256
policy = anything
unique_subject = no
default_crl_days = 30
crlnumber = ${ENV::PLACE}/crlnumber
[anything]
commonName = supplied
organizationName = optional
"""

LOCAL = "DNS:localhost, IP:127.0.0.1, IP:::1"


def openssl(place: Path, *args: str, names: str = LOCAL) -> str:
    done = subprocess.run(
        ["openssl", *args],
        cwd=place,
        env=qemu.environment()
        | {"PLACE": str(place), "NAMES": names, "OPENSSL_CONF": str(place / "settings")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=qemu.TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, f"openssl {args}: {done.stderr}"
    return done.stdout


class Authority:
    """A certificate authority in a directory of its own."""

    def __init__(self, place: Path, name: str = "Test authority") -> None:
        place.mkdir(parents=True)
        self.place = place
        (place / "settings").write_text(SETTINGS)
        (place / "index").touch()
        (place / "serial").write_text("1000\n")
        (place / "crlnumber").write_text("1000\n")
        openssl(
            place, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-config", "settings", "-extensions", "authority", "-subj", f"/CN={name}", "-days", "30",
            "-keyout", "ca-key.pem", "-out", "ca-cert.pem",
        )  # fmt: skip

    @property
    def certificate(self) -> str:
        return (self.place / "ca-cert.pem").read_text()

    def issue(
        self,
        kind: str,
        into: Path,
        *,
        subject: str = "/O=Example/CN=localhost",
        names: str = LOCAL,
        start: str = "20240101000000Z",
        end: str = "20991231235959Z",
    ) -> Path:
        """Put KIND-cert.pem, KIND-key.pem and ca-cert.pem into a directory, which is returned."""
        into.mkdir(parents=True, exist_ok=True)
        key, certificate = into / f"{kind}-key.pem", into / f"{kind}-cert.pem"
        openssl(
            self.place, "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-config", "settings", "-subj", subject, "-keyout", str(key), "-out", "request",
        )  # fmt: skip
        openssl(
            self.place, "ca", "-batch", "-notext", "-config", "settings", "-extensions", kind,
            "-cert", "ca-cert.pem", "-keyfile", "ca-key.pem", "-preserveDN",
            "-startdate", start, "-enddate", end, "-in", "request", "-out", str(certificate),
            names=names,
        )  # fmt: skip
        os.chmod(key, 0o600)
        (into / "ca-cert.pem").write_text(self.certificate)
        return into

    def revoke(self, *certificates: Path) -> str:
        """Revoke certificates; the list of all that are revoked now."""
        for certificate in certificates:
            self._ca("-revoke", str(certificate))
        self._ca("-gencrl", "-out", "crl")
        return (self.place / "crl").read_text()

    def _ca(self, *args: str) -> None:
        openssl(
            self.place, "ca", "-config", "settings", "-cert", "ca-cert.pem", "-keyfile", "ca-key.pem", *args
        )


class Pki:
    """One authority with a server and a client, made once and used by many tests. Change copies only."""

    def __init__(self, place: Path) -> None:
        self.authority = Authority(place / "authority")
        self.server = self.authority.issue("server", place / "server")
        self.client = self.authority.issue(
            "client", place / "client", subject="/O=Example/CN=backup", names="DNS:backup.example"
        )
        """With ca-cert.pem, as all tools want it; ``anonymous`` has that alone."""
        self.anonymous = place / "anonymous"
        self.anonymous.mkdir()
        (self.anonymous / "ca-cert.pem").write_text(self.authority.certificate)
