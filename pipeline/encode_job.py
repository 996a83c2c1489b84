"""The encode job: the units of a coupling store, spread over the workers of a Ray cluster.

A worker is an actor that holds the teacher, reads and writes its own units, and returns only a few numbers: no image
crosses Ray's object store. The driver holds no state but what is in the output: kill it, and the same command encodes
only the units that have no commit record. Before it calls a store complete, all of it was read back.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from nfm.models.tarflow import forward_flops
from nfm.pipeline.config import StorageConfig
from nfm.pipeline.encode_report import EncodeProgress, Summary, teacher_config
from nfm.pipeline.pool import Pool, ray_session
from nfm.stages.encode import EncodeConfig, EncodedUnit, Speed, UnitEncoder, output_spec
from nfm.stages.errors import ResumableError, StageError
from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.manifest import expected_keys
from nfm.storage_specs.format.names import LEASE_FILE
from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.lease import Lease
from nfm.storage_specs.writing.units import Unit, list_committed_units, list_missing_units
from nfm.storage_specs.writing.writer import StoreWriter

GRACE_SECONDS = 20.0  # for what is in hand at a notice of preemption, of the 30 that a cluster gives at least
CHECKS = 3  # of the whole store, before its storage is held to lose what is written
BAD_LISTED = 20
TRIAL_SECONDS = 5.0  # of the teacher on one worker, for an estimate
CLUSTERS = (1, 8, 64)  # workers that an estimate speaks of


class PreemptedError(ResumableError):
    """This process was told to end (SIGTERM)."""


class Worker:
    """The actor. Its encoder is made in `ready`, so that what is wrong with it reaches the driver as an error."""

    def __init__(self, threads: int, storage: StorageConfig, **arguments: Any) -> None:
        import torch

        storage.apply()
        torch.set_num_threads(threads)
        self.arguments = arguments | {"threads": threads}
        self.encoder: UnitEncoder

    def ready(self) -> None:
        self.encoder = UnitEncoder(**self.arguments)

    def encode(self, unit: Unit) -> EncodedUnit:
        return self.encoder.encode(unit)

    def faults(self, unit: Unit) -> list[str]:
        return self.encoder.faults(unit)

    def speed(self, seconds: float) -> Speed:
        return self.encoder.speed(seconds)


def encode_couplings(
    config: EncodeConfig,
    samples: str,
    teacher: str,
    out: str,
    storage: StorageConfig | None = None,
    as_json: bool = False,
) -> Summary:
    """Encode `samples` (a sample store) with `teacher` into `out`, continuing what is there, or adding draws to it.

    Raises StoreError where `out` holds another store or another driver works on it, FloatingPointError where z is not
    finite, PreemptedError after SIGTERM, and ClusterLostError.
    """
    with _preemption() as notice:
        spec, z_scale = output_spec(config, Store(samples, kind="samples"), teacher, out)
        writer = StoreWriter(out, spec)
        if writer.is_complete():
            return Summary(Store(out).dataset, units_before=len(list_committed_units(writer.root)))
        with Lease(_absolute(out), LEASE_FILE) as lease:
            writer.initialize(z_scale)
            with ray_session(), _pool(config, samples, teacher, out, spec, storage) as pool:
                return _Job(config, writer, lease, pool, notice, as_json).run()


def _pool(
    config: EncodeConfig, samples: str, teacher: str, out: str, spec: Spec, storage: StorageConfig | None
) -> Pool:
    import ray

    arguments = {
        "samples": _absolute(samples),
        "teacher": _absolute(teacher),
        "out": _absolute(out),
        "spec": spec.model_dump(mode="json"),
        "storage": storage or StorageConfig(),
        "threads": config.cpus_per_worker,
    }
    actor = ray.remote(Worker)

    def make(resources: dict[str, float], device: str) -> Any:
        options = actor.options(max_restarts=0, max_task_retries=0, max_concurrency=4, **resources)
        return options.remote(device=device, **arguments)

    return Pool(make, config.workers, config.cpus_per_worker, config.device)


def _absolute(url: str) -> str:
    """Workers have their own working directories. Raises StageError in a submitted job, whose own is a passing copy."""
    if "://" in url or os.path.isabs(url):
        return url
    if "/runtime_resources/working_dir_files/" in os.getcwd():
        raise StageError(
            f"got {url!r}, which is inside the copy of the working directory that Ray made for this job; expected an "
            "absolute path or a URL"
        )
    return os.path.abspath(url)


class _Notice:
    """Of preemption: when SIGTERM came, if it did. While `patient`, the job sees to it itself."""

    came: float | None = None
    patient = False


@contextmanager
def _preemption() -> Iterator[_Notice]:
    """SIGTERM raises PreemptedError, or is noted for the job to finish what is in hand."""
    notice = _Notice()

    def handle(_signal: int, _frame: Any) -> None:
        notice.came = notice.came or time.monotonic()
        if not notice.patient:
            raise PreemptedError("told to end (SIGTERM)")

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield notice
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield notice
    finally:
        signal.signal(signal.SIGTERM, before)


class _Job:
    """One run over what is missing: encode, read back, and again what was found damaged."""

    def __init__(
        self, config: EncodeConfig, writer: StoreWriter, lease: Lease, pool: Pool, notice: _Notice, as_json: bool
    ) -> None:
        self.config, self.writer, self.lease, self.pool, self.notice = config, writer, lease, pool, notice
        self.as_json, self.spec = as_json, writer.spec
        self.bad: list[tuple[int, int]] = []
        self.noted: list[str] = []
        done = list_committed_units(writer.root)
        self.todo = list_missing_units(self.spec, done)
        self.progress = EncodeProgress(len(self.todo), self._images(self.todo), as_json)
        self.summary = Summary(units_before=len(done))
        self.left = set(lease.previous_in_flight) & {unit.name for unit in self.todo}
        self.start = time.monotonic()

    def _images(self, units: list[Unit]) -> int:
        return sum(self.spec.rows_of(unit.block) for unit in units)

    def run(self) -> Summary:
        try:
            for _ in range(CHECKS):
                self._encode()
                if not self._damaged():
                    break
            else:
                raise StoreError(
                    f"{self.writer.root.url}: files were damaged after their commit {CHECKS} times over; the storage "
                    "is not to be trusted"
                )
        finally:
            self.progress.close()
        self.summary.dataset = self.writer.finalize()
        self.summary.seconds = time.monotonic() - self.start
        self.summary.worker_deaths = self.pool.deaths
        return self.summary

    def _tick(self) -> bool:
        """Whether to go on giving out work."""
        self.lease.raise_if_lost()
        begun = sorted({unit.name for unit in self.pool.begun} | self.left)
        if begun != self.noted and self.progress.phase == "encode":
            self.noted = begun
            self.lease.set_in_flight(begun)
        self.progress.show(self.pool.workers, self.pool.retries)
        if self.pool.workers and not self.summary.start_seconds:
            self.summary.start_seconds = time.monotonic() - self.start
        if self.notice.came is None:
            return True
        if time.monotonic() - self.notice.came > GRACE_SECONDS:
            raise PreemptedError(f"told to end (SIGTERM); gave up {len(begun)} shards in hand")
        return False

    def _over(self, method: str, units: list[Unit]) -> Iterator[tuple[Unit, Any]]:
        """The pool's results, and PreemptedError at their end where it was told to end."""
        self.notice.patient = True
        yield from self.pool.run(method, units, self._tick)
        self.notice.patient = False
        if self.notice.came is not None:
            raise PreemptedError("told to end (SIGTERM); what was in hand is finished")

    def _encode(self) -> None:
        self.progress.phase = "encode"
        for unit, encoded in self._over("encode", self.todo):
            self.bad += encoded.bad
            if len(self.bad) > self.config.max_bad:
                raise FloatingPointError(_bad(self.bad, "the job stops here (--max-bad lets it go on through others)"))
            if not encoded.bad:
                if not self.writer.root.exists(unit.commit_file):
                    raise StageError(
                        f"a worker wrote {unit.commit_file} where this driver does not see it; expected "
                        f"{self.writer.root.url} to be on storage that all nodes share"
                    )
                self.summary.add(encoded, lost=self.pool.lost[unit] > 0, left=unit.name in self.left)
                self.left.discard(unit.name)
                self.progress.advance(encoded.images)
        self.progress.show(self.pool.workers, self.pool.retries, force=True)
        if self.bad:
            raise FloatingPointError(_bad(self.bad, "all others are encoded, and their shards are not complete"))

    def _damaged(self) -> bool:
        """Read everything back; whether something is to be encoded again."""
        self.progress.phase = "check"
        damaged = False
        for unit, faults in self._over("faults", self.writer.list_unpublished_units()):
            if faults:
                click.echo(f"{faults[0]}; it is encoded again", err=True)
                self.writer.delete_commit(unit)
                damaged = True
        self.todo = self.writer.list_missing_units() if damaged else []
        self.summary.damaged += len(self.todo)
        self.progress.again(len(self.todo), self._images(self.todo))
        return damaged


