"""Access rules: each kind alone, all together, and clients that say nothing of themselves."""

from __future__ import annotations

import pytest

from nbdbm.access import EVERYBODY, Access, Verdict
from nbdbm.errors import UsageError
from nbdbm.peer import UNKNOWN, Peer, TlsPeer

UNIX = Peer(address="unix", pid=1, uid=1000, gid=100)
VSOCK = Peer(address="vsock:3:1027")


def tcp(host: str, **tls: str) -> Peer:
    return Peer(address=f"{host}:1", host=host, tls=TlsPeer(version="v", cipher="c", **tls) if tls else None)


@pytest.mark.parametrize("peer", [UNIX, VSOCK, UNKNOWN, tcp("192.0.2.7"), tcp("::1", subject="CN=x")])
def test_without_rules_everybody_is_allowed(peer: Peer) -> None:
    assert EVERYBODY.judge(peer) is Verdict.ALLOWED


@pytest.mark.parametrize(
    ("networks", "peer", "allowed"),
    [
        (("192.0.2.0/24",), tcp("192.0.2.7"), True),
        (("192.0.2.0/24",), tcp("192.0.3.7"), False),
        (("192.0.2.0/24",), tcp("::ffff:192.0.2.7"), True),
        (("192.0.2.7",), tcp("192.0.2.7"), True),
        (("192.0.2.7",), tcp("192.0.2.8"), False),
        (("2001:db8::/32",), tcp("2001:db8::1"), True),
        (("2001:db8::/32",), tcp("192.0.2.7"), False),
        (("192.0.2.0/24",), UNIX, False),
        (("192.0.2.0/24", "unix"), UNIX, True),
        (("unix",), VSOCK, False),
        (("vsock",), VSOCK, True),
        (("unix", "vsock"), UNKNOWN, False),
        ((), tcp("192.0.2.7"), False),
    ],
)
def test_networks(networks: tuple[str, ...], peer: Peer, allowed: bool) -> None:
    assert Access(networks=networks).judge(peer) is (Verdict.ALLOWED if allowed else Verdict.DENIED)


def test_users_judge_clients_of_unix_sockets_only() -> None:
    access = Access(users=(1000,))
    assert access.judge(UNIX) is Verdict.ALLOWED
    assert access.judge(Peer(address="unix", pid=1, uid=1001, gid=100)) is Verdict.DENIED
    assert access.judge(tcp("192.0.2.7")) is Verdict.ALLOWED


def test_subjects_need_tls_and_then_one_of_the_names() -> None:
    access = Access(subjects=("CN=backup,O=Example", "host.example.com", "alice"))
    assert access.judge(tcp("192.0.2.7")) is Verdict.NEEDS_TLS
    assert access.judge(tcp("192.0.2.7", subject="CN=backup,O=Example")) is Verdict.ALLOWED
    assert access.judge(tcp("192.0.2.7", subject="CN=backup")) is Verdict.DENIED
    assert access.judge(tcp("192.0.2.7", identity="alice")) is Verdict.ALLOWED
    named = Peer(
        address="a", host="192.0.2.7", tls=TlsPeer(version="v", cipher="c", names=("host.example.com",))
    )
    assert access.judge(named) is Verdict.ALLOWED
    # TLS without a certificate says nothing of the client.
    assert access.judge(tcp("192.0.2.7", subject="")) is Verdict.DENIED
    assert Access(subjects=("",)).judge(tcp("192.0.2.7", subject="")) is Verdict.DENIED


def test_tls_alone() -> None:
    access = Access(tls=True)
    assert access.judge(UNIX) is Verdict.NEEDS_TLS
    assert access.judge(tcp("192.0.2.7", subject="")) is Verdict.ALLOWED


def test_the_wrong_network_is_denied_before_tls_is_asked_for() -> None:
    access = Access(networks=("192.0.2.0/24",), tls=True)
    assert access.judge(tcp("198.51.100.1")) is Verdict.DENIED


@pytest.mark.parametrize("text", ["192.0.2.1/24", "example.com", "", "300.1.1.1", "::g"])
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(UsageError, match="is no network"):
        Access(networks=(text,))


def test_negative_limit() -> None:
    with pytest.raises(UsageError, match="max-connections -1"):
        Access(max_connections=-1)
