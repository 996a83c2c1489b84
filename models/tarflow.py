"""TarFlow, the normalizing-flow teacher (Zhai et al., 2025, arXiv:2412.06329; NFM paper section 2.2).

`f` is a stack of autoregressive blocks over image patches, each alternately reading the sequence forwards and
backwards. Token i of a block is moved by an affine map whose parameters a causal transformer computed from tokens < i:

    u_i = (x_i - b_i) * exp(-a_i),        log|det| = -sum_i a_i

so encoding (x to z) is one parallel pass and decoding (z to x) is sequential. Parameter names are those of the
published `ml-tarflow` state dicts, which load here directly.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfm.models.labels import class_rows

GuideWhat = Literal["a", "b", "ab"]


@dataclass(frozen=True)
class TarFlowConfig:
    """Everything that fixes the shapes of a TarFlow.

    `depths` is the number of transformer layers of each flow block, in the order data passes through them.
    `nvp=False` is the volume-preserving variant: shift only, log-determinant zero.
    """

    channels: int  # image channels C
    image_size: int  # H = W
    patch: int
    width: int
    depths: tuple[int, ...]
    num_classes: int = 0  # 0: unconditional
    head_dim: int = 64
    expansion: int = 4
    nvp: bool = True

    def __post_init__(self) -> None:
        if min(self.channels, self.image_size, self.patch, self.width, self.head_dim, self.expansion) < 1:
            raise ValueError("got a size below 1; expected positive sizes")
        if self.image_size % self.patch:
            raise ValueError(
                f"got image size {self.image_size} and patch {self.patch}; the patch must divide the image"
            )
        if self.width % self.head_dim:
            raise ValueError(f"got width {self.width} and head_dim {self.head_dim}; head_dim must divide the width")
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"got depths {self.depths}; expected at least one block of at least one layer")

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def token_dim(self) -> int:
        return self.channels * self.patch**2


# What parse_notation accepts; printed by `nfm config` and in docs/config.md.
NOTATION_GRAMMAR = """\
TF-<blocks>×<layers>[+<blocks>×<layers>…]-<width>/<patch>
  <blocks>×<layers>  flow blocks, and transformer layers in each, in the order in which data passes through them
  <width>            channels of the transformers
  <patch>            side of a square patch, in pixels; each patch is one token
