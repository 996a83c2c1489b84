"""SiT, the flow-matching student (Ma et al., 2024, arXiv:2401.08740): a diffusion transformer with adaLN-Zero.

It predicts the velocity v = ε - x at time t, with t = 0 data and t = 1 noise. Parameter names are those of the
published SiT state dicts. Those were trained with time running the other way: `SiTConfig.reversed_time` says so.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfm.models.labels import class_rows
from nfm.models.patches import ImageSize, canonical_size, height_and_width, patch_grid

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads
MAX_LAYERS = 512  # many times those of published networks; each takes milliseconds to make, even without weights


@dataclass(frozen=True)
class SiTConfig:
    """All that fixes the shapes of a SiT. Raises ValueError for sizes that do not fit each other."""

    channels: int  # image channels C
    image_size: ImageSize  # (H, W) in pixels, one number where both are equal
    patch: int  # side of a patch, in pixels; each patch is one token
    width: int  # channels D of the transformer
    depth: int  # transformer layers
    heads: int  # attention heads of each layer
    num_classes: int  # without the dropped label ∅; 0: unconditional, and there is no table of labels
    mlp_ratio: int = 4  # width of the MLP's hidden layer / D
    learn_sigma: bool = False  # published networks carry C unused output channels
    reversed_time: bool = False  # whether the weights are of the published convention: t = 1 is data, v = x - ε

    def __post_init__(self) -> None:
        sizes = (self.channels, *self.image_sides, self.patch, self.width, self.depth, self.heads, self.mlp_ratio)
        if min(sizes) < 1 or self.num_classes < 0:
            raise ValueError("got a size below 1; expected positive sizes")
        object.__setattr__(self, "image_size", canonical_size(self.image_size))
        if self.depth > MAX_LAYERS:
            raise ValueError(f"got {self.depth} layers; expected at most {MAX_LAYERS}")
        patch_grid(self.image_size, self.patch)
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"got width {self.width} and {self.heads} heads; the width must be a multiple of both heads and 4"
            )

    @property
    def image_sides(self) -> tuple[int, int]:
        """(H, W), in pixels."""
        return height_and_width(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.image_size, self.patch)


# What parse_size accepts; printed by `nfm config` and in docs/config.md.
SIZE_GRAMMAR = "\n".join(
    [
        "SiT-<size>/<patch> or SiT-<depth>x<width>h<heads>/<patch>",
        "  <size>   a published size:",
        *(f"           {name:<2} = {depth}x{width}h{heads}" for name, (depth, width, heads) in SIZES.items()),
        "  <depth>  transformer layers",
        "  <width>  channels; a multiple of 4 and of <heads>",
        "  <heads>  attention heads of each layer",
        "  <patch>  side of a square patch, in pixels; each patch is one token",
        "SiT-XL/4 is SiT-28x1152h16/4.",
    ]
)


def _is_size(text: str) -> bool:
    return re.fullmatch("[1-9][0-9]{0,5}", text) is not None


def parse_size(name: str) -> dict[str, Any]:
    """Returns `depth`, `width`, `heads` and `patch` of a name such as `SiT-XL/4` or `SiT-28x1152h16/4`.

    Raises ValueError for a name that SIZE_GRAMMAR does not allow.
    """
    kind, _, rest = name.partition("-")
    size, _, patch = rest.partition("/")
    if kind == "SiT" and _is_size(patch):
        if size in SIZES:
            return dict(zip(("depth", "width", "heads"), SIZES[size], strict=True)) | {"patch": int(patch)}
        numbers = size.replace("h", "x").split("x")
        if len(numbers) == 3 and all(_is_size(number) for number in numbers):
            depth, width, heads = map(int, numbers)
            return {"depth": depth, "width": width, "heads": heads, "patch": int(patch)}
    raise ValueError(
        f"got student size {name!r}; expected SiT-{{S,B,L,XL}}/<patch> or SiT-<depth>x<width>h<heads>/<patch>"
    )


def only_shapes_count() -> bool:
    """Whether new tensors are on the meta device. To compute or draw there, PyTorch would import its compiler, which
    takes seconds."""
    return torch.empty(0).is_meta


def sincos_position(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine embedding of a grid of h rows and w columns, (1, h·w, width), as in MAE and DiT."""
    rows, columns = grid
    if only_shapes_count():
        return torch.empty(1, rows * columns, width)
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    positions = torch.arange(max(grid), dtype=torch.float64)
    angles = torch.outer(positions, omega)  # (max(h, w), width/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (max(h, w), width/2)
    of_columns = axis[None, :columns].expand(rows, -1, -1)  # the published order: column index first
    of_rows = axis[:rows, None].expand(-1, columns, -1)
    return torch.cat([of_columns, of_rows], dim=2).reshape(1, rows * columns, width).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: tokens x (B, T, D) scaled by 1 + scale (B, D) and moved by shift (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbedding(nn.Module):
    """One token a patch: a linear map of its pixels."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, config.patch)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.proj(x).flatten(2).transpose(1, 2)  # (B, T, D)
        return result


class TimeEmbedding(nn.Module):
    """Sines and cosines of the time, and a small MLP."""

    FEATURES = 256  # 128 cosines and 128 sines

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    @classmethod
    def frequencies(cls, device: torch.device | None = None) -> Tensor:
        """ω of the waves, (128,), from 1 down to almost 1/10,000."""
        half = cls.FEATURES // 2
        return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=device) / half)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies(t.device)  # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, 256)
        result: Tensor = self.mlp(waves)  # (B, D)
        return result


class LabelEmbedding(nn.Module):
    """One learned vector a class, and one for the dropped label ∅."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        if only_shapes_count():
            self.embedding_table = nn.Embedding.from_pretrained(torch.empty(num_classes + 1, width), freeze=False)
        else:
            self.embedding_table = nn.Embedding(num_classes + 1, width)  # last row: ∅

    def forward(self, y: Tensor) -> Tensor:
        return class_rows(self.embedding_table.weight, y)  # (B, D)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, head_dim) each
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, head_dim)
        result: Tensor = self.proj(out.transpose(1, 2).flatten(2))  # (B, T, D)
        return result


