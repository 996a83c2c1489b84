"""TarFlow, the normalizing-flow teacher (Zhai et al., 2025, arXiv:2412.06329; NFM paper section 2.2).

`f` is a stack of autoregressive blocks over image patches; every second block reads the sequence backwards. Token i of
a block is moved by an affine map whose parameters a causal transformer computed from tokens < i:

    u_i = (x_i - b_i) * exp(-a_i),        log|det| = -sum_i a_i

so encoding (x to z) is one parallel pass and decoding (z to x) is sequential. Parameter names are those of the
published `ml-tarflow` state dicts, which load here after `drop_attention_masks`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfm.models.labels import class_rows
from nfm.models.patches import ImageSize, canonical_size, height_and_width, patch_grid

GuideWhat = Literal["a", "b", "ab"]
MAX_LAYERS = 512  # many times those of published networks; each takes milliseconds to make, even without weights


@dataclass(frozen=True)
class TarFlowConfig:
    """All that fixes the shapes of a TarFlow. Raises ValueError for sizes that do not fit each other.

    `nvp=False` is the volume-preserving variant: it only shifts, and its log-determinant is zero.
    """

    channels: int  # image channels C
    image_size: ImageSize  # (H, W) in pixels, one number where both are equal
    patch: int  # side of a patch, in pixels; each patch is one token
    width: int  # channels D of the transformers
    depths: tuple[int, ...]  # transformer layers of each flow block, in the order in which data passes through them
    num_classes: int = 0  # 0: unconditional
    head_dim: int = 64  # channels of one attention head
    expansion: int = 4  # width of the MLPs' hidden layer / D
    nvp: bool = True

    def __post_init__(self) -> None:
        sizes = (self.channels, *self.image_sides, self.patch, self.width, self.head_dim, self.expansion)
        if min(sizes) < 1:
            raise ValueError("got a size below 1; expected positive sizes")
        object.__setattr__(self, "image_size", canonical_size(self.image_size))
        patch_grid(self.image_size, self.patch)
        if self.width % self.head_dim:
            raise ValueError(f"got width {self.width} and head_dim {self.head_dim}; head_dim must divide the width")
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"got depths {self.depths[:8]}; expected at least one block of at least one layer")
        if sum(self.depths) > MAX_LAYERS:
            raise ValueError(f"got {sum(self.depths)} layers; expected at most {MAX_LAYERS}")

    @property
    def image_sides(self) -> tuple[int, int]:
        """(H, W), in pixels."""
        return height_and_width(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.image_size, self.patch)

    @property
    def tokens(self) -> int:
        """T, the length of the sequence: the patches, row by row."""
        return math.prod(self.grid)

    @property
    def token_dim(self) -> int:
        """P, the values in one token."""
        return self.channels * self.patch**2

    @property
    def decode_steps(self) -> int:
        """Sequential steps of `TarFlow.decode`: one for each token but the first, in each block."""
        return len(self.depths) * (self.tokens - 1)


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
    number = "[1-9][0-9]{0,5}"
    match = re.fullmatch(rf"TF-({number}[×x]{number}(?:\+{number}[×x]{number})*)-({number})/({number})", notation)
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
    """`z` = f(x), (B, C, H, W), and `logdet`, the log-determinant of f at x per dimension, (B,), in nats."""

    z: Tensor
    logdet: Tensor


@dataclass
class KVCache:
    """Keys and values of all layers of one flow block while it decodes: (layers, B, heads, T, head_dim) each, filled
    token by token."""

    k: Tensor
    v: Tensor


class Attention(nn.Module):
    """Causal multi-head self-attention, with the norm before it."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.heads = width // head_dim

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens x (B, T, D)."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3 * self.heads, -1)  # (B, T, 3·heads, head_dim)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)  # (B, heads, T, head_dim) each
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)  # (B, heads, T, head_dim) each
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, head_dim)
        result: Tensor = self.proj(out.transpose(1, 2).flatten(2))  # (B, T, D)
        return result

    def step(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, i: int, inverse_temperature: Tensor) -> Tensor:
        """`forward` for token i alone, x (B, 1, D). The caches (B, heads, T, head_dim) hold the tokens before it, and
        take its key and value. `inverse_temperature` (B,) scales the attention logits."""
        q, k, v = self.project(x)  # (B, heads, 1, head_dim) each
        k_cache[:, :, i : i + 1] = k
        v_cache[:, :, i : i + 1] = v
        q = q * inverse_temperature.view(-1, 1, 1, 1)  # (B, heads, 1, head_dim)
        keys, values = k_cache[:, :, : i + 1], v_cache[:, :, : i + 1]  # (B, heads, i + 1, head_dim) each
        out = F.scaled_dot_product_attention(q, keys, values)  # (B, heads, 1, head_dim)
        result: Tensor = self.proj(out.transpose(1, 2).flatten(2))  # (B, 1, D)
        return result