def _bad(bad: list[tuple[int, int]], then: str) -> str:
    """The pairs that are not finite, named."""
    named = ", ".join(f"image {image} draw {draw}" for image, draw in sorted(bad)[:BAD_LISTED])
    more = f" and {len(bad) - BAD_LISTED} more" if len(bad) > BAD_LISTED else ""
    return (
        f"z of {len(bad)} pairs is not finite in the dtype of the store: {named}{more}; nothing of them was written, "
        f"{then}. Expected a teacher that is finite on its data: another z_dtype, precision fp32, or other samples"
    )


def estimate(config: EncodeConfig, samples: str, teacher: str, out: str, storage: StorageConfig | None = None) -> str:
    """What the job will cost, from a few batches on one worker: hours at 1, 8 and 64 of them, bytes and objects."""
    spec, _ = output_spec(config, Store(samples, kind="samples"), teacher, out)
    todo = StoreWriter(out, spec).list_missing_units()
    one = config.model_copy(update={"workers": 1})
    with ray_session(), _pool(one, samples, teacher, out, spec, storage) as pool:
        ((_, speed),) = pool.run("speed", [TRIAL_SECONDS], lambda: True)
    draws = sum(spec.rows_of(unit.block) * len(unit.draws) for unit in todo)
    flops, layout = forward_flops(teacher_config(spec)), LAYOUTS[spec.layout]
    sizes: dict[str, int] = {}
    for key in expected_keys(spec):
        sizes[key.column] = sizes.get(key.column, 0) + layout.file_size(spec, key.column, spec.rows_of(key.block))
    files, records = len(expected_keys(spec)), 2 * len(todo)
    columns = ", ".join(f"{column} {size / 1e9:.3g}" for column, size in sizes.items())
    rows = [f"{'workers':>10}{'hours':>12}{'worker hours':>16}"]
    for workers in CLUSTERS:
        hours = draws / speed.draws_per_second / 3600
        rows.append(f"{workers:>10}{hours / min(workers, max(len(todo), 1)):>12.3g}{hours:>16.3g}")
    return "\n".join(
        [
            f"{draws} draws to encode in {len(todo)} shards of {spec.blocks}, {draws * flops:.3g} FLOP; one worker on "
            f"{speed.device} does {speed.draws_per_second:.4g} draws/s, {speed.draws_per_second * flops:.3g} FLOP/s in "
            f"{config.precision}",
            *rows,
            f"the store will have {files} files of {sum(sizes.values()) / 1e9:.4g} GB ({columns}), and "
            f"{records} commit records and sums beside them",
        ]
    )
