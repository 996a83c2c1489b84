"""import and export: networks in the files of the published code of TarFlow and SiT.

- `ml-tarflow` (https://github.com/apple/ml-tarflow): the state dict of a TarFlow, with the causal masks of its blocks.
- `sit` (https://github.com/willisma/SiT): the state dict of a SiT, by itself or as "ema" beside "model" and "args". Its
  time runs from noise (0) to data (1), and its velocity is x - ε: the architecture of an imported network says so.

The tensors are kept as they are, so that `export` writes back those that were imported.
"""

import io
import json
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from nfm.models.sit import SiT, reverse_time
from nfm.models.tarflow import TarFlow
from nfm.stages.checkpoint import (
    DOCUMENT_KEY,
    MAX_BYTES,
    MAX_ETA,
    Checkpoint,
    add_prefix,
    architecture,
    build,
    check_finite,
    exists,
    load,
    load_document,
    network_name,
    read_tensors,
    save,
)
from nfm.stages.errors import StageError
from nfm.stages.progress import Progress
from nfm.stages.published_shapes import MASK, TARFLOW_HEAD_DIM, FormatName, ImportOptions, Shapes, describe, infer
from nfm.stages.safetensors_header import NoCheckpointError, read_header
from nfm.stages.support import check_network
from nfm.stages.torch_file import ZIP_MAGIC, TorchFile
from nfm.storage_specs.format.pixels import PICTURE_CHANNELS
from nfm.storage_specs.format.schema import DecoderSpec, LatentSpec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import split_url
from nfm.storage_specs.storage.messages import count, list_fields

