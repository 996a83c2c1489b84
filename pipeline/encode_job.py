"""The encode job: the units of a coupling store, spread over the workers of a Ray cluster.

A worker is an actor that holds the teacher, reads and writes its own units, and returns only a few numbers: no image
crosses Ray's object store. The driver holds no state but what is in the output: kill it, and the same command encodes
only the units that have no commit record. Before it calls a store complete, all of it was read back.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nfm.pipeline.config import StorageConfig
from nfm.pipeline.encode_report import EncodeProgress, Summary
from nfm.pipeline.pool import Pool
from nfm.pipeline.ray_session import ray_session
from nfm.stages.attribution import AttributionConfig, update_attribution
from nfm.stages.encode import EncodeConfig, EncodedUnit, Speed, UnitEncoder, output_spec
from nfm.stages.errors import ResumableError, StageError
from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.names import LEASE_FILE
from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import absolute_url
from nfm.storage_specs.storage.lease import Lease
from nfm.storage_specs.writing.claims import check_output
from nfm.storage_specs.writing.units import Unit, list_committed_units, list_missing_units
from nfm.storage_specs.writing.writer import StoreWriter

GRACE_SECONDS = 20.0  # after SIGTERM, for the units in flight; clusters kill a process 30 s after SIGTERM or later
MAX_CHECKS = 3  # of the whole store; if files are damaged at each, the storage seems to lose written data
MAX_LISTED_PAIRS = 20  # pairs that an error message names
WORKER_CONCURRENCY = 4  # calls that a worker serves at once: two units, and requests for their progress


class PreemptedError(ResumableError):
    """This process received SIGTERM."""


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

    def count_pairs_done(self) -> dict[Unit, int]:
        """The pairs encoded so far, for each unit that is being encoded."""
        return dict(self.encoder.pairs_done)

    def find_faults(self, unit: Unit) -> list[str]:
        return self.encoder.find_faults(unit)

    def measure_speed(self, seconds: float) -> Speed:
        return self.encoder.measure_speed(seconds)


def encode_couplings(
    config: EncodeConfig,
    samples: str,
    teacher: str,
    out: str,
    storage: StorageConfig | None = None,
    as_json: bool = False,
    attribution: AttributionConfig | None = None,
) -> Summary:
    """Encode `samples` (a sample store) with `teacher` into `out`, continuing what is there, or adding draws to it.

    Raises StoreError if `out` holds another store or another driver works on it, FloatingPointError if z is not finite,
    PreemptedError after SIGTERM, and ClusterLostError.
    """
    with handle_sigterm() as notice, EncodeProgress(as_json) as progress:
        spec, z_scale = read_output_spec(config, samples, teacher, out, progress)
        writer = StoreWriter(out, spec)
        if writer.is_complete():
            progress.warn(f"{out} is complete already; its files are not read again: nfm store verify does that")
            update_attribution(out, attribution or AttributionConfig())
            return Summary(Store(out).dataset, units_before=len(list_committed_units(writer.root, writer.spec)))
        check_output(writer.root)
        with ray_session(progress.set_status, config.insecure_cluster):  # first: until it is there, the output is free
            progress.set_status(f"waiting for the lease of {out}, which another driver may hold", announce=False)
            with (
                Lease(shared_url(out), LEASE_FILE) as lease,
                worker_pool(config, samples, teacher, out, spec, storage) as pool,
            ):
                pool.check_room()  # before the output is of this spec: a job that cannot run leaves it free
                writer.initialize(z_scale)
                show_waiting(pool, progress)
                job = EncodeJob(config, writer, lease, pool, notice, progress)
                inherited = Store(samples, kind="samples").dataset.attribution
                return job.run((attribution or AttributionConfig()).to_attribution(), inherited)


def read_output_spec(
    config: EncodeConfig, samples: str, teacher: str, out: str, progress: EncodeProgress
) -> tuple[Spec, NDArray[np.float32] | None]:
    """Shows progress while `output_spec` reads the teacher, and runs it to find the scale of int8 z. Returns the spec,
    and the scale, float32 (C, H, W), or None."""
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
        "samples": shared_url(samples),
        "teacher": shared_url(teacher),
        "out": shared_url(out),
        "spec": spec.model_dump(mode="json"),
        "storage": storage or StorageConfig(),
        "threads": config.cpus_per_worker,
    }
    actor = ray.remote(Worker)

    def make_actor(resources: dict[str, float], device: str) -> Any:
        options = actor.options(max_restarts=0, max_task_retries=0, max_concurrency=WORKER_CONCURRENCY, **resources)
        return options.remote(device=device, **arguments)

    return Pool(make_actor, config.workers, config.cpus_per_worker, config.device)


def show_waiting(pool: Pool, progress: EncodeProgress) -> None:
    """Say what a job without a worker waits for."""
    status = "waiting for the first worker"
    if pool.missing_node is not None:
        status = f"waiting for a node with {pool.missing_node}, which one worker needs, to join the Ray cluster"
    if progress.status != status:
        progress.set_status(status)


def shared_url(url: str) -> str:
    """A path made absolute, since workers have working directories of their own; a URL as it is.

    Raises StageError in a submitted job for a path in its own working directory, a copy that goes away with the job.
    """
    absolute = absolute_url(url)
    if "/runtime_resources/working_dir_files/" in absolute:
        raise StageError(
            f"got {url!r}, which is inside the copy of the working directory that Ray made for this job; "
            "expected an absolute path or a URL"
        )
    return absolute


class PreemptionNotice:
    """When SIGTERM was received. While `finishes_units_first`, the job looks here and ends by itself once the units in
    flight are finished; otherwise SIGTERM raises PreemptedError at once."""

    received_at: float | None = None  # on the clock of time.monotonic
    finishes_units_first = False
    acknowledged = False  # whether the driver has said so


@contextmanager
def handle_sigterm() -> Iterator[PreemptionNotice]:
    """Inside the block, SIGTERM is recorded in the PreemptionNotice, and raises PreemptedError unless the job finishes
    the units in flight first."""
    notice = PreemptionNotice()

    def handle(_signal: int, _frame: Any) -> None:
        if notice.received_at is None:
            notice.received_at = time.monotonic()
        if not notice.finishes_units_first:
            raise PreemptedError("received SIGTERM")

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
        committed_units = list_committed_units(writer.root, writer.spec)
        self.pending_units = list_missing_units(writer.spec, committed_units)
        self.summary = Summary(units_before=len(committed_units))
        pending_names = {unit.name for unit in self.pending_units}
        self.earlier_driver_units = set(lease.previous_in_flight) & pending_names  # by name
        self.units_in_lease: list[str] = []
        progress.add_units(len(self.pending_units), self._count_pairs(self.pending_units))

    def _count_pairs(self, units: list[Unit]) -> int:
        return sum(self.writer.spec.rows_of(unit.block) * len(unit.draws) for unit in units)

    def run(self, attribution: Attribution, inherited: Attribution) -> Summary:
        """Encode until a check finds no damaged file, and complete the store."""
        for _ in range(MAX_CHECKS):
            self._encode_pending_units()
            self._check_units()
            if not self.pending_units:
                break
        else:
            raise StoreError(
                f"{self.writer.root.url}: files were damaged after their commit {MAX_CHECKS} times in a row; "
                "the storage seems to lose written data"
            )
        self.progress.set_status("writing the manifest and dataset.json", announce=False)
        self.summary.dataset = self.writer.finalize(attribution=attribution, inherited=inherited)
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
        if self.progress.first_worker_at is None:
            show_waiting(self.pool, self.progress)
        if self.pool.num_ready and not self.summary.start_seconds:
            self.summary.start_seconds = time.monotonic() - self.started_at
        if self.notice.received_at is None:
            return True
        if not self.notice.acknowledged:
            self.notice.acknowledged = True
            num_units = len(self.pool.tasks_in_flight)
            self.progress.warn(
                f"received SIGTERM; finishing {num_units} units in flight, for at most {GRACE_SECONDS:.0f} s"
            )
        if time.monotonic() - self.notice.received_at > GRACE_SECONDS:
            raise PreemptedError(f"received SIGTERM; gave up {len(started_units)} units in flight")
        return False

    def _run_pool(
        self, method: str, units: list[Unit], progress_method: str | None = None
    ) -> Iterator[tuple[Unit, Any]]:
        """The pool's results for the units. Raises PreemptedError at the end if the process received SIGTERM."""
        self.notice.finishes_units_first = True
        yield from self.pool.run(method, units, self._tick, progress_method)
        self.notice.finishes_units_first = False
        if self.notice.received_at is not None:
            num_unfinished = len(self.pool.deaths_by_task)  # their workers died meanwhile
            result = (
                f"{num_unfinished} units in flight were not finished"
                if num_unfinished
                else "all units in flight are finished"
            )
            raise PreemptedError(f"received SIGTERM; {result}")

    def _encode_pending_units(self) -> None:
        """Encode the pending units. Raises FloatingPointError if some z is not finite: at once after more than
        `max_bad` pairs, otherwise after all other units."""
        self.progress.phase = "encode"
        for unit, encoded in self._run_pool("encode", self.pending_units, "count_pairs_done"):
            if encoded.bad:
                self.nonfinite_pairs += encoded.bad
                if len(self.nonfinite_pairs) > self.config.max_bad:
                    raise FloatingPointError(
                        nonfinite_message(
                            self.nonfinite_pairs, "The job stops here; with --max-bad it goes on with other units"
                        )
                    )
                continue
            if not self.writer.root.exists(unit.commit_file):
                raise StageError(
                    f"a worker wrote {unit.commit_file} where this driver does not see it; "
                    f"expected {self.writer.root.url} to be on storage that all nodes share"
                )
            self.summary.add_unit(
                encoded,
                worker_died=self.pool.deaths_by_task[unit] > 0,
                earlier_driver=unit.name in self.earlier_driver_units,
            )
            self.earlier_driver_units.discard(unit.name)
            self.progress.finish_unit(self._count_pairs([unit]), was_encoded=encoded.pairs > 0)
        self.progress.update(self.pool.num_ready, self.pool.num_retries, pairs_in_flight=0)
        self.progress.show()
        if self.nonfinite_pairs:
            raise FloatingPointError(
                nonfinite_message(self.nonfinite_pairs, "All other units are encoded; the store is incomplete")
            )

    def _check_units(self) -> None:
        """Read back every unit that is not part of an already completed store. Damaged units become pending again."""
        units = self.writer.list_unpublished_units()
        self.progress.start_check(len(units))
        is_damaged = False
        for unit, faults in self._run_pool("find_faults", units):
            self.progress.units_checked += 1
            if faults:
                self.progress.warn(f"{faults[0]}; its unit is encoded again")
                self.writer.delete_commit(unit)
                is_damaged = True
        self.progress.show()
        self.pending_units = self.writer.list_missing_units() if is_damaged else []
        self.summary.units_damaged += len(self.pending_units)
        self.progress.add_units(len(self.pending_units), self._count_pairs(self.pending_units))


def nonfinite_message(pairs: list[tuple[int, int]], consequence: str) -> str:
    """An error message that names (image, draw) pairs whose z is not finite, at most MAX_LISTED_PAIRS of them.

    `consequence` is a sentence without its full stop: what becomes of the other units.
    """
    listed = ", ".join(f"image {image} draw {draw}" for image, draw in sorted(pairs)[:MAX_LISTED_PAIRS])
    if len(pairs) > MAX_LISTED_PAIRS:
        listed += f" and {len(pairs) - MAX_LISTED_PAIRS} more"
    return (
        f"z of {len(pairs)} pairs is not finite in the dtype of the store: {listed}; their units were not written. "
        f"{consequence}. Try another z_dtype, precision fp32 or other samples."
    )
