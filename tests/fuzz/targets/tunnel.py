"""TLS between two tunnels, over a wire that loses its temper: pieces, stops, damage, plain text, early ends.

What must hold: nothing is received before TLS has begun, or while reading is paused, or after the end; what
is received is what the other end has sent, in order, and all of it where nobody broke anything; damage is
never data; each end learns of its end once; what waits encrypted stays within the limits.
"""

from __future__ import annotations

import asyncio
import functools
import random
import ssl
from collections.abc import Iterable
from typing import Any

from nbdbm.tunnel import MAX_OWN, PIECE, Tunnel
from tests.fuzz import disk
from tests.fuzz.script import Script

MOST_PENDING = PIECE + MAX_OWN + 64 * 1024
"""Bytes encrypted and not yet given to the transport: a piece, what TLS itself says, records around it."""

SIZES = (0, 1, 2, 100, 4096, 16384, 16385, 65536, 70_000, 200_000)
MOST_SENT = 300_000
CONTENT = random.Random(1).randbytes(1 << 20)
"""What an end sends, over and over: no part of it is like another."""


@functools.cache
def _contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the client's: without certificates, which make handshakes slow and need files."""
    found = []
    for kind in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(kind)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("AECDH-AES128-SHA:@SECLEVEL=0")
        context.options |= ssl.OP_NO_RENEGOTIATION
        found.append(context)
    return found[0], found[1]


class Wire(asyncio.Transport):
    """One end's transport. What is written waits in ``held`` for room, then in ``flying`` to be delivered."""

    def __init__(self) -> None:
        super().__init__()
        self.held = bytearray()
        self.flying = bytearray()
        """Towards the other end."""
        self.room = 1 << 30
        self.tunnel: Tunnel | None = None
        self.paused = False
        self.closing = False
        self.over = False
        self.ended = False
        """The other end has been told that nothing more comes."""
        self._blocked = False

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, Tunnel)
        self.tunnel = protocol

    def write(self, data: Any) -> None:
        if self.closing:
            return
        self.held += data
        self._move()
        if self.held and not self._blocked:
            self._blocked = True
            assert self.tunnel is not None
            self.tunnel.pause_writing()

    def take(self, count: int) -> None:
        """There is room for so much more."""
        self.room = min(self.room, 1 << 30) + count
        self._move()
        if self._blocked and not self.held and not self.over:
            self._blocked = False
            assert self.tunnel is not None
            if self.closing:
                self._lose()
            else:
                self.tunnel.resume_writing()

    def _move(self) -> None:
        count = min(self.room, len(self.held))
        self.flying += self.held[:count]
        del self.held[:count]
        self.room -= count

    def get_write_buffer_size(self) -> int:
        return len(self.held)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def close(self) -> None:
        self.closing = True
        if not self.held:
            self._lose()

    def abort(self) -> None:
        self.closing = True
        self.held.clear()
        self._lose()

    def _lose(self) -> None:
        if not self.over:
            self.over = True
            assert self.tunnel is not None
            asyncio.get_running_loop().call_soon(self.tunnel.connection_lost, None)


