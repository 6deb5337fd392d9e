"""A virtual machine that lives for seconds: Debian's kernel, BusyBox, and one shell script.

Everything comes from what scripts/unpack_peers.sh unpacked, QEMU included, which emulates the processor
(no KVM). The file system is an archive in memory, made here; the network is QEMU's own, where ``HOST`` is
the loopback interface of this machine. The script's output comes back over a serial line.
"""

from __future__ import annotations

import contextlib
import lzma
import re
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import qemu, servers

KERNELS = {"debian-12": "bookworm", "debian-13": "trixie"}
"""Suites that have a kernel and its programs unpacked, by what tests call them."""

HOST = "10.0.2.2"
"""The address that leads to this machine's 127.0.0.1."""

MODULES = ["virtio_pci", "virtio_net", "nbd"]
PROGRAMS = ["nbd-client", "mkfs.ext4", "e2fsck"]
"""Beside those of BusyBox."""

TIMEOUT = 300
"""Seconds from power on to power off: a busy machine emulates slowly, and none of it is hurried."""

APPEND = "console=ttyS0 loglevel=1 panic=-1 no_timer_check"
"""Of the kernel. On a busy machine it would find that its timer does not work, and panic."""

START = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
for module in /modules/*; do insmod "$module"; done
"""
INIT = """\
ip link set lo up
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0
sh -eu /script
status=$?
[ $status = 0 ] || dmesg | tail -n 40
echo "guest: status $status"
poweroff -f
"""


class GuestFailed(AssertionError):
    """The script failed, or the machine did not get so far; with all that came over the serial line."""


@dataclass
class Machine:
    """A running guest."""

    process: subprocess.Popen[bytes]
    console: Path
    deadline: float

    def output(self) -> str:
        """What came over the serial line so far."""
        return self.console.read_text(errors="backslashreplace").replace("\r", "")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Until a line matches."""
        while True:
            ended = self.process.poll() is not None or time.monotonic() > self.deadline
            output = self.output()
            if found := re.search(f"^{pattern}$", output, re.MULTILINE):
                return found
            if ended:
                raise GuestFailed(f"no line {pattern!r} from the guest:\n{output}")
            time.sleep(0.05)

    def finish(self, status: int = 0) -> str:
        """Until the machine is off; the script must have ended with ``status``. Returns the output."""
        self.wait_for(f"guest: status {status}")
        try:
            self.process.wait(max(1, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise GuestFailed(f"the guest does not power off:\n{self.output()}") from None
        return self.output()


def missing(suite: str) -> str | None:
    """Why there can be no guest of this suite, or None if there can."""
    place = qemu.unpacked(suite)
    if not (place / "usr/bin/qemu-system-x86_64").exists():
        return f"no guest is unpacked at {place} (scripts/unpack_peers.sh {suite} puts it there)"
    return None


@contextlib.contextmanager
def started(
    kernel: str,
    place: Path,
    script: str,
    *,
    init: str = INIT,
    modules: Sequence[str] = MODULES,
    disk: Path | None = None,
) -> Iterator[Machine]:
    """Boot ``kernel`` (a key of KERNELS) with a shell script to run; files go to ``place``.

    Args:
        init: what is done once the ``modules`` are there; by default, the script.
        disk: a raw image for /dev/vda, which keeps nothing of what is written to it.
    """
    root = qemu.unpacked(KERNELS[kernel])
    tools = qemu.Tools(kernel, root)
    archive = place / "initrd"
    archive.write_bytes(initramfs(tools, root, script, START + init, modules))
    drive = ["-drive", f"file={disk},if=virtio,format=raw,snapshot=on"] if disk else []
    (image,) = root.glob("boot/vmlinuz-*")
    console = place / "console"
    console.write_bytes(b"")
    argv = tools.argv(
        "qemu-system-x86_64",
        *(
            "-M",
            "pc,accel=tcg",
            "-cpu",
            "max",
            "-m",
            "256" if disk is None else "512",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
        ),
        *("-L", root / "usr/share/qemu", "-L", root / "usr/share/seabios"),
        *("-display", "none", "-serial", f"file:{console}"),
        *("-kernel", image, "-initrd", archive, "-append", APPEND),
        *drive,
        *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
    )
    (modules,) = root.glob("usr/lib/*-linux-*/qemu")
    log = place / "qemu"
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=qemu.environment() | {"QEMU_MODULE_DIR": str(modules)},
        )
    try:
        yield Machine(process, console, time.monotonic() + TIMEOUT)
    finally:
        servers.stop(process)
    assert process.returncode == 0, log.read_text()


def run(kernel: str, place: Path, script: str) -> str:
    """Boot, run the script to its good end, power off; return what it printed."""
    with started(kernel, place, script) as machine:
        return machine.finish()


# -- the archive in memory


def initramfs(tools: qemu.Tools, root: Path, script: str, init: str, modules: Sequence[str]) -> bytes:
    """A cpio archive (the kernel's "newc" kind): BusyBox, programs with their libraries, modules, script."""
    files: dict[str, bytes] = {"init": init.encode(), "script": script.encode()}
    files["bin/busybox"] = (root / "usr/bin/busybox").read_bytes()
    for name in PROGRAMS:
        loader, option, libraries, program = tools.argv(name)
        listed = qemu.run([loader, option, libraries, "--list", program]).stdout
        files[f"sbin/{name}"] = Path(program).read_bytes()
        for path in re.findall(r"=> (/\S+)", listed):
            files[f"lib/{Path(path).name}"] = Path(path).read_bytes()
        # The path that the program itself names.
        files["lib64/ld-linux-x86-64.so.2"] = Path(loader).read_bytes()
    for number, (name, data) in enumerate(_modules(root, modules).items()):
        files[f"modules/{number:02}-{name}.ko"] = data
    return _cpio(files)


def _modules(root: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """Modules with those that they need, in the order in which they can be loaded."""
    paths = {
        path.name.partition(".ko")[0].replace("-", "_"): path
        for path in root.glob("usr/lib/modules/*/kernel/**/*.ko*")
    }
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        # One that has no file is part of the kernel itself.
        if name in found or name not in paths:
            return
        data = paths[name].read_bytes()
        if paths[name].suffix == ".xz":
            data = lzma.decompress(data)
        needs = re.search(rb"\0depends=([\w,-]*)\0", data)
        for needed in needs[1].decode().split(",") if needs else []:
            add(needed.replace("-", "_"))
        found[name] = data

    for name in wanted:
        add(name)
    return found


def _cpio(files: dict[str, bytes]) -> bytes:
    """Files, the directories that they are in, and those that every system has."""
    archive = bytearray()
    directories = {"bin", "dev", "etc", "mnt", "proc", "sys", "tmp"}
    directories |= {str(parent) for name in files for parent in Path(name).parents} - {"."}

    def entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        # Inode, mode, owner, group, links, time, size, device of the file system, of the node, name, sum.
        fields = (len(archive) + 1, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        archive.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0")
        archive.extend(bytes(-len(archive) % 4) + data)
        archive.extend(bytes(-len(archive) % 4))

    for name in sorted(directories):
        entry(name, stat.S_IFDIR | 0o755)
    entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    for name, data in files.items():
        entry(name, stat.S_IFREG | 0o755, data)
    entry("TRAILER!!!", 0)
    return bytes(archive)
