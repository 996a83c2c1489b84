"""Networks of the published code of TarFlow and SiT: what is imported computes what theirs does, and comes back as it
was; files that are no such network are refused in one line."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from nfm.models.labels import NULL_LABEL
from nfm.models.sit import SiT, SiTConfig, reverse_time
from nfm.models.solvers import parse_sampler
from nfm.models.tarflow import TarFlow
from nfm.stages.checkpoint import load, load_network
from nfm.stages.evaluate import EvaluateConfig, evaluate
from nfm.stages.published import export_published, import_published
from nfm.stages.published_shapes import FormatName, ImportOptions
from nfm.stages.sample import SampleRequest, sample
from nfm.storage_specs.reading.store import Store
from tests.tools.small_run import Run, encode_in_process

DATA = Path(__file__).parent / "data"
SIT = dict(np.load(DATA / "sit_reference.npz"))
TARFLOW = dict(np.load(DATA / "tarflow_reference.npz"))
TARFLOWS = ("nvp_cond", "nvp_uncond", "vp_cond")
OPTIONS: dict[FormatName, ImportOptions] = {"ml-tarflow": ImportOptions(eta=0.05), "sit": ImportOptions(heads=3)}


def published(name: str) -> tuple[FormatName, dict[str, Tensor]]:
    """A state dict as the published code saves it: of the SiT, or of one of the TarFlows."""
    arrays, prefix = (SIT, "state_dict/") if name == "sit" else (TARFLOW, f"{name}/state_dict/")
    state = {key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(prefix)}
    return ("sit" if name == "sit" else "ml-tarflow"), state


def write(path: Path, content: Any) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return str(path)


def read(path: str) -> Any:
    if path.endswith(".safetensors"):
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)


def imported(folder: Path, name: str, change: Callable[[dict[str, Tensor]], Any] = dict) -> str:
    """The model of a reference network; `change` makes the content of the file from its state dict."""
    format_name, state = published(name)
    model = f"{folder}/{name}.model.safetensors"
    import_published(format_name, write(folder / f"{name}.pt", change(state)), model, OPTIONS[format_name])
    return model


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def bits(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in state.items()}


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
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


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "ema": lambda state: {
        "model": {name: tensor + 1 for name, tensor in state.items()},
        "ema": state,
        "opt": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(path_type="Linear", prediction="velocity", image_size=256),
    },
    "model": lambda state: {"model": state, "args": {"path_type": "Linear"}},
    "module.": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compiled": lambda state: {"model": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
    "parameters": lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
    "one storage": lambda state: dict(
        zip(
            state,
            (
                part.view(tensor.shape)
                for part, tensor in zip(
                    torch.cat([tensor.flatten() for tensor in state.values()]).split(
                        [tensor.numel() for tensor in state.values()]
                    ),
                    state.values(),
                    strict=True,
                )
            ),
            strict=True,
        )
    ),
    "transposed": lambda state: {
        name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in state.items()
    },
}


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
    moved = parse_sampler("heun7")(network, noise, torch.tensor([0, NULL_LABEL])).x  # type: ignore[arg-type]
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
    config = EvaluateConfig(
        samples=20, samplers=["euler3"], features="pixels", grid_columns=2, grid_samplers=["euler3"]
    )
    metrics, _ = evaluate(config, run.samples, couplings, teacher, {"sit": f"{tmp_path}/student.safetensors"})
    assert metrics["teacher"]["bpd"] is None
    assert metrics["students"]["sit"]["loss"] is None
    assert metrics["students"]["sit"]["euler3"]["fd"] > 0
