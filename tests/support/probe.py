"""Read everything an export can tell through libnbd, for comparing one server with another.

Imported by the suite (with Debian's binding), or run as a program by another Python with its own
binding: ``python3 probe.py '{"uri": ..., "contexts": [...]}'`` prints the answer as JSON. Standard
library and ``nbd`` only.
"""

import hashlib
import json
import sys

CHUNK = 1024 * 1024
STATUS_32 = 0xFFFF0000
STATUS_64 = 1 << 40

OPTIONS = {
    "uri": "",
    "contexts": [],
    "structured": True,  # ask for structured replies
    "extended": True,  # ask for extended headers, where libnbd can
    "digest": True,  # read everything
    "maps": True,  # block status of everything, for each context
    "ranges": [],  # [offset, length] whose content is returned in hex
}


def connect(nbd, options):
    """A connection as ``options`` (see OPTIONS) ask for."""
    h = nbd.NBD()
    for context in options["contexts"]:
        h.add_meta_context(context)
    h.set_request_structured_replies(options["structured"])
    if hasattr(h, "set_request_extended_headers"):
        h.set_request_extended_headers(options["structured"] and options["extended"])
    if hasattr(h, "set_pread_initialize"):
        h.set_pread_initialize(False)
    h.set_uri_allow_local_file(True)  # certificates
    h.connect_uri(options["uri"])
    return h


def digest(h, size):
    """SHA-256 of the whole export."""
    total = hashlib.sha256()
    for offset in range(0, size, CHUNK):
        total.update(h.pread(min(CHUNK, size - offset), offset))
    return total.hexdigest()


def append(extents, length, flags):
    """Add an extent, merging it with an equal neighbour."""
    if extents and extents[-1][1] == flags:
        extents[-1][0] += length
    else:
        extents.append([length, flags])


def maps(h, size, contexts):
    """Coalesced [length, flags] over the whole export, for each context."""
    wide = hasattr(h, "get_extended_headers_negotiated") and h.get_extended_headers_negotiated()
    found = {context: [] for context in contexts}
    offset = 0
    while offset < size:
        length = min(size - offset, STATUS_64 if wide else STATUS_32)
        answer = {}

        def on_extents_32(context, at, entries, error, answer=answer):
            assert context not in answer, "context answered twice"
            answer[context] = list(zip(entries[0::2], entries[1::2], strict=True))

        def on_extents_64(context, at, entries, error, answer=answer):
            assert context not in answer, "context answered twice"
            answer[context] = [tuple(entry) for entry in entries]

        if wide:
            h.block_status_64(length, offset, on_extents_64)
        else:
            h.block_status(length, offset, on_extents_32)
        assert set(answer) == set(contexts), f"asked {contexts}, answered {sorted(answer)}"
        step = min(length, *(sum(entry[0] for entry in entries) for entries in answer.values()))
        assert step > 0, "no progress"
        for context, entries in answer.items():
            rest = step
            for entry_length, flags in entries:
                take = min(entry_length, rest)
                if take:
                    append(found[context], take, flags)
                rest -= take
        offset += step
    return found


def probe(nbd, options):
    """Everything ``options`` ask for, as JSON-able values."""
    options = OPTIONS | options
    h = connect(nbd, options)
    size = h.get_size()
    contexts = [context for context in options["contexts"] if h.can_meta_context(context)]
    answer = {
        "size": size,
        "structured": bool(h.get_structured_replies_negotiated()),
        "extended": bool(getattr(h, "get_extended_headers_negotiated", lambda: False)()),
        "read_only": bool(h.is_read_only()),
        "contexts": contexts,
    }
    if options["digest"]:
        answer["digest"] = digest(h, size)
    if options["maps"] and contexts:
        answer["maps"] = maps(h, size, contexts)
    answer["ranges"] = [h.pread(length, offset).hex() for offset, length in options["ranges"]]
    h.shutdown()
    return answer


if __name__ == "__main__":
    import nbd

    print(json.dumps(probe(nbd, json.loads(sys.argv[1]))))
