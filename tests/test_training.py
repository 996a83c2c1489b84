"""The one training loop: resumed runs are bit-identical, wrong ones refused, bad numbers stop it."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nfm.models.paths import flow_matching_loss
from nfm.stages.checkpoint import Checkpoint, build, load, load_network, save, weights_sha256
from nfm.stages.errors import StageError
from nfm.stages.progress import Progress
from nfm.stages.train_student import StudentConfig, train_student
from nfm.stages.train_teacher import VAL_DRAWS, train_teacher
from nfm.stages.training import TrainConfig, Trainer, crosses_multiple, learning_rate, step_seed
from nfm.stages.training_checks import divergence_error
from nfm.storage_specs.reading.batches import Batch
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from tests.tools.progress_log import record_progress
from tests.tools.small_run import SMALL, Run
from tests.tools.waiting import PATIENCE


def weights(url: str) -> str:
    return weights_sha256(load(f"{url}/model.safetensors").group("model"))


class InterruptError(Exception):
    """Stands for a kill between two steps."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    original = Trainer._step
    done = 0

    def step(self: Trainer, *arguments: Any) -> Tensor:
        nonlocal done
        if done == steps:
            raise InterruptError
        done += 1
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", step)


@pytest.fixture(scope="module")
def stopped_teacher(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a teacher whose training stopped after a checkpoint."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, steps=7)  # of 10; the last checkpoint was after 5
        with pytest.raises(InterruptError):
            train_teacher(run.config.teacher, run.samples, str(out))
    return out


def test_an_interrupted_teacher_continues_bit_for_bit(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps=7)  # of 10; the last checkpoint was after 5
        with pytest.raises(InterruptError):
            train_teacher(run.config.teacher, run.samples, str(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()
    document = train_teacher(run.config.teacher, run.samples, str(tmp_path))
    whole = load(run.teacher)
    assert weights(str(tmp_path)) == weights_sha256(whole.group("model"))
    assert document["curves"] == whole.document["curves"]


@pytest.mark.parametrize("coupling", ["nfm", "independent"])
def test_an_interrupted_student_continues_bit_for_bit(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coupling: str
) -> None:
    config = run.config.student.model_copy(update={"coupling": coupling})
    couplings = run.couplings["webdataset"]
    train_student(config, couplings, f"{tmp_path}/whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps=7)
        with pytest.raises(InterruptError):
            train_student(config, couplings, f"{tmp_path}/parts")
    train_student(config, couplings, f"{tmp_path}/parts")
    assert weights(f"{tmp_path}/parts") == weights(f"{tmp_path}/whole")


def changed_state(state: Checkpoint, change: str) -> Checkpoint:
    """A state in which something is not as a run wrote it."""
    tensors, document = dict(state.tensors), json.loads(json.dumps(state.document))
    match change:
        case "another shape":
            tensors["network.var"] = torch.ones(3, 3)
        case "another shape of a moment":
            tensors["optimizer.0.exp_avg"] = torch.zeros(3)
        case "no moment":
            del tensors["optimizer.0.exp_avg"]
        case "one tensor more":
            tensors["network.more"] = torch.zeros(3)
        case "half of the best":
            tensors = {name: tensor for name, tensor in tensors.items() if name != "best.var"}
        case "images":
            document["images"] = "320"
        case "stream":
            document["stream"] = {"epoch": 0}
        case "position":
            document["stream"]["position"] = 10**9
        case "curves":
            document["curves"]["loss"].pop()
        case "best":
            document["best_val"] = None
    return Checkpoint(tensors, document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("another shape", r"tensor 'network.var' of shape \[3, 3\], expected shape \[16, 4\]"),
        ("another shape of a moment", r"tensor 'optimizer.0.exp_avg' of shape \[3\], expected shape"),
        ("no moment", r"tensor 'optimizer.0.exp_avg' of none, expected shape"),
        ("one tensor more", r"tensor 'network.more' of shape \[3\], expected none"),
        ("half of the best", r"tensor 'best.var' of none, expected shape"),
        ("images", "'320' images, expected the 320 at which its curves end"),
        ("stream", "expected an epoch and a position"),
        ("position", r"got StreamState\(epoch=1, position=1000000000\); expected .*; begin again"),
        ("curves", "its curves have no points"),
        ("best", "None as its lowest validation"),
    ],
)
def test_a_state_that_no_run_wrote_is_refused(
    run: Run, stopped_teacher: Path, tmp_path: Path, change: str, message: str
) -> None:
    save(f"{tmp_path}/state.safetensors", changed_state(load(f"{stopped_teacher}/state.safetensors"), change))
    with pytest.raises(StageError, match=message) as caught:
        train_teacher(run.config.teacher, run.samples, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_both_layouts_train_the_same_student(run: Run, tmp_path: Path) -> None:
    short = run.config.student.model_copy(update={"train": run.config.student.train.model_copy(update={"images": 128})})
    for layout, url in run.couplings.items():
        # Their ids differ, since their bytes do; what is in them does not.
        train_student(short, url, f"{tmp_path}/{layout}")
    assert weights(f"{tmp_path}/webdataset") == weights(f"{tmp_path}/zarr")


def test_training_and_validation_are_shown_to_their_end(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = record_progress(monkeypatch)
    train_teacher(run.config.teacher, run.samples, str(tmp_path))
    counted = [entry for entry in ended if entry[2] is not None]
    images = VAL_DRAWS * Store(f"{run.samples}/val").spec.rows
    validations = [("validate", images, images)] * 2  # one at each checkpoint
    assert counted == [*validations, ("train-teacher", 640, 640)]
    assert ("write state.safetensors", 0, None) in ended


def test_the_first_batch_and_step_are_announced(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Progress, "set_note", lambda progress, note: notes.append(note))
    interrupt_after(monkeypatch, steps=1)
    with pytest.raises(InterruptError):
        train_student(run.config.student, run.couplings["webdataset"], str(tmp_path))
    assert notes == ["waiting for the first batch", "first step"]


def test_a_finished_run_is_not_trained_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, steps=0)
    document = train_teacher(run.config.teacher, run.samples, str(Path(run.teacher).parent))
    assert document["training"]["images"] == run.config.teacher.train.images


def test_a_folder_of_another_run_is_refused_with_both_values(run: Run) -> None:
    other = run.config.teacher.model_copy(update={"eta": 0.7})
    with pytest.raises(StageError, match=r"another run \(teacher\.eta: existing 0\.3, requested 0\.7\)"):
        train_teacher(other, run.samples, str(Path(run.teacher).parent))


def test_the_checkpoint_is_the_one_with_the_best_held_out_likelihood(run: Run) -> None:
    document = load(run.teacher).document
    curves = document["curves"]
    assert document["training"]["val"] == min(curves["val"])
    assert curves["val_images"] == [320, 640]


def test_couplings_share_everything_but_epsilon(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    import nfm.stages.train_student as module

    original = flow_matching_loss

    def recording(field: nn.Module, path: Any, y: Tensor) -> Tensor:
        x = path.x_t - path.t.view(-1, 1, 1, 1) * path.v  # x_t - t·(ε - x) = x
        seen[name].append((x, path.t, y))
        return original(field, path, y)

    monkeypatch.setattr(module, "flow_matching_loss", recording)
    for name in ("nfm", "independent"):
        seen[name] = []
        config = run.config.student.model_copy(
            update={"coupling": name, "train": run.config.student.train.model_copy(update={"images": 256})}
        )
        train_student(config, run.couplings["webdataset"], f"{tmp_path}/{name}")
    for (x1, t1, y1), (x2, t2, y2) in zip(seen["nfm"], seen["independent"], strict=True):
        torch.testing.assert_close(x1, x2, atol=1e-5, rtol=0)
        assert torch.equal(t1, t2)
        assert torch.equal(y1, y2)


def batch_of(x: Tensor) -> Batch:
    rows = torch.arange(len(x)) + 10
    return Batch(x=x, z=torch.empty(0, *x.shape[1:]), label=rows, index=rows, draw=rows, source=torch.zeros_like(rows))


def test_a_loss_that_is_not_finite_blames_images_only_if_their_values_are_not_finite() -> None:
    x = torch.zeros(4, 1, 2, 2)
    diverged = divergence_error("train", 64, batch_of(x), torch.tensor([0.0, torch.nan, 0.0, 0.0]))
    assert "the loss is nan after 64 images" in str(diverged)
    assert "the training has diverged" in str(diverged)
    gradient = divergence_error("train", 64, batch_of(x), torch.zeros(4))
    assert "the gradient is not finite after 64 images" in str(gradient)
    x[2, 0, 1, 1] = torch.inf
    blamed = divergence_error("train", 64, batch_of(x), torch.full((4,), torch.nan))
    assert "images [12] of the store have values that are not finite" in str(blamed)
    assert "diverged" not in str(blamed)


def test_a_training_that_diverges_stops_and_says_so(run: Run, tmp_path: Path) -> None:
    train = run.config.student.train.model_copy(update={"lr": 1e30, "warmup_images": 0})
    config = run.config.student.model_copy(update={"train": train})
    with pytest.raises(FloatingPointError, match=r"after \d+ images; the values of its images are finite.* lower lr"):
        train_student(config, run.couplings["webdataset"], str(tmp_path))


def test_an_output_that_cannot_be_written_is_refused_before_the_first_step(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Trainer, "_step")
    (tmp_path / "file").write_text("")
    for out in (f"{tmp_path}/file", "/proc/nothing"):
        with pytest.raises(StoreError, match=rf"^{out}: .*; expected a folder to write to, or a new one$"):
            train_student(run.config.student, run.couplings["zarr"], out)


def test_learning_rate() -> None:
    config = TrainConfig(
        images=1000, batch_size=10, lr=1.0, lr_schedule="cosine", warmup_images=100, log_images=1, checkpoint_images=1
    )
    assert learning_rate(config, 0) == pytest.approx(0.1, rel=1e-3)
    assert learning_rate(config, 500) == pytest.approx(0.05 + 0.95 * 0.5)
    assert learning_rate(config, 1000) == pytest.approx(0.05)
    assert learning_rate(config.model_copy(update={"lr_schedule": "constant"}), 500) == 1.0


def test_a_batch_crosses_a_multiple_once() -> None:
    crossings = [images for images in range(30, 301, 30) if crosses_multiple(images, 30, 100)]
    assert crossings == [120, 210, 300]


def test_checkpoints_refuse_what_they_are_not(run: Run, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="checkpoint of TarFlow, expected one of SiT"):
        load_network(run.teacher, "SiT")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04" + b"x" * 100)
    with pytest.raises(StageError, match="no checkpoint of nfm"):
        load(f"{tmp_path}/pickle.safetensors")
    whole = Path(run.teacher).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StageError, match="no checkpoint of nfm"):
        load(f"{tmp_path}/cut.safetensors")
    checkpoint = load(run.teacher)
    wider = json.loads(json.dumps(checkpoint.document))
    wider["architecture"]["width"] = 24
    save(f"{tmp_path}/wider.safetensors", Checkpoint(checkpoint.tensors, wider))
    with pytest.raises(StageError, match="do not fit the architecture"):
        load_network(f"{tmp_path}/wider.safetensors", "TarFlow")
    with pytest.raises(StageError, match="is not one of TarFlow"):
        build(Checkpoint({}, {"architecture": {"name": "TarFlow", "depth": 3}}), "TarFlow", "x")


@pytest.mark.parametrize(("key", "value"), [("width", 1 << 40), ("depths", [1 << 40]), ("image_size", 1 << 30)])
def test_a_hostile_architecture_allocates_nothing(run: Run, key: str, value: Any) -> None:
    checkpoint = load(run.teacher)
    document = json.loads(json.dumps(checkpoint.document))
    document["architecture"][key] = value
    with pytest.raises(StageError, match="architecture"):
        build(Checkpoint(checkpoint.tensors, document), "TarFlow", "x")


def test_the_folder_of_a_model_is_answered_with_the_model_in_it(run: Run, tmp_path: Path) -> None:
    folder = run.teacher.rpartition("/")[0]
    for url in (folder, f"{folder}/"):
        with pytest.raises(StageError, match=f"got a folder, expected a file; the model in it is {run.teacher}"):
            load(url)
    with pytest.raises(StoreError, match="not a regular file|expected a file"):
        load(str(tmp_path))


def test_another_seed_draws_other_numbers() -> None:
    """Of the noise, times and dropped labels too, not only of the weights and the order."""
    assert len({step_seed(seed, images, rank) for seed in (0, 1) for images in (0, 64) for rank in (0, 1)}) == 8
    assert all(0 <= step_seed(seed, 1 << 40, 1000) < 1 << 32 for seed in range(100))


DDP = """
import sys, torch
torch.set_num_threads(1)
from nfm.stages.checkpoint import weights_sha256
from nfm.stages.train_student import StudentConfig, train_student
from nfm.stages.training import Trainer
finish = Trainer._finish
def report(trainer, seconds):
    print("weights", weights_sha256(trainer.network.state_dict()), flush=True)
    return finish(trainer, seconds)
Trainer._finish = report
config = StudentConfig.model_validate_json(sys.argv[1])
train_student(config, sys.argv[2], sys.argv[3])
"""


def start_ranks(program: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """Two processes of one training, as torchrun and Ray Train start them: by the standard variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_two_processes_train_one_student(run: Run, tmp_path: Path) -> None:
    config = run.config.student.model_copy(
        update={"train": run.config.student.train.model_copy(update={"images": 256})}
    )
    processes = start_ranks(DDP, config.model_dump_json(), run.couplings["webdataset"], str(tmp_path))
    printed, errors = zip(*(process.communicate(timeout=PATIENCE) for process in processes), strict=True)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert printed[0] == printed[1] != "", "each rank saw other images, and averaged its gradients with the other's"
    network, document = load_network(f"{tmp_path}/model.safetensors", "SiT")
    assert document["training"]["images"] == 256
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


# The first rank may write no file of more than 1000 bytes: its checkpoint fails as on a full disk.
SMALL_DISK = """
import os, resource, sys, torch
torch.set_num_threads(1)
from nfm.pipeline.cli import main
if sys.argv[1] == "small disk" and os.environ["RANK"] == "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
del sys.argv[1]
main()
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("disk", "settings", "exit_code", "lines"),
    [
        (
            "small disk",
            [],
            2,
            [r"error: .*[Ff]ile too large.*state\.safetensors.*", r"error: .*the first process could not write it.*"],
        ),
        (
            "disk",
            ["student.train.lr=1e30", "student.train.warmup_images=0"],
            1,
            ["failed: .* the training has diverged: .*"] * 2,
        ),
    ],
)
def test_all_processes_say_in_one_line_why_they_stop(
    run: Run, tmp_path: Path, disk: str, settings: list[str], exit_code: int, lines: list[str]
) -> None:
    arguments = [part for setting in [*SMALL, *settings] for part in ("--set", setting)]
    arguments += ["--couplings", run.couplings["webdataset"], "--out", str(tmp_path)]
    processes = start_ranks(SMALL_DISK, disk, "train-student", *arguments)
    errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == [exit_code] * 2, errors
    for error, line in zip(errors, lines, strict=True):
        assert "Traceback" not in error
        assert re.fullmatch(line, error.splitlines()[-1]), error


def test_curves_too_long_for_a_checkpoint_are_refused_at_the_start(run: Run, tmp_path: Path) -> None:
    train = run.config.student.train.model_copy(update={"images": 10**9, "log_images": 1})
    with pytest.raises(StageError, match=r"give curves of \d+ points, expected at most 300000; give larger ones"):
        train_student(
            run.config.student.model_copy(update={"train": train}), run.couplings["webdataset"], str(tmp_path)
        )


def test_config_of_a_student_is_checked() -> None:
    with pytest.raises(ValueError, match="coupling"):
        StudentConfig.model_validate({"size": "SiT-S/2", "coupling": "magic", "train": {}})
