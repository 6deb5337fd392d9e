"""TLS with the clients people use: who gets in and who does not, and that all is as it is without TLS."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.interop.serving import digest
from tests.interop.writing import Guest, connect, dirty_by_qemu, judge, read_all, writable_copy
from tests.support import images, libnbd, qemu, servers
from tests.support.certificates import Authority, Pki
from tests.support.marks import requires
from tests.support.servers import NBDBM, Server

pytestmark = [
    requires(
        "openssl", "qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdcopy", "nbd-client", "libnbd", "newer"
    )
]

CASE = "bitmaps"
CONTEXTS = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:fine", "qemu:dirty-bitmap:default"]
SIZE = 16 * images.MIB

MAGIC = b"NBDMAGICIHAVEOPT"
STARTTLS = struct.pack(">8sII", b"IHAVEOPT", 5, 0)
LIST = struct.pack(">8sII", b"IHAVEOPT", 3, 0)
ACK = struct.pack(">QIII", 0x0003E889045565A9, 5, 1, 0)


@pytest.fixture(scope="module")
def case(gallery: images.Gallery) -> images.Case:
    return gallery.get(CASE)


class People:
    """Clients and servers that are not as they should be, each in a directory as all tools want it."""

    def __init__(self, pki: Pki, place: Path) -> None:
        issue = pki.authority.issue
        self.expired = issue("client", place / "expired", start="20200101000000Z", end="20210101000000Z")
        self.other = issue(
            "client", place / "other", subject="/O=Example/CN=other", names="DNS:other.example"
        )
        self.stranger = Authority(place / "strangers").issue("client", place / "stranger")
        # Its certificate is a stranger's, but it knows whom to trust.
        shutil.copy(pki.client / "ca-cert.pem", self.stranger)
        self.distrustful = place / "distrustful"
        self.distrustful.mkdir()
        shutil.copy(place / "strangers/ca-cert.pem", self.distrustful)
        revoked = Authority(place / "authority")
        self.server = revoked.issue("server", place / "server")
        self.good = revoked.issue("client", place / "good", subject="/CN=good")
        self.revoked = revoked.issue("client", place / "revoked", subject="/CN=revoked")
        (self.server / "ca-crl.pem").write_text(revoked.revoke(self.revoked / "client-cert.pem"))
        self.late_server = issue("server", place / "late", start="20200101000000Z", end="20210101000000Z")
        self.misnamed_server = issue(
            "server", place / "misnamed", subject="/CN=x.example", names="DNS:x.example"
        )


@pytest.fixture(scope="module")
def people(pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> People:
    return People(pki, tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def side_by_side(case: images.Case, pki: Pki) -> Iterator[Server]:
    """On a Unix socket; clients may use TLS or not."""
    with servers.nbdbm(case.path, "--tls", "on", "--tls-certificates", pki.server, export="disk") as server:
        yield server


@pytest.fixture(scope="module")
def port(case: images.Case, pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a server for clients with certificates."""
    options = ("-r", "-x", "disk", "--tls-certificates", pki.server, "--tls-verify-peer")
    with servers.nbdbm_on_tcp(case.path, tmp_path_factory.mktemp("tcp"), *options) as (_, port):
        yield port


def uri_of(server: Server | int, certificates: Path, *, export: str = "disk") -> str:
    """For libnbd: the export of a server on a Unix socket, or on a port of localhost."""
    if isinstance(server, int):
        return f"nbds://localhost:{server}/{export}?tls-certificates={certificates}"
    return f"nbds+unix:///{export}?socket={server.socket}&tls-certificates={certificates}"


def node_of(
    server: Server | int, certificates: Path, *, export: str = "disk", more: str = ""
) -> tuple[str, ...]:
    """The same for QEMU's programs: their options."""
    if isinstance(server, int):
        address = f"server.type=inet,server.host=localhost,server.port={server}"
    else:
        address = f"server.type=unix,server.path={server.socket},tls-hostname=localhost"
    # Without its own look at the certificates, so that it is the other side that finds what is wrong.
    return (
        "--object",
        f"tls-creds-x509,id=tls0,endpoint=client,sanity-check=off,dir={certificates}",
        "--image-opts",
        f"driver=nbd,{address},tls-creds=tls0,export={export}{more}",
    )


