"""Checkpoints: one safetensors file with named groups of tensors, and a JSON document in its header.

One atomic rename replaces all of a checkpoint. Nothing in it can execute code. `model.safetensors` is a finished model;
`state.safetensors` is the state of a run that is not finished.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, TypeVar

import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from nfm.models.sit import SiT, SiTConfig
from nfm.models.tarflow import TarFlow, TarFlowConfig
from nfm.stages.errors import StageError
from nfm.stages.memory import check_memory
from nfm.stages.safetensors_header import Header, NoCheckpointError, parse_object, read_header
from nfm.storage_specs.format.schema import LatentSpec, PixelSpec, XSpec
from nfm.storage_specs.storage.errors import StorageError, StoreError
from nfm.storage_specs.storage.files import split_url

T = TypeVar("T")

MAX_BYTES = 1 << 37  # of a checkpoint: the state of a training has six values for each parameter
MAX_IMAGES = 1 << 53  # that a network was trained on
MAX_ETA = 1e6  # of a teacher; pixels and latents are around 1, and η² must stay finite
MAX_NLL = 1e6  # in nats per dimension; those of images are between -10 and 10
DOCUMENT_KEY = "nfm"  # of the document in the header's metadata
NETWORKS: dict[str, tuple[Callable[..., nn.Module], type[TarFlowConfig | SiTConfig]]] = {
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
        return select_group(prefix, self.tensors)


def select_group(prefix: str, entries: Mapping[str, T]) -> dict[str, T]:
    """What belongs to the group `prefix` of a checkpoint, by the names in it."""
    start = f"{prefix}."
    return {name.removeprefix(start): entry for name, entry in entries.items() if name.startswith(start)}


def add_prefix(prefix: str, entries: Mapping[str, T]) -> dict[str, T]:
    """The entries as the group `prefix` of a checkpoint; `select_group` is the inverse."""
    return {f"{prefix}.{name}": entry for name, entry in entries.items()}


def exists(url: str) -> bool:
    """Whether there is a file at the URL."""
    root, name = split_url(url)
    return root.exists(name)


def remove(url: str) -> None:
    """Delete the file at the URL, if there is one."""
    root, name = split_url(url, follow=False)
    if root.exists(name):
        root.delete(name)


def save(url: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, replacing the one at the URL at once or not at all."""
    root, name = split_url(url, follow=False)
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in checkpoint.tensors.items()}
    document = json.dumps(checkpoint.document, allow_nan=False)
    root.write(name, safetensors.torch.save(tensors, metadata={DOCUMENT_KEY: document}))


def load(url: str) -> Checkpoint:
    """Read a checkpoint. Its header is checked before its values are read.

    Raises StoreError if there is no file or it is damaged, StageError if it is not a checkpoint of this project or the
    folder of one, if it does not fit into memory, or if a tensor is not of floating-point numbers that are all finite.
    """
    header, document = _read_head(url)
    return Checkpoint(read_tensors(url, header), document)


def load_document(url: str) -> dict[str, Any]:
    """The document of the checkpoint at the URL, without its tensors. Raises as `load` does."""
    return _read_head(url)[1]


def _read_head(url: str) -> tuple[Header, dict[str, Any]]:
    """The header of a checkpoint, and the document in it."""
    root, name = split_url(url)
    try:
        header = read_header(root, name)
    except StorageError:
        raise
    except (StoreError, StageError, IsADirectoryError) as error:
        model_url = f"{url.rstrip('/')}/model.safetensors"
        if exists(model_url):
            raise StageError(f"{url}: got a folder, expected a file; the model in it is {model_url}") from error
        if isinstance(error, IsADirectoryError):
            raise StoreError(f"{url}: got a folder, expected a file") from error
        raise
    text = header.metadata.get(DOCUMENT_KEY)
    if not isinstance(text, str):
        raise NoCheckpointError(url, "a safetensors file that nfm did not write")
    document = parse_object(text.encode("utf-8", "surrogatepass"), url)
    if not isinstance(document.get("run"), dict):
        raise NoCheckpointError(url, "a document without a run")
    return header, document


