"""What encoding costs and saves: arithmetic against numbers worked out by hand, and the estimate of a real job."""

import json
import re
import sys
from pathlib import Path

import pytest

from nfm.models.sit import SiTConfig, parse_size, training_flops
from nfm.models.tarflow import TarFlowConfig, forward_flops, parse_notation
from nfm.pipeline import encode_estimate
from nfm.pipeline.cli import main
from nfm.pipeline.config import load_config
from nfm.pipeline.encode_estimate import compare_costs, estimate_job
from nfm.pipeline.encode_report import format_flop
from nfm.stages.encode import load_teacher
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.store import Store
from tests.tools.small_run import Run

README = Path(__file__).parent.parent / "README.md"
IMAGENET_IMAGES = 1_281_167


def test_the_comparison_against_numbers_worked_out_by_hand() -> None:
    """1,000 images with 4 draws, students of 10,000 images, 6 FLOP a teacher forward, 2 FLOP a training image, and a
    worker that does one pair in 3.6 s."""
    costs = compare_costs(1000, 4, 10_000, forward_flop=6, student_flop_per_image=2, pairs_per_second=1 / 3.6)
    assert (costs.store_pairs, costs.store_flop) == (4000, 24_000)
    assert costs.store_hours == pytest.approx(4)
    assert costs.loop_flop == 60_000
    assert costs.loop_hours == pytest.approx(10)
    assert costs.student_flop == 20_000
    assert costs.break_even_students == pytest.approx(0.4)
    assert costs.max_draws == 10
    assert [costs.saved_flop(students) for students in (0, 1, 5)] == [-24_000, 36_000, 276_000]
    assert costs.saved_hours(5) == pytest.approx(46)


def test_a_student_that_sees_few_images_is_cheaper_with_a_teacher_in_the_loop() -> None:
    costs = compare_costs(1000, 4, 500, forward_flop=6, student_flop_per_image=2, pairs_per_second=1.0)
    assert costs.break_even_students == 8
    assert costs.max_draws == 0
    assert costs.saved_flop(7) < 0 < costs.saved_flop(9)
    assert costs.saved_flop(8) == 0


def test_the_numbers_of_the_readme_are_those_of_the_imagenet64_preset() -> None:
    config = load_config("imagenet64")
    teacher = TarFlowConfig(3, 64, num_classes=1000, **parse_notation(config.teacher.notation))
    student = SiTConfig(channels=3, image_size=64, num_classes=1000, **parse_size(config.student.size))
    costs = compare_costs(
        IMAGENET_IMAGES,
        config.encode.draws,
        config.student.train.images,
        forward_flops(teacher),
        training_flops(student),
        pairs_per_second=1.0,
    )
    text = README.read_text(encoding="utf-8")
    for flop in (costs.store_flop, costs.loop_flop, costs.student_flop, forward_flops(teacher)):
        assert format_flop(flop) in text
    assert format_flop(costs.student_flop + costs.loop_flop) in text
    assert format_flop(costs.student_flop + costs.store_flop) in text


@pytest.mark.parametrize(("flop", "text"), [(1.9247e12, "1.92 TFLOP"), (5.167e20, "517 EFLOP"), (12, "12 FLOP")])
def test_flop_with_a_prefix(flop: float, text: str) -> None:
    assert format_flop(flop) == text


@pytest.mark.usefixtures("ray_cluster")
def test_the_estimate_has_the_bytes_and_files_of_the_store(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encode_estimate, "TRIAL_SECONDS", 0.1)
    samples, student, out = f"{run.samples}/train", run.config.student, str(tmp_path / "out")
    layouts: tuple[LayoutName, ...] = ("webdataset", "zarr")
    for layout in layouts:
        config = run.config.encode.model_copy(update={"layout": layout})
        text = estimate_job(config, student, samples, run.teacher, out).describe()
        totals = Store(run.couplings[layout]).dataset.totals
        assert f"{totals.files} files of {totals.bytes / 1e9:.4g} GB" in text
        assert "537 pairs to encode in 6 units (6 blocks)" in text
        assert [line.split()[0] for line in text.splitlines()[1:5]] == ["workers", "1", "8", "64"]
        assert "K·N = 3 × 179 = 537 training images of all students together, which is 0.839 students" in text
        assert "for one student alone it pays up to K = 3 (640 / 179 images)" in text
        saved = text.splitlines()[-1]
        work = r"\S+ \wFLOP, \S+ worker hours"
        students = f"1 student: {work}; 4 students: {work}; 16 students: {work}"
        assert re.fullmatch(f"teacher work saved by the store: {students}", saved)
        assert f"{format_flop((640 - 537) * forward_flops(load_teacher(run.teacher)[0].config))}, " in saved
    assert not (tmp_path / "out").exists(), "an estimate writes nothing"
    statuses = capsys.readouterr().err
    assert "encode: waiting for the first worker" in statuses
    assert "encode: timing the teacher for 0 s on one worker" in statuses
    few_images = student.model_copy(update={"train": student.train.model_copy(update={"images": 100})})
    finished = estimate_job(run.config.encode, few_images, samples, run.teacher, run.couplings["webdataset"])
    assert "1 student: none, it costs " in finished.describe().splitlines()[-1]
    assert (finished.pending_pairs, finished.pending_units, finished.hours(8)) == (0, 0, 0)


@pytest.mark.usefixtures("ray_cluster")
def test_the_estimate_for_machines(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encode_estimate, "TRIAL_SECONDS", 0.1)
    arguments = ["--samples", f"{run.samples}/train", "--teacher", run.teacher, "--out", f"{tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", ["nfm", "encode", *arguments, "--draws", "3", "--estimate", "--json-progress"])
    main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["event"] for line in lines[:-1]} == {"status"}
    assert lines[-1]["event"] == "estimate"
    assert (lines[-1]["pending_pairs"], lines[-1]["pending_units"]) == (537, 6)
    assert lines[-1]["comparison"]["store_pairs"] == 537