def plain_uri(server: Server, export: str = "disk") -> str:
    return f"nbd+unix:///{export}?socket={server.socket}"


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


# -- what clients see


@pytest.fixture(params=["unix", "tcp"])
def serving(request: pytest.FixtureRequest, side_by_side: Server, port: int) -> Server | int:
    return side_by_side if request.param == "unix" else port


def test_all_is_as_it_is_without(
    tools: qemu.Tools, serving: Server | int, side_by_side: Server, pki: Pki
) -> None:
    """Content, and the extents of each context."""
    found = libnbd.probe(uri_of(serving, pki.client), tools, contexts=CONTEXTS)
    assert found == libnbd.probe(plain_uri(side_by_side), tools, contexts=CONTEXTS)
    assert any(flags for _, flags in found["maps"]["qemu:dirty-bitmap:fine"])


def test_nbdinfo(tools: qemu.Tools, serving: Server | int, side_by_side: Server, pki: Pki) -> None:
    uri = uri_of(serving, pki.client)
    tools.run("nbdinfo", "--is=tls", uri)
    (found,) = json.loads(tools.run("nbdinfo", "--no-content", "--json", uri))["exports"]
    assert found["export-size"] == SIZE and set(CONTEXTS) <= set(found["contexts"])
    (listed,) = json.loads(tools.run("nbdinfo", "--no-content", "--json", "--list", uri))["exports"]
    assert listed["export-name"] == "disk"
    for context in CONTEXTS:
        shown = [
            json.loads(tools.run("nbdinfo", f"--map={context}", "--json", each))
            for each in (uri, plain_uri(side_by_side))
        ]
        assert shown[0] == shown[1]


def test_nbdcopy(
    tools: qemu.Tools,
    serving: Server | int,
    gallery: images.Gallery,
    case: images.Case,
    pki: Pki,
    tmp_path: Path,
) -> None:
    tools.run("nbdcopy", "--connections=4", uri_of(serving, pki.client), tmp_path / "copy")
    assert digest(tmp_path / "copy") == gallery.expected(case)


def test_qemu_img(
    tools: qemu.Tools,
    serving: Server | int,
    side_by_side: Server,
    gallery: images.Gallery,
    case: images.Case,
    pki: Pki,
    tmp_path: Path,
) -> None:
    tools.img("convert", *node_of(serving, pki.client), "-O", "raw", tmp_path / "copy")
    assert digest(tmp_path / "copy") == gallery.expected(case)
    bitmap = ",x-dirty-bitmap=qemu:dirty-bitmap:fine"
    shown = tools.img_json("map", *node_of(serving, pki.client, more=bitmap))
    assert {entry["data"] for entry in shown} == {True, False}
    plain = f"driver=nbd,server.type=unix,server.path={side_by_side.socket},export=disk{bitmap}"
    assert shown == tools.img_json("map", "--image-opts", plain)


def test_nbd_client_lists(case: images.Case, pki: Pki, port: int) -> None:
    """Without the kernel it can do that much."""
    known = ["-certfile", pki.client / "client-cert.pem", "-keyfile", pki.client / "client-key.pem"]
    trusting = ["-cacertfile", pki.client / "ca-cert.pem", "-tlshostname", "localhost"]

    def listed(*options: object) -> subprocess.CompletedProcess[str]:
        return qemu.run(qemu.SYSTEM.argv("nbd-client", "-l", "localhost", port, *options), check=False)

    done = listed(*known, *trusting)
    assert done.returncode == 0 and "disk" in done.stdout.split(), done.stderr
    assert listed(*trusting).returncode != 0
    done = listed()
    assert done.returncode != 0 and "this server is for clients with TLS" in done.stderr


def test_required_is_required(tools: qemu.Tools, port: int) -> None:
    done = qemu.run(tools.argv("nbdcopy", f"nbd://localhost:{port}/disk", "null:"), check=False)
    assert done.returncode != 0 and "server requires TLS" in done.stderr
    done = qemu.run(
        tools.argv("qemu-img", "info", "--image-opts", f"driver=nbd,host=localhost,port={port},export=disk"),
        check=False,
    )
    assert done.returncode != 0 and "TLS negotiation required" in done.stderr


