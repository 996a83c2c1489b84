"""Networks of the published code of TarFlow and SiT: what is imported computes what theirs does, and comes back as it
was."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nfm.models.labels import NULL_LABEL
from nfm.models.sit import SiT, SiTConfig, reverse_time
from nfm.models.solvers import parse_sampler
from nfm.models.tarflow import TarFlow
from nfm.pipeline.checkpoint_cli import export_command, import_command
from nfm.pipeline.evaluation import evaluate_and_report
from nfm.stages.checkpoint import load, load_network
from nfm.stages.errors import StageError
from nfm.stages.evaluate import EvaluateConfig
from nfm.stages.published import export_published, import_published
from nfm.stages.published_shapes import ImportOptions
from nfm.stages.sample import SampleRequest, sample
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.files import Root
from tests.tools.published import (
    FORMS,
    OPTIONS,
    SIT,
    TARFLOW,
    TARFLOWS,
    assert_same_tensors,
    imported,
    published,
    read,
    write,
)
from tests.tools.small_run import Run, encode_in_process


def bits(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("ending", "dtype"), [("pt", torch.float32), ("pt", torch.bfloat16), ("safetensors", torch.float16)]
)
@pytest.mark.parametrize("name", ["sit", *TARFLOWS])
def test_a_network_comes_back_tensor_for_tensor(tmp_path: Path, name: str, dtype: torch.dtype, ending: str) -> None:
    format_name, state = published(name)
    state = bits(state, dtype)
    file = write(tmp_path / f"published.{ending}", state)
    model, out = f"{tmp_path}/model.safetensors", f"{tmp_path}/out.{ending}"
    import_published(format_name, file, model, OPTIONS[format_name])
    export_published(format_name, model, out)
    assert_same_tensors(read(out), state)
    assert list(read(out)) == list(read(file)), "the order of the names"


@pytest.mark.parametrize("name", ["sit", "nvp_cond"])
@pytest.mark.parametrize("form", FORMS)
def test_the_forms_in_which_networks_are_saved(tmp_path: Path, name: str, form: str) -> None:
    format_name, state = published(name)
    model = imported(tmp_path, name, FORMS[form])
    weights = {key: tensor for key, tensor in state.items() if not key.endswith("attn_mask")}
    assert_same_tensors(load(model).group("model"), weights)
    export_published(format_name, model, f"{tmp_path}/out.pt")
    content, expected = read(f"{tmp_path}/out.pt"), FORMS[form](state)
    key = next((key for key in ("ema", "model") if key in expected), None)
    assert_same_tensors(content[key] if key else content, expected[key] if key else expected)


def test_a_teacher_without_its_masks_comes_back_without_them(tmp_path: Path) -> None:
    def without_masks(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in state.items() if not name.endswith("attn_mask")}

    export_published("ml-tarflow", imported(tmp_path, "vp_cond", without_masks), f"{tmp_path}/out.pth")
    assert_same_tensors(read(f"{tmp_path}/out.pth"), without_masks(published("vp_cond")[1]))


@pytest.mark.parametrize("name", TARFLOWS)
def test_an_imported_teacher_encodes_as_the_published_code_does(tmp_path: Path, name: str) -> None:
    network, document = load_network(imported(tmp_path, name))
    assert isinstance(network, TarFlow)
    x, z, logdet = (torch.from_numpy(TARFLOW[f"{name}/{part}"]) for part in ("x", "z", "logdet"))
    y = torch.from_numpy(TARFLOW[f"{name}/y"]) if f"{name}/y" in TARFLOW else None
    encoded = network(x, y)
    torch.testing.assert_close(network.patchify(encoded.z), z, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoded.logdet, logdet, atol=1e-5, rtol=1e-4)
    assert document["run"]["teacher"] == {"eta": 0.05}


def sit_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t and y of the reference, with -1 for the dropped label, and the published velocity."""
    x, t, y, v = (torch.from_numpy(SIT[name]) for name in ("x", "t", "y", "v"))
    return x, t, torch.where(y == 5, NULL_LABEL, y), v


def test_an_imported_student_is_a_field_whose_time_runs_from_data_to_noise(tmp_path: Path) -> None:
    network, document = load_network(imported(tmp_path, "sit"))
    x, t, y, v = sit_inputs()
    torch.testing.assert_close(network(x, 1 - t, y), -v, atol=1e-5, rtol=0)
    assert document["architecture"]["reversed_time"] is True


