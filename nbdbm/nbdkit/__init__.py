"""nbdkit: images served by nbdkit instead of our own server, through its Python plugin."""
