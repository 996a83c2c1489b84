"""What the encode job shows while it runs, and its summary at the end.

A live line on a terminal, plain lines elsewhere, or one JSON object per line on stdout for machines. A thread shows
where the job is also while one call takes long, so that nothing is silent for more than a few seconds.
"""

import json
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import click
from tqdm import tqdm

from nfm.models.tarflow import TarFlowConfig, forward_flops
from nfm.stages.encode import EncodedUnit
from nfm.stages.progress import FIRST_LINE_SECONDS, LINE_SECONDS, format_duration, is_live_terminal, print_line
from nfm.storage_specs.format.schema import Dataset, Spec

REDRAW_SECONDS = 0.5  # of the live line
RATE_WINDOW_SECONDS = 60.0  # over which the rate "now" is taken
HISTORY_SECONDS = 0.5  # between two entries of the history that it is taken from
FLOP_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
Phase = Literal["encode", "check"]


class EncodeProgress:
    """Shows the progress of an encode job from its start to its end. Use it inside a `with` block.

    A draw is one pass of the teacher over one image with one noise draw. Draws of units that an earlier run committed
    are no part of any count; draws inside a unit are counted before the unit is committed.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.is_live = is_live_terminal() and not as_json
        self.bar: tqdm[NoReturn] | None = None
        self.phase: Phase = "encode"
        self.units = 0
        self.units_total = 0
        self.draws = 0  # of finished units
        self.draws_in_flight = 0
        self.draws_total = 0
        self.units_checked = 0
        self.units_to_check = 0
        self.num_workers = 0
        self.num_retries = 0
        self.status: str | None = None  # what the job is at, where that is neither encoding nor reading back
        self.status_started_at = 0.0
        self.first_worker_at: float | None = None
        self.history: deque[tuple[float, int]] = deque()  # (time, draws) of the last RATE_WINDOW_SECONDS
        self._last_shown_at = time.monotonic()
        self._first_rate_shown = False
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_showing, name="nfm-progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        if self.bar is not None:
            self.bar.close()

    def set_status(self, status: str, announce: bool = True) -> None:
        """Say what the job is at, such as "starting Ray on this machine".

        It is shown at once, and again every FIRST_LINE_SECONDS until it changes; without `announce`, only if it takes
        that long.
        """
        with self._lock:
            self.status = status
            self.status_started_at = self._last_shown_at = time.monotonic()
            if announce:
                self.show()

    def add_units(self, units: int, draws: int) -> None:
        """Add units of together so many draws to the work: at the start, and where files turn out to be damaged."""
        self.units_total += units
        self.draws_total += draws

    def finish_unit(self, draws: int, encoded: bool) -> None:
        """Count a unit of so many draws as done; `encoded` is False if it had been committed already, as after a lost
        answer. Its draws are then taken out of the work, so that they do not raise the rate."""
        self.units += 1
        if encoded:
            self.draws += draws
        else:
            self.draws_total -= draws

    def start_check(self, units: int) -> None:
        """From now on units are read back, so many of them."""
        self.phase = "check"
        self.units_checked = 0
        self.units_to_check = units
        self.show()

    def update(self, num_workers: int, num_retries: int, draws_in_flight: int) -> None:
        """Take in the state of the workers. The first worker and the first rate are shown at once."""
        now = time.monotonic()
        with self._lock:
            self.num_workers = num_workers
            self.num_retries = num_retries
            self.draws_in_flight = draws_in_flight
            if num_workers and self.first_worker_at is None:
                self.first_worker_at = now
                self.status = None
                self.history.append((now, 0))
                self.show()
            if self.history and now - self.history[-1][0] >= HISTORY_SECONDS:
                self.history.append((now, self.draws + draws_in_flight))
                while len(self.history) > 2 and now - self.history[1][0] > RATE_WINDOW_SECONDS:
                    self.history.popleft()
            if not self._first_rate_shown and self.draws + draws_in_flight:
                self._first_rate_shown = True
                self.show()

    def warn(self, text: str) -> None:
        """Print a line on stderr, above the live line."""
        with self._lock:
            print_line(text)

    def show(self) -> None:
        """Show now where the job is."""
        with self._lock:
            self._last_shown_at = time.monotonic()
            if self.as_json:
                print(json.dumps(self.event()), flush=True)
            elif self.is_live:
                if self.bar is None:
                    self.bar = tqdm(total=0, bar_format="{desc}", file=sys.stderr)
                self.bar.set_description_str(self.line())
            else:
                print(self.line(), file=sys.stderr, flush=True)

    def _keep_showing(self) -> None:
        """The thread: shows where the job is until the end of the `with` block."""
        while not self._closed.wait(REDRAW_SECONDS):
            with self._lock:
                if self.status is not None:
                    is_shown = self.bar is not None and self.time_in_status() >= REDRAW_SECONDS
                    interval = REDRAW_SECONDS if is_shown else FIRST_LINE_SECONDS
                else:
                    interval = REDRAW_SECONDS if self.is_live else LINE_SECONDS
                if time.monotonic() - self._last_shown_at >= interval:
                    self.show()

    def time_in_status(self) -> float:
        """Seconds since the status was set."""
        return time.monotonic() - self.status_started_at

    def event(self) -> dict[str, Any]:
        """What is shown, as a JSON object."""
        if self.status is not None:
            return {"event": "status", "status": self.status, "seconds": round(self.time_in_status(), 1)}
        return {"event": "progress"} | self.state()

    def line(self) -> str:
        """What is shown, as one line of text."""
        if self.status is not None:
            seconds = self.time_in_status()
            elapsed = f", {format_duration(seconds)} so far" if seconds >= 1 else ""
            return f"encode: {self.status}{elapsed}"
        state = self.state()
        workers = "1 worker" if state["workers"] == 1 else f"{state['workers']} workers"
        if self.phase == "check":
            return f"encode: {state['units_checked']}/{state['units_to_check']} units read back, {workers}"
        parts = [f"encode: {state['units']}/{state['units_total']} units"]
        if state["seconds_left"] is not None:
            parts.append(f"{state['draws_per_second_now']:.4g} draws/s now")
            parts.append(f"{state['draws_per_second_mean']:.4g} mean")
            parts.append(f"{format_duration(state['seconds_left'])} left")
        parts.append(workers)
        parts.append(f"{state['retries']} retries")
        return ", ".join(parts)

    def state(self) -> dict[str, Any]:
        """The counts and rates of the job. Rates start with the first worker; seconds_left is None before a draw is
        finished."""
        now = time.monotonic()
        draws = min(self.draws + self.draws_in_flight, self.draws_total)
        rate_now = rate_mean = 0.0
        if self.history and self.first_worker_at is not None:
            window_start, draws_before = self.history[0]
            rate_now = max(draws - draws_before, 0) / max(now - window_start, 1e-9)
            rate_mean = draws / max(now - self.first_worker_at, 1e-9)
        return {
            "phase": self.phase,
            "units": self.units,
            "units_total": self.units_total,
            "draws": draws,
            "draws_total": self.draws_total,
            "draws_per_second_now": round(rate_now, 3),
            "draws_per_second_mean": round(rate_mean, 3),
            "seconds_left": round((self.draws_total - draws) / rate_mean, 1) if rate_mean else None,
            "units_checked": self.units_checked,
            "units_to_check": self.units_to_check,
            "workers": self.num_workers,
            "retries": self.num_retries,
        }


def format_flop(flop: float) -> str:
    """`1.92 TFLOP`, with the prefix that reads best."""
    for scale, prefix in FLOP_PREFIXES:
        if flop >= scale:
            return f"{flop / scale:.3g} {prefix}FLOP"
    return f"{flop:.3g} FLOP"


@dataclass
class Summary:
    """What a run of the job did.

    Repeated units are those that were in flight when a worker or an earlier driver died, and those whose files were
    damaged after their commit.
    """

    dataset: Dataset | None = None
    units_before: int = 0  # committed by earlier runs
    units: int = 0  # encoded by this run
    draws: int = 0  # teacher forwards, one per image and draw
    start_seconds: float = 0.0  # from the first request for workers until one was ready
    seconds: float = 0.0  # of all this run, from the same moment
    worker_seconds: float = 0.0  # in which the workers' teachers computed
    worker_deaths: int = 0
    units_of_dead_workers: int = 0
    units_of_earlier_driver: int = 0
    units_damaged: int = 0

    def add_unit(self, encoded: EncodedUnit, worker_died: bool, earlier_driver: bool) -> None:
        """Count a unit. One that had been committed already, of which only the answer was lost, adds nothing."""
        if not encoded.draws:
            return
        self.units += 1
        self.draws += encoded.draws
        self.worker_seconds += encoded.seconds
        if worker_died:
            self.units_of_dead_workers += 1
        elif earlier_driver:
            self.units_of_earlier_driver += 1

    @property
    def units_repeated(self) -> int:
        return self.units_of_dead_workers + self.units_of_earlier_driver + self.units_damaged


def teacher_config(spec: Spec) -> TarFlowConfig:
    """The shapes of the teacher that a coupling store was made with."""
    assert spec.coupling is not None
    architecture = dict(spec.coupling.teacher.architecture)
    del architecture["name"]
    architecture["depths"] = tuple(architecture["depths"])
    return TarFlowConfig(**architecture)


def describe(summary: Summary, out: str, student_images: int) -> str:
    """The end of a run, for people. `student_images` is how many images one student sees in training."""
    dataset = summary.dataset
    assert dataset is not None
    spec = dataset.spec
    lines = [
        f"{out}: {spec.rows} images × {spec.draws} draws in {dataset.totals.files} files, "
        f"{dataset.totals.bytes / 1e6:.1f} MB; {summary.units} units encoded, {summary.units_before} before this run"
    ]
    if not summary.units:
        return lines[0]
    flops = forward_flops(teacher_config(spec))
    rate = summary.draws / summary.seconds
    rate_per_worker = summary.draws / max(summary.worker_seconds, 1e-9)
    lines.append(
        f"{summary.draws} draws in {format_duration(summary.seconds)}, {rate:.4g} draws/s; the teacher spent "
        f"{format_flop(summary.draws * flops)} in {format_duration(summary.worker_seconds)} of workers, "
        f"{rate_per_worker:.4g} draws/s each"
    )
    lines.append(
        f"units encoded again: {summary.units_repeated} ({summary.units_of_dead_workers} of {summary.worker_deaths} "
        f"workers that died, {summary.units_of_earlier_driver} of an earlier driver, {summary.units_damaged} damaged "
        "after their commit)"
    )
    lines.append(
        f"each student of {student_images} images that trains on this store saves {format_flop(student_images * flops)}"
        f" of the teacher, {format_duration(student_images / rate_per_worker)} of such a worker"
    )
    return "\n".join(lines)


def as_document(summary: Summary, student_images: int) -> dict[str, Any]:
    """The end of a run, for machines: the fields of `Summary` without the data set, and what follows from them."""
    assert summary.dataset is not None
    flops = forward_flops(teacher_config(summary.dataset.spec))
    document: dict[str, Any] = {"event": "summary", "id": summary.dataset.id}
    document.update((name, value) for name, value in vars(summary).items() if name != "dataset")
    document["units_repeated"] = summary.units_repeated
    document["draws_per_second"] = summary.draws / summary.seconds if summary.seconds else None
    document["teacher_flop"] = summary.draws * flops
    document["student_images"] = student_images
    document["student_saves_flop"] = student_images * flops
    return document


def print_summary(summary: Summary, out: str, student_images: int, as_json: bool) -> None:
    """Print the end of a run on stdout."""
    if as_json:
        print(json.dumps(as_document(summary, student_images)), flush=True)
    else:
        click.echo(describe(summary, out, student_images))
