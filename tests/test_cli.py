"""What users meet: help that reads well, and for each mistake one clear line, exit code 2 and nothing half-written."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfm.pipeline.cli import nfm
from nfm.stages.checkpoint import Checkpoint, load, save, weights_sha256
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.messages import count, list_numbers
from tests.tools.small_run import SMALL, Nfm, Run
from tests.tools.waiting import PATIENCE, wait_for


def small(*extra: str) -> list[str]:
    return [part for setting in (*SMALL, *extra) for part in ("--set", setting)]


def is_one_clear_line(result: tuple[int, str, str], *needles: str) -> None:
    code, _, err = result
    progress = re.compile(r"(note|check|prepare|encode|train|sample|evaluate|verify|list|open|read|write)\b")
    lines = [line for line in err.splitlines() if not progress.match(line)]
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in err
    for needle in needles:
        assert needle in lines[0]


COMMANDS = [(), *((name,) for name in sorted(nfm.commands)), ("store", "info"), ("store", "verify")]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_reads_well(call: Nfm, command: tuple[str, ...]) -> None:
    code, out, _ = call(*command, "--help")
    assert code == 0
    assert "Usage:" in out
    for option in re.findall(r"^  (--[a-z-]+) ?[A-Z=.]*\n(?!   )", out, re.MULTILINE):
        assert option in ("--version",), f"{option} has no help"


def test_dry_run_prints_the_resolved_config(call: Nfm, tmp_path: Path) -> None:
    code, out, _ = call(
        "encode", "--samples", "a", "--teacher", "b", "--out", f"{tmp_path}/x", "--draws", "5", "--dry-run",
        "--preset", "imagenet64", "--set", "encode.layout=zarr", "--set", "encode.draws=7",
    )  # fmt: skip
    resolved = tomllib.loads(out)
    assert code == 0
    assert (resolved["encode"]["draws"], resolved["encode"]["layout"]) == (5, "zarr")
    assert resolved["teacher"]["notation"] == "TF-6×2+2×26-1024/2"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["--preset", "nothing"], ["'nothing'", "expected one of", "digits"]),
        (["--set", "teacher.etta=0.1"], ["unknown key teacher.etta", "eta"]),
        (["--set", "student.train.lrr=0.1"], ["unknown key student.train.lrr", "weight_decay"]),
        (["--set", "nosection.a=1"], ["unknown key nosection"]),
        (["--set", "teacher.eta"], ["expected section.key=value"]),
        (["--set", "teacher.eta=-1"], ["teacher.eta", "-1"]),
        (["--set", "teacher.eta=inf"], ["teacher.eta", "finite"]),
        (["--set", "encode.draws=70000"], ["encode.draws", "65536"]),
        (["--set", "encode.layout=hdf5"], ["encode.layout", "webdataset"]),
        (["--set", "evaluate.samplers=['rk45']"], ["rk45"]),
    ],
)
def test_config_mistakes(call: Nfm, tmp_path: Path, arguments: list[str], needles: list[str]) -> None:
    is_one_clear_line(call("prepare", "--out", f"{tmp_path}/out", *arguments), *needles)
    assert not (tmp_path / "out").exists()


def test_each_of_several_config_mistakes_is_a_line(call: Nfm, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[data]\nimage_size = 1\n", encoding="utf-8")
    code, out, err = call("prepare", "--out", f"{tmp_path}/out", "--preset", f"{tmp_path}/mine.toml")
    assert (code, out) == (2, "")
    first, *lines = err.splitlines()
    assert first.startswith(f"error: preset {tmp_path}/mine.toml: {len(lines)} keys are missing or wrong")
    assert "  data.image_size: got 1; expected integer ≥ 2 and ≤ 4096" in lines
    assert "  teacher.train.lr is missing; expected number > 0" in lines
    assert not (tmp_path / "out").exists()


def test_data_folder_mistakes(call: Nfm, tmp_path: Path) -> None:
    folder = ["--set", "data.source=folder", "--out", f"{tmp_path}/out"]
    is_one_clear_line(call("prepare", *folder, "--data", f"{tmp_path}/none"), "none/train", "no such folder")
    digits = call("prepare", "--data", f"{tmp_path}/none", "--out", f"{tmp_path}/out")
    is_one_clear_line(digits, "none/train", "no such folder")
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    is_one_clear_line(call("prepare", *folder, "--data", f"{tmp_path}/empty"), "got no images")


def test_images_that_do_not_decode(call: Nfm, images: Path, tmp_path: Path) -> None:
    (images / "train" / "cat" / "broken.png").write_bytes(b"\x89PNG and no more")
    arguments = ["prepare", "--set", "data.source=folder", "--set", "data.holdout=0.4", "--data", str(images)]
    is_one_clear_line(call(*arguments, "--out", f"{tmp_path}/out"), "cat/broken.png", "--skip-bad-images")
    assert call(*arguments, "--out", f"{tmp_path}/out", "--skip-bad-images")[0] == 0


def test_a_store_that_is_not_there(call: Nfm, tmp_path: Path) -> None:
    is_one_clear_line(call("store", "info", f"{tmp_path}/none"), "no dataset.json")
    result = call("train-student", "--couplings", f"{tmp_path}/none", "--out", f"{tmp_path}/out")
    is_one_clear_line(result, "no dataset.json")
    is_one_clear_line(call("store", "info", "nonsense://bucket"), "nonsense")


def test_a_sample_store_where_couplings_are_wanted(call: Nfm, run: Run, tmp_path: Path) -> None:
    result = call("train-student", "--couplings", f"{run.samples}/train", "--out", f"{tmp_path}/out")
    is_one_clear_line(result, "store of samples, expected one of couplings")


def test_a_truncated_store_file(call: Nfm, run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.couplings["webdataset"], tmp_path / "store")
    damaged = tmp_path / "store" / "z" / "k001" / "000002.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    arguments = ["train-student", *small(), "--couplings", f"{tmp_path}/store", "--out", f"{tmp_path}/out"]
    is_one_clear_line(call(*arguments), "z/k001/000002.tar", "truncated")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    code, _, err = call("store", "verify", f"{tmp_path}/store")
    assert code == 2
    assert "z/k001/000002.tar" in err
    assert call("store", "verify", run.couplings["webdataset"])[0] == 0


def test_a_checkpoint_of_another_architecture(call: Nfm, run: Run, tmp_path: Path) -> None:
    student = f"{tmp_path}/student"
    trained = call(
        "train-student", *small("student.train.images=64"), "--couplings", run.couplings["zarr"], "--out", student
    )
    assert trained[0] == 0
    arguments = ["encode", *small(), "--samples", f"{run.samples}/train", "--out", f"{tmp_path}/out"]
    is_one_clear_line(call(*arguments, "--teacher", f"{student}/model.safetensors"), "checkpoint of SiT", "TarFlow")
    is_one_clear_line(call(*arguments, "--teacher", f"{tmp_path}/none.safetensors"), "none.safetensors is missing")
    assert not (tmp_path / "out").exists()
    sizes = call("train-teacher", *small("teacher.notation=TF-2"), "--samples", run.samples, "--out", f"{tmp_path}/t")
    is_one_clear_line(sizes, "TF-2", "expected one like")


def test_encode_of_a_truncated_sample_store(call: Nfm, ray_cluster: None, run: Run, tmp_path: Path) -> None:
    """The error of a worker reaches the user as itself."""
    shutil.copytree(f"{run.samples}/train", tmp_path / "samples")
    damaged = tmp_path / "samples" / "x" / "000003.tar"
    damaged.write_bytes(damaged.read_bytes()[:-600])
    arguments = ["encode", *small(), "--samples", f"{tmp_path}/samples", "--teacher", run.teacher]
    is_one_clear_line(call(*arguments, "--out", f"{tmp_path}/out"), "x/000003.tar", "truncated")


def test_evaluate_refuses_what_does_not_belong_together(call: Nfm, run: Run, tmp_path: Path) -> None:
    checkpoint = load(run.teacher)
    moved = {name: tensor + 0.1 for name, tensor in checkpoint.tensors.items()}
    save(f"{tmp_path}/other.safetensors", Checkpoint(moved, checkpoint.document))
    arguments = ["evaluate", *small(), "--samples", run.samples, "--couplings", run.couplings["zarr"]]
    arguments += ["--student", f"nfm={run.teacher}", "--out", f"{tmp_path}/out"]
    is_one_clear_line(call(*arguments, "--teacher", run.teacher), "checkpoint of TarFlow, expected one of SiT")
    student = f"{tmp_path}/student"
    trained = call(
        "train-student", *small("student.train.images=64"), "--couplings", run.couplings["webdataset"], "--out", student
    )
    assert trained[0] == 0
    arguments[arguments.index("--student") + 1] = f"nfm={student}/model.safetensors"
    is_one_clear_line(call(*arguments, "--teacher", f"{tmp_path}/other.safetensors"), "another teacher")
    is_one_clear_line(call(*arguments, "--teacher", run.teacher), "student of other couplings")


ENDLESS_MODULE = """
import time
print("importing", flush=True)
while True:
    time.sleep(1)
