"""Texts that people and programs write: configuration files, keys, URIs, questions at the control socket, and
HTTP.

What must hold: nothing but UsageError, in lines that name file, line and key, and never show a secret; what
is accepted means what an outside parser reads there; a URI says the same when it is written and read again;
every question has one answer, well-formed.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import http.client
import io
import json
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import unquote

from nbdbm import configfile, control, uri
from nbdbm.config import ServeConfig, ServerConfig
from nbdbm.errors import Mistakes, UsageError
from nbdbm.registry import ExportRegistry
from nbdbm.server.responder import MAX_REQUEST, Page, Talk
from nbdbm.server.responder import http as answering_http
from nbdbm.server.server import Server
from nbdbm.tlsfiles import MAX_KEY, parse_keys
from tests.fuzz import disk
from tests.fuzz.script import Script

KEYS = (
    *(configfile.LISTEN, configfile.SERVER, configfile.TLS, configfile.EXPORT),
    *(configfile.IMAGE, configfile.ACCESS, configfile.DIRECTORY),
)
VALUES = (
    *[
        '"a"',
        '"b"',
        '""',
        "true",
        "false",
        "0",
        "1",
        "-1",
        "65536",
        "1e400",
        "nan",
        "inf",
        "0.5",
        '["a","b"]',
        '["192.0.2.0/24","unix"]',
    ],
    *[
        '["root",1000]',
        '["nobody"]',
        "[]",
        '"0660"',
        '"require"',
        '"on"',
        '"unmap"',
        '"localhost:0"',
        '"@a"',
        "[1,true]",
        "{}",
    ],
    *('1979-05-27 0x10 "999" "\\u0000" "\\uD800" """\na\n"""').replace("\n", "\x00").split(),
    "9" * 5000,
    '"' + "n" * 4097 + '"',
)
WORDS = {
    "config": (
        *(
            f"{table}\n"
            for table in ["[listen]", "[server]", "[tls]", "[[export]]", "[directory]", "[export]", "[other]"]
        ),
        *(f"{key} = " for keys in KEYS for key in keys),
        *(value.replace("\0", "\n") + "\n" for value in VALUES),
        *("# remark\n", "\n", "\\", "=", "[", "]", "x" * 5000, "[" * 2000, "a.b = 1\n"),
    ),
    "keys": (
        *("a", "b", ":", "#", "00", "ff" * 16, "\n", "\r", " ", "6162", "é", "\x1c", "\u2028", "0g"),
        *("f" * 2 * 257, "ab" * 256),
    ),
    "uri": (
        *[
            "nbd",
            "nbds",
            "+unix",
            "+vsock",
            "://",
            "/",
            "?",
            "&",
            "=",
            "socket",
            "host",
            "[::1]",
            "127.0.0.1",
            ":",
            "10809",
            "0",
            "65536",
            "@",
            "user",
        ],
        *[
            "%00",
            "%ff",
            "%2f",
            "%26",
            "%",
            "#",
            "+",
            "tls-certificates",
            "tls-psk-file",
            "tls-hostname",
            "tls-verify-peer",
            "true",
            "false",
        ],
        *("tls-", "é", "\t", "\n", "//", "NBD", "[", "]", "\udc80", "x" * 3000, ";", "\uff0e"),
    ),
    "control": (
        *('{"execute": "nbdbm-status"}', "\n", '{"execute": ', '"arguments": {}', '{"execute": "quit"}'),
        *["}", "{", "[", "]", '"a"', "1e999", "null", "NaN", '"nbdbm-status"', '"\\ud800"'],
        *(", ", "\0", "\xff", "[" * 3000, "x" * 9000),
    ),
    "http": (
        *(
            "GET ",
            "HEAD ",
            "POST ",
            "/",
            "/page",
            "?",
            "*",
            " HTTP/1.1",
            " HTTP/1.0",
            " HTTP/2",
            "\r\n",
            "\n",
        ),
        *("\r", "Host: a\r\n", ": ", "\r\n\r\n", "\0", "\xff", "x" * 9000, "Content-Length: 5\r\n", " "),
    ),
}
KINDS = tuple(WORDS)


GOOD: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("config", ("[[export]]\n", "image = ", '"a"\n', "name = ", '"b"\n')),
    ("config", ("[[export]]\n", "image = ", '"a"\n', "grace = ", "0.5\n", "require-tls = ", "false\n")),
    ("config", ("[[export]]\n", "image = ", '"a"\n', "load-snapshot = ", '"b"\n')),
    ("config", ("[directory]\n", "path = ", '"a"\n', "[server]\n", "max-connections = ", "1\n")),
    ("keys", ("a", ":", "ff" * 16, "0g")),
    ("keys", ("a", ":", "ff" * 16, "\n", "#", "6162", ":", "00")),
    ("uri", ("nbd", "+unix", "://", "/", "?", "socket", "=", "/", "host")),
    ("uri", ("nbd", "+unix", "://", "/", "?", "socket", "=", "/", "%26", "host", "=", "true")),
    ("uri", ("nbds", "://", "user", "@", "host", ":", "10809", "/", "?", "tls-psk-file", "=", "/")),
    ("http", ("GET ", "/page", " HTTP/1.1", "\r\n\r\n")),
    ("http", ("HEAD ", "/page", " HTTP/1.0", "\r\n", "Host: a\r\n", "\r\n")),
)


def starts() -> Iterable[bytes]:
    """Scripts to begin with: each word, alone and in threes."""
    for kind, name in enumerate(KINDS):
        count = len(WORDS[name])
        for word in range(count):
            yield bytes([kind, word])
            yield bytes([kind, word, (word * 7 + 1) % count, (word * 3 + 2) % count])
    for name, words in GOOD:
        yield bytes([KINDS.index(name), *map(WORDS[name].index, words)])


def run(data: bytes) -> None:
    script = Script(data)
    name = script.pick(KINDS)
    JUDGES[name](_text(script, WORDS[name]))


def _text(script: Script, words: tuple[str, ...]) -> str:
    """Words of that kind of text, and characters in between."""
    found = []
    while script.more:
        choice = script.byte()
        if choice < 0xE0:
            found.append(words[choice % len(words)])
        elif choice < 0xF8:
            found.append(script.bytes(choice & 7).decode("latin-1"))
        else:
            found.append(chr(script.number(2)))
    return "".join(found)


# -- the configuration file


@functools.cache
def _place() -> Path:
    place = Path(tempfile.mkdtemp(prefix="nbdbm-fuzz-"))
    atexit.register(shutil.rmtree, place)
    return place


def _config(text: str) -> None:
    path = _place() / "nbdbm.toml"
    raw = text.encode("utf-8", "surrogateescape" if "\udc80" in text else "surrogatepass")
    path.write_bytes(raw)
    try:
        found = configfile.load(str(path))
    except Mistakes as mistakes:
        count = raw.count(b"\n") + 1
        assert 0 < len(mistakes.lines) <= configfile.MAX_REPORTED + 1
        for line in mistakes.lines:
            assert line.startswith(f"{path}: ") and "\n" not in line, line
            number = re.match(rf"{re.escape(str(path))}: line (\d+): ", line)
            assert "more mistakes" in line or (number and 1 <= int(number[1]) <= count), line
        return
    except UsageError as error:
        assert str(error).startswith(f"{path}: "), error
        return
    finally:
        path.unlink()
    _same_as_toml(found, tomllib.loads(raw.decode()))


def _same_as_toml(found: ServeConfig, document: dict[str, object]) -> None:
    tables = document.get("export", [])
    assert isinstance(tables, list)
    assert [export.name for export in found.exports] == [table.get("name", "") for table in tables]
    assert len({export.name for export in found.exports}) == len(found.exports)
    for export, table in zip(found.exports, tables, strict=True):
        assert Path(export.image) == _place() / table["image"]
        assert export.read_only == bool(table.get("read-only") or "load-snapshot" in table)
        assert export.access.tls == table.get("require-tls", False)
        assert list(export.access.networks or ()) == table.get("allow-networks", [])
    assert (found.directory is not None) == ("directory" in document)
    tls = document.get("tls", {})
    assert isinstance(tls, dict)
    given = "require" if {"tls-certificates", "tls-psk"} & tls.keys() else "off"
    assert found.tls.mode == tls.get("tls", given)
    server = document.get("server", {})
    assert isinstance(server, dict)
    assert found.server.max_connections == server.get("max-connections", ServerConfig().max_connections)


# -- pre-shared keys


def _keys(text: str) -> None:
    try:
        found = parse_keys("keys", text)
    except UsageError as error:
        said = str(error)
        assert said.startswith("keys: ") and "\n" not in said
        parts = [line.rpartition(":") for line in text.splitlines()]
        names = "\n".join(name for name, _, _ in parts)
        for word in re.findall("[0-9a-fA-F]{16,}", "\n".join(key for _, _, key in parts)):
            assert word[:16] not in said or word[:16] in names, "a key is shown"
        return
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(found) == len(lines) > 0
    for line, (name, key) in zip(lines, found.items(), strict=True):
        assert 0 < len(key) <= MAX_KEY
        written, _, digits = line.rpartition(":")
        assert bytes.fromhex(digits) == key
        assert (bytes.fromhex(written[1:]).decode() if written.startswith("#") else written) == name


# -- URIs


def _uri(text: str) -> None:
    with contextlib.suppress(UnicodeEncodeError):
        text = os.fsdecode(os.fsencode(text))  # as command lines come
    try:
        found = uri.parse(text)
    except UsageError as error:
        assert text in str(error)
        return
    assert uri.is_uri(text)
    again = str(found)
    assert again.isascii() and again.isprintable()
    assert uri.parse(again) == found, again
    assert found.encrypted == text.lower().startswith("nbds")
    assert bool(found.socket) == ("unix" in found.scheme) != bool(found.host)
    assert "\0" not in found.socket and 0 <= found.port <= 65535
    if found.export:
        assert found.export[:1] in unquote(text)


# -- the control socket, and HTTP


class _Sink:
    """A writer that keeps what is written."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes | memoryview) -> None:
        self.data += data

    async def drain(self) -> None:
        return None


