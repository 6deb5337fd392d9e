"""A whole Debian 13 for a guest (tests/support/guest.py): systemd, Python, nbdbm, and tools that judge it.

It is made of what scripts/unpack_peers.sh unpacked, on a disk of its own. Nothing in it is configured but
what stands here, so it starts in seconds; the packages' own scripts have not run.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.support import guest, qemu

KERNEL = "debian-13"
SIZE = "400M"
PACKAGING = qemu.ROOT / "packaging"

LEFT_OUT = ("doc", "i18n", "locale", "man", "perl", "perl5", "zoneinfo", "gconv", "qemu-storage-daemon")
"""Directories and programs that nothing here needs."""

UNCOMPILED = "(/test/|idlelib|tkinter|ensurepip|pydoc|turtledemo|encodings/(cp|iso|mac))"
"""What of Python's library is not compiled in advance; of the rest an emulated processor takes seconds."""

APPLETS = "cat chown cmp cp grep head ls mkdir seq sh sleep stat tr"
"""Commands of BusyBox that scripts may use."""

FILES = {
    "etc/passwd": "root:x:0:0::/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/fstab": "",
    "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    # Newer than what they are asked about: nothing has to be renewed at the first start.
    "etc/.updated": "TIMESTAMP_NSEC=9000000000000000000\n",
    "var/.updated": "TIMESTAMP_NSEC=9000000000000000000\n",
    "etc/os-release": "ID=debian\nVERSION_ID=13\n",
    "usr/bin/nbdbm": '#!/bin/sh\nexec /usr/bin/python3 -m nbdbm "$@"\n',
    "etc/systemd/system.conf": "[Manager]\nShowStatus=no\n",
    # The test's own script, and no logins.
    "etc/systemd/system/default.target": """\
[Unit]
Requires=basic.target
Wants=script.service
""",
    "etc/systemd/system/script.service": """\
[Unit]
Requires=basic.target
After=basic.target
[Service]
Type=oneshot
ExecStart=/run-script
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
""",
    "run-script": """\
#!/bin/sh
export HOME=/root SYSTEMD_COLORS=0 SYSTEMD_PAGER=
sh -eu /script
status=$?
[ $status = 0 ] || journalctl --no-pager --lines=60
echo "guest: status $status"
systemctl poweroff --force --force
""",
}

DISK = """\
mount -t ext4 /dev/vda /mnt
cp /script /mnt/script
"""
SYSTEMD = (
    DISK
    + """\
umount /proc /sys
exec switch_root /mnt /usr/lib/systemd/systemd
"""
)
BARE = (
    DISK
    + """\
ip link set lo up
for name in dev proc sys; do mount --bind /$name /mnt/$name; done
chroot /mnt /bin/sh -eu /script
status=$?
[ $status = 0 ] || dmesg | tail -n 40
echo "guest: status $status"
poweroff -f
"""
)
"""The same without systemd: the script alone."""


def missing() -> str | None:
    """Why there can be no such machine, or None if there can."""
    for suite in (guest.KERNELS[KERNEL], "machine"):
        if not (qemu.unpacked(suite) / "usr").exists():
            return f"nothing is unpacked at {qemu.unpacked(suite)} (scripts/unpack_peers.sh {suite} does it)"
    return guest.missing(guest.KERNELS[KERNEL]) or qemu.newer_python_missing()


def disk(place: Path) -> Path:
    """Make the machine's disk, with nbdbm as it is now, in ``place``."""
    root, image = place / "root", place / "disk.raw"
    shutil.copytree(
        qemu.unpacked("machine"), root, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT, "__pycache__")
    )
    packages = root / "usr/lib/python3/dist-packages"
    shutil.copytree(qemu.PYTHON_313, packages, dirs_exist_ok=True)
    # What is compiled is so for another Python, perhaps.
    shutil.copytree(
        qemu.ROOT / "nbdbm", packages / "nbdbm", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for name in ("dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp"):
        (root / name).mkdir(exist_ok=True)
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    for applet in APPLETS.split():
        (root / "usr/bin" / applet).symlink_to("busybox")
    # As docs/operations.md says.
    for unit in PACKAGING.glob("systemd/nbdbm*.s[eo][rc]*"):
        shutil.copy(unit, root / "etc/systemd/system")
    (root / "etc/sysusers.d").mkdir(exist_ok=True)
    shutil.copy(PACKAGING / "systemd/nbdbm.sysusers", root / "etc/sysusers.d/nbdbm.conf")
    (root / "etc/nbdbm").mkdir()
    shutil.copy(PACKAGING / "nbdbm.toml", root / "etc/nbdbm")
    tools = qemu.newer()
    words = [
        *tools.python(),
        "-m",
        "compileall",
        "-q",
        "-x",
        UNCOMPILED,
        str(root / "usr/lib/python3.13"),
        str(packages),
    ]
    qemu.run(["env", f"PYTHONHOME={tools.python_environment()['PYTHONHOME']}", *words])
    tools.run("mkfs.ext4", "-q", "-d", root, image, SIZE)
    shutil.rmtree(root)
    return image


@contextlib.contextmanager
def started(image: Path, place: Path, script: str, *, systemd: bool = True) -> Iterator[guest.Machine]:
    """Boot from ``image`` and run a shell script in it, see ``guest.started``."""
    modules = ["virtio_pci", "virtio_blk", "vsock_loopback"]
    init = SYSTEMD if systemd else BARE
    with guest.started(KERNEL, place, script, init=init, modules=modules, disk=image) as machine:
        yield machine


def run(image: Path, place: Path, script: str, *, systemd: bool = True) -> str:
    """Boot, run the script to its good end, power off; return what it printed."""
    with started(image, place, script, systemd=systemd) as machine:
        return machine.finish()
