"""The shell: sockets around the wire and the exports."""
