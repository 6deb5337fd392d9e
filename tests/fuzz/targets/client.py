"""Our own client's core, against a server that says anything, with TLS and without.

What must hold: nothing but NbdError; what is reported is what the server said (tests/fuzz/clientmodel.py), to
what was asked, within the request, once; who insists on TLS says and hears nothing before it; how the bytes
were cut makes no difference.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence

from nbdbm.errors import NbdError, UsageError
from nbdbm.nbd.client import ClientEvent, ClientProtocol
from nbdbm.nbd.clientevents import (
    ContextsListed,
    ContextsSelected,
    ExportsListed,
    HandshakeReady,
    InfoReceived,
    OptionRefused,
    Ready,
    Reply,
    StartTls,
)
from nbdbm.nbd.clienthandshake import ClientState
from tests.fuzz import clientmodel, wire
from tests.fuzz.clientmodel import Asked
from tests.fuzz.script import Script

CONTEXTS = ("base:allocation", "qemu:dirty-bitmap:a")
SIZE = 1 << 20
IN_PLAIN = (b"", *(struct.pack(">I", flags) + wire.option(wire.STARTTLS) for flags in (1, 3)))
"""All that a client may say before TLS, which it insists on."""
ASK = ("list", "info", "contexts", "select", "go")


def starts() -> Iterable[bytes]:
    """Scripts to begin with: good sessions of each style, with requests of each kind."""
    for style in range(6):
        yield bytes([style, 3, 0x1F, 0xFF, 3, 9, 18, 30, 1, 1, 1, 1])
        yield bytes([style, 2, 0x1F, 0xFF])
        yield bytes([style, 3, 0x18, 0x01, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 5])
        for requests in (b"\x01", b"\x05", b"\x1f", b"\x24"):
            yield bytes([style, 3, 0x18]) + requests + bytes([0, 0, 0]) + bytes(range(40))
            yield bytes([style, 3, 0x18]) + requests + bytes([3, 2, 1]) + bytes([0, 1, 2, 3, 4, 5] * 6)


def run(data: bytes) -> None:
    script = Script(data)
    kind = script.byte()
    style, tls = kind % 3, kind // 3 & 1 > 0
    flags = script.byte()
    asked = script.byte()
    requests = script.byte()
    cuts = script.bytes(8)
    messages = _messages(script, style, flags, asked, requests, tls)
    whole = _session([[message] for message in messages], style, asked, requests, tls)
    some = [wire.cut(message, Script(cuts)) for message in messages]
    assert whole.texts == _session(some, style, asked, requests, tls).texts, "cutting made a difference"
    single = [
        [*(message[at : at + 1] for at in range(min(len(message), 100))), message[100:]]
        for message in messages
    ]
    assert whole.texts == _session(single, style, asked, requests, tls).texts, "byte by byte it is another"
    _judge(whole, b"".join(messages), style, [what for bit, what in enumerate(ASK) if asked >> bit & 1], tls)


class Heard:
    """One session, as the client has it."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        """What was reported; the last is an error if there was one."""
        self.events: list[ClientEvent] = []
        self.failed = False
        self.asked: dict[int, Asked] = {}
        self.contexts: dict[str, int] = {}
        self.style = 0
        self.in_plain = b""
        """What the client sent before TLS."""


def _session(messages: Sequence[Sequence[bytes]], style: int, asked: int, requests: int, tls: bool) -> Heard:
    """Messages come in pieces. Between two of them the client asks on, or TLS begins."""
    client = ClientProtocol(structured=style > 0, extended=style > 1, tls=tls)
    to_ask = [what for bit, what in enumerate(ASK) if asked >> bit & 1]
    heard = Heard()

    def ask() -> None:
        what = to_ask.pop(0)
        calls: dict[str, Callable[[], None]] = {
            "list": client.list_exports,
            "info": lambda: client.info("a"),
            "contexts": lambda: client.list_contexts("a"),
            "select": lambda: client.set_contexts("a", CONTEXTS),
            "go": lambda: client.go("a"),
        }
        try:
            calls[what]()
        except NbdError as error:
            # The server has said that it is too old for it.
            heard.texts.append(str(error))
            to_ask.clear()

    def send() -> None:
        heard.contexts = dict(client.contexts)
        heard.style = client.structured + client.extended
        for bit in range(8):
            if requests >> bit & 1:
                cookie, command = _request(client, bit)
                heard.asked[cookie] = Asked(command, bit * 4096, 4096)

    def act(event: ClientEvent) -> None:
        heard.events.append(event)
        heard.texts.append(_text(event))
        if isinstance(event, Ready):
            send()
        elif to_ask and not isinstance(event, Reply):
            ask()

    try:
        for pieces in messages:
            events = [event for piece in pieces for event in client.receive_data(piece)]
            if client.state is ClientState.STARTING_TLS:
                assert events == [StartTls()], "something is reported before TLS"
                assert not client.structured and not client.contexts and client.export is None
                heard.in_plain += b"".join(client.data_to_send())
                heard.events.append(events[0])
                heard.texts.append("tls")
                events = client.tls_started()
            for event in events:
                act(event)
            sent = b"".join(client.data_to_send())
            if tls and StartTls() not in heard.events:
                heard.in_plain += sent
    except NbdError as error:
        heard.failed = True
        heard.texts.append(str(error))
        assert len(str(error)) < 70_000
        assert client.receive_data(b"more") == []
    except UsageError as error:
        # Of our own asking, were it not for what the server had said before.
        heard.failed = True
        heard.texts.append(str(error))
    return heard


def _judge(heard: Heard, stream: bytes, style: int, asked: list[str], tls: bool) -> None:
    """Nothing was heard but what was said."""
    said = clientmodel.hear_handshake(stream, style, tls, asked)
    told = [_told(event) for event in heard.events if not isinstance(event, Reply)]
    assert told == said.told[: len(told)], "something else was said"
    if tls:
        assert heard.in_plain in IN_PLAIN, "more than the wish for TLS was sent in plain text"
    replies = [event for event in heard.events if isinstance(event, Reply)]
    if said.rest is None:
        assert not replies
        return
    if told != said.told:
        assert heard.failed
        return
    assert heard.style == said.style and heard.contexts == said.contexts
    names = {number: name for name, number in said.contexts.items()}
    answers = clientmodel.hear_replies(said.rest, said.style, heard.asked)
    for reply in replies:
        answer = next(answers, None)
        assert answer is not None, "nothing of that kind was answered"
        assert (reply.cookie, reply.error) == (answer.cookie, answer.error)
        if reply.error:
            continue
        one = heard.asked[reply.cookie]
        assert (None if reply.data is None else bytes(reply.data)) == answer.data, "other data"
        assert reply.holes == answer.holes
        if one.command == wire.BLOCK_STATUS:
            found = {
                name: [tuple(each) for each in extents] for name, extents in (reply.extents or {}).items()
            }
            assert answer.extents is not None
            assert found == {names[number]: extents for number, extents in answer.extents.items()}
        assert len({reply.cookie for reply in replies}) == len(replies), "answered twice"
    if not heard.failed:
        assert next(answers, None) is None, "an answer was not reported"


def _told(event: ClientEvent) -> clientmodel.Told:
    """An event as the model has it."""
    match event:
        case HandshakeReady():
            return "ready", event.structured + event.extended
        case StartTls():
            return "tls", None
        case ExportsListed():
            return "list", tuple(each.name for each in event.exports)
        case InfoReceived():
            return "info", event.info.size
        case Ready():
            return "go", event.info.size
        case ContextsListed():
            return "contexts", event.names
        case ContextsSelected():
            return "select", event.contexts
        case OptionRefused():
            return "refused", (event.option, event.error)
    raise AssertionError(event)


def _request(client: ClientProtocol, bit: int) -> tuple[int, int]:
    """Send one; its cookie and command."""
    at = bit * 4096
    if bit in (0, 3, 6):
        return client.read(at, 4096), wire.READ
    if bit == 1:
        return client.write(at, b"x" * 4096), wire.WRITE
    if bit == 2 and client.contexts:
        return client.block_status(at, 4096), wire.BLOCK_STATUS
    if bit == 4:
        return client.write_zeroes(at, 4096), wire.WRITE_ZEROES
    if bit == 5:
        return client.trim(at, 4096), wire.TRIM
    return client.flush(), wire.FLUSH


def _text(event: ClientEvent) -> str:
    if isinstance(event, Reply):
        extents = {name: list(each) for name, each in (event.extents or {}).items()}
        data = None if event.data is None else bytes(event.data)
        return f"{event.cookie} {event.error} {event.text!r} {data!r} {event.holes} {extents}"
    return repr(event)


# -- the server


def _reply(code: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, code, kind, len(data)) + data


def _messages(script: Script, style: int, flags: int, asked: int, requests: int, tls: bool) -> list[bytes]:
    """What a server sends that means well, but for what the script changes."""
    found = [wire.GREETING + struct.pack(">H", flags)]
    if tls:
        found.append(_reply(wire.STARTTLS, 1))
    if style == 2:
        found.append(_reply(wire.EXTENDED, 1 if not flags & 4 else 0x80000001))
    if style == 1 or (style == 2 and flags & 4):
        found.append(_reply(wire.STRUCTURED, 1))
    answers = {
        "list": [_reply(wire.LIST, 2, wire.string(b"a") + b"about"), _reply(wire.LIST, 1)],
        "info": _infos(wire.INFO),
        "contexts": [
            _reply(wire.LIST_META, 4, b"\0\0\0\0" + CONTEXTS[0].encode()),
            _reply(wire.LIST_META, 1),
        ],
        "select": [
            *(
                _reply(wire.SET_META, 4, struct.pack(">I", at) + name.encode())
                for at, name in enumerate(CONTEXTS)
            ),
            _reply(wire.SET_META, 1),
        ],
        "go": _infos(wire.GO),
    }
    for bit, what in enumerate(ASK):
        if asked >> bit & 1:
            found += answers[what]
    found += [_transmission(script, style, 1 + number, bit) for number, bit in enumerate(_bits(requests))]
    found.append(script.bytes(script.byte() & 63))
    return _changed(found, script)


def _bits(requests: int) -> list[int]:
    return [bit for bit in range(8) if requests >> bit & 1]


def _infos(code: int) -> list[bytes]:
    return [
        _reply(code, 3, struct.pack(">HQH", 0, SIZE, 0x1FF)),
        _reply(code, 3, struct.pack(">HIII", 3, 1, 4096, 1 << 25)),
        _reply(code, 3, struct.pack(">H", 1) + b"a"),
        _reply(code, 1),
    ]


def _transmission(script: Script, style: int, cookie: int, bit: int) -> bytes:
    """An answer to one request, in chunks as the script says."""
    at = bit * 4096
    if style == 0:
        error = script.byte() & 0x41
        return struct.pack(">IIQ", 0x67446698, error, cookie) + (
            b"d" * 4096 if bit in (0, 3, 6) and not error else b""
        )
    found = []
    more = script.byte() & 3
    for number in range(more + 1):
        kind, body = 0, b""
        choice = script.byte() & 7
        part, start = 4096 // (more + 1), at + number * (4096 // (more + 1))
        if choice == 6:
            kind, body = 1 << 15 | 1, struct.pack(">IH", 5, 3) + b"bad"
        elif choice == 7:
            kind, body = 1 << 15 | 2, struct.pack(">IHQ", 5, 0, script.value(start))
        elif bit in (0, 3, 6):
            kind, body = (
                (1, struct.pack(">Q", start) + b"d" * part)
                if choice != 4
                else (2, struct.pack(">QI", start, part))
            )
        elif bit == 2:
            lengths = [script.pick((512, 1024, 4096, 1)) for _ in range(1 + (choice & 3))]
            if style == 2:
                kind, body = 6, struct.pack(">II", number & 1, len(lengths))
                body += b"".join(struct.pack(">QQ", length, choice) for length in lengths)
            else:
                kind, body = 5, struct.pack(">I", number & 1)
                body += b"".join(struct.pack(">II", length, choice) for length in lengths)
        done = int(number == more)
        for last in (0, done) if choice == 5 else (done,):  # the same twice
            if style == 2:
                found.append(struct.pack(">IHHQQQ", 0x6E8A278C, last, kind, cookie, at, len(body)) + body)
            else:
                found.append(struct.pack(">IHHQI", 0x668E33EF, last, kind, cookie, len(body)) + body)
    return b"".join(found)


def _changed(messages: list[bytes], script: Script) -> list[bytes]:
    """The messages, with a few of their numbers changed, or some left out, doubled or cut."""
    while script.more:
        index = script.byte() % len(messages)
        message = bytearray(messages[index])
        width = script.pick((1, 2, 4, 8))
        kind = script.byte()
        place = kind >> 2
        match kind & 3:
            case 0 if place + width <= len(message):
                old = int.from_bytes(message[place : place + width])
                new = script.value(old, (SIZE,)) & (1 << 8 * width) - 1
                message[place : place + width] = new.to_bytes(width)
            case 1:
                del message[place:]
            case 2:
                message = message[:8192] * (place & 3)
            case _:
                message[place:place] = script.bytes(width)
        messages[index] = bytes(message)
    return messages
