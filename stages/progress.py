"""Progress of long work, always on stderr: a live bar on a terminal, plain lines elsewhere.

Nothing that takes longer than a few seconds is silent: a thread redraws the bar, or prints a line, also while a single
call takes long.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, ParamSpec, TypeVar

from tqdm import tqdm

from nfm.storage_specs.storage.text import shown

FIRST_LINE_SECONDS = 5.0  # until the first line after the one at the start
LINE_SECONDS = 10.0  # between lines after that
REDRAW_SECONDS = 1.0  # between two drawings of a bar that does not advance

P = ParamSpec("P")
T = TypeVar("T")


def is_live_terminal() -> bool:
    """Whether stderr is a terminal on which a bar can be drawn. One of 0 × 0 characters, as some containers have it,
    cannot show a bar: it needs plain lines."""
    if not sys.stderr.isatty():
        return False
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except OSError:
        return False
    return size.columns > 0 and size.lines > 0


def print_line(text: str) -> None:
    """Print a line on stderr, above the bars that are drawn there. A line break inside it is shown as a space."""
    tqdm.write(shown(text), file=sys.stderr)
    sys.stderr.flush()


def format_duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 200 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"


class Progress:
    """Counts `total` units of work, with their rate and the time left:

        with Progress("prepare", 100, "image") as progress:
            for image in images:
                write(image)
                progress.advance(1)

    Without a total it shows the elapsed time, and only of work that takes longer than FIRST_LINE_SECONDS. Work of which
    one unit takes long itself opens a `step` with a count of its own inside. With `enabled=False` it counts and shows
    nothing, as on all ranks but the first.
    """

    def __init__(
        self,
        name: str,
        total: int | None = None,
        unit: str = "",
        done: int = 0,
        enabled: bool = True,
        parent: "Progress | None" = None,
    ) -> None:
        self.name = shown(name)
        self.total = total
        self.unit = unit
        self.done = done
        self.done_before = done
        self.note = ""
        self.enabled = enabled
        self.parent = parent
        self.open_step: Progress | None = None
        self.bar: tqdm[NoReturn] | None = None
        self.is_live = False
        self.started_at = time.monotonic()
        self._draw_lock: threading.Lock = threading.Lock() if parent is None else parent._draw_lock
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def step(self, name: str, total: int | None = None, unit: str = "") -> "Progress":
        """Progress within one unit of this work. It prints no line of its own when it starts and ends: the lines of the
        whole work name it while it lasts, and its bar goes away with it."""
        return Progress(name, total, unit, enabled=self.enabled, parent=self)

    def advance(self, units: int, note: str | None = None) -> None:
        """Count `units` more as done; a `note` replaces the one shown. Any thread may call it."""
        with self._draw_lock:
            self.done += units
            if note is not None:
                self.note = shown(note)
            if self.bar is not None:
                if note is not None:
                    self.bar.set_postfix_str(self.note, refresh=False)
                self.bar.update(units)

    def set_note(self, note: str) -> None:
        """Say what the work is at just now, as in "compiles the network"."""
        self.note = shown(note)
        if self.bar is not None:
            with self._draw_lock:
                self.bar.set_postfix_str(self.note)

    def __enter__(self) -> "Progress":
        self.started_at = time.monotonic()
        if not self.enabled:
            return self
        if self.parent is not None:
            self.is_live = self.parent.is_live
            self.parent.open_step = self
        else:
            self.is_live = is_live_terminal()
        if self.is_live:
            self.bar = self._new_bar()
        elif self.parent is None and self.total is not None:
            self._print_line()
        if self.parent is None:
            self._thread = threading.Thread(target=self._keep_showing, name="nfm-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.parent is not None:
            self.parent.open_step = None
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        if self.bar is not None:
            with self._draw_lock:
                self.bar.close()
        elif self.enabled and self.parent is None and self.total is not None and kind is None:
            self._print_line()

    def _new_bar(self) -> "tqdm[NoReturn]":
        bar_format = None if self.total is not None else "{desc}: {elapsed}{postfix}"
        return tqdm(
            total=self.total,
            initial=self.done,
            desc=self.name,
            unit=f" {self.unit}" if self.unit else "it",
            unit_scale=True,
            bar_format=bar_format,
            leave=self.parent is None and self.total is not None,
            file=sys.stderr,
        )

    def _keep_showing(self) -> None:
        """The thread of the outermost progress: shows where the work is until it ends."""
        interval = REDRAW_SECONDS if self.is_live else FIRST_LINE_SECONDS
        while not self._closed.wait(interval):
            if self.is_live:
                self._redraw()
            else:
                self._innermost()._print_line()
                interval = LINE_SECONDS

    def _innermost(self) -> "Progress":
        progress = self
        while (step := progress.open_step) is not None:
            progress = step
        return progress

    def _redraw(self) -> None:
        with self._draw_lock:
            progress: Progress | None = self
            while progress is not None:
                if progress.bar is not None:
                    progress.bar.refresh()
                progress = progress.open_step

    def _print_line(self) -> None:
        """One line: how far the works around this one are, and this one with rate and time left."""
        parts = [self._line()]
        outer = self.parent
        while outer is not None:
            parts.insert(0, outer._count())
            outer = outer.parent
        print(shown("; ".join(parts)), file=sys.stderr, flush=True)

    def _count(self) -> str:
        """`encode: 3/100 block`, or only the name where there is no total."""
        if self.total is None:
            return self.name
        if self.unit == "B":
            return f"{self.name}: {tqdm.format_sizeof(self.done)}B/{tqdm.format_sizeof(self.total)}B"
        return f"{self.name}: {self.done}/{self.total} {self.unit}"

    def _line(self) -> str:
        elapsed = time.monotonic() - self.started_at
        parts = [self._count()]
        if self.total is None:
            parts.append(f"{format_duration(elapsed)} so far")
        else:
            rate = (self.done - self.done_before) / max(elapsed, 1e-9)
            if self.done >= self.total:
                parts.append(f"done in {format_duration(elapsed)}")
            elif rate == 0:
                parts.append("starting" if elapsed < 1 else f"{format_duration(elapsed)} so far")
            else:
                shown_rate = tqdm.format_sizeof(rate) if self.unit == "B" else f"{rate:.4g} "
                parts.append(f"{shown_rate}{self.unit}/s")
                parts.append(f"{format_duration((self.total - self.done) / rate)} left")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)


def count_calls(function: Callable[P, T], progress: Progress) -> Callable[P, T]:
    """`function`, with one unit of progress after each of its calls."""

    def counted(*args: P.args, **kwargs: P.kwargs) -> T:
        result = function(*args, **kwargs)
        progress.advance(1)
        return result

    return counted
