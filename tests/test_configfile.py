"""The configuration file: what each key becomes, and each mistake with its line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbm import configfile
from nbdbm.access import Access
from nbdbm.config import ExportConfig, ListenConfig, ServeConfig, ServerConfig, TlsConfig
from nbdbm.configfile import line_of, load
from nbdbm.errors import Mistakes, UsageError


def loaded(tmp_path: Path, text: str | bytes) -> ServeConfig:
    path = tmp_path / "nbdbm.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load(str(path))


def mistakes(tmp_path: Path, text: str | bytes) -> list[str]:
    """The lines of the refusal, without the file's name."""
    with pytest.raises(UsageError) as caught:
        loaded(tmp_path, text)
    error = caught.value
    lines = error.lines if isinstance(error, Mistakes) else [str(error)]
    prefix = f"{tmp_path}/nbdbm.toml: "
    assert all(line.startswith(prefix) for line in lines)
    return [line.removeprefix(prefix) for line in lines]


KEYS = [
    *configfile.LISTEN,
    *configfile.SERVER,
    *configfile.EXPORT,
    *configfile.IMAGE,
    *configfile.ACCESS,
]
"""Every key there is."""

EVERY_KEY = """
[listen]
socket = "/run/nbdbm.sock"
socket-mode = "0660"
socket-owner = "root:disk"

[server]
max-connections = 7
max-connections-per-address = 3
handshake-timeout = 2.5
busy-poll = 0
metrics = "127.0.0.1:9100"
control = "/run/nbdbm.control"

[tls]
tls = "on"
tls-certificates = "pki"
tls-verify-peer = true

[[export]]
image = "vda.qcow2"
name = "vda"
description = "system disk"
format = "qcow2"
read-only = true
load-snapshot = "before"
backing-root = "base"
force-share = true
discard = "ignore"
detect-zeroes = "on"
bitmaps = ["monday", "tuesday"]
allocation-depth = false
on-demand = true
grace = 60
allow-networks = [
    "192.0.2.0/24",
    "unix",
]
allow-users = ["root", 1000]
allow-subjects = ["CN=backup"]
require-tls = true
max-connections = 2

[[export]]
image = "/var/lib/vdb.qcow2"
no-backing = true

[directory]
path = "images"
read-only = true
"""


def test_every_key(tmp_path: Path) -> None:
    config = loaded(tmp_path, EVERY_KEY)
    assert config.file == f"{tmp_path}/nbdbm.toml"
    assert config.listen == ListenConfig(
        socket="/run/nbdbm.sock", socket_mode=0o660, socket_owner="root:disk"
    )
    assert config.server == ServerConfig(
        max_connections=7,
        max_connections_per_address=3,
        handshake_timeout=2.5,
        busy_poll=0,
        metrics="127.0.0.1:9100",
        control="/run/nbdbm.control",
    )
    assert config.exports == (
        ExportConfig(
            image=f"{tmp_path}/vda.qcow2",
            name="vda",
            description="system disk",
            format="qcow2",
            read_only=True,
            snapshot="before",
            backing_root=f"{tmp_path}/base",
            force_share=True,
            discard="ignore",
            detect_zeroes="on",
            bitmaps=("monday", "tuesday"),
            allocation_depth=False,
            on_demand=True,
            grace=60,
            access=Access(
                networks=("192.0.2.0/24", "unix"),
                users=(0, 1000),
                subjects=("CN=backup",),
                tls=True,
                max_connections=2,
            ),
        ),
        ExportConfig(image="/var/lib/vdb.qcow2", no_backing=True),
    )
    assert config.directory == ExportConfig(image=f"{tmp_path}/images", read_only=True)


def test_every_key_there_is_was_tried() -> None:
    for key in KEYS:
        if key not in ("bind", "port", "vsock"):
            assert f"\n{key} =" in EVERY_KEY


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()
    example = text.split("```toml\n", 1)[1].split("```", 1)[0]
    config = loaded(tmp_path, example)
    assert [export.name for export in config.exports] == ["vda", "vdb"] and config.directory is not None
    for key in KEYS:
        assert f"`{key}`" in text


def test_sockets_are_relative_to_the_file_too(tmp_path: Path) -> None:
    export = '[[export]]\nimage = "a"\n'
    config = loaded(tmp_path, f'{export}[listen]\nsocket = "s"\n[server]\ncontrol = "run/c"')
    assert (config.listen.socket, config.server.control) == (f"{tmp_path}/s", f"{tmp_path}/run/c")
    (line,) = mistakes(tmp_path, f'{export}[listen]\nsocket = "@s"')
    assert "abstract" in line


