"""What README.md shows works as shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support import images, libnbd, qemu, servers
from tests.support.marks import requires

pytestmark = [requires("qemu-img", "qemu-io", "libnbd")]

README = Path(__file__).resolve().parent.parent.parent / "README.md"


def test_the_program_in_the_readme(gallery: images.Gallery, tmp_path: Path) -> None:
    found = re.search(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    program = tmp_path / "dirty.py"
    program.write_text(found[1])
    with servers.nbdbm(gallery.get("bitmaps-inconsistent").path) as server:
        done = subprocess.run(
            [sys.executable, program, server.uri, "good"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            env=qemu.environment(),
        )
        answer = libnbd.probe(server.uri, contexts=["qemu:dirty-bitmap:good"], digest=False)
    expected, at = [], 0
    for length, flags in answer["maps"]["qemu:dirty-bitmap:good"]:
        if flags & 1:
            expected.append(f"{at} {length}")
        at += length
    assert expected
    assert done.stdout.splitlines() == expected
