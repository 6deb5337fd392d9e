"""The disk that the demo serves, for tests that need a real image and no outside program.

It was made by QEMU (scripts/data/make-sample.sh); EXPECTED is what QEMU says about it.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent.parent / "scripts" / "data"

EXPECTED: dict[str, Any] = json.loads((DATA / "sample.json").read_text())


def unpack(directory: Path) -> Path:
    """A fresh copy of the image in ``directory``."""
    image = directory / "sample.qcow2"
    image.write_bytes(gzip.decompress((DATA / "sample.qcow2.gz").read_bytes()))
    return image