def test_tcp_and_vsock(tmp_path: Path) -> None:
    export = '[[export]]\nimage = "a"\n'
    assert loaded(tmp_path, f'{export}[listen]\nbind = "*"\nport = 0').listen == ListenConfig(
        host="*", port=0
    )
    assert loaded(tmp_path, f"{export}[listen]\nvsock = 10809").listen == ListenConfig(vsock=10809)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["exports nothing; it needs [[export]] tables or [directory]"]),
        ("x = 1", ["line 1: x: unknown; there are [listen], [tls], [server], [[export]] and [directory]"]),
        ("listen = 3", ["line 1: listen: must be a table"]),
        ("[export]\nimage = 'a'", ["line 1: export: must be written [[export]], once for each export"]),
        ("\n[[export]]\nname = 'a'", ["line 2: export.1.image: is missing"]),
        ("[directory]", ["line 1: directory.path: is missing"]),
        ("[[export]]\nimage = 5", ["line 2: export.1.image: must be a string"]),
        ("[[export]]\nimage = ''", ["line 2: export.1.image: '': not a path"]),
        (
            "[[export]]\nimage = 'a'\ngrace = 3",
            ["line 3: export.1.grace: needs on-demand = true: other images stay open"],
        ),
        ("[server]\nmax-connections = true", ["line 2: server.max-connections: must be a whole number"]),
        ("[server]\nhandshake-timeout = nan", ["line 2: server.handshake-timeout: must be a number"]),
        (
            "[listen]\nsocket = 'a'\nsocket-mode = '9'",
            ['line 3: listen.socket-mode: must be permissions in octal, as "0660"'],
        ),
        ("[listen]\nport = 70000", ["line 2: listen.port: 70000: a port is a number from 0 to 65535"]),
        (
            "[[export]]\nimage = 'a'\nallow-networks = [\n  '192.0.2.1/24',\n]",
            [
                "line 3: export.1.allow-networks: '192.0.2.1/24' is no network "
                "(192.0.2.1/24 has host bits set), nor unix or vsock"
            ],
        ),
        (
            "[[export]]\nimage = 'a'\nallow-users = ['nobody-of-this-name']",
            ["line 3: export.1.allow-users: names 'nobody-of-this-name', and there is no such user"],
        ),
        (
            "[[export]]\nimage = 'a'\nallow-users = [true]",
            ['line 3: export.1.allow-users: must be a list of user names or ids, as ["backup", 1000]'],
        ),
        (
            "[[export]]\nimage = 'a'\nbitmaps = [1]",
            ['line 3: export.1.bitmaps: must be a list of strings, as ["a", "b"]'],
        ),
        (
            "[[export]]\nimage = 'a'\nname = 'x'\n[[export]]\nimage = 'b'\nname = 'x'",
            ["line 6: export.2.name: 'x' is used twice"],
        ),
        (
            "[[export]]\nimage = 'a'\n[[export]]\nimage = 'b'",
            ["line 3: export.2.name: '' is used twice"],
        ),
        (
            "[[export]]\nimage = 'a'\nname = 5\n[[export]]\nread-only = 'no'\n[server]\nbusy-poll = 2000",
            [
                "line 3: export.1.name: must be a string",
                "line 4: export.2.image: is missing",
                "line 5: export.2.read-only: must be true or false",
                "line 7: server.busy-poll: 2000: must be 0 to 1000 microseconds",
            ],
        ),
    ],
)
def test_mistakes(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert mistakes(tmp_path, text) == expected


def test_an_unknown_key_is_told_which_there_are(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, "[[export]]\nimage = 'a'\nreadonly = true")
    assert line.startswith("line 3: export.1.readonly: unknown; keys are allocation-depth, allow-networks, ")


def test_what_is_not_toml(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, "[[export]]\nimage = a")
    assert "line 2" in line
    assert mistakes(tmp_path, b"a = 1\nb = '\xff'") == ["line 2: not UTF-8"]
    assert mistakes(tmp_path, "a = " + "[" * 100_000) == ["nested too deeply"]
    assert mistakes(tmp_path, "a = " + "9" * 5000) == ["a number has too many digits"]
    assert mistakes(tmp_path, b"#" * (1024 * 1024 + 1)) == ["longer than 1048576 bytes"]


def test_very_many_mistakes(tmp_path: Path) -> None:
    lines = mistakes(tmp_path, "[server]\n" + "".join(f"k{number} = 1\n" for number in range(30)))
    assert len(lines) == configfile.MAX_REPORTED + 1
    assert lines[-1] == "and 10 more mistakes"


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(os.fspath(tmp_path / "nowhere.toml"))


class TestLineOf:
    TEXT = (
        '# first\n\n[a]\nx = """\nlong\n"""\ny = [\n  1,\n  2,\n]\n\n# c\nz = 1\n'
        "[[b]]\nx = 1\n[[b]]\n[b.c]\nd = {e = 1}\n"
    )

    @pytest.mark.parametrize(
        ("path", "line"),
        [
            (("a",), 3),
            (("a", "x"), 4),
            (("a", "y"), 7),
            (("a", "z"), 13),
            (("b", 0), 14),
            (("b", 0, "x"), 15),
            (("b", 1), 16),
            (("b", 1, "c"), 17),
            (("b", 1, "c", "d", "e"), 18),
            (("b", 2), None),
            (("nothing",), None),
            ((), None),
        ],
    )
    def test_kinds(self, path: configfile.Path, line: int | None) -> None:
        assert line_of(self.TEXT, path) == line

    @given(
        st.lists(st.sampled_from(["one", "two", "long", "comment", "blank"]), max_size=30), st.integers(0, 29)
    )
    def test_any_text(self, kinds: list[str], which: int) -> None:
        texts = {
            "one": "k{} = 1",
            "two": "k{} = [\n1]",
            "long": "k{} = '''\n\n\na = 2\n'''",
            "comment": "# {}",
            "blank": "",
        }
        lines: list[str] = []
        begins: dict[int, int] = {}
        for number, kind in enumerate(kinds):
            if kind not in ("comment", "blank"):
                begins[number] = len(lines) + 1
            lines += texts[kind].format(number).split("\n")
        assert line_of("\n".join(lines), (f"k{which}",)) == begins.get(which)


def test_tls(tmp_path: Path) -> None:
    """Paths are relative to the file; certificates without a word of ``tls`` are meant to be used."""
    path = tmp_path / "c.toml"
    path.write_text("[tls]\ntls-certificates = 'pki'\ntls-verify-peer = true\n[[export]]\nimage = 'a'\n")
    assert load(str(path)).tls == TlsConfig(
        mode="require", certificates=str(tmp_path / "pki"), verify_peer=True
    )
    path.write_text("[tls]\ntls = 'on'\ntls-psk = '/keys'\n[[export]]\nimage = 'a'\n")
    assert load(str(path)).tls == TlsConfig(mode="on", psk="/keys")


def test_tls_mistakes(tmp_path: Path) -> None:
    image = "[[export]]\nimage = 'a'\n"
    assert mistakes(tmp_path, image + "[tls]\ntls = 'on'") == [
        "line 4: tls.tls: on: needs --tls-certificates DIR or --tls-psk FILE"
    ]
    assert mistakes(tmp_path, image + "[tls]\ntls-verify-peer = 1") == [
        "line 4: tls.tls-verify-peer: must be true or false"
    ]


RULES = "[[export]]\nimage = 'a'\nrequire-tls = true\nallow-subjects = ['CN=a']\n"


def test_rules_that_no_client_could_pass(tmp_path: Path) -> None:
    subjects = "TLS is off; [tls] with tls-certificates and tls-verify-peer turns it on"
    off = [
        "line 3: export.1.require-tls: TLS is off; [tls] with tls-certificates turns it on",
        f"line 4: export.1.allow-subjects: {subjects}",
    ]
    assert mistakes(tmp_path, RULES) == off
    assert mistakes(tmp_path, RULES + "[tls]\ntls = 'off'") == off
    assert mistakes(tmp_path, RULES + "[tls]\ntls-certificates = 'pki'\n") == [
        "line 4: export.1.allow-subjects: clients are not asked who they are; "
        "[tls] needs tls-verify-peer = true"
    ]
    assert mistakes(tmp_path, "[directory]\npath = 'a'\nallow-subjects = []\n") == [
        f"line 3: directory.allow-subjects: {subjects}"
    ]
    for tls in ("tls-psk = 'keys'", "tls-certificates = 'pki'\ntls-verify-peer = true"):
        assert loaded(tmp_path, f"{RULES}[tls]\n{tls}").tls.required
    assert not loaded(tmp_path, "[[export]]\nimage = 'a'\nrequire-tls = false").exports[0].access.tls


def test_the_command_line_turns_tls_on_and_off(tmp_path: Path) -> None:
    """What it says goes before the file, and the file's rules are judged by it."""
    path = tmp_path / "c.toml"
    path.write_text(RULES)
    given = TlsConfig(mode="on", certificates="/pki", verify_peer=True)
    assert load(str(path), given).tls == given
    path.write_text(RULES + "[tls]\ntls-psk = 'keys'")
    with pytest.raises(Mistakes, match="TLS is off"):
        load(str(path), TlsConfig())


def test_the_documentation_has_every_key() -> None:
    text = (Path(__file__).parents[1] / "docs/configuration.md").read_text()
    for keys in (configfile.LISTEN, configfile.SERVER, configfile.TLS, configfile.EXPORT, configfile.IMAGE,
                 configfile.ACCESS, configfile.DIRECTORY):  # fmt: skip
        for key in keys:
            assert f"`{key}`" in text, f"{key} is not in docs/configuration.md"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "nbdbm.toml")
    with pytest.raises(UsageError, match="is a pipe"):
        load(str(tmp_path / "nbdbm.toml"))