class End(asyncio.BufferedProtocol):
    """Who sends and receives through one tunnel; the first instance of each pair is the server."""

    def __init__(self, server: bool, room: int, *, stay: bool, shy: bool) -> None:
        self.wire = Wire()
        self.tunnel = Tunnel(
            self.wire,
            self,
            _contexts()[0 if server else 1],
            server_side=server,
            ready=self._ready,
            failed=self._failed,
        )
        self.sent = bytearray()
        self.received = bytearray()
        self.ready = False
        self.failed = False
        self.lost = False
        self.eof = False
        self.paused = False
        self.broke = False
        """It has closed or aborted, or was made to."""
        self._buffer = bytearray(room)
        self._blocked = False
        self._stay = stay
        """After the other end's goodbye."""
        self._shy = shy
        """It wants no more whenever it has received something."""

    # what the tunnel says

    def _ready(self) -> None:
        assert not self.ready and not self.failed and not self.lost
        self.ready = True

    def _failed(self, reason: str) -> None:
        assert reason and not self.ready and not self.failed
        self.failed = True

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._buffer)

    def buffer_updated(self, nbytes: int) -> None:
        assert self.ready and not self.eof and not self.lost and not self.paused
        assert 0 < nbytes <= len(self._buffer)
        self.received += self._buffer[:nbytes]
        if self._shy:
            self.pause()

    def eof_received(self) -> bool:
        assert self.ready and not self.eof and not self.lost
        self.eof = True
        return self._stay

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        assert self._blocked or not self.sent
        self._blocked = False

    def connection_lost(self, exc: Exception | None) -> None:
        assert not self.lost
        self.lost = True

    # what the script has it do

    def send(self, kind: int, count: int) -> None:
        if self.tunnel.is_closing() or self.failed or self.lost or len(self.sent) > MOST_SENT:
            return
        at = len(self.sent) % (len(CONTENT) // 2)
        data = CONTENT[at : at + count]
        if kind & 1:
            count = self.tunnel.send(memoryview(data))
            assert 0 <= count <= len(data)
            data = data[:count]
        elif kind & 2:
            self.tunnel.writelines([data[:10], memoryview(data)[10:]])
        else:
            self.tunnel.write(data)
        self.sent += data

    def pause(self) -> None:
        self.paused = True
        self.tunnel.pause_reading()

    def resume(self) -> None:
        self.paused = False
        self.tunnel.resume_reading()


def starts() -> Iterable[bytes]:
    """Scripts to begin with."""
    talk = bytes([0, 3, 1, 4, 2, 255, 3, 255, 0, 7, 1, 8, 10, 0, 2, 255, 3, 255])
    waiting = [5, 0, 0, *[1, 8, 33, 7, 17, 6, 1, 9] * 2, 7, 16, 2, 255, 3, 255, 7, 17, 1, 5, 7, 20, 3, 255]
    for settings in range(16):
        yield bytes([settings, settings * 17 % 256, *[2, 255, 3, 255] * 3, *waiting])
    for size in range(len(SIZES)):
        for settings in range(4):
            yield (
                bytes([settings, 200]) + bytes([2, 255, 3, 255] * 3) + bytes([0, size, 2, 255, 3, 255]) + talk
            )
            yield bytes([settings, 3]) + talk + bytes([4, size, 6, 5, 0, size, 9, 1, 2, 40, 11, 2, 12, 3])


def run(data: bytes) -> None:
    disk.run(_run(Script(data)))


async def _run(script: Script) -> None:
    settings, room = script.byte(), 512 << script.byte() % 9
    failures: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: failures.append(str(context)))
    ends = (
        End(True, room, stay=bool(settings & 1), shy=bool(settings & 4)),
        End(False, room, stay=bool(settings & 2), shy=bool(settings & 8)),
    )
    for end in ends:
        end.tunnel.start()
    damaged = False
    while script.more:
        damaged |= _step(script, ends)
        await asyncio.sleep(0)
        _judge(ends, damaged)
    # Whoever still lives gets all that is on its way.
    for _ in range(20_000):
        for end, other in (ends, ends[::-1]):
            if end.paused:
                end.resume()
                await asyncio.sleep(0)
            end.wire.take(1 << 30)
            _deliver(end, other, 1 << 30)
        for _ in range(3):
            await asyncio.sleep(0)
        _judge(ends, damaged)
        if not any(end.wire.flying or end.wire.held or end.paused for end in ends):
            break
    broke = damaged or any(end.broke for end in ends)
    if not broke:
        assert all(end.ready for end in ends), "TLS has not begun"
        for end, other in (ends, ends[::-1]):
            assert other.received == end.sent, f"{len(end.sent)} sent, {len(other.received)} received"
    for end in ends:
        if not end.lost:
            end.tunnel.abort()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert all(end.lost for end in ends), "an end was not told"
    assert not failures, failures


def _step(script: Script, ends: tuple[End, End]) -> bool:
    """Do one thing; whether it was damage."""
    kind = script.byte()
    end, other = ends if kind & 1 else ends[::-1]
    match kind >> 1 & 7:
        case 0:
            end.send(kind >> 4, script.pick(SIZES))
        case 1:
            count = script.byte()
            _deliver(end, other, 1 << 30 if count == 255 else count * count)
        case 2:
            end.wire.room = script.number(2)
        case 3:
            end.wire.take(1 << script.byte() % 21)
        case 4:
            end.pause()
        case 5:
            end.resume()
        case 6:
            end.broke = True
            if kind & 16:
                end.tunnel.abort()
            elif not kind & 32:
                end.tunnel.close()
            elif not end.wire.ended and not other.lost and not other.wire.over:
                end.wire.ended = True
                if not other.tunnel.eof_received():
                    other.tunnel.close() if other.ready else other.wire.close()
        case _:
            flying = end.wire.flying
            at = script.number(2) % (len(flying) + 1)
            if kind & 16:
                flying[at:at] = script.bytes(8) or b"plain"
                return True
            if at < len(flying):
                flying[at] ^= 1 << (script.byte() & 7)
                return True
    return False


def _deliver(end: End, other: End, count: int) -> None:
    """``count`` bytes of what ``end`` has sent come to ``other``."""
    flying = end.wire.flying
    while flying and count and not other.wire.paused and not other.wire.over and not end.wire.ended:
        view = other.tunnel.get_buffer(-1)
        part = min(len(view), len(flying), count)
        view[:part] = flying[:part]
        del flying[:part]
        count -= part
        other.tunnel.buffer_updated(part)
    if other.wire.over or end.wire.ended:
        flying.clear()
    if end.wire.over and not flying and not end.wire.ended and not other.wire.over and not other.wire.paused:
        # As a socket: the connection's end comes after its last byte.
        end.wire.ended = True
        if not other.tunnel.eof_received():
            other.wire.close()


def _judge(ends: tuple[End, End], damaged: bool) -> None:
    for end, other in (ends, ends[::-1]):
        assert other.sent.startswith(end.received), "received what was not sent"
        assert end.tunnel._outgoing.pending <= MOST_PENDING, "more waits than the limits allow"
        assert end.tunnel.get_write_buffer_size() >= 0
        assert not end.failed or damaged or any(one.broke for one in ends), "TLS failed without a reason"
