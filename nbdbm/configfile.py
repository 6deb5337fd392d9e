"""The configuration file of ``nbdbm serve --config``: TOML, every mistake named with line and key.

    [listen]      socket, socket-mode, socket-owner | bind, port | vsock
    [server]      limits and the like
    [[export]]    image, name, and what the command line has options for; who may use it
    [directory]   path, and the same for each image in it

Keys are called as the options are. Relative paths are relative to the file's directory.
"""

from __future__ import annotations

import os
import pwd
import stat
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

from nbdbm.access import Access
from nbdbm.config import BadValue, ExportConfig, ListenConfig, ServeConfig, ServerConfig, TlsConfig
from nbdbm.errors import Mistakes, UsageError

MAX_SIZE = 1024 * 1024
"""Of the file, bytes: room for thousands of exports."""

MAX_REPORTED = 20
"""Mistakes named at once."""

Path = tuple[str | int, ...]
"""Where a value stands: ``("export", 2, "image")``."""


class _Wrong(Exception):
    """A value is not of its kind; the text continues a sentence that begins with the key."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Wrong("must be a string")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong("must be true or false")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _Wrong("must be a whole number")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        raise _Wrong("must be a number")
    return float(value)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _Wrong('must be a list of strings, as ["a", "b"]')
    return tuple(value)


def _networks(value: Any) -> tuple[str, ...]:
    networks = _texts(value)
    try:
        Access(networks=networks)
    except UsageError as error:
        raise _Wrong(str(error)) from None
    return networks


def _users(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise _Wrong('must be a list of user names or ids, as ["backup", 1000]')
    found = []
    for each in value:
        if isinstance(each, int) and not isinstance(each, bool):
            found.append(each)
        elif isinstance(each, str):
            try:
                found.append(pwd.getpwnam(each).pw_uid)
            except KeyError:
                raise _Wrong(f"names {each!r}, and there is no such user") from None
        else:
            raise _Wrong('must be a list of user names or ids, as ["backup", 1000]')
    return tuple(found)


def _mode(value: Any) -> int:
    try:
        return int(_text(value), 8)
    except (ValueError, _Wrong):
        raise _Wrong('must be permissions in octal, as "0660"') from None


def _micro(value: Any) -> float:
    return _whole(value) / 1e6


Keys = Mapping[str, tuple[str, Callable[[Any], Any]]]
"""Key of the file -> field of the configuration, and what makes the value of it."""

LISTEN: Keys = {
    "socket": ("socket", _text),
    "socket-mode": ("socket_mode", _mode),
    "socket-owner": ("socket_owner", _text),
    "bind": ("host", _text),
    "port": ("port", _whole),
    "vsock": ("vsock", _whole),
}
SERVER: Keys = {
    "max-connections": ("max_connections", _whole),
    "max-connections-per-address": ("max_connections_per_address", _whole),
    "handshake-timeout": ("handshake_timeout", _number),
    "busy-poll": ("busy_poll", _micro),
    "metrics": ("metrics", _text),
    "control": ("control", _text),
}
TLS: Keys = {
    "tls": ("mode", _text),
    "tls-certificates": ("certificates", _text),
    "tls-verify-peer": ("verify_peer", _truth),
    "tls-psk": ("psk", _text),
}
EXPORT: Keys = {
    "description": ("description", _text),
    "format": ("format", _text),
    "read-only": ("read_only", _truth),
    "load-snapshot": ("snapshot", _text),
    "no-backing": ("no_backing", _truth),
    "backing-root": ("backing_root", _text),
    "force-share": ("force_share", _truth),
    "discard": ("discard", _text),
    "detect-zeroes": ("detect_zeroes", _text),
    "bitmaps": ("bitmaps", _texts),
    "allocation-depth": ("allocation_depth", _truth),
    "grace": ("grace", _number),
}
IMAGE: Keys = {
    "image": ("image", _text),
    "name": ("name", _text),
    "on-demand": ("on_demand", _truth),
}
ACCESS: Keys = {
    "allow-networks": ("networks", _networks),
    "allow-users": ("users", _users),
    "allow-subjects": ("subjects", _texts),
    "require-tls": ("tls", _truth),
    "max-connections": ("max_connections", _whole),
}
DIRECTORY: Keys = {"path": ("image", _text)}

KEY_OF_OPTION = {"export-name": "name", "bitmap": "bitmaps"}
"""Where a key is called other than its option."""


def load(path: str, tls: TlsConfig | None = None) -> ServeConfig:
    """Read the file at ``path``; raises Mistakes, UsageError for what is no TOML, or OSError.

    ``tls``, where the command line says something of it, goes before what the file says.
    """
    if stat.S_ISFIFO(os.stat(path).st_mode):
        # Nobody might ever write to it; and once more for each reload.
        raise UsageError(f"{path}: is a pipe; a configuration is a file, to be read again")
    with open(path, "rb") as file:
        raw = file.read(MAX_SIZE + 1)
    if len(raw) > MAX_SIZE:
        raise UsageError(f"{path}: longer than {MAX_SIZE} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}: line {line}: not UTF-8") from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: {error}") from error
    except ValueError as error:
        raise UsageError(f"{path}: a number has too many digits") from error
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deeply") from error
    return _Reader(path, text, tls).config(document)


class _Reader:
    """Collects the mistakes of one file."""

    def __init__(self, path: str, text: str, tls: TlsConfig | None) -> None:
        self._path = path
        self._text = text
        self._tls = tls
        self._base = os.path.dirname(os.path.abspath(path))
        self._mistakes: list[tuple[int, str]] = []

    def config(self, document: dict[str, Any]) -> ServeConfig:
        for name in document:
            if name not in ("listen", "tls", "server", "export", "directory"):
                self._mistake(
                    (name,), "unknown; there are [listen], [tls], [server], [[export]] and [directory]"
                )
        listen = self._made(("listen",), document.get("listen", {}), LISTEN, self._made_listen)
        tls = self._made(("tls",), document.get("tls", {}), TLS, self._made_tls)
        self._tls = tls = self._tls or tls
        server = self._made(("server",), document.get("server", {}), SERVER, self._made_server)
        exports = self._exports(document.get("export", []))
        directory = None
        if "directory" in document:
            directory = self._export(("directory",), document["directory"], DIRECTORY, "path")
        if not exports and directory is None and not self._mistakes:
            raise UsageError(f"{self._path}: exports nothing; it needs [[export]] tables or [directory]")
        if self._mistakes:
            lines = [text for _, text in sorted(self._mistakes)]
            if len(lines) > MAX_REPORTED:
                lines[MAX_REPORTED:] = [f"{self._path}: and {len(lines) - MAX_REPORTED} more mistakes"]
            raise Mistakes(lines)
        assert listen is not None and tls is not None and server is not None
        return ServeConfig(
            exports=tuple(exports),
            directory=directory,
            file=self._path,
            listen=listen,
            tls=tls,
            server=server,
        )

    def _made_tls(self, **fields: Any) -> TlsConfig:
        for name in ("certificates", "psk"):
            if fields.get(name):
                fields[name] = os.path.join(self._base, fields[name])
        return TlsConfig.of(
            fields.get("mode"), fields.get("certificates"), fields.get("verify_peer"), fields.get("psk")
        )

    def _made_listen(self, **fields: Any) -> ListenConfig:
        return ListenConfig(**self._beside("socket", fields))

    def _made_server(self, **fields: Any) -> ServerConfig:
        return ServerConfig(**self._beside("control", fields))

    def _beside(self, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        """With the socket's path in ``name`` relative to the file; what is none is left to be refused."""
        if fields.get(name) and not fields[name].startswith("@"):
            fields[name] = os.path.join(self._base, fields[name])
        return fields

    def _exports(self, tables: Any) -> list[ExportConfig]:
        if not isinstance(tables, list):
            self._mistake(("export",), "must be written [[export]], once for each export")
            return []
        found: list[ExportConfig] = []
        lines: dict[str, Path] = {}
        for index, table in enumerate(tables):
            where: Path = ("export", index)
            export = self._export(where, table, IMAGE, "image")
            if export is None:
                continue
            if export.name in lines:
                self._mistake((*where, "name"), f"{export.name!r} is used twice", where)
            lines.setdefault(export.name, where)
            found.append(export)
        return found

    def _export(self, where: Path, table: Any, more: Keys, needed: str) -> ExportConfig | None:
        if not isinstance(table, dict):
            self._mistake(where, "must be a table")
            return None
        if needed not in table:
            self._mistake((*where, needed), "is missing", where)
        if "grace" in table and "on-demand" in more and not table.get("on-demand"):
            self._mistake((*where, "grace"), "needs on-demand = true: other images stay open")
        rules = {key: value for key, value in table.items() if key in ACCESS}
        rest = {key: value for key, value in table.items() if key not in ACCESS}
        access: Access | None = self._made(where, rules, ACCESS, Access)
        if access is not None and self._tls is not None:
            self._passable(where, access, self._tls)

        def build(**fields: Any) -> ExportConfig:
            for name in ("image", "backing_root"):
                if fields.get(name):
                    fields[name] = os.path.join(self._base, fields[name])
            if fields.get("snapshot") is not None:
                fields["read_only"] = True  # as on the command line
            return ExportConfig(access=access or Access(), **fields)

        known = {**EXPORT, **more}
        if needed not in table:
            rest[needed] = "?"
        made: ExportConfig | None = self._made(where, rest, known, build, also=ACCESS)
        return made

    def _passable(self, where: Path, access: Access, tls: TlsConfig) -> None:
        """Rules that no client can ever pass are a mistake."""
        if access.tls and not tls.enabled:
            self._mistake((*where, "require-tls"), "TLS is off; [tls] with tls-certificates turns it on")
        if access.subjects is None:
            return
        subjects = (*where, "allow-subjects")
        if not tls.enabled:
            self._mistake(subjects, "TLS is off; [tls] with tls-certificates and tls-verify-peer turns it on")
        elif not tls.verify_peer and tls.psk is None:
            self._mistake(subjects, "clients are not asked who they are; [tls] needs tls-verify-peer = true")

    def _made(
        self, where: Path, table: Any, keys: Keys, build: Callable[..., Any], also: Keys | None = None
    ) -> Any:
        """What ``build`` makes of the table, or None after noting what is wrong."""
        if not isinstance(table, dict):
            self._mistake(where, "must be a table")
            return None
        fields: dict[str, Any] = {}
        before = len(self._mistakes)
        for key, value in table.items():
            if key not in keys:
                self._mistake(
                    (*where, key), f"unknown; keys are {', '.join(sorted({**keys, **(also or {})}))}"
                )
                continue
            field, make = keys[key]
            try:
                fields[field] = make(value)
            except _Wrong as wrong:
                self._mistake((*where, key), str(wrong))
        if len(self._mistakes) > before:
            return None
        try:
            return build(**fields)
        except BadValue as bad:
            key = KEY_OF_OPTION.get(bad.option, bad.option)
            self._mistake((*where, key), bad.reason.lstrip(": "), where)
        except UsageError as error:
            self._mistake(where, str(error))
        return None

    def _mistake(self, path: Path, reason: str, otherwise: Path = ()) -> None:
        """Note what is wrong with the value at ``path``, or, if that is not there, at ``otherwise``."""
        line = line_of(self._text, path) or line_of(self._text, otherwise) or 1
        key = ".".join(str(part + 1) if isinstance(part, int) else part for part in path)
        self._mistakes.append((line, f"{self._path}: line {line}: {key}: {reason}"))


