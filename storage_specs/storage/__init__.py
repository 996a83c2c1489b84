"""Files on any file system, each written completely or not at all; the cache; the lease; JSON documents; the errors."""
