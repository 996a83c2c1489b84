"""Checkpoints: one safetensors file with named groups of tensors and a JSON document in its header, so that one atomic
rename replaces all of it. Nothing in it can execute code."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nfm.models.sit import SiT, SiTConfig
from nfm.models.tarflow import TarFlow, TarFlowConfig
from nfm.stages.errors import StageError
from nfm.storage_specs.storage.files import Root

MAX_BYTES = 1 << 38
DOCUMENT = "nfm"
NETWORKS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any]]] = {
    "TarFlow": (TarFlow, TarFlowConfig),
    "SiT": (SiT, SiTConfig),
}


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` by name, and `document`, plain JSON."""

    tensors: dict[str, Tensor]
    document: dict[str, Any]

    def group(self, prefix: str) -> dict[str, Tensor]:
        start = f"{prefix}."
        return {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)}


def split(url: str) -> tuple[Root, str]:
    """The folder and the file name of a checkpoint URL."""
    folder, slash, name = url.rpartition("/")
    return Root(folder or slash or "."), name


def exists(url: str) -> bool:
    root, name = split(url)
    return root.exists(name)


def remove(url: str) -> None:
    root, name = split(url)
    if root.exists(name):
        root.delete(name)


def save(url: str, checkpoint: Checkpoint) -> None:
    root, name = split(url)
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in checkpoint.tensors.items()}
    document = json.dumps(checkpoint.document, allow_nan=False)
    root.write(name, safetensors.torch.save(tensors, metadata={DOCUMENT: document}))


def load(url: str) -> Checkpoint:
    """Raises StoreError if there is no file, StageError if it is no checkpoint of ours."""
    root, name = split(url)
    data = root.read(name, MAX_BYTES)
    try:
        header_bytes = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_bytes])
        document = json.loads(header["__metadata__"][DOCUMENT])
        if not (isinstance(document, dict) and isinstance(document.get("run"), dict)):
            raise ValueError("its document has no run")
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StageError(
            f"{url}: got no checkpoint of nfm ({type(error).__name__}: {error}); expected a safetensors file that "
            "train-teacher or train-student wrote"
        ) from error
    return Checkpoint(tensors, document)


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Identity of a network's weights: names, dtypes, shapes and values, and nothing else."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def architecture(network: nn.Module) -> dict[str, Any]:
    """What `build` needs to make the network again."""
    assert isinstance(network, TarFlow | SiT)
    config: dict[str, Any] = json.loads(json.dumps(vars(network.config)))
    return {"name": type(network).__name__} | config


def build(checkpoint: Checkpoint, name: str, url: str) -> nn.Module:
    """The network of a finished model, which must be a `name`. Raises StageError if architecture and weights disagree.

    It is laid out without memory and then takes the file's own tensors, so a hostile architecture allocates nothing.
    """
    described = checkpoint.document.get("architecture")
    described = dict(described) if isinstance(described, dict) else {}
    kind = described.pop("name", None)
    if kind != name:
        raise StageError(f"{url}: got a checkpoint of {kind or 'no network'}, expected one of {name}")
    network, config = NETWORKS[name]
    state = {key: value.float() for key, value in checkpoint.group("model").items()}
    try:
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in described.items()}
        parsed = config(**values)
        layers = sum(parsed.depths) if name == "TarFlow" else parsed.depth
        if layers > len(state):
            raise ValueError(f"{layers} layers, but only {len(state)} tensors")
        with torch.device("meta"):
            built = network(parsed)
    except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise StageError(f"{url}: its architecture {described} is not one of {name}: {error}") from error
    load_weights(built, state, url, assign=True)
    return built.requires_grad_(False).eval()


def load_weights(network: nn.Module, state: Mapping[str, Tensor], url: str, assign: bool = False) -> None:
    try:
        network.load_state_dict(dict(state), assign=assign)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise StageError(f"{url}: its weights do not fit the architecture: {first}") from error


def load_model(url: str) -> SiT | TarFlow:
    """The network of a finished model (`model.safetensors`), a student's or a teacher's, in evaluation mode on the CPU.

    Raises StoreError if there is no file, StageError if it is no finished model of ours.
    """
    checkpoint = load(url)
    network = build(checkpoint, network_name(checkpoint), url)
    assert isinstance(network, SiT | TarFlow)
    return network


def network_name(checkpoint: Checkpoint) -> str:
    """ "TarFlow" for a teacher, "SiT" for a student."""
    return "TarFlow" if "teacher" in checkpoint.document["run"] else "SiT"


def load_network(url: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A finished model (`model.safetensors`) in evaluation mode, and its document."""
    checkpoint = load(url)
    return build(checkpoint, name, url), checkpoint.document
