"""Stores, checkpoints and caches that were changed at random (tests/tools/fuzz.py): no command hangs, ends in a
traceback, accepts wrong data, or touches a file outside. And the fuzzer finds what it is for."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nfm.storage_specs.format.layouts import Columns
from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.reading import verify
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import Fault
from tests.tools.fuzz import describe, fuzz
from tests.tools.fuzz_cases import Case
from tests.tools.fuzz_files import SECRET
from tests.tools.fuzz_subjects import Subjects
from tests.tools.fuzz_trial import run_trial
from tests.tools.stores import flip

QUICK, ALL = range(40), range(1000, 1300)
NAME, Z = "1.1 webdataset float16-stored", "z/k001/000001.tar"
VALUE_OF_Z = 512 + 128  # where its values begin in a tar
Patch = Callable[[pytest.MonkeyPatch], None]


def assert_nothing_found(seeds: range) -> None:
    ends = fuzz(seeds)
    assert [end["seed"] for end in ends] == list(seeds)
    found = [describe(end) for end in ends if end["finding"]]
    assert not found, "\n".join(found)


def test_few_cases() -> None:
    assert_nothing_found(QUICK)


@pytest.mark.long
def test_many_cases() -> None:
    assert_nothing_found(ALL)


@pytest.mark.long
def test_a_case_that_takes_too_long_is_found_and_the_next_one_runs() -> None:
    ends = fuzz(range(2), seconds=0.01)
    assert [end["seed"] for end in ends] == [0, 1]
    assert all("took more than 0.01 s" in end["finding"] for end in ends)
    assert "make fuzz SEED=1 N=1" in describe(ends[1])


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    return Subjects(tmp_path_factory.mktemp("subjects"))


def without_hashes(patch: pytest.MonkeyPatch) -> None:
    parse = Store.parse_columns

    def parse_unchecked(self: Store, key: FileKey, data: NDArray[np.uint8], sha256_checked: bool) -> Columns:
        return parse(self, key, data, sha256_checked=True)

    patch.setattr(Store, "parse_columns", parse_unchecked)


def patched_verify(do: Callable[[Store], object]) -> Patch:
    """A `verify` that finds nothing, and does something else."""

    def find_faults(store: Store, progress: Callable[[int], None]) -> Iterator[Fault]:
        do(store)
        return iter(())

    return lambda patch: patch.setattr(verify, "find_faults", find_faults)


def beside(store: Store, path: str) -> Path:
    return Path(store.url).parent / path


def fail(_store: Store) -> None:
    raise KeyError("no key")


CARELESS: dict[str, tuple[Patch, str]] = {
    "no hash is compared": (without_hashes, "Store gave z1 of id .*: other values"),
    "verify is blind": (
        patched_verify(lambda store: None),
        "verify called a store sound that is refused: .*its sha256",
    ),
    "a traceback": (patched_verify(fail), "nfm store verify: KeyError: .*no key"),
    "a secret": (patched_verify(lambda store: print(SECRET.decode())), "nfm store verify printed the secret"),
    "an escape": (patched_verify(lambda store: print("\x1b[31m")), r"nfm store verify printed '\\x1b'"),
    "a file outside": (
        patched_verify(lambda store: beside(store, "outside/new").touch()),
        "verify changed outside: .*new",
    ),
    "a file beside": (patched_verify(lambda store: beside(store, "new").touch()), "verify wrote beside: .*new"),
    "a changed store": (
        patched_verify(lambda store: beside(store, "store/README.md").unlink()),
        "changed store: .*READ",
    ),
}


def changed_case(subjects: Subjects) -> Case:
    """A store with one bit of z changed."""
    subject = subjects(NAME)
    sound = subject.files[Z]
    assert isinstance(sound, bytes)
    return Case(0, NAME, subject, subject.files | {Z: flip(VALUE_OF_Z)(sound)})


def test_it_finds_nothing_in_our_code(subjects: Subjects, tmp_path: Path) -> None:
    assert run_trial(changed_case(subjects), tmp_path / "trial") == ""


@pytest.mark.parametrize("careless", CARELESS)
def test_it_finds_what_it_is_for(
    subjects: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, careless: str
) -> None:
    patch, expected = CARELESS[careless]
    patch(monkeypatch)
    assert re.search(expected, run_trial(changed_case(subjects), tmp_path / "trial"))