"""


CONTINUES = "interrupted; run the same command again to continue"


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        ("click", ["prepare", "--out", "out"], "interrupted"),
        ("torch", ["prepare", "--out", "out"], CONTINUES),
        ("torch", ["sample", "model.safetensors", "--out", "out.png"], "interrupted"),
    ],
)
def test_ctrl_c_while_it_is_still_importing(tmp_path: Path, package: str, arguments: list[str], message: str) -> None:
    """In the import of a package that the command line needs, and of one that only the stages need. Of the commands,
    prepare continues when it is run again, and sample does not."""
    (tmp_path / f"{package}.py").write_text(ENDLESS_MODULE)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "nfm", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == message
    assert "Traceback" not in err


def test_a_folder_of_another_run(call: Nfm, run: Run) -> None:
    out = str(Path(run.teacher).parent)
    result = call("train-teacher", *small("teacher.eta=0.9"), "--samples", run.samples, "--out", out)
    is_one_clear_line(result, "another run", "0.9")


def test_samples_of_teacher_and_student(call: Nfm, run: Run, tmp_path: Path) -> None:
    out = f"{tmp_path}/grid.png"
    assert call("sample", run.teacher, "--out", out, "--count", "9", "--class", "3")[0] == 0
    with Image.open(out) as picture:
        assert picture.size == (3 * 33 - 1, 3 * 33 - 1)
    assert call("sample", run.teacher, "--out", f"{tmp_path}/x.npz", "--count", "4", "--guidance", "2")[0] == 0
    with np.load(f"{tmp_path}/x.npz", allow_pickle=False) as arrays:
        assert arrays["x"].shape == (4, 1, 8, 8)
        assert arrays["label"].tolist() == [0, 1, 2, 3]
    is_one_clear_line(call("sample", run.teacher, "--out", out, "--class", "10"), "class 10", "0 to 9")
    is_one_clear_line(call("sample", run.teacher, "--out", out, "--sampler", "heun8"), "heun", "odd")
    is_one_clear_line(call("sample", run.teacher, "--out", f"{tmp_path}/x.gif"), ".png or .npz")


def test_options_that_do_not_apply_say_so(call: Nfm, run: Run, tmp_path: Path) -> None:
    out = f"{tmp_path}/out"
    sampler = call("sample", run.teacher, "--out", f"{out}.npz", "--sampler", "euler5")
    is_one_clear_line(sampler, "--sampler euler5 for a teacher", "expected no --sampler")
    guidance = call("sample", run.teacher, "--out", f"{out}.npz", "--guidance", "0.5")
    is_one_clear_line(guidance, "--guidance 0.5 for a teacher", "at least 1")
    weight = call("train-student", "--couplings", run.couplings["zarr"], "--weight", "2", "--out", out)
    is_one_clear_line(weight, "--weight for one store", "expected several --couplings")
    is_one_clear_line(call("prepare", "--out", out, "--skip-bad-images"), "--skip-bad-images for the digits", "--data")
    is_one_clear_line(call("store", "verify", run.couplings["zarr"], "--seed", "1"), "--seed without --reencode")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train-teacher", "evaluate"])
def test_one_of_the_two_sample_stores_is_answered_with_their_folder(
    call: Nfm, run: Run, tmp_path: Path, command: str
) -> None:
    arguments = [command, *small(), "--samples", f"{run.samples}/train", "--out", f"{tmp_path}/out"]
    if command == "evaluate":
        arguments += ["--couplings", run.couplings["zarr"], "--teacher", run.teacher, "--student", f"a={run.teacher}"]
    is_one_clear_line(call(*arguments), "got a single store", f"expected {run.samples}, the folder that prepare wrote")
    assert not (tmp_path / "out").exists()


def test_the_folder_of_both_sample_stores_is_answered_with_one_of_them(call: Nfm, run: Run, tmp_path: Path) -> None:
    arguments = ["encode", *small(), "--samples", run.samples, "--teacher", run.teacher, "--out", f"{tmp_path}/out"]
    is_one_clear_line(call(*arguments), "got a folder of stores", f"{run.samples}/train or {run.samples}/val")
    assert not (tmp_path / "out").exists()


def test_pairs_that_are_encoded_again_are_counted(call: Nfm, run: Run) -> None:
    arguments = ["store", "verify", run.couplings["webdataset"], "--reencode", "5", "--teacher", run.teacher]
    code, out, err = call(*arguments)
    assert code == 0
    assert "encode again: 0/5 pair, starting" in err
    assert "encode again: 5/5 pair, done in" in err
    assert "z of 5 pairs encoded again" in out
    _, out, _ = call(*("1000000000000" if argument == "5" else argument for argument in arguments))
    spec = Store(run.couplings["webdataset"]).spec
    assert f"z of {spec.rows * spec.num_draws} pairs encoded again" in out, "all that there are"


def test_messages_count_and_list_numbers() -> None:
    assert (count(1, "block"), count(2, "block"), count(0, "fault")) == ("1 block", "2 blocks", "0 faults")
    assert list_numbers([4, 1]) == "1, 4"
    assert list_numbers(range(100, 123)).endswith(", 118, 119 and 3 more")


def test_repair_names_the_blocks_to_write_again(call: Nfm, run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.couplings["zarr"], tmp_path / "store")
    for block in (1, 4):
        damaged = tmp_path / "store" / "columns.zarr" / "x" / "c" / str(block) / "0" / "0" / "0"
        damaged.write_bytes(b"")
    code, out, _ = call("store", "repair", f"{tmp_path}/store")
    assert code == 0
    assert "2 blocks (1, 4) must be written again; run the command that wrote the store" in out


def test_unknown_options_exit_with_2(call: Nfm) -> None:
    assert call("prepare", "--nothing")[0] == 2
    assert call("nothing")[0] == 2


def test_info_shows_what_the_store_holds(call: Nfm, run: Run) -> None:
    _, out, _ = call("store", "info", run.couplings["webdataset"])
    store = Store(run.couplings["webdataset"])
    for needle in ("couplings, webdataset", "3 per image, η = 0.3", str(store.spec.rows), store.dataset.id):
        assert needle in out


def test_info_lists_versions_and_annotate_says_what_changed(call: Nfm, run: Run, tmp_path: Path) -> None:
    url = f"{tmp_path}/store"
    shutil.copytree(run.couplings["zarr"], url)
    content = Store(url).dataset.id[:12]
    call("store", "tag", url, "paper")
    assert call("store", "annotate", url, "--licence", "MIT")[1] == f"{url}: version 2, id {content}\n"
    again = call("store", "annotate", url, "--licence", "MIT")
    assert again[1] == f"{url}: nothing changed, version 2 stays, id {content}\n"
    out = call("store", "info", url)[1].splitlines()
    assert f"{'versions':12}@v1 @paper: id {content}, 3 draws" in out
    assert f"{'':12}@v2: id {content}, 3 draws, licence MIT" in out
    assert call("store", "annotate", url, "--remove", "licence")[1].startswith(f"{url}: version 3")
    assert Store(url).dataset.attribution.licence is None
    is_one_clear_line(call("store", "annotate", url), "nfm store annotate --help")
    is_one_clear_line(call("store", "annotate", url, "--licence", ""), "--remove")


# The nfm command, which waits after its second checkpoint, so that it is interrupted somewhere after the first one.
UNFINISHED = """
import itertools, time
from nfm.pipeline.cli import main
from nfm.stages.training import Trainer
write_checkpoint, number = Trainer._checkpoint, itertools.count(1)
def write_two_checkpoints(trainer, progress):
    write_checkpoint(trainer, progress)
    if next(number) == 2:
        while True:
            time.sleep(1)