def test_samples_of_an_imported_student_start_at_noise(tmp_path: Path) -> None:
    """One Euler step from t = 1 to 0 is a step of the published code from its t = 0 to 1: ε + v(ε, 0)."""
    model = imported(tmp_path, "sit")
    request = SampleRequest(4, parse_sampler("euler1"), seed=3)
    sample(model, f"{tmp_path}/x.npz", request)
    with np.load(f"{tmp_path}/x.npz", allow_pickle=False) as samples:
        x, y = (torch.from_numpy(samples[name]) for name in ("x", "label"))
    assert x.dtype == torch.float32, "latents, not pixels"
    noise = torch.randn((4, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    theirs = SiT(SiTConfig(4, 8, 2, 48, 3, 3, 5, learn_sigma=True))
    theirs.load_state_dict(published("sit")[1])
    with torch.no_grad():
        torch.testing.assert_close(x, noise + theirs(noise, torch.zeros(4), y), atol=1e-5, rtol=0)


def test_a_constant_velocity_moves_noise_to_data(tmp_path: Path) -> None:
    """Closed form: a SiT whose output is c everywhere moves ε to ε + c, in any number of steps."""

    def constant(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state | {
            "final_layer.linear.weight": torch.zeros_like(state["final_layer.linear.weight"]),
            "final_layer.linear.bias": torch.full_like(state["final_layer.linear.bias"], 0.5),
        }

    network, _ = load_network(imported(tmp_path, "sit", constant))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = parse_sampler("heun7")(network, noise, torch.tensor([0, NULL_LABEL])).x
    torch.testing.assert_close(moved, noise + 0.5, atol=1e-5, rtol=0)


def test_reversed_time_can_be_folded_into_the_weights() -> None:
    config = SiTConfig(2, 4, 2, 16, 1, 2, 3)
    network, other = SiT(config), SiT(config)
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    other.load_state_dict(reverse_time(network.state_dict()))
    x, t, y = torch.randn(5, 2, 4, 4), torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0]), torch.tensor([0, 1, 2, -1, 0])
    with torch.no_grad():
        torch.testing.assert_close(other(x, t, y), -network(x, 1 - t, y), atol=2e-5, rtol=1e-5)
    twice = reverse_time(other.state_dict())
    torch.testing.assert_close(twice, dict(network.state_dict()), atol=1e-6, rtol=1e-5)


def test_a_student_that_was_trained_here_is_a_published_sit(run: Run, student: str, tmp_path: Path) -> None:
    ours, _ = load_network(student)
    for ending in ("pt", "safetensors"):
        out, back = f"{tmp_path}/out.{ending}", f"{tmp_path}/back-{ending}.safetensors"
        export_published("sit", student, out)
        import_published("sit", out, back, ImportOptions(heads=2), run.samples + "/train")
        theirs, document = load_network(back)
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        t, y = torch.tensor([0.0, 0.3, 0.8, 1.0]), torch.tensor([0, 9, -1, 3])
        torch.testing.assert_close(theirs(x, t, y), ours(x, t, y), atol=1e-5, rtol=1e-5)
        assert document["x"] == {"dtype": "uint8"}


def test_the_next_stages_take_imported_networks(run: Run, student: str, tmp_path: Path) -> None:
    """The teacher of a run, in published form, encodes the same z; it and a student are evaluated, without curves."""
    state = load(run.teacher).group("model")
    masks = {f"blocks.{i}.attn_mask": torch.ones(16, 16).tril() for i in range(2)}
    file, teacher = write(tmp_path / "teacher.pth", state | masks), f"{tmp_path}/teacher.safetensors"
    eta = load(run.teacher).document["run"]["teacher"]["eta"]
    import_published("ml-tarflow", file, teacher, ImportOptions(eta=eta, heads=2), f"{run.samples}/train")
    couplings = f"{tmp_path}/couplings"
    encode_in_process(run.config, f"{run.samples}/train", teacher, couplings, "webdataset")
    assert np.array_equal(Store(couplings).column("z", 0, 0), Store(run.couplings["webdataset"]).column("z", 0, 0))
    export_published("sit", student, f"{tmp_path}/student.pt")
    import_published("sit", f"{tmp_path}/student.pt", f"{tmp_path}/student.safetensors", ImportOptions(heads=2))
    settings = EvaluateConfig(
        samples=20, samplers=["euler3"], features="pixels", grid_columns=2, grid_samplers=["euler3"]
    )
    config = run.config.model_copy(update={"evaluate": settings})
    students = dict.fromkeys(("nfm", "independent"), f"{tmp_path}/student.safetensors")
    lines = evaluate_and_report(config, run.samples, couplings, teacher, students, f"{tmp_path}/report")
    assert re.search(r"teacher: FD [\d.]+, round trip", "\n".join(lines))
    metrics = json.loads((tmp_path / "report/metrics.json").read_text())
    assert metrics["teacher"]["bpd"] is None
    assert metrics["students"]["nfm"]["loss"] is None
    assert metrics["students"]["nfm"]["euler3"]["fd"] > 0
    assert "The teacher was imported" in (tmp_path / "report/report.html").read_text()


def test_the_commands_say_what_was_inferred(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --out, the model lies beside its file."""
    file = write(tmp_path / "sit.pt", FORMS["ema"](published("sit")[1]))
    import_command.main(["sit", file, "--heads", "3"], standalone_mode=False)
    export_command.main(["sit", f"{tmp_path}/sit.safetensors", f"{tmp_path}/out.pt"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    sizes = "SiT-3x48h3/2, 3 heads, images of 4×8×8, 5 classes, with unused outputs for σ"
    assert lines[0] == f"{tmp_path}/sit.safetensors: {sizes}"
    assert lines[1] == "weights: 'ema' of the file"
    assert lines[-1] == f"{tmp_path}/out.pt: 42 tensors of {sizes}"
    with pytest.raises(StageError, match=r"and no --out; expected --out"):
        import_command.main(["sit", f"{tmp_path}/sit.safetensors", "--heads", "3"], standalone_mode=False)


def test_only_the_tensors_that_are_wanted_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large training state, the pickle and the average alone."""
    state = published("sit")[1]
    content = {"model": state, "ema": state, "opt": {"state": {0: torch.zeros(1 << 20)}}}
    content["model"] = {name: tensor.clone() for name, tensor in state.items()}
    read_bytes = 0
    read_range = Root.read_range

    def count_bytes(root: Any, path: str, start: int, end: int) -> bytes:
        nonlocal read_bytes
        data = read_range(root, path, start, end)
        read_bytes += len(data)
        return data

    monkeypatch.setattr(Root, "read_range", count_bytes)
    import_published("sit", write(tmp_path / "state.pt", content), f"{tmp_path}/out.safetensors", OPTIONS["sit"])
    wanted = sum(tensor.nbytes for tensor in state.values())
    assert wanted < read_bytes < wanted + 200_000