def read_tensors(url: str, header: Header) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose header was read, all of them finite. Raises as `load` does."""
    root, name = split_url(url)
    if header.file_bytes > MAX_BYTES:
        raise StageError(f"{url}: got a file of {header.file_bytes} bytes, expected at most {MAX_BYTES}")
    # The bytes of the file, and the tensors that are made of them.
    check_memory(2 * header.file_bytes, url, "read it on a larger one")
    data = root.read(name, header.file_bytes)
    if data[8 : 8 + len(header.data)] != header.data or len(data) != header.file_bytes:
        raise StageError(f"{url}: the file was replaced while it was read; run the same command again")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, RuntimeError) as error:
        raise NoCheckpointError(url, f"tensors that PyTorch does not take ({error})") from error
    check_finite(tensors, url)
    return tensors


def check_finite(tensors: Mapping[str, Tensor], url: str) -> None:
    """Raise StageError naming the first tensor that has NaN or infinite values."""
    for name, tensor in tensors.items():
        # Both extremes are NaN if a value is; this takes a tenth of the time of `isfinite` of all values.
        if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
            raise StageError(
                f"{url}: got tensor {name!r} with NaN or infinite values, expected finite ones; "
                "the training that made it has diverged, or the file is damaged"
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

    Raises StageError if it is of another class, or if architecture and weights do not fit each other.
    """
    state = {key: tensor.float() for key, tensor in checkpoint.group("model").items()}
    network = _empty_network(checkpoint.document, {key: tensor.shape for key, tensor in state.items()}, url, name)
    load_weights(network, state, url, assign=True)
    return network.requires_grad_(False).eval()


def _empty_network(
    document: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], url: str, expected_name: str | None = None
) -> nn.Module:
    """The network that a document describes, without values, for tensors of these shapes. Raises as `build` does.

    It is made on the meta device, so that a hostile architecture allocates no memory.
    """
    name = network_name(document, url)
    if expected_name is not None and name != expected_name:
        raise StageError(f"{url}: got a checkpoint of {name}, expected one of {expected_name}")
    network_class, config_class = NETWORKS[name]
    values = {key: value for key, value in document["architecture"].items() if key != "name"}
    try:
        if unknown := values.keys() - {entry.name for entry in fields(config_class)}:
            raise ValueError(f"unknown {', '.join(sorted(unknown))}")
        config = TypeAdapter(config_class).validate_json(json.dumps(values), strict=True)
        with torch.device("meta"):
            network = network_class(config)
            state = {key: torch.empty(shape) for key, shape in shapes.items()}
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
        raise StageError(f"{url}: its architecture is not one of {name}: {what}") from error
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]  # PyTorch adds a stack
        raise StageError(f"{url}: its architecture is not one of {name}: {reason}") from error
    load_weights(network, state, url, assign=True)
    return network


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


def load_network(url: str, name: str | None = None) -> tuple[SiT | TarFlow, dict[str, Any]]:
    """The network of a finished model in evaluation mode on the CPU, and the document of its checkpoint.

    `name` is the class that it must have, "TarFlow" or "SiT"; None: either. Raises StoreError if there is no file,
    StageError if it is not a finished model of that class.
    """
    header, document = _read_head(url)
    _empty_network(
        document, select_group("model", header.shapes), url, name
    )  # a file of other tensors is refused before its values are read
    network = build(Checkpoint(read_tensors(url, header), document), network_name(document, url), url)
    assert isinstance(network, SiT | TarFlow)
    return network, document


def load_any_network(url: str) -> SiT | TarFlow:
    """The network of a finished model (`model.safetensors`), a student's or a teacher's, in evaluation mode on the CPU.

    Raises StoreError if there is no file, StageError if it is not a finished model of this project.
    """
    return load_network(url)[0]


def network_name(document: dict[str, Any], url: str) -> str:
    """The name of the class of the network of a checkpoint's document: "TarFlow" for a teacher, "SiT" for a student.

    Raises StageError if the checkpoint has no such network, as the state of a run that is not finished.
    """
    architecture_document = document.get("architecture")
    name = architecture_document.get("name") if isinstance(architecture_document, dict) else None
    if name is None:
        got = "a checkpoint without an architecture"
        if "stream" in document:
            got = "the state of a training that is not finished, which the command that began it continues"
        raise StageError(f"{url}: got {got}, expected the model.safetensors of a finished student or teacher")
    if not isinstance(name, str) or name not in NETWORKS:
        raise StageError(f"{url}: got a checkpoint of {name!r}, expected one of {' or '.join(NETWORKS)}")
    return name


