"""Waiting for a condition. The deadline only ends what hangs: on a busy machine everything is slow, and no test fails
for that."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 900.0  # seconds for anything to happen; an idle machine needs a few


def wait_for(condition: Callable[[], T], what: str) -> T:
    """Call `condition` until it returns something true, and return that. Raises TimeoutError after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE:.0f} s for {what}")
        time.sleep(0.005)
    return result
