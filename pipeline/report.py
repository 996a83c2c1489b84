"""metrics.json + grids.npz → report.html, one self-contained page."""

import base64
import io
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from nfm.models.solvers import parse_sampler
from nfm.storage_specs.storage.files import Root

matplotlib.use("Agg")
MAX_GRIDS_BYTES = 1 << 32
COLORS = {"nfm": "#c2410c", "independent": "#1d4ed8"}
NAMES = {"nfm": "NFM (teacher's pairs)", "independent": "FM (random pairs)"}
SHORT = {"nfm": "NFM", "independent": "FM"}


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
        distance=_distance(metrics),
        loss_plot=_png(_loss_plot(metrics)),
        fd_plot=_png(_fd_plot(metrics)),
        teacher_plot=_png(_teacher_plot(metrics)),
        rows=[(_row_name(name), _strip(images)) for name, images in grids.items()],
        columns=len(next(iter(grids.values()))),
        effects=_effects(metrics),
    )
    root.write("report.html", page.encode())


def student_names(metrics: dict[str, Any]) -> list[str]:
    """NFM first; JSON keeps no order."""
    return sorted(metrics["students"], key=lambda name: (name != "nfm", name))


def sampler_names(metrics: dict[str, Any]) -> list[str]:
    """In the order of the config."""
    return [parse_sampler(text).name for text in metrics["config"]["evaluate"]["samplers"]]


def _distance(metrics: dict[str, Any]) -> str:
    """FID only where it is over Inception features."""
    features = metrics["fd"]["features"]
    return "FID" if features == "inception" else f"Fréchet distance ({features})"


def _row_name(name: str) -> str:
    student, _, sampler = name.partition(" ")
    if not sampler:
        return {"real": "training images", "teacher": "TarFlow teacher"}[name]
    parsed = parse_sampler(sampler)
    return f"{SHORT.get(student, student)}, {parsed.solver.capitalize()} {parsed.nfe}"


def _effects(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """NFM against FM, line by line, for runs that trained both."""
    students = metrics["students"]
    if not {"nfm", "independent"} <= students.keys():
        return []
    nfm, fm = students["nfm"], students["independent"]
    rows = [{"name": "training loss", "nfm": nfm["loss"], "fm": fm["loss"]}]
    samplers = sampler_names(metrics)
    for key, title in (("curvature", "curvature κ"), ("fd", _distance(metrics))):
        rows += [{"name": f"{title}, {name}", "nfm": nfm[name][key], "fm": fm[name][key]} for name in samplers]
    return [row | {"ratio": row["nfm"] / row["fm"]} for row in rows]


def _axes(width: float = 6.0) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, 3.8), layout="constrained")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _loss_plot(metrics: dict[str, Any]) -> Figure:
    figure, axes = _axes()
    for name in metrics["students"]:
        curve = metrics["curves"][name]
        axes.plot(curve["images"], curve["loss"], color=COLORS.get(name), label=NAMES.get(name, name), lw=1.2)
    axes.set(yscale="log", xlabel="training images seen", ylabel="flow-matching loss per dimension")
    axes.legend(frameon=False)
    return figure


def _fd_plot(metrics: dict[str, Any]) -> Figure:
    figure, axes = _axes()
    for name, student in metrics["students"].items():
        for solver, style in (("heun", "o-"), ("euler", "s--")):
            points = sorted(
                (parse_sampler(key).nfe, value["fd"]) for key, value in student.items() if key.startswith(solver)
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=COLORS.get(name),
                    label=f"{NAMES.get(name, name)}, {solver}",
                )
    axes.axhline(metrics["teacher"]["fd"], color="#15803d", lw=1, label="TarFlow teacher")
    axes.set(xscale="log", xlabel="function evaluations (NFE)", ylabel=_distance(metrics))
    axes.set_ylim(bottom=0)
    ticks = sorted({parse_sampler(text).nfe for text in metrics["config"]["evaluate"]["samplers"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    return figure


def _teacher_plot(metrics: dict[str, Any]) -> Figure:
    figure, axes = _axes()
    curve = metrics["curves"]["teacher"]
    axes.plot(curve["images"], curve["loss"], color="#a3a3a3", lw=1, label="training")
    axes.plot(curve["val_images"], curve["val"], "o-", color="#15803d", ms=3, label="held out (EMA)")
    axes.set(xlabel="training images seen", ylabel="NLL, equation (3), per dimension")
    axes.legend(frameon=False)
    return figure


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _strip(images: NDArray[np.uint8]) -> str:
    """Images (N, C, H, W) side by side with a white pixel between them, as a PNG that the browser enlarges."""
    padded = np.pad(images, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=255)
    strip = np.concatenate(list(padded), axis=2).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(strip.squeeze(2) if strip.shape[2] == 1 else strip).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