TF-8×8-768/2 has 8 blocks of 8 layers. TF-6×2+2×26-1024/2 has 6 blocks of 2 layers, then 2 blocks of 26.
The letter x may stand for ×."""


def parse_notation(notation: str) -> dict[str, Any]:
    """Returns `depths`, `width` and `patch` of a name such as `TF-6×2+2×26-1024/2` (NFM paper section 4).

    Raises ValueError for a name that NOTATION_GRAMMAR does not allow.
    """
    match = re.fullmatch(r"TF-(\d+[×x]\d+(?:\+\d+[×x]\d+)*)-(\d+)/(\d+)", notation)
    if match is None:
        raise ValueError(f"got TarFlow notation {notation!r}; expected one like 'TF-6×2+2×26-1024/2'")
    groups, width, patch = match.groups()
    depths: list[int] = []
    for group in groups.split("+"):
        blocks, depth = re.split("[×x]", group)
        depths += [int(depth)] * int(blocks)
    return {"depths": tuple(depths), "width": int(width), "patch": int(patch)}


@dataclass(frozen=True)
class Encoded:
    """`z = f(x)` with shape (B, C, H, W), and the log-determinant per dimension (B,), in nats."""

    z: Tensor
    logdet: Tensor


@dataclass
class KVCache:
    """Keys and values of one flow block while it decodes: (layers, B, heads, T, head_dim), filled token by token."""

    k: Tensor
    v: Tensor


class Attention(nn.Module):
    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.heads = width // head_dim

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, t, 3 * self.heads, -1).transpose(1, 2).chunk(3, dim=1)
        return q, k, v  # each (B, heads, T, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, head_dim)
        result: Tensor = self.proj(out.transpose(1, 2).flatten(2))  # (B, T, D)
        return result

    def step(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, i: int, inverse_temperature: Tensor) -> Tensor:
        q, k, v = self.project(x)  # each (B, heads, 1, head_dim)
        k_cache[:, :, i : i + 1] = k
        v_cache[:, :, i : i + 1] = v
        q = q * inverse_temperature.view(-1, 1, 1, 1)
        out = F.scaled_dot_product_attention(q, k_cache[:, :, : i + 1], v_cache[:, :, : i + 1])
        result: Tensor = self.proj(out.transpose(1, 2).flatten(2))  # (B, 1, D)
        return result


class MLP(nn.Module):
    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.main = nn.Sequential(nn.Linear(width, width * expansion), nn.GELU(), nn.Linear(width * expansion, width))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.main(self.norm(x))
        return result


class Layer(nn.Module):
    def __init__(self, width: int, head_dim: int, expansion: int) -> None:
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.mlp = MLP(width, expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)  # (B, T, D)
        result: Tensor = x + self.mlp(x)
        return result

    def step(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, i: int, inverse_temperature: Tensor) -> Tensor:
        x = x + self.attention.step(x, k_cache, v_cache, i, inverse_temperature)  # (B, 1, D)
        result: Tensor = x + self.mlp(x)
        return result


class FlowBlock(nn.Module):
    """One autoregressive affine map over T tokens; `flip` reads them last to first."""

    def __init__(self, config: TarFlowConfig, depth: int, flip: bool) -> None:
        super().__init__()
        self.flip = flip
        self.nvp = config.nvp
        self.proj_in = nn.Linear(config.token_dim, config.width)
        self.pos_embed = nn.Parameter(torch.randn(config.tokens, config.width) * 1e-2)
        self.class_embed = (
            nn.Parameter(torch.randn(config.num_classes, 1, config.width) * 1e-2) if config.num_classes else None
        )
        self.attn_blocks = nn.ModuleList(Layer(config.width, config.head_dim, config.expansion) for _ in range(depth))
        self.proj_out = nn.Linear(config.width, config.token_dim * (2 if config.nvp else 1))
        nn.init.zeros_(self.proj_out.weight)  # the flow starts close to the identity
        nn.init.zeros_(self.proj_out.bias)

    def _order(self, tokens: Tensor, dim: int) -> Tensor:
        return tokens.flip(dim) if self.flip else tokens

    def _class(self, y: Tensor | None) -> Tensor | float:
        """Embedding of the label, (B, 1, D); a dropped label is the mean of all classes in both directions."""
        if self.class_embed is None:
            return 0.0
        mean = self.class_embed.mean(dim=0, keepdim=True)  # (1, 1, D)
        return mean if y is None else class_rows(torch.cat([self.class_embed, mean]), y)

    def _affine(self, h: Tensor) -> tuple[Tensor, Tensor]:
        out = self.proj_out(h)
        if out.dtype.itemsize < 4:
            out = out.float()  # under autocast the affine map itself stays in float32, or z would carry bf16's rounding
        if self.nvp:
            a, b = out.chunk(2, dim=-1)
            return a, b
        return torch.zeros_like(out), out

    def forward(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self._order(x, 1)  # (B, T, P)
        h = self.proj_in(x) + self._order(self.pos_embed, 0) + self._class(y)  # (B, T, D)
        for layer in self.attn_blocks:
            h = layer(h)  # (B, T, D)
        a, b = self._affine(h)  # (B, T, P) each, for the *next* token
        a = F.pad(a[:, :-1], (0, 0, 1, 0))  # token 0 passes unchanged
        b = F.pad(b[:, :-1], (0, 0, 1, 0))
        u = (x - b) * torch.exp(-a)  # (B, T, P)
        return self._order(u, 1), -a.mean(dim=(1, 2))  # (B, T, P), (B,)

    def decode(self, u: Tensor, y: Tensor | None, guide: "Guide") -> Tensor:
        """The inverse of `forward`, token by token with a KV cache. With guidance, the conditional and the
        unconditional pass run as one batch of 2B."""
        x = self._order(u, 1).clone()  # (B, T, P), overwritten from left to right
        pos = self._order(self.pos_embed, 0)
        batch, tokens, _ = x.shape
        label = self._class(y)  # (B or 1, 1, D) or 0.0
        inverse_temperature = x.new_ones(batch)
        if guide.active:
            if isinstance(label, Tensor):
                null = self._class(None)
                assert isinstance(null, Tensor)
                label = torch.cat([label.expand(batch, -1, -1), null.expand(batch, -1, -1)])  # (2B, 1, D)
            inverse_temperature = torch.cat([inverse_temperature, inverse_temperature / guide.attn_temp])
        first = self.attn_blocks[0]
        assert isinstance(first, Layer)
        shape = (len(self.attn_blocks), len(inverse_temperature), first.attention.heads, tokens, -1)
        width = pos.shape[-1] // first.attention.heads
        cache = KVCache(x.new_empty(*shape[:-1], width), x.new_empty(*shape[:-1], width))
        for i in range(tokens - 1):
            token = x[:, i : i + 1]  # (B, 1, P)
            h = self.proj_in(torch.cat([token, token]) if guide.active else token) + pos[i] + label  # (B or 2B, 1, D)
            for n, layer in enumerate(self.attn_blocks):
                assert isinstance(layer, Layer)
                h = layer.step(h, cache.k[n], cache.v[n], i, inverse_temperature)
            a, b = self._affine(h)  # (B or 2B, 1, P)
            if guide.active:
                a, b = guide.combine(a, b, i, tokens)  # (B, 1, P)
            x[:, i + 1] = x[:, i + 1] * torch.exp(a[:, 0]) + b[:, 0]
        return self._order(x, 1)


@dataclass(frozen=True)
class Guide:
    """Classifier-free guidance of the affine parameters while decoding (TarFlow section 3.4): p + w·(p - p_∅).

    `what` picks log-scales a, shifts b, or both. `annealed` grows w linearly along the sequence. `attn_temp` is the
    attention temperature of the unconditional pass, which also guides a model without classes.
    """

    weight: float = 0.0
    what: GuideWhat = "ab"
    attn_temp: float = 1.0
    annealed: bool = False

    @property
    def active(self) -> bool:
        return self.weight > 0

    def combine(self, a: Tensor, b: Tensor, i: int, tokens: int) -> tuple[Tensor, Tensor]:
        w = self.weight * (i + 1) / (tokens - 1) if self.annealed else self.weight
        (a, a_null), (b, b_null) = a.chunk(2), b.chunk(2)
        if "a" in self.what:
            a = a + w * (a - a_null)
        if "b" in self.what:
            b = b + w * (b - b_null)
        return a, b


class TarFlow(nn.Module):
    var: Tensor

    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(FlowBlock(config, depth, flip=i % 2 == 1) for i, depth in enumerate(config.depths))
        # E[z²] per dimension in token order, by which sampling scales N(0, I). Published volume-preserving models carry
        # it; maximum likelihood with free scales drives it to one, and there it stays at one.
        self.register_buffer("var", torch.ones(config.tokens, config.token_dim))

    def patchify(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, T, P), P = C · patch², channel-major as in the published code."""
        return F.pixel_unshuffle(x, self.config.patch).flatten(2).transpose(1, 2)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, T, P) to (B, C, H, W); the inverse of `patchify`."""
        side = self.config.image_size // self.config.patch
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), self.config.patch)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Encoded:
        """Encode: x (B, C, H, W) in [-1, 1] plus η-noise, y (B,) class indices with -1 = dropped, or None = all
        dropped.
        """
        u = self.patchify(x)  # (B, T, P)
        logdet = u.new_zeros(len(u))  # (B,)
        for block in self.blocks:
            u, block_logdet = block(u, y)  # (B, T, P), (B,)
            logdet = logdet + block_logdet
        return Encoded(self.unpatchify(u), logdet)

    @torch.no_grad()
    def decode(self, z: Tensor, y: Tensor | None = None, guide: Guide | None = None) -> Tensor:
        """f⁻¹: z (B, C, H, W) to x (B, C, H, W). Without guidance it inverts `forward` exactly."""
        u = self.patchify(z)
        for block in reversed(self.blocks):
            assert isinstance(block, FlowBlock)
            u = block.decode(u, y, guide or Guide())
        return self.unpatchify(u)

    def sample(self, noise: Tensor, y: Tensor | None = None, guide: Guide | None = None) -> Tensor:
        """Standard normal noise (B, C, H, W) to noisy images x + η·ε′, scaled by `var`."""
        return self.decode(noise * self.unpatchify(self.var[None]).sqrt(), y, guide)

    def denoise(self, x: Tensor, y: Tensor | None, eta: float) -> Tensor:
        """One score step removes the η-noise of a sample: x + η²·∇ log p(x) (Tweedie; TarFlow section 3.3)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(nll(self(x, y)).sum() * x[0].numel(), x)
        return (x - eta**2 * grad).detach()


