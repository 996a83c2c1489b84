"""Evaluation and its report: measured once for the same inputs and settings, and shown in a terminal and as a page."""

import json
from typing import Any

from nfm.pipeline.config import Config
from nfm.pipeline.report import sampler_names, write_report
from nfm.pipeline.report_plots import student_names
from nfm.stages.checkpoint import load_network, weights_sha256
from nfm.stages.evaluate import evaluate, save_evaluation
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.files import Root

MAX_METRICS_BYTES = 1 << 28


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