def test_plain_and_secret_clients_at_once(tools: qemu.Tools, side_by_side: Server, pki: Pki) -> None:
    plain = connect(plain_uri(side_by_side))
    secret = connect(uri_of(side_by_side, pki.anonymous))
    assert not plain.get_tls_negotiated() and secret.get_tls_negotiated()
    assert plain.pread(SIZE, 0) == secret.pread(SIZE, 0)
    # One that would rather, but does not insist.
    tools.run("nbdinfo", "--size", plain_uri(side_by_side))
    for handle in (plain, secret):
        handle.shutdown()


# -- who is not let in


def fails(argv: list[str]) -> str:
    done = qemu.run(argv, check=False)
    assert done.returncode != 0, f"it was let in: {done.stdout}"
    return done.stderr


REASONS = {
    "anonymous": "peer did not return a certificate",
    "stranger": "certificate verify failed: ",
    "expired": "certificate verify failed: certificate has expired",
    "revoked": "certificate verify failed: certificate revoked",
}


@pytest.mark.parametrize("who", REASONS)
def test_clients_that_are_refused(
    tools: qemu.Tools, case: images.Case, pki: Pki, people: People, who: str
) -> None:
    """None sees anything, the log says why, and the next good one is served."""
    certificates, good, place = getattr(people, who, pki.anonymous), pki.client, pki.server
    if who == "revoked":
        good, place = people.good, people.server
    with servers.nbdbm(case.path, "--tls-certificates", place, "--tls-verify-peer", export="disk") as server:
        for argv in (
            tools.argv("nbdcopy", uri_of(server, certificates), "null:"),
            tools.argv("qemu-img", "info", *node_of(server, certificates)),
        ):
            seen = server.output().count("TLS failure")
            fails(argv)
            until(lambda seen=seen: server.output().count("TLS failure") > seen, "nothing in the log")  # type: ignore[misc]
        lines = [line for line in server.output().splitlines() if "TLS failure" in line]
        assert all(REASONS[who] in line for line in lines), lines
        tools.run("nbdinfo", "--size", uri_of(server, good))
        tools.img("info", *node_of(server, good))


@pytest.mark.parametrize("kind", ["distrusted", "expired", "misnamed"])
def test_servers_that_are_refused(
    tools: qemu.Tools, case: images.Case, pki: Pki, people: People, kind: str, tmp_path: Path
) -> None:
    """By the client, for what is wrong with the server's certificate; a connection is all it costs."""
    place = {"distrusted": pki.server, "expired": people.late_server, "misnamed": people.misnamed_server}[
        kind
    ]
    certificates = people.distrustful if kind == "distrusted" else pki.anonymous
    options = ("-r", "-x", "disk", "--tls-certificates", place)
    with servers.nbdbm_on_tcp(case.path, tmp_path, *options) as (process, port):
        said = fails(tools.argv("nbdcopy", uri_of(port, certificates), "null:"))
        assert "certificate verification" in said
        assert "ertificate" in fails(tools.argv("qemu-img", "info", *node_of(port, certificates)))
        # Who does not look is served (libnbd 1.14 cannot be told that in a URI).
        qemu.newer().run("nbdinfo", "--size", uri_of(port, certificates) + "&tls-verify-peer=false")
        assert process.poll() is None


# -- writing


def test_writes_by_libnbd(gallery: images.Gallery, pki: Pki, tmp_path: Path) -> None:
    """All kinds of requests on three connections, one of them without TLS; QEMU judges what is left."""
    case = writable_copy(CASE, gallery, tmp_path)
    guest = Guest(gallery.content(gallery.get(CASE)), 5)
    before = dirty_by_qemu(case)
    options = ("--tls", "on", "--tls-certificates", pki.server)
    with servers.nbdbm(case.path, *options, writable=True, export="disk") as server:
        secret = uri_of(server, pki.anonymous)
        handles = [connect(secret), connect(secret), connect(plain_uri(server))]
        assert [handle.get_tls_negotiated() for handle in handles] == [True, True, False]
        guest.play(handles, 60, 300_000)
        guest.storm(handles, 60, 7777)
        for handle in handles:
            assert read_all(handle, guest.size) == guest.content
            handle.shutdown()
    judge(case, guest, before, [qemu.SYSTEM, qemu.newer()])


