"""What this machine can hold: what needs more is refused before it is begun."""

import os

from nfm.stages.errors import StageError


def memory_bytes() -> int:
    """The main memory of this machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(needed_bytes: int, what: str, remedy: str) -> None:
    """Raise StageError if `what` needs more bytes than this machine has; `remedy` says what to do."""
    available = memory_bytes()
    if needed_bytes > available:
        raise StageError(
            f"{what}: got about {needed_bytes / 1e9:,.1f} GB of memory to fill, expected at most the "
            f"{available / 1e9:,.1f} GB of this machine; {remedy}"
        )
