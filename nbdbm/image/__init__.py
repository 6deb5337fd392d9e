"""The engine: the only package that does file I/O."""
