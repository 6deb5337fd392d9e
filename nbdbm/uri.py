"""NBD URIs: where a server listens and which export is meant, as text and back.

The forms are those of the NBD URI specification (doc/uri.md): ``nbd://HOST[:PORT]/EXPORT`` over TCP and
``nbd+unix:///EXPORT?socket=PATH`` over a Unix socket, parts percent-encoded UTF-8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from nbdbm.errors import UsageError

DEFAULT_PORT = 10809
"""The port IANA assigned to NBD; not written when formatting."""

SCHEME_TCP = "nbd"
SCHEME_UNIX = "nbd+unix"
SCHEME_VSOCK = "nbd+vsock"
"""Shown, and not parsed: our client has no use for it yet."""
VSOCK_HOST = "2"
"""``VMADDR_CID_HOST``: the host, seen from a virtual machine (vsock(7))."""
_TLS_SCHEMES = ("nbds", "nbds+unix", "nbds+vsock")
_KNOWN_SCHEMES = (SCHEME_TCP, SCHEME_UNIX, "nbds", "nbds+unix")


@dataclass(frozen=True, slots=True)
class UriTls:
    """What a client needs for TLS, by the names that libnbd gave the parameters; paths are this machine's."""

    certificates: str | None = None
    """Directory of ca-cert.pem, and client-cert.pem and client-key.pem if the server wants to know us."""
    psk_file: str | None = None
    username: str | None = None
    """Whose key of ``psk_file`` it is (before the @ of the host)."""
    hostname: str | None = None
    """The name that the server's certificate must have; None: the URI's host."""
    verify_peer: bool = True


@dataclass(frozen=True, slots=True)
class NbdUri:
    """One export of one server; a value, ``str()`` gives the URI.

    ``host`` and ``port`` are for ``nbd``, ``socket`` for ``nbd+unix``; the others are empty and 0.
    """

    scheme: str
    host: str = ""
    port: int = 0
    socket: str = ""
    """Path of the Unix socket; undecodable bytes as in ``os.fsdecode``."""
    export: str = ""
    tls: UriTls = UriTls()
    """For ``nbds`` and ``nbds+unix``."""

    @property
    def encrypted(self) -> bool:
        """Whether TLS is to be used."""
        return self.scheme in _TLS_SCHEMES

    @property
    def plain_scheme(self) -> str:
        """The scheme without TLS."""
        return "nbd" + self.scheme.removeprefix("nbds") if self.encrypted else self.scheme

    def with_tls(self) -> NbdUri:
        """The same by TLS."""
        return replace(self, scheme="nbds" + self.plain_scheme.removeprefix("nbd"))

    @classmethod
    def tcp(cls, host: str, port: int = DEFAULT_PORT, export: str = "") -> NbdUri:
        """The export of a TCP server; ``host`` is a name or an address without brackets."""
        return cls(SCHEME_TCP, host=host, port=port, export=export)

    @classmethod
    def unix(cls, socket: str, export: str = "") -> NbdUri:
        """The export of a server on a Unix socket."""
        return cls(SCHEME_UNIX, socket=socket, export=export)

    @classmethod
    def vsock(cls, port: int = DEFAULT_PORT, export: str = "") -> NbdUri:
        """The export of a server on this host's vsock, for its virtual machines, whose name for it is 2."""
        return cls(SCHEME_VSOCK, host=VSOCK_HOST, port=port, export=export)

    def __str__(self) -> str:
        return format_uri(self)


