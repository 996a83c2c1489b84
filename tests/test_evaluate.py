"""Evaluation: the progress of its steps, the names of students, and what does not belong together."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nfm.pipeline.cli import nfm
from nfm.stages.checkpoint import Checkpoint, load, save
from nfm.stages.errors import StageError
from nfm.stages.evaluate import STEPS_WITHOUT_STUDENTS, EvaluateConfig, evaluate
from nfm.stages.splits import open_splits
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from tests.tools.progress_log import record_progress
from tests.tools.small_run import SMALL, Run

CONFIG = EvaluateConfig(
    samples=40,
    samplers=["euler3", "heun3"],
    features="pixels",
    batch_size=16,
    grid_columns=4,
    grid_samplers=["euler3:t2"],
)


def test_each_step_is_shown_and_counted_to_its_end(run: Run, student: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = record_progress(monkeypatch)
    students = {"a": student, "b": student}
    metrics, grids = evaluate(CONFIG, run.samples, run.couplings["webdataset"], run.teacher, students)
    assert set(grids) == {"real", "teacher", "a euler3", "b euler3"}, "named as the samplers of the metrics are"
    assert {"euler3", "heun3"} <= metrics["students"]["a"].keys()
    counted = {name: (done, total) for name, done, total in ended if total is not None}
    assert all(done == total for done, total in counted.values()), counted
    train_rows, val_rows = (Store(f"{run.samples}/{split}").spec.rows for split in ("train", "val"))
    tokens = 2 * (16 - 1)  # steps of the teacher for a batch
    expected = {
        "statistics of the training images": train_rows,
        "noise floor": val_rows,
        "resampled training images": 40,
        "distances in z-space": 4 * 40,
        "teacher: round trip": -(-val_rows // 16) * tokens,
        "teacher: samples": 3 * tokens,
        "teacher: image grid": tokens,
        "teacher: Fréchet distance": 40 + 40,
        "evaluate": STEPS_WITHOUT_STUDENTS + 2 * 3,
    }
    for name in ("a", "b"):
        expected |= {f"{name} euler3": 3 * 3, f"{name} heun3": 3 * 3, f"{name}: image grid": 3}
        expected |= {f"{name} {sampler}: Fréchet distance": 40 + 40 for sampler in CONFIG.samplers}
    assert {name: total for name, (_, total) in counted.items()} == expected


def test_a_student_has_a_name_with_a_hyphen(
    run: Run, student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*SMALL, "evaluate.samples=40", "evaluate.samplers=['euler3']", "evaluate.grid_samplers=['euler3']"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    arguments += ["--samples", run.samples, "--couplings", run.couplings["webdataset"], "--teacher", run.teacher]
    arguments += ["--student", f"my-run.2={student}", "--out", str(tmp_path)]
    nfm.main(["evaluate", *arguments], standalone_mode=False)
    *_, features, floor, resampling, report = capsys.readouterr().out.splitlines()
    val_rows = Store(f"{run.samples}/val").spec.rows
    assert re.fullmatch(r"FD: over pixels, of 40 samples to \d+ training images", features)
    assert re.fullmatch(rf"noise floor: FD [\d.]+ of {val_rows} held-out images \([\d.]+ of as many of .*\)", floor)
    assert re.fullmatch(r"resampling: FD [\d.]+ of 40 training images drawn with replacement", resampling)
    assert report == f"report: {tmp_path}/report.html"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["students"]["my-run.2"]["euler3"]["fd"] > 0
    assert "my-run.2" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["my run", "-run", "run-", "", "a/b", "_run"])
def test_other_names_of_students_are_refused(run: Run, student: str, tmp_path: Path, name: str) -> None:
    arguments = ["--samples", run.samples, "--couplings", run.couplings["webdataset"], "--teacher", run.teacher]
    arguments += ["--student", f"{name}={student}", "--out", str(tmp_path)]
    with pytest.raises(StageError, match="expected NAME=URL"):
        nfm.main(["evaluate", *arguments], standalone_mode=False)


def test_two_students_of_one_name_are_refused(run: Run, student: str, tmp_path: Path) -> None:
    arguments = ["--samples", run.samples, "--couplings", run.couplings["webdataset"], "--teacher", run.teacher]
    arguments += ["--student", f"a={student}", "--student", f"a={student}", "--out", str(tmp_path)]
    with pytest.raises(StageError, match="--student a=… twice"):
        nfm.main(["evaluate", *arguments], standalone_mode=False)


def test_a_student_called_teacher_is_refused(run: Run, student: str) -> None:
    with pytest.raises(StageError, match="got a student called 'teacher'"):
        evaluate(run.config.evaluate, run.samples, run.couplings["webdataset"], run.teacher, {"teacher": student})


def test_guidance_needs_students_that_saw_dropped_labels(run: Run, student: str, tmp_path: Path) -> None:
    checkpoint = load(student)
    document: dict[str, Any] = json.loads(json.dumps(checkpoint.document))
    document["run"]["student"]["label_drop"] = 0.0
    save(f"{tmp_path}/plain.safetensors", Checkpoint(checkpoint.tensors, document))
    guided = CONFIG.model_copy(update={"guidance": 2.0})
    with pytest.raises(StageError, match=r"plain.safetensors: got evaluate.guidance 2 for a student that never saw"):
        evaluate(
            guided,
            run.samples,
            run.couplings["webdataset"],
            run.teacher,
            {"plain": f"{tmp_path}/plain.safetensors"},
        )


@pytest.mark.parametrize("suffix", ["/train", "/val", "/train/"])
def test_one_of_the_two_stores_is_answered_with_the_folder_of_both(run: Run, suffix: str) -> None:
    with pytest.raises(StageError) as caught:
        open_splits(run.samples + suffix)
    assert f"got a single store, expected {run.samples}, the folder that prepare wrote" in str(caught.value)


def test_the_two_stores(run: Run) -> None:
    for samples in (run.samples, f"{run.samples}/"):
        train, val = open_splits(samples)
        assert (train.url, val.url) == (f"{run.samples}/train", f"{run.samples}/val")


def test_a_folder_of_no_stores(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no dataset.json"):
        open_splits(str(tmp_path))
