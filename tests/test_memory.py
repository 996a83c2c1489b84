"""Nothing is read or allocated on the word of a file: hostile files end in one line, soon, in little memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from nfm.storage_specs.reading.store import Store
from tests.tools.memory import run_watched

SECONDS = 10.0


class Hostile(NamedTuple):
    """A hostile file and what reads it. `make` writes it into an empty folder and returns the arguments of `read`,
    a function of a module, which must raise an error that matches `message`."""

    name: str
    make: Callable[[Path], tuple[Any, ...]]
    read: Callable[..., object]
    message: str


def open_store(url: str) -> None:
    Store(url)


HOSTILE = [Hostile("placeholder", lambda folder: (str(folder),), open_store, "no dataset.json")]


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_a_hostile_file_is_refused_in_one_line_and_little_memory(hostile: Hostile, tmp_path: Path) -> None:
    outcome = run_watched(hostile.read, *hostile.make(tmp_path), timeout=SECONDS)
    assert outcome.is_value_error, outcome
    assert "\n" not in outcome.message
    with pytest.raises(ValueError, match=hostile.message):
        raise ValueError(outcome.message)


def allocate(num_bytes: int) -> None:
    np.ones(num_bytes, np.uint8)
    raise ValueError("allocated")


def test_the_watch_sees_what_a_process_allocates() -> None:
    assert run_watched(allocate, 100 << 20, timeout=SECONDS).grown_bytes > 90 << 20
    assert run_watched(allocate, 100 << 20, timeout=SECONDS, max_bytes=50 << 20).error == "killed"