def _converse(talk: Talk, data: bytes) -> bytes:
    async def main() -> bytes:
        reader = asyncio.StreamReader(limit=MAX_REQUEST)
        reader.feed_data(data)
        reader.feed_eof()
        sink = _Sink()
        await asyncio.wait_for(talk(reader, sink), 20)  # type: ignore[arg-type]
        return bytes(sink.data)

    return disk.run(main())


def _control(text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")

    async def make() -> Server:
        return Server(ExportRegistry(), ServerConfig())

    answers = _converse(control.control(disk.run(make())), data).splitlines()
    questions = [line for line in data.split(b"\n") if line.strip()]
    long = next((at for at, line in enumerate(questions) if len(line) >= MAX_REQUEST), None)
    assert len(answers) == len(questions) if long is None else long + 1 >= len(answers) >= 1
    for question, line in zip(questions, answers, strict=False):
        answer = json.loads(line)
        assert answer.keys() in ({"return"}, {"error"}), answer
        if "return" in answer:
            assert json.loads(question)["execute"] == "nbdbm-status"
            assert answer["return"]["exports"] == []


def _http(text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")

    async def page() -> Page:
        return Page(200, b"content")

    said = _converse(answering_http({"/page": page}), data)
    if not said:
        assert b"\r\n\r\n" not in data
        return
    response = http.client.HTTPResponse(_Socket(said), method=data.partition(b" ")[0].decode("latin-1"))  # type: ignore[arg-type]
    response.begin()
    body = response.read()
    assert response.status in (200, 400, 404, 405, 431, 505)
    if response.status == 200:
        assert data.startswith((b"GET /page", b"HEAD /page"))
        assert body == (b"content" if data.startswith(b"GET") else b"")


class _Socket:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


JUDGES: dict[str, Callable[[str], None]] = {
    "config": _config,
    "keys": _keys,
    "uri": _uri,
    "control": _control,
    "http": _http,
}
