"""Sampling: its progress, and the options that do not apply to a model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfm.models.sit import SiT, SiTConfig
from nfm.models.solvers import parse_sampler
from nfm.stages.checkpoint import Checkpoint, add_prefix, architecture, load, save
from nfm.stages.errors import StageError
from nfm.stages.sample import SampleRequest, sample
from nfm.storage_specs.format.pixels import to_uint8
from nfm.storage_specs.storage.errors import StoreError
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


def scaled(url: str, factor: float, folder: Path) -> str:
    """The same model with weights so large that what it makes is not finite."""
    checkpoint = load(url)
    copy = f"{folder}/scaled.safetensors"
    save(copy, Checkpoint({name: tensor * factor for name, tensor in checkpoint.tensors.items()}, checkpoint.document))
    return copy


@pytest.mark.parametrize("model", ["teacher", "student"])
@pytest.mark.parametrize("suffix", ["png", "npz"])
def test_samples_that_are_not_finite_are_not_written(
    run: Run, student: str, tmp_path: Path, model: str, suffix: str
) -> None:
    url = scaled({"teacher": run.teacher, "student": student}[model], 1e37, tmp_path)
    with pytest.raises(FloatingPointError, match=r"scaled\.safetensors: \d+ of 4 images are not finite; nothing was"):
        sample(url, f"{tmp_path}/x.{suffix}", SampleRequest(count=4))
    assert not (tmp_path / f"x.{suffix}").exists()


def test_guidance_that_overflows_writes_nothing(student: str, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="images are not finite"):
        sample(student, f"{tmp_path}/x.png", SampleRequest(count=4, guidance=1e300))
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_pixels_are_made_of_finite_images_alone(value: float) -> None:
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 1, 1] = value
    with pytest.raises(FloatingPointError, match="1 of 3 images are not finite"):
        to_uint8(images)


def wide_student(folder: Path, size: int, channels: int = 1) -> str:
    """A small student of large images: one patch is an eighth of their side."""
    network = SiT(SiTConfig(channels, size, size // 8, width=4, depth=1, heads=1, num_classes=2))
    document = {"run": {"student": {}}, "architecture": architecture(network)}
    save(f"{folder}/wide.safetensors", Checkpoint(add_prefix("model", network.state_dict()), document))
    return f"{folder}/wide.safetensors"


def test_more_images_than_a_grid_or_memory_holds_are_refused_with_what_they_need(tmp_path: Path) -> None:
    url = wide_student(tmp_path, 4096)
    with pytest.raises(
        StageError, match=r"100 images of 1×4096×4096 for a grid, which needs 1\.7 GB, expected at most"
    ):
        sample(url, f"{tmp_path}/x.png", SampleRequest(count=100))
    with pytest.raises(StageError, match=r"1000000 images of 1×4096×4096: got about 33,\d+\.\d GB of memory to fill"):
        sample(url, f"{tmp_path}/x.npz", SampleRequest(count=1_000_000))


def test_a_grid_is_grey_or_coloured(tmp_path: Path) -> None:
    url = wide_student(tmp_path, 16, channels=2)
    with pytest.raises(StageError, match=r"4 images of 2×16×16 for a grid, expected 1 or 3 channels; .* \.npz"):
        sample(url, f"{tmp_path}/x.png", SampleRequest(count=4))
    sample(url, f"{tmp_path}/x.npz", SampleRequest(count=4))
    assert np.load(f"{tmp_path}/x.npz", allow_pickle=False)["x"].shape == (4, 2, 16, 16)


def test_large_images_pass_in_smaller_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = wide_student(tmp_path, 64)
    sample(url, f"{tmp_path}/whole.npz", SampleRequest(count=10))
    monkeypatch.setattr("nfm.stages.sample.BATCH_VALUES", 3 * 64**2)
    ended = record_progress(monkeypatch)
    sample(url, f"{tmp_path}/parts.npz", SampleRequest(count=10))
    assert ("sample", 4 * 31, 4 * 31) in ended
    whole, parts = (np.load(f"{tmp_path}/{name}.npz", allow_pickle=False)["x"] for name in ("whole", "parts"))
    np.testing.assert_array_equal(whole, parts)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_generated(
    student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("nfm.stages.sample.generate")
    with pytest.raises(StoreError, match=r"^/dev/null: File exists; expected a folder to write to"):
        sample(student, "/dev/null/x.png", SampleRequest(count=1))
