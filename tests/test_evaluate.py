"""Evaluation: the progress of its steps, the names of students, and what does not belong together."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nfm.models.sit import SiT, SiTConfig
from nfm.pipeline.cli import nfm
from nfm.pipeline.evaluation import evaluate_and_report
from nfm.stages.checkpoint import Checkpoint, add_prefix, architecture, load, save
from nfm.stages.errors import StageError
from nfm.stages.evaluate import (
    STEPS_WITHOUT_STUDENTS,
    EvaluateConfig,
    Evaluation,
    check_finite,
    check_images,
    evaluate,
    grid_labels,
)
from nfm.stages.frechet import FORCE_WEIGHTS_ONLY, UNPICKLING_ERROR, weights_alone
from nfm.stages.splits import open_splits
from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.progress_log import record_progress
from tests.tools.small_run import SMALL, Run
from tests.tools.stores import block_of, sample_spec

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


def with_document(url: str, folder: Path, changes: dict[str, Any], factor: float = 1.0) -> str:
    """The same model with other fields in its document, and weights that are larger by a factor."""
    checkpoint = load(url)
    tensors = {name: tensor * factor for name, tensor in checkpoint.tensors.items()}
    save(f"{folder}/changed.safetensors", Checkpoint(tensors, checkpoint.document | changes))
    return f"{folder}/changed.safetensors"


def refuse_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*_: Any) -> None:
        raise AssertionError("an evaluation that cannot be finished has begun")

    monkeypatch.setattr(Evaluation, "__init__", compute)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ("1e308", "seconds.CPU"),
        ("1e999", "cost.json"),
        ("NaN", "cost.json"),
        ("-1", "seconds.CPU"),
        ('"1"', "seconds.CPU"),
    ],
)
def test_a_cost_that_is_none_is_refused_before_anything_is_computed(
    run: Run, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: str, message: str
) -> None:
    refuse_computing(monkeypatch)
    couplings = shutil.copytree(run.couplings["webdataset"], tmp_path / "couplings")
    (couplings / "cost.json").write_text(f'{{"seconds": {{"CPU": {seconds}}}}}')
    with pytest.raises(StoreError, match=message) as caught:
        evaluate(CONFIG, run.samples, str(couplings), run.teacher, {"a": student})
    assert "\n" not in str(caught.value)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(
    run: Run, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_computing(monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=rf"^{tmp_path}/file: File exists; expected a folder to write to"):
        evaluate_and_report(
            run.config, run.samples, run.couplings["zarr"], run.teacher, {"a": student}, f"{tmp_path}/file"
        )


@pytest.mark.parametrize("changed", ["teacher", "student"])
@pytest.mark.parametrize("curves", [{}, {"images": [64], "loss": [], "val_images": [], "val": []}])
def test_curves_that_are_none_are_refused_before_anything_is_computed(
    run: Run, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, curves: Any
) -> None:
    refuse_computing(monkeypatch)
    models = {"teacher": run.teacher, "student": student}
    models[changed] = with_document(models[changed], tmp_path, {"curves": curves})
    with pytest.raises(StageError, match=r"changed\.safetensors: its curves"):
        evaluate(CONFIG, run.samples, run.couplings["webdataset"], models["teacher"], {"a": models["student"]})


@pytest.mark.parametrize("couplings", [3, None, [3], [{"name": "x"}], {"id": 3}])
def test_a_student_of_a_strange_run_is_refused(run: Run, student: str, tmp_path: Path, couplings: Any) -> None:
    url = with_document(student, tmp_path, {"run": {"student": {}, "couplings": couplings}})
    with pytest.raises(StageError, match="got a student of other couplings"):
        evaluate(CONFIG, run.samples, run.couplings["webdataset"], run.teacher, {"a": url})


def test_measurements_that_are_not_finite_end_the_evaluation_where_they_are_made(
    run: Run, student: str, tmp_path: Path
) -> None:
    """Samples of 1e18 are finite, but not the squares in their curvature."""
    checkpoint = load(student)
    tensors = dict(checkpoint.tensors)
    weights = tensors["model.final_layer.linear.weight"]
    tensors["model.final_layer.linear.weight"] = 1e18 * (weights / weights.abs().mean())
    save(f"{tmp_path}/large.safetensors", Checkpoint(tensors, checkpoint.document))
    with pytest.raises(FloatingPointError, match=r"student a, euler3: curvature is inf; nothing was written"):
        evaluate(CONFIG, run.samples, run.couplings["webdataset"], run.teacher, {"a": f"{tmp_path}/large.safetensors"})


def test_samples_that_are_not_finite_end_the_evaluation(run: Run, student: str, tmp_path: Path) -> None:
    url = with_document(student, tmp_path, {}, factor=1e37)
    with pytest.raises(FloatingPointError, match=r"student a euler3 made samples that are not finite"):
        evaluate(CONFIG, run.samples, run.couplings["webdataset"], run.teacher, {"a": url})


def test_a_class_without_images_has_no_column_in_the_grid() -> None:
    labels = torch.tensor([3, 0, 3, 1, 0])
    assert grid_labels(labels, 7).tolist() == [0, 1, 3, 0, 1, 3, 0]
    assert grid_labels(labels, 2).tolist() == [0, 1]


def test_what_is_finite_is_returned() -> None:
    measured = {"a": 1.0, "b": {"c": 2, "d": "pixels"}}
    assert check_finite("x", measured) == measured
    with pytest.raises(FloatingPointError, match="x, b: c is nan; nothing was written"):
        check_finite("x", {"a": 1.0, "b": {"c": float("nan")}})


def write_samples(url: str, spec: Spec) -> None:
    writer = StoreWriter(url, spec)
    writer.initialize()
    writer.write_block(0, block_of(spec, 0), None, None)
    writer.finalize()


@pytest.mark.parametrize("changes", [{"shape": (1, 8, 8)}, {"class_names": ["no", "yes", "perhaps"]}])
def test_two_stores_of_other_images_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    train = sample_spec(rows=2)
    write_samples(f"{tmp_path}/train", train)
    changes = changes | {"num_classes": len(changes.get("class_names", train.class_names))}
    write_samples(f"{tmp_path}/val", train.model_copy(update=changes))
    with pytest.raises(StageError, match="val: got another (shape|class_names) than that of .*train; expected"):
        open_splits(str(tmp_path))


def test_a_student_of_other_images_is_refused(run: Run, tmp_path: Path) -> None:
    """Also if it says that it was trained on these couplings."""
    network = SiT(SiTConfig(channels=1, image_size=16, patch=4, width=8, depth=1, heads=1, num_classes=10))
    document = {
        "run": {"student": {}, "couplings": Store(run.couplings["webdataset"]).dataset.id},
        "architecture": architecture(network),
    }
    save(f"{tmp_path}/other.safetensors", Checkpoint(add_prefix("model", network.state_dict()), document))
    with pytest.raises(
        StageError, match=r"got a student of \(1, 16, 16\) images with 10 classes, expected \(1, 8, 8\)"
    ):
        evaluate(CONFIG, run.samples, run.couplings["webdataset"], run.teacher, {"a": f"{tmp_path}/other.safetensors"})


def test_one_held_out_image_is_too_few(tmp_path: Path) -> None:
    for split, rows in (("train", 2), ("val", 1)):
        write_samples(f"{tmp_path}/{split}", sample_spec(rows=rows))
    with pytest.raises(StageError, match="val: got 1 image, expected at least 2, as a Fréchet distance needs"):
        check_images(*open_splits(str(tmp_path)), "pixels")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"samples": 10**12}, r"evaluate\.samples = 1000000000000 of images of 64 values: got about .* GB of memory"),
        ({"features": "pixels"}, r"evaluate\.features = 'pixels' of 64 values an image: got about .* use 'inception'"),
    ],
)
def test_more_than_memory_holds_is_refused_before_anything_is_computed(
    run: Run, student: str, monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any], message: str
) -> None:
    refuse_computing(monkeypatch)
    if "features" in setting:
        monkeypatch.setattr("nfm.stages.memory.memory_bytes", lambda: 150_000)
        monkeypatch.setattr("nfm.stages.checkpoint.check_memory", lambda *_: None)
    with pytest.raises(StageError, match=message):
        evaluate(
            CONFIG.model_copy(update=setting), run.samples, run.couplings["webdataset"], run.teacher, {"a": student}
        )


def test_downloaded_weights_run_no_code(tmp_path: Path) -> None:
    """torch-fidelity asks PyTorch for any pickled object."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (f"{tmp_path}/ran",)

    torch.save({"weight": Bomb()}, tmp_path / "weights.pth")
    with weights_alone(), pytest.raises(UNPICKLING_ERROR):
        torch.hub.load_state_dict_from_url("https://localhost/weights.pth", str(tmp_path))
    assert not (tmp_path / "ran").exists()
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pth")
    with weights_alone():
        weights = torch.hub.load_state_dict_from_url("https://localhost/weights.pth", str(tmp_path))
    assert weights["weight"].tolist() == [1, 1]
    assert FORCE_WEIGHTS_ONLY not in os.environ
