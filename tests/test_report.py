"""The report's pictures and the README's numbers come from one run."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from nfm.pipeline.report_plots import row_name
from tests.tools.docs_pictures import MARKERS, insert, numbers

README = Path(__file__).parent.parent / "README.md"


def test_rows_of_samples_are_named_by_model_and_sampler() -> None:
    assert row_name("real") == "training images"
    assert row_name("nfm heun31") == "NFM, Heun 31"
    assert row_name("independent euler3") == "FM, Euler 3"
    assert row_name("my run-2 euler3") == "my run-2, Euler 3"


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