def test_writes_by_programs(tools: qemu.Tools, gallery: images.Gallery, pki: Pki, tmp_path: Path) -> None:
    """qemu-io, then nbdcopy of a whole disk from several connections."""
    case = writable_copy(CASE, gallery, tmp_path)
    guest = Guest(gallery.content(gallery.get(CASE)), 6)
    before = dirty_by_qemu(case)
    options = ("--tls-certificates", pki.server)
    with servers.nbdbm(case.path, *options, writable=True, export="disk") as server:
        *secrets, node = node_of(server, pki.anonymous)
        words = ["-c", "write -P 7 65000 70000", "-c", "write -z 2M 192k", "-c", "flush"]
        out = tools.run("qemu-io", *secrets, *words, node)
        assert "failed" not in out
        guest.wrote(65000, b"\7" * 70000)
        guest.wrote(2 * images.MIB, bytes(192 * 1024))
        assert read_all(connect(uri_of(server, pki.anonymous)), guest.size) == guest.content
    judge(case, guest, before, [tools])

    (disk := tmp_path / "disk").write_bytes(images.noise(3, guest.size))
    with servers.nbdbm(case.path, *options, writable=True, export="disk") as server:
        tools.run("nbdcopy", "--flush", "--connections=4", disk, uri_of(server, pki.anonymous))
    guest.wrote(0, disk.read_bytes())
    judge(case, guest, before, [tools])


# -- rules of each export


@contextlib.contextmanager
def configured(text: str, place: Path) -> Iterator[Server]:
    """``nbdbm serve --config`` on a Unix socket; it must end well."""
    (place / "nbdbm.toml").write_text(text)
    argv = [*NBDBM, "serve", "--config", str(place / "nbdbm.toml"), "--socket"]
    with servers.started(lambda path: [*argv, path]) as server:
        yield server
        status = servers.stop(server.process)
        assert status == 0 and "Traceback" not in server.output(), server.output()


def test_rules_of_each_export(
    tools: qemu.Tools, case: images.Case, pki: Pki, people: People, tmp_path: Path
) -> None:
    certificates = f'[tls]\ntls = "on"\ntls-certificates = "{pki.server}"\ntls-verify-peer = true\n'
    rules = {
        "public": "",
        "secret": "require-tls = true",
        "cn": 'allow-subjects = ["backup"]',
        "dns": 'allow-subjects = ["backup.example"]',
        "dn": 'allow-subjects = ["CN=backup,O=Example", "CN=nobody"]',
    }
    exports = [
        f'[[export]]\nname = "{name}"\nimage = "{case.path}"\nread-only = true\n{rule}\n'
        for name, rule in rules.items()
    ]
    with configured(certificates + "".join(exports), tmp_path) as server:

        def listed(uri: str) -> set[str]:
            found = json.loads(tools.run("nbdinfo", "--no-content", "--json", "--list", uri))
            return {each["export-name"] for each in found["exports"]}

        assert listed(uri_of(server, pki.client, export="")) == set(rules)
        assert listed(uri_of(server, people.other, export="")) == {"public", "secret"}
        for name in rules:
            assert tools.run("nbdinfo", "--size", uri_of(server, pki.client, export=name)).strip() == str(
                SIZE
            )
            tools.img("info", *node_of(server, pki.client, export=name))
            other = tools.argv("nbdcopy", uri_of(server, people.other, export=name), "null:")
            plain = tools.argv("nbdcopy", plain_uri(server, name), "null:")
            if name == "public":
                qemu.run(plain)
            else:
                assert "TLS" in fails(plain)
            if name in ("public", "secret"):
                qemu.run(other)
            else:
                fails(other)


def test_rules_for_tls_where_it_is_off(case: images.Case, pki: Pki, tmp_path: Path) -> None:
    """One line, instead of an export that nobody can use; unless the command line turns TLS on."""
    config = tmp_path / "nbdbm.toml"
    config.write_text(f'[[export]]\nimage = "{case.path}"\nread-only = true\nrequire-tls = true\n')
    serve = ["serve", "--config", config, "--socket", tmp_path / "s"]
    done = servers.nbdbm_run(*serve)
    assert done.returncode == 1
    assert done.stderr == (
        f"nbdbm: {config}: line 4: export.1.require-tls: "
        "TLS is off; [tls] with tls-certificates turns it on\n"
    )
    done = servers.nbdbm_run(*serve, "--tls-certificates", pki.server, "--run", 'test "$uri"')
    assert done.returncode == 0, done.stderr