NETWORK_OF: dict[FormatName, str] = {"ml-tarflow": "TarFlow", "sit": "SiT"}
StateKey = Literal["", "ema", "model", "state_dict"]
MaskDtype = Literal["float32", "float16", "bfloat16"]
MASK_DTYPES: dict[MaskDtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# Where a state dict lies in a larger file; the first that is there is taken.
STATE_KEYS: tuple[StateKey, ...] = ("ema", "model", "state_dict")
PREFIXES = ("module.", "_orig_mod.")  # of the names of a network inside DistributedDataParallel or torch.compile
# Of the arguments of a SiT training: the only values that make its network a velocity on the path of this project.
SIT_ARGUMENTS = {"path_type": "Linear", "prediction": "velocity"}
# Latents as the network takes them, where nothing says which decoder makes images of them.
UNKNOWN_LATENTS = LatentSpec(
    dtype="float32", scale=1.0, shift=0.0, decoder=DecoderSpec(name="unknown", architecture={}, sha256="0" * 64)
)


@dataclass(frozen=True)
class PublishedForm:
    """In which form an imported network lay in its file, so that `export_published` writes the same again."""

    format: FormatName
    file: str
    key: StateKey  # the entry of the file that is the state dict; "": all of it
    prefix: str  # of every name
    masks: MaskDtype | None  # dtype of the causal masks of a TarFlow; None: without them


def import_published(
    format_name: FormatName, file: str, out: str, options: ImportOptions, samples: str | None = None
) -> list[str]:
    """Write the network in a published file as a finished model of this project. Returns lines that say what it is, and
    what was assumed.

    `file` is of torch.save or safetensors, and read without running anything in it. `samples` is a store of such images
    as the network takes. Raises StoreError if there is no such file or store, StageError if it is of another format, if
    its tensors are not those of such a network with finite values, or if an option is missing or does not apply.
    """
    _check_options(format_name, options)
    _check_replaceable(out)
    store = None if samples is None else Store(samples)
    if store is not None and format_name == "ml-tarflow":
        channels, height, _ = store.spec.shape
        options = replace(options, channels=options.channels or channels, image_size=options.image_size or height)
    source = _open(file)
    key, state = _find_state(source.content, file)
    prefix = _common_prefix(state)
    inferred = infer(format_name, Shapes(_without_prefix(state, prefix), file), options)
    if format_name == "sit" and not _says_path(source.content, file):
        inferred.assumed.append("the network predicts the velocity on the linear path, as published ones do")
    document: dict[str, Any] = {
        "run": {"published": {}},
        "architecture": architecture(inferred.network),
        "training": {"images": None, "val": None},  # which no published file says
    }
    if format_name == "ml-tarflow":
        document["run"]["teacher"] = {"eta": options.eta}
    channels = inferred.network.config.channels
    if store is not None:
        document["x"] = store.spec.x.model_dump(mode="json")
        check_network(inferred.network, document, file, store)
    elif channels not in PICTURE_CHANNELS:
        document["x"] = UNKNOWN_LATENTS.model_dump(mode="json")
        inferred.assumed.append(f"{channels} channels are latents; --samples STORE says of which decoder")
    with Progress(f"read {file}"):
        values = _without_prefix(source.read(state), prefix)
        check_finite(values, file)
    masks = _pop_masks(values, file)
    document["run"]["published"] = asdict(PublishedForm(format_name, split_url(file)[1], key, prefix, masks))
    with Progress(f"write {out}"):
        save(out, Checkpoint(add_prefix("model", values), document))
    weights = [f"weights: {key!r} of the file"] if key else []
    return [f"{out}: {describe(inferred.network)}", *weights, *(f"assumed: {line}" for line in inferred.assumed)]


def export_published(format_name: FormatName, model: str, out: str) -> str:
    """Write a finished model of this project as a file of the published code: with safetensors if `out` ends so, else
    with torch.save. Returns a line that says what was written.

    Of an imported model it has the same names, shapes, dtypes and values as the file that was imported. A student that
    was trained here predicts the same velocities as a SiT of the published code. Raises StageError for a model that the
    format cannot hold.
    """
    if out == model:
        raise StageError(f"got {model} as model and output; give another output")
    with Progress(f"read {model}"):
        checkpoint = load(model)
    name = network_name(checkpoint.document, model)
    if name != NETWORK_OF[format_name]:
        raise StageError(
            f"{model}: got a checkpoint of {name} for {format_name}, expected one of {NETWORK_OF[format_name]}"
        )
    network = build(checkpoint, name, model)
    assert isinstance(network, TarFlow | SiT)
    height, width = network.config.image_sides
    if height != width or (isinstance(network, SiT) and not network.config.num_classes):
        got = f"images of {height}×{width}" if height != width else "no classes"
        raise StageError(f"{model}: got {got}, which a published {name} does not have; expected squares and classes")
    form = _read_form(checkpoint.document, model)
    weights = checkpoint.group("model")
    state = {tensor_name: weights[tensor_name] for tensor_name in network.state_dict()}  # in the published order
    if isinstance(network, TarFlow):
        if network.config.head_dim != TARFLOW_HEAD_DIM and form is None:
            raise StageError(
                f"{model}: got heads of {network.config.head_dim} channels, expected {TARFLOW_HEAD_DIM}, "
                "which the published code has always"
            )
        state = _add_masks(state, network, "float32" if form is None else form.masks)
    elif not network.config.reversed_time:
        state = reverse_time(state)
    key, prefix = (form.key, form.prefix) if form is not None else ("", "")
    state = {f"{prefix}{tensor_name}": tensor for tensor_name, tensor in state.items()}
    root, file = split_url(out)
    with Progress(f"write {out}"):
        buffer = io.BytesIO()
        if out.endswith(".safetensors"):
            buffer.write(safetensors.torch.save(state))
        else:
            torch.save({key: state} if key else state, buffer)
        root.write(file, buffer.getvalue())
    return f"{out}: {count(len(state), 'tensor')} of {describe(network)}"


def _check_options(format_name: FormatName, options: ImportOptions) -> None:
    """Raise StageError for options that are missing or do not apply."""
    if format_name == "ml-tarflow":
        if options.eta is None:
            raise StageError(
                "got no --eta for ml-tarflow, whose files do not hold it; expected the noise of the training, "
                "the last number of a published name: 0.07 of afhq_model_8_768_8_8_0.07.pth"
            )
        if not 0 <= options.eta <= MAX_ETA:
            raise StageError(f"got --eta {options.eta:g}, expected a number from 0 to {MAX_ETA:g}")
        return
    given = [name for name in ("eta", "image_size", "channels") if getattr(options, name) is not None]
    if given:
        raise StageError(f"got --{given[0].replace('_', '-')} for sit, whose files say it or do not need it")


def _check_replaceable(out: str) -> None:
    """Raise StageError if the file at `out` is another one than a checkpoint of this project, as the input itself."""
    if not exists(out):
        return
    try:
        load_document(out)
    except (StageError, StoreError) as error:
        raise StageError(f"{out}: got a file that nfm did not write, and would replace; give another --out") from error


class SafetensorsFile:
    """A file of safetensors, whose `content` is as that of TorchFile. Raises StageError if it is not one."""

    def __init__(self, url: str) -> None:
        self.url = url
        root, name = split_url(url)
        try:
            self.header = read_header(root, name)
        except NoCheckpointError as error:
            raise StageError(
                f"{url}: got no published network ({error.got}); expected a file of torch.save (PyTorch 1.6 or later) "
                "or safetensors"
            ) from error
        if DOCUMENT_KEY in self.header.metadata:
            raise StageError(f"{url}: got a checkpoint of nfm, expected a published network; it needs no import")
        self.content = {name: torch.empty(shape, device="meta") for name, shape in self.header.shapes.items()}

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of tensors of `content`, by the same names. Raises StageError if they are not finite."""
        values = read_tensors(self.url, self.header)
        return {name: values[name] for name in tensors}


def _open(url: str) -> TorchFile | SafetensorsFile:
    """The file at a URL, by its first bytes. Raises StoreError or StageError as `import_published` does."""
    root, name = split_url(url)
    size = root.size(name)
    if size is None:
        raise StoreError(f"{url} is missing; expected the file of a published network")
    if size > MAX_BYTES:
        raise StageError(f"{url}: got a file of {size} bytes, expected at most {MAX_BYTES}")
    if root.read_range(name, 0, len(ZIP_MAGIC)) == ZIP_MAGIC:
        return TorchFile(root, name, size)
    return SafetensorsFile(url)


def _find_state(content: Any, url: str) -> tuple[StateKey, dict[str, Tensor]]:
    """The state dict in what a file holds: all of it (key ""), or its entry of that key."""
    if _is_state(content):
        return "", content
    if isinstance(content, dict):
        for key in STATE_KEYS:
            if _is_state(content.get(key)):
                return key, content[key]
    got = f"a {type(content).__name__}"
    if isinstance(content, dict):
        got = f"entries {list_fields([repr(key) for key in content])}" if content else "no entries"
    raise StageError(f"{url}: got {got}, expected a state dict, by itself or as one of {', '.join(STATE_KEYS)}")


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _says_path(content: Any, url: str) -> bool:
    """Whether a file holds the arguments of a SiT training, which say what its network predicts. Raises StageError if
    that is something else than a velocity on the path of this project."""
    arguments = content.get("args")
    values = vars(arguments) if isinstance(arguments, Namespace) else arguments
    if not isinstance(values, dict):
        return False
    for name, expected in SIT_ARGUMENTS.items():
        if values.get(name, expected) != expected:
            raise StageError(
                f"{url}: got a network trained with {name} = {values[name]!r}, expected {expected!r}: "
                "another one is no velocity of flow matching"
            )
    return SIT_ARGUMENTS.keys() <= values.keys()


def _common_prefix(names: Collection[str]) -> str:
    """What wrappers of a network put before all names of its state dict."""
    prefix = ""
    while added := next((new for new in PREFIXES if all(name.startswith(prefix + new) for name in names)), ""):
        prefix += added
    return prefix


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with a prefix of all their names removed."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _pop_masks(values: dict[str, Tensor], url: str) -> MaskDtype | None:
    """Take the causal masks of a TarFlow out of its state dict, and return their dtype; None: it has none.

    Raises StageError unless they are causal and of one dtype.
    """
    masks = {name: values.pop(name) for name in list(values) if name.endswith(MASK)}
    for name, mask in masks.items():
        if not torch.equal(mask, torch.ones_like(mask).tril()):
            raise StageError(f"{url}: got a mask {name!r} that is not causal, which no TarFlow has")
    dtypes = {mask.dtype for mask in masks.values()}
    if len(dtypes) > 1:
        raise StageError(f"{url}: got masks of several dtypes; expected one")
    return next((name for name, dtype in MASK_DTYPES.items() if dtype in dtypes), None)


def _add_masks(state: Mapping[str, Tensor], network: TarFlow, dtype: MaskDtype | None) -> dict[str, Tensor]:
    """The state dict with the causal masks of its blocks, in the published order; without any if `dtype` is None."""
    if dtype is None:
        return dict(state)
    mask = torch.ones(network.config.tokens, network.config.tokens, dtype=MASK_DTYPES[dtype]).tril()
    with_masks = {}
    for name, tensor in state.items():
        block, is_first, _ = name.partition(".proj_in.weight")  # of the modules of a block, behind its own tensors
        if is_first:
            with_masks[f"{block}{MASK}"] = mask.clone()
        with_masks[name] = tensor
    return with_masks


def _read_form(document: dict[str, Any], url: str) -> PublishedForm | None:
    """The form from which a model was imported; None if it was trained here. Raises StageError if it is none."""
    published = document["run"].get("published")
    if published is None:
        return None
    try:
        return TypeAdapter(PublishedForm).validate_json(json.dumps(published), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise StageError(
            f"{url}: got a model that does not say how it was imported: {what}; import it again"
        ) from error
