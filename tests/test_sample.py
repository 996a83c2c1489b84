"""Sampling: its progress, and the options that do not apply to a model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.models.solvers import parse_sampler
from nfm.stages.checkpoint import Checkpoint, load, save
from nfm.stages.errors import StageError
from nfm.stages.sample import SampleRequest, sample
from tests.tools.progress_log import record_progress
from tests.tools.small_run import Run


def without_dropped_labels(url: str, section: str, folder: Path) -> str:
    """The same model, as if no label had been dropped in its training."""
    checkpoint = load(url)
    document: dict[str, Any] = json.loads(json.dumps(checkpoint.document))
    document["run"][section]["label_drop"] = 0.0
    copy = f"{folder}/{section}.safetensors"
    save(copy, Checkpoint(checkpoint.tensors, document))
    return copy


def test_progress_counts_what_the_networks_do(
    run: Run, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = record_progress(monkeypatch)
    sample(run.teacher, f"{tmp_path}/teacher.npz", SampleRequest(5, batch_size=2))
    sample(student, f"{tmp_path}/student.npz", SampleRequest(5, parse_sampler("heun7"), guidance=2.0, batch_size=2))
    tokens = 3 * load_decode_steps(run)
    assert [entry for entry in ended if entry[0] == "sample"] == [("sample", tokens, tokens), ("sample", 21, 21)]


def load_decode_steps(run: Run) -> int:
    """Sequential steps of the teacher for a batch: 2 blocks of 16 tokens, of which the first needs no step."""
    assert run.config.teacher.notation == "TF-2×1-16/2"
    return 2 * (16 - 1)


@pytest.mark.parametrize(("part", "message"), [("run", "KeyError: 'teacher'"), ("training", "KeyError: 'images'")])
def test_a_teacher_must_say_how_it_was_trained(run: Run, tmp_path: Path, part: str, message: str) -> None:
    checkpoint = load(run.teacher)
    save(f"{tmp_path}/bare", Checkpoint(checkpoint.tensors, checkpoint.document | {part: {}}))
    with pytest.raises(StageError, match=f"does not say how it was trained .{message}"):
        sample(f"{tmp_path}/bare", f"{tmp_path}/images.png", SampleRequest(1))


def test_a_student_takes_heun31_if_no_sampler_is_given(student: str, tmp_path: Path) -> None:
    sample(student, f"{tmp_path}/default.npz", SampleRequest(3))
    sample(student, f"{tmp_path}/heun31.npz", SampleRequest(3, parse_sampler("heun31")))
    default, heun31 = (np.load(f"{tmp_path}/{name}.npz", allow_pickle=False)["x"] for name in ("default", "heun31"))
    assert np.array_equal(default, heun31)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("teacher", {"sampler": parse_sampler("euler5")}, "--sampler euler5 for a teacher.* expected no --sampler"),
        ("teacher", {"guidance": 0.5}, "--guidance 0.5 for a teacher, expected a number of at least 1"),
        ("student", {"guidance": -1.0}, "--guidance -1 for a student, expected a number of at least 0"),
        ("student", {"guidance": math.nan}, "--guidance nan for a student"),
        ("student", {"guidance": math.inf}, "--guidance inf for a student"),
        ("student", {"guidance": 2.0, "classes": (-1,)}, "--guidance 2 for images without a class"),
        ("teacher", {"guidance": 2.0, "classes": (-1, -1)}, "--guidance 2 for images without a class"),
        ("student", {"classes": (10,)}, "class 10, expected 0 to 9"),
    ],
)
def test_options_that_do_not_apply(
    run: Run, student: str, tmp_path: Path, model: str, changes: dict[str, Any], message: str
) -> None:
    url = {"teacher": run.teacher, "student": student}[model]
    with pytest.raises(StageError, match=message):
        sample(url, f"{tmp_path}/x.npz", SampleRequest(count=4, **changes))
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_guidance_needs_a_model_that_saw_dropped_labels(run: Run, student: str, tmp_path: Path, model: str) -> None:
    url = without_dropped_labels({"teacher": run.teacher, "student": student}[model], model, tmp_path)
    with pytest.raises(StageError, match=r"never saw a dropped label \(label_drop = 0\)"):
        sample(url, f"{tmp_path}/x.npz", SampleRequest(count=4, guidance=2.0))
    sample(url, f"{tmp_path}/x.npz", SampleRequest(count=4))
    assert (tmp_path / "x.npz").exists()
