"""The Debian package, with the Python packages it needs inside it: deb.py DIRECTORY

pip brings what is needed from PyPI, and dpkg-deb packs it; run by ``make deb``. The package is for the minor
version of PYTHON (/usr/bin/python3) and for this machine's architecture. $SOURCE_DATE_EPOCH is the time of
every file in it; without it, that of the last commit,
or now.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbdbm import __version__
from nbdbm.cli import PROGRAM
from scripts import manpages

ROOT = Path(__file__).resolve().parent.parent
PACKAGING = ROOT / "packaging"

LIBRARY = "usr/lib/nbdbm"
DOCUMENTS = "usr/share/doc/nbdbm"
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/nbdbm",
    "zsh": "usr/share/zsh/vendor-completions/_nbdbm",
    "fish": "usr/share/fish/vendor_completions.d/nbdbm.fish",
}
MAINTAINER_SCRIPTS = ("postinst", "prerm", "postrm")

MAINTAINER = "whoever built this package <root@localhost>"
"""Unless pyproject.toml or the one who builds it knows better."""

CONTROL = """\
Package: nbdbm
Version: {version}
Architecture: {architecture}
Maintainer: {maintainer}
Section: admin
Priority: optional
Installed-Size: {size}
Depends: python3 (>= {minor}), python3 (<< {next}), libc6 (>= {libc})
Recommends: procps
Suggests: libnbd-bin, qemu-utils
Description: NBD server for incremental backup of qcow2 images
 Serves qcow2 disk images and their dirty bitmaps over NBD, without QEMU, and
 keeps the bitmaps true when clients write. Creates images, manages bitmaps,
 takes checkpoints of several disks at once, checks and repairs.
 .
 The Python packages that it needs are inside, in /usr/lib/nbdbm, and are seen
 by nbdbm only.
"""


def said(*argv: str) -> str:
    """What a program prints."""
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    return done.stdout.strip()


def moment() -> int:
    """The time that all files get, in seconds since 1970."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    try:
        return int(said("git", "log", "-1", "--format=%ct"))
    except (OSError, subprocess.CalledProcessError):  # not a checkout, or not our own
        return int(time.time())


def maintainer(project: Mapping[str, Any]) -> str:
    """Whom users of the package write to, as its metadata (pyproject.toml's ``project``) say."""
    for who in (*project.get("maintainers", ()), *project.get("authors", ())):
        if "name" in who and "email" in who:
            return f"{who['name']} <{who['email']}>"
    return MAINTAINER


def judge_maintainer(text: str) -> str:
    """The value of ``--maintainer`` if dpkg takes it; raises ArgumentTypeError."""
    if not re.fullmatch(r"[^<>\n]+ <[^<>@\s]+@[^<>@\s]+>", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be as 'Jane Doe <jane@example.org>'")
    return text


def put(stage: Path, name: str, content: str | bytes) -> None:
    """A file of the package."""
    path = stage / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def install(stage: Path, python: str) -> None:
    """nbdbm and what it depends on, for ``python``, as pip would install them."""
    library = stage / LIBRARY
    with tempfile.TemporaryDirectory() as scratch:
        # In the checkout, a build directory of old might bring modules that are no more.
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, scratch)
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / "nbdbm", Path(scratch) / "nbdbm", ignore=ignored)
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
        pip += ["--disable-pip-version-check", "--root-user-action=ignore", "--no-compile"]
        # No path of this machine in what is compiled: it is not the same in the next build.
        environment = os.environ | {"CFLAGS": "-g0"}
        subprocess.run([*pip, "--target", library, scratch], check=True, env=environment)
    shutil.rmtree(library / "bin")
    for record in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
        for path in library.glob(f"*.dist-info/{record}"):
            path.unlink()
    if strip := shutil.which("strip"):
        subprocess.run([strip, "--strip-unneeded", *library.rglob("*.so")], check=True)
    if not list((library / "nbdbm").glob("_speed*.so")):
        print(f"deb: no C compiler or no headers of {python}: without nbdbm's compiled part", file=sys.stderr)