def line_of(text: str, path: Path) -> int | None:
    """The line (from 1) on which the value at ``path`` begins in text that is TOML; None: nowhere.

    The first line up to which the text has the value; up to a line within a value of several lines, text is
    not TOML at all.
    """
    lines = text.split("\n")

    def has(count: int) -> bool | None:
        """Whether the first ``count`` lines have it; None if they are no TOML."""
        try:
            found: Any = tomllib.loads("\n".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            return None
        for part in path:
            inside = (isinstance(found, list) and isinstance(part, int) and part < len(found)) or (
                isinstance(found, dict) and part in found
            )
            if not inside:
                return False
            found = found[part]
        return True

    if not path or not has(len(lines)):
        return None
    low, high = 0, len(lines)  # the first ``low`` lines do not have it, the first ``high`` do
    while high - low > 1:
        middle = probe = (low + high) // 2
        while probe < high and (answer := has(probe)) is None:
            probe += 1
        if probe == high:
            # Nothing between is TOML: the value may begin before the middle.
            high_start = middle
            while high_start > low + 1 and has(high_start - 1) is None:
                high_start -= 1
            middle = probe = high_start - 1
            if middle <= low:
                return low + 1
            answer = has(probe)
        if answer:
            high = probe
        else:
            low = probe
    return low + 1
