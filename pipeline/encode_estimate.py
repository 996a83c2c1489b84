"""`nfm encode --estimate`: what the job will cost, and what it saves against a teacher in the training loop."""

from dataclasses import asdict, dataclass
from typing import Any

from nfm.models.sit import training_flops
from nfm.models.tarflow import forward_flops
from nfm.pipeline.config import StorageConfig
from nfm.pipeline.encode_job import read_output_spec, show_waiting, worker_pool
from nfm.pipeline.encode_report import EncodeProgress, format_flop, teacher_config
from nfm.pipeline.ray_session import ray_session
from nfm.stages.encode import EncodeConfig, Speed
from nfm.stages.train_student import StudentConfig, sit_config
from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.manifest import expected_keys
from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.writing.writer import StoreWriter

TRIAL_SECONDS = 5.0  # of the teacher on one worker
WORKER_COUNTS = (1, 8, 64)  # that the table has a row for
STUDENT_COUNTS = (1, 4, 16)  # that the savings are printed for


@dataclass(frozen=True)
class Comparison:
    """Teacher work of encoding once, and of a teacher that encodes every image in the training loop of each student.

    Hours are those of one worker of the measured speed.
    """

    images: int  # of the data set, N
    draws: int  # per image, K
    student_images: int  # that one student sees in training
    store_pairs: int  # N·K, each one teacher forward
    store_flop: int
    store_hours: float
    loop_flop: int  # of one student
    loop_hours: float
    student_flop: int  # of training one student, without any teacher
    break_even_students: float  # students after which the store has cost less: N·K / student_images
    max_draws: int  # largest K for which the store costs one student no more than a teacher in the loop

    def saved_flop(self, students: int) -> int:
        """Negative if the store costs more than a teacher in the loops of so many students."""
        return students * self.loop_flop - self.store_flop

    def saved_hours(self, students: int) -> float:
        return students * self.loop_hours - self.store_hours


def compare_costs(
    images: int,
    draws: int,
    student_images: int,
    forward_flop: int,
    student_flop_per_image: int,
    pairs_per_second: float,
) -> Comparison:
    """Compare encoding once with a teacher in the loop.

    `forward_flop` is that of one forward pass of the teacher, `student_flop_per_image` that of one training image of a
    student (forward and backward), and `pairs_per_second` the teacher forwards of one worker.
    """
    store_pairs = images * draws
    return Comparison(
        images=images,
        draws=draws,
        student_images=student_images,
        store_pairs=store_pairs,
        store_flop=store_pairs * forward_flop,
        store_hours=store_pairs / pairs_per_second / 3600,
        loop_flop=student_images * forward_flop,
        loop_hours=student_images / pairs_per_second / 3600,
        student_flop=student_images * student_flop_per_image,
        break_even_students=store_pairs / student_images,
        max_draws=student_images // images,
    )


