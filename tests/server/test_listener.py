"""Listeners: who may have a path, when it appears, who removes it; what a service manager hands over."""

from __future__ import annotations

import os
import socket
import stat
import time
from pathlib import Path

import pytest

from nbdbm.config import ListenConfig
from nbdbm.errors import UsageError
from nbdbm.peer import Peer
from nbdbm.server import listener as listeners
from nbdbm.server.listener import (
    UnixListener,
    bind,
    bind_tcp,
    inherited,
    notify,
    owner_ids,
    peer_of,
    prepare,
    silence,
)


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))


def leave_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))


class TestUnix:
    def test_the_path_appears_with_listen_and_goes_with_close(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        listener = UnixListener(str(path))
        assert not path.exists()
        listener.listen()
        assert os.listdir(tmp_path) == ["s"]
        connect(path)
        listener.close()
        listener.close()
        assert os.listdir(tmp_path) == []

    def test_closed_before_listen(self, tmp_path: Path) -> None:
        UnixListener(str(tmp_path / "s")).close()
        assert os.listdir(tmp_path) == []

    def test_stale_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        leave_stale(path)
        listener = UnixListener(str(path))
        listener.listen()
        connect(path)
        listener.close()
        assert os.listdir(tmp_path) == []

    def test_stale_stays_if_nothing_comes_of_it(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        leave_stale(path)
        UnixListener(str(path)).close()
        assert stat.S_ISSOCK(path.stat().st_mode)

    def test_live_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        first = UnixListener(str(path))
        first.listen()
        with pytest.raises(UsageError, match="another process is listening there"):
            UnixListener(str(path))
        connect(path)
        first.close()

    def test_live_with_full_backlog_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting,
        ):
            server.bind(str(path))
            server.listen(0)
            waiting.connect(str(path))
            with pytest.raises(UsageError, match="another process"):
                UnixListener(str(path))

    def test_two_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        first, second = UnixListener(str(path)), UnixListener(str(path))
        first.listen()
        with pytest.raises(UsageError, match="somebody else"):
            second.listen()
        second.close()
        connect(path)
        first.close()
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("kind", ["file", "directory", "link"])
    def test_what_is_no_socket_stays(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "s"
        if kind == "file":
            path.write_text("precious")
        elif kind == "directory":
            path.mkdir()
        else:
            path.symlink_to("nowhere")
        with pytest.raises(UsageError, match="is not a socket"):
            UnixListener(str(path))
        assert os.listdir(tmp_path) == ["s"]

    def test_a_socket_of_another_kind_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.bind(str(path))
            with pytest.raises(UsageError, match="somebody else's"):
                UnixListener(str(path))
        assert path.exists()

    def test_a_successor_is_not_removed(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        first = UnixListener(str(path))
        first.listen()
        path.unlink()
        second = UnixListener(str(path))
        second.listen()
        first.close()
        connect(path)
        second.close()

    def test_missing_directory(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            UnixListener(str(tmp_path / "no" / "s"))
        assert caught.value.filename == str(tmp_path / "no" / "s")

    @pytest.mark.parametrize("stale", [False, True])
    def test_the_longest_path(self, tmp_path: Path, stale: bool) -> None:
        path = tmp_path / ("s" * (107 - len(os.fsencode(tmp_path)) - 1))
        if stale:
            leave_stale(path)
        listener = bind(ListenConfig(socket=str(path)))
        listener.listen()
        connect(path)
        listener.close()
        assert os.listdir(tmp_path) == []

    def test_no_hard_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", refuse)
        listener = UnixListener(str(tmp_path / "s"))
        listener.listen()
        connect(tmp_path / "s")
        listener.close()
        assert os.listdir(tmp_path) == []

    def test_uri(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        listener = UnixListener("a b%.sock")
        assert str(listener.uri("x/ü")) == f"nbd+unix:///x/%C3%BC?socket={tmp_path}/a%20b%25.sock"
        listener.close()


class TestTcp:
    def test_every_address_gets_one_port(self) -> None:
        listener = bind_tcp("localhost", 0)
        try:
            ports = {sock.getsockname()[1] for sock in listener.sockets}
            assert len(ports) == 1
            assert str(listener.uri("")) == f"nbd://localhost:{ports.pop()}"
            listener.listen()
            for sock in listener.sockets:
                socket.create_connection(sock.getsockname()[:2]).close()
        finally:
            listener.close()

    @pytest.mark.parametrize(
        ("host", "shown"),
        [("127.0.0.1", "127.0.0.1"), ("*", "localhost"), ("0.0.0.0", "localhost")],
    )
    def test_uri(self, host: str, shown: str) -> None:
        listener = bind_tcp(host, 0)
        try:
            port = listener.sockets[0].getsockname()[1]
            assert str(listener.uri("n")) == f"nbd://{shown}:{port}/n"
        finally:
            listener.close()

    def test_port_in_use(self) -> None:
        listener = bind_tcp("127.0.0.1", 0)
        listener.listen()
        port = listener.sockets[0].getsockname()[1]
        with pytest.raises(OSError, match="in use") as caught:
            bind_tcp("127.0.0.1", port)
        assert caught.value.filename == f"127.0.0.1:{port}"
        listener.close()

    @pytest.mark.parametrize("host", ["no such host", "x" * 300, "a..b"])
    def test_no_such_host(self, host: str) -> None:
        with pytest.raises(UsageError, match=host):
            bind_tcp(host, 0)

    def test_foreign_address(self) -> None:
        with pytest.raises(OSError, match="assign") as caught:
            bind_tcp("192.0.2.1", 1234)
        assert caught.value.filename == "192.0.2.1:1234"

    def test_a_missing_family_is_passed_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        both = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        ]
        monkeypatch.setattr(listeners.socket, "getaddrinfo", lambda *_, **__: both)
        listener = bind_tcp("both", 0)
        assert [sock.getsockname()[0] for sock in listener.sockets] == ["127.0.0.1"]
        listener.close()


class TestInherited:
    def environ(self, count: str = "1") -> dict[str, str]:
        return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": "x", "HOME": "/"}

    def test_none(self) -> None:
        assert inherited({}) == []
        assert inherited({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == []

    def test_several(self, tmp_path: Path) -> None:
        tcp = bind_tcp("127.0.0.1", 0)
        tcp.listen()
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        # Two neighbouring descriptors, as a service manager would pass them.
        first = 500
        os.dup2(tcp.sockets[0].fileno(), first)
        os.dup2(unix.fileno(), first + 1)
        environ = self.environ("2")
        found = inherited(environ, first)
        assert environ == {"HOME": "/"}
        port = tcp.sockets[0].getsockname()[1]
        assert [str(listener.uri("e")) for listener in found] == [
            f"nbd://127.0.0.1:{port}/e",
            f"nbd+unix:///e?socket={tmp_path}/s",
        ]
        assert not os.get_inheritable(first)
        for listener in (*found, tcp):
            listener.close()
        unix.close()
        assert (tmp_path / "s").exists()  # the service manager's, not ours

    def test_not_a_number(self) -> None:
        with pytest.raises(UsageError, match="not a number"):
            inherited(self.environ("x"))

    def test_not_a_socket(self, tmp_path: Path) -> None:
        fd = os.open(tmp_path, os.O_RDONLY)
        try:
            with pytest.raises(UsageError, match=f"descriptor {fd}"):
                inherited(self.environ(), fd)
        finally:
            os.close(fd)

    def test_not_listening(self) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            fd = os.dup(sock.fileno())
        with pytest.raises(UsageError, match="not a listening stream socket"):
            inherited(self.environ(), fd)
        os.close(fd)


def test_prepare() -> None:
    listener = bind_tcp("127.0.0.1", 0)
    listener.listen()
    with socket.create_connection(listener.sockets[0].getsockname()):
        sock, _ = listener.sockets[0].accept()
        with sock:
            before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            prepare(sock)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            # A vanished client is found out within five minutes.
            idle, interval, count = (
                sock.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + interval * count <= 300
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= before
            assert not sock.getblocking()
    listener.close()


def test_silence() -> None:
    """Of TCP only, and counted from what the client's kernel last answered."""
    listener = bind_tcp("127.0.0.1", 0)
    listener.listen()
    with socket.create_connection(listener.sockets[0].getsockname()) as client:
        sock, _ = listener.sockets[0].accept()
        with sock:
            time.sleep(0.3)
            before = silence(sock)
            assert before >= 0.29
            sock.sendall(b"anything")
            assert client.recv(8) == b"anything"
            assert silence(sock) < before
        assert silence(sock) == 0, "closed"
    listener.close()
    one, other = socket.socketpair()
    with one, other:
        time.sleep(0.05)
        assert silence(one) == 0


class TestNotify:
    @pytest.mark.parametrize("abstract", [False, True])
    def test_tells(self, tmp_path: Path, abstract: bool) -> None:
        name = f"@{tmp_path}/n" if abstract else f"{tmp_path}/n"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind("\0" + name[1:] if abstract else name)
            manager.settimeout(10)
            notify(name, "READY=1")
            assert manager.recv(100) == b"READY=1"

    def test_nobody_to_tell(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        notify(None, "READY=1")
        notify("", "READY=1")
        assert not caplog.records
        notify(str(tmp_path / "gone"), "READY=1")
        assert "gone: No such file" in caplog.text


class TestOwner:
    def test_mode_and_owner_are_there_before_it_can_be_connected_to(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        made = bind(
            ListenConfig(socket=str(path), socket_mode=0o600, socket_owner=f"{os.getuid()}:{os.getgid()}")
        )
        (hidden,) = tmp_path.iterdir()
        assert stat.S_IMODE(hidden.stat().st_mode) == 0o600
        made.listen()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        made.close()

    @pytest.mark.parametrize(
        ("owner", "ids"),
        [
            (None, (-1, -1)),
            ("0", (0, -1)),
            ("7:8", (7, 8)),
            (":8", (-1, 8)),
            ("root:root", (0, 0)),
            ("root", (0, -1)),
        ],
    )
    def test_ids(self, owner: str | None, ids: tuple[int, int]) -> None:
        assert owner_ids(owner) == ids

    @pytest.mark.parametrize("owner", ["no-such-user", "0:no-such-group"])
    def test_nobody(self, owner: str) -> None:
        with pytest.raises(UsageError, match="no-such"):
            owner_ids(owner)

    def test_an_owner_that_may_not_be_given_leaves_no_socket(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def chown(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "chown", chown)
        with pytest.raises(PermissionError) as caught:
            bind(ListenConfig(socket=str(tmp_path / "s"), socket_owner="1"))
        assert caught.value.filename == str(tmp_path / "s")
        assert list(tmp_path.iterdir()) == []


class TestVsock:
    """Binding alone: a connection needs a virtual machine, or a kernel with vsock's loopback."""

    def test_uri_and_peer(self) -> None:
        try:
            made = bind(ListenConfig(vsock=0))
        except UsageError as error:
            assert "this kernel has no vsock" in str(error)
            return
        port = made.sockets[0].getsockname()[1]
        assert str(made.uri("disk")) == f"nbd+vsock://2:{port}/disk"
        assert peer_of(made.sockets[0], (3, 1027)) == Peer(address="vsock:3:1027")
        assert not made.exposed
        # libnbd's URIs take 31 bits.
        assert port in listeners.FREE_PORTS
        with pytest.raises(OSError, match=f"vsock:{port}"):
            bind(ListenConfig(vsock=port))
        made.close()

    def test_no_such_family(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise OSError(97, "Address family not supported by protocol")

        monkeypatch.setattr(socket, "socket", refuse)
        with pytest.raises(UsageError, match="--vsock 5: this kernel has no vsock: Address family"):
            bind(ListenConfig(vsock=5))


@pytest.mark.parametrize(("host", "exposed"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_exposed(host: str, exposed: bool) -> None:
    made = bind_tcp(host, 0)
    assert made.exposed is exposed
    made.close()


class TestPeer:
    def test_of_a_unix_socket_is_the_process(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            peer = peer_of(ours, "")
        assert (peer.address, peer.pid, peer.uid, peer.gid) == ("unix", os.getpid(), os.getuid(), os.getgid())
        assert peer.host is None

    @pytest.mark.parametrize(
        ("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")], ids=["v4", "v6"]
    )
    def test_of_tcp_is_the_address(self, host: str, shown: str) -> None:
        with (
            socket.create_server(
                (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
            ) as server,
            socket.create_connection(server.getsockname()[:2]) as client,
        ):
            accepted, address = server.accept()
            with accepted:
                peer = peer_of(accepted, address)
            port = client.getsockname()[1]
        assert (peer.host, peer.address, peer.pid) == (host, f"{shown}:{port}", None)
