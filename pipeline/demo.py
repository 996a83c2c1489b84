"""The demo: every stage in turn on one preset. Each stage continues or skips by itself, so the demo holds no state."""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from pipeline.config import Config
from pipeline.encode_job import encode_couplings
from pipeline.pool import ray_session
from pipeline.report import sampler_names, student_names, write_report
from stages.checkpoint import load_network, weights_sha256
from stages.evaluate import evaluate, save_evaluation
from stages.prepare import prepare
from stages.train_student import train_student
from stages.train_teacher import train_teacher
from storage_specs.files import Root
from storage_specs.schema import LayoutName
from storage_specs.store import Store

MAX_METRICS_BYTES = 1 << 28


def run_demo(config: Config, out: str, data: Path | None, skip_bad_images: bool) -> None:
    """Write `<out>/report.html` and `<out>/metrics.json`, and on the way every store and checkpoint."""
    start = time.monotonic()
    config = config.model_copy(update={"data": config.data.given(data)})

    def step(number: int, text: str) -> None:
        click.echo(f"[{number}/6 {time.monotonic() - start:5.0f} s] {text}", err=True)

    step(1, "prepare: images → sample stores")
    prepare(config.data, f"{out}/samples", data, skip_bad_images)
    step(2, "train-teacher: TarFlow by maximum likelihood")
    document = train_teacher(config.teacher, f"{out}/samples", f"{out}/teacher")
    click.echo(f"    {document['bpd']:.3f} bits per dimension held out", err=True)
    teacher = f"{out}/teacher/model.safetensors"
    step(3, "encode: teacher × noise draws → coupling stores, on Ray, in both layouts")
    stores: dict[LayoutName, str] = {"webdataset": f"{out}/couplings-webdataset", "zarr": f"{out}/couplings-zarr"}
    missing = not all(Root(url).exists("dataset.json") for url in stores.values())
    with ray_session() if missing else nullcontext():
        for layout, url in stores.items():
            encode = config.encode.model_copy(update={"layout": layout})
            encode_couplings(encode, f"{out}/samples/train", teacher, url, config.storage)
    couplings = stores[config.encode.layout]
    students = {}
    step(4, "train-student: flow matching on the teacher's pairs and on random pairs")
    for coupling in ("nfm", "independent"):
        student = config.student.model_copy(update={"coupling": coupling})
        train_student(student, couplings, f"{out}/student-{coupling}")
        students[coupling] = f"{out}/student-{coupling}/model.safetensors"
    step(5, "evaluate: Fréchet distance, curvature, z-space")
    summary = evaluate_and_report(config, f"{out}/samples", couplings, teacher, students, out)
    step(6, "done")
    click.echo(summary)


def evaluate_and_report(
    config: Config, samples: str, couplings: str, teacher: str, students: dict[str, str], out: str
) -> str:
    """`metrics.json`, `grids.npz` and `report.html` in `out`; what was measured before on the same inputs is reused.

    Returns a summary for the terminal.
    """
    root = Root(out)
    inputs = _inputs(samples, couplings, teacher, students)
    settings = config.model_dump(mode="json", exclude={"storage"})  # it changes no result, and may hold secrets
    metrics: dict[str, Any] | None = None
    if root.exists("metrics.json") and root.exists("grids.npz"):
        metrics = json.loads(root.read("metrics.json", MAX_METRICS_BYTES))
        if metrics is not None and (metrics.get("inputs"), metrics.get("config")) != (inputs, settings):
            metrics = None
    if metrics is None:
        measured, grids = evaluate(config.evaluate, samples, couplings, teacher, students)
        metrics = measured | {"config": settings, "inputs": inputs}
        save_evaluation(root, metrics, grids)
    write_report(root, metrics)
    return _summary(metrics, f"{out}/report.html")


def _inputs(samples: str, couplings: str, teacher: str, students: dict[str, str]) -> dict[str, Any]:
    """Identity of everything that the metrics depend on."""
    return {
        "samples": [Store(f"{samples}/{split}", kind="samples").dataset.id for split in ("train", "val")],
        "couplings": Store(couplings, kind="couplings").dataset.id,
        "teacher": weights_sha256(load_network(teacher, "TarFlow")[0].state_dict()),
        "students": {name: weights_sha256(load_network(url, "SiT")[0].state_dict()) for name, url in students.items()},
    }


def _summary(metrics: dict[str, Any], report: str) -> str:
    fd, teacher, samplers = metrics["fd"], metrics["teacher"], sampler_names(metrics)
    lines = [
        f"{'':16}{'loss':>8}" + "".join(f"{name:>18}" for name in samplers),
        f"{'':24}" + f"{'FD      κ':>18}" * len(samplers),
    ]
    for name in student_names(metrics):
        student = metrics["students"][name]
        cells = [f"{student[sampler]['fd']:.3f}  {student[sampler]['curvature']:.4f}" for sampler in samplers]
        lines.append(f"{name:16}{student['loss']:8.4f}" + "".join(f"{cell:>18}" for cell in cells))
    floor = fd["floor"]
    lines += [
        f"teacher: FD {teacher['fd']:.3f}, {teacher['bpd']:.3f} bits/dim, round trip "
        f"{teacher['roundtrip_max_abs']:.1e}",
        f"FD is over {fd['features']}, of {fd['samples']} samples against {fd['reference']} training images. "
        "Noise floor: "
        f"{floor['samples']} fresh real images have",
        f"{floor['fd']:.3f} (as many of the teacher's: {teacher['fd_at_floor_samples']:.3f}); "
        f"{fd['samples']} resampled training images, {fd['resampled']['fd']:.3f}",
        f"report: {report}",
    ]
    return "\n".join(lines)
