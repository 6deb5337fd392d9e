"""What one peer may make the other hold or do: named limits, each with the abuse that it stops."""

from __future__ import annotations

from dataclasses import dataclass

from nbdbm.nbd.constants import MAX_PAYLOAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one connection to the server, bytes unless said."""

    max_payload: int = MAX_PAYLOAD
    """Largest READ or WRITE. What qemu-nbd accepts and clients assume; a WRITE's buffer is allocated
    at once, so this is also the memory which one request header can claim."""

    max_drained: int = 4 * MAX_PAYLOAD
    """Largest refused WRITE payload that is read and thrown away to keep the stream in step. Beyond it
    the client is cut off: it would keep us busy with bytes that nobody wants."""

    max_option_length: int = 1024 * 1024
    """Longest option data that is kept for parsing, and so the memory that a peer whom nobody knows yet can
    claim: it holds ``max_queries`` queries of 250 bytes each, longer than the names people give. Longer data
    is drained and answered ERR_TOO_BIG."""

    max_option_bytes: int = 32 * 1024 * 1024
    """Option data in one handshake. A client that asks about each of 16384 exports by a name of 255 bytes
    sends 4 MiB; one that sends eight times as much only wants to keep us reading, and is cut off."""

    max_queries: int = 4096
    """Queries (a number) in one LIST or SET_META_CONTEXT: as many as contexts may be selected. A MiB of empty
    ones, 4 bytes each, would become twenty times as much memory."""

    max_options: int = 16384
    """Options per handshake (a number). A client needs about three for each export there is; a peer
    that sends more is playing, and would hold its place for ever."""

    max_queued: int = 1024 * 1024
    """Replies that may be waiting to be sent when another option is parsed. A client must await an
    option's reply before it sends the next ("Fixed newstyle negotiation"); without this limit a packet
    of pipelined LISTs (16 bytes each) would have us build gigabytes. Options answered in turns never get
    there: replies are sent in between."""

    max_pipelined: int = 128
    """Options (a number) answered before any reply of theirs is sent, for the same reason: a packet of them
    costs time, too, and a thousand such clients kept everybody else from being accepted for 20 seconds."""

    max_contexts: int = 4096
    """Metadata contexts (a number) one connection may select. Each costs every BLOCK_STATUS a walk and
    a chunk; backup clients select a handful."""

    max_extents: int = 128 * 1024
    """Extents (a number) in one chunk of a BLOCK_STATUS reply: QEMU's cap, 1 MiB on the wire; the
    specification advises against more than 2^20."""

    max_extents_per_reply: int = 2 * 1024 * 1024
    """Extents (a number) in all chunks of one BLOCK_STATUS reply, so that many selected contexts do not
    multiply the memory of a reply: 32 MiB on the wire with extended headers."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """What a server may make a client hold, bytes unless said."""

    max_read: int = 64 * 1024 * 1024
    """Largest READ the client itself may ask for."""

    max_status: int = 8 + 16 * (1 << 20)
    """Longest BLOCK_STATUS chunk: the specification's 2^20 extents with extended headers."""

    max_option_reply: int = 64 * 1024
    """Longest data of one option reply: two strings of the greatest length and room for extensions."""

    max_listed: int = 128 * 1024
    """Exports or contexts (a number) which a server may list; QEMU allows 65535 bitmaps."""

    max_error_payload: int = 64 * 1024
    """Longest error chunk: a string of the greatest length and room for unknown trailing fields."""


DEFAULT_CLIENT_LIMITS = ClientLimits()
