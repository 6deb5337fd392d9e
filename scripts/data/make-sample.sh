#!/bin/bash
# Make sample.qcow2.gz and sample.json, the disk that `make demo` serves. Run by hand, seldom; needs
# qemu-img, qemu-io, mke2fs, debugfs, python3. The result is kept so that the demo itself needs none.
#
# The story: a 32 MiB disk with an ext2 filesystem. A power failure once spoiled the bitmap "sunday"
# (qemu-io killed while it recorded). "archive" was made and disabled at once: empty. "monday" records;
# after it was made, the guest changed some files: those blocks are dirty.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export E2FSPROGS_FAKE_TIME=1700000000 TZ=UTC

mkdir -p files/log files/www
printf 'sample\n' > files/hostname
for day in 1 2 3; do
    awk -v d=$day 'BEGIN { for (i = 0; i < 3000; i++)
        printf "day %d %02d:%02d request %d served in %d ms\n", d, i/60%24, i%60, i, i*d%7 }' \
        > files/log/access.$day
done
for page in 1 2 3 4; do
    awk -v p=$page 'BEGIN { print "<h1>Page " p "</h1>"; for (i = 0; i < 2000; i++) print "<p>Paragraph " i " of page " p "</p>" }' \
        > files/www/page$page.html
done
mke2fs -q -t ext2 -b 4096 -I 128 -N 64 -U 6e626462-6d00-4000-8000-000000000001 -E root_owner=0:0 -d files sunday.raw 32M > mke2fs.log 2>&1

# Monday's changes, made by the guest on its filesystem.
cp sunday.raw monday.raw
awk 'BEGIN { for (i = 0; i < 3000; i++) printf "day 6 request %d served in %d ms\n", i, i%7 }' > access.6
printf '<h1>News</h1>\n' > news.html
debugfs -w -R 'write access.6 log/access.6' monday.raw > debugfs.log 2>&1
debugfs -w -R 'write news.html www/news.html' monday.raw > debugfs.log 2>&1
debugfs -w -R 'rm www/page3.html' monday.raw > debugfs.log 2>&1

qemu-img convert -f raw -O qcow2 sunday.raw sample.qcow2
qemu-img bitmap --add sample.qcow2 sunday
coproc QEMU { exec qemu-io -f qcow2 sample.qcow2; }
killed=$QEMU_PID
echo 'read 0 512' >&"${QEMU[1]}"
until qemu-img info -U --output=json sample.qcow2 2> info.log | grep -q in-use; do sleep 0.1; done
kill -9 "$killed"
wait "$killed" 2> /dev/null || true

qemu-img bitmap --add --disable sample.qcow2 archive
qemu-img bitmap --add -g 16384 sample.qcow2 monday
python3 - sunday.raw monday.raw > changes <<'PY'
import sys
old, new = (open(name, "rb").read() for name in sys.argv[1:])
for at in range(0, len(old), 4096):
    if old[at : at + 4096] != new[at : at + 4096]:
        open(f"block{at}", "wb").write(new[at : at + 4096])
        print(f"write -s block{at} {at} 4096")
PY
qemu-io -f qcow2 sample.qcow2 < changes > /dev/null
qemu-img compare -f raw -F qcow2 monday.raw sample.qcow2 > /dev/null
qemu-img check -q sample.qcow2

qemu-nbd -f qcow2 -r -B monday -k "$work/socket" -t sample.qcow2 &
server=$!
while [ ! -S "$work/socket" ]; do sleep 0.1; done
nbdinfo --json --map=qemu:dirty-bitmap:monday "nbd+unix:///?socket=$work/socket" > monday.map
kill "$server"
python3 - monday.raw monday.map > "$here/sample.json" <<'PY'
import hashlib, json, sys
disk = open(sys.argv[1], "rb").read()
dirty = [[e["offset"], e["length"]] for e in json.load(open(sys.argv[2])) if e["type"] & 1]
print(json.dumps({"size": len(disk), "sha256": hashlib.sha256(disk).hexdigest(), "dirty": {"archive": [], "monday": dirty},
                  "refused": ["sunday"]}, indent=2))
PY
gzip -9nc sample.qcow2 > "$here/sample.qcow2.gz"
