"""Our own client's core, against a server that says anything.

What must hold: nothing but NbdError; what is reported is within the request; how the bytes were cut makes no
difference.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence

from nbdbm.errors import NbdError, UsageError
from nbdbm.nbd.client import ClientEvent, ClientProtocol, Ready, Reply
from tests.fuzz import wire
from tests.fuzz.script import Script

CONTEXTS = ("base:allocation", "qemu:dirty-bitmap:a")
SIZE = 1 << 20
ASK = ("list", "info", "contexts", "select", "go")


def starts() -> Iterable[bytes]:
    """Scripts to begin with: good sessions of each style, with requests of each kind."""
    for style in range(3):
        for requests in (b"\x01", b"\x05", b"\x1f", b"\x24"):
            yield bytes([style, 3, 0x18]) + requests + bytes([0, 0, 0]) + bytes(range(40))
            yield bytes([style, 3, 0x18]) + requests + bytes([3, 2, 1]) + bytes([0, 1, 2, 3, 4, 5] * 6)


def run(data: bytes) -> None:
    script = Script(data)
    style = script.byte() % 3
    flags = script.byte()
    asked = script.byte()
    requests = script.byte()
    cuts = script.bytes(8)
    messages = _messages(script, style, flags, asked, requests)
    whole = _session([[message] for message in messages], style, asked, requests)
    some = [wire.cut(message, Script(cuts)) for message in messages]
    assert whole == _session(some, style, asked, requests), "cutting made a difference"
    single = [
        [*(message[at : at + 1] for at in range(min(len(message), 100))), message[100:]]
        for message in messages
    ]
    assert whole == _session(single, style, asked, requests), "byte by byte it is another"


def _session(messages: Sequence[Sequence[bytes]], style: int, asked: int, requests: int) -> list[str]:
    """What the client reports of messages in pieces, as texts; the last is an error if there was one.

    Between two messages it asks on.
    """
    client = ClientProtocol(structured=style > 0, extended=style > 1)
    to_ask = [what for bit, what in enumerate(ASK) if asked >> bit & 1]
    seen: list[str] = []
    in_flight: dict[int, tuple[int, int]] = {}

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
            seen.append(str(error))
            to_ask.clear()

    def send() -> None:
        for bit in range(8):
            if requests >> bit & 1:
                cookie = _request(client, bit)
                in_flight[cookie] = (bit * 4096, 4096)

    def act(event: ClientEvent) -> None:
        seen.append(_text(event))
        if isinstance(event, Reply):
            offset, length = in_flight.pop(event.cookie)
            assert event.data is None or len(event.data) == length
            for at, part in event.holes:
                assert offset <= at and at + part <= offset + length and part > 0
            for extents in (event.extents or {}).values():
                assert extents.covered <= length and len(extents)
        elif isinstance(event, Ready):
            send()
        elif to_ask:
            ask()

    try:
        for pieces in messages:
            for event in [event for piece in pieces for event in client.receive_data(piece)]:
                act(event)
            client.data_to_send()
    except NbdError as error:
        seen.append(str(error))
        assert len(str(error)) < 70_000
        assert client.receive_data(b"more") == []
    except UsageError as error:
        # Of our own asking, were it not for what the server had said before.
        seen.append(str(error))
    return seen


def _request(client: ClientProtocol, bit: int) -> int:
    at = bit * 4096
    if bit in (0, 3, 6):
        return client.read(at, 4096)
    if bit == 1:
        return client.write(at, b"x" * 4096)
    if bit == 2 and client.contexts:
        return client.block_status(at, 4096)
    if bit == 4:
        return client.write_zeroes(at, 4096)
    if bit == 5:
        return client.trim(at, 4096)
    return client.flush()


def _text(event: ClientEvent) -> str:
    if isinstance(event, Reply):
        extents = {name: list(each) for name, each in (event.extents or {}).items()}
        data = None if event.data is None else bytes(event.data)
        return f"{event.cookie} {event.error} {event.text!r} {data!r} {event.holes} {extents}"
    return repr(event)


# -- the server


def _reply(code: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, code, kind, len(data)) + data


def _messages(script: Script, style: int, flags: int, asked: int, requests: int) -> list[bytes]:
    """What a server sends that means well, but for what the script changes."""
    found = [wire.GREETING + struct.pack(">H", flags)]
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
                if choice < 4
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
        if style == 2:
            found.append(struct.pack(">IHHQQQ", 0x6E8A278C, done, kind, cookie, at, len(body)) + body)
        else:
            found.append(struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, len(body)) + body)
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
