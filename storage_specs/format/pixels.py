"""What a stored x means: uint8 0 … 255 stands for [-1, 1], and latents have a scale and a shift. Mirror images."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nfm.storage_specs.format.schema import LatentSpec, PixelSpec

PICTURE_CHANNELS = (1, 3)  # of images that can be shown: grey or RGB


def scale_x(stored: Tensor, x_spec: PixelSpec | LatentSpec, out: Tensor) -> Tensor:
    """Write the x that stored values stand for to the float32 tensor `out` of the same shape. Returns `out`.

    It is value / 127.5 - 1 of uint8 pixels, in [-1, 1], and (value - shift) · scale of latents, which must come in
    their own floating-point dtype.
    """
    out.copy_(stored)
    if isinstance(x_spec, PixelSpec):
        return out.div_(127.5).sub_(1)
    return out.sub_(x_spec.shift).mul_(x_spec.scale)


def mirror_rows(images: Tensor, is_mirrored: Tensor) -> None:
    """Replace those rows of images (B, C, H, W) where `is_mirrored` (B,) is true by their mirror images, left to
    right."""
    images[is_mirrored] = images[is_mirrored].flip(-1)


def to_float(stored: NDArray[Any], x_spec: PixelSpec | LatentSpec) -> Tensor:
    """A new float32 tensor with the x that stored values stand for (see `scale_x`). They come in the dtype of the files
    of a store, of which uint16 is bfloat16."""
    values = torch.from_numpy(np.array(stored))
    if x_spec.dtype == "bfloat16":
        values = values.view(torch.bfloat16)
    return scale_x(values, x_spec, torch.empty(stored.shape))


def to_values(x: Tensor, x_spec: PixelSpec | LatentSpec) -> NDArray[Any]:
    """The values that images x (B, C, H, W) stand for, the inverse of `to_float`: uint8 pixels, or float32 latents as
    their decoder takes them.

    Raises FloatingPointError for NaN and infinity.
    """
    if isinstance(x_spec, PixelSpec):
        return to_uint8(x)
    values = x / x_spec.scale + x_spec.shift
    _check_finite(values)
    latents: NDArray[np.float32] = values.float().cpu().numpy()
    return latents


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """The pixels 0 … 255, rounded, of images (B, C, H, W) in [-1, 1]. Values outside are clipped.

    Raises FloatingPointError for NaN and infinity, which are no pixels.
    """
    _check_finite(images)
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def _check_finite(images: Tensor) -> None:
    is_finite = images.isfinite().flatten(1).all(dim=1)
    if not is_finite.all():
        raise FloatingPointError(f"{int((~is_finite).sum())} of {len(images)} images are not finite")