Trainer._checkpoint = write_two_checkpoints
main()
"""


SECOND_INTERRUPT = """
import atexit, os, signal, sys, threading
from nfm.__main__ import main
from nfm.pipeline import cli
def interrupt(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(10)
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.nfm.main = interrupt
if sys.argv[1] == "answered":
    cli.print_line = interrupt
else:
    atexit.register(interrupt)
main()
"""


@pytest.mark.parametrize("moment", ["answered", "ending"])
def test_a_second_ctrl_c_ends_without_a_traceback(moment: str) -> None:
    """While the first one is answered, and while Python waits for its threads."""
    ended = subprocess.run(
        [sys.executable, "-c", SECOND_INTERRUPT, moment], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr in ("", "interrupted\n")


def test_ctrl_c_ends_cleanly_and_the_same_command_continues(call: Nfm, run: Run, tmp_path: Path) -> None:
    longer = small("teacher.train.images=2560", "teacher.train.checkpoint_images=640")
    command = ["train-teacher", *longer, "--samples", run.samples, "--out", f"{tmp_path}/out"]
    process = subprocess.Popen(
        [sys.executable, "-c", UNFINISHED, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    state = tmp_path / "out" / "state.safetensors"
    wait_for(lambda: state.exists() or process.poll() is not None, "the first checkpoint")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == CONTINUES
    assert "Traceback" not in err
    seen = load(str(state)).document["images"]
    assert seen in (640, 1280)
    code, _, err = call(*command)
    assert code == 0 and f"train-teacher: {seen}/2560" in err
    assert call(*command[:-1], f"{tmp_path}/whole")[0] == 0
    first, second = (
        weights_sha256(load(f"{tmp_path}/{name}/model.safetensors").group("model")) for name in ("out", "whole")
    )
    assert first == second