def nll(encoded: Encoded) -> Tensor:
    """Equation (3) per dimension and without its constant: ½·mean(z²) - log|det|/n, shape (B,), in nats."""
    return 0.5 * encoded.z.float().square().mean(dim=(1, 2, 3)) - encoded.logdet


def bits_per_dim(nll_nats: float, levels: int = 256) -> float:
    """Bits per dimension of data quantized to `levels` values over [-1, 1], from `nll` (which lacks ½·log 2π)."""
    return (nll_nats + 0.5 * math.log(2 * math.pi)) / math.log(2) + math.log2((levels - 1) / 2)


def forward_flops(config: TarFlowConfig) -> int:
    """Floating point operations of `TarFlow.forward` for one image, 2 a multiply-add: every linear layer, and QKᵀ and
    AV dense (T² entries a head, as `torch.utils.flop_counter` has them; the causal half would do). Elementwise work
    is not counted."""
    tokens, width = config.tokens, config.width
    layer = (4 + 2 * config.expansion) * width**2 + 2 * tokens * width  # qkv, proj and MLP; QKᵀ and AV
    ends = (3 if config.nvp else 2) * config.token_dim * width  # proj_in and proj_out
    return 2 * tokens * (sum(config.depths) * layer + len(config.depths) * ends)


def published_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published `ml-tarflow` state dict in the form that `TarFlow.load_state_dict` takes: its causal-mask buffers
    are accepted and dropped, since attention here is causal without them."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(".attn_mask")}
