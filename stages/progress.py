"""Progress of long work: a live bar on a terminal, a plain line now and then elsewhere. Always on stderr."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 10.0


class Progress:
    """Counts `total` units of work with rate and time left: `with Progress("encode", 100, "block") as progress`."""

    def __init__(self, name: str, total: int, unit: str, done: int = 0) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self.first = done
        self.start = self.last_line = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=name, unit=unit, unit_scale=True, disable=not self.terminal)
        if not self.terminal:
            self._line("")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self, units: int, note: str = "") -> None:
        self.done += units
        if self.terminal:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(units)
        elif time.monotonic() - self.last_line > LINE_SECONDS or self.done >= self.total:
            self._line(note)

    def _line(self, note: str) -> None:
        self.last_line = time.monotonic()
        rate = (self.done - self.first) / max(self.last_line - self.start, 1e-9)
        eta = f"{(self.total - self.done) / rate:.0f} s left" if rate else "starting"
        parts = [f"{self.name}: {self.done}/{self.total} {self.unit}", f"{rate:.4g} {self.unit}/s", eta]
        print(", ".join(parts + [note] * bool(note)), file=sys.stderr, flush=True)
