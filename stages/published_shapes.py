"""What the shapes of a published network's tensors say of it, and what they do not."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from math import isqrt
from typing import Literal

import torch
from torch import Tensor

from nfm.models.sit import SIZES, SiT, SiTConfig
from nfm.models.tarflow import TarFlow, TarFlowConfig
from nfm.stages.errors import StageError
from nfm.storage_specs.storage.messages import count, list_fields

FormatName = Literal["ml-tarflow", "sit"]
MASK = ".attn_mask"  # end of the name of a TarFlow block's causal mask, which this project's networks do not have
TARFLOW_HEAD_DIM = 64  # of all published TarFlows
USUAL_CHANNELS = (1, 3, 4)  # grey, RGB, and the latents of common autoencoders


@dataclass(frozen=True)
class ImportOptions:
    """What a published file does not say. None: not given."""

    eta: float | None = None
    image_size: int | None = None
    channels: int | None = None
    heads: int | None = None


@dataclass(frozen=True)
class Inferred:
    """A network of the shapes of a file, without values, and in words what was assumed of it."""

    network: TarFlow | SiT
    assumed: list[str]


class Shapes:
    """The shapes of a state dict by the names of its tensors; `url` is for messages."""

    def __init__(self, state: Mapping[str, Tensor], url: str) -> None:
        self.by_name = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.url = url

    def of(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor. Raises StageError if it is not there, or if it has not so many dimensions, all of them
        at least 1."""
        if name not in self.by_name:
            raise StageError(f"{self.url}: got no tensor {name!r}, which such a network has; expected its state dict")
        shape = self.by_name[name]
        if len(shape) != dimensions or min(shape) < 1:
            raise StageError(
                f"{self.url}: got tensor {name!r} of shape {list(shape)}, expected {dimensions} sizes, none of them 0"
            )
        return shape

    def count(self, prefix: str) -> int:
        """How many numbers i there are in names `<prefix>i.…`."""
        pattern = re.compile(rf"{re.escape(prefix)}([0-9]{{1,4}})\.")
        return len({match[1] for name in self.by_name if (match := pattern.match(name))})


def infer(format_name: FormatName, shapes: Shapes, options: ImportOptions) -> Inferred:
    """The network that a state dict in the naming of a format is of.

    Raises StageError if its tensors are of no such network, naming those that are missing, unknown or of another shape,
    or if an option is missing that says what they do not.
    """
    try:
        with torch.device("meta"):
            inferred = (_infer_tarflow if format_name == "ml-tarflow" else _infer_sit)(shapes, options)
    except StageError:
        raise
    except ValueError as error:
        raise StageError(f"{shapes.url}: its tensors are not those of {format_name}: {error}") from error
    _check_names(shapes, inferred.network, format_name)
    return inferred


def _infer_tarflow(shapes: Shapes, options: ImportOptions) -> Inferred:
    """A TarFlow in the naming of ml-tarflow. Raises ValueError for sizes that do not fit each other."""
    tokens, width = shapes.of("blocks.0.pos_embed", 2)
    token_dim = shapes.of("blocks.0.proj_in.weight", 2)[1]
    blocks = shapes.count("blocks.")
    num_classes = shapes.of("blocks.0.class_embed", 3)[0] if "blocks.0.class_embed" in shapes.by_name else 0
    heads = width // TARFLOW_HEAD_DIM if options.heads is None else options.heads
    if heads == 0 or width % heads:
        raise ValueError(f"got width {width} and {heads} heads; the width must be a multiple of the heads")
    channels, patch = _channels_and_patch(token_dim, tokens, shapes.url, options)
    config = TarFlowConfig(
        channels=channels,
        image_size=isqrt(tokens) * patch,
        patch=patch,
        width=width,
        depths=tuple(shapes.count(f"blocks.{i}.attn_blocks.") for i in range(blocks)),
        num_classes=num_classes,
        head_dim=width // heads,
        expansion=shapes.of("blocks.0.attn_blocks.0.mlp.main.0.weight", 2)[0] // width,
        nvp=shapes.of("blocks.0.proj_out.weight", 2)[0] != token_dim,
    )
    assumed = ["images are squares"]
    if options.channels is None and options.image_size is None:
        assumed.append(f"images have {channels} channels, the only one of {_either(USUAL_CHANNELS)} that fits")
    if options.heads is None:
        assumed.append(f"attention heads have {TARFLOW_HEAD_DIM} channels, as in the published code")
    return Inferred(TarFlow(config), assumed)


