"""The pictures of a report: its plots and rows of samples, and `report.png`, which shows the most telling of them."""

import io
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from numpy.typing import NDArray
from PIL import Image

from nfm.models.solvers import ScheduleName, SolverName, parse_sampler

# The students of the demo, by their names in the report; students of other names have their own names as labels, and
# colours of matplotlib's choice.
COLORS = {"nfm": "#c2410c", "independent": "#1d4ed8", "teacher": "#15803d", "training": "#a3a3a3"}
OTHER_COLORS = ("#7e22ce", "#0f766e", "#be185d", "#a16207", "#4b5563")  # of students with other names, in turn
NAMES = {"nfm": "NFM (teacher's pairs)", "independent": "FM (random pairs)"}
SHORT_NAMES = {"nfm": "NFM", "independent": "FM"}
# By solver and schedule.
LINE_STYLES: dict[tuple[SolverName, ScheduleName], str] = {
    ("heun", "t2"): "o-",
    ("euler", "t2"): "s--",
    ("heun", "t"): "^-.",
    ("euler", "t"): "v:",
}
STRIP_WIDTH = 9.4  # inches of a row of samples in `summary_png`


def student_names(metrics: dict[str, Any]) -> list[str]:
    """NFM first, then by name; JSON keeps no order."""
    return sorted(metrics["students"], key=lambda name: (name != "nfm", name))


def student_colors(metrics: dict[str, Any]) -> dict[str, str]:
    """A color for each student, the same in all plots of a report."""
    colors: dict[str, str] = {}
    for name in student_names(metrics):
        num_others = sum(other not in COLORS for other in colors)
        colors[name] = COLORS.get(name, OTHER_COLORS[num_others % len(OTHER_COLORS)])
    return colors


def distance_name(metrics: dict[str, Any]) -> str:
    """The Fréchet distance is called FID only where it is over Inception features."""
    features = metrics["fd"]["features"]
    return "FID" if features == "inception" else f"Fréchet distance ({features})"


def row_name(name: str) -> str:
    """The label of a row of samples: "real", "teacher", or "<student> <sampler>"."""
    student, _, sampler = name.rpartition(" ")
    if not student:
        return {"real": "training images", "teacher": "TarFlow teacher"}[name]
    parsed = parse_sampler(sampler)
    label = f"{SHORT_NAMES.get(student, student)}, {parsed.solver.capitalize()} {parsed.nfe}"
    return label if parsed.schedule == "t2" else f"{label} (schedule {parsed.schedule})"


def image_strip(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (N, C, H, W) side by side with a white pixel after each: (H, N·(W + 1), C)."""
    padded = np.pad(images, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=255)
    strip: NDArray[np.uint8] = np.concatenate(list(padded), axis=2).transpose(1, 2, 0)
    return strip


def strip_png(images: NDArray[np.uint8]) -> bytes:
    """`image_strip` as a PNG, unscaled."""
    strip = image_strip(images)
    buffer = io.BytesIO()
    Image.fromarray(strip.squeeze(2) if strip.shape[2] == 1 else strip).save(buffer, "PNG")
    return buffer.getvalue()


def plot_loss(axes: Axes, metrics: dict[str, Any]) -> None:
    """Training loss of each student against images."""
    for name in student_names(metrics):
        curve = metrics["curves"][name]
        if not curve["images"]:  # of an imported network
            continue
        axes.plot(
            curve["images"], curve["loss"], color=student_colors(metrics)[name], label=NAMES.get(name, name), lw=1.2
        )
    axes.set(yscale="log", xlabel="training images", ylabel="flow-matching loss per dimension")
    if axes.get_lines():
        axes.legend(frameon=False)


def plot_distance(axes: Axes, metrics: dict[str, Any]) -> None:
    """Fréchet distance against NFE: a line for each student, solver and schedule, and one for the teacher."""
    largest = metrics["teacher"]["fd"]
    samplers = [parse_sampler(text) for text in metrics["config"]["evaluate"]["samplers"]]
    for name in student_names(metrics):
        student = metrics["students"][name]
        for (solver, schedule), style in LINE_STYLES.items():
            distances = {
                sampler.nfe: student[sampler.name]["fd"]
                for sampler in samplers
                if (sampler.solver, sampler.schedule) == (solver, schedule)
            }
            if not distances:
                continue
            largest = max(largest, *distances.values())
            label = f"{NAMES.get(name, name)}, {solver}"
            if schedule != "t2":
                label += f" (schedule {schedule})"
            nfes = sorted(distances)
            axes.plot(nfes, [distances[nfe] for nfe in nfes], style, color=student_colors(metrics)[name], label=label)
    axes.axhline(metrics["teacher"]["fd"], color=COLORS["teacher"], lw=1, label="TarFlow teacher")
    axes.set(xscale="log", xlabel="function evaluations (NFE)", ylabel=distance_name(metrics))
    axes.set_ylim(0, 1.08 * largest)
    ticks = sorted({sampler.nfe for sampler in samplers})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)


def plot_teacher(axes: Axes, metrics: dict[str, Any]) -> None:
    """Training and held-out likelihood of the teacher against images."""
    curve = metrics["curves"]["teacher"]
    axes.plot(curve["images"], curve["loss"], color=COLORS["training"], lw=1, label="training")
    axes.plot(curve["val_images"], curve["val"], "o-", color=COLORS["teacher"], ms=3, label="held out (EMA)")
    axes.set(xlabel="training images", ylabel="NLL, equation (3), per dimension")
    axes.legend(frameon=False)


def plot_png(plot: Any, metrics: dict[str, Any]) -> bytes:
    """One of the plots above as a PNG of its own."""
    figure, axes = plt.subplots(figsize=(6.0, 3.8), layout="constrained")
    _style(axes)
    plot(axes, metrics)
    return _png(figure)


def summary_png(metrics: dict[str, Any], grids: dict[str, NDArray[np.uint8]]) -> bytes:
    """Rows of samples above, if there are any, loss and Fréchet distance below."""
    if not grids:
        figure = plt.figure(figsize=(11, 4.2), layout="constrained")
        _plot_students(figure, metrics)
        return _png(figure)
    images = next(iter(grids.values()))
    strip_height = STRIP_WIDTH * images.shape[2] / (len(images) * (images.shape[3] + 1))  # inches
    heights = [0.4 + len(grids) * (strip_height + 0.05), 4.2]
    figure = plt.figure(figsize=(11, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    samples, plots = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    samples.suptitle("Samples from the same seeds")
    for axes, (name, row) in zip(samples.subplots(len(grids), 1), grids.items(), strict=True):
        strip = image_strip(row)
        axes.imshow(strip.squeeze(2) if strip.shape[2] == 1 else strip, cmap="gray", vmin=0, vmax=255)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_ylabel(row_name(name), rotation=0, ha="right", va="center")
    _plot_students(plots, metrics)
    return _png(figure)


def _plot_students(figure: FigureBase, metrics: dict[str, Any]) -> None:
    """Loss and Fréchet distance side by side."""
    left, right = figure.subplots(1, 2)
    for axes, plot in ((left, plot_loss), (right, plot_distance)):
        _style(axes)
        plot(axes, metrics)


def _style(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return buffer.getvalue()