class MLP(nn.Module):
    """Two linear layers with GELU (tanh approximation) between them."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width * ratio)
        self.fc2 = nn.Linear(width * ratio, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(x), approximate="tanh")  # (B, T, ratio·D)
        result: Tensor = self.fc2(hidden)  # (B, T, D)
        return result


class SiTBlock(nn.Module):
    """A transformer layer whose norms and residual branches are modulated by the condition c (adaLN-Zero)."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(config.width, config.mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # (B, D) each
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))  # (B, T, D)
        result: Tensor = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (B, T, D)
        return result


class FinalLayer(nn.Module):
    """A modulated norm, and a linear map from each token to the values of its patch."""

    def __init__(self, config: SiTConfig, out_dim: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.width, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # (B, D) each
        result: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))  # (B, T, out_dim)
        return result


class SiT(nn.Module):
    """The velocity network g(x_t, c, t). A new one predicts zero."""

    pos_embed: Tensor

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config = config
        self.out_channels = config.channels * (2 if config.learn_sigma else 1)
        self.x_embedder = PatchEmbedding(config)
        self.t_embedder = TimeEmbedding(config.width)
        self.y_embedder = LabelEmbedding(config.num_classes, config.width) if config.num_classes else None
        self.register_buffer("pos_embed", sincos_position(config.width, config.grid))
        self.blocks = nn.ModuleList(SiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, self.out_channels * config.patch**2)
        if not only_shapes_count():
            self._initialize()

    def _initialize(self) -> None:
        """DiT's initialization: Xavier everywhere, and adaLN-Zero, so that each block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        assert self.x_embedder.proj.bias is not None
        nn.init.zeros_(self.x_embedder.proj.bias)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder.mlp") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, T, patch·patch·C) to (B, C, H, W), channels last within a patch as in the published code."""
        p = self.config.patch
        patches = tokens.unflatten(2, (p, p, self.out_channels))  # (B, T, p, q, C)
        grid = patches.unflatten(1, self.config.grid)  # (B, h, w, p, q, C)
        image: Tensor = grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, h·p, w·q)
        return image

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """v(x_t, t, y): x (B, C, H, W), t (B,) in [0, 1], y (B,) labels with -1 = dropped; returns (B, C, H, W).

        A network without classes does not look at y.
        """
        if self.config.reversed_time:
            t = 1 - t  # (B,)
        h = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        c = self.t_embedder(t)  # (B, D)
        if self.y_embedder is not None:
            c = c + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            h = block(h, c)  # (B, T, D)
        v = self.unpatchify(self.final_layer(h, c))  # (B, C or 2C, H, W)
        v = v[:, : self.config.channels]  # (B, C, H, W)
        return -v if self.config.reversed_time else v


def forward_flops(config: SiTConfig) -> int:
    """Floating point operations of `SiT.forward` for one image, 2 per multiply-add: every linear layer, the patch
    embedding, and QKᵀ and AV (T² entries per head), as `torch.utils.flop_counter` counts them. Elementwise work is not
    counted."""
    tokens, width = math.prod(config.grid), config.width
    patch_dim = config.channels * config.patch**2
    out_dim = patch_dim * (2 if config.learn_sigma else 1)
    attention = 4 * width**2 + 2 * tokens * width  # qkv and proj; QKᵀ and AV
    mlp = 2 * config.mlp_ratio * width**2
    per_token = config.depth * (attention + mlp) + patch_dim * width + width * out_dim
    modulation = config.depth * 6 * width**2 + 2 * width**2  # adaLN of the blocks and of the final layer
    per_image = modulation + TimeEmbedding.FEATURES * width + width**2  # and the MLP of the time embedding
    return 2 * (tokens * per_token + per_image)


def training_flops(config: SiTConfig) -> int:
    """Floating point operations of one training step per image: the forward pass, and a backward pass that costs twice
    as much (one product for the gradient of the input and one for that of the weight of each layer)."""
    return 3 * forward_flops(config)


def reverse_time(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the SiT whose time runs the other way, v'(x, t) = -v(x, 1 - t), from that of v.

    cos((1 - t)·ω) and sin((1 - t)·ω) are linear in cos(t·ω) and sin(t·ω), so the first layer of the time embedding can
    take the other time, and the last layer of the network the sign. Exact up to rounding.
    """
    name = "t_embedder.mlp.0.weight"  # (D, 256): the columns of 128 cosines, then those of 128 sines
    of_cosines, of_sines = state[name].double().chunk(2, dim=1)  # (D, 128) each
    omega = TimeEmbedding.frequencies().double()  # (128,)
    cosines = of_cosines * omega.cos() + of_sines * omega.sin()  # (D, 128)
    sines = of_cosines * omega.sin() - of_sines * omega.cos()  # (D, 128)
    last_layer = {key: -tensor for key, tensor in state.items() if key.startswith("final_layer.linear.")}
    return dict(state) | last_layer | {name: torch.cat([cosines, sines], dim=1).to(state[name].dtype)}
