"""nbdkit with nbdbm inside."""