def _run_section(document: dict[str, Any]) -> dict[str, Any]:
    """The section `teacher` or `student` of a checkpoint's run; empty without one."""
    section = document["run"].get("teacher") or document["run"].get("student")
    return section if isinstance(section, dict) else {}


def read_x_spec(document: dict[str, Any], url: str) -> PixelSpec | LatentSpec:
    """What the x stands for that a network was trained on: pixels, or latents with their scale, shift and decoder.

    Raises StageError for a document that says something else. One that says nothing is of pixels, as all were once.
    """
    if "x" not in document:
        return PixelSpec(dtype="uint8")
    try:
        return TypeAdapter(XSpec).validate_json(json.dumps(document["x"]), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise StageError(
            f"{url}: its images are neither pixels nor latents: {first['msg']}; "
            "the file is damaged or of another version"
        ) from error


def has_dropped_labels(document: dict[str, Any]) -> bool:
    """Whether the network of this checkpoint's document was trained with dropped labels, which guidance needs."""
    # nfm's trainings always record it. Where it is missing, as in a document made for imported weights, nothing says
    # that the network cannot be guided, so it counts as dropped.
    return bool(_run_section(document).get("label_drop", 1) != 0)


def is_imported(document: dict[str, Any]) -> bool:
    """Whether a checkpoint was made from a published file, so that nothing is known of its training."""
    return "published" in document["run"]


def trained_on(document: dict[str, Any]) -> list[str | None]:
    """The ids of the coupling stores that a student was trained on, in the order of its mixture; None where the
    document has none."""
    couplings = document["run"].get("couplings")
    entries = couplings if isinstance(couplings, list) else [{"id": couplings}]
    ids = [entry.get("id") if isinstance(entry, dict) else None for entry in entries]
    return [content_id if isinstance(content_id, str) else None for content_id in ids]


@dataclass
class Curves:
    """Curves of a run: `loss[i]` is the mean training loss between `images[i - 1]` and `images[i]` images, and `val[i]`
    the validation after `val_images[i]` images."""

    images: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    val_images: list[int] = field(default_factory=list)
    val: list[float] = field(default_factory=list)

    def final_loss(self) -> float:
        """Mean training loss over the last tenth of the run."""
        last_images = self.images[-1]
        losses = [loss for images, loss in zip(self.images, self.loss, strict=True) if images > 0.9 * last_images]
        return sum(loss / len(losses) for loss in losses)  # finite, as each loss is


def read_curves(document: dict[str, Any], url: str) -> Curves:
    """The curves in the document of a finished model. Raises StageError if it has none."""
    try:
        curves: Curves = TypeAdapter(Curves).validate_json(json.dumps(document.get("curves")), strict=True)
    except ValidationError as error:
        raise StageError(f"{url}: its curves are no lists of numbers; expected those that a training wrote") from error
    has_points = 0 < len(curves.images) == len(curves.loss) and len(curves.val_images) == len(curves.val)
    if not (has_points and all(a < b for a, b in pairwise([0, *curves.images, MAX_IMAGES]))):
        raise StageError(f"{url}: its curves have no points, or points out of order; expected those of a training")
    return curves


def find_curves(document: dict[str, Any], url: str) -> Curves:
    """The curves of a model's training; without points if it was imported. Raises StageError if it has none."""
    return Curves() if is_imported(document) else read_curves(document, url)


@dataclass(frozen=True)
class TeacherTraining:
    """What the checkpoint of a finished teacher says of its training. One that was imported says neither how many
    images it saw nor its likelihood."""

    config: dict[str, Any]  # the section `teacher` of its run
    eta: float
    images: int | None
    val_nll: float | None  # per dimension, in nats, of the chosen weights on held-out images


def read_teacher_training(document: dict[str, Any], url: str) -> TeacherTraining:
    """Raises StageError if the document of a checkpoint does not say how a teacher was trained."""
    try:
        config, training = dict(document["run"]["teacher"]), document["training"]
        images, val = training["images"], training["val"]
        if not is_imported(document):
            images, val = int(images), float(val)
        teacher = TeacherTraining(config, float(config["eta"]), images, val)
        if not (abs(val or 0) <= MAX_NLL and 0 <= teacher.eta <= MAX_ETA):
            raise ValueError(f"η = {teacher.eta}, val = {teacher.val_nll}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StageError(
            f"{url}: got a teacher that does not say how it was trained ({type(error).__name__}: {error}); "
            "expected the model.safetensors that train-teacher or import wrote"
        ) from error
    return teacher