# -- new certificates


def test_new_certificates_while_copying(
    tools: qemu.Tools,
    gallery: images.Gallery,
    case: images.Case,
    pki: Pki,
    tmp_path: Path,
) -> None:
    """A copy that has begun goes on to its end; who comes after SIGHUP sees the new certificate."""
    place = Path(shutil.copytree(pki.server, tmp_path / "certificates"))
    fresh = Authority(tmp_path / "authority", "New authority").issue("server", tmp_path / "fresh")
    trusting = tmp_path / "trusting"
    trusting.mkdir()
    shutil.copy(fresh / "ca-cert.pem", trusting)
    # By TCP: over a Unix socket, libnbd 1.14 takes any certificate.
    options = ("-r", "-x", "disk", "--tls-certificates", place)
    with servers.nbdbm_on_tcp(case.path, tmp_path, *options) as (process, port):
        # Into a pipe that is not read: it is in the middle of the disk for as long as we like.
        with subprocess.Popen(
            tools.argv("nbdcopy", "--connections=1", uri_of(port, pki.anonymous), "-"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=qemu.environment(),
        ) as copy:
            assert copy.stdout is not None
            total = hashlib.sha256(copy.stdout.read(1000))
            shutil.copytree(fresh, place, dirs_exist_ok=True)
            process.send_signal(signal.SIGHUP)
            new = tools.argv("nbdinfo", "--size", uri_of(port, trusting))
            until(lambda: qemu.run(new, check=False).returncode == 0, "no new certificate")
            fails(tools.argv("nbdinfo", "--size", uri_of(port, pki.anonymous)))
            assert copy.poll() is None
            while block := copy.stdout.read(1 << 20):
                total.update(block)
        assert copy.returncode == 0
        assert total.hexdigest() == gallery.expected(case)


def test_bad_new_certificates_change_nothing(case: images.Case, pki: Pki, tmp_path: Path) -> None:
    place = Path(shutil.copytree(pki.server, tmp_path / "certificates"))
    with servers.nbdbm(case.path, "--tls-certificates", place, export="disk") as server:
        (place / "server-cert.pem").write_text("half of one")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "TLS goes on with what it has" in server.output(), "nothing in the log")
        assert f"{place}/server-cert.pem: holds no certificate in PEM" in server.output()
        qemu.SYSTEM.run("nbdinfo", "--size", uri_of(server, pki.anonymous))


# -- pre-shared keys


@requires("python3.13")
def test_pre_shared_keys(
    tools: qemu.Tools, gallery: images.Gallery, case: images.Case, tmp_path: Path
) -> None:
    """By Debian 13's Python: the right key gets in, another key or another name for it does not."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    for place, text in ((good, f"alice:{'ab' * 32}\nbob:{'12' * 32}\n"), (bad, f"alice:{'cd' * 32}\n")):
        place.mkdir()
        (place / "keys.psk").write_text(text)
        (place / "keys.psk").chmod(0o600)
    with (bad / "keys.psk").open("a") as file:
        file.write(f"mallory:{'ab' * 32}\n")
    config = tmp_path / "nbdbm.toml"
    export = f'[[export]]\nimage = "{case.path}"\nread-only = true\n'
    config.write_text(
        f'[tls]\ntls-psk = "{good}/keys.psk"\n{export}name = "disk"\n'
        f'{export}name = "bobs"\nallow-subjects = ["bob"]\n'
    )
    words, environment = qemu.nbdbm_by_newer_python()
    argv = [*words, "serve", "--config", str(config), "--socket"]
    with servers.started(lambda path: [*argv, path], environment=environment) as server:

        def ends(who: str, place: Path, export: str = "disk") -> tuple[int, int]:
            uri = f"nbds+unix://{who}@/{export}?socket={server.socket}&tls-psk-file={place}/keys.psk"
            secret = f"tls-creds-psk,id=tls0,dir={place},username={who},endpoint=client"
            node = f"driver=nbd,server.type=unix,server.path={server.socket},tls-creds=tls0,export={export}"
            copy = tools.argv("nbdcopy", uri, tmp_path / "copy")
            info = tools.argv("qemu-img", "info", "--object", secret, "--image-opts", node)
            first, second = qemu.run(copy, check=False), qemu.run(info, check=False)
            return first.returncode, second.returncode

        assert ends("alice", good) == (0, 0), server.output()
        assert digest(tmp_path / "copy") == gallery.expected(case)
        assert ends("bob", good, "bobs") == (0, 0), server.output()
        for refused in (ends("alice", good, "bobs"), ends("alice", bad), ends("mallory", bad)):
            assert 0 not in refused, server.output()
        assert "(TLSv1.3, alice): export 'disk'" in server.output()
        assert servers.stop(server.process) == 0 and "Traceback" not in server.output(), server.output()


# -- what is not TLS


def greeted(server: Server) -> socket.socket:
    """A connection past the greeting, by bytes."""
    client = server.connect()
    assert exactly(client, 18)[:16] == MAGIC
    client.sendall(struct.pack(">I", 3))
    return client


def exactly(client: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        block = client.recv(count - len(found))
        assert block, "the connection ended"
        found += block
    return found


def rest_of(client: socket.socket) -> bytes:
    """All until the connection ends."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while block := client.recv(65536):
            found += block
    return found


