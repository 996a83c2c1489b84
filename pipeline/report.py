"""metrics.json and grids.npz → report.html, one self-contained page, and report.png."""

import base64
import io
from typing import Any

import jinja2
import numpy as np

from nfm.models.solvers import parse_sampler
from nfm.pipeline.report_plots import (
    NAMES,
    distance_name,
    plot_distance,
    plot_loss,
    plot_png,
    plot_teacher,
    row_name,
    strip_png,
    student_names,
    summary_png,
)
from nfm.storage_specs.storage.files import Root

MAX_GRIDS_BYTES = 1 << 32


def write_report(root: Root, metrics: dict[str, Any]) -> None:
    with np.load(io.BytesIO(root.read("grids.npz", MAX_GRIDS_BYTES)), allow_pickle=False) as archive:
        grids = {name: archive[name] for name in archive.files}
    metrics = metrics | {"students": {name: metrics["students"][name] for name in student_names(metrics)}}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nfm.pipeline"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["short"] = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)
    page = environment.get_template("report.html").render(
        m=metrics,
        samplers=sampler_names(metrics),
        names={name: NAMES.get(name, name) for name in metrics["students"]},
        distance=distance_name(metrics),
        loss_plot=_base64(plot_png(plot_loss, metrics)),
        fd_plot=_base64(plot_png(plot_distance, metrics)),
        teacher_plot=_base64(plot_png(plot_teacher, metrics)),
        rows=[(row_name(name), _base64(strip_png(images))) for name, images in grids.items()],
        columns=max((len(images) for images in grids.values()), default=0),
        comparison=compare_students(metrics),
    )
    root.write("report.png", summary_png(metrics, grids))
    root.write("report.html", page.encode())


def sampler_names(metrics: dict[str, Any]) -> list[str]:
    """In the order of the config."""
    return [parse_sampler(text).name for text in metrics["config"]["evaluate"]["samplers"]]


def compare_students(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each measure: its name, the NFM student's value, the FM student's, and their ratio. Empty for runs that
    did not train both."""
    students = metrics["students"]
    if not {"nfm", "independent"} <= students.keys():
        return []
    nfm, fm = students["nfm"], students["independent"]
    rows = [{"name": "training loss", "nfm": nfm["loss"], "fm": fm["loss"]}]
    if None in (nfm["loss"], fm["loss"]):  # of an imported network
        rows = []
    samplers = sampler_names(metrics)
    for key, title in (("curvature", "curvature κ"), ("fd", distance_name(metrics))):
        rows += [{"name": f"{title}, {name}", "nfm": nfm[name][key], "fm": fm[name][key]} for name in samplers]
    return [row | {"ratio": row["nfm"] / row["fm"]} for row in rows]


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()
