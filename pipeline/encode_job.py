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

from nfm.pipeline.config import StorageConfig
from nfm.pipeline.encode_report import EncodeProgress, Summary
from nfm.pipeline.pool import Pool, ray_session
from nfm.stages.encode import EncodeConfig, EncodedUnit, Speed, UnitEncoder, output_spec
from nfm.stages.errors import ResumableError, StageError
from nfm.storage_specs.format.names import LEASE_FILE
from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.lease import Lease
from nfm.storage_specs.writing.units import Unit, list_committed_units, list_missing_units
from nfm.storage_specs.writing.writer import StoreWriter

GRACE_SECONDS = 20.0  # for the units in flight at a notice of preemption, of the 30 s that a cluster gives at least
MAX_CHECKS = 3  # of the whole store, before its storage is held to lose what is written
MAX_LISTED_PAIRS = 20  # pairs that an error message names
WORKER_CONCURRENCY = 4  # calls that a worker serves at once: two units, and questions how far they are


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

    def draws_done(self) -> dict[Unit, int]:
        """Teacher forwards so far of the units that are being encoded."""
        return dict(self.encoder.draws_done)

    def find_faults(self, unit: Unit) -> list[str]:
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

    Raises StoreError if `out` holds another store or another driver works on it, FloatingPointError if z is not finite,
    PreemptedError after SIGTERM, and ClusterLostError.
    """
    with preemption_notice() as notice, EncodeProgress(as_json) as progress:
        spec, z_scale = read_output_spec(config, samples, teacher, out, progress)
        writer = StoreWriter(out, spec)
        if writer.is_complete():
            return Summary(Store(out).dataset, units_before=len(list_committed_units(writer.root)))
        progress.set_status(f"waiting for the lease of {out}, which another driver may hold", announce=False)
        with Lease(absolute_url(out), LEASE_FILE) as lease:
            writer.initialize(z_scale)
            with (
                ray_session(progress.set_status),
                worker_pool(config, samples, teacher, out, spec, storage) as pool,
            ):
                progress.set_status("waiting for the first worker")
                return EncodeJob(config, writer, lease, pool, notice, progress).run()


def read_output_spec(
    config: EncodeConfig, samples: str, teacher: str, out: str, progress: EncodeProgress
) -> tuple[Spec, Any]:
    """`output_spec`, which reads the teacher and may run it to find the scale of int8 z, with progress."""
    if config.z_dtype == "int8":
        progress.set_status("reading the samples and the teacher, and measuring the scale of int8 z", announce=False)
    else:
        progress.set_status("reading the samples and the teacher", announce=False)
    return output_spec(config, Store(samples, kind="samples"), teacher, out)


def worker_pool(
    config: EncodeConfig, samples: str, teacher: str, out: str, spec: Spec, storage: StorageConfig | None
) -> Pool:
    """The pool of workers of a job, or of an estimate."""
    import ray

    arguments = {
        "samples": absolute_url(samples),
        "teacher": absolute_url(teacher),
        "out": absolute_url(out),
        "spec": spec.model_dump(mode="json"),
        "storage": storage or StorageConfig(),
        "threads": config.cpus_per_worker,
    }
    actor = ray.remote(Worker)

    def make_actor(resources: dict[str, float], device: str) -> Any:
        options = actor.options(max_restarts=0, max_task_retries=0, max_concurrency=WORKER_CONCURRENCY, **resources)
        return options.remote(device=device, **arguments)

    return Pool(make_actor, config.workers, config.cpus_per_worker, config.device)


def absolute_url(url: str) -> str:
    """A path made absolute, since workers have working directories of their own; a URL as it is.

    Raises StageError in a submitted job, whose own working directory is a copy that goes away with it.
    """
    if "://" in url or os.path.isabs(url):
        return url
    if "/runtime_resources/working_dir_files/" in os.getcwd():
        raise StageError(
            f"got {url!r}, which is inside the copy of the working directory that Ray made for this job; expected an "
            "absolute path or a URL"
        )
    return os.path.abspath(url)


class PreemptionNotice:
    """Whether SIGTERM came, and when. While `is_deferred`, the job ends by itself; otherwise SIGTERM raises."""

    requested_at: float | None = None  # on the clock of time.monotonic
    is_deferred = False


@contextmanager
def preemption_notice() -> Iterator[PreemptionNotice]:
    """Inside the block, SIGTERM raises PreemptedError, or is recorded for the job to finish the units in flight."""
    notice = PreemptionNotice()

    def handle(_signal: int, _frame: Any) -> None:
        if notice.requested_at is None:
            notice.requested_at = time.monotonic()
        if not notice.is_deferred:
            raise PreemptedError("told to end (SIGTERM)")

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield notice
        return
    previous_handler = signal.signal(signal.SIGTERM, handle)
    try:
        yield notice
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


class EncodeJob:
    """One run over the missing units: encode them, read all back, and encode again those that are damaged."""

    def __init__(
        self,
        config: EncodeConfig,
        writer: StoreWriter,
        lease: Lease,
        pool: Pool,
        notice: PreemptionNotice,
        progress: EncodeProgress,
    ) -> None:
        self.config = config
        self.writer = writer
        self.lease = lease
        self.pool = pool
        self.notice = notice
        self.progress = progress
        self.started_at = time.monotonic()
        self.nonfinite_pairs: list[tuple[int, int]] = []  # (image, draw)
        committed_units = list_committed_units(writer.root)
        self.pending_units = list_missing_units(writer.spec, committed_units)
        self.summary = Summary(units_before=len(committed_units))
        pending_names = {unit.name for unit in self.pending_units}
        self.earlier_driver_units = set(lease.previous_in_flight) & pending_names  # by name
        self.units_in_lease: list[str] = []
        progress.add_units(len(self.pending_units), self._count_draws(self.pending_units))

    def _count_draws(self, units: list[Unit]) -> int:
        return sum(self.writer.spec.rows_of(unit.block) * len(unit.draws) for unit in units)

    def run(self) -> Summary:
        """Encode until a check finds no damaged file, and complete the store."""
        for _ in range(MAX_CHECKS):
            self._encode_pending_units()
            self._check_units()
            if not self.pending_units:
                break
        else:
            raise StoreError(
                f"{self.writer.root.url}: files were damaged after their commit {MAX_CHECKS} times over; the storage "
                "is not to be trusted"
            )
        self.progress.set_status("writing the manifest and dataset.json", announce=False)
        self.summary.dataset = self.writer.finalize()
        self.summary.seconds = time.monotonic() - self.started_at
        self.summary.worker_deaths = self.pool.num_actor_deaths
        return self.summary

    def _tick(self) -> bool:
        """What the driver does at least twice a second. Returns whether to start more units."""
        self.lease.raise_if_lost()
        started_units = {unit.name for unit in self.pool.started_tasks} | self.earlier_driver_units
        if self.progress.phase == "encode" and sorted(started_units) != self.units_in_lease:
            self.units_in_lease = sorted(started_units)
            self.lease.set_in_flight(self.units_in_lease)
        self.progress.update(self.pool.num_ready, self.pool.num_retries, self.pool.progress_in_flight)
        if self.pool.num_ready and not self.summary.start_seconds:
            self.summary.start_seconds = time.monotonic() - self.started_at
        if self.notice.requested_at is None:
            return True
        if time.monotonic() - self.notice.requested_at > GRACE_SECONDS:
            raise PreemptedError(f"told to end (SIGTERM); gave up {len(started_units)} units in flight")
        return False

    def _run_pool(
        self, method: str, units: list[Unit], progress_method: str | None = None
    ) -> Iterator[tuple[Unit, Any]]:
        """The pool's results for the units. Raises PreemptedError at the end if the process was told to end."""
        self.notice.is_deferred = True
        yield from self.pool.run(method, units, self._tick, progress_method)
        self.notice.is_deferred = False
        if self.notice.requested_at is not None:
            raise PreemptedError("told to end (SIGTERM); the units in flight are finished")

    def _encode_pending_units(self) -> None:
        """Encode the pending units. Raises FloatingPointError if some z is not finite: at once after more than
        `max_bad` pairs, otherwise after all other units."""
        self.progress.phase = "encode"
        for unit, encoded in self._run_pool("encode", self.pending_units, "draws_done"):
            if encoded.bad:
                self.nonfinite_pairs += encoded.bad
                if len(self.nonfinite_pairs) > self.config.max_bad:
                    raise FloatingPointError(
                        nonfinite_message(
                            self.nonfinite_pairs, "the job stops here (--max-bad lets it go on with other units)"
                        )
                    )
                continue
            if not self.writer.root.exists(unit.commit_file):
                raise StageError(
                    f"a worker wrote {unit.commit_file} where this driver does not see it; expected "
                    f"{self.writer.root.url} to be on storage that all nodes share"
                )
            self.summary.add_unit(
                encoded,
                worker_died=self.pool.deaths_by_task[unit] > 0,
                earlier_driver=unit.name in self.earlier_driver_units,
            )
            self.earlier_driver_units.discard(unit.name)
            self.progress.finish_unit(self._count_draws([unit]), encoded=encoded.draws > 0)
        self.progress.update(self.pool.num_ready, self.pool.num_retries, draws_in_flight=0)
        self.progress.show()
        if self.nonfinite_pairs:
            raise FloatingPointError(
                nonfinite_message(self.nonfinite_pairs, "all others are encoded, and the units of these are missing")
            )

    def _check_units(self) -> None:
        """Read back every unit that no complete store vouches for. Damaged units become the pending ones."""
        units = self.writer.list_unpublished_units()
        self.progress.start_check(len(units))
        is_damaged = False
        for unit, faults in self._run_pool("find_faults", units):
            self.progress.units_checked += 1
            if faults:
                self.progress.warn(f"{faults[0]}; it is encoded again")
                self.writer.delete_commit(unit)
                is_damaged = True
        self.progress.show()
        self.pending_units = self.writer.list_missing_units() if is_damaged else []
        self.summary.units_damaged += len(self.pending_units)
        self.progress.add_units(len(self.pending_units), self._count_draws(self.pending_units))


def nonfinite_message(pairs: list[tuple[int, int]], consequence: str) -> str:
    """An error message that names (image, draw) pairs whose z is not finite, at most MAX_LISTED_PAIRS of them."""
    listed = ", ".join(f"image {image} draw {draw}" for image, draw in sorted(pairs)[:MAX_LISTED_PAIRS])
    if len(pairs) > MAX_LISTED_PAIRS:
        listed += f" and {len(pairs) - MAX_LISTED_PAIRS} more"
    return (
        f"z of {len(pairs)} pairs is not finite in the dtype of the store: {listed}; their units were not written, "
        f"{consequence}. Expected a teacher that is finite on its data: another z_dtype, precision fp32, or other "
        "samples"
    )
