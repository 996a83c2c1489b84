"""Where a case of the fuzzer runs its commands: what they print, how they end, and what they touch is watched."""

import io
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

from nfm.pipeline.cli import main
from nfm.stages.errors import StageError
from nfm.storage_specs.storage.errors import StoreError
from tests.tools.fuzz_cases import Case
from tests.tools.fuzz_content import Finding
from tests.tools.fuzz_files import SECRET, differences, files_with_secret, snapshot, write_files, write_outside

REFUSALS = (StoreError, StageError, FloatingPointError)  # what Python callers get where the command prints one line
UNPRINTABLE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
PYTHON_WARNING = re.compile(r"^.*\.py:\d+: \w*Warning: .*$", re.MULTILINE)


class Workplace:
    """The folder of a case, in which commands run. Raises Finding for what none may do."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.subject, self.folder = case, case.subject, folder
        self.rng = Random(f"commands of {case.seed}")
        self.outside, self.store = folder / "outside", folder / "store"
        self.made: set[str] = {"outside"}
        folder.mkdir()
        write_outside(self.outside, self.subject.files)
        self._write("store")

    def _write(self, name: str) -> str:
        """Write the changed folder once more, for a command that changes it."""
        write_files(self.case.files, self.folder / name, self.outside)
        self.made.add(name)
        return str(self.folder / name)

    def out(self, name: str) -> str:
        """A path for what a command writes."""
        self.made.add(name)
        return str(self.folder / name)

    @contextmanager
    def watched(self, what: str, *unchanged: str) -> Iterator[None]:
        """Nothing outside is changed, nor what a command only reads, and nothing new appears beside it."""
        roots = [self.outside, *map(Path, unchanged)]
        before = [snapshot(root) for root in roots]
        yield
        for root, old in zip(roots, before, strict=True):
            if changed := differences(old, snapshot(root)):
                raise Finding(f"{what} changed {root.name}: {changed[:5]}")
        if strangers := {path.name for path in self.folder.iterdir()} - self.made - {"cache"}:
            raise Finding(f"{what} wrote beside: {sorted(strangers)[:5]}")

    def search_for_secret(self) -> None:
        """Raise Finding if the secret outside was copied to any place."""
        for name in self.made - {"outside"}:
            if leaked := files_with_secret(self.folder / name):
                raise Finding(f"the secret outside was copied into {name}: {leaked[:5]}")

    def call(self, what: str, function: Callable[[], Any], *unchanged: str) -> Any:
        """What a function of Python gives; None if it refuses. Every other exception is a finding."""
        with self.watched(what, *unchanged):
            try:
                return function()
            except Finding:
                raise
            except REFUSALS as error:
                check_text(what, str(error), is_raw=True)
                return None
            except OSError as error:
                if error.filename is None:  # else the command prints the path in its line
                    raise Finding(f"{what}: {describe(error)}") from error
                return None
            except BaseException as error:
                raise Finding(f"{what}: {describe(error)}") from error

    def succeeds(self, what: str, function: Callable[[], object], *unchanged: str) -> bool:
        """Whether a function of Python does what it is for; False if it refuses."""

        def run() -> bool:
            function()
            return True

        return self.call(what, run, *unchanged) is not None

    def command(self, *arguments: str, unchanged: tuple[str, ...] = ()) -> tuple[bool, str]:
        """Run `nfm`. Returns whether it succeeded, and what it printed."""
        what = "nfm " + " ".join(argument for argument in arguments if not argument.startswith(str(self.folder)))[:60]
        out, err, before = io.StringIO(), io.StringIO(), sys.argv
        code: Any = 0
        with self.watched(what, *unchanged), redirect_stdout(out), redirect_stderr(err):
            sys.argv = ["nfm", *arguments]
            try:
                main()
            except SystemExit as error:
                code = error.code
            except BaseException as error:
                raise Finding(f"{what}: {describe(error)}") from error
            finally:
                sys.argv = before
        text = out.getvalue() + err.getvalue()
        check_text(what, text)
        if code not in (0, None):
            lines = err.getvalue().rstrip("\n").split("\n")
            if code not in (1, 2) or not lines[-1].startswith("error: " if code == 2 else "failed: "):
                raise Finding(f"{what}: ended with {code} and {lines[-1]!r:.200}")
            if sum(line.startswith(("error: ", "failed: ", "Traceback")) for line in lines) != 1:
                raise Finding(f"{what}: more than one line of error: {lines!r:.300}")
        return code in (0, None), text


def check_text(what: str, text: str, is_raw: bool = False) -> None:
    """What reaches a person has no control characters, no secret, and no warning of Python. The text of an exception is
    escaped when it is printed, and may have them."""
    if SECRET.decode() in text:
        raise Finding(f"{what} printed the secret")
    if is_raw:
        return
    if match := UNPRINTABLE.search(text):
        raise Finding(f"{what} printed {match[0]!r} in {text[max(0, match.start() - 60) : match.end() + 20]!r}")
    if match := PYTHON_WARNING.search(text):
        raise Finding(f"{what} printed a warning of Python: {match[0][-200:]}")


def describe(error: BaseException) -> str:
    """An unexpected exception: its type, its text, and where the product raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename]
    own = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in own[::-1][:3])
    return f"{type(error).__name__}: {str(error)[:200]!r} at {places}"