def lay(stage: Path) -> None:
    """Everything that is not Python's: the command, pages, completion, units, configuration, documents."""
    put(stage, "usr/bin/nbdbm", (PACKAGING / "debian/nbdbm").read_bytes())
    for name, text in manpages.pages().items():
        put(stage, f"usr/share/man/man{manpages.SECTION}/{name}.gz", gzip.compress(text.encode(), mtime=0))
    for shell, name in COMPLETIONS.items():
        put(stage, name, said(sys.executable, "-m", PROGRAM, "completion", shell) + "\n")
    for unit in (PACKAGING / "systemd").glob("*.s[eo]*"):
        put(stage, f"usr/lib/systemd/system/{unit.name}", unit.read_bytes())
    put(stage, "usr/lib/sysusers.d/nbdbm.conf", (PACKAGING / "systemd/nbdbm.sysusers").read_bytes())
    put(stage, "etc/nbdbm/nbdbm.toml", (PACKAGING / "nbdbm.toml").read_bytes())
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.*")):
        if document.suffix == ".md":
            # All in one directory here.
            text = re.sub(r"\]\((docs|\.\.)/(?=[\w-]+\.md)", "](", document.read_text())
            put(stage, f"{DOCUMENTS}/{document.name}", text)
        elif document.suffix == ".svg":
            put(stage, f"{DOCUMENTS}/{document.name}", document.read_bytes())
    licence = (ROOT / "LICENSE").read_text()
    others = (
        f"\nThe licences of the other packages in /{LIBRARY} are in their .dist-info directories there.\n"
    )
    put(stage, f"{DOCUMENTS}/copyright", licence + others)


def settle(stage: Path, seconds: int) -> None:
    """Modes and times that depend neither on the umask nor on the hour."""
    for path in (stage, *stage.rglob("*")):
        runs = path.is_dir() or (path.parent.name in ("bin", "DEBIAN") and path.read_bytes()[:2] == b"#!")
        path.chmod(0o755 if runs else 0o644)
        os.utime(path, (seconds, seconds))


def control(stage: Path, architecture: str, python: str, maintained_by: str) -> None:
    """What dpkg is told, after everything else is there."""
    files = sorted(path for path in stage.rglob("*") if path.is_file())
    minor = said(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    major, _, number = minor.partition(".")
    size = sum(-(-path.stat().st_size // 1024) for path in files)
    put(
        stage,
        "DEBIAN/control",
        CONTROL.format(
            version=__version__,
            architecture=architecture,
            maintainer=maintained_by,
            size=size,
            minor=minor,
            next=f"{major}.{int(number) + 1}",
            libc=platform.libc_ver()[1],
        ),
    )
    sums = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(stage)}\n" for path in files]
    put(stage, "DEBIAN/md5sums", "".join(sums))
    configuration = [f"/{path.relative_to(stage)}\n" for path in files if path.is_relative_to(stage / "etc")]
    put(stage, "DEBIAN/conffiles", "".join(configuration))
    for name in MAINTAINER_SCRIPTS:
        put(stage, f"DEBIAN/{name}", (PACKAGING / "debian" / name).read_bytes())


def build(directory: Path, python: str = "/usr/bin/python3", maintained_by: str = MAINTAINER) -> Path:
    """Make the package in ``directory``; return it."""
    seconds = moment()
    os.environ["SOURCE_DATE_EPOCH"] = str(seconds)  # for dpkg-deb and for the dates of the manual pages
    architecture = said("dpkg", "--print-architecture")
    package = directory / f"{PROGRAM}_{__version__}_{architecture}.deb"
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        stage = Path(scratch) / PROGRAM
        install(stage, python)
        lay(stage)
        settle(stage, seconds)
        # What is compiled notes the time of its source, so that a changed source is compiled anew.
        words = ["-m", "compileall", "-q", "--invalidation-mode", "timestamp", "-s", str(stage), "-p", "/"]
        subprocess.run([python, *words, str(stage / LIBRARY)], check=True)
        control(stage, architecture, python, maintained_by)
        settle(stage, seconds)
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "--build", stage, package],
            stdout=subprocess.DEVNULL,
            check=True,
        )
    return package


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--python", default="/usr/bin/python3", help="the Python that will run it")
    with (ROOT / "pyproject.toml").open("rb") as file:
        known = maintainer(tomllib.load(file)["project"])
    parser.add_argument(
        "--maintainer", type=judge_maintainer, default=known, help="NAME <MAIL>: who answers for it"
    )
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    for program in ("dpkg", "dpkg-deb", arguments.python):
        if shutil.which(program) is None:
            sys.exit(f"deb: {program} is needed, and not there")
    print(build(arguments.directory, arguments.python, arguments.maintainer))
