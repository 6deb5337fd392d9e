"""Who a client is, as people read it."""

from __future__ import annotations

from nbdbm.peer import Peer, TlsPeer


def test_a_tcp_client_is_shown_by_its_address() -> None:
    assert str(Peer(address="192.0.2.7:51312", host="192.0.2.7")) == "192.0.2.7:51312"


def test_a_unix_client_is_shown_with_its_process() -> None:
    assert str(Peer(address="unix", pid=17, uid=1000, gid=100)) == "unix pid 17 uid 1000"


def test_tls_adds_who_the_client_proved_to_be() -> None:
    certified = TlsPeer(version="TLSv1.3", cipher="x", subject="CN=backup")
    keyed = TlsPeer(version="TLSv1.2", cipher="x", identity="alice")
    assert str(Peer(address="a:1", tls=certified)) == "a:1 (TLSv1.3, CN=backup)"
    assert str(Peer(address="a:1", tls=keyed)) == "a:1 (TLSv1.2, alice)"
    assert str(Peer(address="a:1", tls=TlsPeer(version="TLSv1.3", cipher="x"))) == "a:1 (TLSv1.3)"


def test_connections_are_counted_by_address_or_by_the_smallest_network_of_ipv6() -> None:
    def network(host: str | None) -> str | None:
        return Peer(address="a", host=host).network

    assert network("192.0.2.7") == "192.0.2.7"
    assert network("2001:db8::7") == network("2001:db8::ffff:8") == "2001:db8::/64"
    assert network("2001:db8:0:1::7") != network("2001:db8::7")
    assert network("::ffff:192.0.2.7") == "192.0.2.7"
    assert network(None) is None
