"""Who may use an export: rules, and the verdict on one client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from nbdbm.errors import UsageError
from nbdbm.peer import Peer

LOCAL_KINDS = ("unix", "vsock")
"""What may stand among networks: clients that come by no network."""


class Verdict(Enum):
    """What the rules say of a client."""

    ALLOWED = auto()
    NEEDS_TLS = auto()
    """It may be allowed once it has said by TLS who it is."""
    DENIED = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The rules of one export. Each kind that is given must let a client pass.

    Raises UsageError for what is no network.
    """

    networks: tuple[str, ...] | None = None
    """``192.0.2.0/24``, ``2001:db8::/32``, one address, ``unix`` or ``vsock``; None: from anywhere."""
    users: tuple[int, ...] | None = None
    """User ids of processes that may connect by a Unix socket; None: every one. Others are not judged."""
    subjects: tuple[str, ...] | None = None
    """Distinguished names, common or DNS names of certificates, or names of pre-shared keys; None: any."""
    tls: bool = False
    """Only by TLS."""
    max_connections: int = 0
    """Clients at once; 0: no limit but the server's."""
    _parsed: tuple[IPv4Network | IPv6Network, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        if self.networks is not None:
            parsed = tuple(_network(text) for text in self.networks if text not in LOCAL_KINDS)
            object.__setattr__(self, "_parsed", parsed)
        if self.max_connections < 0:
            raise UsageError(f"max-connections {self.max_connections}: must be 1 or more, or 0 for no limit")

    def judge(self, peer: Peer) -> Verdict:
        """Whether ``peer`` may use the export as it stands."""
        if self.networks is not None and not self._near(peer):
            return Verdict.DENIED
        if self.users is not None and peer.uid is not None and peer.uid not in self.users:
            return Verdict.DENIED
        if peer.tls is None:
            return Verdict.NEEDS_TLS if self.tls or self.subjects is not None else Verdict.ALLOWED
        if self.subjects is not None:
            names = {peer.tls.subject, peer.tls.identity, *peer.tls.names} - {""}
            if names.isdisjoint(self.subjects):
                return Verdict.DENIED
        return Verdict.ALLOWED

    def _near(self, peer: Peer) -> bool:
        assert self.networks is not None
        if peer.host is None:
            return peer.address.partition(":")[0] in self.networks
        address = ip_address(peer.host)
        # An IPv4 client of a socket that takes both is seen as ::ffff:192.0.2.7.
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self._parsed)


EVERYBODY = Access()


def _network(text: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(text)
    except ValueError as error:
        kinds: Sequence[str] = LOCAL_KINDS
        raise UsageError(f"{text!r} is no network ({error}), nor {' or '.join(kinds)}") from error
