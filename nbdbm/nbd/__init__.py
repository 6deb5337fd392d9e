"""The wire: the NBD protocol as pure state machines. No sockets, no files, no clock."""
