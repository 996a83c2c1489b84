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

from tqdm import tqdm

from nfm.models.tarflow import TarFlowConfig, forward_flops
from nfm.pipeline.output import echo
from nfm.stages.encode import EncodedUnit
from nfm.stages.progress import FIRST_LINE_SECONDS, LINE_SECONDS, format_duration, is_live_terminal, print_line
from nfm.storage_specs.format.schema import Dataset, Spec
from nfm.storage_specs.storage.text import shown

REDRAW_SECONDS = 0.5  # of the live line
RATE_WINDOW_SECONDS = 60.0  # over which the rate "now" is taken
HISTORY_INTERVAL_SECONDS = 0.5  # between two entries of the history that it is taken from
FLOP_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
Phase = Literal["encode", "check"]


class EncodeProgress:
    """Shows the progress of an encode job from its start to its end. Use it inside a `with` block.

    A pair is one image with one noise draw: one forward pass of the teacher. Pairs of units that an earlier run
    committed are not counted; those of a unit are counted while it is being encoded, before it is committed.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.is_live = is_live_terminal() and not as_json
        self.bar: tqdm[NoReturn] | None = None
        self.phase: Phase = "encode"
        self.units_done = 0
        self.units_total = 0
        self.pairs_done = 0  # of finished units
        self.pairs_in_flight = 0
        self.pairs_total = 0
        self.units_checked = 0
        self.units_to_check = 0
        self.num_workers = 0
        self.num_retries = 0
        self.status: str | None = None  # what the job is at, where that is neither encoding nor reading back
        self.status_started_at = 0.0
        self.first_worker_at: float | None = None
        self.history: deque[tuple[float, int]] = deque()  # (time, pairs done) of the last RATE_WINDOW_SECONDS
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

        It is shown at once, and again every FIRST_LINE_SECONDS until it changes; without `announce`, it is not shown at
        once. Where a live line exists already, that line follows every REDRAW_SECONDS, with `announce` or without.
        """
        with self._lock:
            self.status = shown(status)
            self.status_started_at = self._last_shown_at = time.monotonic()
            if announce:
                self.show()

    def add_units(self, units: int, pairs: int) -> None:
        """Add to the work a number of units, which have `pairs` pairs in all.

        It is called at the start, and for units that turn out to be damaged.
        """
        self.units_total += units
        self.pairs_total += pairs

    def finish_unit(self, pairs: int, was_encoded: bool) -> None:
        """Count one unit with `pairs` pairs as done.

        `was_encoded` is False if the unit had been committed before and only the worker's answer was lost. Its pairs
        are then taken out of the work, so that they do not raise the rate.
        """
        self.units_done += 1
        if was_encoded:
            self.pairs_done += pairs
        else:
            self.pairs_total -= pairs

    def start_check(self, units: int) -> None:
        """Begin the phase in which `units` units are read back."""
        self.phase = "check"
        self.units_checked = 0
        self.units_to_check = units
        self.show()

    def update(self, num_workers: int, num_retries: int, pairs_in_flight: int) -> None:
        """Take in the state of the workers. The first worker and the first rate are shown at once."""
        now = time.monotonic()
        with self._lock:
            self.num_workers = num_workers
            self.num_retries = num_retries
            self.pairs_in_flight = pairs_in_flight
            if num_workers and self.first_worker_at is None:
                self.first_worker_at = now
                self.status = None
                self.history.append((now, 0))
                self.show()
            if self.history and now - self.history[-1][0] >= HISTORY_INTERVAL_SECONDS:
                self.history.append((now, self.pairs_done + pairs_in_flight))
                while len(self.history) > 2 and now - self.history[1][0] > RATE_WINDOW_SECONDS:
                    self.history.popleft()
            if not self._first_rate_shown and self.pairs_done + pairs_in_flight:
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
                print_line(self.line())

    def _keep_showing(self) -> None:
        """The thread: shows where the job is until the end of the `with` block."""
        while not self._closed.wait(REDRAW_SECONDS):
            with self._lock:
                if self.status is not None:
                    has_live_line = self.bar is not None and self.time_in_status() >= REDRAW_SECONDS
                    interval = REDRAW_SECONDS if has_live_line else FIRST_LINE_SECONDS
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
        parts = [f"encode: {state['units_done']}/{state['units_total']} units"]
        if state["seconds_left"] is not None:
            parts.append(f"{state['pairs_per_second_now']:.4g} pairs/s now")
            parts.append(f"{state['pairs_per_second_mean']:.4g} mean")
            parts.append(f"{format_duration(state['seconds_left'])} left")
        parts.append(workers)
        parts.append(f"{state['retries']} retries")
        return ", ".join(parts)

    def state(self) -> dict[str, Any]:
        """The counts and rates of the job. Rates start with the first worker; seconds_left is None before a pair is
        encoded."""
        now = time.monotonic()
        pairs_done = min(self.pairs_done + self.pairs_in_flight, self.pairs_total)
        rate_now = 0.0
        rate_mean = 0.0
        if self.history and self.first_worker_at is not None:
            window_start, pairs_before = self.history[0]
            rate_now = max(pairs_done - pairs_before, 0) / max(now - window_start, 1e-9)
            rate_mean = pairs_done / max(now - self.first_worker_at, 1e-9)
        return {
            "phase": self.phase,
            "units_done": self.units_done,
            "units_total": self.units_total,
            "pairs_done": pairs_done,
            "pairs_total": self.pairs_total,
            "pairs_per_second_now": round(rate_now, 3),
            "pairs_per_second_mean": round(rate_mean, 3),
            "seconds_left": round((self.pairs_total - pairs_done) / rate_mean, 1) if rate_mean else None,
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
    units_encoded: int = 0  # by this run
    pairs_encoded: int = 0  # of an image and a draw, each one teacher forward
    start_seconds: float = 0.0  # from the first request for workers until one was ready
    seconds: float = 0.0  # of all this run, from the same moment
    worker_seconds: float = 0.0  # in which the workers' teachers computed
    worker_deaths: int = 0
    units_of_dead_workers: int = 0
    units_of_earlier_driver: int = 0
    units_damaged: int = 0

    def add_unit(self, encoded: EncodedUnit, worker_died: bool, earlier_driver: bool) -> None:
        """Count a unit. One that had been committed already, of which only the answer was lost, adds nothing."""
        if not encoded.pairs:
            return
        self.units_encoded += 1
        self.pairs_encoded += encoded.pairs
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
    architecture = dict(spec.nfm.teacher.architecture)
    del architecture["name"]
    architecture["depths"] = tuple(architecture["depths"])
    return TarFlowConfig(**architecture)


def describe(summary: Summary, out: str, student_images: int) -> list[str]:
    """The end of a run, in lines for people. `student_images` is how many images one student sees in training."""
    dataset = summary.dataset
    assert dataset is not None
    spec = dataset.spec
    lines = [
        f"{out}: {spec.rows} images × {spec.num_draws} draws in {dataset.totals.files} files, "
        f"{dataset.totals.bytes / 1e6:.1f} MB; "
        f"{summary.units_encoded} units encoded, {summary.units_before} before this run"
    ]
    if not summary.units_encoded:
        return lines
    flops = forward_flops(teacher_config(spec))
    rate = summary.pairs_encoded / summary.seconds
    rate_per_worker = summary.pairs_encoded / max(summary.worker_seconds, 1e-9)
    lines.append(
        f"{summary.pairs_encoded} pairs in {format_duration(summary.seconds)}, {rate:.4g} pairs/s; "
        f"the teacher spent {format_flop(summary.pairs_encoded * flops)} "
        f"in {format_duration(summary.worker_seconds)} of workers, {rate_per_worker:.4g} pairs/s each"
    )
    dead_workers = "1 dead worker" if summary.worker_deaths == 1 else f"{summary.worker_deaths} dead workers"
    lines.append(
        f"units encoded again: {summary.units_repeated} ({summary.units_of_dead_workers} from {dead_workers}, "
        f"{summary.units_of_earlier_driver} from an earlier driver, {summary.units_damaged} damaged after their commit)"
    )
    lines.append(
        f"each student of {student_images} images that trains on this store "
        f"saves {format_flop(student_images * flops)} of teacher work, "
        f"{format_duration(student_images / rate_per_worker)} of one worker's time"
    )
    return lines


def as_document(summary: Summary, student_images: int) -> dict[str, Any]:
    """The end of a run, for machines: the fields of `Summary` without the data set, and what follows from them."""
    assert summary.dataset is not None
    flops = forward_flops(teacher_config(summary.dataset.spec))
    document: dict[str, Any] = {"event": "summary", "id": summary.dataset.id}
    document.update((name, value) for name, value in vars(summary).items() if name != "dataset")
    document["units_repeated"] = summary.units_repeated
    document["pairs_per_second"] = summary.pairs_encoded / summary.seconds if summary.seconds else None
    document["teacher_flop"] = summary.pairs_encoded * flops
    document["student_images"] = student_images
    document["student_saves_flop"] = student_images * flops
    return document


def print_summary(summary: Summary, out: str, student_images: int, as_json: bool) -> None:
    """Print the end of a run on stdout."""
    if as_json:
        print(json.dumps(as_document(summary, student_images)), flush=True)
    else:
        echo(*describe(summary, out, student_images))
