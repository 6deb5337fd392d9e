"""nbdbm: an NBD server for incremental backup of qcow2 images."""

__version__ = "0.1.0"
