"""Checkpoints: one safetensors file with named groups of tensors, and a JSON document in its header.

One atomic rename replaces all of a checkpoint. Nothing in it can execute code. `model.safetensors` is a finished model;
`state.safetensors` is the state of a run that is not finished.
"""

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
from nfm.storage_specs.storage.errors import StorageError, StoreError
from nfm.storage_specs.storage.files import split_url

MAX_BYTES = 1 << 38  # of a checkpoint that is read
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as its library allows
DOCUMENT_KEY = "nfm"  # of the document in the header's metadata
NETWORKS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any]]] = {
    "TarFlow": (TarFlow, TarFlowConfig),
    "SiT": (SiT, SiTConfig),
}


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` by name, where the name of a group comes before the first dot; and `document`, plain JSON."""

    tensors: dict[str, Tensor]
    document: dict[str, Any]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of one group, by their names in it."""
        start = f"{prefix}."
        return {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)}


def add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the group `prefix` of a checkpoint; `Checkpoint.group` is the inverse."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def exists(url: str) -> bool:
    """Whether there is a file at the URL."""
    root, name = split_url(url)
    return root.exists(name)


def remove(url: str) -> None:
    """Delete the file at the URL, if there is one."""
    root, name = split_url(url)
    if root.exists(name):
        root.delete(name)


def save(url: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, replacing the one at the URL at once or not at all."""
    root, name = split_url(url)
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in checkpoint.tensors.items()}
    document = json.dumps(checkpoint.document, allow_nan=False)
    root.write(name, safetensors.torch.save(tensors, metadata={DOCUMENT_KEY: document}))


def load(url: str) -> Checkpoint:
    """Read a checkpoint.

    Raises StoreError if there is no file, StageError if it is not a checkpoint of this project, or if it is the folder
    of one.
    """
    root, name = split_url(url)
    try:
        data = root.read(name, MAX_BYTES)
    except StorageError:
        raise
    except StoreError as error:
        model_url = f"{url.rstrip('/')}/model.safetensors"
        if not exists(model_url):
            raise
        raise StageError(f"{url}: got a folder, expected a file; the model in it is {model_url}") from error
    document = _parse_header(data[8 : 8 + int.from_bytes(data[:8], "little")], url)
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise _no_checkpoint_error(url, error) from error
    return Checkpoint(tensors, document)


def load_document(url: str) -> dict[str, Any]:
    """The document of the checkpoint at the URL, without its tensors. Raises as `load` does."""
    root, name = split_url(url)
    header_bytes = int.from_bytes(root.read_range(name, 0, 8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise _no_checkpoint_error(url, ValueError(f"a header of {header_bytes} bytes"))
    return _parse_header(root.read_range(name, 8, 8 + header_bytes), url)


def _parse_header(header: bytes, url: str) -> dict[str, Any]:
    """The document in the header of a safetensors file."""
    try:
        document = json.loads(json.loads(header)["__metadata__"][DOCUMENT_KEY])
        if not (isinstance(document, dict) and isinstance(document.get("run"), dict)):
            raise ValueError("its document has no run")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _no_checkpoint_error(url, error) from error
    return document


def _no_checkpoint_error(url: str, error: Exception) -> StageError:
    return StageError(
        f"{url}: got no checkpoint of nfm ({type(error).__name__}: {error}); "
        "expected a safetensors file that train-teacher or train-student wrote"
    )


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Identity of a network's weights: a hash of their names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def architecture(network: nn.Module) -> dict[str, Any]:
    """The document from which `build` makes the network again: the name of its class, and its config."""
    assert isinstance(network, TarFlow | SiT)
    config: dict[str, Any] = json.loads(json.dumps(vars(network.config)))
    return {"name": type(network).__name__} | config


def build(checkpoint: Checkpoint, name: str, url: str) -> nn.Module:
    """The network of a finished model, in evaluation mode. `name` is the expected class, `url` is for messages.

    Raises StageError if it is of another class, or if architecture and weights do not fit each other. The network is
    made on the meta device and takes the tensors of the checkpoint, so a hostile architecture allocates no memory.
    """
    actual_name = network_name(checkpoint, url)
    if actual_name != name:
        raise StageError(f"{url}: got a checkpoint of {actual_name}, expected one of {name}")
    network_class, config_class = NETWORKS[name]
    document = checkpoint.document["architecture"]
    # JSON has no tuples.
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in document.items()}
    del values["name"]
    state = {key: tensor.float() for key, tensor in checkpoint.group("model").items()}
    try:
        config = config_class(**values)
        layers = sum(config.depths) if name == "TarFlow" else config.depth
        # Each layer has tensors of its own. Without this check, a hostile number of layers would take hours and all
        # memory, as modules cost both even on the meta device.
        if layers > len(state):
            raise ValueError(f"{layers} layers, but only {len(state)} tensors")
        with torch.device("meta"):
            network = network_class(config)
    except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise StageError(f"{url}: its architecture {values} is not one of {name}: {error}") from error
    load_weights(network, state, url, assign=True)
    return network.requires_grad_(False).eval()


def load_weights(network: nn.Module, state: Mapping[str, Tensor], url: str, assign: bool = False) -> None:
    """Load a state dict: copied into the network's own tensors, or with `assign` in their place.

    Raises StageError naming the first tensor that does not fit.
    """
    try:
        network.load_state_dict(dict(state), assign=assign)
    except RuntimeError as error:
        lines = str(error).splitlines()  # a heading, then a line for each tensor that does not fit
        first_mismatch = lines[min(1, len(lines) - 1)].strip()
        raise StageError(f"{url}: its weights do not fit the architecture: {first_mismatch}") from error


def load_any_network(url: str) -> SiT | TarFlow:
    """The network of a finished model (`model.safetensors`), a student's or a teacher's, in evaluation mode on the CPU.

    Raises StoreError if there is no file, StageError if it is not a finished model of this project.
    """
    checkpoint = load(url)
    network = build(checkpoint, network_name(checkpoint, url), url)
    assert isinstance(network, SiT | TarFlow)
    return network


def network_name(checkpoint: Checkpoint, url: str) -> str:
    """The name of the class of a checkpoint's network: "TarFlow" for a teacher, "SiT" for a student.

    Raises StageError if the checkpoint has no such network, as the state of a run that is not finished.
    """
    architecture_document = checkpoint.document.get("architecture")
    name = architecture_document.get("name") if isinstance(architecture_document, dict) else None
    if name is None:
        raise StageError(
            f"{url}: got a checkpoint without an architecture, "
            "expected the model.safetensors of a finished student or teacher"
        )
    if not isinstance(name, str) or name not in NETWORKS:
        raise StageError(f"{url}: got a checkpoint of {name!r}, expected one of {' or '.join(NETWORKS)}")
    return name


def has_dropped_labels(document: dict[str, Any]) -> bool:
    """Whether the network of this checkpoint's document was trained with dropped labels, which guidance needs."""
    training = document["run"].get("teacher") or document["run"].get("student") or {}
    # nfm's trainings always record it. Where it is missing, as in a document made for imported weights, nothing says
    # that the network cannot be guided, so it counts as dropped.
    return bool(training.get("label_drop", 1) > 0)


@dataclass(frozen=True)
class TeacherTraining:
    """What the checkpoint of a finished teacher says of its training."""

    config: dict[str, Any]  # the section `teacher` of its run
    eta: float
    images: int
    val_nll: float  # per dimension, in nats, of the chosen weights on held-out images


def read_teacher_training(document: dict[str, Any], url: str) -> TeacherTraining:
    """Raises StageError if the document of a checkpoint does not say how a teacher was trained."""
    try:
        config, training = dict(document["run"]["teacher"]), document["training"]
        return TeacherTraining(config, float(config["eta"]), int(training["images"]), float(training["val"]))
    except (KeyError, TypeError, ValueError) as error:
        raise StageError(
            f"{url}: got a teacher that does not say how it was trained ({type(error).__name__}: {error}); "
            "expected the model.safetensors that train-teacher wrote"
        ) from error


def load_network(url: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a finished model in evaluation mode on the CPU, and the document of its checkpoint.

    `name` is the class that it must have: "TarFlow" or "SiT". Raises StoreError if there is no file, StageError if it
    is not a finished model of that class.
    """
    checkpoint = load(url)
    return build(checkpoint, name, url), checkpoint.document