def is_uri(text: str) -> bool:
    """Whether ``text`` means an NBD URI rather than a file name: it begins with one of the schemes."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.lower() in _KNOWN_SCHEMES


def parse(text: str) -> NbdUri:
    """Take an NBD URI apart; raises UsageError naming the part that is wrong."""
    if not is_uri(text):
        raise UsageError(
            f"{text}: not an NBD URI: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"
        )
    try:
        split = urlsplit(text)
        port = split.port
    except ValueError as error:
        raise UsageError(f"{text}: not a valid URI: {error}") from error
    scheme = split.scheme
    encrypted = scheme in _TLS_SCHEMES
    if split.fragment:
        raise UsageError(
            f"{text}: a fragment (#{split.fragment}) has no meaning in an NBD URI; write # as %23"
        )
    if split.username is not None and not encrypted:
        raise UsageError(f"{text}: a user name has no meaning without TLS")
    export = _utf8(text, "export name", split.path.removeprefix("/"))
    socket = ""
    tls: dict[str, Any] = {}
    if split.username is not None:
        tls["username"] = _utf8(text, "user name", split.username)
    # "+" is an ordinary character in a socket path, only web forms take it for a space.
    query = split.query.replace("+", "%2B")
    for key, value in parse_qsl(query, keep_blank_values=True, errors="surrogateescape"):
        try:
            value.encode(errors="surrogateescape")
        except UnicodeError as error:
            raise UsageError(f"{text}: {key} is not UTF-8") from error
        if key.startswith("tls-"):
            tls[key.removeprefix("tls-").replace("-", "_")] = _tls_value(text, encrypted, key, value)
            continue
        if key != "socket":
            continue  # unknown parameters are ignored, as the specification asks
        if socket:
            raise UsageError(f"{text}: more than one socket parameter")
        socket = value
    if "username" in tls and not tls.get("psk_file"):
        raise UsageError(f"{text}: a user name has no meaning without tls-psk-file")
    if scheme in (SCHEME_UNIX, "nbds+unix"):
        if split.netloc.rpartition("@")[2]:
            raise UsageError(f"{text}: a Unix socket URI has no host: write nbd+unix:///EXPORT?socket=PATH")
        if not socket:
            raise UsageError(f"{text}: the socket=PATH parameter is missing")
        if "\0" in socket:
            raise UsageError(f"{text}: the socket path holds a zero byte")
        return NbdUri(scheme, socket=socket, export=export, tls=UriTls(**tls))
    if socket:
        raise UsageError(f"{text}: a socket parameter needs the nbd+unix scheme")
    host = _utf8(text, "host", split.hostname or "")
    if not host:
        raise UsageError(f"{text}: the host is missing: write nbd://HOST/EXPORT")
    if set(host) & set("/?#@[]\0") or (":" in host and "[" not in split.netloc):
        raise UsageError(f"{text}: {host!r} is no host")
    return NbdUri(scheme, host, DEFAULT_PORT if port is None else port, "", export, UriTls(**tls))


def _utf8(text: str, what: str, quoted: str) -> str:
    """A part of the URI that is text, decoded."""
    try:
        found = unquote(quoted, errors="strict")
        found.encode()  # bytes that the command line could not decode are there as surrogates
    except UnicodeError as error:
        raise UsageError(f"{text}: the {what} is not UTF-8") from error
    return found


TLS_PARAMETERS = ("tls-certificates", "tls-psk-file", "tls-hostname", "tls-verify-peer")


def _tls_value(text: str, encrypted: bool, key: str, value: str) -> str | bool:
    # Not ignored: somebody relies on what they promise.
    if not encrypted:
        raise UsageError(f"{text}: {key} has no meaning without TLS: nbds or nbds+unix")
    if key not in TLS_PARAMETERS:
        raise UsageError(f"{text}: {key}: unknown; there are {', '.join(TLS_PARAMETERS)}")
    if key == "tls-verify-peer":
        truth = {"true": True, "1": True, "false": False, "0": False}.get(value.lower())
        if truth is None:
            raise UsageError(f"{text}: {key}={value}: must be true or false")
        return truth
    if not value or "\0" in value:
        raise UsageError(f"{text}: {key} is empty, or holds a zero byte")
    return value


def format_uri(uri: NbdUri) -> str:
    """The URI as text, such that ``parse`` gives the same value back."""
    export = quote(uri.export, safe="/")
    tls = uri.tls
    user = "" if tls.username is None else quote(tls.username, safe="") + "@"
    query = {}
    if uri.socket:
        query["socket"] = uri.socket
    if tls.certificates is not None:
        query["tls-certificates"] = tls.certificates
    if tls.psk_file is not None:
        query["tls-psk-file"] = tls.psk_file
    if tls.hostname is not None:
        query["tls-hostname"] = tls.hostname
    if not tls.verify_peer:
        query["tls-verify-peer"] = "false"
    parts = [f"{key}={quote(value, safe='/', errors='surrogateescape')}" for key, value in query.items()]
    asked = "?" + "&".join(parts) if parts else ""
    if uri.socket:
        return f"{uri.scheme}://{user}/{export}{asked}"
    host = f"[{quote(uri.host, safe=':')}]" if ":" in uri.host else quote(uri.host)
    port = "" if uri.port == DEFAULT_PORT else f":{uri.port}"
    return f"{uri.scheme}://{user}{host}{port}" + (f"/{export}" if export or asked else "") + asked