class MLP(nn.Module):
    """Two linear layers with GELU between them, and the norm before them."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.main = nn.Sequential(nn.Linear(width, width * expansion), nn.GELU(), nn.Linear(width * expansion, width))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.main(self.norm(x))  # (B, T, D)
        return result


class Layer(nn.Module):
    """A transformer layer: attention and MLP, each added to its input."""

    def __init__(self, width: int, head_dim: int, expansion: int) -> None:
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.mlp = MLP(width, expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)  # (B, T, D)
        result: Tensor = x + self.mlp(x)  # (B, T, D)
        return result

    def step(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, i: int, inverse_temperature: Tensor) -> Tensor:
        """`forward` for token i alone; the arguments are those of `Attention.step`."""
        x = x + self.attention.step(x, k_cache, v_cache, i, inverse_temperature)  # (B, 1, D)
        result: Tensor = x + self.mlp(x)  # (B, 1, D)
        return result


def _embedding(*shape: int) -> nn.Parameter:
    """Normal values of standard deviation 0.01.

    On the meta device only the shape counts; to draw there, PyTorch would import its compiler, which takes seconds.
    """
    values = torch.empty(shape)
    if not values.is_meta:
        values.normal_().mul_(1e-2)
    return nn.Parameter(values)


class FlowBlock(nn.Module):
    """One autoregressive affine map over T tokens. With `flip` it reads them from the last to the first."""

    def __init__(self, config: TarFlowConfig, depth: int, flip: bool) -> None:
        super().__init__()
        self.flip = flip
        self.nvp = config.nvp
        self.proj_in = nn.Linear(config.token_dim, config.width)
        self.pos_embed = _embedding(config.tokens, config.width)
        self.class_embed = _embedding(config.num_classes, 1, config.width) if config.num_classes else None
        self.attn_blocks = nn.ModuleList(Layer(config.width, config.head_dim, config.expansion) for _ in range(depth))
        self.proj_out = nn.Linear(config.width, config.token_dim * (2 if config.nvp else 1))
        nn.init.zeros_(self.proj_out.weight)  # the flow starts close to the identity
        nn.init.zeros_(self.proj_out.bias)

    def _reorder(self, tokens: Tensor, dim: int) -> Tensor:
        """Tokens along `dim` in the order in which this block reads them. Applied twice, it is the identity."""
        return tokens.flip(dim) if self.flip else tokens

    def _embed_label(self, y: Tensor | None) -> Tensor | float:
        """Embedding of the labels y (B,): (B, 1, D), or (1, 1, D) where y is None, that is all dropped, or 0 for an
        unconditional network. The embedding of a dropped label is the mean of all classes, in encoding and decoding."""
        if self.class_embed is None:
            return 0.0
        mean = self.class_embed.mean(dim=0, keepdim=True)  # (1, 1, D)
        if y is None:
            return mean
        return class_rows(torch.cat([self.class_embed, mean]), y)  # (B, 1, D)

    def _affine_parameters(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Log-scales a and shifts b, (B, T, P) each, from hidden states h (B, T, D). Those at i are for token i + 1."""
        out = self.proj_out(h)  # (B, T, 2P), or (B, T, P) where the volume is preserved
        if out.dtype.itemsize < 4:
            out = out.float()  # under autocast too, the affine map is computed in float32: bf16 would round z
        if self.nvp:
            a, b = out.chunk(2, dim=-1)
            return a, b
        return torch.zeros_like(out), out

    def forward(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Encode tokens x (B, T, P) with labels y (B,): u (B, T, P) and the log-determinant per dimension (B,)."""
        x = self._reorder(x, 1)  # (B, T, P)
        h = self.proj_in(x) + self._reorder(self.pos_embed, 0) + self._embed_label(y)  # (B, T, D)
        for layer in self.attn_blocks:
            h = layer(h)  # (B, T, D)
        a, b = self._affine_parameters(h)  # (B, T, P) each, for the *next* token
        a = F.pad(a[:, :-1], (0, 0, 1, 0))  # (B, T, P); token 0 passes unchanged
        b = F.pad(b[:, :-1], (0, 0, 1, 0))  # (B, T, P)
        u = (x - b) * torch.exp(-a)  # (B, T, P)
        return self._reorder(u, 1), -a.mean(dim=(1, 2))  # (B, T, P), (B,)

    def decode(
        self, u: Tensor, y: Tensor | None, guide: "Guide", advance: Callable[[int], None] | None = None
    ) -> Tensor:
        """The inverse of `forward`: x (B, T, P), computed token by token with a cache of keys and values. With
        guidance, the conditional and the unconditional pass run as one batch of 2B. `advance(1)` is called after each
        token."""
        x = self._reorder(u, 1).clone()  # (B, T, P), overwritten from left to right
        pos = self._reorder(self.pos_embed, 0)  # (T, D)
        batch, tokens, _ = x.shape
        label = self._embed_label(y)  # (B or 1, 1, D) or 0.0
        inverse_temperature = x.new_ones(batch)  # (B,)
        if guide.is_active:
            if isinstance(label, Tensor):
                null = self._embed_label(None)
                assert isinstance(null, Tensor)
                label = torch.cat([label.expand(batch, -1, -1), null.expand(batch, -1, -1)])  # (2B, 1, D)
            inverse_temperature = torch.cat([inverse_temperature, inverse_temperature / guide.attn_temp])  # (2B,)
        cache = self._empty_cache(x, len(inverse_temperature))
        for i in range(tokens - 1):
            token = x[:, i : i + 1]  # (B, 1, P)
            if guide.is_active:
                token = torch.cat([token, token])  # (2B, 1, P)
            h = self.proj_in(token) + pos[i] + label  # (B or 2B, 1, D)
            for n, layer in enumerate(self.attn_blocks):
                assert isinstance(layer, Layer)
                h = layer.step(h, cache.k[n], cache.v[n], i, inverse_temperature)  # (B or 2B, 1, D)
            a, b = self._affine_parameters(h)  # (B or 2B, 1, P) each
            if guide.is_active:
                a, b = guide.combine(a, b, i, tokens)  # (B, 1, P) each
            x[:, i + 1] = x[:, i + 1] * torch.exp(a[:, 0]) + b[:, 0]  # (B, P)
            if advance is not None:
                advance(1)
        return self._reorder(x, 1)  # (B, T, P)

    def _empty_cache(self, x: Tensor, batch: int) -> KVCache:
        """A cache for `batch` sequences as long as those of x (B, T, P), with its dtype and device."""
        first_layer = self.attn_blocks[0]
        assert isinstance(first_layer, Layer)
        heads = first_layer.attention.heads
        head_dim = self.pos_embed.shape[-1] // heads
        shape = (len(self.attn_blocks), batch, heads, x.shape[1], head_dim)
        return KVCache(k=x.new_empty(shape), v=x.new_empty(shape))


@dataclass(frozen=True)
class Guide:
    """Classifier-free guidance of the affine parameters while decoding (TarFlow section 3.4): p + w·(p - p_∅).

    `weight` is w; 0 is no guidance. `what` says whether log-scales a, shifts b or both are guided. With `annealed`, w
    grows linearly along the sequence. `attn_temp` is the attention temperature of the unconditional pass, which runs
    only if w > 0; other than 1, it guides a model without classes too.
    """

    weight: float = 0.0
    what: GuideWhat = "ab"
    attn_temp: float = 1.0
    annealed: bool = False

    @property
    def is_active(self) -> bool:
        return self.weight > 0

    def combine(self, a: Tensor, b: Tensor, i: int, tokens: int) -> tuple[Tensor, Tensor]:
        """The guided a and b (B, 1, P), computed at token i of a sequence, from those of both passes (2B, 1, P)."""
        w = self.weight
        if self.annealed:
            w = self.weight * (i + 1) / (tokens - 1)
        a, a_null = a.chunk(2)  # (B, 1, P) each
        b, b_null = b.chunk(2)  # (B, 1, P) each
        if "a" in self.what:
            a = a + w * (a - a_null)
        if "b" in self.what:
            b = b + w * (b - b_null)
        return a, b


class TarFlow(nn.Module):
    """The flow f: images with η-noise to standard normal z, and back."""

    var: Tensor

    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(FlowBlock(config, depth, flip=i % 2 == 1) for i, depth in enumerate(config.depths))
        # E[z²] per dimension in token order; sampling scales N(0, I) by its root. Published volume-preserving models
        # have other values than one. With free scales, maximum likelihood makes E[z²] one.
        self.register_buffer("var", torch.ones(config.tokens, config.token_dim))

    def patchify(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, T, P), P = C · patch², channel-major as in the published code."""
        return F.pixel_unshuffle(x, self.config.patch).flatten(2).transpose(1, 2)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, T, P) to (B, C, H, W); the inverse of `patchify`."""
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, self.config.grid), self.config.patch)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Encoded:
        """Encode x (B, C, H, W), images in [-1, 1] plus η-noise, with labels y (B,): class indices, where -1 is a
        dropped label. Without y, all are dropped."""
        u = self.patchify(x)  # (B, T, P)
        logdet = u.new_zeros(len(u))  # (B,)
        for block in self.blocks:
            u, block_logdet = block(u, y)  # (B, T, P), (B,)
            logdet = logdet + block_logdet
        return Encoded(self.unpatchify(u), logdet)  # (B, C, H, W), (B,)

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        y: Tensor | None = None,
        guide: Guide | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Tensor:
        """f⁻¹: z (B, C, H, W) to x (B, C, H, W). Without guidance it inverts `forward` exactly.

        It is sequential and slow: `advance(1)` is called after each of its `config.decode_steps` steps.
        """
        u = self.patchify(z)  # (B, T, P)
        for block in reversed(self.blocks):
            assert isinstance(block, FlowBlock)
            u = block.decode(u, y, guide or Guide(), advance)  # (B, T, P)
        return self.unpatchify(u)  # (B, C, H, W)

    def sample(
        self,
        noise: Tensor,
        y: Tensor | None = None,
        guide: Guide | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Noisy images x + η·ε′ (B, C, H, W) from standard normal noise of the same shape, scaled by the root of `var`.

        `advance` is that of `decode`.
        """
        scale = self.unpatchify(self.var[None]).sqrt()  # (1, C, H, W)
        return self.decode(noise * scale, y, guide, advance)

    def denoise(self, x: Tensor, y: Tensor | None, eta: float) -> Tensor:
        """Samples (B, C, H, W) without their η-noise, by one score step: x + η²·∇ log p(x) (Tweedie's formula; TarFlow
        section 3.3)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = nll(self(x, y)).sum() * x[0].numel()  # -log p(x) up to a constant, summed over the batch
            (gradient,) = torch.autograd.grad(energy, x)  # (B, C, H, W)
        return (x - eta**2 * gradient).detach()


def nll(encoded: Encoded) -> Tensor:
    """Negative log-likelihood per dimension, equation (3) without its constant ½·log 2π: ½·mean(z²) - log|det|/n.
    Shape (B,), in nats."""
    return 0.5 * encoded.z.float().square().mean(dim=(1, 2, 3)) - encoded.logdet


def bits_per_dim(nll_nats: float, levels: int | None = 256) -> float:
    """Bits per dimension of data that has `levels` values over [-1, 1], from the value of `nll`, to which this adds the
    constant ½·log 2π. None: of the density of continuous data, which may be negative."""
    density_bits = (nll_nats + 0.5 * math.log(2 * math.pi)) / math.log(2)
    return density_bits if levels is None else density_bits + math.log2((levels - 1) / 2)


def forward_flops(config: TarFlowConfig) -> int:
    """Floating point operations of `TarFlow.forward` for one image, where a multiply-add counts as 2.

    It counts all linear layers, and QKᵀ and AV with all T² entries of a head, as `torch.utils.flop_counter` does
    (causal attention needs half of them). Elementwise operations are not counted.
    """
    tokens = config.tokens
    width = config.width
    # Multiply-adds of one token:
    linear_layers = (4 + 2 * config.expansion) * width**2  # qkv, proj and the MLP
    attention = 2 * tokens * width  # QKᵀ and AV
    projections = (3 if config.nvp else 2) * config.token_dim * width  # proj_in and proj_out
    per_token = sum(config.depths) * (linear_layers + attention) + len(config.depths) * projections
    return 2 * tokens * per_token


def drop_attention_masks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published `ml-tarflow` state dict without its causal masks, which `TarFlow.load_state_dict` does not take:
    attention is causal here without them."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(".attn_mask")}
