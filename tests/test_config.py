"""Configuration is checked once, each refusal in one line."""

from __future__ import annotations

from typing import Any

import pytest

from nbdbm.config import (
    MAX_NAME,
    MAX_SOCKET_PATH,
    ExportConfig,
    ListenConfig,
    ServeConfig,
    ServerConfig,
    TlsConfig,
)
from nbdbm.errors import UsageError


def test_defaults_are_sound() -> None:
    config = ServeConfig(exports=(ExportConfig(image="disk.qcow2"),))
    assert not config.listen.given
    assert config.exports[0].bitmaps is None and config.exports[0].allocation_depth


@pytest.mark.parametrize(
    "listen",
    [
        ListenConfig(socket="/tmp/s", socket_mode=0o660, socket_owner="root:disk"),
        ListenConfig(host="::1"),
        ListenConfig(port=0),
        ListenConfig(port=65535),
        ListenConfig(vsock=0),
    ],
)
def test_given(listen: ListenConfig) -> None:
    assert listen.given


def test_limits_are_inclusive() -> None:
    ListenConfig(socket="/" + "s" * (MAX_SOCKET_PATH - 1))
    ExportConfig(image="i", name="é" * (MAX_NAME // 2), description="d" * MAX_NAME)
    ServerConfig(max_connections=0)
    ServerConfig(busy_poll=0)
    ServerConfig(busy_poll=0.001)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        pytest.param(lambda: ListenConfig(socket="s", port=1), "--socket excludes", id="socket_and_port"),
        pytest.param(lambda: ListenConfig(socket="s", host="h"), "--socket excludes", id="socket_and_bind"),
        pytest.param(lambda: ListenConfig(socket=""), "empty", id="empty_socket"),
        pytest.param(lambda: ListenConfig(socket="a\0b"), "zero byte", id="zero_in_socket"),
        pytest.param(lambda: ListenConfig(socket="é" * 54), "108 bytes", id="long_socket"),
        pytest.param(lambda: ListenConfig(port=-1), "0 to 65535", id="negative_port"),
        pytest.param(lambda: ListenConfig(port=65536), "0 to 65535", id="large_port"),
        pytest.param(lambda: ListenConfig(host=""), "empty", id="empty_host"),
        pytest.param(lambda: ListenConfig(socket="@s"), "abstract", id="abstract_socket"),
        pytest.param(lambda: ListenConfig(socket_mode=0o600), "give --socket", id="mode_of_nothing"),
        pytest.param(lambda: ListenConfig(socket_owner="u", port=1), "give --socket", id="owner_of_nothing"),
        pytest.param(lambda: ListenConfig(socket="s", socket_mode=0o1777), "1777: perm", id="mode"),
        pytest.param(lambda: ListenConfig(socket="s", socket_owner=":"), "must be USER", id="owner"),
        pytest.param(lambda: ListenConfig(socket="s", vsock=1), "--socket excludes", id="socket_and_vsock"),
        pytest.param(lambda: ListenConfig(vsock=1, port=1), "--vsock excludes", id="vsock_and_port"),
        pytest.param(lambda: ListenConfig(vsock=2**32 - 1), "0 to 4294967294", id="large_vsock"),
        pytest.param(
            lambda: ServerConfig(max_connections_per_address=-1), "per-address -1", id="negative_share"
        ),
        pytest.param(lambda: ServerConfig(handshake_timeout=0), "timeout 0: must", id="no_time"),
        pytest.param(lambda: ExportConfig(image=""), "not a path", id="no_image"),
        pytest.param(lambda: ExportConfig(image="i", grace=-1), "0 to 86400", id="grace"),
        pytest.param(lambda: ServeConfig(), "nothing to serve", id="nothing"),
        pytest.param(
            lambda: ServeConfig(exports=(ExportConfig(image="a"), ExportConfig(image="b"))),
            "'' is used twice",
            id="names",
        ),
        pytest.param(lambda: ServerConfig(max_connections=-1), "1 or more", id="negative_connections"),
        pytest.param(lambda: ServerConfig(busy_poll=-1e-6), "0 to 1000 micro", id="negative_busy_poll"),
        pytest.param(lambda: ServerConfig(busy_poll=0.0011), "--busy-poll 1100: must", id="long_busy_poll"),
        pytest.param(lambda: ExportConfig(image="i", name="é" * 2049), "4098 bytes", id="long_name"),
        pytest.param(lambda: ExportConfig(image="i", description="d" * 4097), "4097 bytes", id="long_text"),
        pytest.param(lambda: ExportConfig(image="i", name="a\0"), "zero byte", id="zero_in_name"),
        pytest.param(lambda: ExportConfig(image="i", name="\udcff"), "UTF-8", id="name_not_utf8"),
        pytest.param(lambda: ExportConfig(image="i", format="vmdk"), "qcow2, raw", id="format"),
        pytest.param(
            lambda: ExportConfig(image="i", no_backing=True, backing_root="/d"), "excludes", id="backing"
        ),
        pytest.param(lambda: ExportConfig(image="i", discard="on"), "unmap, ignore", id="discard"),
        pytest.param(lambda: ExportConfig(image="i", detect_zeroes="yes"), "off, on, unmap", id="zeroes"),
        pytest.param(
            lambda: ExportConfig(image="i", detect_zeroes="unmap", discard="ignore"), "gives space", id="both"
        ),
        pytest.param(
            lambda: ServeConfig(exports=(ExportConfig(image="i"),), run="  "), "empty", id="empty_command"
        ),
    ],
)
def test_refusals(make, what: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=what) as caught:
        make()
    assert "\n" not in str(caught.value)


class TestTls:
    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"mode": "maybe"}, "--tls maybe: must be one of off, on, require"),
            ({"mode": "on"}, "--tls on: needs --tls-certificates DIR or --tls-psk FILE"),
            ({"mode": "require"}, "--tls require: needs"),
            ({"certificates": "d"}, "--tls off: excludes"),
            ({"mode": "on", "certificates": "d", "psk": "f"}, "--tls-psk excludes --tls-certificates"),
            ({"mode": "on", "certificates": ""}, "--tls-certificates '': not a path"),
            ({"mode": "on", "psk": "f", "verify_peer": True}, "--tls-verify-peer: needs --tls-certificates"),
        ],
    )
    def test_refused(self, fields: dict[str, Any], text: str) -> None:
        with pytest.raises(UsageError) as caught:
            TlsConfig(**fields)
        assert str(caught.value).startswith(text)

    def test_certificates_or_keys_are_meant_to_be_used(self) -> None:
        assert TlsConfig.of(None, None, False, None) == TlsConfig()
        assert TlsConfig.of(None, "d", False, None).required
        assert TlsConfig.of(None, None, False, "f").required
        on = TlsConfig.of("on", "d", True, None)
        assert on.enabled and on.verify_peer and not on.required