def _channels_and_patch(token_dim: int, tokens: int, url: str, options: ImportOptions) -> tuple[int, int]:
    """The channels C and the patch p of square images with `token_dim` = C·p² values in each of `tokens` patches."""
    side = isqrt(tokens)
    if side**2 != tokens:
        raise StageError(f"{url}: got {tokens} tokens, expected a square number: published images are squares")
    fitting = [(token_dim // patch**2, patch) for patch in range(1, isqrt(token_dim) + 1) if token_dim % patch**2 == 0]
    named = [
        (channels, patch)
        for channels, patch in fitting
        if options.channels in (None, channels) and options.image_size in (None, side * patch)
    ]
    if options.channels is None and options.image_size is None:
        named = [(channels, patch) for channels, patch in fitting if channels in USUAL_CHANNELS]
    if len(named) != 1:
        sizes = list_fields([f"{channels}×{side * patch}×{side * patch}" for channels, patch in named or fitting])
        raise StageError(
            f"{url}: got tensors that fit images of {sizes}; give --image-size or --channels of one of them"
        )
    return named[0]


def _infer_sit(shapes: Shapes, options: ImportOptions) -> Inferred:
    """A SiT in the published naming. Raises ValueError for sizes that do not fit each other."""
    width, channels, patch, _ = shapes.of("x_embedder.proj.weight", 4)
    tokens = shapes.of("pos_embed", 3)[1]
    side = isqrt(tokens)
    if side**2 != tokens:
        raise StageError(f"{shapes.url}: got {tokens} tokens, expected a square number: published images are squares")
    depth = shapes.count("blocks.")
    out_dim = shapes.of("final_layer.linear.weight", 2)[0]
    heads = options.heads
    assumed = ["images are squares", "the last row of the label table is the dropped label"]
    if heads is None:
        heads = next((heads for *size, heads in SIZES.values() if size == [depth, width]), None)
        if heads is None:
            raise StageError(
                f"{shapes.url}: got a SiT of {depth} layers of width {width}, which is no published size, so nothing "
                "says its attention heads; give --heads"
            )
        assumed.append(f"{heads} attention heads, as the published size has")
    config = SiTConfig(
        channels=channels,
        image_size=side * patch,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        num_classes=shapes.of("y_embedder.embedding_table.weight", 2)[0] - 1,
        mlp_ratio=shapes.of("blocks.0.mlp.fc1.weight", 2)[0] // width,
        learn_sigma=out_dim == 2 * channels * patch**2,
        reversed_time=True,
    )
    return Inferred(SiT(config), assumed)


def _check_names(shapes: Shapes, network: TarFlow | SiT, format_name: FormatName) -> None:
    """Raise StageError naming the tensors that are missing, unknown or of another shape than those of `network` in the
    published code."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    masks = [name for name in shapes.by_name if name.endswith(MASK)]
    if masks and isinstance(network, TarFlow):
        tokens = network.config.tokens
        expected |= {f"blocks.{i}{MASK}": (tokens, tokens) for i in range(len(network.blocks))}
    got = shapes.by_name
    faults = [f"missing {name!r}" for name in expected if name not in got]
    faults += [f"unknown {name!r}" for name in got if name not in expected]
    faults += [
        f"{name!r} of shape {list(got[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if got.get(name, shape) != shape
    ]
    if faults:
        raise StageError(f"{shapes.url}: its tensors are not those of {format_name}: {list_fields(faults)}")


def describe(network: TarFlow | SiT) -> str:
    """The architecture of a network in a line, with its sizes in the notation of `parse_notation` or `parse_size`."""
    config = network.config
    if isinstance(config, TarFlowConfig):
        groups = "+".join(f"{len(list(group))}×{depth}" for depth, group in groupby(config.depths))
        heads = config.width // config.head_dim
        sizes = f"TarFlow TF-{groups}-{config.width}/{config.patch}"
        kind = "" if config.nvp else ", volume-preserving"
    else:
        heads = config.heads
        sizes = f"SiT-{config.depth}x{config.width}h{heads}/{config.patch}"
        kind = ", with unused outputs for σ" if config.learn_sigma else ""
    shape = "×".join(map(str, (config.channels, *config.image_sides)))
    return f"{sizes}, {count(heads, 'head')}, images of {shape}, {config.num_classes or 'no'} classes{kind}"


def _either(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
