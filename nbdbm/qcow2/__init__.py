"""The disk: qcow2 structures as pure values. Bytes in, values out; no files."""
