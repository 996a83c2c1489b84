"""The report's pictures and the README's numbers come from one run."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from nfm.pipeline.report_plots import COLORS, plot_distance, row_name, student_colors
from tests.tools.docs_pictures import MARKERS, insert, numbers

README = Path(__file__).parent.parent / "README.md"


def test_rows_of_samples_are_named_by_model_and_sampler() -> None:
    assert row_name("real") == "training images"
    assert row_name("nfm heun31") == "NFM, Heun 31"
    assert row_name("independent euler3") == "FM, Euler 3"
    assert row_name("my run-2 euler3") == "my run-2, Euler 3"
    assert row_name("nfm heun31:t") == "NFM, Heun 31 (schedule t)"


def test_samplers_of_two_schedules_are_two_lines() -> None:
    distances = {"heun7": 0.5, "heun31": 0.2, "heun31:t": 0.3, "euler5": 0.9}
    metrics = {
        "teacher": {"fd": 0.1},
        "fd": {"features": "pixels"},
        "students": {"nfm": {name: {"fd": distance} for name, distance in distances.items()}},
        "config": {"evaluate": {"samplers": ["heun31", "heun7", "heun31:t", "euler5:t2"]}},
    }
    figure, axes = plt.subplots()
    plot_distance(axes, metrics)
    lines = {
        str(line.get_label()): (np.ravel(line.get_xdata()).tolist(), np.ravel(line.get_ydata()).tolist())
        for line in axes.get_lines()
    }
    plt.close(figure)
    assert lines.pop("TarFlow teacher")[1] == [0.1, 0.1]
    assert lines == {
        "NFM (teacher's pairs), heun": ([7, 31], [0.5, 0.2]),
        "NFM (teacher's pairs), heun (schedule t)": ([31], [0.3]),
        "NFM (teacher's pairs), euler": ([5], [0.9]),
    }


def test_students_have_colors_of_their_own() -> None:
    colors = student_colors({"students": {"my-run": {}, "nfm": {}, "fm2": {}}})
    assert colors["nfm"] == COLORS["nfm"]
    assert len({*colors.values(), COLORS["teacher"]}) == 4


def test_the_report_has_a_picture_of_its_own(home: Path) -> None:
    with Image.open(io.BytesIO((home / "runs/demo/report.png").read_bytes())) as picture:
        assert picture.width > 1200
        assert len(picture.getcolors(1 << 24) or []) > 100, "an empty picture"


def test_the_readme_takes_its_numbers_from_metrics(home: Path) -> None:
    metrics = json.loads((home / "runs/demo/metrics.json").read_text())
    text = numbers(metrics)
    for name in ("nfm", "independent"):
        student = metrics["students"][name]
        row = next(line for line in text.splitlines() if f"| {student['loss']:.3f} |" in line)
        assert row.endswith(f"| {student['euler5']['fd']:.3f} | {student['euler3']['fd']:.3f} |")
    readme = insert(README.read_text(), text)
    start, end = MARKERS
    assert readme.partition(start)[2].partition(end)[0] == text
    assert insert(readme, text) == readme


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(AssertionError, match="README.md has no"):
        insert("nothing", "numbers")
