"""Small networks of the published code of TarFlow and SiT, and the forms in which they are saved."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from nfm.stages.published import import_published
from nfm.stages.published_shapes import FormatName, ImportOptions

DATA = Path(__file__).parent.parent / "data"
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


def in_one_storage(state: dict[str, Tensor]) -> dict[str, Tensor]:
    values = torch.cat([tensor.flatten() for tensor in state.values()])
    parts = values.split([tensor.numel() for tensor in state.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(state.items(), parts, strict=True)}


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
    "one storage": in_one_storage,
    "transposed": lambda state: {
        name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in state.items()
    },
}
