"""Who is at the other end of a connection: values for access rules, logs and statistics."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv6Address


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsPeer:
    """What TLS says of a client."""

    version: str
    """``TLSv1.3``."""
    cipher: str
    subject: str = ""
    """Distinguished name of the verified client certificate, as ``CN=backup,O=Example``; "" without one."""
    names: tuple[str, ...] = ()
    """Names that a rule may give for this certificate: its common name and its alternative DNS names."""
    identity: str = ""
    """The name in the pre-shared keys file; "" with certificates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One client; what is unknown or does not apply is None."""

    address: str
    """For people: ``192.0.2.7:51312``, ``[2001:db8::7]:51312``, ``unix``, ``vsock:3:1027``."""
    host: str | None = None
    """Address without the port, for TCP: what networks are compared with, and connections are counted by."""
    pid: int | None = None
    uid: int | None = None
    gid: int | None = None
    """Of the process that connected, for Unix sockets."""
    tls: TlsPeer | None = None

    @property
    def network(self) -> str | None:
        """What connections are counted by: the address, or the /64 network of IPv6, whose owner has all of
        its addresses; None for clients that come by no network."""
        if self.host is None or ":" not in self.host:
            return self.host
        address = IPv6Address(self.host)
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(IPv6Address(int(address) >> 64 << 64)) + "/64"

    def __str__(self) -> str:
        text = self.address
        if self.pid is not None:
            text += f" pid {self.pid} uid {self.uid}"
        if self.tls is not None:
            who = self.tls.subject or self.tls.identity
            text += f" ({self.tls.version}{', ' + who if who else ''})"
        return text


UNKNOWN = Peer(address="unknown")
