"""How files are kept: on any file system, whole or not at all, in a cache, under one driver; and what goes wrong."""