def test_bystanders_are_not_disturbed(tools: qemu.Tools, case: images.Case, pki: Pki, tmp_path: Path) -> None:
    """By plain text behind STARTTLS, by what is no TLS, by those who never finish or begin it."""
    with servers.nbdbm(case.path, "--tls-certificates", pki.server, export="disk") as server:
        bystander = connect(uri_of(server, pki.anonymous))
        idle = greeted(server)
        idle.sendall(STARTTLS)
        assert exactly(idle, len(ACK)) == ACK
        half = greeted(server)
        half.sendall(STARTTLS)
        assert exactly(half, len(ACK)) == ACK
        half.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")

        injecting = greeted(server)
        injecting.sendall(STARTTLS + LIST)
        answer = rest_of(injecting)
        assert answer in (b"", ACK), "it was answered"
        injecting.close()
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", LIST, os.urandom(100_000)):
            client = greeted(server)
            client.sendall(STARTTLS)
            assert exactly(client, len(ACK)) == ACK
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(garbage)
            # TLS may say what it thinks of it, by an alert; nothing of NBD is said.
            answer = rest_of(client)
            assert answer == b"" or answer[0] == 0x15, answer[:100]
            client.close()

        assert bystander.pread(SIZE, 0)
        tools.run("nbdcopy", uri_of(server, pki.anonymous), tmp_path / "copy")
        bystander.shutdown()
        for client in (idle, half):
            client.close()
        assert server.alive()
        assert "Traceback" not in server.output()


def test_contents_are_not_on_the_wire(case: images.Case, pki: Pki, gallery: images.Gallery) -> None:
    """What passes on the socket is not the disk: looked at by somebody in the middle."""
    content = gallery.content(case)
    at = next(at for at in range(0, SIZE, 4096) if len(set(content[at : at + 64])) > 8)
    needle = content[at : at + 64]
    with servers.nbdbm(case.path, "--tls", "on", "--tls-certificates", pki.server, export="disk") as server:
        for uri, seen in ((plain_uri(server), True), (uri_of(server, pki.anonymous), False)):
            passed = watched(server, uri, at)
            assert len(passed) > 4096
            assert (needle in passed) is seen


def watched(server: Server, uri: str, at: int) -> bytes:
    """What the server sent to a client of ``uri`` that read 64 KiB at ``at``."""
    seen = bytearray()
    middle = socket.create_server(str(path := Path(server.socket).with_name("m")), family=socket.AF_UNIX)

    def relay(source: socket.socket, target: socket.socket, note: Any) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(65536):
                note(block)
                target.sendall(block)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        client, _ = middle.accept()
        with client, server.connect() as peer:
            back = threading.Thread(target=relay, args=(peer, client, seen.extend))
            back.start()
            relay(client, peer, len)
            back.join()

    thread = threading.Thread(target=accept)
    with middle:
        thread.start()
        handle = connect(uri.replace(server.socket, str(path)))
        assert len(handle.pread(65536, min(at, SIZE - 65536)))
        handle.shutdown()
        thread.join(20)
    path.unlink()
    return bytes(seen)
