"""What a stored x means: uint8 0 … 255 is [-1, 1]."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def scale_pixels(pixels: Tensor, out: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1], x / 127.5 - 1, into `out`."""
    return out.copy_(pixels).div_(127.5).sub_(1)


def to_float(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 to float32 in [-1, 1], x / 127.5 - 1."""
    return scale_pixels(torch.from_numpy(np.array(pixels)), torch.empty(pixels.shape))


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """[-1, 1] to 0 … 255, rounded; values outside are clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
