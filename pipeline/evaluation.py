"""Evaluation and its report: measured once for the same inputs and settings, and shown in a terminal and as a page."""

from typing import Any

from nfm.pipeline.config import Config
from nfm.pipeline.report import sampler_names, write_report
from nfm.pipeline.report_plots import student_names
from nfm.stages.checkpoint import load_network, weights_sha256
from nfm.stages.evaluate import evaluate, save_evaluation
from nfm.stages.progress import Progress
from nfm.stages.splits import open_splits
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.documents import load_json
from nfm.storage_specs.storage.files import Root

MAX_METRICS_BYTES = 1 << 28
# Raised when keys of metrics.json change, or how something is measured: what an earlier version measured is measured
# again. 3: the time of a sampler is without that of the curvature. 4: the views of the real images.
METRICS_VERSION = 4


def evaluate_and_report(
    config: Config, samples: str, couplings: str, teacher: str, students: dict[str, str], out: str
) -> list[str]:
    """Write `metrics.json`, `grids.npz` and `report.html` to `out`, and return the lines of a summary.

    What was measured before on the same inputs with the same settings is reused. `students` are URLs by name.
    """
    root = Root(out)
    with Progress("read the networks to evaluate"):
        inputs = _identify_inputs(samples, couplings, teacher, students)
    settings = config.model_dump(mode="json", exclude={"storage"})  # storage changes no result, and may hold secrets
    metrics = _read_metrics(root, inputs, settings)
    if metrics is None:
        root.check_writable()
        measured, grids = evaluate(config.evaluate, samples, couplings, teacher, students)
        metrics = measured | {"version": METRICS_VERSION, "config": settings, "inputs": inputs}
        save_evaluation(root, metrics, grids)
    with Progress("write the report"):
        write_report(root, metrics)
    return _summarize(metrics, f"{out}/report.html")


def _identify_inputs(samples: str, couplings: str, teacher: str, students: dict[str, str]) -> dict[str, Any]:
    """Identity of everything that the metrics depend on."""
    return {
        "samples": [store.dataset.id for store in open_splits(samples)],
        "couplings": Store(couplings, kind="couplings").dataset.id,
        "teacher": weights_sha256(load_network(teacher, "TarFlow")[0].state_dict()),
        "students": {name: weights_sha256(load_network(url, "SiT")[0].state_dict()) for name, url in students.items()},
    }


def _read_metrics(root: Root, inputs: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any] | None:
    """The metrics in `root`, if they were measured on these inputs with these settings. Raises StoreError if they are
    damaged."""
    if not (root.exists("metrics.json") and root.exists("grids.npz")):
        return None
    metrics = load_json(root.read("metrics.json", MAX_METRICS_BYTES), f"{root.url}/metrics.json")
    expected = {"version": METRICS_VERSION, "inputs": inputs, "config": settings}
    if not isinstance(metrics, dict) or any(metrics.get(key) != value for key, value in expected.items()):
        return None
    return metrics


def _summarize(metrics: dict[str, Any], report_url: str) -> list[str]:
    """A table of the students, and what their distances are to be compared with."""
    distances = metrics["fd"]
    teacher = metrics["teacher"]
    floor = distances["floor"]
    samplers = sampler_names(metrics)
    views = f" ({' and '.join(distances['views'])})" if len(distances["views"]) > 1 else ""
    lines = [
        f"{'':16}{'loss':>8}" + "".join(f"{name:>18}" for name in samplers),
        f"{'':24}" + f"{'FD      κ':>18}" * len(samplers),
    ]
    for name in student_names(metrics):
        student = metrics["students"][name]
        cells = [f"{student[sampler]['fd']:.3f}  {student[sampler]['curvature']:.4f}" for sampler in samplers]
        loss = "" if student["loss"] is None else f"{student['loss']:.4f}"
        lines.append(f"{name:16}{loss:>8}" + "".join(f"{cell:>18}" for cell in cells))
    lines += [
        f"teacher: FD {teacher['fd']:.3f}, "
        + ("" if teacher["bpd"] is None else f"{teacher['bpd']:.3f} bits/dim, ")
        + f"round trip {teacher['roundtrip_max_abs']:.1e}",
        f"FD: over {distances['features']}, "
        f"of {distances['samples']} samples to {distances['reference']} training images{views}",
        f"noise floor: FD {floor['fd']:.3f} of {floor['samples']} held-out images "
        f"({teacher['fd_at_floor_samples']:.3f} of as many of the teacher's samples)",
        f"resampling: FD {distances['resampled']['fd']:.3f} "
        f"of {distances['samples']} training images drawn with replacement",
        f"report: {report_url}",
    ]
    return lines
