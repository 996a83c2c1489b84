"""Which processes listen at which addresses, from /proc."""

import ipaddress
import os
from contextlib import suppress
from pathlib import Path


def list_listeners() -> set[tuple[str, int, int]]:
    """(host, port, pid) of every TCP socket that listens; an IPv4 address that is mapped to IPv6 as IPv4."""
    address_by_inode = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *others = line.split()
            if state == "0A":  # LISTEN
                address_by_inode[others[5]] = _parse_address(local)
    listeners = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    kind, _, inode = os.readlink(descriptor).partition(":[")
                    if kind == "socket" and inode[:-1] in address_by_inode:
                        listeners.add((*address_by_inode[inode[:-1]], int(process.name)))
    return listeners


def _parse_address(text: str) -> tuple[str, int]:
    """Host and port of the kernel's notation: words of 32 bits in the order of the machine, as in 0100007F:1F90."""
    host, port = text.split(":")
    words = bytes.fromhex(host)
    packed = b"".join(words[start : start + 4][::-1] for start in range(0, len(words), 4))
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address), int(port, 16)
