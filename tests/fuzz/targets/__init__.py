"""What is fuzzed, a module each: ``seeds()`` to begin with, and ``run(data)``, which raises what is wrong.

Any bytes are an input. A target ends by itself, leaves nothing behind, and is the same each time.
"""

from __future__ import annotations

TARGETS = ("bitmaps", "client", "handshake", "qcow2", "texts", "tools", "transmission", "tunnel")
