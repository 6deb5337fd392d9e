"""NBD URIs: where a server listens and which export is meant, as text and back.

The forms are those of the NBD URI specification (doc/uri.md): ``nbd://HOST[:PORT]/EXPORT`` over TCP and
``nbd+unix:///EXPORT?socket=PATH`` over a Unix socket, parts percent-encoded UTF-8.
"""

from __future__ import annotations

from dataclasses import dataclass
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
_TLS_SCHEMES = ("nbds", "nbds+unix")
_KNOWN_SCHEMES = (SCHEME_TCP, SCHEME_UNIX, *_TLS_SCHEMES)


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
    if scheme in _TLS_SCHEMES:
        raise UsageError(f"{text}: TLS ({scheme}) is not supported")
    if split.fragment:
        raise UsageError(
            f"{text}: a fragment (#{split.fragment}) has no meaning in an NBD URI; write # as %23"
        )
    if split.username is not None:
        raise UsageError(f"{text}: a user name has no meaning without TLS")
    try:
        export = unquote(split.path.removeprefix("/"), errors="strict")
    except UnicodeDecodeError as error:
        raise UsageError(f"{text}: the export name is not UTF-8") from error
    socket = ""
    # "+" is an ordinary character in a socket path, only web forms take it for a space.
    query = split.query.replace("+", "%2B")
    for key, value in parse_qsl(query, keep_blank_values=True, errors="surrogateescape"):
        if key != "socket":
            # Unknown parameters are ignored, as the specification asks; TLS ones promise what we cannot keep.
            if key.startswith("tls-"):
                raise UsageError(f"{text}: {key}: TLS is not supported")
            continue
        if socket:
            raise UsageError(f"{text}: more than one socket parameter")
        socket = value
    if scheme == SCHEME_UNIX:
        if split.netloc:
            raise UsageError(f"{text}: a Unix socket URI has no host: write nbd+unix:///EXPORT?socket=PATH")
        if not socket:
            raise UsageError(f"{text}: the socket=PATH parameter is missing")
        if "\0" in socket:
            raise UsageError(f"{text}: the socket path holds a zero byte")
        return NbdUri.unix(socket, export)
    if socket:
        raise UsageError(f"{text}: a socket parameter needs the nbd+unix scheme")
    host = unquote(split.hostname or "")
    if not host:
        raise UsageError(f"{text}: the host is missing: write nbd://HOST/EXPORT")
    return NbdUri.tcp(host, DEFAULT_PORT if port is None else port, export)


def format_uri(uri: NbdUri) -> str:
    """The URI as text, such that ``parse`` gives the same value back."""
    export = quote(uri.export, safe="/")
    if uri.scheme == SCHEME_UNIX:
        return f"{uri.scheme}:///{export}?socket={quote(uri.socket, safe='/', errors='surrogateescape')}"
    host = f"[{quote(uri.host, safe=':')}]" if ":" in uri.host else quote(uri.host)
    port = "" if uri.port == DEFAULT_PORT else f":{uri.port}"
    return f"{uri.scheme}://{host}{port}" + (f"/{export}" if export else "")
