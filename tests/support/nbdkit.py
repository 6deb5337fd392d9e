"""nbdkit with our plugin inside, as its own process."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator

from tests.support import qemu, servers
from tests.support.images import Case

PLUGIN = qemu.ROOT / "nbdbm/nbdkit/nbdbm_plugin.py"


def missing() -> str | None:
    """Why nbdkit cannot load what is installed for this Python, or None if it can."""
    nbdkit = shutil.which("nbdkit", path=qemu.SEARCH_PATH)
    if nbdkit is None:
        return "the program nbdkit is not installed"
    done = qemu.run([nbdkit, "python", "--dump-plugin"], check=False)
    ours = ".".join(map(str, sys.version_info[:2]))
    versions = [
        line.partition("=")[2] for line in done.stdout.splitlines() if line.startswith("python_version=")
    ]
    if not versions:
        return "the package nbdkit-plugin-python is not installed"
    if not versions[0].startswith(f"{ours}."):
        return f"nbdkit has Python {versions[0]}, not {ours}"
    return None


def argv(*words: object, path: str | None = None) -> list[str]:
    """nbdkit with ``words``; its Python finds what the tests' Python has."""
    paths = sysconfig.get_path("platlib") if path is None else path
    return ["env", f"PYTHONPATH={paths}", "nbdkit", *map(str, words)]


def parameters(case: Case) -> list[str]:
    """What makes nbdkit serve an image of the matrix."""
    found = [f"image={case.path}", f"format={case.format}"]
    if "--load-snapshot" in case.options:
        found.append(f"snapshot={case.options[case.options.index('--load-snapshot') + 1]}")
    return found


@contextlib.contextmanager
def serving(*words: object, options: tuple[str, ...] = (), clean: bool = True) -> Iterator[servers.Server]:
    """nbdkit in the foreground, with ``options``, and ``words`` for our plugin.

    If ``clean``, it must end with 0 and without having said anything.
    """
    with servers.started(
        lambda socket: argv("-f", "-U", socket, *options, "python", PLUGIN, *words)
    ) as server:
        yield server
        if clean:
            assert server.alive(), server.output()
            status = servers.stop(server.process)
            assert (status, said(server)) == (0, []), f"status {status}\n{server.output()}"


def said(server: servers.Server) -> list[str]:
    """The lines that nbdkit has printed, but for those about its first client: ``started`` itself, which
    leaves once it has got in, at whatever moment of the handshake that is."""
    return [line for line in server.output().splitlines() if not line.startswith("nbdkit: python[1]: ")]


def run(*words: object, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """A run of nbdkit with our plugin that is expected to end by itself."""
    return qemu.run(argv("-f", "-U", "-", "python", PLUGIN, *words, path=path), check=False)
