"""What the encode job shows while it runs, and what it says at its end: a live line on a terminal, a plain line now and
then elsewhere, or JSON for machines."""

import json
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import click
from tqdm import tqdm

from nfm.models.tarflow import TarFlowConfig, forward_flops
from nfm.stages.encode import EncodedUnit
from nfm.storage_specs.format.schema import Dataset, Spec

LIVE_SECONDS, LINE_SECONDS = 0.5, 10.0
NOW_SECONDS = 60.0  # over which "now" is counted
Phase = Literal["encode", "check"]


class EncodeProgress:
    """Counts units and images. With `as_json`, each line on stdout is one JSON object."""

    def __init__(self, units: int, images: int, as_json: bool) -> None:
        self.units, self.images, self.as_json = units, images, as_json
        self.done_units = self.done_images = 0
        self.phase: Phase = "encode"
        self.start = time.monotonic()
        self.recent: deque[tuple[float, int]] = deque([(self.start, 0)])
        self.shown = float("-inf")
        self.live = sys.stderr.isatty() and not as_json
        self.bar = tqdm(total=0, bar_format="{desc}", file=sys.stderr, disable=not self.live)

    def close(self) -> None:
        self.bar.close()

    def again(self, units: int, images: int) -> None:
        """More work was found: units whose files were damaged after their commit."""
        self.units, self.images = self.units + units, self.images + images

    def advance(self, images: int) -> None:
        self.done_units += 1
        self.done_images += images
        self.recent.append((time.monotonic(), self.done_images))

    def show(self, workers: int, retries: int, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self.shown < (LIVE_SECONDS if self.live else LINE_SECONDS):
            return
        self.shown = now
        state = self.state(workers, retries)
        if self.as_json:
            print(json.dumps({"event": "progress"} | state), flush=True)
        elif self.live:
            self.bar.set_description_str(_line(state))
        else:
            print(_line(state), file=sys.stderr, flush=True)

    def state(self, workers: int, retries: int) -> dict[str, Any]:
        now = time.monotonic()
        while len(self.recent) > 2 and now - self.recent[1][0] > NOW_SECONDS:
            self.recent.popleft()
        since, images = self.recent[0]
        mean = self.done_images / max(now - self.start, 1e-9)
        return {
            "phase": self.phase,
            "shards": self.done_units,
            "shards_total": self.units,
            "images": self.done_images,
            "images_total": self.images,
            "images_per_second_now": round((self.done_images - images) / max(now - since, 1e-9), 3),
            "images_per_second_mean": round(mean, 3),
            "seconds_left": round((self.images - self.done_images) / mean, 1) if mean else None,
            "workers": workers,
            "retries": retries,
        }


def _line(state: dict[str, Any]) -> str:
    if state["phase"] == "check":
        return f"encode: {state['shards']} shards written, reading them back on {state['workers']} workers"
    left = "starting" if state["seconds_left"] is None else f"{duration(state['seconds_left'])} left"
    return (
        f"encode: {state['shards']}/{state['shards_total']} shards, {state['images_per_second_now']:.4g} images/s now, "
        f"{state['images_per_second_mean']:.4g} mean, {left}, {state['workers']} workers, {state['retries']} retries"
    )


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 200 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"


@dataclass
class Summary:
    """What a run of the job did. Encoded again are units that were in hand when a worker (`lost`) or an earlier driver
    (`left`) died, and those whose files were `damaged` after their commit."""

    dataset: Dataset | None = None
    units_before: int = 0
    units: int = 0
    draws: int = 0
    start_seconds: float = 0.0  # from the first request for workers until one was ready
    seconds: float = 0.0  # of all this run, from the same moment
    worker_seconds: float = 0.0  # that the workers' teachers were at work
    worker_deaths: int = 0
    lost: int = 0
    left: int = 0
    damaged: int = 0

    def add(self, encoded: EncodedUnit, lost: bool, left: bool) -> None:
        if not encoded.draws:
            return  # its commit was there: only the answer had been lost
        self.units += 1
        self.draws += encoded.draws
        self.worker_seconds += encoded.seconds
        self.lost += lost
        self.left += left and not lost

    @property
    def encoded_again(self) -> int:
        return self.lost + self.left + self.damaged


def teacher_config(spec: Spec) -> TarFlowConfig:
    assert spec.coupling is not None
    described = {name: value for name, value in spec.coupling.teacher.architecture.items() if name != "name"}
    return TarFlowConfig(**described | {"depths": tuple(described["depths"])})


def describe(summary: Summary, out: str, student_images: int) -> str:
    """The end of a run, for people."""
    dataset = summary.dataset
    assert dataset is not None
    spec = dataset.spec
    there = (
        f"{out}: {spec.rows} images × {spec.draws} draws in {dataset.totals.files} files, "
        f"{dataset.totals.bytes / 1e6:.1f} MB; {summary.units} shards encoded, {summary.units_before} were there"
    )
    if not summary.units:
        return there
    flops = forward_flops(teacher_config(spec))
    rate, per_worker = summary.draws / summary.seconds, summary.draws / max(summary.worker_seconds, 1e-9)
    return "\n".join(
        [
            there,
            f"{summary.draws} draws in {duration(summary.seconds)}, {rate:.4g} draws/s; the teacher spent "
            f"{summary.draws * flops:.3g} FLOP in {duration(summary.worker_seconds)} of workers, {per_worker:.4g} "
            "draws/s each",
            f"encoded again: {summary.encoded_again} shards ({summary.lost} in hand of {summary.worker_deaths} lost "
            f"workers, {summary.left} of an earlier driver, {summary.damaged} damaged after their commit)",
            f"each student of {student_images} images that trains on it no longer pays {student_images * flops:.3g} "
            f"FLOP, {duration(student_images / per_worker)} of such a worker",
        ]
    )


def as_document(summary: Summary, student_images: int) -> dict[str, Any]:
    """The same for machines."""
    assert summary.dataset is not None
    flops = forward_flops(teacher_config(summary.dataset.spec))
    numbers = {name: value for name, value in asdict(replace(summary, dataset=None)).items() if name != "dataset"}
    return (
        {"event": "summary", "id": summary.dataset.id}
        | numbers
        | {
            "encoded_again": summary.encoded_again,
            "draws_per_second": summary.draws / summary.seconds if summary.seconds else None,
            "teacher_flop": summary.draws * flops,
            "student_images": student_images,
            "student_saves_flop": student_images * flops,
        }
    )


def print_summary(summary: Summary, out: str, student_images: int, as_json: bool) -> None:
    if as_json:
        print(json.dumps(as_document(summary, student_images)), flush=True)
    else:
        click.echo(describe(summary, out, student_images))
