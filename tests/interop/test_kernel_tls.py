"""Linux' own NBD client with TLS, which a process of nbd-client does for it (see test_kernel.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.test_kernel import GRANULARITY, SIZE, attach, changed_and_dirty, files, judge, kernel
from tests.interop.writing import blank
from tests.support import certificates, guest, servers
from tests.support.marks import requires

__all__ = ["kernel"]

pytestmark = [
    requires("qemu-img", "qemu-io", "qemu-nbd", "libnbd", "newer", "openssl", *guest.KERNELS),
    pytest.mark.slow,
    pytest.mark.timeout(400),
]

SCRIPT = """
cat >/tmp/ca.pem <<'.'
{ca}
.
cat >/tmp/client.pem <<'.'
{certificate}
.
cat >/tmp/client-key.pem <<'.'
{key}
.
if {attach} -H localhost -A /tmp/ca.pem; then echo "let in without a certificate"; exit 1; fi
{attach} -H localhost -A /tmp/ca.pem -certfile /tmp/client.pem -keyfile /tmp/client-key.pem
mkfs.ext4 -q -b 4096 -E nodiscard /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
dd if=/dev/urandom of=/mnt/noise bs=64k count=24 2>/dev/null
seq 1 100000 >/mnt/numbers
sync
fstrim -v /mnt
echo 3 >/proc/sys/vm/drop_caches
cd /mnt
sha256sum noise numbers
cd /
umount /mnt
e2fsck -fn /dev/nbd0
echo "disk $(sha256sum </dev/nbd0)"
/sbin/nbd-client -d /dev/nbd0
"""


def test_a_file_system(kernel: str, tmp_path: Path, pki: certificates.Pki) -> None:
    case = blank(tmp_path, SIZE, ("b", GRANULARITY))
    options = ["--tls-certificates", pki.server, "--tls-verify-peer", "--export-name", "disk"]
    with servers.nbdbm_on_tcp(case.path, tmp_path, *options) as (_, port):
        script = SCRIPT.format(
            attach=attach("/dev/nbd0", port, "-x", "-C", "2"),
            ca=pki.authority.certificate,
            certificate=(pki.client / "client-cert.pem").read_text(),
            key=(pki.client / "client-key.pem").read_text(),
        )
        said = guest.run(kernel, tmp_path, script)
    log = (tmp_path / "server").read_text()
    assert log.count("TLS failure: ") == 1 and "no TLS: peer did not return a certificate" in log
    assert log.count(", CN=backup,O=Example): export 'disk'") == 2, log
    content = judge(case, said, kernel)
    assert set(files(said)) == {"noise", "numbers"}
    assert changed_and_dirty(case, bytes(SIZE), content)["b"]