@dataclass(frozen=True)
class Estimate:
    """What is left to encode, how fast one worker is, what the finished store will hold, and what it saves."""

    pending_pairs: int
    pending_units: int
    blocks: int
    teacher_flop: int  # of one pair
    device: str
    precision: str
    pairs_per_second: float  # of one worker
    files: int
    bytes_by_column: dict[str, int]
    records: int  # commit records and Σz² files of pending units
    student_size: str
    comparison: Comparison

    def hours(self, workers: int) -> float:
        """Hours of the job on so many workers; more than there are units do not help."""
        return self.worker_hours / min(workers, max(self.pending_units, 1))

    @property
    def worker_hours(self) -> float:
        return self.pending_pairs / self.pairs_per_second / 3600

    def as_document(self) -> dict[str, Any]:
        """For machines."""
        return {"event": "estimate"} | asdict(self)

    def describe(self) -> str:
        """For people."""
        lines = [
            f"{self.pending_pairs} pairs to encode in {self.pending_units} units ({self.blocks} blocks), "
            f"{format_flop(self.pending_pairs * self.teacher_flop)}; "
            f"one worker on {self.device} does {self.pairs_per_second:.4g} pairs/s, "
            f"{format_flop(self.pairs_per_second * self.teacher_flop)}/s in {self.precision}",
            f"{'workers':>10}{'hours':>12}{'worker hours':>16}",
        ]
        lines.extend(
            f"{workers:>10}{format_hours(self.hours(workers)):>12}{format_hours(self.worker_hours):>16}"
            for workers in WORKER_COUNTS
        )
        columns = ", ".join(f"{column} {size / 1e9:.3g}" for column, size in self.bytes_by_column.items())
        store_gb = sum(self.bytes_by_column.values()) / 1e9
        lines.append(
            f"the store will have {self.files} files of {store_gb:.4g} GB ({columns}), "
            f"and {self.records} commit records and Σz² files"
        )
        return "\n".join([*lines, "", *self._describe_comparison(store_gb)])

    def _describe_comparison(self, store_gb: float) -> list[str]:
        """What precomputing saves, with its arithmetic."""
        costs = self.comparison
        teacher = format_flop(self.teacher_flop)
        lines = [
            f"What precomputing saves, at {teacher} a teacher forward, "
            f"for {self.student_size} students of {costs.student_images:,} images:",
            f"{'':>34}{'teacher forwards':>18}{'teacher FLOP':>14}{'worker hours':>14}{'GB':>8}",
            f"{f'encoded once, K = {costs.draws}':>34}{costs.store_pairs:>18,}{format_flop(costs.store_flop):>14}"
            f"{format_hours(costs.store_hours):>14}{store_gb:>8.3g}",
            f"{'teacher in the loop, each student':>34}{costs.student_images:>18,}{format_flop(costs.loop_flop):>14}"
            f"{format_hours(costs.loop_hours):>14}{0:>8}",
            f"training one student takes {format_flop(costs.student_flop)} by itself, "
            f"and with the teacher in the loop {format_flop(costs.student_flop + costs.loop_flop)}, "
            f"{1 + costs.loop_flop / costs.student_flop:.3g} times as much",
            "break-even: the store pays for itself after "
            f"K·N = {costs.draws} × {costs.images:,} = {costs.store_pairs:,} training images of all students together, "
            f"which is {costs.break_even_students:.3g} students",
        ]
        if costs.max_draws:
            lines.append(
                f"for one student alone it pays up to K = {costs.max_draws} "
                f"({costs.student_images:,} / {costs.images:,} images)"
            )
        else:
            lines.append(
                f"one student alone sees fewer images ({costs.student_images:,}) than there are ({costs.images:,}): "
                "for it, a teacher in the loop is cheaper at any K"
            )
        savings = []
        for students in STUDENT_COUNTS:
            flop, hours = costs.saved_flop(students), costs.saved_hours(students)
            who = "1 student" if students == 1 else f"{students} students"
            work = f"{format_flop(abs(flop))}, {format_hours(abs(hours))} worker hours"
            savings.append(f"{who}: {work}" if flop >= 0 else f"{who}: none, it costs {work} more")
        lines.append("teacher work saved by the store: " + "; ".join(savings))
        return lines


def format_hours(hours: float) -> str:
    """Three digits, and no exponent for large numbers."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def estimate_job(
    config: EncodeConfig,
    student: StudentConfig,
    samples: str,
    teacher: str,
    out: str,
    storage: StorageConfig | None = None,
    as_json: bool = False,
) -> Estimate:
    """Time the teacher on one worker for TRIAL_SECONDS, and work out what the job will cost. Writes nothing."""
    with EncodeProgress(as_json) as progress:
        spec, _ = read_output_spec(config, samples, teacher, out, progress)
        student_flop_per_image = training_flops(sit_config(student, spec))
        pending_units = StoreWriter(out, spec).list_missing_units()
        speed = _time_teacher(config, samples, teacher, out, spec, storage, progress)
    forward_flop = forward_flops(teacher_config(spec))
    keys = expected_keys(spec, LAYOUTS[spec.layout])
    bytes_by_column: dict[str, int] = {}
    for key in keys:
        size = LAYOUTS[spec.layout].file_size(spec, key.column, spec.rows_of(key.block))
        bytes_by_column[key.column] = bytes_by_column.get(key.column, 0) + size
    return Estimate(
        pending_pairs=sum(spec.rows_of(unit.block) * len(unit.draws) for unit in pending_units),
        pending_units=len(pending_units),
        blocks=spec.num_blocks,
        teacher_flop=forward_flop,
        device=speed.device,
        precision=config.precision,
        pairs_per_second=speed.pairs_per_second,
        files=len(keys),
        bytes_by_column=bytes_by_column,
        records=2 * len(pending_units),
        student_size=student.size,
        comparison=compare_costs(
            images=spec.rows,
            draws=spec.num_draws,
            student_images=student.train.images,
            forward_flop=forward_flop,
            student_flop_per_image=student_flop_per_image,
            pairs_per_second=speed.pairs_per_second,
        ),
    )


def _time_teacher(
    config: EncodeConfig,
    samples: str,
    teacher: str,
    out: str,
    spec: Spec,
    storage: StorageConfig | None,
    progress: EncodeProgress,
) -> Speed:
    """The speed of the teacher on one worker."""
    one_worker = config.model_copy(update={"workers": 1})
    timing_status = f"timing the teacher for {TRIAL_SECONDS:.0f} s on one worker"
    with (
        ray_session(progress.set_status, config.insecure_cluster),
        worker_pool(one_worker, samples, teacher, out, spec, storage) as pool,
    ):
        show_waiting(pool, progress)

        def tick() -> bool:
            if not pool.num_ready:
                show_waiting(pool, progress)
            elif progress.status != timing_status:
                progress.set_status(timing_status)
            return True

        results = list(pool.run("measure_speed", [TRIAL_SECONDS], tick))
    speed: Speed = results[0][1]
    return speed
