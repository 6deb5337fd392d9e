"""One session of virtnbdbackup's client: the extents of one context, and their data into a file.

Run as a program by the system's Python, with virtnbdbackup on its path:
``python3 virtcopy.py SOCKET EXPORT CONTEXT FILE`` prints [data, offset, length] of each extent as JSON and
writes the bytes of those with data to FILE, one after the other. An empty CONTEXT is what a full backup
gives. Standard library and ``libvirtnbdbackup`` only.
"""

import json
import sys

from libvirtnbdbackup import extenthandler, nbdcli


def main(socket, export, context, file):
    # It sleeps for a second before it connects, for servers that are just starting: ours has started.
    sys.modules["libvirtnbdbackup.nbdcli.client"].sleep = lambda seconds: None
    where = nbdcli.Unix(export, context, socket)
    client = nbdcli.client(where).connect()
    extents = extenthandler.ExtentHandler(client, where).queryBlockStatus()
    with open(file, "wb") as out:
        for extent in extents:
            end = extent.offset + extent.length
            for offset in range(extent.offset, end if extent.data else extent.offset, client.maxRequestSize):
                out.write(client.nbd.pread(min(client.maxRequestSize, end - offset), offset))
    client.disconnect()
    print(json.dumps([[extent.data, extent.offset, extent.length] for extent in extents]))


if __name__ == "__main__":
    main(*sys.argv[1:])
