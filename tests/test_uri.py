"""NBD URIs: the specification's forms, the refusals, and the round trip."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm import uri
from nbdbm.errors import UsageError
from nbdbm.uri import NbdUri, UriTls, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://example.com", NbdUri.tcp("example.com")),
        ("nbd://example.com/", NbdUri.tcp("example.com")),
        ("nbd://example.com:10810/disk", NbdUri.tcp("example.com", 10810, "disk")),
        ("NBD://Example.com/Disk", NbdUri.tcp("example.com", 10809, "Disk")),
        ("nbd://[::1]:1/x", NbdUri.tcp("::1", 1, "x")),
        ("nbd://[fe80::1%25eth0]/", NbdUri.tcp("fe80::1%eth0")),
        ("nbd://h//slash", NbdUri.tcp("h", 10809, "/slash")),
        ("nbd://h/a%20b%2Fc%23%C3%A9", NbdUri.tcp("h", 10809, "a b/c#é")),
        ("nbd://h/x?unknown=1", NbdUri.tcp("h", 10809, "x")),
        ("nbd+unix:///?socket=/tmp/s", NbdUri.unix("/tmp/s")),
        ("nbd+unix:///disk?socket=/tmp/a%20b+c", NbdUri.unix("/tmp/a b+c", "disk")),
        ("nbd+unix:///a+b?socket=%2Ftmp%2Fs", NbdUri.unix("/tmp/s", "a+b")),
        ("nbd+unix:///?socket=rel&x=", NbdUri.unix("rel")),
        ("nbd+unix:///?socket=/tmp/%FF", NbdUri.unix("/tmp/\udcff")),
    ],
)
def test_parse(text: str, expected: NbdUri) -> None:
    assert uri.is_uri(text)
    assert uri.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("disk.qcow2", "not an NBD URI"),
        ("http://h/", "not an NBD URI"),
        ("nbds+unix:///", "socket=PATH parameter is missing"),
        ("nbds+unix://h/?socket=/s", "has no host"),
        ("nbd://h/?tls-psk-file=/x", "tls-psk-file has no meaning without TLS"),
        ("nbds://h/?tls-priority=NORMAL", "tls-priority: unknown"),
        ("nbds://h/?tls-certificates=", "tls-certificates is empty"),
        ("nbds://h/?tls-verify-peer=maybe", "tls-verify-peer=maybe: must be true or false"),
        ("nbds://alice@h/", "user name has no meaning without tls-psk-file"),
        ("nbd://alice@h/", "user name"),
        ("nbd:///disk", "the host is missing"),
        ("nbd://user@h/", "user name"),
        ("nbd://h:99999/", "not a valid URI"),
        ("nbd://h:port/", "not a valid URI"),
        ("nbd://[::1/", "not a valid URI"),
        ("nbd://h/%FF", "the export name is not UTF-8"),
        ("nbd://h/\udcff", "the export name is not UTF-8"),
        ("nbd://h%FF/", "the host is not UTF-8"),
        ("nbd://h\udcff/", "the host is not UTF-8"),
        ("nbds://%FF@h/?tls-psk-file=k", "the user name is not UTF-8"),
        ("nbd://h%2Fx/", "'h/x' is no host"),
        ("nbd://h%3Ax/", "'h:x' is no host"),
        ("nbd://h/x#y", "fragment"),
        ("nbd://h/?socket=/s", r"needs the nbd\+unix scheme"),
        ("nbd+unix:///disk", "socket=PATH parameter is missing"),
        ("nbd+unix:///?socket=", "socket=PATH parameter is missing"),
        ("nbd+unix:///?socket=/a&socket=/b", "more than one socket"),
        ("nbd+unix:///?socket=/a%00b", "zero byte"),
        ("nbd+unix://host/?socket=/a", "has no host"),
    ],
)
def test_parse_refuses(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        uri.parse(text)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (NbdUri.tcp("localhost"), "nbd://localhost"),
        (NbdUri.tcp("::1", 1, "a b"), "nbd://[::1]:1/a%20b"),
        (NbdUri.unix("/tmp/nbd.sock"), "nbd+unix:///?socket=/tmp/nbd.sock"),
        (NbdUri.unix("/tmp/a b&c", "disk?"), "nbd+unix:///disk%3F?socket=/tmp/a%20b%26c"),
    ],
)
def test_format(value: NbdUri, text: str) -> None:
    assert str(value) == text


exports = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    socket=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
    export=exports,
)
def test_round_trip_unix(socket: str, export: str) -> None:
    value = NbdUri.unix(socket, export)
    assert uri.parse(str(value)) == value


@given(
    host=st.sampled_from(["localhost", "127.0.0.1", "::1", "fe80::1%eth0", "a.example"]),
    port=st.integers(0, 65535),
    export=exports,
)
def test_round_trip_tcp(host: str, port: int, export: str) -> None:
    value = NbdUri.tcp(host, port, export)
    assert uri.parse(str(value)) == value


@pytest.mark.parametrize(
    ("text", "tls"),
    [
        ("nbds://h", UriTls()),
        ("nbds://h/e?tls-certificates=/etc/pki", UriTls(certificates="/etc/pki")),
        ("nbds://h/?tls-hostname=vault", UriTls(hostname="vault")),
        ("nbds+unix:///e?socket=/s&tls-verify-peer=false", UriTls(verify_peer=False)),
        ("nbds+unix://alice@/?socket=/s&tls-psk-file=/k%20s", UriTls(username="alice", psk_file="/k s")),
        ("nbds://a%40b@h:1/?tls-psk-file=keys", UriTls(username="a@b", psk_file="keys")),
    ],
)
def test_tls(text: str, tls: UriTls) -> None:
    uri = parse(text)
    assert uri.encrypted and uri.tls == tls
    assert parse(str(uri)) == uri


def test_with_tls() -> None:
    assert str(NbdUri.unix("/s", "e").with_tls()) == "nbds+unix:///e?socket=/s"
    assert str(NbdUri.tcp("h", 1).with_tls()) == "nbds://h:1"
    assert str(NbdUri.vsock(1).with_tls()) == "nbds+vsock://2:1"
    assert NbdUri.tcp("h").with_tls().with_tls().plain_scheme == "nbd"
    assert not NbdUri.tcp("h").encrypted


def test_a_path_of_no_bytes() -> None:
    """What neither a command line nor a file can say; found by the fuzzer."""
    with pytest.raises(UsageError, match="socket is not UTF-8"):
        uri.parse("nbd+unix:///?socket=/a\ud800")
